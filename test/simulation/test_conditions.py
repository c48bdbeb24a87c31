# SPDX-License-Identifier: Apache-2.0
"""Light and change in the simulated room: as much as asked for, the same every time, and none by default."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.simulation.conditions import FURNITURE, PRINTS, Conditions, _piece, changed_faces, exchanged_faces
from kfloc_ros.simulation.room import HALF_X_M, HALF_Y_M, HEIGHT_M, room
from kfloc_ros.simulation.source import SimulatedSource
from kfloc_ros.types import Frame

SMALL = Camera(160, 120, 131.25, 131.25, 79.5, 59.5)
PEOPLE_AT = 95
"""Frame of the recording with people in view."""


def frame(words: str = "", position: int = PEOPLE_AT) -> Frame:
    source = SimulatedSource("localize", camera=SMALL, texels_per_m=80.0, conditions=Conditions.parse(words))
    return source[position]


def brightness(words: str, position: int) -> float:
    return float(frame(words, position).image.mean())


def roughness(words: str) -> float:
    return float(np.abs(np.diff(frame(words).image.astype(int), axis=1)).mean())


@pytest.mark.parametrize(
    "words", ["light=evening", "light=night", "moved=1", "exchanged=1", "people=4", "dirt=1", "exposure=2&light=day"]
)
def test_a_condition_changes_the_image_and_gives_the_same_every_time(words: str) -> None:
    other = frame(words, 25 if "exposure" in words else PEOPLE_AT)
    assert (other.image == frame(words, other.index).image).all()
    usual = frame("", other.index)
    assert (other.image != usual.image).mean() > 0.05
    assert (other.T_map_camera == usual.T_map_camera).all() and other.stamp_ns == usual.stamp_ns


def test_the_recording_without_conditions_is_the_recording() -> None:
    plain = SimulatedSource("localize", camera=SMALL, texels_per_m=80.0)[PEOPLE_AT]
    assert (plain.image == frame().image).all() and (plain.depth_m == frame("change=7").depth_m).all()


def test_more_is_moved_with_a_larger_share_and_the_same_first() -> None:
    faces = room()

    def moved(share: float) -> set[int]:
        other = changed_faces(faces, share, 1)
        return {i for i, (a, b) in enumerate(zip(faces, other, strict=True)) if (a.corner != b.corner).any()}

    assert not moved(0.0)
    assert moved(0.3) < moved(0.6) < moved(1.0)
    other = changed_faces(faces, 1.0, 1)
    corners = np.concatenate([other[i].triangles().reshape(-1, 3) for i in moved(1.0)])
    assert (np.abs(corners[:, :2]) < (HALF_X_M + 1e-6, HALF_Y_M + 0.02)).all()
    assert corners[:, 2].min() > -1e-6 and corners[:, 2].max() < HEIGHT_M + 1e-6
    assert {_piece(faces[i]) for i in moved(1.0)} == set(range(len(FURNITURE)))
    assert len({_piece(faces[i]) for i in moved(0.3)}) == 3


def test_exchanged_pictures_leave_the_geometry_alone() -> None:
    assert (frame("exchanged=1").depth_m == frame().depth_m).all()
    faces = room()
    third, all_of_them = exchanged_faces(faces, 0.3, 1), exchanged_faces(faces, 1.0, 1)
    assert third < all_of_them and len(PRINTS) == 5 and len(all_of_them) > 30


def test_people_stand_in_front_of_the_room() -> None:
    with_people, usual = frame("people=4"), frame()
    assert with_people.depth_m is not None and usual.depth_m is not None
    nearer = with_people.depth_m < usual.depth_m
    assert 0.01 < nearer.mean() < 0.7 and (with_people.depth_m[~nearer] == usual.depth_m[~nearer]).all()


def test_night_is_noisier_and_exposure_steps_are_brighter_and_darker() -> None:
    assert roughness("light=night") > 1.2 * roughness("light=day")
    steps = [brightness("light=day&exposure=1", k) - brightness("light=day", k) for k in (5, 30, 75)]
    assert steps[0] == 0 and steps[1] > 10 and steps[2] < -10


def test_sources_are_named_and_refused_with_a_reason() -> None:
    source = open_source("sim:localize-quick?light=evening&moved=0.3&change=2")
    assert len(source) == len(open_source("sim:localize-quick"))
    for words, reason in (
        ("colour=red", "no option 'colour=red'"), ("light=noon", "day, evening, night"), ("moved=2", "0 to 1"),
        ("people=1.5", "number of people"), ("dirt=x", "0 to 1"), ("moved=0.1&moved=0.2", "twice"),
        ("exposure=nan", "stops"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=reason):
            open_source(f"sim:localize?{words}")
