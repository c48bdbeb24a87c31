# SPDX-License-Identifier: Apache-2.0
"""Cache of the few submaps that were used last; others are loaded on demand or in advance."""

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
    """Counters of a cache."""

    loads: int = 0
    """Submaps that were loaded."""
    waits: int = 0
    """Calls that waited for a submap to load."""
    waited_ms: float = 0.0
    evictions: int = 0


class SubmapCache(Generic[Loaded]):
    """Least-recently-used cache of submaps by number, for one calling thread; it loads ahead in its own.

    One more submap is in memory while one loads in the background.

    Args:
        load: loads a submap, or raises MapError; called in the cache's thread for submaps loaded in advance.
        limit: largest number of submaps in memory, at least two.
    """

    def __init__(self, load: Callable[[int], Loaded], limit: int) -> None:
        self._load, self._limit = load, max(2, limit)
        self._loaded: OrderedDict[int, Loaded] = OrderedDict()
        self._pending: tuple[int, Future[Loaded]] | None = None
        self._damaged: set[int] = set()
        self._pool: ThreadPoolExecutor | None = None
        self.counts = CacheCounts()

    @property
    def loaded(self) -> tuple[int, ...]:
        """Numbers of the submaps in memory, least recently used first."""
        return tuple(self._loaded)

    def get(self, submap: int) -> Loaded:
        """Return a submap; load it if it is not in memory.

        Raises:
            MapError: it cannot be loaded.
        """
        self._collect()
        if submap not in self._loaded:
            start = time.perf_counter()
            self._collect(submap)
            if submap not in self._loaded:
                self._insert(submap, self._load(submap))
            self.counts.waits += 1
            self.counts.waited_ms += 1e3 * (time.perf_counter() - start)
        self._loaded.move_to_end(submap)
        return self._loaded[submap]

    def get_or_prefetch(self, submap: int) -> Loaded | None:
        """Return a submap in memory; else None, and load it in the background unless another one is loading."""
        self._collect()
        if submap in self._loaded:
            self._loaded.move_to_end(submap)
            return self._loaded[submap]
        if self._pending is None and submap not in self._damaged:
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="submaps")
            self._pending = submap, self._pool.submit(self._load, submap)
        return None

    def touch(self, submap: int) -> None:
        """Mark a submap, if it is in memory, as used just now."""
        if submap in self._loaded:
            self._loaded.move_to_end(submap)

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._pending = None

    def _collect(self, awaited: int | None = None) -> None:
        """Take a submap that has finished loading; wait for it if it is the awaited one."""
        if self._pending is None:
            return
        submap, future = self._pending
        if not future.done() and submap != awaited:
            return
        self._pending = None
        try:
            self._insert(submap, future.result())
        except MapError:  # get() raises it again for the caller that needs the submap
            self._damaged.add(submap)

    def _insert(self, submap: int, loaded: Loaded) -> None:
        self.counts.loads += 1
        self._loaded[submap] = loaded
        while len(self._loaded) > self._limit:
            self._loaded.popitem(last=False)
            self.counts.evictions += 1
