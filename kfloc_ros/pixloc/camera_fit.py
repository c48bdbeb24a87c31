# SPDX-License-Identifier: Apache-2.0
"""Camera fitted together with the pose of one image.

Hundreds of points overdetermine a pose, so the same residuals also constrain the focal length, the principal point, the
first term of radial distortion, and a skew. The cost is that of :mod:`kfloc_ros.pixloc.cost`, with the camera's
``OFFSETS`` as six more columns of the Jacobian, and a weak Gaussian prior on them. The fits of several images are then
combined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import runs_compiled
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc import kernels
from kfloc_ros.pixloc.cost import NEAR_M, OFFSETS, POSE, FitLevel, Linearization, RobustLoss, linearize
from kfloc_ros.pixloc.image_check import TwoParts
from kfloc_ros.pixloc.optimizer import left_update
from kfloc_ros.pixloc.point_matching import PointMatches, fit_pose_and_camera
from kfloc_ros.pixloc.references import view_distances
from kfloc_ros.types import Frame

PRIOR_SIGMA = np.array([0.15, 0.1, 20.0, 20.0, 0.15, 0.1])
"""Standard deviations of the prior; pixels of the map's camera for the principal point."""
MAX_ITERATIONS = 12
"""Largest number of iterations per level."""
MIN_POINTS = 60
SPREAD = np.array([0.6, 1.0, 1.0, 0.6, 0.7, 1.3])
"""Standard deviations of fits, relative to those that one scale for all offsets gives: the errors of a map shear and
stretch an image more than they scale it. Measured on good images of six maps."""
SAME_VIEW_M = 0.4
"""Distance of two views at which the correlation of their fits has fallen to 1/e; a radian counts as 1.2 m. Measured on
six maps: 0.6 to 0.8 below 0.1 m, 0.5 at 0.25 m, 0.1 at 1 m."""
PRIOR_VIEWS = 4.0
"""Number of views by which the calibrated scale of fits outweighs the observed one."""
FREEDOM, ROBUST_STEPS = 4.0, 6
"""Degrees of freedom of the t distribution of fits, and number of steps in which their weights are found."""
JACKKNIFE = 0.5
"""Share of the scatter of estimates without one view that is added to the covariance of all."""
MAPPED_ODDS = 0.25
"""Prior odds that images with another calibration than the map's come from the camera that the map was made with."""
MAX_MAPPED_FOCAL, MAX_MAPPED_CENTRE = 0.25, 0.1
"""Largest differences at which two calibrations may be of one camera: log focal length, share of the image's width."""
MAX_MAPPED_ASPECT = 0.05
"""Largest log ratio of the sides of two images of one camera; a map's images may have rounded sides."""


@dataclass(frozen=True, eq=False)
class CameraFit:
    """Camera and pose that fit one image best."""

    offsets: NDArray[np.float64]
    """(6,) offsets from the map's camera; see the module's docstring."""
    information: NDArray[np.float64]
    """(6, 6) information of the offsets, with the pose marginalised, without the prior."""
    T_camera_local: Matrix
    """Pose (4, 4) that maps points of their given frame to the camera frame."""
    pose_information: NDArray[np.float64]
    """(6, 6) information of the left perturbation (dt, dw) of the pose, with the camera marginalised."""
    cost: float


