# SPDX-License-Identifier: Apache-2.0
"""The doorways of a room in a building: one in its east wall, one in its west wall, at the same place in both."""

from __future__ import annotations

from kfloc_ros.simulation.faces import Face, face
from kfloc_ros.simulation.textures import Painter

LOW_Y_M, HIGH_Y_M, DOOR_HEIGHT_M = -1.96, -1.28, 2.0
WALL_M = 0.3
"""Thickness of the wall between two rooms; a room's doorways reach to its middle."""
MIDDLE_Y_M = (LOW_Y_M + HIGH_Y_M) / 2


def wall_with_doorway(x_m: float, half_y_m: float, height_m: float, painter: Painter) -> list[Face]:
    """A wall at ``x_m``, looked at from x = 0, around its doorway."""
    parts = [
        (HIGH_Y_M, half_y_m, height_m),
        (LOW_Y_M, HIGH_Y_M, height_m - DOOR_HEIGHT_M),
        (-half_y_m, LOW_Y_M, height_m),
    ]
    if x_m > 0:  # seen from the room, its left is the north
        return [face((x_m, b, height_m), (0, a - b, 0), (0, 0, -down), painter) for a, b, down in parts]
    return [face((x_m, a, height_m), (0, b - a, 0), (0, 0, -down), painter) for a, b, down in parts]


def passages(half_x_m: float, frame: Painter, step: Painter, door: Painter) -> list[Face]:
    """Both doorways as far as the middle of the wall, and last the two doors that close them there, east and west."""
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
