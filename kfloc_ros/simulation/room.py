# SPDX-License-Identifier: Apache-2.0
"""Room of the demo: 5 x 4 x 2.6 m, with a kitchen, a shelf, a desk, a sofa, a window and a blank wall.

Map frame: origin in the middle of the floor, x to the east, y to the north, z up. The space |x| < 1.6 m, |y| < 1.15 m,
z > 1.1 m, where the camera moves, is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kfloc_ros.simulation import prints
from kfloc_ros.simulation.faces import Face, box, face, prism
from kfloc_ros.simulation.textures import Painter, cardboard, cloth, glow, plain, plaster, rug, tiles, wood

HALF_X_M, HALF_Y_M, HEIGHT_M = 2.5, 2.0, 2.6

_OAK, _PINE, _WALNUT = (176, 130, 84), (206, 170, 120), (112, 76, 50)
_WHITE, _CREAM, _BLUE = (216, 214, 208), (208, 198, 176), (92, 116, 140)

_NORTH, _SOUTH, _EAST, _WEST = (0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0)

OWN_PICTURES = (0, 3, 4, 7, 8)
"""Indices in :func:`_pictures` of the five posters, on three walls, in which the rooms of a building differ."""
_PICTURES = 10


def room(doorways: bool = False) -> list[Face]:
    """Return every surface of the room, lamps and window included.

    Args:
        doorways: make a room of a building: with a doorway in the east and one in the west wall, each closed by a door
            (see :func:`door_faces`), and the desk moved out of the way.
    """
    desk = _desk()
    if doorways:
        aside = np.array([0.0, 0.66, 0.0])
        desk = [replace(item, corner=item.corner + aside) for item in desk]
    ways = passages(HALF_X_M, wood(_WALNUT, upright=True), wood(_OAK), prints.front((140, 104, 72))) if doorways else []
    return [
        *_shell(doorways), *lights(), *_window_side(), *_bookshelf(), *_sideboard(), *_kitchen(), *desk, *_sofa_side(),
        *_table(), *ways, *_pictures(doorways),
    ]  # fmt: skip


def door_faces(faces: Sequence[Face]) -> tuple[int, int]:
    """Return the indices of the two doors, east and west, in a :func:`room` with doorways."""
    return len(faces) - _PICTURES - 2, len(faces) - _PICTURES - 1


def own_faces(faces: Sequence[Face]) -> tuple[int, ...]:
    """Return the indices in a :func:`room` of the faces that differ between rooms; its pictures come last."""
    return tuple(len(faces) - _PICTURES + i for i in OWN_PICTURES)


def lights() -> list[Face]:
    """Return the lights of the room: west lamp, east lamp and window, in this order."""
    panel, z = 0.6, HEIGHT_M - 0.02
    lamps = [
        replace(
            face((x - panel / 2, -panel / 2, z), (panel, 0, 0), (0, panel, 0), glow((250, 246, 236)), detail=0.5),
            emission=3.2,
            light=i,
        )
        for i, x in enumerate((-1.1, 1.1))
    ]
    window = _hang(_EAST, -0.3, 1.6, 1.5, 1.25, prints.view())
    return [*lamps, replace(window, emission=1.9, light=2)]


def _shell(doorways: bool) -> list[Face]:
    x, y, z = HALF_X_M, HALF_Y_M, HEIGHT_M
    floor = tiles((150, 128, 104), (92, 80, 68), 0.33, accent=(122, 98, 74))
    base = wood(_WALNUT)
    sides = [
        face((x, y, z), (0, -2 * y, 0), (0, 0, -z), plaster((150, 166, 160))),
        face((-x, -y, z), (0, 2 * y, 0), (0, 0, -z), plaster((200, 190, 176))),
    ]
    if doorways:
        sides = [part for wall in sides for part in wall_with_doorway(float(wall.corner[0]), y, z, wall.painter)]
    skirting = [
        face((-x, y - 0.012, 0.08), (2 * x, 0, 0), (0, 0, -0.08), base),
        face((x, -y + 0.012, 0.08), (-2 * x, 0, 0), (0, 0, -0.08), base),
        face((x - 0.012, y, 0.08), (0, (HIGH_Y_M if doorways else -y) - y, 0), (0, 0, -0.08), base),
    ]
    return [
        face((-x, y, 0), (2 * x, 0, 0), (0, -2 * y, 0), floor),
        face((-x, -y, z), (2 * x, 0, 0), (0, 2 * y, 0), wood((206, 196, 180), plank_m=0.28), detail=0.6),
        face((-x, y, z), (2 * x, 0, 0), (0, 0, -z), plaster((196, 184, 160))),
        face((x, -y, z), (-2 * x, 0, 0), (0, 0, -z), plain((198, 196, 190)), detail=0.4),
        *sides,
        *skirting,
    ]


def _hang(
    wall: tuple[float, float], along_m: float, z_m: float, width_m: float, height_m: float, painter: Painter,
    *, gap_m: float = 0.008, detail: float = 1.3,
) -> Face:  # fmt: skip
    """Return a picture on a wall, centred ``along_m`` to the right of the wall's middle and ``z_m`` above the floor."""
    outward = np.array([*wall, 0.0])
    right = np.array([outward[1], -outward[0], 0.0])
    reach = HALF_X_M if wall[0] else HALF_Y_M
    middle = outward * (reach - gap_m) + right * along_m + np.array([0, 0, z_m])
    up = np.array([0, 0, height_m / 2])
    return face(middle - right * width_m / 2 + up, right * width_m, -2 * up, painter, detail=detail)


