# SPDX-License-Identifier: Apache-2.0
"""Judgement of a frame: state, reason, pose and covariance from coarse pose and alignment; confidence from evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import CHI2_6_999, UncertainPose, pose_tangent_error, probability_within
from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.pixloc.camera_fit import FittedCamera, log_evidence
from kfloc_ros.types import Alignment, CoarsePose, FilterReport, Matrix, PoseEstimate, TrackingState


@dataclass(frozen=True)
class JudgementSettings:
    """Conditions for accepting a pose."""

    min_inlier_ratio: float = 0.2
    """Smallest share of agreeing cells of a coarse pose that is accepted on its own; from the map's calibration."""
    max_disagreement_m: float = 0.25
    max_disagreement_deg: float = 10.0
    """A coarse and a refined pose disagree if they are further apart than either limit, and than their covariances
    allow."""
    unrefined_scale: float = 4.0
    """Scale of the covariance of a coarse pose that could not be refined. Covariances are calibrated on good images,
    and an image that cannot be aligned is a bad one: blurred and half covered, the normalised squared errors of such
    poses were 2.7 times too large in the median on RedKitchen, and 7 times for the worst tenth."""


def judge(
    stamp_ns: int,
    coarse: CoarsePose,
    report: FilterReport,
    alignment: Alignment | None,
    *,
    had_pose: bool,
    settings: JudgementSettings,
) -> PoseEstimate:
    """Return state, reason, pose and covariance of a frame.

    An accepted alignment is TRACKING; if carried on without the map, or contradicted by an accepted coarse pose,
    DEGRADED; in the second case the covariance covers both poses. Without an accepted alignment, an accepted coarse
    pose is DEGRADED, with a larger covariance (TRACKING if none was requested). Otherwise there is no pose.

    Args:
        stamp_ns: of the frame.
        coarse: result of PnP.
        report: report of the filter.
        alignment: result of the alignment; None if refinement is off.
        had_pose: true if an earlier frame had a pose; a frame without one is then LOST instead of INITIALIZING.
        settings: thresholds.
    """
    common = PoseEstimate(stamp_ns, TrackingState.TRACKING, "", coarse=coarse, filter=report, alignment=alignment)
    weak = _weakness(coarse, settings)
    if alignment is not None and alignment.success and alignment.covariance is not None:
        if alignment.carried:
            reason = f"carried on with this session's images: {alignment.reason or 'the map does not confirm it'}"
            common = replace(common, state=TrackingState.DEGRADED, reason=reason)
        apart = "" if weak or alignment.carried else disagreement(alignment, coarse, settings)
        if not apart:
            return replace(common, T_map_camera=alignment.T_map_camera, covariance=alignment.covariance)
        assert alignment.T_map_camera is not None and coarse.T_map_camera is not None
        error = pose_tangent_error(alignment.T_map_camera, coarse.T_map_camera)
        both = alignment.covariance + np.outer(error, error)
        common = replace(common, state=TrackingState.DEGRADED, reason=apart)
        return replace(common, T_map_camera=alignment.T_map_camera, covariance=both)
    if not weak:
        state = TrackingState.DEGRADED if alignment is not None else TrackingState.TRACKING
        reason = f"not refined: {alignment.reason}" if alignment is not None else ""
        covariance = coarse.covariance
        if alignment is not None and covariance is not None:
            covariance = settings.unrefined_scale * covariance
        return replace(common, state=state, reason=reason, T_map_camera=coarse.T_map_camera, covariance=covariance)
    state = TrackingState.LOST if had_pose else TrackingState.INITIALIZING
    return replace(common, state=state, reason=weak if alignment is None else f"{weak}; {alignment.reason}")


def disagreement(alignment: Alignment, coarse: CoarsePose, settings: JudgementSettings) -> str:
    """Return the contradiction between a refined and a coarse pose as a sentence, or an empty string."""
    T, coarse_T = alignment.T_map_camera, coarse.T_map_camera
    if T is None or coarse_T is None or alignment.covariance is None or coarse.covariance is None:
        return ""
    between = inverse_pose(coarse_T) @ T
    apart_m, apart_deg = float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])
    if apart_m <= settings.max_disagreement_m and apart_deg <= settings.max_disagreement_deg:
        return ""
    if UncertainPose(coarse_T, coarse.covariance).chi2(UncertainPose(T, alignment.covariance)) <= CHI2_6_999:
        return ""
    return f"the coarse and the refined pose are {apart_m:.2f} m and {apart_deg:.1f} deg apart, and both look right"


