# SPDX-License-Identifier: Apache-2.0
"""Conditions of a visit to the demo's room: light, changed content, people, dirt on the lens, exposure steps.

A SOURCE names them after its recording, such as ``sim:localize?light=evening&moved=0.3&people=2``. Without options a
recording stays as it is, to the bit. Equal options and seeds give equal images; a larger share changes what a smaller
one changes, and more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, so3_exp
from kfloc_ros.simulation.faces import Face, box, prism
from kfloc_ros.simulation.render import Illumination, Renderer, Rendering, SensorModel
from kfloc_ros.simulation.room import HALF_X_M, HALF_Y_M, room
from kfloc_ros.simulation.scene import Scene, scene_of
from kfloc_ros.simulation.textures import Painter, Picture, cloth, plain

LIGHTS: Mapping[str, Illumination] = {
    "day": Illumination(
        west_lamp=(0.50, 0.47, 0.42), east_lamp=(0.50, 0.47, 0.42), window=(0.34, 0.38, 0.46),
        ambient=(0.44, 0.44, 0.43),
    ),
    "evening": Illumination(
        west_lamp=(0.56, 0.47, 0.34), east_lamp=(0.56, 0.47, 0.34), window=(0.03, 0.04, 0.07),
        ambient=(0.30, 0.27, 0.23),
    ),
    "night": Illumination(
        west_lamp=(0.30, 0.24, 0.15), east_lamp=(0.0, 0.0, 0.0), window=(0.002, 0.003, 0.006),
        ambient=(0.05, 0.045, 0.035),
    ),
}  # fmt: skip
"""Light by name. Day has the lamps on and the sun in the window, evening the lamps alone, night one dim lamp."""
NIGHT_SENSOR = SensorModel(exposure_s=0.025, shot_noise=0.0028, read_noise=0.012)
"""Sensor at night: a longer exposure, and noise that is amplified with the image."""
PRINTS = ("poster", "page", "screen", "package", "books")
"""Painters whose pictures can be exchanged."""
FURNITURE = (
    ("desk chair", (1.25, -1.75, 0.0), (1.95, -0.95, 1.0)),
    ("north chair", (-0.2, 0.33, 0.0), (0.4, 0.95, 1.0)),
    ("south chair", (-0.2, -1.05, 0.0), (0.45, -0.45, 1.0)),
    ("table", (-0.6, -0.62, 0.02), (0.8, 0.62, 1.1)),
    ("rug", (-1.1, -0.95, 0.003), (1.3, 0.85, 0.019)),
    ("sofa", (-1.6, -2.0, 0.05), (0.78, -1.2, 0.95)),
    ("boxes", (0.75, -2.0, 0.02), (1.4, -1.3, 0.9)),
    ("desk", (1.8, -1.95, 0.02), (2.41, -0.55, 1.35)),
    ("shelf", (-2.0, 1.62, 0.05), (-0.7, 1.99, 2.3)),
    ("sideboard", (-0.25, 1.5, 0.05), (1.4, 1.99, 1.2)),
)
"""Pieces of furniture with what stands on them: name, and corners of a box around the centres of its faces. A face
belongs to the first box that contains it."""
AGAINST_A_WALL = {"sofa": 0, "shelf": 0, "sideboard": 0, "desk": 1}
"""Axis along which a piece is moved; the others are moved in any direction, and turned."""
LOW_MOVE_M, HIGH_MOVE_M, MAX_TURN_DEG = 0.25, 0.6, 35.0
TRIES = 40
SWITCH_S = 1.5
"""Time between two exposure steps."""
WALK_M_PER_S, LEG_SWING_M = 0.7, 0.16
NEAREST_PERSON_M = 0.7
"""Distance of a person's axis from the camera below which it steps aside."""
MAX_PEOPLE = 6

