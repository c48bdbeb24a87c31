# SPDX-License-Identifier: Apache-2.0
"""Plan of searches: near the last pose first, not again and again in vain, and at once where an image is promising."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.relocalization.decision import SearchPlan, SearchSettings

NS = 1_000_000_000
HERE = np.eye(4)
EXACT = 1e-8 * np.eye(6)
ROW = np.stack([make_pose(np.eye(3), np.array([x, 0.0, 0.0])) for x in range(8)])
"""Views 1 m apart, from the place of the camera on."""


def plan() -> SearchPlan:
    """Return the plan of a camera that had a pose at the first view at 0 s."""
    made = SearchPlan(SearchSettings(max_speed_m_s=2.0, max_turn_deg_s=90.0, view_m=0.5, view_deg=45.0))
    made.observe(0, HERE, EXACT)
    return made


@pytest.mark.parametrize(("passed_s", "views"), [(0.1, [0]), (0.5, [0, 1]), (1.5, [0, 1, 2, 3])])
def test_what_is_in_reach_grows_with_time(passed_s: float, views: list[int]) -> None:
    assert plan().in_reach(int(passed_s * NS), ROW, best=0) == views


def test_views_that_look_elsewhere_are_out_of_reach() -> None:
    turned = np.stack([make_pose(so3_exp(np.array([0.0, a, 0.0])), np.zeros(3)) for a in np.radians([0, 40, 90, 180])])
    assert plan().in_reach(NS // 10, turned, best=0) == [0, 1]


def test_an_uncertain_pose_has_a_wider_reach() -> None:
    made = plan()
    made.observe(0, HERE, np.diag([1.0, 1e-8, 1e-8, 1e-8, 1e-8, 1e-8]))
    assert made.in_reach(NS // 10, ROW, best=0) == [0, 1, 2, 3]


def test_a_camera_that_was_carried_elsewhere_is_searched_in_the_whole_map() -> None:
    made = plan()
    assert made.in_reach(NS // 10, ROW, best=6) is None, "the image resembles a view out of reach most"
    made.failed(NS // 10, 50.0, 0)
    assert made.in_reach(NS // 2, ROW, best=0) is None, "it is not where it was expected"
    assert SearchPlan().in_reach(NS, ROW, best=0) is None, "there was no pose"


def test_waiting_grows_while_searches_are_in_vain() -> None:
    made, searched = plan(), []
    for step in range(1, 101):  # 10 s at 10 Hz
        if made.is_due(step * NS // 10, 20.0, 0):
            searched.append(step)
            made.failed(step * NS // 10, 20.0, 0)
    assert searched == [1, 5, 13, 29, 59, 89]


def test_a_promising_image_does_not_wait_and_a_poorer_one_does() -> None:
    made = plan()
    made.failed(NS // 10, 40.0, 0)
    made.failed(NS // 2, 10.0, 0)
    assert not made.is_due(6 * NS // 10, 45.0, 0), "the best in vain counts, not the last"
    assert made.is_due(6 * NS // 10, 60.0, 0)


def test_an_image_of_another_place_does_not_wait() -> None:
    made = plan()
    made.failed(NS // 10, 40.0, 0)
    assert made.is_due(2 * NS // 10, 42.0, 5) and not made.is_due(2 * NS // 10, 42.0, 0)
    made.failed(2 * NS // 10, 42.0, 5)
    assert not made.is_due(3 * NS // 10, 43.0, 5) and not made.is_due(3 * NS // 10, 41.0, 6), "no more alike than these"
    made.observe(4 * NS // 10, HERE, None)
    made.failed(5 * NS // 10, 40.0, 1)
    assert made.is_due(6 * NS // 10, 41.0, 5), "a pose ends what was in vain before"


def test_a_pose_ends_the_waiting_and_a_reset_forgets_it() -> None:
    made = plan()
    made.failed(NS // 10, 40.0, 0)
    made.observe(NS // 5, HERE, None)
    assert made.is_due(3 * NS // 10, 1.0, 0)
    made.failed(3 * NS // 10, 1.0, 0)
    made.reset()
    assert made.is_due(3 * NS // 10, 1.0, 0)
    assert made.in_reach(3 * NS // 10, ROW, best=0) is None


def test_images_are_searched_again_and_again_until_there_was_a_pose() -> None:
    made = SearchPlan()
    made.failed(0, 5.0, 0)
    assert made.is_due(1, 5.0, 0)


def test_stamps_that_step_back_do_not_stop_the_search() -> None:
    made = plan()
    made.failed(5 * NS, 20.0, 0)
    assert made.is_due(NS, 20.0, 0)
