# SPDX-License-Identifier: Apache-2.0
"""Pose errors, recall, consistency of covariances, reliability of confidences; see ``docs/reference/evaluation.md``.

A frame without an estimate is a failure: its error is (infinite metres, 180 degrees). A frame without truth is left
out. Recall counts errors strictly below both thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.types import Matrix, TrackingState

RECALL_THRESHOLDS: Mapping[str, tuple[float, float]] = {
    "1cm_1deg": (0.01, 1.0),
    "2cm_2deg": (0.02, 2.0),
    "5cm_5deg": (0.05, 5.0),
    "10cm_1deg": (0.1, 1.0),
    "25cm_2deg": (0.25, 2.0),
    "100cm_5deg": (1.0, 5.0),
}
"""Name, metres and degrees of each recall figure."""

NEES_95 = 12.592
"""95 % quantile of the chi-square distribution with 6 degrees of freedom."""


@dataclass(frozen=True)
class PoseError:
    """Error of an estimate against the truth."""

    translation_m: float
    """Distance between the camera centres."""
    rotation_deg: float
    """Angle of the rotation between the two orientations."""


FAILURE = PoseError(math.inf, 180.0)
"""Error of a frame that has a truth but no estimate."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over a set of frames that all have a truth."""

    frames: int
    localized: int
    """Frames with a finite estimate, whatever its error."""
    median_translation_m: float
    median_rotation_deg: float
    recall: Mapping[str, float]
    """Share of the frames, 0 to 1, per entry of ``RECALL_THRESHOLDS``."""


@dataclass(frozen=True)
class Consistency:
    """Consistency of covariances with errors, over frames with truth, pose and covariance."""

    frames: int
    nees_mean: float
    """Mean of e' P^-1 e; 6 if the covariance is right, more if it is too small."""
    nees_median: float
    nees_within_95: float
    """Share of frames below the 95 % quantile; 0.95 if the covariance is right."""
    translation_coverage: Mapping[str, float]
    """Share of axis errors within 1, 2 and 3 sigma; 0.683, 0.954, 0.997 if the covariance is right."""
    rotation_coverage: Mapping[str, float]


def pose_error(estimate: Matrix | None, truth: Matrix) -> PoseError:
    """Return the error of ``T_map_camera``; a missing or non-finite estimate is a failure."""
    if estimate is None or not np.isfinite(estimate).all():
        return FAILURE
    return PoseError(
        translation_m=float(np.linalg.norm(estimate[:3, 3] - truth[:3, 3])),
        rotation_deg=rotation_angle_deg(estimate[:3, :3].T @ truth[:3, :3]),
    )


def pose_errors(records: Iterable[FrameRecord], *, coarse: bool = False) -> list[PoseError]:
    """Return the errors of the final (or the coarse) pose of every record that has a truth, in order.

    For the coarse pose, tracked frames are left out, since none was computed.
    """
    return [
        pose_error(record.coarse if coarse else record.estimate, record.truth)
        for record in records
        if record.truth is not None and not (coarse and record.tracked)
    ]


def recall(errors: Sequence[PoseError], translation_m: float, rotation_deg: float) -> float:
    """Return the share of errors strictly below both thresholds; NaN without errors."""
    if not errors:
        return math.nan
    return sum(e.translation_m < translation_m and e.rotation_deg < rotation_deg for e in errors) / len(errors)


def accuracy(errors: Sequence[PoseError]) -> Accuracy:
    """Return the accuracy; medians are infinite if half of the frames failed, and NaN without frames."""
    return Accuracy(
        frames=len(errors),
        localized=sum(math.isfinite(e.translation_m) for e in errors),
        median_translation_m=_median([e.translation_m for e in errors]),
        median_rotation_deg=_median([e.rotation_deg for e in errors]),
        recall={name: recall(errors, *limits) for name, limits in RECALL_THRESHOLDS.items()},
    )


