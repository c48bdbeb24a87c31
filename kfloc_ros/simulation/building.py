# SPDX-License-Identifier: Apache-2.0
"""A building of ten rooms that are alike: the demo's room ten times, but for five posters, in one frame."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.simulation.scene import TEXELS_PER_M
from kfloc_ros.simulation.source import CAMERA, DAY, DUSK, Recording, SimulatedSource, blend, localize_route, map_route
from kfloc_ros.simulation.trajectory import Pace
from kfloc_ros.types import Frame, Matrix

ROOMS = 10
ROOMS_IN_A_ROW = 5
PITCH_X_M, PITCH_Y_M = 5.3, 4.3
"""From the middle of a room to that of the next, over a wall."""

_EVENING = blend(DAY, DUSK, 0.5)
_RECORDINGS = {
    "map": Recording(map_route, Pace(), 1.5, 3_000_000_000_000, lambda time_s, duration_s: DAY),
    "localize": Recording(
        localize_route, Pace(0.4, 32.0), 15.0, 4_000_000_000_000, lambda time_s, duration_s: _EVENING
    ),
}


def T_building_room(room: int) -> Matrix:
    """Where the frame of a room (see ``room.py``), numbered from 1, lies in the building's."""
    across, along = (room - 1) % ROOMS_IN_A_ROW, (room - 1) // ROOMS_IN_A_ROW
    return make_pose(np.eye(3), [PITCH_X_M * across, PITCH_Y_M * along, 0.0])


class BuildingSource(FrameSource):
    """One recording in one of the rooms: some 50 views to map it, or a walk in another light; poses in the building.

    Args:
        room: 1 to :data:`ROOMS`.
        which: ``map`` or ``localize``.
        camera: a pinhole.
        texels_per_m: resolution of the room's pictures.

    Raises:
        SourceError: there is no such room or recording.
    """

    def __init__(
        self, room: int, which: str = "map", *, camera: Camera = CAMERA, texels_per_m: float = TEXELS_PER_M
    ) -> None:
        if not 1 <= room <= ROOMS or which not in _RECORDINGS:
            raise SourceError(
                f"There is no recording '{which}' of room {room}; the simulated building has rooms 1 to {ROOMS}, and "
                "of each sim:building-K to map it and sim:building-K-localize."
            )
        self.name = f"building-{room}" + ("" if which == "map" else f"-{which}")
        self._T = T_building_room(room)
        self._source = SimulatedSource(
            which, camera=camera, texels_per_m=texels_per_m, room=room, recording=_RECORDINGS[which]
        )

    @classmethod
    def from_name(cls, name: str) -> BuildingSource:
        """The recording of a SOURCE such as ``sim:building-3-localize``, without its ``sim:``.

        Raises:
            SourceError: there is no such room or recording.
        """
        match = re.fullmatch(r"building-(\d{1,3})(?:-([a-z]+))?", name)
        if match is None:
            raise SourceError(
                f"There is no simulated recording '{name}'; those of the building are sim:building-K, K from 1 to "
                f"{ROOMS}, and sim:building-K-localize."
            )
        return cls(int(match[1]), match[2] or "map")

    @property
    def camera(self) -> Camera:
        return self._source.camera

    def __len__(self) -> int:
        return len(self._source)

    def indices(self) -> Sequence[int]:
        return self._source.indices()

    def __getitem__(self, position: int) -> Frame:
        frame = self._source[position]
        assert frame.T_map_camera is not None
        return replace(frame, name=f"{self.name}/{frame.index:06d}", T_map_camera=self._T @ frame.T_map_camera)