def _pictures(doorways: bool) -> list[Face]:
    poster, page = prints.poster, prints.page
    aside, note = ((1.0, 1.72), (1.08, 1.2)) if doorways else ((1.25, 1.72), (1.7, 1.3))  # beside the doorway
    return [
        _hang(_NORTH, -0.25, 1.62, 0.62, 0.88, poster()),
        _hang(_NORTH, 0.62, 1.7, 0.9, 0.66, poster()),
        _hang(_NORTH, 1.45, 1.62, 0.42, 0.6, poster()),
        _hang(_NORTH, 2.1, 1.5, 0.5, 0.72, poster()),
        _hang(_EAST, *aside, 0.5, 0.7, poster()),
        _hang(_EAST, 0.78, 1.25, 0.21, 0.3, page()),
        _hang(_EAST, *note, 0.3, 0.21, page()),
        _hang(_EAST, -1.55, 1.6, 0.56, 0.8, poster()),
        _hang(_WEST, 1.62, 2.2, 0.5, 0.36, poster()),
        _hang(_SOUTH, 1.3, 1.35, 0.21, 0.3, page()),  # the only thing on the blank wall, beside the door
    ]


def _window_side() -> list[Face]:
    curtain, radiator = cloth((150, 70, 62), fold_m=0.09), tiles((214, 212, 206), (150, 148, 144), 0.06, wear=0.005)
    return [
        *box((2.42, 1.27, 1.45), (0.1, 0.4, 1.95), curtain, skip=("back",)),
        *box((2.42, -0.66, 1.45), (0.1, 0.34, 1.95), curtain, skip=("back",)),
        *box((2.42, 0.3, 2.42), (0.06, 2.4, 0.05), wood(_WALNUT), skip=("back",)),
        *box((2.43, 0.45, 0.45), (0.12, 1.1, 0.6), radiator, skip=("back",)),
        *box((2.4, 0.3, 0.94), (0.22, 1.7, 0.03), wood(_PINE), skip=("back",)),
        *prism((2.38, 0.62, 0.955), 0.07, 0.14, plaster((166, 92, 60)), plain((60, 44, 34)), corners=10),
        *_plant((2.36, 0.62, 1.08), 9, 0.26),
    ]


def _plant(foot: Sequence[float], leaves: int, reach_m: float) -> list[Face]:
    """Return pointed leaves around a stem, each visible from both sides."""
    outline = np.array([[0, 0.5], [0.4, 0.2], [0.7, 0.25], [1, 0.5], [0.7, 0.75], [0.4, 0.8]])
    made = []
    for i in range(leaves):
        angle, rise = 2.4 * i, 0.35 + 0.75 * ((i * 0.618) % 1.0)
        along = reach_m * np.array([np.cos(angle) * np.cos(rise), np.sin(angle) * np.cos(rise), np.sin(rise)])
        side = 0.35 * reach_m * np.array([-np.sin(angle), np.cos(angle), 0.25])
        leaf = Face(np.asarray(foot) + side / 2, along, -side, cloth((66, 112, 58)), outline=outline)
        made.append(leaf)
    return made


