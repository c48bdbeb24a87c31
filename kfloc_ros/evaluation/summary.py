# SPDX-License-Identifier: Apache-2.0
"""From records to the figures of ``summary.json``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kfloc_ros import __version__
from kfloc_ros.evaluation.metrics import Accuracy, Consistency, accuracy, consistency, percentiles, pose_errors
from kfloc_ros.evaluation.records import FrameRecord
from kfloc_ros.evaluation.streaming import Streaming, streaming
from kfloc_ros.types import TrackingState


@dataclass(frozen=True)
class RunInfo:
    """What was run, on what, and what it counted."""

    kind: str
    """``localize`` or ``replay``."""
    command: str
    map: str
    source: str
    poses: str
    """Which ground truth: ``file``, ``sfm`` or ``bag``."""
    split: str | None
    frames: str | None
    """The ``--frames`` expression."""
    hardware: Mapping[str, str | int | float | None]
    received: int
    """Frames that reached the localizer."""
    processed: int
    """Frames that it computed."""
    dropped: int
    """Frames that it received and left out because a newer one was there."""
    duration_s: float
    """Wall time from the first frame's start to the last frame's end."""
    interrupted: bool = False
    transform: Accuracy | None = None
    """Replay with a base frame: how right TF was about the camera at the images' times."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the run was asked for, such as ``filter`` and ``rate``."""


@dataclass(frozen=True)
class Summary:
    """All figures of one run. Recall and medians are over the processed frames that have a truth."""

    run: RunInfo
    frames: int
    frames_without_truth: int
    localized: int
    """Frames with a pose, whether or not they have a truth."""
    coarse_localized: int
    accuracy: Accuracy
    coarse: Accuracy
    played: Accuracy | None
    """Replay only: over every frame played, where one that got no answer is a failure."""
    consistency: Consistency | None
    streaming: Streaming
    states: Mapping[str, int]
    tracking_but_wrong: int
    """Frames called TRACKING whose error is not below 25 cm and 5 deg."""
    latency_ms: Mapping[str, float]
    stage_ms: Mapping[str, float]
    throughput_hz: float

    def to_dict(self) -> dict[str, Any]:
        """The content of ``summary.json``: numbers that JSON cannot hold (infinity, NaN) are null."""
        info = asdict(self.run)
        content = {
            "kind": info.pop("kind"),
            "kfloc_version": __version__,
            "frames": self.frames,
            "frames_without_truth": self.frames_without_truth,
            "localized": self.localized,
            **_accuracy_dict(self.accuracy),
            "coarse": {"localized": self.coarse_localized, **_accuracy_dict(self.coarse)},
            "played": None if self.played is None else _played_dict(self.played),
            "consistency": None if self.consistency is None else asdict(self.consistency),
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
        streaming=streaming(records),
        states=dict(Counter(record.state for record in processed)),
        tracking_but_wrong=wrong,
        latency_ms=percentiles(latencies),
        stage_ms=stage_medians(processed),
        throughput_hz=run.processed / run.duration_s if run.duration_s > 0 else math.nan,
    )


def stage_medians(records: Iterable[FrameRecord]) -> dict[str, float]:
    """Median milliseconds per stage over the frames in which the stage ran, in the order first seen."""
    values: dict[str, list[float]] = {}
    for record in records:
        for stage, milliseconds in record.timings_ms.items():
            values.setdefault(stage, []).append(milliseconds)
    if "total" in values:
        values["total"] = values.pop("total")
    return {stage: float(np.median(times)) for stage, times in values.items()}


def finite(value: Any) -> Any:
    """The same structure with every float that is not finite replaced by None."""
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
