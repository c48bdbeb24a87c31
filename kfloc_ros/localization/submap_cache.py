# SPDX-License-Identifier: Apache-2.0
"""Keeps the few submaps in memory that were used last; another is loaded when it is needed, or before."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from kfloc_ros.errors import MapError

Loaded = TypeVar("Loaded")


@dataclass
class CacheCounts:
    """What a cache did."""

    loads: int = 0
    """Submaps that came into memory."""
    waits: int = 0
    """Times that somebody waited for one."""
    waited_ms: float = 0.0
    evictions: int = 0


class SubmapCache(Generic[Loaded]):
    """At most ``limit`` submaps by number; the one used longest ago goes first. For one thread, beside its own.

    While one is on its way in the background there is one more in memory.

    Args:
        load: makes a submap, or raises MapError; called in the cache's thread for what is asked for ahead.
        limit: how many are kept, two at least.
    """

    def __init__(self, load: Callable[[int], Loaded], limit: int) -> None:
        self._load, self._limit = load, max(2, limit)
        self._kept: OrderedDict[int, Loaded] = OrderedDict()
        self._coming: tuple[int, Future[Loaded]] | None = None
        self._damaged: set[int] = set()
        self._pool: ThreadPoolExecutor | None = None
        self.counts = CacheCounts()

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the submaps in memory, that used longest ago first."""
        return tuple(self._kept)

    def get(self, submap: int) -> Loaded:
        """A submap, loaded if it is not there.

        Raises:
            MapError: it cannot be loaded.
        """
        self._collect()
        if submap not in self._kept:
            start = time.perf_counter()
            self._collect(submap)
            if submap not in self._kept:
                self._keep(submap, self._load(submap))
            self.counts.waits += 1
            self.counts.waited_ms += 1e3 * (time.perf_counter() - start)
        self._kept.move_to_end(submap)
        return self._kept[submap]

    def get_if_kept(self, submap: int) -> Loaded | None:
        """A submap that is there; otherwise None, and it is loaded in the background unless another one is."""
        self._collect()
        if submap in self._kept:
            self._kept.move_to_end(submap)
            return self._kept[submap]
        if self._coming is None and submap not in self._damaged:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="submaps")
            self._coming = submap, self._pool.submit(self._load, submap)
        return None

    def touch(self, submap: int) -> None:
        """Count a submap as used just now, if it is there: others make room before it."""
        if submap in self._kept:
            self._kept.move_to_end(submap)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._coming = None

    def _collect(self, awaited: int | None = None) -> None:
        """Take in what has come, and wait for what is awaited if it is on its way."""
        if self._coming is None:
            return
        submap, future = self._coming
        if not future.done() and submap != awaited:
            return
        self._coming = None
        try:
            self._keep(submap, future.result())
        except MapError:  # whoever needs it will be told when it is asked for again
            self._damaged.add(submap)

    def _keep(self, submap: int, loaded: Loaded) -> None:
        self.counts.loads += 1
        self._kept[submap] = loaded
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)
            self.counts.evictions += 1