def fit_camera(
    levels: tuple[FitLevel, ...],
    points: torch.Tensor,
    T_camera_local: Matrix,
    camera: Camera,
    loss: RobustLoss,
    matches: PointMatches | None = None,
) -> CameraFit | None:
    """Fit pose and camera together, coarse level first.

    Args:
        levels: coarse to fine.
        points: (N, 3) reference points, in a frame near the camera, since float32 is exact enough only near its origin.
        T_camera_local: pose to start from, (4, 4), which maps points of that frame to the camera frame.
        camera: pinhole camera of the map, to which the image was converted.
        loss: robust loss of the alignment.
        matches: places where the points were found; the fit starts from pose and camera by these, if they cost less.

    Returns:
        The fit; None if too few points are in view.
    """
    T, offsets = T_camera_local, np.zeros(len(OFFSETS))
    by_matches = None if matches is None else fit_pose_and_camera(matches, points, T, camera, PRIOR_SIGMA)
    if by_matches is not None:
        given = _linearize(levels[-1], points, T, camera, offsets, loss)
        other = _linearize(levels[-1], points, by_matches[0], camera, by_matches[1], loss)
        if other.cost < given.cost and 3 * other.valid_count >= 2 * given.valid_count:
            (T, offsets), levels = by_matches, levels[-1:]
    system: Linearization | None = None
    for level in levels:
        found = _descend(level, points, T, camera, offsets, loss)
        if found is None:
            return None
        T, offsets, system = found
    if system is None or not np.isfinite(offsets).all():
        return None
    H = system.H
    try:
        information = H[POSE:, POSE:] - H[POSE:, :POSE] @ np.linalg.solve(H[:POSE, :POSE], H[:POSE, POSE:])
    except np.linalg.LinAlgError:
        return None
    full = H.copy()
    full[POSE:, POSE:] += np.diag(PRIOR_SIGMA**-2)
    of_pose = full[:POSE, :POSE] - full[:POSE, POSE:] @ np.linalg.solve(full[POSE:, POSE:], full[POSE:, :POSE])
    return CameraFit(offsets, 0.5 * (information + information.T), T, of_pose, system.cost)


def _descend(
    level: FitLevel, points: torch.Tensor, T: Matrix, camera: Camera, offsets: NDArray[np.float64], loss: RobustLoss
) -> tuple[Matrix, NDArray[np.float64], Linearization] | None:
    """Return pose, offsets and their system by Levenberg and Marquardt at a level; None if few points are in view."""
    tensors = level.image.features, level.image.confidence, points, level.features, level.confidence
    if runs_compiled(*tensors):
        T, offsets, H = np.array(T, dtype=np.float64), offsets.copy(), np.zeros((POSE + len(OFFSETS),) * 2)
        given = np.array([camera.fx, camera.fy, camera.cx, camera.cy, level.image.stride])
        image, trust, cloud, wanted, confidence = (values.contiguous().numpy() for values in tensors)
        cost, count = kernels.descend_with_camera(
            image, trust, cloud, wanted, confidence, T, offsets, given, PRIOR_SIGMA**-2, loss.scale, NEAR_M, MIN_POINTS,
            MAX_ITERATIONS, H,
        )  # fmt: skip
        return None if count < MIN_POINTS else (T, offsets, Linearization(cost, H, np.zeros(len(H)), count, 1.0))
    system, damping = _linearize(level, points, T, camera, offsets, loss), 1e-3
    if system.valid_count < MIN_POINTS:
        return None
    for _ in range(MAX_ITERATIONS):
        step = _step(system, offsets, damping)
        T_new, new_offsets = left_update(T, step[:POSE]), offsets + step[POSE:]
        new = _linearize(level, points, T_new, camera, new_offsets, loss)
        if new.cost < system.cost and 3 * new.valid_count >= 2 * system.valid_count:
            gain = (system.cost - new.cost) / max(system.cost, 1e-12)
            T, offsets, system, damping = T_new, new_offsets, new, max(damping / 10, 1e-7)
            if gain < 1e-5:
                break
        else:
            damping *= 10
            if damping > 1e3:
                break
    return T, offsets, system


@dataclass(frozen=True, eq=False)
class CameraScore:
    """Offsets that one Gauss-Newton step from an aligned pose suggests, and what offsets do to the pose."""

    offsets: NDArray[np.float64]
    """(6,) offsets; those of a large mistake are too small."""
    covariance: NDArray[np.float64]
    """(6, 6) covariance of the offsets."""
    sensitivity: NDArray[np.float64]
    """(6, 6) derivative of the left perturbation (dt, dw) of the pose by the offsets."""


