# SPDX-License-Identifier: Apache-2.0
"""Recordings of the demo as sources of frames: one to map the room, one to localize in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.simulation.conditions import LIGHTS, Conditions, People, changed_room
from kfloc_ros.simulation.render import DirtyLens, Illumination, Renderer, Sensor, SensorModel
from kfloc_ros.simulation.scene import TEXELS_PER_M, Scene, build_room
from kfloc_ros.simulation.trajectory import Pace, Route, Trajectory, orbit
from kfloc_ros.types import Frame, Matrix

CAMERA = Camera(640, 480, 525.0, 525.0, 319.5, 239.5)

DAY = LIGHTS["day"]
DUSK = Illumination(
    west_lamp=(0.54, 0.49, 0.41), east_lamp=(0.54, 0.49, 0.41), window=(0.15, 0.18, 0.26), ambient=(0.36, 0.35, 0.34)
)
_DUSK_ONE_LAMP = replace(DUSK, west_lamp=(0.04, 0.04, 0.03), ambient=(0.25, 0.25, 0.25))
_SWITCH_SHARE, _SWITCH_S = 0.45, 0.25
IDENTITY: Matrix = np.eye(4)
AS_RECORDED = Conditions()


@dataclass(frozen=True)
class Recording:
    """Definition of a recording."""

    route: Callable[[int], Route]
    pace: Pace
    rate_hz: float
    start_ns: int
    light: Callable[[float, float], Illumination]
    """Illumination as a function of the time in seconds and the recording's duration."""
    shake: int = 0
    """Added to the seed of the walk to give the seed of the camera shake."""


def map_route(seed: int) -> Route:
    """Return the route for mapping: twice around the room, wide and narrow."""
    first = np.arange(-30, 340, 30.0)
    second = np.arange(360, 690, 30.0)
    wave = np.arange(len(first) + len(second))
    return orbit(
        [*first, *second],
        [1.0] * len(first) + [0.45] * len(second),
        1.48 + 0.16 * np.sin(1.3 * wave),
        1.05 + 0.35 * np.sin(1.9 * wave + 0.5),
        seed,
    )


def _short_map_route(seed: int) -> Route:
    first, second = np.arange(-15, 165, 30.0), np.arange(150, -30, -30.0)
    wave = np.arange(len(first) + len(second))
    return orbit(
        [*first, *second],
        [1.0] * len(first) + [0.5] * len(second),
        1.48 + 0.14 * np.sin(1.3 * wave),
        1.05 + 0.3 * np.sin(1.9 * wave + 0.5),
        seed,
    )


def localize_route(seed: int) -> Route:
    """Return the route for localization: once around the room, in the other direction."""
    headings = np.arange(330, -20, -30.0)
    wave = np.arange(len(headings))
    heights, aims = 1.36 + 0.1 * np.sin(1.7 * wave), 1.05 + 0.25 * np.sin(2.3 * wave)
    return orbit(headings, [0.72] * len(headings), heights, aims, seed + 100)


def _short_localize_route(seed: int) -> Route:
    headings = np.arange(135, -1, -27.0)
    wave = np.arange(len(headings))
    heights, aims = 1.38 + 0.08 * np.sin(1.7 * wave), 1.05 + 0.2 * np.sin(2.3 * wave)
    return orbit(headings, [0.72] * len(headings), heights, aims, seed + 100)


def _daylight(time_s: float, duration_s: float) -> Illumination:
    del time_s, duration_s
    return DAY


def _lamp_goes_out(time_s: float, duration_s: float) -> Illumination:
    """Return dusk; shortly before half-time the west lamp is switched off."""
    share = float(np.clip((time_s - _SWITCH_SHARE * duration_s) / _SWITCH_S, 0, 1))
    return blend(DUSK, _DUSK_ONE_LAMP, share)


def blend(first: Illumination, second: Illumination, share: float) -> Illumination:
    """Return a blend of two illuminations; share 0 is the first."""
    mixed = (1 - share) * first.matrix().T + share * second.matrix().T
    west, east, window, ambient = ((float(r), float(g), float(b)) for r, g, b in mixed)
    return Illumination(west, east, window, ambient)


RECORDINGS = {
    "map": Recording(map_route, Pace(), 10.0, 1_000_000_000_000, _daylight, 3),
    "localize": Recording(localize_route, Pace(0.4, 32.0), 15.0, 2_000_000_000_000, _lamp_goes_out, 8),
    "map-quick": Recording(_short_map_route, Pace(), 10.0, 1_000_000_000_000, _daylight, 3),
    "localize-quick": Recording(_short_localize_route, Pace(0.4, 30.0), 15.0, 2_000_000_000_000, _lamp_goes_out, 8),
}


