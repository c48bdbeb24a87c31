# SPDX-License-Identifier: Apache-2.0
"""Health of a node: counters, rates and errors, and the status messages that carry them."""

from __future__ import annotations

import math
import re
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue

from kfloc_ros.errors import FrameError, KflocError
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.types import PoseEstimate, TrackingState

_WINDOW = 256
"""Number of frames over which rates and percentiles are computed."""
_RATE_S = 5.0
"""Time span over which rates are computed, in seconds."""
_TYPICAL = 9
"""Number of frames whose median interval is typical."""
_MAX_INTERVAL_S = 20.0
"""Longest interval of frames that still arrive, in seconds."""
_REPEAT_S = 5.0
"""Shortest time between two equal warnings, in seconds."""
_MAX_SENTENCE = 1000
"""Number of characters of a warning that are logged."""
_MAX_KINDS = 256
"""Number of kinds of warnings that are distinguished."""


@dataclass(frozen=True)
class Counters:
    """Frames counted by result; every received frame except the last few is in one of the other counters."""

    received: int = 0
    processed: int = 0
    dropped: int = 0
    """Overwritten by a newer frame before being processed, or too old."""
    refused: int = 0
    """Unusable: bad image, no calibration."""
    failed: int = 0
    """Lost to an internal error."""

    def after(self, upstream: Counters) -> Counters:
        """Return the counters of a chain of processes: inputs of the first, outputs of the last, losses of all."""
        return Counters(
            received=upstream.received,
            processed=self.processed,
            dropped=upstream.dropped + self.dropped,
            refused=upstream.refused + self.refused,
            failed=upstream.failed + self.failed,
        )


@dataclass(frozen=True)
class Rates:
    """Recent rates and latencies; NaN where nothing was measured yet."""

    input_hz: float
    output_hz: float
    latency_p50_ms: float
    latency_p95_ms: float


class Health:
    """Thread-safe counters, rates and throttled warnings of a node."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._counters = Counters()
        self._arrivals: deque[float] = deque(maxlen=_WINDOW)
        self._outputs: deque[float] = deque(maxlen=_WINDOW)
        self._latencies_ms: deque[float] = deque(maxlen=_WINDOW)
        self._last_logged: dict[str, float] = {}
        self._last_fault = ""
        self.runtime = ""
        """Run-time of the backbone, if this node has one."""

    @property
    def counters(self) -> Counters:
        with self._lock:
            return self._counters

    @property
    def last_fault(self) -> str:
        """Message of the last refused or failed frame."""
        with self._lock:
            return self._last_fault

    def count(self, what: str) -> None:
        """Add one to a counter, named as in :class:`Counters`."""
        with self._lock:
            self._counters = replace(self._counters, **{what: getattr(self._counters, what) + 1})
            if what == "received":
                self._arrivals.append(time.monotonic())

    def count_processed(self, latency_ms: float) -> None:
        """Count a processed frame, ``latency_ms`` after its receipt."""
        self.count("processed")
        with self._lock:
            self._outputs.append(time.monotonic())
            self._latencies_ms.append(latency_ms)

    def rates(self) -> Rates:
        with self._lock:
            arrivals, outputs = list(self._arrivals), list(self._outputs)
            latencies = list(self._latencies_ms)
        p50, p95 = np.percentile(latencies, [50, 95]) if latencies else (np.nan, np.nan)
        return Rates(_rate_hz(arrivals), _rate_hz(outputs), float(p50), float(p95))

    def fault(self, error: Exception) -> None:
        """Count a frame that was lost to ``error`` and log the error; the node continues."""
        if isinstance(error, KflocError):
            self.count("refused")
            self.warn(str(error))
            message = str(error)
        else:
            self.count("failed")
            message = f"{type(error).__name__}: {error}"
            if self._is_due(f"{type(error).__name__}@{_place(error)}", once=True):
                trace = "".join(traceback.format_exception(error))
                self._logger.error(
                    f"A frame was lost to an internal error; the node continues. Please report it:\n{trace}"
                )
        with self._lock:
            self._last_fault = one_line(message)

    @property
    def receives(self) -> bool:
        """True if frames arrive, also at a low rate."""
        with self._lock:
            return bool(_recent(list(self._arrivals)))

    def inform(self, sentence: str) -> None:
        """Log a sentence as information."""
        self._logger.info(one_line(sentence))

    def warn(self, sentence: str) -> None:
        """Log a warning, at most once in a few seconds; sentences that differ only in numbers count as equal."""
        sentence = one_line(sentence)
        if self._is_due(re.sub(r"\d+", "#", sentence)):
            self._logger.warning(sentence)

    def _is_due(self, kind: str, *, once: bool = False) -> bool:
        now = time.monotonic()
        with self._lock:
            last = self._last_logged.get(kind)
            if last is not None and (once or now - last < _REPEAT_S):
                return False
            if last is None and len(self._last_logged) >= _MAX_KINDS:
                del self._last_logged[next(iter(self._last_logged))]
            self._last_logged[kind] = now
        return True


def one_line(sentence: str) -> str:
    """Return a sentence that is logged as one line whatever text of a message is quoted in it.

    An encoding or a frame id may hold line ends and terminal codes, with which whoever sends it would write log lines
    of his own.
    """
    shown = sentence if len(sentence) <= _MAX_SENTENCE else f"{sentence[:_MAX_SENTENCE]} ..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)


def _rate_hz(times_s: list[float]) -> float:
    """Return events per second over the last seconds; 0 if there are none."""
    recent = _recent(times_s)
    if len(recent) < 2:
        return 0.0
    return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-9)


def _recent(times_s: list[float]) -> list[float]:
    """Return the times of the last seconds; of rare events, those of three typical intervals."""
    intervals_s = np.diff(times_s[-_TYPICAL:])
    typical_s = min(float(np.median(intervals_s)), _MAX_INTERVAL_S) if len(intervals_s) else 0.0
    since_s = time.monotonic() - max(_RATE_S, 3.0 * typical_s)
    return [t for t in times_s if t >= since_s]


def _place(error: Exception) -> str:
    """Return the file and line where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


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
    """Return an array with one status; numbers are written so that ``float`` reads them back."""
    array = DiagnosticArray()
    fill_stamp(array.header.stamp, stamp_ns)
    array.header.frame_id = frame_id
    pairs = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
    array.status = [DiagnosticStatus(level=level, name=name, message=message, hardware_id=hardware_id, values=pairs)]
    return array