OPTIONS = {
    "light": f"{', '.join(LIGHTS)}; without it the recording's own, in which a lamp goes out",
    "moved": "share of the pieces of furniture that stand elsewhere, 0 to 1",
    "exchanged": "share of posters, screens, books, packages and furniture that are others, 0 to 1",
    "people": f"number of people who walk around, 0 to {MAX_PEOPLE}",
    "dirt": "dirt on the lens, 0 to 1",
    "exposure": f"steps of the exposure every {SWITCH_S} s, in stops, 0 to 4",
    "change": "seed of what is moved, exchanged, and of the dirt; default 1",
}
"""Options of a simulated SOURCE."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of a recording; the default is the recording as it is."""

    light: str = ""
    moved: float = 0.0
    exchanged: float = 0.0
    people: int = 0
    dirt: float = 0.0
    exposure: float = 0.0
    change: int = 1

    @classmethod
    def parse(cls, words: str) -> Conditions:
        """Return the conditions in words such as ``light=evening&moved=0.3``.

        Raises:
            SourceError: an option is unknown, given twice, or its value cannot be used.
        """
        found: dict[str, str] = {}
        for text in filter(None, words.split("&")):
            name, equals, value = text.partition("=")
            if name not in OPTIONS or not equals:
                raise SourceError(f"A simulated source has no option '{text}'; it has {', '.join(OPTIONS)}.")
            if name in found:
                raise SourceError(f"The option '{name}' of the simulated source is given twice.")
            found[name] = value
        light = found.get("light", "")
        if light and light not in LIGHTS:
            raise _refusal("light", light)
        return cls(
            light=light,
            moved=_number(found, "moved", 1.0),
            exchanged=_number(found, "exchanged", 1.0),
            people=int(_number(found, "people", MAX_PEOPLE, whole=True)),
            dirt=_number(found, "dirt", 1.0),
            exposure=_number(found, "exposure", 4.0),
            change=int(_number(found, "change", 2**31, 1.0, whole=True)),
        )

    @property
    def sensor(self) -> SensorModel:
        """Properties of the camera in this light."""
        return NIGHT_SENSOR if self.light == "night" else SensorModel()

    def sensor_at(self, time_s: float) -> SensorModel:
        """Return the sensor's properties at a time, with the exposure step of that time."""
        step = (0.0, 1.0, 0.0, -1.0)[int(time_s / SWITCH_S) % 4] * self.exposure
        return (
            replace(self.sensor, target_brightness=self.sensor.target_brightness * 2.0**step) if step else self.sensor
        )


def _number(found: Mapping[str, str], name: str, most: float, usual: float = 0.0, *, whole: bool = False) -> float:
    try:
        value = float(found.get(name, usual))
    except ValueError:
        raise _refusal(name, found[name]) from None
    if not 0.0 <= value <= most or (whole and not value.is_integer()):
        raise _refusal(name, found[name])
    return value


def _refusal(name: str, value: str) -> SourceError:
    return SourceError(f"The option {name}={value!r} of the simulated source cannot be used. It is: {OPTIONS[name]}.")


def changed_faces(faces: Sequence[Face], share: float, seed: int) -> list[Face]:
    """Return the faces of the room with a share of its furniture elsewhere; the order stays.

    A moved piece keeps clear of other furniture and of the walls where there is room for it.
    """
    piece_of = np.array([_piece(face) for face in faces])
    rng = np.random.default_rng((seed, 71))
    order = rng.permutation(len(FURNITURE))
    made = list(faces)
    extents = {k: _extent([f for f, p in zip(faces, piece_of, strict=True) if p == k]) for k in range(len(FURNITURE))}
    for k in order[: round(share * len(FURNITURE))].tolist():
        others = [extent for j, extent in extents.items() if j != k and FURNITURE[j][0] != "rug"]
        T = _motion(extents[k], others if FURNITURE[k][0] != "rug" else [], FURNITURE[k][0], rng)
        for i in np.flatnonzero(piece_of == k).tolist():
            made[i] = _moved(made[i], T)
        extents[k] = _extent([made[i] for i in np.flatnonzero(piece_of == k)])
    return made


