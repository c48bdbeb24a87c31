# SPDX-License-Identifier: Apache-2.0
"""Check of the calibration by the images: focal length, principal point and distortion.

A wrong calibration moves poses by centimetres while their covariances stay at millimetres. Every few frames the pose
and the camera are fitted together (:mod:`kfloc_ros.pixloc.camera_fit`); the fits of the last frames are combined.

Fits of neighbouring frames have similar errors, and with few or flat points they scatter more than their information
suggests. The combined covariance is therefore scaled by the observed scatter, and the usual accuracy of calibrations is
added as a tolerance, before a camera counts as wrong.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.pixloc.camera_fit import CameraFit
from kfloc_ros.pixloc.cost import OFFSETS
from kfloc_ros.pixloc.refiner import FittedCamera
from kfloc_ros.types import Frame, PoseEstimate, TrackingState


@dataclass(frozen=True)
class CameraCheckSettings:
    """Rate of the fits, and the conditions under which a camera is wrong."""

    schedule: tuple[tuple[int, int], ...] = ((4, 1), (10, 3))
    """(fits, frames between them): four fits on the first frames, then every third frame up to ten."""
    period: int = 15
    """Frames between later fits; a fit takes about a third of a frame's time."""
    window: int = 24
    """Number of fits that are combined."""
    min_fits: int = 3
    max_focal_sigma: float = 0.03
    """Largest relative standard deviation of the focal length in a fit that is used; it is exceeded if points are few
    or flat."""
    correlation_factor: float = 2.0
    """Factor on the combined variance, since neighbouring frames see the same points."""
    shift_share: float = 0.3
    """Share of the distance between the aligned pose and that of the fitted camera, added in all directions."""
    sigmas: float = 3.0
    """Largest offset, in standard deviations of fit and tolerance together."""
    tolerance: tuple[float, ...] = (0.005, 0.005, 0.0035, 0.0035, 0.012)
    """Standard deviations of usual calibrations: relative to the focal length, the aspect ratio, and the image's width
    for the principal point; absolute for k1."""


@dataclass(frozen=True, eq=False)
class CameraVerdict:
    """Combined fits, and their contradiction of the camera, if any."""

    offsets: NDArray[np.float64]
    """(5,) offsets as in :class:`CameraFit`."""
    covariance: NDArray[np.float64]
    """(5, 5) covariance of the offsets, without the tolerance."""
    wrong: int | None
    """Index of the offset that contradicts the camera most; None: the camera fits."""


class CameraCheck:
    """Combination of the fits of the last frames.

    Args:
        camera: pinhole camera of the map, to which images are converted.
        settings: rate of the fits, and conditions under which a camera is wrong.
    """

    def __init__(self, camera: Camera, settings: CameraCheckSettings | None = None) -> None:
        self._camera, self._settings = camera, settings or CameraCheckSettings()
        self._fits: deque[CameraFit] = deque(maxlen=self._settings.window)
        self._made = 0
        self._frames = 0
        self._fitted: FittedCamera | None = None
        self._shift = np.eye(4)
        self.verdict: CameraVerdict | None = None

    def count_frame(self) -> bool:
        """Count a frame; return True if it is to be fitted."""
        s = self._settings
        period = next((frames for fits, frames in s.schedule if self._made < fits), s.period)
        self._frames += 1
        return self._frames % period == 0

    def add(self, fitted: FittedCamera, T_aligned: Matrix) -> None:
        """Add the fit of a frame.

        Args:
            fitted: camera and pose fitted to the frame.
            T_aligned: pose ``T_map_camera`` (4, 4) aligned with the camera as it is.
        """
        self._made += 1
        variance = _covariance_of(fitted.fit.information)
        if variance is None or math.sqrt(variance[0, 0]) > self._settings.max_focal_sigma:
            return
        self._fits.append(fitted.fit)
        self._fitted, self._shift = fitted, inverse_pose(T_aligned) @ fitted.T_map_camera
        self.verdict = self._judged()

    def widened(self, estimate: PoseEstimate) -> PoseEstimate:
        """Return an estimate whose covariance also covers the pose of the fitted camera.

        The distance to that pose was measured on an earlier frame, so a share of it is added in all directions.
        """
        T, covariance, fitted = estimate.T_map_camera, estimate.covariance, self._fitted
        if T is None or covariance is None or fitted is None:
            return estimate
        error = pose_tangent_error(T @ self._shift, T)
        share = self._settings.shift_share**2
        around = np.repeat([share * error[:3] @ error[:3], share * error[3:] @ error[3:]], 3)
        turn = np.kron(np.eye(2), T[:3, :3] @ fitted.T_map_camera[:3, :3].T)
        fit_covariance = turn @ fitted.covariance @ turn.T
        wider = covariance + np.outer(error, error) + np.diag(around) + fit_covariance
        return replace(estimate, covariance=0.5 * (wider + wider.T))

    def reset(self) -> None:
        """Drop all fits, such as after a correction of the camera."""
        self._fits.clear()
        self.verdict = None

    def _judged(self) -> CameraVerdict | None:
        s = self._settings
        if len(self._fits) < s.min_fits:
            return None
        weights = np.stack([fit.information for fit in self._fits])
        offsets = np.stack([fit.offsets for fit in self._fits])
        covariance = _covariance_of(weights.sum(0))
        if covariance is None:
            return None
        combined = covariance @ np.einsum("nij,nj->i", weights, offsets)
        errors = offsets - combined
        scatter = np.einsum("ni,nij,nj->n", errors, weights, errors).sum()
        scatter /= len(OFFSETS) * (len(self._fits) - 1)
        covariance = covariance * max(1.0, scatter) * s.correlation_factor
        width = self._camera.width
        tolerance = np.array(s.tolerance) * (1.0, 1.0, width, width, 1.0)
        ratio = np.abs(combined) / np.sqrt(np.diag(covariance) + tolerance**2)
        worst = int(np.argmax(ratio))
        return CameraVerdict(combined, covariance, worst if ratio[worst] > s.sigmas else None)


