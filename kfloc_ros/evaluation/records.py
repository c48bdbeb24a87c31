# SPDX-License-Identifier: Apache-2.0
"""Record of a frame, kept for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState

STATISTICS = {
    "inlier_count": "inliers",
    "inlier_ratio": "inlier_ratio",
    "prior_ratio": "prior_ratio",
    "nis_mean": "nis",
    "rejected_ratio": "rejected_ratio",
    "alignment_initial_cost": "alignment_initial_cost",
    "alignment_final_cost": "alignment_final_cost",
    "alignment_valid_ratio": "alignment_valid_ratio",
    "alignment_iterations": "alignment_iterations",
}
"""Statistics of the stages by their names in records, with their keys in the nodes' ``status``."""
STAGES = (
    "decode", "rectify", "backbone", "measure", "filter", "pnp", "refine", "relocalize", "change_over", "publish",
    "total",
)  # fmt: skip
"""Stages in the order of their work, as named in ``timings_ms``; no run has times of all."""


@dataclass(frozen=True, eq=False)
class FrameRecord:
    """Frame given to the localizer, with its result and the truth.

    Poses are ``T_map_camera`` (4, 4); ``covariance`` is 6x6 in the order of :mod:`kfloc_ros.types`.
    """

    index: int
    stamp_ns: int
    truth: Matrix | None
    estimate: Matrix | None = None
    coarse: Matrix | None = None
    """Pose before refinement."""
    state: str = TrackingState.LOST.value
    reason: str = ""
    covariance: Matrix | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the stages, by the names of ``STATISTICS``."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    """Offline: time in the localizer. Replay: wall time from the image's publication to the pose's arrival."""
    tracked: bool = False
    """True if the frame was aligned from the predicted pose alone, so that it has no coarse pose."""
    processed: bool = True
    """False for a frame that was played but not answered by the nodes (dropped or lost)."""


def record_of(frame: Frame, estimate: PoseEstimate, *, latency_ms: float, rectify_ms: float) -> FrameRecord:
    """Return the record of one frame that was localized in this process."""
    stats: dict[str, float] = {}
    if estimate.coarse is not None:
        stats["inlier_count"] = estimate.coarse.inlier_count
        stats["inlier_ratio"] = estimate.coarse.inlier_ratio
    if estimate.filter is not None:
        stats["prior_ratio"] = estimate.filter.prior_ratio
        stats["nis_mean"] = estimate.filter.nis_mean
        stats["rejected_ratio"] = estimate.filter.rejected_ratio
    if estimate.alignment is not None:
        stats["alignment_initial_cost"] = estimate.alignment.initial_cost
        stats["alignment_final_cost"] = estimate.alignment.final_cost
        stats["alignment_valid_ratio"] = estimate.alignment.valid_ratio
        stats["alignment_iterations"] = estimate.alignment.iterations
    return FrameRecord(
        index=frame.index,
        stamp_ns=frame.stamp_ns,
        truth=frame.T_map_camera,
        estimate=estimate.T_map_camera,
        coarse=estimate.coarse.T_map_camera if estimate.coarse is not None and estimate.coarse.success else None,
        state=estimate.state.value,
        reason=estimate.reason,
        covariance=estimate.covariance,
        stats=stats,
        timings_ms={"rectify": rectify_ms, **estimate.timings_ms},
        latency_ms=latency_ms,
        tracked=estimate.tracked,
    )