def score_camera(
    level: FitLevel, points: torch.Tensor, T_camera_local: Matrix, camera: Camera, loss: RobustLoss
) -> CameraScore | None:
    """Return the score of the camera at an aligned pose, from the residuals of one level; None if it is not determined.

    This is one linearization, a tenth of :func:`fit_camera`; arguments as there.
    """
    system = _linearize(level, points, T_camera_local, camera, np.zeros(len(OFFSETS)), loss)
    if system.valid_count < MIN_POINTS:
        return None
    H, g = system.H, system.g
    try:
        by_camera = np.linalg.solve(H[:POSE, :POSE], H[:POSE, POSE:])
        by_pose = np.linalg.solve(H[:POSE, :POSE], g[:POSE])
        covariance = np.asarray(np.linalg.inv(H[POSE:, POSE:] - H[POSE:, :POSE] @ by_camera), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    offsets = -covariance @ (g[POSE:] - H[POSE:, :POSE] @ by_pose)
    if not np.isfinite(offsets).all() or not (np.diag(covariance) > 0).all():
        return None
    return CameraScore(offsets, 0.5 * (covariance + covariance.T), np.asarray(-by_camera, dtype=np.float64))


def calibration_offsets(given: Camera, camera: Camera) -> NDArray[np.float64] | None:
    """Return the offsets (6,) of converted images if they are of the map's camera; None if their sides differ."""
    across, down = camera.width / given.width, camera.height / given.height
    if abs(math.log(down / across)) > MAX_MAPPED_ASPECT:
        return None
    focal = math.log(camera.fx / (across * given.fx))
    aspect = math.log(camera.fy / (down * given.fy)) - focal
    dx = math.exp(focal) * (camera.cx + 0.5 - across * (given.cx + 0.5))
    dy = math.exp(focal + aspect) * (camera.cy + 0.5 - down * (given.cy + 0.5))
    return np.array([focal, aspect, dx, dy, 0.0, 0.0])


@dataclass(frozen=True, eq=False)
class OtherCalibration:
    """Two explanations of images that come with another calibration than the map's: another camera, or a wrong one.

    A map and its queries are often of one camera. If their calibrations differ, one of them is wrong; which offsets the
    images then have is known, and these are told from none by far fewer images than any offsets are.
    """

    offsets: NDArray[np.float64]
    """(6,) ``OFFSETS`` of the converted images if they are of the map's camera."""

    @classmethod
    def of(cls, given: Camera, camera: Camera) -> OtherCalibration | None:
        """Return the explanations for a given camera and the map's; None if they are too different."""
        if (offsets := calibration_offsets(given, camera)) is None:
            return None
        is_near = math.hypot(offsets[2], offsets[3]) < MAX_MAPPED_CENTRE * camera.width
        return cls(offsets) if is_near and np.abs(offsets[:2]).max() < MAX_MAPPED_FOCAL else None

    def probability(
        self,
        offsets: NDArray[np.float64],
        covariance: NDArray[np.float64],
        of_given: NDArray[np.float64],
        of_mapped: NDArray[np.float64],
    ) -> float:
        """Return the probability that the images are of the map's camera, by Bayes' rule.

        Args:
            offsets: (6,) fitted offsets.
            covariance: (6, 6) of the fit.
            of_given: (6, 6) covariance of what calibrations usually are off by.
            of_mapped: (6, 6) the same, for images of one calibration.
        """
        odds = math.log(MAPPED_ODDS)
        for sign, expected, tolerance in ((-1, 0.0, of_given), (1, self.offsets, of_mapped)):
            odds += sign * log_evidence(offsets - expected, covariance + tolerance)
        return 1.0 / (1.0 + math.exp(-max(min(odds, 30.0), -30.0)))


def log_evidence(error: NDArray[np.float64], covariance: NDArray[np.float64]) -> float:
    """Return the log density of an error (6,) of offsets, up to a constant: a t distribution with a scale (6, 6)."""
    tails = (FREEDOM + len(OFFSETS)) * math.log1p(float(error @ np.linalg.solve(covariance, error)) / FREEDOM)
    return -0.5 * (tails + float(np.linalg.slogdet(covariance)[1]))


def _step(system: Linearization, offsets: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """Return the damped Gauss-Newton step of pose and offsets under the prior."""
    H, g = system.H.copy(), system.g.copy()
    H[np.diag_indices_from(H)] += damping * np.diag(system.H) + 1e-9
    precision = PRIOR_SIGMA**-2
    H[POSE:, POSE:] += np.diag(precision)
    g[POSE:] += precision * offsets
    return np.asarray(-np.linalg.solve(H, g))


def _linearize(
    level: FitLevel,
    points: torch.Tensor,
    T: Matrix,
    camera: Camera,
    offsets: NDArray[np.float64],
    loss: RobustLoss,
) -> Linearization:
    at = linearize(level.image, points, level.features, level.confidence, T, camera, loss, offsets)
    scale = at.valid_count / max(at.cost, 1e-9)  # to information, as for the pose alone
    return replace(at, H=scale * at.H, g=scale * at.g)


def combine(
    fits: Sequence[CameraFit], T_map_camera: NDArray[np.float64], scale: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Return the offsets (6,) of several images of one camera, and their covariance (6, 6).

    A fit errs with the map's points, so fits of one view err alike. Each counts as its share of what its view tells,
    however many images there are of it. Outliers have less weight (a multivariate t distribution). The covariance is
    that of the map's held-out views, or that of the observed scatter if it is larger. What depends on a single view is
    not certain: estimates without each view and its neighbours (a jackknife) enlarge the covariance.

    Args:
        fits: at least one.
        T_map_camera: poses (N, 4, 4) of the images.
        scale: factor on the covariance of a fit, from the map's calibration.

    Returns:
        None if the fits do not determine the camera.
    """
    offsets = np.stack([fit.offsets for fit in fits])
    information = np.stack([fit.information for fit in fits]) / (scale * np.outer(SPREAD, SPREAD))
    alike = np.exp(-np.stack([view_distances(T_map_camera, T) for T in T_map_camera]) / SAME_VIEW_M)
    shares = 1.0 / alike.sum(axis=1)

    def mean(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        covariance = np.asarray(np.linalg.inv(np.einsum("n,nij->ij", weights, information)), dtype=np.float64)
        return covariance @ np.einsum("n,nij,nj->i", weights, information, offsets), covariance

    weights = squared = shares
    try:
        for _ in range(ROBUST_STEPS):
            combined, covariance = mean(weights)
            errors = offsets - combined
            squared = np.einsum("ni,nij,nj->n", errors, information, errors)
            weights = shares * np.minimum(1.0, (FREEDOM + len(OFFSETS)) / (FREEDOM + squared))
        scatter = PRIOR_VIEWS + float(weights @ squared) / len(OFFSETS)
        covariance = covariance * max(1.0, scatter / (PRIOR_VIEWS + max(float(shares.sum()) - 1.0, 0.0)))
        for share, near in zip(shares, alike, strict=True):
            others = weights * (1.0 - near)
            if others.sum() > 0.5:
                moved = mean(others)[0] - combined
                covariance = covariance + JACKKNIFE * share * np.outer(moved, moved)
    except np.linalg.LinAlgError:
        return None
    return (combined, covariance) if np.isfinite(covariance).all() else None


@dataclass(frozen=True, eq=False)
class Correction:
    """Fitted camera, and the conversion of its images to the map's camera."""

    offsets: NDArray[np.float64]
    adapter: ImageAdapter

    @classmethod
    def of(cls, camera: Camera, offsets: NDArray[np.float64], before: Correction | None) -> Correction:
        """Return the correction for a camera with offsets (6,), in addition to one already applied to the images."""
        if before is not None:
            scale = math.exp(before.offsets[0])
            offsets = before.offsets + offsets * (1.0, 1.0, scale, scale, 1.0, 1.0)
        scale = math.exp(offsets[0])
        fx, fy = camera.fx * scale, camera.fy * scale * math.exp(offsets[1])
        centre, distortion = (camera.cx + offsets[2], camera.cy + offsets[3]), (offsets[4], 0.0, 0.0, 0.0, 0.0)
        fitted = Camera(camera.width, camera.height, fx, fy, *centre, "plumb_bob", distortion)
        return cls(offsets, ImageAdapter(fitted, camera))

    def apply(self, frame: Frame) -> Frame:
        """Return a frame with its image converted to the map's camera."""
        return replace(frame, image=self.adapter(frame.image))


@dataclass(frozen=True, eq=False)
class FittedCamera:
    """Camera and pose that fit one image best, in the map frame."""

    fit: CameraFit
    T_map_camera: Matrix
    covariance: Matrix
    """(6, 6) covariance of the pose, which includes what is not known of the camera."""
    parts: TwoParts | None = None
    """Part of the image that may have moved, at the aligned pose."""
