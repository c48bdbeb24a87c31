# SPDX-License-Identifier: Apache-2.0
"""Where a recording comes back to a place, the images of then and now are paired."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping.structure_solver import similar_pairs

CAMERA = Camera(160, 128, 130.0, 130.0, 79.5, 63.5)


@pytest.fixture(scope="module")
def round_trip(room) -> list[np.ndarray]:
    """Once around, looking at the walls, and again a little beside the same places."""
    turns = np.linspace(0.0, 2 * np.pi, 6, endpoint=False)
    places = [(angle, 0.05 * again) for again in (0, 1) for angle in turns]
    return [room.view(make_pose(so3_exp([0.0, a, 0.0]), [x, 0.0, 0.0]), camera=CAMERA).image for a, x in places]


def test_images_of_one_place_are_paired_across_the_recording(round_trip) -> None:
    pairs = similar_pairs(round_trip, CAMERA, Backbone(device="cpu"), partners=1, min_apart=(3,))
    assert {(k, k + 6) for k in range(6)} <= set(pairs)
    assert pairs == sorted(set(pairs)) and all(j - i >= 3 for i, j in pairs)


def test_a_recording_shorter_than_the_distance_has_no_pairs(round_trip) -> None:
    assert similar_pairs(round_trip[:3], CAMERA, Backbone(device="cpu"), partners=5, min_apart=(3,)) == []