@dataclass(frozen=True, eq=False)
class Correction:
    """Fitted camera, and the conversion of its images to the map's camera."""

    offsets: NDArray[np.float64]
    adapter: ImageAdapter

    @classmethod
    def of(cls, camera: Camera, offsets: NDArray[np.float64], before: Correction | None) -> Correction:
        """Return the correction for a camera with offsets (5,), in addition to one already applied to the images."""
        if before is not None:
            scale = math.exp(before.offsets[0])
            offsets = before.offsets + offsets * (1.0, 1.0, scale, scale, 1.0)
        scale = math.exp(offsets[0])
        fitted = Camera(
            camera.width,
            camera.height,
            camera.fx * scale,
            camera.fy * scale * math.exp(offsets[1]),
            camera.cx + offsets[2],
            camera.cy + offsets[3],
            "plumb_bob",
            (offsets[4], 0.0, 0.0, 0.0, 0.0),
        )
        return cls(offsets, ImageAdapter(fitted, camera))

    def apply(self, frame: Frame) -> Frame:
        """Return a frame with its image converted to the map's camera."""
        return replace(frame, image=self.adapter(frame.image))


def sentence(verdict: CameraVerdict, given: Camera | None, camera: Camera) -> str:
    """Return a sentence with both values of the offset that contradicts the camera most.

    Args:
        verdict: result of the check.
        given: camera of the images before conversion to the map's, as given by camera_info or the source.
        camera: pinhole camera of the map.
    """
    c, known = verdict.offsets, given or camera
    source = "camera_info" if given is not None else "the map's camera"
    px_x, px_y = known.fx / camera.fx, known.fy / camera.fy
    if verdict.wrong == 0:
        return f"the images fit a focal length of {known.fx * math.exp(c[0]):.0f} px, {source} says {known.fx:.0f} px"
    if verdict.wrong == 1:
        fitted = known.fy / known.fx * math.exp(c[1])
        return f"the images fit a ratio fy/fx of {fitted:.3f}, {source} says {known.fy / known.fx:.3f}"
    if verdict.wrong in (2, 3):
        x, y = known.cx + px_x * c[2], known.cy + px_y * c[3]
        return (
            f"the images fit a principal point of ({x:.0f}, {y:.0f}) px, "
            f"{source} says ({known.cx:.0f}, {known.cy:.0f}) px"
        )
    return f"the images fit a radial distortion that differs from {source} by k1 = {c[4]:+.3f}"


def is_checked(estimate: PoseEstimate) -> bool:
    """Return true if a frame's pose is good enough to fit the camera."""
    alignment = estimate.alignment
    return estimate.state is TrackingState.TRACKING and alignment is not None and alignment.success


def _covariance_of(information: NDArray[np.float64]) -> NDArray[np.float64] | None:
    try:
        covariance = np.asarray(np.linalg.inv(information), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    return covariance if np.isfinite(covariance).all() and (np.diag(covariance) > 0).all() else None
