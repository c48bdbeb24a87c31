# SPDX-License-Identifier: Apache-2.0
"""What happened so far: counters, rates and latencies of one process, and warnings that do not flood."""

from __future__ import annotations

import re
import threading
import time
import traceback
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfloc_ros.errors import KflocError

_WINDOW = 256
"""How many of the last frames rates and percentiles are taken over."""
_RATE_S = 5.0
"""The span that rates are taken over, in seconds."""
_REPEAT_S = 5.0
"""How often the same warning may come, in seconds."""
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
            self._last_fault = message

    def warn(self, sentence: str) -> None:
        """Log a warning; sentences that differ only in numbers count as one kind and come every few seconds."""
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
