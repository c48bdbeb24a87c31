# SPDX-License-Identifier: Apache-2.0
"""``diagnostic_msgs/DiagnosticArray`` as a carrier of named values: made, and read back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from kfloc_ros.errors import FrameError
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.nodes.health import Counters
from kfloc_ros.types import PoseEstimate, TrackingState

Value = str | int | float | bool

OK, WARN, ERROR = DiagnosticStatus.OK, DiagnosticStatus.WARN, DiagnosticStatus.ERROR

LEVELS = {
    TrackingState.TRACKING: OK,
    TrackingState.INITIALIZING: WARN,
    TrackingState.DEGRADED: WARN,
    TrackingState.LOST: ERROR,
}


def make_status(
    stamp_ns: int,
    name: str,
    values: Mapping[str, Value],
    *,
    level: bytes = OK,
    message: str = "",
    hardware_id: str = "",
    frame_id: str = "",
) -> DiagnosticArray:
    """An array with one status; numbers are written so that ``float`` reads them back."""
    array = DiagnosticArray()
    fill_stamp(array.header.stamp, stamp_ns)
    array.header.frame_id = frame_id
    pairs = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
    array.status = [DiagnosticStatus(level=level, name=name, message=message, hardware_id=hardware_id, values=pairs)]
    return array


def read_values(array: Any) -> dict[str, str]:
    """The named values of the one status in an array."""
    return {pair.key: pair.value for status in array.status[:1] for pair in status.values}


def number(values: Mapping[str, str], key: str) -> float:
    """One value as a number.

    Raises:
        FrameError: it is missing or no number.
    """
    try:
        return float(values[key])
    except (KeyError, ValueError) as error:
        raise FrameError(
            f"A status message of the node before has no number '{key}'; are all nodes of one version?"
        ) from error


def whole(values: Mapping[str, str], key: str) -> int:
    """One value as a whole number, 0 to 2**63 - 1.

    Raises:
        FrameError: it is missing or no such number.
    """
    try:
        value = int(values[key])
    except (KeyError, ValueError):
        value = -1
    if not 0 <= value < 2**63:
        raise FrameError(
            f"A status message of the node before has no whole number '{key}'; are all nodes of one version?"
        )
    return value


def counter_values(counters: Counters) -> dict[str, Value]:
    """Counters as named values."""
    return asdict(counters)


def read_counters(values: Mapping[str, str]) -> Counters:
    """Counters back from named values. Raises FrameError if one is missing."""
    return Counters(**{item.name: whole(values, item.name) for item in fields(Counters)})


def timing_values(timings_ms: Mapping[str, float]) -> dict[str, Value]:
    """Stage timings as values named ``<stage>_ms``."""
    return {f"{stage}_ms": round(value, 3) for stage, value in timings_ms.items()}


def read_timings(values: Mapping[str, str]) -> dict[str, float]:
    """Stage timings back from named values. Raises FrameError for one that is no time."""
    timings = {key.removesuffix("_ms"): number(values, key) for key in values if key.endswith("_ms")}
    if not all(0.0 <= value < math.inf for value in timings.values()):
        raise FrameError(f"A status message of the node before has times that are none: {timings}.")
    return timings


def estimate_values(estimate: PoseEstimate) -> dict[str, Value]:
    """What the stages say about one frame."""
    values: dict[str, Value] = {"tracked": estimate.tracked}
    if estimate.coarse is not None:
        values["inliers"] = estimate.coarse.inlier_count
        values["inlier_ratio"] = estimate.coarse.inlier_ratio
    if estimate.filter is not None:
        values["filter_reset"] = estimate.filter.reset_reason
        values["prior_ratio"] = estimate.filter.prior_ratio
        values["nis"] = estimate.filter.nis_mean
        values["rejected_ratio"] = estimate.filter.rejected_ratio
    if estimate.alignment is not None:
        values["alignment_initial_cost"] = estimate.alignment.initial_cost
        values["alignment_final_cost"] = estimate.alignment.final_cost
        values["alignment_valid_ratio"] = estimate.alignment.valid_ratio
        values["alignment_iterations"] = estimate.alignment.iterations
        values["alignment_references"] = " ".join(str(ident) for ident in estimate.alignment.reference_ids)
    return values


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