def _weakness(coarse: CoarsePose, settings: JudgementSettings) -> str:
    """Return the reason why a coarse pose is not accepted on its own, or an empty string."""
    if not coarse.success:
        return coarse.reason
    if coarse.inlier_ratio >= settings.min_inlier_ratio:
        return ""
    return (
        f"only {100 * coarse.inlier_ratio:.0f} % of the cells agree with the coarse pose, "
        f"and {100 * settings.min_inlier_ratio:.0f} % are needed in this map"
    )


GOOD_M, GOOD_DEG = 0.10, 5.0
"""Errors below which a pose is right, in the meaning of its confidence."""
LEAST_CONFIDENCE = 0.75
"""Confidence below which a pose is not TRACKING: a pose that is claimed without a word has to hold."""


def is_good(T_true: Matrix, T: Matrix | None) -> bool:
    """Return true if the error of a pose is below these limits."""
    error = None if T is None else pose_tangent_error(T, T_true)
    return error is not None and bool(
        np.linalg.norm(error[:3]) < GOOD_M and np.linalg.norm(error[3:]) < math.radians(GOOD_DEG)
    )


_EVIDENCE = {
    "cost_ratio": (0.88, -0.3),
    "missing_share": (0.18, -1.2),
    "camera_score": (2.71, -0.25),
    "sigma_score": (-0.91, -0.74),
    "shift_score": (1.35, -0.36),
    "fit_score": (-0.76, -1.44),
}
"""Mean and weight of each value that the confidence depends on."""
_BIAS = 2.23
EVIDENCE = tuple(_EVIDENCE)
"""Names of the values that the confidence depends on; see :func:`confidence_of`."""


def confidence_of(evidence: Mapping[str, float], odds: float = 1.0) -> float:
    """Return the probability that a pose is right: errors below 10 cm and 5 deg.

    The model is a logistic regression on treated frames of four maps; see ``docs/results/trust.md``.

    Args:
        evidence: values by name; one that is not known counts as the mean. ``cost_ratio``: cost relative to the map's
            limit. ``missing_share``: blocks that do not match. ``camera_score``: log(1 + chi-square) of the camera's
            offsets. ``sigma_score``: log of the standard deviation relative to 10 cm or 5 deg. ``shift_score``: log(1 +
            ``shift_chi2``). ``fit_score``: see :func:`fit_score`.
        odds: factor on the odds, from the map's calibration.
    """
    weighted = sum(weight * (evidence.get(k, mean) - mean) for k, (mean, weight) in _EVIDENCE.items())
    total = _BIAS + math.log(odds) + weighted
    return 1.0 / (1.0 + math.exp(-max(min(total, 30.0), -30.0)))


def fit_score(T_map_camera: Matrix, fitted: FittedCamera) -> float:
    """Return the log of the distance between an aligned pose (4, 4) and that of the fitted camera.

    It is relative to 10 cm or 5 deg, together with the standard deviation of the fitted pose. A pose that holds moves
    little where the camera is free as well; one in a wrong minimum moves far.
    """
    apart, variance = pose_tangent_error(T_map_camera, fitted.T_map_camera), np.diag(fitted.covariance)
    far = 0.0
    for axes, limit in ((slice(0, 3), GOOD_M), (slice(3, 6), math.radians(GOOD_DEG))):
        far = max(far, float(apart[axes] @ apart[axes]) / (limit**2 + float(variance[axes].sum())))
    return 0.5 * math.log(min(max(far, 4e-4), 16.0))


def widened(
    estimate: PoseEstimate, moved: NDArray[np.float64], covariance: Matrix, share: float = 0.3, likely: float = 1.0
) -> PoseEstimate:
    """Return an estimate whose covariance also covers another pose.

    Args:
        estimate: estimate with a covariance; one without is returned as it is.
        moved: (6,) tangent error between the poses.
        covariance: (6, 6) covariance of the other pose.
        share: share of the distance that is added in all directions.
        likely: probability of the other pose.
    """
    if estimate.covariance is None:
        return estimate
    around = share**2 * np.repeat([moved[:3] @ moved[:3], moved[3:] @ moved[3:]], 3)
    wider = estimate.covariance + likely * (np.outer(moved, moved) + np.diag(around) + covariance)
    return replace(estimate, covariance=0.5 * (wider + wider.T))


