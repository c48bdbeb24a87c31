# SPDX-License-Identifier: Apache-2.0
"""Check of the calibration by the images: focal length, principal point and distortion.

A wrong calibration moves poses by centimetres while their covariances stay at millimetres. Every few frames the pose
and the camera are fitted together (:mod:`kfloc_ros.pixloc.camera_fit`); the fits of the last frames are combined.

Fits err with the map's points, more than their information suggests, and fits of one view err alike; see
:func:`kfloc_ros.pixloc.camera_fit.combine`. The usual accuracy of calibrations is added as a tolerance, before a camera
counts as wrong. The covariance of poses includes what fits suggest long before that.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import CHI2_6_999, pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.localization import judgement
from kfloc_ros.localization.judgement import PARTLY_FOUND, SHEARED_IMAGES, CameraDoubt, CameraVerdict, widened
from kfloc_ros.pixloc.camera_fit import (
    CameraFit,
    CameraScore,
    FittedCamera,
    OtherCalibration,
    calibration_offsets,
    combine,
)
from kfloc_ros.pixloc.cost import OFFSETS
from kfloc_ros.types import PoseEstimate

CHI2_6_95, CHI2_6_99 = 12.592, 16.812
"""95 and 99 % quantiles of the chi-square distribution with 6 degrees of freedom."""
SAME_CAMERA = np.array([0.0, 0.1, 0.1, 0.1, 0.1, 0.1])
"""Share of a calibration's usual error, by offset, that remains between images of one calibration: none of the focal
length's, since depth does not depend on it. Two that differ by less than their usual error are of one camera: others
differ by far more."""
SHEARED = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
"""Offsets that look like the shear of a rolling shutter: ratio fy/fx in a pitch, skew in a yaw."""
CERTAIN = 0.99
"""Probability from which images are said to be of the map's camera, not of the one that is given."""
MIN_SCATTER = 0.1
"""Smallest observed scatter of fits, relative to their information, that is believed."""


@dataclass(frozen=True)
class CameraCheckSettings:
    """Rate of the fits, and the conditions under which a camera is wrong."""

    schedule: tuple[tuple[int, int], ...] = ((4, 1), (10, 3))
    """(fits, frames between them): four fits on the first frames, then every third frame up to ten."""
    period: int = 15
    """Frames between later fits; a fit takes about a third of a frame's time."""
    doubt_period: int = 3
    """The same, while the camera counts as wrong, or may be."""
    window: int = 24
    """Number of fits that are combined."""
    min_fits: int = 3
    max_focal_sigma: float = 0.03
    """Largest relative standard deviation of the focal length in a fit that is used: few or flat points exceed it."""
    sure_focal_sigma: float = 0.008
    """Relative standard deviation of the combined focal length up to which each frame is fitted, ``window`` at most."""
    correlation_factor: float = 2.0
    """Factor on the variance of combined fits in the covariance of poses, since neighbouring frames see the same
    points."""
    shift_share: float = 0.3
    """Share of the distance between the aligned and the fitted camera's pose that is added in all directions."""
    sigmas: float = 3.0
    """Largest offset, in standard deviations of fit and tolerance together."""
    tolerance: tuple[float, ...] = (0.005, 0.005, 0.0035, 0.0035, 0.012, 0.005)
    """Standard deviations of usual calibrations: relative to the focal length, the aspect ratio, and the image's width
    for the principal point; absolute for k1. The option ``calibration_error`` scales them together."""


