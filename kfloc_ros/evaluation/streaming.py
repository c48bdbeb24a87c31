# SPDX-License-Identifier: Apache-2.0
"""What a stream of poses is worth to a robot: when there is one, when it can be relied on, how soon it is back.

Definitions: ``docs/reference/evaluation.md``. Times are of the recording (image stamps), whatever the machine does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfloc_ros.evaluation.metrics import percentiles, pose_error
from kfloc_ros.evaluation.records import FrameRecord
from kfloc_ros.types import TrackingState

FALSE_OK_M = 0.10


@dataclass(frozen=True)
class Streaming:
    """Figures of one run."""

    availability: float
    """Share of all frames, dropped ones included, that are TRACKING with a pose."""
    time_to_first_pose_s: float
    """From the first frame to the first TRACKING one; NaN without one."""
    false_ok: float
    """Share of the processed frames with truth that are TRACKING and more than 10 cm off; NaN without such frames."""
    confidently_wrong: int
    """TRACKING frames whose two-sigma radius is below 5 cm and whose error is more than 15 cm."""
    outages: int
    """Runs of processed frames that are not TRACKING, after the first fix."""
    recovery_s: Mapping[str, float]
    """p50, p95, p99 from the first frame of an outage to the next TRACKING one, over outages that ended."""
    lost_at_end: bool
    """The last outage did not end."""


def streaming(records: Sequence[FrameRecord]) -> Streaming:
    """Figures of records in the order in which they came."""
    ok = [is_ok(record) for record in records]
    times_s = elapsed_s(records)
    known = [r for r in records if r.processed and r.truth is not None]
    first_s = next((time_s for time_s, good in zip(times_s, ok, strict=True) if good), math.nan)
    began_s: float | None = None
    recoveries: list[float] = []
    after_fix = False
    for record, good, time_s in zip(records, ok, times_s, strict=True):
        if not record.processed:
            continue
        if good:
            if began_s is not None:
                recoveries.append(time_s - began_s)
            began_s, after_fix = None, True
        elif after_fix and began_s is None:
            began_s = time_s
    return Streaming(
        availability=sum(ok) / len(ok) if ok else math.nan,
        time_to_first_pose_s=first_s,
        false_ok=sum(is_ok(r) and _error_m(r) > FALSE_OK_M for r in known) / len(known) if known else math.nan,
        confidently_wrong=sum(is_ok(r) and _two_sigma_m(r) < 0.05 and _error_m(r) > 0.15 for r in known),
        outages=len(recoveries) + (began_s is not None),
        recovery_s=percentiles(recoveries),
        lost_at_end=began_s is not None,
    )


def elapsed_s(records: Sequence[FrameRecord]) -> list[float]:
    """Recorded time of every record since the first; where a bag begins anew, time stands still and goes on."""
    times_s, elapsed_ns = [], 0
    for number, record in enumerate(records):
        if number:
            elapsed_ns += max(record.stamp_ns - records[number - 1].stamp_ns, 0)
        times_s.append(elapsed_ns * 1e-9)
    return times_s


def is_ok(record: FrameRecord) -> bool:
    """Whether the frame has a pose that the localizer stands by."""
    return record.processed and record.estimate is not None and record.state == TrackingState.TRACKING.value


def _error_m(record: FrameRecord) -> float:
    return math.inf if record.truth is None else pose_error(record.estimate, record.truth).translation_m


def _two_sigma_m(record: FrameRecord) -> float:
    if record.covariance is None:
        return math.inf
    return 2 * math.sqrt(max(float(record.covariance[:3, :3].trace()), 0.0))
