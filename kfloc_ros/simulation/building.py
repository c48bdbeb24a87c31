# SPDX-License-Identifier: Apache-2.0
"""Building of ten similar rooms: the demo's room ten times, different only in five posters, in one frame.

There are two rows of five. In a row a doorway leads from each room into the next; all else is closed.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.simulation.room import HALF_X_M, MIDDLE_Y_M, WALL_M
from kfloc_ros.simulation.scene import TEXELS_PER_M, RoomInBuilding, Scene, build_rooms
from kfloc_ros.simulation.source import CAMERA, DAY, DUSK, RecordedSource, Recording, blend, localize_route, map_route
from kfloc_ros.simulation.trajectory import Pace, Route
from kfloc_ros.types import Matrix

ROOMS = 10
ROOMS_IN_A_ROW = 5
PITCH_X_M, PITCH_Y_M = 2 * HALF_X_M + WALL_M, 4.3
"""Distances between the middles of neighbouring rooms."""
RATE_HZ = 15.0
"""Frame rate of walks; mapping uses a lower one."""
_WALKS_PER_ROOM = 1000
_HELP = (
    f"those of the building are sim:building-K to map room K (1 to {ROOMS}), sim:building-K-localize, and "
    "sim:building-walk-K-L through the doors from room K to room L of the same row"
)

_EVENING = blend(DAY, DUSK, 0.5)
_HEIGHT_M, _AIM_M = 1.4, 1.2
_IN_THE_DOOR_M = HALF_X_M - 0.2
"""Distance from the middle of the room to a person who maps it from its doorway."""
_CROSSING = np.array([
    (-2.0, -1.6), (-1.4, -1.3), (-0.75, -0.98), (0.0, -0.92), (0.75, -0.98), (1.4, -1.3), (2.0, -1.6),
])  # fmt: skip
"""Path from the west doorway of a room to its east doorway, between sofa and table."""


def T_building_room(room: int) -> Matrix:
    """Return the pose of a room's frame (see ``room.py``), numbered from 1, in the building."""
    across, along = (room - 1) % ROOMS_IN_A_ROW, (room - 1) // ROOMS_IN_A_ROW
    return make_pose(np.eye(3), [PITCH_X_M * across, PITCH_Y_M * along, 0.0])


@lru_cache(maxsize=1)
def build_building(texels_per_m: float = TEXELS_PER_M) -> Scene:
    """Return all rooms, with open doors between them.

    Raises:
        SourceError: the ray caster is not installed.
    """
    rooms = []
    for number in range(1, ROOMS + 1):
        x, y, z = T_building_room(number)[:3, 3].tolist()
        place = (number - 1) % ROOMS_IN_A_ROW
        rooms.append(RoomInBuilding(number, (x, y, z), place + 1 < ROOMS_IN_A_ROW, place > 0))
    return build_rooms(rooms, 0, texels_per_m)


class BuildingSource(RecordedSource):
    """Recording in one of the rooms, for mapping or as a walk in another light; poses in the building's frame.

    Args:
        room: 1 to :data:`ROOMS`.
        which: ``map`` or ``localize``.
        camera: pinhole camera.
        texels_per_m: resolution of the room's pictures.

    Raises:
        SourceError: there is no such room or recording.
    """

    def __init__(
        self, room: int, which: str = "map", *, camera: Camera = CAMERA, texels_per_m: float = TEXELS_PER_M
    ) -> None:
        if not 1 <= room <= ROOMS or which not in _RECORDINGS:
            raise SourceError(f"There is no recording '{which}' of room {room} in the simulated building; {_HELP}.")
        recording = _RECORDINGS[which]
        super().__init__(
            f"building-{room}" + ("" if which == "map" else f"-{which}"),
            recording,
            lambda: build_building(texels_per_m),
            walk_seed=_WALKS_PER_ROOM * room,
            noise_seed=(0, recording.start_ns + room),
            camera=camera,
            T_scene_route=T_building_room(room),
        )


