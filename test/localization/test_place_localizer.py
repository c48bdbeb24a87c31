# SPDX-License-Identifier: Apache-2.0
"""A place of tiny rooms: the right one is found or none is claimed, and the pose goes on from one into the next."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.evaluation.offline import localize_source
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.place_guide import GuideSettings
from kfloc_ros.localization.place_localizer import PlaceLocalizer, localizer_for
from kfloc_ros.localization.place_search import PlaceSearchSettings
from kfloc_ros.mapping.place_making import make_place
from kfloc_ros.maps.place import Place
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.references import ReferenceViews, extract_reference_points
from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState

pytestmark = pytest.mark.thorough

STEP_NS = 100_000_000
FAR = make_pose(so3_exp([0.0, 0.0, 1.2]), [30.0, 5.0, 0.0])
FARTHER = make_pose(np.eye(3), [-40.0, 0.0, 0.0])

Make = Callable[..., Place]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone(device="cpu")


@pytest.fixture(scope="module")
def other_room(room):
    """The same shape with other pictures on its walls."""
    other = copy.copy(room)
    other._textures = [np.ascontiguousarray(texture[::-1, ::-1]) for texture in room._textures[::-1]]
    return other


@pytest.fixture(scope="module")
def map_of(backbone: Backbone) -> Callable[..., SceneMap]:
    """Maps whose head knows nothing, so that all depends on the search and the alignment."""

    def make(frames: Sequence[Frame]) -> SceneMap:
        views = []
        for frame in frames:
            features = backbone.extract(frame.image)
            views.append(extract_reference_points(features, frame.depth_m, frame.camera, frame.T_map_camera, 300))
        torch.manual_seed(0)
        head = SCoordNet(width=8, blocks=0)
        head.normalize_with(torch.randn(50, 192), views[0].points)
        points = torch.cat([view.points for view in views])
        return SceneMap(
            name="room",
            frame_id="map",
            camera=frames[0].camera,
            head=head.eval(),
            references=ReferenceViews(
                tuple(f.index for f in frames), np.stack([f.T_map_camera for f in frames]), tuple(views)
            ),
            calibration=Calibration(),
            bounds_m=(tuple(points.amin(dim=0).tolist()), tuple(points.amax(dim=0).tolist())),
            provenance={},
        )

    return make


@pytest.fixture(scope="module")
def make(map_of, tmp_path_factory: pytest.TempPathFactory) -> Make:
    def make(motions: dict[str, Matrix], **frames: Sequence[Frame]) -> Place:
        root = tmp_path_factory.mktemp("place")
        folders = [map_of(listed).save(root / name) for name, listed in frames.items()]
        return make_place(folders, root / "place", T_place_submaps=motions)

    return make


@pytest.fixture(scope="module")
def two_rooms(make: Make, room, other_room) -> Place:
    near = [room[k] for k in range(0, 32, 4)]
    return make({"other": FAR}, own=near, other=[other_room[k] for k in range(0, 32, 4)])


@pytest.fixture(scope="module")
def three_alike(make: Make, room, other_room) -> Place:
    near = [room[k] for k in range(0, 32, 4)]
    return make({"twin": FAR, "other": FARTHER}, own=near, twin=near, other=[other_room[k] for k in range(0, 32, 8)])


def localizer_of(place: Place, settings: GuideSettings | None = None, **options) -> PlaceLocalizer:
    return PlaceLocalizer(place, LocalizerConfig(device="cpu", **options), settings=settings)


def at(frame: Frame, number: int) -> Frame:
    return replace(frame, stamp_ns=10**12 + number * STEP_NS)


def away_m(estimate: PoseEstimate, T: Matrix) -> float:
    assert estimate.T_map_camera is not None, estimate.reason
    return float(np.linalg.norm(estimate.T_map_camera[:3, 3] - T[:3, 3]))


def test_the_submap_that_an_image_shows_is_found_and_its_poses_are_the_places(
    two_rooms: Place, room, other_room
) -> None:
    localizer = localizer_of(two_rooms)
    first = localizer.process(at(room[9], 0)).estimate
    assert (
        first.state is TrackingState.TRACKING
        and localizer.submap == "own"
        and away_m(first, room[9].T_map_camera) < 0.03
    )
    assert "relocalize" in first.timings_ms
    localizer.reset("a test")
    second = localizer.process(at(other_room[18], 1)).estimate
    assert localizer.submap == "other" and away_m(second, FAR @ other_room[18].T_map_camera) < 0.03
    following = localizer.process(at(other_room[19], 2)).estimate
    assert following.state is TrackingState.TRACKING and "relocalize" not in following.timings_ms
    assert away_m(following, FAR @ other_room[19].T_map_camera) < 0.03


def test_rooms_that_are_alike_are_not_guessed_but_a_hint_decides(three_alike: Place, room) -> None:
    localizer = localizer_of(three_alike)
    lost = localizer.process(at(room[9], 0)).estimate
    assert lost.state is TrackingState.INITIALIZING and lost.T_map_camera is None
    assert "two places look alike" in lost.reason and "'own'" in lost.reason and "'twin'" in lost.reason
    truth = FAR @ room[10].T_map_camera
    hints = [truth @ make_pose(so3_exp([0.02, 0.0, 0.03]), [0.1, 0.0, -0.05])]
    told = localizer.process(at(room[10], 1), hints).estimate
    assert localizer.submap == "twin" and away_m(told, truth) < 0.03
    following = localizer.process(at(room[11], 2)).estimate
    assert following.state is TrackingState.TRACKING and away_m(following, FAR @ room[11].T_map_camera) < 0.03


def test_a_hint_that_the_image_contradicts_is_not_followed(two_rooms: Place, room) -> None:
    localizer = localizer_of(two_rooms)
    hints = [FAR @ room[9].T_map_camera]
    found = localizer.process(at(room[9], 0), hints).estimate
    assert localizer.submap == "own" and away_m(found, room[9].T_map_camera) < 0.03


def test_submaps_alike_beyond_those_tried_are_doubt_too(three_alike: Place, room) -> None:
    config, search = LocalizerConfig(device="cpu"), PlaceSearchSettings(submaps=1)
    lost = PlaceLocalizer(three_alike, config, search).process(at(room[9], 0)).estimate
    assert lost.T_map_camera is None and "more than 1 submaps look alike" in lost.reason


def test_an_image_of_elsewhere_is_in_no_submap(two_rooms: Place, room) -> None:
    noise = np.random.default_rng(0).integers(0, 255, room[0].image.shape).astype(np.uint8)
    estimate = localizer_of(two_rooms).process(replace(room[0], image=noise)).estimate
    assert estimate.state is TrackingState.INITIALIZING and "no view of the place" in estimate.reason


@pytest.mark.parametrize("tracking", [False, True])
def test_the_pose_goes_on_into_the_next_submap(make: Make, room, tracking: bool) -> None:
    place = make({}, first=[room[k] for k in range(0, 14, 2)], second=[room[k] for k in range(13, 30, 2)])
    settings = GuideSettings(own_reach_m=0.02, pause_frames=1)
    localizer = localizer_of(place, settings, tracking=tracking)
    visited = []
    for number, k in enumerate(range(6, 22)):
        estimate = localizer.process(at(room[k], number)).estimate
        assert estimate.state is TrackingState.TRACKING and away_m(estimate, room[k].T_map_camera) < 0.03
        visited.append(localizer.submap)
    assert visited[0] == "first" and visited[-1] == "second"
    assert sum(a != b for a, b in itertools.pairwise(visited)) == 1
    assert localizer.guide.cache.counts.waits == 2  # for the search; a neighbour comes ahead


def test_where_the_present_submap_gives_no_pose_a_neighbour_takes_over(make: Make, room, other_room) -> None:
    """The room is painted anew between two frames; both states of it are mapped."""
    place = make({}, before=[room[k] for k in range(0, 16, 2)], after=[other_room[k] for k in range(0, 16, 2)])
    localizer = localizer_of(place, GuideSettings(pause_frames=1))
    for k in range(5, 11):
        frame = room[k] if k < 8 else other_room[k]
        estimate = localizer.process(at(frame, k)).estimate
        assert estimate.state is TrackingState.TRACKING and away_m(estimate, frame.T_map_camera) < 0.03
        assert localizer.submap == ("before" if k < 8 else "after")


def test_after_a_sudden_turn_the_present_submap_alone_is_searched(three_alike: Place, room) -> None:
    """Its twin looks the same, but the camera cannot be there."""
    localizer = localizer_of(three_alike, carry_s=0.0)  # the session's points would know it at once
    hints = [room[9].T_map_camera]
    localizer.process(at(room[9], 0), hints)
    turned = room.view(room[9].T_map_camera @ make_pose(so3_exp([0.0, 0.33, 0.0]), np.zeros(3)))
    estimate = localizer.process(at(turned, 1)).estimate
    assert "relocalize" in estimate.timings_ms and localizer.submap == "own"
    assert estimate.state is TrackingState.TRACKING and away_m(estimate, turned.T_map_camera) < 0.05


def test_between_places_alike_it_decides_where_the_camera_can_have_come(three_alike: Place, room) -> None:
    """The twin is 30 m away: out of reach after half a second, within reach after twenty."""
    localizer = localizer_of(three_alike, max_gap_s=0.25)
    hints = [room[9].T_map_camera]
    for k in (9, 10):
        assert away_m(localizer.process(at(room[k], k), hints).estimate, room[k].T_map_camera) < 0.03
        hints = []
    assert away_m(localizer.process(at(room[14], 15)).estimate, room[14].T_map_camera) < 0.03
    assert localizer.submap == "own"
    late = localizer.process(at(room[14], 215)).estimate
    assert late.T_map_camera is None and "look alike" in late.reason


def test_carried_elsewhere_a_pose_is_claimed_only_after_a_search(two_rooms: Place, room, other_room) -> None:
    localizer = localizer_of(two_rooms, max_gap_s=0.25)
    for k in range(3):
        localizer.process(at(room[k], k))
    states = []
    for k in range(3, 9):
        estimate = localizer.process(at(other_room[k], k)).estimate
        states.append(estimate.state)
        if estimate.T_map_camera is not None:
            assert away_m(estimate, FAR @ other_room[k].T_map_camera) < 0.03
    assert states[0] is TrackingState.LOST and states[-1] is TrackingState.TRACKING and localizer.submap == "other"


def test_no_more_submaps_are_in_memory_than_allowed(
    three_alike: Place, room, other_room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submap is in memory as long as one of its tensors is."""
    loaded: list[list[weakref.ref[torch.Tensor]]] = []
    load = Place.load_submap

    def noted(place: Place, number: int) -> SceneMap:
        submap = load(place, number)
        loaded.append([weakref.ref(view.coarse) for view in submap.references.views])
        return submap

    monkeypatch.setattr(Place, "load_submap", noted)
    localizer = localizer_of(three_alike, loaded_submaps=2)
    for number, frame in enumerate((room[9], other_room[9], room[20])):
        localizer.reset("a test")
        localizer.process(at(frame, number))
        gc.collect()
        assert 1 <= sum(any(tensor() is not None for tensor in submap) for submap in loaded) <= 2
    assert len(loaded) > 2 and localizer.guide.cache.counts.evictions > 0


