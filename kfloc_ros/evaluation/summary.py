# SPDX-License-Identifier: Apache-2.0
"""Figures of ``summary.json``, from records: accuracy, time, and the stream of poses.

Definitions: ``docs/reference/evaluation.md``. Times of the stream are of the recording (image stamps), independent of
the machine.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kfloc_ros import __version__
from kfloc_ros.evaluation.metrics import (
    Accuracy,
    Consistency,
    Reliability,
    accuracy,
    consistency,
    percentiles,
    pose_error,
    pose_errors,
    reliability,
)
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.types import TrackingState

FALSE_OK_M = 0.10
"""Position error above which a TRACKING frame is false OK."""


@dataclass(frozen=True)
class Streaming:
    """Figures of the stream of poses of one run."""

    availability: float
    """Share of all frames, dropped ones included, that are TRACKING with a pose."""
    time_to_first_pose_s: float
    """Time from the first frame to the first TRACKING one; NaN without one."""
    false_ok: float
    """Share of the processed frames with truth that are TRACKING and more than 10 cm off; NaN without such frames."""
    confidently_wrong: int | None
    """TRACKING frames whose two-sigma radius is below 5 cm and whose error is more than 15 cm; None without truth."""
    outages: int
    """Runs of processed frames that are not TRACKING, after the first pose."""
    recovery_s: Mapping[str, float]
    """p50, p95, p99 of the time from the first frame of an outage to the next TRACKING one, over outages that ended."""
    lost_at_end: bool
    """True if the last outage did not end."""


def streaming(records: Sequence[FrameRecord]) -> Streaming:
    """Return the figures of records in order of arrival."""
    ok = [is_ok(record) for record in records]
    times_s = elapsed_s(records)
    known = [r for r in records if r.processed and r.truth is not None]
    sure_and_wrong = sum(is_ok(r) and _two_sigma_m(r) < 0.05 and _error_m(r) > 0.15 for r in known)
    first_s = next((time_s for time_s, good in zip(times_s, ok, strict=True) if good), math.nan)
    began_s: float | None = None
    recoveries: list[float] = []
    after_first = False
    for record, good, time_s in zip(records, ok, times_s, strict=True):
        if not record.processed:
            continue
        if good:
            if began_s is not None:
                recoveries.append(time_s - began_s)
            began_s, after_first = None, True
        elif after_first and began_s is None:
            began_s = time_s
    return Streaming(
        availability=sum(ok) / len(ok) if ok else math.nan,
        time_to_first_pose_s=first_s,
        false_ok=sum(is_ok(r) and _error_m(r) > FALSE_OK_M for r in known) / len(known) if known else math.nan,
        confidently_wrong=sure_and_wrong if known else None,
        outages=len(recoveries) + (began_s is not None),
        recovery_s=percentiles(recoveries),
        lost_at_end=began_s is not None,
    )


def elapsed_s(records: Sequence[FrameRecord]) -> list[float]:
    """Return the recorded time of every record since the first; a jump back, as of a looped bag, counts as zero."""
    times_s, elapsed_ns = [], 0
    for number, record in enumerate(records):
        if number:
            elapsed_ns += max(record.stamp_ns - records[number - 1].stamp_ns, 0)
        times_s.append(elapsed_ns * 1e-9)
    return times_s


def is_ok(record: FrameRecord) -> bool:
    """Return true if the frame is TRACKING with a pose."""
    return record.processed and record.estimate is not None and record.state == TrackingState.TRACKING.value


def _error_m(record: FrameRecord) -> float:
    return math.inf if record.truth is None else pose_error(record.estimate, record.truth).translation_m


def _two_sigma_m(record: FrameRecord) -> float:
    if record.covariance is None:
        return math.inf
    return 2 * math.sqrt(max(float(record.covariance[:3, :3].trace()), 0.0))


@dataclass(frozen=True)
class RunInfo:
    """Description of a run, with its counts."""

    kind: str
    """``localize`` or ``replay``."""
    command: str
    map: str
    source: str
    poses: str
    """Kind of ground truth: ``file``, ``sfm`` or ``bag``."""
    split: str | None
    frames: str | None
    """Expression of ``--frames``."""
    hardware: Mapping[str, str | int | float | None]
    received: int
    """Frames that reached the localizer."""
    processed: int
    """Frames that the localizer computed."""
    dropped: int
    """Frames that were received but skipped in favour of a newer one."""
    duration_s: float
    """Wall time from the first frame's start to the last frame's end."""
    interrupted: bool = False
    left_out: int = 0
    """Frames of the source that could not be used; they are in no other figure."""
    left_out_first: str = ""
    """Reason of the first one."""
    transform: Accuracy | None = None
    """Accuracy of the camera's pose on TF at the images' times, for a replay with a base frame."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the run, such as ``filter`` and ``rate``."""


