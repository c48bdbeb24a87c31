# SPDX-License-Identifier: Apache-2.0
"""Health of a node: counters, rates and faults, and the status messages that carry them."""

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
"""How many of the last frames rates and percentiles are taken over."""
_RATE_S = 5.0
"""The span that rates are taken over, in seconds."""
_REPEAT_S = 5.0
"""How often the same warning may come, in seconds."""
_MAX_SENTENCE = 1000
"""Letters of a warning that are logged."""
_MAX_KINDS = 256
"""How many kinds of warnings are told apart."""


@dataclass(frozen=True)
class Counters:
    """Frames by what became of them; all but the last few frames of ``received`` are in one of the others."""

    received: int = 0
    processed: int = 0
    dropped: int = 0
    """Overwritten by a newer frame before its turn, or too old."""
    refused: int = 0
    """Unusable: bad image, no calibration."""
    failed: int = 0
    """Lost to an internal error."""

    def after(self, upstream: Counters) -> Counters:
        """Counters of a chain of processes: what entered the first, what left the last, and what all of them lost."""
        return Counters(
            received=upstream.received,
            processed=self.processed,
            dropped=upstream.dropped + self.dropped,
            refused=upstream.refused + self.refused,
            failed=upstream.failed + self.failed,
        )


@dataclass(frozen=True)
class Rates:
    """Recent speed: NaN where nothing was measured yet."""

    input_hz: float
    output_hz: float
    latency_p50_ms: float
    latency_p95_ms: float


class Health:
    """Counts and reports; every method may be called from any thread."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._counters = Counters()
        self._arrivals: deque[float] = deque(maxlen=_WINDOW)
        self._outputs: deque[float] = deque(maxlen=_WINDOW)
        self._latencies_ms: deque[float] = deque(maxlen=_WINDOW)
        self._said: dict[str, float] = {}
        self._last_fault = ""

    @property
    def counters(self) -> Counters:
        with self._lock:
            return self._counters

    @property
    def last_fault(self) -> str:
        """The last sentence about a refused or failed frame."""
        with self._lock:
            return self._last_fault

    def count(self, what: str) -> None:
        """Add one to a counter, named as in :class:`Counters`."""
        with self._lock:
            self._counters = replace(self._counters, **{what: getattr(self._counters, what) + 1})
            if what == "received":
                self._arrivals.append(time.monotonic())

    def answered(self, latency_ms: float) -> None:
        """A frame was worked on to the end, ``latency_ms`` after it had arrived."""
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
        """A frame was lost to ``error``: count it and say so, and never let it end the node."""
        if isinstance(error, KflocError):
            self.count("refused")
            self.warn(str(error))
            message = str(error)
        else:
            self.count("failed")
            message = f"{type(error).__name__}: {error}"
            if self._may_say(f"{type(error).__name__}@{_place(error)}", once=True):
                trace = "".join(traceback.format_exception(error))
                self._logger.error(
                    f"A frame was lost to an internal error; the node goes on. Please report it:\n{trace}"
                )
        with self._lock:
            self._last_fault = one_line(message)

    def warn(self, sentence: str) -> None:
        """Log a warning; sentences that differ only in numbers count as one kind and come every few seconds."""
        sentence = one_line(sentence)
        if self._may_say(re.sub(r"\d+", "#", sentence)):
            self._logger.warning(sentence)

    def _may_say(self, kind: str, *, once: bool = False) -> bool:
        now = time.monotonic()
        with self._lock:
            last = self._said.get(kind)
            if last is not None and (once or now - last < _REPEAT_S):
                return False
            if last is None and len(self._said) >= _MAX_KINDS:
                del self._said[next(iter(self._said))]
            self._said[kind] = now
        return True


def one_line(sentence: str) -> str:
    """Return a sentence that is logged as one line whatever text of a message is quoted in it.

    An encoding or a frame id may hold line ends and terminal codes, with which whoever sends it would write log lines
    of his own.
    """
    shown = sentence if len(sentence) <= _MAX_SENTENCE else f"{sentence[:_MAX_SENTENCE]} ..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in shown)


def _rate_hz(times_s: list[float]) -> float:
    """Events a second over the last seconds, 0 when they stopped coming."""
    now = time.monotonic()
    recent = [t for t in times_s if now - t <= _RATE_S]
    if len(recent) < 2:
        return 0.0
    return (len(recent) - 1) / max(recent[-1] - recent[0], 1e-9)


def _place(error: Exception) -> str:
    """File and line where an error was raised."""
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
