# SPDX-License-Identifier: Apache-2.0
"""The cache of submaps: bounded, loads once, loads ahead without anybody waiting, and says what cannot be loaded."""

from __future__ import annotations

import threading

import pytest

from kfloc_ros.errors import MapError
from kfloc_ros.localization.submap_cache import SubmapCache


def test_the_one_used_longest_ago_makes_room() -> None:
    loaded: list[int] = []
    cache: SubmapCache[str] = SubmapCache(lambda n: loaded.append(n) or f"map {n}", 2)
    for number in (0, 1, 0, 2, 0, 1):
        assert cache.get(number) == f"map {number}"
        assert len(cache.loaded) <= 2
    assert loaded == [0, 1, 2, 1] and cache.loaded == (0, 1)
    cache.touch(0)
    cache.touch(7)
    cache.get(3)
    assert cache.loaded == (0, 3)
    assert (cache.counts.loads, cache.counts.waits, cache.counts.evictions) == (5, 5, 3)


def test_what_is_asked_for_ahead_comes_in_the_background() -> None:
    go = threading.Event()

    def load(number: int) -> str:
        assert go.wait(10)
        return f"map {number}"

    cache: SubmapCache[str] = SubmapCache(load, 3)
    assert cache.get_or_prefetch(4) is None and cache.get_or_prefetch(4) is None and cache.get_or_prefetch(5) is None
    assert cache.loaded == () and cache.counts.waits == 0
    go.set()
    assert cache.get(4) == "map 4"  # waits for the one on its way, and does not load it again
    assert cache.counts.loads == 1 and cache.get_or_prefetch(4) == "map 4"
    cache.close()


def test_a_submap_that_cannot_be_loaded_is_told_to_who_needs_it_alone() -> None:
    tries: list[int] = []

    def load(number: int) -> str:
        tries.append(number)
        raise MapError(f"map {number} is damaged")

    cache: SubmapCache[str] = SubmapCache(load, 2)
    while not cache._damaged:
        assert cache.get_or_prefetch(7) is None
    assert cache.get_or_prefetch(7) is None and tries == [7]
    with pytest.raises(MapError, match="map 7"):
        cache.get(7)
    cache.close()