def read_values(array: Any) -> dict[str, str]:
    """Return the named values of the one status in an array."""
    return {pair.key: pair.value for status in array.status[:1] for pair in status.values}


def number(values: Mapping[str, str], key: str) -> float:
    """Return one value as a number.

    Raises:
        FrameError: the value is missing or not a number.
    """
    try:
        return float(values[key])
    except (KeyError, ValueError) as error:
        raise FrameError(
            f"A status message of the previous node has no number '{key}'; check that all nodes have the same version."
        ) from error


def whole(values: Mapping[str, str], key: str) -> int:
    """Return one value as an integer in 0 to 2**63 - 1.

    Raises:
        FrameError: the value is missing or not such an integer.
    """
    try:
        value = int(values[key])
    except (KeyError, ValueError):
        value = -1
    if not 0 <= value < 2**63:
        raise FrameError(
            f"A status message of the previous node has no whole number '{key}'; check that all nodes have the same "
            "version."
        )
    return value


def counter_values(counters: Counters) -> dict[str, Value]:
    """Return counters as named values."""
    return asdict(counters)


def read_counters(values: Mapping[str, str]) -> Counters:
    """Return the counters in named values. Raises FrameError if one is missing."""
    return Counters(**{item.name: whole(values, item.name) for item in fields(Counters)})


def timing_values(timings_ms: Mapping[str, float]) -> dict[str, Value]:
    """Return the durations of the stages as values named ``<stage>_ms``."""
    return {f"{stage}_ms": round(value, 3) for stage, value in timings_ms.items()}


def read_timings(values: Mapping[str, str]) -> dict[str, float]:
    """Return the durations in named values, in milliseconds. Raises FrameError for an invalid one."""
    timings = {key.removesuffix("_ms"): number(values, key) for key in values if key.endswith("_ms")}
    if not all(0.0 <= value < math.inf for value in timings.values()):
        raise FrameError(f"A status message of the previous node has invalid durations: {timings}.")
    return timings


def estimate_values(estimate: PoseEstimate) -> dict[str, Value]:
    """Return the results of the stages for one frame as named values."""
    values: dict[str, Value] = {"tracked": estimate.tracked}
    if estimate.confidence is not None:
        values |= {"confidence": estimate.confidence, **estimate.evidence}
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