def _piece(face: Face) -> int:
    """Return the piece of furniture of a face, -1 for none."""
    centre = face.corner + (face.right + face.down) / 2
    for k, (_, low, high) in enumerate(FURNITURE):
        if (centre > np.array(low)).all() and (centre < np.array(high)).all():
            return k
    return -1


def _extent(faces: Sequence[Face]) -> NDArray[np.float64]:
    """Return (2, 2): smallest and largest x and y."""
    corners = np.concatenate([face.triangles().reshape(-1, 3)[:, :2] for face in faces])
    return np.stack([corners.min(axis=0), corners.max(axis=0)])


def _motion(
    extent: NDArray[np.float64], others: Sequence[NDArray[np.float64]], name: str, rng: np.random.Generator
) -> Matrix:
    """Return a motion (4, 4) of a piece of furniture inside the room; the last one if none is free of collisions."""
    centre = np.append(extent.mean(axis=0), 0.0)
    found = np.eye(4)
    reach = np.array([HALF_X_M, HALF_Y_M])
    lowest, highest = np.minimum(extent[0], -reach), np.maximum(extent[1], reach)  # some touch their wall
    for _ in range(TRIES):
        step = np.zeros(3)
        if name in AGAINST_A_WALL:
            step[AGAINST_A_WALL[name]] = rng.choice((-1.0, 1.0)) * rng.uniform(LOW_MOVE_M, HIGH_MOVE_M)
            turn = 0.0
        else:
            angle = rng.uniform(0, 2 * np.pi)
            step[:2] = rng.uniform(LOW_MOVE_M, HIGH_MOVE_M) * np.array([np.cos(angle), np.sin(angle)])
            turn = np.radians(rng.uniform(-MAX_TURN_DEG, MAX_TURN_DEG))
        R = so3_exp(np.array([0.0, 0.0, turn]))
        T = make_pose(R, centre + step - R @ centre)
        half = np.abs(R[:2, :2]) @ (extent[1] - extent[0]) / 2
        low, high = centre[:2] + step[:2] - half, centre[:2] + step[:2] + half
        if (low >= lowest - 1e-9).all() and (high <= highest + 1e-9).all():
            found = T
            if not any((low < o[1]).all() and (high > o[0]).all() for o in others):
                break
    return found


def _moved(face: Face, T: Matrix) -> Face:
    R = T[:3, :3]
    return replace(face, corner=R @ face.corner + T[:3, 3], right=R @ face.right, down=R @ face.down)


def exchanged_faces(faces: Sequence[Face], share: float, seed: int) -> set[int]:
    """Return the indices of a share of the prints, whose pictures are others."""
    prints = [i for i, face in enumerate(faces) if _painter(face) in PRINTS]
    order = np.random.default_rng((seed, 72)).permutation(len(prints))
    return {prints[k] for k in order[: round(share * len(prints))]}


def _covered(faces: Sequence[Face], share: float, seed: int) -> tuple[list[Face], set[int]]:
    """Return the faces with a share of the furniture in other colours, and the indices of that furniture's faces."""
    rng = np.random.default_rng((seed, 75))
    order = rng.permutation(len(FURNITURE))
    channels = [rng.permutation(3) for _ in FURNITURE]
    gains = rng.uniform(0.6, 1.3, len(FURNITURE))
    pieces = set(order[: round(share * len(FURNITURE))].tolist())
    made, covered = list(faces), set()
    for i, face in enumerate(faces):
        k = _piece(face)
        if k in pieces and _painter(face) not in PRINTS:
            made[i] = replace(face, painter=_recoloured(face.painter, channels[k], float(gains[k])))
            covered.add(i)
    return made, covered


def _recoloured(painter: Painter, channels: NDArray[np.int64], gain: float) -> Painter:
    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = gain * painter(rng, width, height, texels_per_m)[..., channels]
        return np.asarray(np.clip(picture, 0, 255), np.uint8)

    return paint


def _painter(face: Face) -> str:
    """Return the name of the function that made a face's painter."""
    return str(getattr(face.painter, "__qualname__", "")).partition(".")[0]