class WalkSource(RecordedSource):
    """Walk through the doors, from the middle of one room to that of another in the same row, in evening light.

    Args:
        start: first room.
        end: last room; if it has the smaller number, the walk leads west.
        camera: pinhole camera.
        texels_per_m: resolution of the rooms' pictures.

    Raises:
        SourceError: no doors connect the two rooms.
    """

    def __init__(self, start: int, end: int, *, camera: Camera = CAMERA, texels_per_m: float = TEXELS_PER_M) -> None:
        known = min(start, end) >= 1 and max(start, end) <= ROOMS and start != end
        if not known or (start - 1) // ROOMS_IN_A_ROW != (end - 1) // ROOMS_IN_A_ROW:
            raise SourceError(f"No doors lead from room {start} to room {end} of the simulated building; {_HELP}.")
        self.start, self.end = start, end
        recording = Recording(
            lambda seed: walk_route(start, end),
            Pace(0.5, 40.0),
            RATE_HZ,
            5_000_000_000_000,
            lambda t, whole: _EVENING,
            11,
        )
        super().__init__(
            f"building-walk-{start}-{end}",
            recording,
            lambda: build_building(texels_per_m),
            walk_seed=100 * start + end,
            noise_seed=(0, recording.start_ns + 100 * start + end),
            camera=camera,
        )


def building_source(name: str) -> RecordedSource:
    """Return the recording of a SOURCE such as ``sim:building-3-localize``, given without its ``sim:``.

    Raises:
        SourceError: there is no such room or recording.
    """
    if match := re.fullmatch(r"building-walk-(\d{1,3})-(\d{1,3})", name):
        return WalkSource(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"building-(\d{1,3})(?:-([a-z]+))?", name):
        return BuildingSource(int(match[1]), match[2] or "map")
    raise SourceError(f"There is no simulated recording '{name}'; {_HELP}.")


def _map_route(seed: int) -> Route:
    """Return a route that looks through the west doorway, goes around the room, and looks through the east doorway."""
    around = map_route(seed)
    out = [
        ((1.0, -1.0), (2.6, -1.5)), ((1.7, -1.45), (3.9, -1.6)), ((_IN_THE_DOOR_M, MIDDLE_Y_M), (4.4, -1.5)),
        ((_IN_THE_DOOR_M, MIDDLE_Y_M), (3.2, -0.4)), ((_IN_THE_DOOR_M, MIDDLE_Y_M + 0.02), (1.9, 0.6)),
        ((_IN_THE_DOOR_M, MIDDLE_Y_M), (0.6, -0.6)), ((1.8, -1.55), (-0.8, -1.1)), ((1.2, -1.1), (-1.6, -1.5)),
    ]  # fmt: skip
    flat = np.array(out)  # (n, 2, 2): positions and targets
    level = np.broadcast_to([[_HEIGHT_M], [_AIM_M]], (len(flat), 2, 1))
    east = np.concatenate([flat, level], axis=2)
    west = east * np.array([-1.0, 1.0, 1.0])
    return Route(
        np.concatenate([west[:, 0], around.positions, east[:, 0]]),
        np.concatenate([west[:, 1], around.targets, east[:, 1]]),
    )


def walk_route(start: int, end: int) -> Route:
    """Return knots in the building's frame: a look around, through the doors, and a look around in the last room."""
    east = end > start
    rooms = range(start, end + 1) if east else range(start, end - 1, -1)
    way = _CROSSING if east else _CROSSING[::-1]
    ahead = 1.0 if east else -1.0
    positions, targets = [], []
    for room in rooms:
        knots, looks = way, np.stack([way[:, 0] + 2.2 * ahead, 0.75 * way[:, 1] + 0.15], axis=1)
        looks[2:4] += (-0.7 * ahead, 0.9)  # into the room while crossing it
        if room == rooms[0]:
            knots = np.concatenate([[(-0.6 * ahead, -0.5), (-0.55 * ahead, -0.45), (-0.35 * ahead, -0.6)], way[3:]])
            looks = np.concatenate([[(-0.8, 1.9), (0.5, 1.9), (1.9 * ahead, 0.9)], looks[3:]])
        if room == rooms[-1]:
            knots = np.concatenate([knots[:4], [(0.3 * ahead, -0.6), (0.4 * ahead, -0.5)]])
            looks = np.concatenate([looks[:4], [(0.8 * ahead, 1.9), (-0.6, 1.9)]])
        origin = T_building_room(room)[:2, 3]
        positions.append(knots + origin)
        targets.append(looks + origin)
    flat, aims = np.concatenate(positions), np.concatenate(targets)
    wave = np.arange(len(flat))
    heights = _HEIGHT_M - 0.03 + 0.05 * np.sin(1.7 * wave)
    return Route(np.c_[flat, heights], np.c_[aims, _AIM_M + 0.15 * np.sin(2.3 * wave)])


_RECORDINGS = {
    "map": Recording(_map_route, Pace(0.55, 50.0), 1.3, 3_000_000_000_000, lambda time_s, duration_s: DAY, 3),
    "localize": Recording(
        localize_route, Pace(0.4, 32.0), RATE_HZ, 4_000_000_000_000, lambda time_s, duration_s: _EVENING, 8
    ),
}
