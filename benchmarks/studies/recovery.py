# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a run over a disturbed stream: false OK, and the time to recover."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kfloc_ros.evaluation.metrics import percentiles
from kfloc_ros.evaluation.summary import FALSE_OK_M
from kfloc_ros.types import TrackingState
from studies.disturbed import Disturbance, Slot

OUTCOMES = ("right", "wrong", "no pose", "no answer")
"""Outcomes of a frame: a pose at most 10 cm off, a pose further off, no pose, or a dropped frame. A replaced image
shows nothing of the map, so any pose of it is wrong."""


@dataclass(frozen=True)
class Answer:
    """Answer to one frame of the stream."""

    processed: bool
    state: str
    error_m: float | None
    """None without a pose."""
    latency_ms: float


@dataclass(frozen=True)
class Recovery:
    """Figures of the disturbances of one kind."""

    events: int
    recovered: int
    """Number recovered from before the next disturbance."""
    seconds: Mapping[str, float]
    """p50, p95, p99 of the time from the first good image after the disturbance to the first right TRACKING pose:
    recorded time plus the latency of that pose, over the disturbances recovered from."""
    images: Mapping[str, float]
    """Number of good images until then, that of the pose included."""
    false_ok: int
    """Frames during and after the disturbance that were TRACKING without a right pose."""


@dataclass(frozen=True)
class DisturbedRun:
    """Figures of one run over a disturbed stream."""

    frames: int
    processed: int
    false_ok: float
    """Share of the processed frames that were TRACKING without a right pose."""
    false_ok_frames: int
    kinds: Mapping[str, Recovery]
    good_images: Mapping[str, Mapping[str, int]]
    """Numbers by state and outcome, over images that show the map."""
    replaced_images: Mapping[str, Mapping[str, int]]
    """Numbers by state and outcome, over replaced images."""


def evaluate_disturbed(
    slots: Sequence[Slot], events: Sequence[Disturbance], answers: Mapping[int, Answer]
) -> DisturbedRun:
    """Return the figures of a run.

    Args:
        slots: frames of the stream.
        events: disturbances, by the slots' ``event``.
        answers: by the number of the frame in the stream; a frame without one was dropped.
    """
    dropped = Answer(processed=False, state="", error_m=None, latency_ms=math.nan)
    given = [answers.get(number, dropped) for number in range(len(slots))]
    kinds = {}
    for kind in dict.fromkeys(events):
        of_kind = [number for number, event in enumerate(events) if event is kind]
        kinds[kind.value] = _recovery(slots, given, of_kind)
    wrong = sum(is_false_ok(slot, answer) for slot, answer in zip(slots, given, strict=True))
    processed = sum(answer.processed for answer in given)
    return DisturbedRun(
        frames=len(slots),
        processed=processed,
        false_ok=wrong / processed if processed else math.nan,
        false_ok_frames=wrong,
        kinds=kinds,
        good_images=_states(slots, given, replaced=False),
        replaced_images=_states(slots, given, replaced=True),
    )


def is_false_ok(slot: Slot, answer: Answer) -> bool:
    """Return true if a frame is TRACKING without a right pose."""
    return answer.state == TrackingState.TRACKING.value and outcome(slot, answer) != "right"


def outcome(slot: Slot, answer: Answer) -> str:
    """Return one of ``OUTCOMES``."""
    if not answer.processed:
        return "no answer"
    if answer.error_m is None:
        return "no pose"
    return "right" if slot.shown is None and answer.error_m <= FALSE_OK_M else "wrong"


def read_answers(frames_csv: Path) -> dict[int, Answer]:
    """Return the answers in a result folder's ``frames.csv``, by the number of the frame in its bag."""
    with frames_csv.open(newline="", encoding="utf-8") as stream:
        return {
            int(row["index"]): Answer(
                processed=row["processed"] == "1",
                state=row["state"] if row["processed"] == "1" else "",
                error_m=float(row["translation_error_m"]) if row["translation_error_m"] else None,
                latency_ms=float(row["latency_ms"] or "nan"),
            )
            for row in csv.DictReader(stream)
        }


def _recovery(slots: Sequence[Slot], answers: Sequence[Answer], events: Sequence[int]) -> Recovery:
    seconds, images, false_ok = [], [], 0
    for event in events:
        here = [(slot, answer) for slot, answer in zip(slots, answers, strict=True) if slot.event == event]
        false_ok += sum(is_false_ok(slot, answer) for slot, answer in here)
        good = [(slot, answer) for slot, answer in here if slot.shown is None]
        for number, (slot, answer) in enumerate(good, start=1):
            if answer.state == TrackingState.TRACKING.value and outcome(slot, answer) == "right":
                seconds.append((slot.stamp_ns - good[0][0].stamp_ns) * 1e-9 + answer.latency_ms * 1e-3)
                images.append(float(number))
                break
    return Recovery(len(events), len(seconds), percentiles(seconds), percentiles(images), false_ok)


def _states(slots: Sequence[Slot], answers: Sequence[Answer], *, replaced: bool) -> dict[str, dict[str, int]]:
    counts = Counter(
        (answer.state or "-", outcome(slot, answer))
        for slot, answer in zip(slots, answers, strict=True)
        if (slot.shown is not None) == replaced
    )
    states = [state.value for state in TrackingState] + ["-"]
    return {
        state: {name: counts[state, name] for name in OUTCOMES if counts[state, name]}
        for state in states
        if any(counts[state, name] for name in OUTCOMES)
    }