@lru_cache(maxsize=2)
def changed_room(seed: int, texels_per_m: float, moved: float, exchanged: float, change: int) -> Scene:
    """Return the demo's room with changed content.

    Args:
        seed: seed of the room.
        texels_per_m: resolution of the pictures.
        moved: share of the furniture that stands elsewhere.
        exchanged: share of the prints that are others.
        change: seed of the changes.

    Raises:
        SourceError: no ray caster is installed.
    """
    prints = exchanged_faces(room(), exchanged, change)
    faces, covered = _covered(room(), exchanged, change)
    faces = changed_faces(faces, moved, change)
    return scene_of(faces, seed, texels_per_m, dict.fromkeys(prints | covered, 1000 + change))


class People:
    """People who walk around in the room, drawn into renderings.

    Args:
        count: number of people.
        camera: pinhole camera.
        seed: seed of their clothes.
    """

    def __init__(self, count: int, camera: Camera, seed: int) -> None:
        self._count = count
        self._renderers = [
            [Renderer(_person(np.random.default_rng((seed, 73, k)), swing), camera) for swing in (-1.0, 0.0, 1.0)]
            for k in range(count)
        ]

    def draw(self, rendering: Rendering, T_map_camera: Matrix, time_s: float, light: Illumination) -> Rendering:
        """Return a rendering with the people in front of what they hide."""
        radiance, depth_m = rendering.radiance.copy(), rendering.depth_m.copy()
        for number, poses in enumerate(self._renderers):
            T_map_person = _walk(time_s, number, self._count)
            if np.linalg.norm(T_map_person[:2, 3] - T_map_camera[:2, 3]) < NEAREST_PERSON_M:
                continue
            swing = poses[(0, 1, 2, 1)[int(time_s / 0.25 + number) % 4]]
            T_person_camera = inverse_pose(T_map_person) @ T_map_camera
            one = swing.render(T_person_camera, light)
            front = swing.hits(T_person_camera) & (one.depth_m < depth_m)
            radiance[front], depth_m[front] = one.radiance[front], one.depth_m[front]
        return Rendering(radiance, depth_m)


def _walk(time_s: float, number: int, count: int) -> Matrix:
    """Return a person's pose (4, 4) on the floor; people walk around the table, every other one the other way."""
    ahead = 1.0 if number % 2 == 0 else -1.0
    radii = np.array([1.55, 1.1]) * (1.0 - 0.12 * (number % 3))
    angle = ahead * WALK_M_PER_S * time_s / radii.mean() + 2 * np.pi * number / count + 0.7
    place = radii * np.array([np.cos(angle), np.sin(angle)])
    heading = np.arctan2(ahead * radii[1] * np.cos(angle), -ahead * radii[0] * np.sin(angle))
    return make_pose(so3_exp(np.array([0.0, 0.0, heading])), np.array([place[0], place[1], 0.0]))


def _person(rng: np.random.Generator, swing: float) -> Scene:
    """Return a person, x ahead; the light is that in the middle of the room."""
    shirt, trousers, skin, hair = (
        (int(red), int(green), int(blue))
        for red, green, blue in (
            rng.integers(low, high, 3) for low, high in ((40, 220), (20, 110), (150, 220), (20, 90))
        )
    )
    reach = LEG_SWING_M * swing
    faces = [
        *box((reach, 0.1, 0.43), (0.16, 0.14, 0.86), cloth(trousers)),
        *box((-reach, -0.1, 0.43), (0.16, 0.14, 0.86), cloth(trousers)),
        *box((0.0, 0.0, 1.14), (0.22, 0.42, 0.58), cloth(shirt, fold_m=0.08)),
        *box((-reach, 0.26, 1.1), (0.1, 0.09, 0.62), cloth(shirt)),
        *box((reach, -0.26, 1.1), (0.1, 0.09, 0.62), cloth(shirt)),
        *prism((0.0, 0.0, 1.43), 0.1, 0.27, plain(skin, 0.05), plain(hair, 0.05), corners=10),
    ]
    return scene_of(faces, int(rng.integers(2**31)), 120.0)