def _bookshelf() -> list[Face]:
    """Return the bookshelf, at the north wall."""
    middle, width, depth, board = -1.35, 1.2, 0.3, 0.03
    y, timber = HALF_Y_M - depth / 2, wood(_PINE)
    upright = wood(_PINE, upright=True)
    made = []
    for x in (middle - width / 2, middle + width / 2):
        made += box((x, y, 1.0), (depth, board, 2.0), upright, yaw_deg=90, skip=("back", "bottom"))
    levels = (0.1, 0.48, 0.86, 1.22, 1.6, 1.985)
    for z in levels:
        made += box((middle, y, z), (depth, width, board), timber, yaw_deg=90, skip=("back",))
    books = prints.books()
    for bottom, top, left, right in (
        (0.1, 0.48, -0.58, 0.58), (0.48, 0.86, -0.58, 0.1), (0.86, 1.22, -0.3, 0.58), (1.22, 1.6, -0.58, 0.58),
        (1.6, 1.985, -0.1, 0.58),
    ):  # fmt: skip
        low, high = bottom + board / 2, top - board / 2
        center = (middle + (left + right) / 2, y + 0.03, (low + high) / 2)
        row = box(center, (depth - 0.08, right - left, high - low), books, yaw_deg=90, skip=("back", "bottom", "top"))
        made += row
    for x, z, name in ((0.25, 0.62, "Memo"), (0.45, 0.63, "Kara"), (-0.45, 1.0, "Ludo"), (-0.35, 1.72, "Box 7")):
        made += box(
            (middle + x, y, z),
            (0.16, 0.16, 0.24),
            prints.package(name),
            yaw_deg=80,
            skip=("back", "bottom"),
            detail=1.3,
        )
    made += box((middle, HALF_Y_M - 0.15, 2.13), (0.28, 0.7, 0.26), cardboard("PHOTOS"), yaw_deg=90, skip=("bottom",))
    return made


def _sideboard() -> list[Face]:
    """Return the sideboard, at the north wall, to the right of the shelf."""
    y, door = HALF_Y_M - 0.21, prints.front(_BLUE)
    made = []
    for x in (0.1, 0.6, 1.1):
        made += box((x, y, 0.36), (0.42, 0.5, 0.72), door, yaw_deg=90, skip=("back", "bottom", "top"))
    made += box((0.6, y, 0.735), (0.45, 1.54, 0.03), wood(_OAK), yaw_deg=90, skip=("back",))
    for x, width, height, yaw, name in (
        (0.0, 0.2, 0.3, 78, "Tea"), (0.24, 0.16, 0.24, 100, "Oats"), (1.2, 0.22, 0.28, 95, "Radio"),
    ):  # fmt: skip
        center = (x, y + 0.02, 0.75 + height / 2)
        made += box(center, (0.1, width, height), prints.package(name), yaw_deg=yaw, skip=("bottom",), detail=1.3)
    made += prism((0.75, y, 0.75), 0.1, 0.2, tiles((190, 196, 200), (60, 84, 120), 0.05), plain((58, 44, 34)))
    made += _plant((0.75, y - 0.02, 0.93), 13, 0.34)
    made += box((2.0, 1.7, 0.3), (0.5, 0.6, 0.6), cardboard("WINTER"), yaw_deg=97, skip=("bottom",))
    made += box((2.02, 1.72, 0.78), (0.4, 0.46, 0.36), cardboard("CABLES"), yaw_deg=80, skip=("bottom",))
    return made