@dataclass(frozen=True)
class Summary:
    """Figures of one run. Recall and medians are over the processed frames that have a truth."""

    run: RunInfo
    frames: int
    frames_without_truth: int
    localized: int
    """Frames with a pose, with or without truth."""
    coarse_localized: int
    accuracy: Accuracy
    coarse: Accuracy
    played: Accuracy | None
    """Replay only: accuracy over every frame played; a frame without an answer is a failure."""
    consistency: Consistency | None
    reliability: Reliability | None
    streaming: Streaming
    states: Mapping[str, int]
    tracking_but_wrong: int | None
    """TRACKING frames whose error is not below 25 cm and 5 deg; None without truth."""
    latency_ms: Mapping[str, float]
    stage_ms: Mapping[str, float]
    throughput_hz: float
    frames_played: int = 0
    """Replay only: frames played, with or without truth; a replay leaves out none."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``summary.json``; numbers that JSON cannot represent (infinity, NaN) are null."""
        info = asdict(self.run)
        content = {
            "kind": info.pop("kind"),
            "kfloc_version": __version__,
            "frames": self.frames,
            "frames_without_truth": self.frames_without_truth,
            **({"frames_played": self.frames_played} if self.run.kind == "replay" else {}),
            "localized": self.localized,
            **_accuracy_dict(self.accuracy),
            "coarse": {"localized": self.coarse_localized, **_accuracy_dict(self.coarse)},
            "played": None if self.played is None else _played_dict(self.played),
            "consistency": None if self.consistency is None else asdict(self.consistency),
            "reliability": None if self.reliability is None else asdict(self.reliability),
            "streaming": asdict(self.streaming),
            "states": dict(self.states),
            "tracking_but_wrong": self.tracking_but_wrong,
            "latency_ms": dict(self.latency_ms),
            "stage_ms": dict(self.stage_ms),
            "throughput_hz": self.throughput_hz,
            **{key: info.pop(key) for key in ("received", "processed", "dropped", "hardware", "map", "command")},
            **{key: info.pop(key) for key in ("source", "poses", "split")},
            "frame_selection": info.pop("frames"),
            **info,
        }
        cleaned = finite(content)
        assert isinstance(cleaned, dict)
        return cleaned


def summarize(records: Sequence[FrameRecord], run: RunInfo) -> Summary:
    """Compute the figures. In a replay, records with ``processed`` False count in ``played`` only."""
    processed = [record for record in records if record.processed]
    with_truth = [record for record in processed if record.truth is not None]
    errors = pose_errors(with_truth)
    wrong = sum(
        record.state == TrackingState.TRACKING.value and not (error.translation_m < 0.25 and error.rotation_deg < 5.0)
        for record, error in zip(with_truth, errors, strict=True)
    )
    latencies = [record.latency_ms for record in processed if record.latency_ms is not None]
    return Summary(
        run=run,
        frames=len(processed),
        frames_without_truth=len(processed) - len(with_truth),
        localized=sum(record.estimate is not None for record in processed),
        coarse_localized=sum(record.coarse is not None for record in processed),
        accuracy=accuracy(errors),
        coarse=accuracy(pose_errors(with_truth, coarse=True)),
        played=accuracy(pose_errors(records)) if run.kind == "replay" else None,
        consistency=consistency(with_truth),
        reliability=reliability(with_truth),
        streaming=streaming(records),
        states=dict(Counter(record.state for record in processed)),
        tracking_but_wrong=wrong if with_truth else None,
        latency_ms=percentiles(latencies),
        stage_ms=stage_medians(processed),
        throughput_hz=run.processed / run.duration_s if run.duration_s > 0 else math.nan,
        frames_played=len(records) if run.kind == "replay" else 0,
    )


def stage_medians(records: Iterable[FrameRecord]) -> dict[str, float]:
    """Return median milliseconds per stage over the frames in which the stage ran, in order of first appearance."""
    values: dict[str, list[float]] = {}
    for record in records:
        for stage, milliseconds in record.timings_ms.items():
            values.setdefault(stage, []).append(milliseconds)
    if "total" in values:
        values["total"] = values.pop("total")
    return {stage: float(np.median(times)) for stage, times in values.items()}


def finite(value: Any) -> Any:
    """Return the same structure with every float that is not finite replaced by None."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _accuracy_dict(result: Accuracy) -> dict[str, Any]:
    return {
        "median_translation_m": result.median_translation_m,
        "median_rotation_deg": result.median_rotation_deg,
        "recall": dict(result.recall),
    }


def _played_dict(result: Accuracy) -> dict[str, Any]:
    return {"frames": result.frames, "localized": result.localized, **_accuracy_dict(result)}
