# SPDX-License-Identifier: Apache-2.0
"""Camera pose from a scene-coordinate map: RANSAC on the most certain cells, then weighted refinement.

RANSAC is PoseLib's LO-RANSAC, whose inlier count does not use the variances. Its result is refined here with every cell
weighted by its variance in pixels; the last linear system of the refinement gives the covariance.

PoseLib has no wheel for Linux on ARM. Where it is not installed, OpenCV's USAC does the same, with other samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import has_numba
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import map_frame_covariance
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.pixloc.optimizer import left_update
from kfloc_ros.types import CoarsePose, SceneCoordinates

try:
    import poselib
except ImportError:
    poselib = None


@dataclass(frozen=True)
class PnpSettings:
    """Settings of PnP, and the conditions for accepting its pose."""

    max_cells: int = 1500
    """Largest number of cells used; those of smallest variance are taken."""
    max_sigma_m: float = 0.5
    """Largest standard deviation of a cell that is used."""
    max_error_px: float = 10.0
    """Inlier threshold of the reprojection error."""
    pixel_sigma_px: float = 2.0
    """Standard deviation of a cell's position in the image."""
    min_inliers: int = 40
    min_inlier_ratio: float = 0.1
    covariance_scale: float = 1.0
    """Scale of the covariance, from the map's calibration: neighbouring cells share errors, so the sum of their
    information is too large."""


@dataclass(frozen=True, eq=False)
class Correspondences:
    """Cells of a scene-coordinate map used for the pose."""

    pixels: NDArray[np.float64]
    """(N, 2)"""
    points: NDArray[np.float64]
    """(N, 3) metres, map frame"""
    sigma_m: NDArray[np.float64]
    """(N,)"""