def _kitchen() -> list[Face]:
    """Return the kitchen, at the west wall; its fronts look along +x, hence the half turn."""
    x = -HALF_X_M
    made = [
        _hang(
            _WEST, 0.0, 1.18, 2.5, 0.56, tiles((206, 208, 204), (120, 120, 116), 0.14, accent=(70, 100, 150)), detail=1
        )
    ]
    for i, y in enumerate((-0.9375, -0.3125, 0.3125, 0.9375)):
        low = prints.front(_CREAM) if i != 1 else prints.front((60, 60, 62), upright=False)
        made += box((x + 0.3, y, 0.43), (0.6, 0.62, 0.86), low, yaw_deg=180, skip=("back", "bottom", "top"))
    made += box((x + 0.315, 0.0, 0.88), (0.63, 2.52, 0.04), wood(_OAK), yaw_deg=180, skip=("back",))
    for y in (-0.95, -0.4, 0.15):
        made += box((x + 0.18, y, 1.82), (0.36, 0.54, 0.7), prints.front(_CREAM), yaw_deg=180, skip=("back",))
    made += box(
        (x + 0.24, 0.95, 1.04), (0.34, 0.5, 0.28), prints.front((70, 72, 76)), yaw_deg=184, skip=("back", "bottom")
    )
    for y, width, height, yaw, name in (
        (-1.05, 0.19, 0.29, 170, "Mais"), (-0.8, 0.16, 0.25, 192, "Reis"), (0.5, 0.14, 0.22, 185, "Milk"),
    ):  # fmt: skip
        center = (x + 0.3, y, 0.9 + height / 2)
        made += box(center, (0.09, width, height), prints.package(name), yaw_deg=yaw, skip=("bottom",), detail=1.3)
    for y, color in ((-0.45, (160, 60, 50)), (-0.28, (70, 110, 80)), (-0.12, (190, 160, 70))):
        made += prism((x + 0.2, y, 0.9), 0.055, 0.17, tiles(color, (40, 36, 34), 0.03), plain((90, 90, 92)), corners=10)
    fridge = plaster((196, 198, 200))
    made += box((x + 0.33, 1.63, 0.93), (0.66, 0.66, 1.86), fridge, yaw_deg=180, skip=("back", "bottom"))
    front = x + 0.665
    for y, z, width, height in ((1.5, 1.5, 0.21, 0.29), (1.76, 1.42, 0.15, 0.21), (1.7, 1.08, 0.3, 0.21)):
        corner = (front, y - width / 2, z + height / 2)
        made.append(face(corner, (0, width, 0), (0, 0, -height), prints.page(), detail=1.3))
    made += box((x + 0.3, 1.6, 2.0), (0.4, 0.5, 0.26), cardboard("JARS"), yaw_deg=172, skip=("bottom",))
    return made


def _desk() -> list[Face]:
    """Return the desk, in the south-east corner."""
    made = box((2.16, -1.25, 0.72), (0.66, 1.3, 0.03), wood(_WALNUT, upright=True))
    for y in (-1.86, -0.64):
        made += box((2.2, y, 0.355), (0.56, 0.04, 0.71), wood(_WALNUT, upright=True), skip=("bottom",))
    made += box((2.3, -1.15, 1.06), (0.05, 0.62, 0.38), plain((30, 30, 32)), skip=("front",))
    made.append(face((2.274, -0.84, 1.25), (0, -0.62, 0), (0, 0, -0.38), prints.screen(), emission=0.25, detail=1.5))
    made += box((2.32, -1.15, 0.8), (0.08, 0.1, 0.14), plain((30, 30, 32)))
    made.append(face((1.92, -0.95, 0.742), (0, -0.42, 0), (-0.15, 0, 0), prints.keyboard(), detail=1.3))
    made.append(face((2.1, -1.5, 0.742), (0.02, -0.21, 0), (-0.3, -0.02, 0), prints.page(), detail=1.3))
    made += box((2.3, -1.72, 0.87), (0.2, 0.3, 0.27), prints.books(), skip=("bottom",))
    made += _chair(1.62, -1.35, 185.0)
    return made


def _sofa_side() -> list[Face]:
    """Return sofa, boxes and door along the south wall, whose upper part is blank."""
    fabric, pillow = cloth((96, 104, 88)), cloth((170, 120, 60))
    made = box((-0.4, -1.62, 0.21), (0.72, 1.7, 0.42), fabric, yaw_deg=-90, skip=("bottom",))
    made += box((-0.4, -1.89, 0.6), (0.2, 1.7, 0.4), fabric, yaw_deg=-90, skip=("bottom",))
    for x in (-1.33, 0.53):
        made += box((x, -1.62, 0.29), (0.74, 0.16, 0.58), fabric, yaw_deg=-90, skip=("bottom",))
    made += box((-0.95, -1.66, 0.58), (0.12, 0.42, 0.34), pillow, yaw_deg=-70)
    made += box((0.1, -1.68, 0.58), (0.12, 0.42, 0.34), rug((130, 60, 60), (200, 180, 140), (60, 60, 90)), yaw_deg=-105)
    made += box((1.05, -1.68, 0.24), (0.5, 0.55, 0.48), cardboard("BOOKS"), yaw_deg=-84, skip=("bottom",))
    made += box((1.02, -1.7, 0.64), (0.36, 0.42, 0.32), cardboard("FRAGILE"), yaw_deg=-102, skip=("bottom",))
    made.append(_hang(_SOUTH, 1.98, 1.02, 0.86, 2.04, prints.front((140, 104, 72)), gap_m=0.02, detail=1.0))
    return made