def test_without_the_search_a_hint_is_needed(two_rooms: Place, room) -> None:
    localizer = localizer_of(two_rooms, relocalize=False)
    assert "relocalize" in localizer.process(at(room[9], 0)).estimate.reason
    hints = [room[9].T_map_camera]
    assert away_m(localizer.process(at(room[9], 1), hints).estimate, room[9].T_map_camera) < 0.03


class Listed(FrameSource):
    """Some frames as a source."""

    name = "listed"

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames = frames

    @property
    def camera(self):
        return self._frames[0].camera

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, position: int) -> Frame:
        return self._frames[position]

    def indices(self) -> Sequence[int]:
        return range(len(self._frames))


def test_a_source_is_localized_in_a_place_as_in_a_map(two_rooms: Place, room) -> None:
    records = list(
        localize_source(localizer_for(two_rooms, LocalizerConfig(device="cpu")), Listed([room[9], room[10]]))
    )
    assert [record.state for record in records] == ["TRACKING", "TRACKING"]
    assert isinstance(localizer_for(two_rooms.load_submap(0)), Localizer)


def test_a_place_moves_with_its_folder(two_rooms: Place, tmp_path: Path, room) -> None:
    import shutil

    moved = Place.load(shutil.copytree(two_rooms.path, tmp_path / "elsewhere"))
    assert localizer_of(moved).process(at(room[9], 0)).estimate.state is TrackingState.TRACKING