WRONG_CAMERAS = np.array(
    [
        [0.12, 0.0, 0.0, 0.0, 0.0, 0.0],  # a zoom, a resized image, another focal length
        [0.12, 0.15, 0.0, 0.0, 0.0, 0.0],  # a squeezed image
        [0.12, 0.0, 0.02, 0.02, 0.0, 0.0],  # a crop
        [0.06, 0.0, 0.0, 0.0, 0.1, 0.0],  # another lens
    ]
)
"""Standard deviations of cameras that are wrong, not inaccurate, by kind, each as likely as the others: relative to the
focal length, the aspect ratio, and the image's width for the principal point; absolute for k1 and skew."""
SHEARED_IMAGES = np.array([[0.0, 0.0, 0.0, 0.0, 0.0, 0.03], [0.0, 0.03, 0.0, 0.0, 0.0, 0.0]])
"""The same of images that a rolling shutter sheared in a turn, by a skew (yaw) or an aspect ratio (pitch): as much as a
turn by a radian per second during 30 ms."""
CHANGED_SINCE = 0.1
"""Probability of a zoom or a new focus since the images before, relative to that of a wrong camera before any image."""
LATEST_FITS = 6
"""Number of the last fits that may be of a camera that has zoomed since."""
PARTLY_FOUND = 4.0
"""Factor on the covariance of fits where they are to exclude a wrong camera: fits begin at the given camera, and those
that find only a part of its mistake are too near to it."""


def wrong_cameras(usual: Matrix, width: int, kinds: Matrix = WRONG_CAMERAS) -> Matrix:
    """Return the covariance of the offsets of each kind of wrong camera, (K, 6, 6); see :meth:`CameraDoubt.of`."""
    return np.stack([usual + np.diag(kind**2) for kind in kinds * (1.0, 1.0, width, width, 1.0, 1.0)])


@dataclass(frozen=True, eq=False)
class CameraDoubt:
    """What is left of the possibility that the camera is wrong, by what the images have said so far.

    The prior of a calibration is a mixture: mostly the usual error, and with a small probability a wrong camera.
    """

    probability: float
    """Probability of a wrong camera."""
    moments: NDArray[np.float64]
    """(6, 6) second moments of a wrong camera's offsets."""
    shown: NDArray[np.float64] = field(default_factory=lambda: np.zeros((6, 6)))
    """The same of their means alone: what images show of a wrong camera, not what they leave open."""

    @classmethod
    def of(
        cls,
        prior: float,
        usual: NDArray[np.float64],
        width: int,
        found: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
        kinds: NDArray[np.float64] = WRONG_CAMERAS,
    ) -> CameraDoubt:
        """Return the doubt by Bayes' rule.

        Args:
            prior: probability of a wrong camera before any image; 0: none is ever wrong.
            usual: (6, 6) covariance of the usual error of calibrations.
            width: image width, pixels.
            found: offsets (6,) that images fit, and their covariance (6, 6); None: no image has said anything yet.
            kinds: (K, 6) standard deviations of wrong cameras, as ``WRONG_CAMERAS``.
        """
        wrongs = wrong_cameras(usual, width, kinds)
        if found is None or prior == 0.0:
            return cls(prior, wrongs.mean(0))
        offsets, covariance = found
        right = log_evidence(offsets, covariance + usual)
        odds, moments, means = [], [], []
        for wrong in wrongs:
            more = log_evidence(offsets, covariance + wrong) - right
            odds.append(prior / (1.0 - prior) / len(kinds) * math.exp(max(min(more, 30.0), -30.0)))
            gain = wrong @ np.linalg.inv(wrong + covariance)
            mean = gain @ offsets
            means.append(np.outer(mean, mean))
            moments.append(wrong - gain @ wrong + means[-1])
        total = sum(odds)
        mixed, shown = (np.einsum("k,kij->ij", np.array(odds) / total, np.stack(m)) for m in (moments, means))
        return cls(total / (1.0 + total), 0.5 * (mixed + mixed.T), shown)

    @property
    def focal_sigma(self) -> float:
        """Relative standard deviation of the focal length if the camera is wrong."""
        return math.sqrt(self.moments[0, 0])

    def of_pose(self, sensitivity: NDArray[np.float64]) -> tuple[Matrix, float]:
        """Return the covariance (6, 6) of a pose, and the probability of an error above the limits, by a wrong camera.

        Args:
            sensitivity: (6, 6) derivative of the pose by the offsets.
        """
        covariance = sensitivity @ self.moments @ sensitivity.T + 1e-12 * np.eye(6)
        risk = self.probability * (1.0 - probability_within(covariance, GOOD_M, math.radians(GOOD_DEG)))
        return self.probability * 0.5 * (covariance + covariance.T), risk