def _chair(x: float, y: float, yaw_deg: float) -> list[Face]:
    c, s = np.cos(np.radians(yaw_deg)), np.sin(np.radians(yaw_deg))
    timber = wood(_OAK, upright=True)
    made = box((x, y, 0.45), (0.42, 0.42, 0.04), wood(_OAK), yaw_deg=yaw_deg)
    made += box((x + 0.2 * c, y + 0.2 * s, 0.72), (0.035, 0.4, 0.36), timber, yaw_deg=yaw_deg)
    for a, b in ((0.18, 0.18), (0.18, -0.18), (-0.18, 0.18), (-0.18, -0.18)):
        foot = (x + a * c - b * s, y + a * s + b * c, 0.215)
        made += box(foot, (0.04, 0.04, 0.43), timber, yaw_deg=yaw_deg, skip=("top", "bottom"))
    return made


def _table() -> list[Face]:
    """Return the table in the middle, the rug under it, and the things on it."""
    made = [face((-1.0, 0.75, 0.006), (2.2, 0, 0), (0, -1.6, 0), rug((112, 44, 44), (196, 168, 120), (40, 52, 84)))]
    made += box((0.1, -0.05, 0.735), (0.75, 1.2, 0.03), wood(_OAK), yaw_deg=96)
    for x, y in ((-0.4, -0.32), (0.62, -0.4), (-0.42, 0.3), (0.6, 0.22)):
        made += box((x, y, 0.36), (0.06, 0.06, 0.72), wood(_OAK, upright=True), skip=("top", "bottom"))
    made += _chair(0.1, 0.62, 92.0) + _chair(0.12, -0.72, 265.0)
    top = 0.751
    made.append(face((-0.3, 0.1, top), (0.21, 0.03, 0), (0.04, -0.29, 0), prints.page(), detail=1.4))
    made.append(face((-0.02, 0.25, top + 0.001), (0.24, -0.05, 0), (-0.06, -0.28, 0), prints.poster(), detail=1.4))
    for x, y, size, yaw, name in (
        (0.42, 0.1, (0.08, 0.19, 0.29), 60, "Musli"), (0.5, -0.22, (0.1, 0.14, 0.2), 140, "Kaffee"),
        (-0.36, -0.22, (0.16, 0.24, 0.09), 15, "Spiel"),
    ):  # fmt: skip
        made += box((x, y, 0.75 + size[2] / 2), size, prints.package(name), yaw_deg=yaw, skip=("bottom",), detail=1.4)
    made += prism((0.2, -0.2, 0.75), 0.042, 0.095, tiles((196, 200, 204), (60, 90, 150), 0.03), plain((52, 36, 26)))
    return made


LOW_Y_M, HIGH_Y_M, DOOR_HEIGHT_M = -1.96, -1.28, 2.0
WALL_M = 0.3
"""Thickness of the wall between two rooms; a room's doorways reach to its middle."""
MIDDLE_Y_M = (LOW_Y_M + HIGH_Y_M) / 2


def wall_with_doorway(x_m: float, half_y_m: float, height_m: float, painter: Painter) -> list[Face]:
    """Return a wall at ``x_m``, seen from x = 0, around its doorway."""
    parts = [
        (HIGH_Y_M, half_y_m, height_m),
        (LOW_Y_M, HIGH_Y_M, height_m - DOOR_HEIGHT_M),
        (-half_y_m, LOW_Y_M, height_m),
    ]
    if x_m > 0:  # seen from the room, its left is the north
        return [face((x_m, b, height_m), (0, a - b, 0), (0, 0, -down), painter) for a, b, down in parts]
    return [face((x_m, a, height_m), (0, b - a, 0), (0, 0, -down), painter) for a, b, down in parts]


def passages(half_x_m: float, frame: Painter, step: Painter, door: Painter) -> list[Face]:
    """Return both doorways as far as the middle of the wall and, last, the doors that close them, east and west."""
    deep, wide, z, end = WALL_M / 2, HIGH_Y_M - LOW_Y_M, DOOR_HEIGHT_M, half_x_m + WALL_M / 2
    made = []
    for x in (half_x_m, -end):
        made += [
            face((x, HIGH_Y_M, z), (deep, 0, 0), (0, 0, -z), frame),
            face((x + deep, LOW_Y_M, z), (-deep, 0, 0), (0, 0, -z), frame),
            face((x, LOW_Y_M, z), (deep, 0, 0), (0, wide, 0), frame),
            face((x, HIGH_Y_M, 0), (deep, 0, 0), (0, -wide, 0), step),
        ]
    east = face((end, HIGH_Y_M, z), (0, -wide, 0), (0, 0, -z), door)
    west = face((-end, LOW_Y_M, z), (0, wide, 0), (0, 0, -z), door)
    return [*made, east, west]