def test_two_rooms_alike_are_told_apart_by_the_images_after_the_first_look(make: Make, room, other_room) -> None:
    """The first look is in the wrong one of two rooms that share two thirds of their pictures."""
    half = copy.copy(room)
    half._textures = [texture.copy() for texture in room._textures]
    for texture in half._textures:
        part = slice(texture.shape[0] // 3, 2 * texture.shape[0] // 3)
        texture[part] = texture[part, ::-1]
    views = range(0, 32, 4)
    place = make({"twin": FAR}, own=[room[k] for k in views], twin=[half[k] for k in views])
    localizer = localizer_of(place)
    first = localizer.process(at(room[2], 0), [room[2].T_map_camera]).estimate
    assert localizer.submap == "own" and first.T_map_camera is not None and first.alignment is not None
    twin = replace(first.alignment, T_map_camera=FAR @ first.T_map_camera)
    localizer.guide.rivals.begin(first.T_map_camera, [(place.index.submap.max(), twin)])
    estimates = [localizer.process(at(half[k], number)).estimate for number, k in enumerate(range(3, 30), start=1)]
    assert localizer.submap == "twin"
    assert estimates[-1].state is TrackingState.TRACKING
    assert away_m(estimates[-1], FAR @ half[29].T_map_camera) < 0.05
    told = [e for e in estimates if "fit 'twin' better than 'own'" in e.reason]
    assert told and all(e.state is TrackingState.DEGRADED for e in told)


def test_after_a_lift_the_other_floor_is_found(make: Make, room, other_room) -> None:
    """Two storeys, one above the other: rooms of the same ground plan. In the lift the camera sees a door."""
    up = make_pose(np.eye(3), [0.0, 0.0, 3.1])
    floors = {name: [source[k] for k in range(0, 32, 4)] for name, source in (("low", room), ("high", other_room))}
    localizer = localizer_of(make({"high": up}, **floors))
    below = localizer.process(at(room[9], 0)).estimate
    assert localizer.submap == "low" and away_m(below, room[9].T_map_camera) < 0.03
    for number in range(1, 4):
        door = replace(room[9], image=np.full_like(room[9].image, 40 + number))
        estimate = localizer.process(at(door, number)).estimate
        assert estimate.T_map_camera is None or estimate.bridged
    above = [localizer.process(at(other_room[k], 40 + k)).estimate for k in (9, 10)]
    assert localizer.submap == "high" and away_m(above[-1], up @ other_room[10].T_map_camera) < 0.03