class RecordedSource(FrameSource):
    """Recording in a simulated scene; frames are rendered on access, and are equal for equal seeds.

    The pose and stamp of a frame are those of the middle of its exposure.

    Args:
        name: name for reports.
        recording: definition of the recording.
        scene: returns the scene; called with the first frame, so that opening a source takes no time.
        walk_seed: seed of the route and the shake.
        noise_seed: seed of the sensor noise.
        camera: pinhole camera.
        T_scene_route: pose of the route's frame in the scene, (4, 4).
        conditions: light, people, lens and exposure; changed content is the scene's.
    """

    def __init__(
        self,
        name: str,
        recording: Recording,
        scene: Callable[[], Scene],
        *,
        walk_seed: int,
        noise_seed: tuple[int, int],
        camera: Camera = CAMERA,
        T_scene_route: Matrix = IDENTITY,
        conditions: Conditions = AS_RECORDED,
    ) -> None:
        self.name = name
        self._conditions = conditions
        self._recording, self._scene, self._camera = recording, scene, camera
        self._noise_seed, self._T = noise_seed, T_scene_route
        # Every recording has its own shake, even if two have the same route.
        self.trajectory = Trajectory(recording.route(walk_seed), recording.pace, walk_seed + recording.shake)
        self._count = int(self.trajectory.duration_s * recording.rate_hz)
        self._sensors: dict[SensorModel, Sensor] = {}

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return self._count

    def indices(self) -> Sequence[int]:
        return range(self._count)

    def pose(self, position: int) -> Matrix:
        return self._pose_at(range(self._count)[position] / self._recording.rate_hz)

    def stamp_ns(self, position: int) -> int:
        return self._recording.start_ns + round(range(self._count)[position] / self._recording.rate_hz * 1e9)

    def __getitem__(self, position: int) -> Frame:
        index = range(self._count)[position]
        time_s = index / self._recording.rate_hz
        sensor = self._sensor_at(time_s)
        half_s = sensor.model.exposure_s / 2
        T_start, T_middle, T_end = (self._pose_at(time_s + dt) for dt in (-half_s, 0.0, half_s))
        light = LIGHTS.get(self._conditions.light) or self._recording.light(time_s, self.trajectory.duration_s)
        rendering = self._renderer.render(T_middle, light)
        if self._conditions.people:
            rendering = self._people.draw(rendering, T_middle, time_s, light)
        rng = np.random.default_rng((*self._noise_seed, index))
        image = sensor.expose(rendering, T_start, T_middle, T_end, rng)
        return Frame(
            image=self._lens.over(image) if self._conditions.dirt else image,
            camera=self._camera,
            stamp_ns=self.stamp_ns(index),
            index=index,
            name=f"{self.name}/{index:06d}",
            depth_m=rendering.depth_m,
            T_map_camera=T_middle,
        )

    def _pose_at(self, time_s: float) -> Matrix:
        return self._T @ self.trajectory.pose(time_s)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self._scene(), self._camera)

    def _sensor_at(self, time_s: float) -> Sensor:
        model = self._conditions.sensor_at(time_s)
        if model not in self._sensors:
            self._sensors[model] = Sensor(self._camera, model)
        return self._sensors[model]

    @cached_property
    def _people(self) -> People:
        return People(self._conditions.people, self._camera, self._conditions.change)

    @cached_property
    def _lens(self) -> DirtyLens:
        return DirtyLens(self._conditions.dirt, self._camera, self._conditions.change)


class SimulatedSource(RecordedSource):
    """Recording of the demo's room.

    Args:
        which: ``map`` or ``localize``.
        quick: a part of the room only, for a faster demo.
        seed: seed of pictures, routes, shake and noise. Both recordings need the same seed to show the same room.
        camera: pinhole camera.
        texels_per_m: resolution of the room's pictures.
        conditions: what is different from the recording as it is.

    Raises:
        SourceError: the recording is unknown.
    """

    def __init__(
        self,
        which: str,
        quick: bool = False,
        seed: int = 0,
        *,
        camera: Camera = CAMERA,
        texels_per_m: float = TEXELS_PER_M,
        conditions: Conditions = AS_RECORDED,
    ) -> None:
        name = f"{which}-quick" if quick else which
        if name not in RECORDINGS:
            raise SourceError(f"There is no simulated recording '{name}'; there are: {', '.join(RECORDINGS)}.")
        recording = RECORDINGS[name]
        super().__init__(
            name,
            recording,
            lambda: _room(seed, texels_per_m, conditions),
            walk_seed=seed,
            noise_seed=(seed, recording.start_ns),
            camera=camera,
            conditions=conditions,
        )

    @classmethod
    def from_name(cls, name: str) -> SimulatedSource:
        """Return the recording of a SOURCE such as ``sim:map-quick?light=night``, given without its ``sim:``.

        Raises:
            SourceError: the recording is unknown, or an option cannot be used.
        """
        name, _, words = name.partition("?")
        which, dash, rest = name.partition("-")
        if name not in RECORDINGS:
            raise SourceError(f"There is no simulated recording '{name}'; there are: {', '.join(RECORDINGS)}.")
        return cls(which, quick=bool(dash and rest), conditions=Conditions.parse(words))


def _room(seed: int, texels_per_m: float, conditions: Conditions) -> Scene:
    if not (conditions.moved or conditions.exchanged):
        return build_room(seed, texels_per_m)
    return changed_room(seed, texels_per_m, conditions.moved, conditions.exchanged, conditions.change)