def choose_cells(coordinates: SceneCoordinates, settings: PnpSettings) -> Correspondences:
    """Return the most certain cells of a scene-coordinate map."""
    w = coordinates.variance.shape[1]
    sigma = coordinates.variance.sqrt().reshape(-1).cpu().numpy().astype(np.float64)
    usable = coordinates.valid.reshape(-1).cpu().numpy() & (sigma < settings.max_sigma_m)
    index = np.flatnonzero(usable)
    if len(index) > settings.max_cells:
        index = index[np.argpartition(sigma[index], settings.max_cells)[: settings.max_cells]]
    offset = coordinates.pixel_offset
    pixels = np.stack([index % w, index // w], axis=1).astype(np.float64) * coordinates.stride + offset
    points = coordinates.mean.reshape(3, -1).t().cpu().numpy().astype(np.float64)[index]
    return Correspondences(pixels, points, sigma[index])


def choose_part(coordinates: SceneCoordinates, settings: PnpSettings) -> Correspondences:
    """Return the most certain cells; if a part is valid, that part of the largest number: the choice is as strict."""
    part = float(coordinates.valid.float().mean())
    return choose_cells(coordinates, replace(settings, max_cells=max(round(part * settings.max_cells), 1)))


def agreeing_share(coordinates: SceneCoordinates, camera: Camera, T_map_camera: Matrix, settings: PnpSettings) -> float:
    """Return the share of the most certain cells whose points project near their cells from a pose."""
    cells = choose_part(coordinates, settings)
    if len(cells.pixels) < settings.min_inliers:
        return 0.0
    return float(_agreeing(cells, camera, inverse_pose(T_map_camera), settings).mean())


def _agreeing(cells: Correspondences, camera: Camera, T_camera_map: Matrix, settings: PnpSettings) -> NDArray[np.bool_]:
    """Return (N,) bool: a cell's point projects within the inlier threshold of the cell."""
    return _near(cells.pixels, cells.points, T_camera_map, camera, settings.max_error_px)


def _near(
    pixels: NDArray[np.float64], points: NDArray[np.float64], T: Matrix, camera: Camera, max_error_px: float
) -> NDArray[np.bool_]:
    """Return (N,) bool: a point projects near its pixel from a pose ``T_camera_points``."""
    x, y, z = (points @ T[:3, :3].T + T[:3, 3]).T
    in_front = z > 0
    z = np.where(in_front, z, 1.0)
    u, v = camera.fx * x / z + camera.cx - pixels[:, 0], camera.fy * y / z + camera.cy - pixels[:, 1]
    return np.asarray(in_front & (u * u + v * v <= max_error_px**2))


MAJORITY = 0.6
"""Share of the cells that must agree with a pose near the expected one, so that RANSAC is not needed: no other pose can
then have as many inliers."""
PROMISING = 0.15
"""Share of the cells that must agree with the expected pose, after a first fit, for others to be drawn to it."""
WIDE_ERRORS = 3.0
"""Truncation of the loss that draws them, in inlier thresholds."""


def solve_pnp(
    coordinates: SceneCoordinates, camera: Camera, settings: PnpSettings, expected: Matrix | None = None
) -> CoarsePose:
    """Solve for the coarse pose of a scene-coordinate map.

    Args:
        coordinates: scene coordinates, map frame.
        camera: pinhole camera of the image.
        settings: settings of PnP.
        expected: pose ``T_map_camera`` (4, 4) of a frame just before. If most cells agree with a pose near it, that is
            the pose with the most inliers, and RANSAC is left out.

    Returns:
        The pose; ``success`` and ``reason`` tell if it is usable.
    """
    cells = choose_cells(coordinates, settings)
    if len(cells.pixels) < settings.min_inliers:
        return _failure(f"only {len(cells.pixels)} cells are certain enough for PnP", 0, 0.0)
    found = None if expected is None else _majority(cells, camera, settings, inverse_pose(expected))
    start, inliers = found or _ransac(cells, camera, settings, ITERATIONS if expected is None else FEWER_ITERATIONS)
    count, ratio = int(inliers.sum()), float(inliers.mean())
    if count < settings.min_inliers or ratio < settings.min_inlier_ratio:
        return _failure(f"PnP found {count} inliers of {len(inliers)} cells", count, ratio)
    inlier_cells = Correspondences(cells.pixels[inliers], cells.points[inliers], cells.sigma_m[inliers])
    T_camera_map, information = _refine(start, inlier_cells, camera, settings)
    covariance = map_frame_covariance(information, T_camera_map)
    if covariance is None:
        return _failure("the PnP system is degenerate", count, ratio)
    return CoarsePose(True, "", inverse_pose(T_camera_map), covariance * settings.covariance_scale, count, ratio)


def _majority(
    cells: Correspondences, camera: Camera, settings: PnpSettings, T_camera_map: Matrix
) -> tuple[Matrix, NDArray[np.bool_]] | None:
    """Return the pose near an expected one, and (N,) bool, its inliers, if most cells agree with it.

    It is refined as RANSAC refines its best one: first by a loss as wide as the inlier threshold, since a narrow one
    would keep the expected pose by the few cells that agree with it by chance.
    """
    wide = replace(settings, pixel_sigma_px=settings.max_error_px)
    T, _ = _refine(T_camera_map, cells, camera, wide)
    share = float(_agreeing(cells, camera, T, settings).mean())
    if share < PROMISING:
        return None
    if share < MAJORITY:  # the camera has moved further than the loss is wide
        T = _polished(cells.pixels, cells.points, T, camera, WIDE_ERRORS * settings.max_error_px)
    T = _polished(cells.pixels, cells.points, T, camera, settings.max_error_px)
    inliers = _agreeing(cells, camera, T, settings)
    return (T, inliers) if float(inliers.mean()) >= MAJORITY else None


def _camera_dict(camera: Camera) -> dict[str, object]:
    """Return a camera as PoseLib takes it."""
    parameters = [camera.fx, camera.fy, camera.cx, camera.cy]
    return {"model": "PINHOLE", "width": camera.width, "height": camera.height, "params": parameters}


RANSAC_CELLS = 500
"""Cells on which RANSAC counts inliers; its time grows with them, and this many find the same pose."""
ITERATIONS, FEWER_ITERATIONS = 1000, 400
"""Largest number of RANSAC's samples without an expected pose and with one: a camera that is followed has another
start, and a pose that less than 30 % of its cells agree with is of little use to it."""


def _ransac(
    cells: Correspondences, camera: Camera, settings: PnpSettings, iterations: int
) -> tuple[Matrix, NDArray[np.bool_]]:
    """Return the pose ``T_camera_map`` with the most inliers, and (N,) bool, the inliers.

    RANSAC has a part of the cells; its pose is then polished with all of them, as RANSAC polishes its best one.
    """
    limits, step = {"max_iterations": iterations, "min_iterations": 50}, max(len(cells.pixels) // RANSAC_CELLS, 1)
    pixels, points = (np.ascontiguousarray(values[::step]) for values in (cells.pixels, cells.points))
    T, inliers = absolute_pose(pixels, points, camera, settings.max_error_px, **limits)
    if step == 1 or not inliers.any():
        return (T, inliers) if step == 1 else (T, np.zeros(len(cells.pixels), dtype=bool))
    T = _polished(cells.pixels, cells.points, T, camera, settings.max_error_px)
    return T, _agreeing(cells, camera, T, settings)


def absolute_pose(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    camera: Camera,
    max_error_px: float,
    *,
    max_iterations: int,
    min_iterations: int | None = None,
) -> tuple[Matrix, NDArray[np.bool_]]:
    """Return the pose ``T_camera_points`` (4, 4) with the most inliers by LO-RANSAC, and (N,) bool, the inliers.

    The same arguments give the same pose.

    Args:
        pixels: (N, 2)
        points: (N, 3) metres, of a frame near the camera.
        camera: pinhole camera.
        max_error_px: inlier threshold of the reprojection error.
        max_iterations, min_iterations: limits on the samples that are tried; None: PoseLib's.
    """
    if poselib is None:
        return _absolute_pose_by_opencv(pixels, points, camera, max_error_px, max_iterations)
    options = {"max_reproj_error": max_error_px, "max_iterations": max_iterations, "seed": 0}
    if min_iterations is not None:
        options["min_iterations"] = min_iterations
    pose, info = poselib.estimate_absolute_pose(pixels, points, _camera_dict(camera), options, {})
    return make_pose(pose.R, pose.t), np.asarray(info["inliers"], dtype=bool)


def _absolute_pose_by_opencv(
    pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera, max_error_px: float, max_iterations: int
) -> tuple[Matrix, NDArray[np.bool_]]:
    none = np.eye(4), np.zeros(len(points), dtype=bool)
    if len(points) < MINIMAL_POINTS:
        return none
    usac = cv2.UsacParams()
    usac.threshold, usac.maxIterations, usac.confidence, usac.randomGeneratorState = (
        max_error_px,
        max_iterations,
        0.9999,
        0,
    )
    usac.score, usac.loMethod = cv2.SCORE_METHOD_MSAC, cv2.LOCAL_OPTIM_INNER_AND_ITER_LO
    try:
        success, _, rotation, translation, _ = cv2.solvePnPRansac(points, pixels, camera.K, None, params=usac)
    except cv2.error:  # of points without a solution, such as on a line
        return none
    if not success or not (np.isfinite(rotation).all() and np.isfinite(translation).all()):
        return none
    T = _polished_by_opencv(pixels, points, _pose_of(rotation, translation), camera, max_error_px)
    return T, _near(pixels, points, T, camera, max_error_px)


def _polished(
    pixels: NDArray[np.float64], points: NDArray[np.float64], T: Matrix, camera: Camera, max_error_px: float
) -> Matrix:
    """Return the pose near T with the smallest truncated reprojection error."""
    if poselib is None:
        return _polished_by_opencv(pixels, points, T, camera, max_error_px)
    start = poselib.CameraPose()
    start.R, start.t = T[:3, :3], T[:3, 3]
    loss = {"loss_type": "TRUNCATED", "loss_scale": max_error_px, "max_iterations": 8, "step_tol": 1e-5}
    pose, _ = poselib.refine_absolute_pose(pixels, points, start, _camera_dict(camera), loss)
    return make_pose(pose.R, pose.t)


def _polished_by_opencv(
    pixels: NDArray[np.float64], points: NDArray[np.float64], T: Matrix, camera: Camera, max_error_px: float
) -> Matrix:
    for _ in range(3):
        inliers = _near(pixels, points, T, camera, max_error_px)
        if inliers.sum() < MINIMAL_POINTS:
            break
        rotation, _ = cv2.Rodrigues(T[:3, :3])
        found = cv2.solvePnPRefineLM(points[inliers], pixels[inliers], camera.K, None, rotation, T[:3, 3:].copy())
        if not all(np.isfinite(item).all() for item in found):
            break
        T = _pose_of(*found)
    return T


def _pose_of(rotation: NDArray[np.float64], translation: NDArray[np.float64]) -> Matrix:
    return make_pose(np.asarray(cv2.Rodrigues(rotation)[0], dtype=np.float64), np.ravel(translation))


def _failure(reason: str, count: int, ratio: float) -> CoarsePose:
    return CoarsePose(False, reason, None, None, count, ratio)


MINIMAL_POINTS = 6
"""Points that OpenCV needs for a pose."""
REFINE_ITERATIONS = 15
NEAR_M = 0.05
"""Smallest depth of a point that counts."""


def _refine(T: Matrix, cells: Correspondences, camera: Camera, settings: PnpSettings) -> tuple[Matrix, Matrix]:
    """Refine by Gauss-Newton on whitened point-to-ray distances with a Cauchy loss; return pose and information.

    With isotropic 3-D noise the distance of a point to its cell's viewing ray is the maximum-likelihood residual and
    linear in the noise. The reprojection error is not: it divides by a noisy depth, which biases the pose (1 cm at 5 cm
    noise in a 3 m room).
    """
    if not has_numba():
        return _refined_step_by_step(T, cells, camera, settings)
    from kfloc_ros.kfnet import kernels

    refined, intrinsics = np.array(T, dtype=np.float64), np.array([camera.fx, camera.fy, camera.cx, camera.cy])
    arrays = cells.pixels, cells.points, cells.sigma_m, intrinsics, refined
    return refined, kernels.fit_rays(*arrays, settings.pixel_sigma_px, REFINE_ITERATIONS)


def _refined_step_by_step(
    T: Matrix, cells: Correspondences, camera: Camera, settings: PnpSettings
) -> tuple[Matrix, Matrix]:
    """Return what the compiled loop returns, but for rounding."""
    tangents = _ray_tangents(cells.pixels, camera)
    H = np.zeros((6, 6))
    for _ in range(REFINE_ITERATIONS):
        H, g = _ray_equations(cells.points, tangents, cells.sigma_m, T, settings.pixel_sigma_px / camera.fx)
        try:
            delta = -np.linalg.solve(H + 1e-9 * np.diag(np.diag(H)), g)
        except np.linalg.LinAlgError:
            break
        T = left_update(T, delta)
        if np.abs(delta).max() < 1e-5:
            break
    return T, H


def _ray_equations(
    points: NDArray[np.float64],
    tangents: NDArray[np.float64],
    sigma_m: NDArray[np.float64],
    T: Matrix,
    sigma_per_m: float,
) -> tuple[Matrix, Matrix]:
    """Return H (6, 6) and g (6,) of the whitened point-to-ray distances over a left perturbation (dt, dw) of T."""
    P = points @ T[:3, :3].T + T[:3, 3]
    depth_m = np.maximum(P[:, 2], NEAR_M)
    variance = sigma_m**2 + (sigma_per_m * depth_m) ** 2
    error = np.einsum("nij,nj->ni", tangents, P)
    weight = (P[:, 2] > NEAR_M) / (1.0 + (error**2).sum(1) / (4.0 * variance)) / variance
    J = np.concatenate([tangents, np.cross(P[:, None], tangents)], axis=2)
    JW = (J * weight[:, None, None]).reshape(-1, 6)
    return JW.T @ J.reshape(-1, 6), JW.T @ error.reshape(-1)


def _ray_tangents(pixels: NDArray[np.float64], camera: Camera) -> NDArray[np.float64]:
    """Return (N, 2, 3): two orthonormal directions across the viewing ray of each pixel."""
    x, y = (pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy
    ray = np.stack([x, y, np.ones_like(x)], axis=1)
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    first = np.stack([np.ones_like(x), np.zeros_like(x), -x], axis=1)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(ray, first)], axis=1)