class CameraCheck:
    """Combination of the fits of the last frames.

    Args:
        camera: pinhole camera of the map, to which images are converted.
        settings: rate of the fits, and conditions under which a camera is wrong.
        calibration_error: usual relative error of a focal length; scales the tolerances.
        fit_scale: factor on the covariance of the fit to one image, from the map's calibration.
        wrong_prior: probability of a wrong camera before any image.
    """

    def __init__(
        self,
        camera: Camera,
        settings: CameraCheckSettings | None = None,
        calibration_error: float = 0.005,
        fit_scale: float = 4.0,
        wrong_prior: float = 0.05,
    ) -> None:
        self._fit_scale, self._wrong_prior = fit_scale, wrong_prior
        self._camera, self._settings = camera, settings or CameraCheckSettings()
        tolerance = np.array(self._settings.tolerance) * (1.0, 1.0, camera.width, camera.width, 1.0, 1.0)
        self.tolerance = np.diag((tolerance * calibration_error / self._settings.tolerance[0]) ** 2)
        self._fits: deque[FittedCamera] = deque(maxlen=self._settings.window)
        self._sharpest: list[FittedCamera] = []
        """Fits with the smallest variance of the focal length, also of images that hardly tell a camera."""
        self._made = self._frames = 0
        self._latest: deque[FittedCamera] = deque(maxlen=judgement.LATEST_FITS)
        self._source: Camera | None = None
        self._fitted: FittedCamera | None = None
        self._shift = np.eye(4)
        self._combined: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        """Combined offsets (6,) and their covariance (6, 6) by the observed scatter."""
        self._known = self._usual = self.tolerance
        self._other: OtherCalibration | None = None
        self.doubt = CameraDoubt.of(wrong_prior, self.tolerance, camera.width)
        """What is left of the possibility that the camera is wrong."""
        self.is_doubtful = False  # True: what is left moved the last pose too far, so that more fits are needed
        self.verdict: CameraVerdict | None = None
        self.mapped_probability: float | None = None
        """Probability that the images are of the map's camera, by what alignments with both cameras cost."""

    def begin(self, source: Camera | None, turn_rad: float) -> bool:
        """Begin an image of a camera; return True, and forget the fits so far, if the last one was of another.

        A rolling shutter's shear is allowed for, given the angle by which the camera turns while it reads the image.
        """
        self._usual = self.tolerance + np.diag(turn_rad**2 * SHEARED)
        last, self._source = self._source, source
        is_changed = last is not None and source is not None and last.is_other(source)
        if is_changed:
            self.reset()
            self._made = self._frames = 0
        if source is not None and (last is None or is_changed):
            is_other, self.mapped_probability = self._agreeing(source) is None, None
            self._other = OtherCalibration.of(source, self._camera) if is_other else None
        return is_changed

    @property
    def mapped_offsets(self) -> NDArray[np.float64] | None:
        """Offsets (6,) of the images if they are of the map's camera; None if that is not, or no more, in question."""
        is_settled = self.mapped_probability is not None and self.mapped_probability < 1.0 - CERTAIN
        return None if self._other is None or is_settled else self._other.offsets

    @property
    def is_due(self) -> bool:
        """True if the next frame is to be fitted, as :meth:`count_frame` then says."""
        s = self._settings
        period = next((frames for fits, frames in s.schedule if self._made < fits), s.period)
        if self._made < s.window and (self.verdict is None or self.verdict.focal_sigma > s.sure_focal_sigma):
            period = 1
        elif self.is_doubtful or (self.verdict is not None and self.verdict.wrong is not None):
            period = min(period, s.doubt_period)
        return (self._frames + 1) % period == 0

    def count_frame(self) -> bool:
        """Count a frame; return True if it is to be fitted."""
        is_due, self._frames = self.is_due, self._frames + 1
        return is_due

    def add(self, fitted: FittedCamera, T_aligned: Matrix, is_due: bool = True) -> None:
        """Add the fit of a frame.

        Args:
            fitted: camera and pose fitted to the frame.
            T_aligned: pose ``T_map_camera`` (4, 4) aligned with the camera as it is.
            is_due: False: made since the image is suspicious, so no fair sample; but it may tell of a zoom since.
        """
        self._made += is_due
        variance = _covariance_of(fitted.fit.information)
        if variance is None:
            return
        self._latest.append(fitted)
        if is_due:
            by_focal = sorted([*self._sharpest, fitted], key=lambda f: float(np.linalg.inv(f.fit.information)[0, 0]))
            self._sharpest = by_focal[: self._settings.window]
        self.doubt = self._doubt()
        if not is_due or math.sqrt(variance[0, 0]) > self._settings.max_focal_sigma:
            return
        self._fits.append(fitted)
        self._fitted, self._shift = fitted, inverse_pose(T_aligned) @ fitted.T_map_camera
        self.verdict = self._judged()

    def chi2(self, offsets: NDArray[np.float64], covariance: NDArray[np.float64]) -> float:
        """Return the squared Mahalanobis length of offsets (6,) with covariance (6, 6) of one image, with tolerance."""
        total = self._fit_scale * covariance + self._usual
        return float(offsets @ np.linalg.solve(total, offsets))

    def chi2_of(self, fit: CameraFit) -> float | None:
        """Return :meth:`chi2` of a fit; None if it does not determine the camera."""
        covariance = _covariance_of(fit.information)
        return None if covariance is None else self.chi2(fit.offsets, covariance)

    def _alone(self, fit: CameraFit | None) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Return the offsets (6,) of one image and their covariance (6, 6); None if it does not determine them."""
        covariance = None if fit is None else _covariance_of(fit.information)
        return None if fit is None or covariance is None else (fit.offsets, self._fit_scale * covariance)

    def another(self, fit: CameraFit) -> float:
        """Return the probability, by its own fit, that one image is of another camera, or sheared in a turn unknown."""
        priors = self._wrong_prior, self.doubt.probability
        return judgement.probability_of_another(*priors, self._usual, self._camera.width, self._alone(fit))

    def verdict_of(self, fit: CameraFit) -> CameraVerdict:
        """Return the verdict on the fit to one image: the offset that contradicts the camera most."""
        _, covariance = self._alone(fit) or (None, np.zeros_like(self.tolerance))
        ratio = np.abs(fit.offsets) / np.sqrt(np.diag(covariance + self.tolerance))
        return CameraVerdict(fit.offsets, covariance, int(np.argmax(ratio)))

    def mapped_verdict(self, fit: CameraFit) -> CameraVerdict | None:
        """Return the verdict that one image is of the map's camera, not of the given one; None if it is not certain."""
        found = self._alone(fit)
        return None if found is None else self._mapped(*found)

    def moments(
        self, score: CameraScore | None, given: Camera | None = None, fit: CameraFit | None = None
    ) -> NDArray[np.float64]:
        """Return the second moments (6, 6) of the camera's offsets about the camera that is used.

        A Gaussian prior, the usual accuracy of calibrations, is combined with the fits so far, or with this image's
        score until there are enough. The focal length's part always counts, offsets as far as they are significant
        (by James and Stein's positive-part shrinkage, with the 99 % quantile of chi-square): a camera that the images
        do not contradict must not make every covariance too large.

        The error of a calibration that the map was made with, or nearly, moves poses little: its prior is narrower.

        Args:
            score: score of this image.
            given: camera of the image before conversion to the map's; None: the map's own.
            fit: fit to this image, if there is one.
        """
        tolerance, apart = self.tolerance, self._agreeing(given)
        if apart is not None:
            tolerance = np.diag(SAME_CAMERA**2) @ tolerance + np.outer(apart, apart)
        combined = self._combined
        if combined is not None:
            offsets, covariance = combined
        elif score is not None:
            offsets, covariance = score.offsets, self._fit_scale * score.covariance
        else:
            return tolerance
        gain = tolerance @ np.linalg.inv(tolerance + covariance)
        mean, left = gain @ offsets, tolerance - gain @ tolerance
        share = 1.0  # until there are enough fits, nothing shows that the camera is right
        if combined is not None:
            share = max(0.0, 1.0 - CHI2_6_99 / max(float(offsets @ np.linalg.solve(covariance, offsets)), 1e-9))
        known = covariance if combined is None else self._known
        careful = tolerance - tolerance @ np.linalg.solve(tolerance + known, tolerance)
        focal = np.diag([left[0, 0], 0.0, 0.0, 0.0, 0.0, 0.0])
        second = share * (np.outer(mean, mean) + careful) + (1.0 - share) * focal
        if self._other is not None:
            mapped, alone = self._other.offsets, self._alone(fit)
            if self.verdict is not None:
                offsets, covariance = self.verdict.offsets, self.verdict.covariance
            elif alone is not None:
                offsets, covariance = alone
            share = self._probability_mapped(offsets, PARTLY_FOUND * covariance)
            share = max(share, self.mapped_probability or 0.0)
            second = second + share * np.outer(mapped, mapped)
        return np.asarray(0.5 * (second + second.T))

    def shear(self, score: CameraScore | None, fit: CameraFit | None) -> CameraDoubt | None:
        """Return what one image says of its being sheared by a rolling shutter; None if it says nothing of its camera.

        Other images tell nothing of it. Below what contradicts the camera, a shear moves poses still. Only what makes
        one likelier than before counts: what is left open is in the poses' calibration, whose images have none.
        """
        by_score = None if score is None else (score.offsets, self._fit_scale * score.covariance)
        if (found := self._alone(fit) or by_score) is None:
            return None
        doubt = CameraDoubt.of(self._wrong_prior, self._usual, self._camera.width, found, SHEARED_IMAGES)
        counts = np.outer(SHEARED, SHEARED) * float(doubt.probability > self._wrong_prior)
        return replace(doubt, moments=counts * doubt.shown)

    def _probability_mapped(self, offsets: NDArray[np.float64], covariance: NDArray[np.float64]) -> float:
        """Return the probability that the images are of the map's camera; 0 if they come with its calibration."""
        tolerances = self.tolerance, SAME_CAMERA[1] ** 2 * self.tolerance
        return 0.0 if self._other is None else self._other.probability(offsets, covariance, *tolerances)

    def _mapped(self, offsets: NDArray[np.float64], covariance: NDArray[np.float64]) -> CameraVerdict | None:
        """Return the verdict that the images are of the map's camera; None if that is not certain."""
        if self._other is None or self._probability_mapped(offsets, covariance) < CERTAIN:
            return None
        ratio = np.abs(self._other.offsets) / np.sqrt(np.diag(self.tolerance))
        return CameraVerdict(self._other.offsets, covariance, int(np.argmax(ratio)))

    def _agreeing(self, given: Camera | None) -> NDArray[np.float64] | None:
        """Return the difference (6,) of a calibration from the map's if it is below the usual error; None if not."""
        apart = np.zeros(6) if given is None else calibration_offsets(given, self._camera)
        return apart if apart is not None and (apart**2 / np.diag(self.tolerance)).sum() <= 1.0 else None

    def widened(self, estimate: PoseEstimate) -> PoseEstimate:
        """Return an estimate whose covariance also covers the pose of the fitted camera.

        The distance to that pose was measured on an earlier frame, so a share of it is added in all directions.
        """
        T, fitted = estimate.T_map_camera, self._fitted
        if T is None or fitted is None:
            return estimate
        turn = np.kron(np.eye(2), T[:3, :3] @ fitted.T_map_camera[:3, :3].T)
        moved = pose_tangent_error(T @ self._shift, T)
        return widened(estimate, moved, turn @ fitted.covariance @ turn.T, self._settings.shift_share)

    def reset(self) -> None:
        """Drop all fits, such as after a correction of the camera."""
        for fits in (self._fits, self._sharpest, self._latest):
            fits.clear()
        self.doubt = self._doubt()
        self.verdict = self._combined = self._other = self.mapped_probability = None

    def _doubt(self) -> CameraDoubt:
        """Return what fits leave of the possibility that the camera is wrong, or the last ones of a zoom since."""
        doubts = []
        for fits, prior in ((self._sharpest, 1.0), (self._latest, judgement.CHANGED_SINCE)):
            poses = np.array([f.T_map_camera for f in fits]).reshape(-1, 4, 4)
            found = combine([f.fit for f in fits], poses, self._fit_scale) if fits else None
            partly = None if found is None else (found[0], PARTLY_FOUND * found[1])
            doubts.append(CameraDoubt.of(prior * self._wrong_prior, self.tolerance, self._camera.width, partly))
        return max(doubts, key=lambda doubt: doubt.probability)

    def _judged(self) -> CameraVerdict | None:
        s = self._settings
        if len(self._fits) < s.min_fits:
            return None
        fits = [f.fit for f in self._fits]
        weights, offsets = np.stack([f.information for f in fits]), np.stack([f.offsets for f in fits])
        covariance = _covariance_of(weights.sum(0))
        together = combine(fits, np.stack([f.T_map_camera for f in self._fits]), self._fit_scale)
        if covariance is None or together is None:
            return None
        combined = covariance @ np.einsum("nij,nj->i", weights, offsets)
        errors = offsets - combined
        scatter = np.einsum("ni,nij,nj->n", errors, weights, errors).sum()
        scatter /= len(OFFSETS) * (len(self._fits) - 1)
        self._combined = combined, covariance * max(float(scatter), MIN_SCATTER)
        self._known = covariance * max(1.0, scatter) * s.correlation_factor
        offsets, covariance = together
        total = covariance + self.tolerance
        if (mapped := self._mapped(offsets, covariance)) is not None:
            return mapped
        ratio = np.abs(offsets) / np.sqrt(np.diag(total))
        is_wrong = ratio.max() > s.sigmas or float(offsets @ np.linalg.solve(total, offsets)) > CHI2_6_999
        return CameraVerdict(offsets, covariance, int(np.argmax(ratio)) if is_wrong else None)


def _covariance_of(information: NDArray[np.float64]) -> NDArray[np.float64] | None:
    try:
        covariance = np.asarray(np.linalg.inv(information), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    return covariance if np.isfinite(covariance).all() and (np.diag(covariance) > 0).all() else None