def probability_of_another(
    prior: float,
    so_far: float,
    usual: NDArray[np.float64],
    width: int,
    found: tuple[NDArray[np.float64], NDArray[np.float64]] | None,
) -> float:
    """Return the probability that one image is of another camera than the given one, or sheared, by its own fit.

    One camera makes all images, so those before tell much; not all, as it may zoom. Whether a rolling shutter shears an
    image, no other tells. A fit of the right camera deviates as well: fits have heavy tails.

    Args:
        prior: probability of a wrong camera before any image, and of a shear.
        so_far: probability of a wrong camera by the images before.
        usual, width, found: as in :meth:`CameraDoubt.of`, of this image.
    """
    if found is None:
        return 0.0
    priors = (max(so_far, CHANGED_SINCE * prior), WRONG_CAMERAS), (prior, SHEARED_IMAGES)
    likely = [CameraDoubt.of(before, usual, width, found, kinds).probability for before, kinds in priors]
    odds = sum(p / max(1.0 - p, 1e-9) for p in likely)
    return odds / (1.0 + odds)


@dataclass(frozen=True, eq=False)
class CameraVerdict:
    """Combined fits, and their contradiction of the camera, if any."""

    offsets: NDArray[np.float64]
    """(6,) offsets as in :class:`CameraFit`."""
    covariance: NDArray[np.float64]
    """(6, 6) covariance of the offsets, without the tolerance."""
    wrong: int | None
    """Index of the offset that contradicts the camera most; None: the camera fits."""

    @property
    def focal_sigma(self) -> float:
        """Relative standard deviation of the focal length."""
        return math.sqrt(self.covariance[0, 0])


def sentence(verdict: CameraVerdict, given: Camera | None, camera: Camera) -> str:
    """Return a sentence with both values of the offset that contradicts the camera most.

    Args:
        verdict: result of the check.
        given: camera of the images before conversion to the map's, as given by camera_info or the source.
        camera: pinhole camera of the map.
    """
    c, known = verdict.offsets, given or camera
    source = "camera_info" if given is not None else "the map's camera"
    if verdict.wrong == 0:
        return f"the images fit a focal length of {known.fx * math.exp(c[0]):.0f} px, {source} says {known.fx:.0f} px"
    if verdict.wrong == 1:
        fitted = known.fy / known.fx * math.exp(c[1])
        return f"the images fit a ratio fy/fx of {fitted:.3f}, {source} says {known.fy / known.fx:.3f}"
    if verdict.wrong in (2, 3):
        x, y = known.cx + known.fx / camera.fx * c[2], known.cy + known.fy / camera.fy * c[3]
        return (
            f"the images fit a principal point of ({x:.0f}, {y:.0f}) px, "
            f"{source} says ({known.cx:.0f}, {known.cy:.0f}) px"
        )
    if verdict.wrong == 5:
        return f"the images fit a skew of {c[5]:+.3f}, as a rolling shutter makes in a turn; {source} says 0"
    return f"the images fit a radial distortion that differs from {source} by k1 = {c[4]:+.3f}"


def sentence_on_one_image(verdict: CameraVerdict, given: Camera | None, camera: Camera) -> str:
    """Return a sentence on an image that fits the map with another camera only; arguments as :func:`sentence`."""
    fits = sentence(verdict, given, camera).replace("the images fit", "this image fits", 1)
    return f"{fits}: it may show a print of the room, or parts that moved, or the calibration is wrong"