def consistency(records: Iterable[FrameRecord]) -> Consistency | None:
    """Compare covariances with errors; None if no record has truth, pose and a usable covariance."""
    nees: list[float] = []
    ratios: list[Matrix] = []
    for record in records:
        if record.truth is None or record.estimate is None or record.covariance is None:
            continue
        covariance = record.covariance
        if not np.isfinite(covariance).all() or np.linalg.eigvalsh(covariance)[0] <= 0:
            continue
        error = pose_tangent_error(record.estimate, record.truth)
        nees.append(float(error @ np.linalg.solve(covariance, error)))
        ratios.append(np.abs(error) / np.sqrt(np.diag(covariance)))
    if not nees:
        return None
    table = np.array(ratios)
    return Consistency(
        frames=len(nees),
        nees_mean=float(np.mean(nees)),
        nees_median=float(np.median(nees)),
        nees_within_95=float(np.mean(np.array(nees) < NEES_95)),
        translation_coverage={f"{k}sigma": float((table[:, :3] < k).mean()) for k in (1, 2, 3)},
        rotation_coverage={f"{k}sigma": float((table[:, 3:] < k).mean()) for k in (1, 2, 3)},
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 with linear interpolation; NaN without values."""
    if not values:
        return {"p50": math.nan, "p95": math.nan, "p99": math.nan}
    p50, p95, p99 = np.percentile(np.asarray(values, dtype=np.float64), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}


def _median(values: Sequence[float]) -> float:
    """Return the middle value, or the mean of the two in the middle; infinite if one of them is."""
    if not values:
        return math.nan
    ordered = sorted(values)
    low, high = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
    return low if low == high else (low + high) / 2


RIGHT_M, RIGHT_DEG = 0.10, 5.0
"""Errors below which a pose is right; the confidence is the probability of it."""
CATASTROPHIC_M, CATASTROPHIC_DEG = 0.5, 10.0
"""A TRACKING pose with an error of at least either is catastrophic."""
BINS = 10
_CURVE_POINTS = 21


@dataclass(frozen=True)
class ReliabilityBin:
    """Frames with a confidence in one interval."""

    low: float
    high: float
    frames: int
    mean_confidence: float
    right_share: float


@dataclass(frozen=True)
class Reliability:
    """Confidence and covariance against errors."""

    frames: int
    """Frames with truth, pose and confidence."""
    right_share: float
    calibration_error: float
    """Mean distance of confidence and share of right poses over the bins, weighted by frames."""
    confidence_auroc: float | None
    """Probability that a right pose has a higher confidence than a wrong one; None if all are right, or all wrong."""
    sigma_auroc: float | None
    """Likewise, of a smaller standard deviation of the position."""
    precision_area: float
    """Area below the precision over the share of frames that are kept, most confident first."""
    risk_coverage_area: float
    """Area below the share of wrong poses over the share of frames that are kept, most confident first."""
    risk_coverage: tuple[tuple[float, float], ...]
    """Points (share of frames kept, share of wrong poses among them)."""
    catastrophic_share: float
    """Share of the frames whose pose is TRACKING with an error of at least 0.5 m or 10 deg."""
    bins: tuple[ReliabilityBin, ...]
    """Bins with frames, by confidence."""


def reliability(records: Sequence[FrameRecord]) -> Reliability | None:
    """Compare confidences with errors; None if no record has truth, pose and confidence."""
    known = [r for r in records if r.truth is not None and r.estimate is not None and "confidence" in r.stats]
    if not known:
        return None
    confidence = np.array([r.stats["confidence"] for r in known], dtype=np.float64)
    errors = [pose_error(r.estimate, r.truth) for r in known if r.truth is not None]
    right = np.array([e.translation_m < RIGHT_M and e.rotation_deg < RIGHT_DEG for e in errors])
    catastrophic = [
        r.state == TrackingState.TRACKING.value
        and (e.translation_m >= CATASTROPHIC_M or e.rotation_deg >= CATASTROPHIC_DEG)
        for r, e in zip(known, errors, strict=True)
    ]
    sigma = np.array([math.inf if r.covariance is None else math.sqrt(np.trace(r.covariance[:3, :3])) for r in known])
    wrong_first = np.cumsum(~right[np.argsort(-confidence, kind="stable")]) / np.arange(1, len(right) + 1)
    kept = np.linspace(0.0, 1.0, _CURVE_POINTS)[1:]
    curve = tuple((float(c), float(wrong_first[max(math.ceil(c * len(right) - 1e-9), 1) - 1])) for c in kept)
    bins = _bins(confidence, right)
    return Reliability(
        frames=len(known),
        right_share=float(right.mean()),
        calibration_error=sum(b.frames * abs(b.mean_confidence - b.right_share) for b in bins) / len(known),
        confidence_auroc=auroc(confidence, right),
        sigma_auroc=auroc(-sigma, right),
        precision_area=float(1.0 - wrong_first.mean()),
        risk_coverage_area=float(wrong_first.mean()),
        risk_coverage=curve,
        catastrophic_share=float(np.mean(catastrophic)),
        bins=bins,
    )


def auroc(scores: NDArray[np.float64], right: NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve of scores that are high for right poses; None if only one kind is there.

    This is the probability that a right pose scores higher than a wrong one, with equal scores counted half.
    """
    positives, negatives = scores[right], scores[~right]
    if not len(positives) or not len(negatives):
        return None
    order = np.sort(negatives)
    below = np.searchsorted(order, positives, side="left")
    equal = np.searchsorted(order, positives, side="right") - below
    return float((below + 0.5 * equal).sum() / (len(positives) * len(negatives)))


def _bins(confidence: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[ReliabilityBin, ...]:
    number = np.minimum((confidence * BINS).astype(int), BINS - 1)
    found = []
    for k in np.unique(number):
        mine = number == k
        found.append(
            ReliabilityBin(
                k / BINS, (k + 1) / BINS, int(mine.sum()), float(confidence[mine].mean()), float(right[mine].mean())
            )
        )
    return tuple(found)
