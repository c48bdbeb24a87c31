# SPDX-License-Identifier: Apache-2.0
"""Two images that lean to one place confirm each other if they are different views of it, and only then."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.localization.place_search import PlaceMemory, SearchResult
from kfloc_ros.pixloc.refiner import failed_alignment
from kfloc_ros.types import Alignment, Matrix

SECOND_NS = 10**9
DOUBT = failed_alignment("two places look alike")


def at(x_m: float, turn_deg: float = 0.0) -> Matrix:
    return make_pose(so3_exp([0.0, np.radians(turn_deg), 0.0]), [x_m, 0.0, 0.0])


def aligned(T: Matrix) -> Alignment:
    return replace(DOUBT, success=True, reason="", T_map_camera=T)


def leans(T: Matrix, submap: int = 3) -> SearchResult:
    return SearchResult(DOUBT, submap, (1, 2, 3), aligned(T))


@pytest.mark.parametrize("second", [at(2.0), at(0.0, 70.0)])
def test_a_second_view_that_leans_there_too_confirms(second: Matrix) -> None:
    memory = PlaceMemory()
    assert not memory.confirm(0, leans(at(0.0))).success
    found = memory.confirm(SECOND_NS, leans(second))
    assert found.success and found.T_map_camera is second


@pytest.mark.parametrize(
    ("second", "submap", "later_s"),
    [
        (at(0.8, 40.0), 3, 1.0),  # much of the same in view
        (at(2.0), 2, 1.0),  # another room
        (at(4.0), 3, 1.0),  # nobody runs so fast
        (at(2.0), 3, 11.0),  # too long ago
        (at(2.0), 3, 0.0),
    ],
)
def test_what_is_no_second_view_of_one_place_does_not(second: Matrix, submap: int, later_s: float) -> None:
    memory = PlaceMemory()
    memory.confirm(SECOND_NS, leans(at(0.0)))
    assert not memory.confirm(SECOND_NS + int(later_s * SECOND_NS), leans(second, submap)).success


def test_the_older_view_is_kept_while_the_camera_hardly_moves_and_images_without_a_lean_change_nothing() -> None:
    memory = PlaceMemory()
    outcomes = []
    for k in range(12):
        memory.confirm(k * SECOND_NS // 2 + 1, SearchResult(DOUBT))
        outcomes.append(memory.confirm(k * SECOND_NS // 2 + 2, leans(at(0.18 * k))).success)
    assert outcomes.index(True) == 9 and not any(outcomes[:9])


def test_a_pose_or_a_reset_ends_what_was_leant_to() -> None:
    for end in (lambda memory: memory.observe(1, at(0.0), 3), lambda memory: memory.reset()):
        memory = PlaceMemory()
        memory.confirm(0, leans(at(0.0)))
        end(memory)
        assert not memory.confirm(SECOND_NS, leans(at(2.0))).success


def test_the_reach_grows_with_time_and_with_the_last_speed() -> None:
    memory = PlaceMemory()
    assert memory.reach(0) is None
    memory.observe(SECOND_NS, at(0.0), 3)
    slow = memory.reach(2 * SECOND_NS)
    assert slow is not None and slow.limit_m == pytest.approx(2.5) and memory.reach(SECOND_NS) is None
    assert slow.contains(aligned(at(2.4))) and not slow.contains(aligned(at(2.6))) and not slow.contains(DOUBT)
    memory.observe(2 * SECOND_NS, at(3.0), 3)  # on a scooter
    fast = memory.reach(3 * SECOND_NS)
    assert fast is not None and fast.limit_m == pytest.approx(6.5)
    assert np.allclose(fast.centre, [3.0, 0.0, 0.0])
    memory.reset()
    assert memory.reach(4 * SECOND_NS) is None
