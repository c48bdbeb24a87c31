# SPDX-License-Identifier: Apache-2.0
"""Hand-held walks through the room: smooth routes at walking speed, with camera shake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.types import Matrix

Vector = NDArray[np.float64]

_DENSE = 1500
_SHAKE_TONES = 5


@dataclass(frozen=True, eq=False)
class Route:
    """Positions and targets of the camera, as (n, 3) knots in metres, map frame, at equal steps."""

    positions: Vector
    targets: Vector


@dataclass(frozen=True)
class Pace:
    """Speed limits of a walk, and the size of the camera shake."""

    speed_m_s: float = 0.45
    turn_deg_s: float = 40.0
    shake_m: float = 0.003
    shake_deg: float = 0.25


class Trajectory:
    """Route as a function of time; ``duration_s`` follows from the pace.

    Args:
        route: knots, four or more.
        pace: limits of the smooth motion; the shake is added.
        seed: seed of the shake.
    """

    def __init__(self, route: Route, pace: Pace, seed: int) -> None:
        self._positions, self._targets = _Spline(route.positions), _Spline(route.targets)
        s = np.linspace(0, 1, _DENSE)
        where, forward = self._positions(s), self._forward(s)
        step_m = np.linalg.norm(np.diff(where, axis=0), axis=1)
        step_rad = np.arccos(np.clip((forward[1:] * forward[:-1]).sum(1), -1, 1))
        needed_s = np.maximum(step_m / pace.speed_m_s, step_rad / np.radians(pace.turn_deg_s))
        # Widening before smoothing keeps every smoothed step at least as long as needed.
        width = _DENSE // 25
        widened = np.array([needed_s[max(0, i - width) : i + width + 1].max() for i in range(len(needed_s))])
        padded = np.pad(widened, width, mode="edge")
        smooth = np.convolve(padded, np.ones(2 * width + 1) / (2 * width + 1), mode="valid")
        self._times, self._s = np.concatenate([[0.0], np.cumsum(smooth)]), s
        self.duration_s = float(self._times[-1])
        rng = np.random.default_rng((seed, 7))
        self._tones_hz = rng.uniform(0.6, 4.5, _SHAKE_TONES)
        size = np.array([pace.shake_m] * 3 + [np.radians(pace.shake_deg)] * 3)
        weights = (1 / self._tones_hz) / np.linalg.norm(1 / self._tones_hz) * np.sqrt(2)
        self._tone_size = size[:, None] * weights * rng.uniform(0.7, 1.3, (6, _SHAKE_TONES))
        self._tone_phase = rng.uniform(0, 2 * np.pi, (6, _SHAKE_TONES))

    def pose(self, time_s: float) -> Matrix:
        """Return T_map_camera at a time; before the start and after the end, the first and the last pose."""
        s = np.interp(time_s, self._times, self._s)
        shake = (self._tone_size * np.sin(2 * np.pi * self._tones_hz * time_s + self._tone_phase)).sum(1)
        T = look_at(self._positions(np.array([s]))[0], self._targets(np.array([s]))[0])
        return make_pose(T[:3, :3] @ so3_exp(shake[3:]), T[:3, 3] + shake[:3])

    def _forward(self, s: Vector) -> Vector:
        way = self._targets(s) - self._positions(s)
        return np.asarray(way / np.linalg.norm(way, axis=1, keepdims=True))


def look_at(position: ArrayLike, target: ArrayLike) -> Matrix:
    """Return the pose of an upright camera (T_map_camera, optical axes) with ``target`` in its middle."""
    position = np.asarray(position, dtype=np.float64)
    forward = np.asarray(target, dtype=np.float64) - position
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right = right / np.linalg.norm(right)
    return make_pose(np.stack([right, np.cross(forward, right), forward], axis=1), position)


class _Spline:
    """Natural cubic spline through (n, d) knots at equal steps, as a function of 0..1."""

    def __init__(self, knots: Vector) -> None:
        count = len(knots)
        system = np.diag(np.full(count, 4.0)) + np.diag(np.ones(count - 1), 1) + np.diag(np.ones(count - 1), -1)
        system[0], system[-1] = 0, 0
        system[0, 0] = system[-1, -1] = 1
        right = np.zeros_like(knots)
        right[1:-1] = 6 * (knots[2:] - 2 * knots[1:-1] + knots[:-2])
        self._knots, self._bends = knots, np.linalg.solve(system, right)

    def __call__(self, s: Vector) -> Vector:
        """Return (m, d) values at ``s`` (m,)."""
        place = np.clip(s, 0, 1) * (len(self._knots) - 1)
        i = np.minimum(place.astype(int), len(self._knots) - 2)
        b = (place - i)[:, None]
        a = 1 - b
        bend = (a**3 - a) * self._bends[i] + (b**3 - b) * self._bends[i + 1]
        return np.asarray(a * self._knots[i] + b * self._knots[i + 1] + bend / 6)


def orbit(
    headings_deg: ArrayLike,
    reaches: Sequence[float],
    heights_m: ArrayLike,
    aims_m: ArrayLike,
    seed: int,
) -> Route:
    """Return a route around the middle of the room, looking across it.

    Args:
        headings_deg: viewing directions, 0 to the east, 90 to the north.
        reaches: distance of the camera from the middle, opposite to its viewing direction, as a share of the free
            space.
        heights_m: heights of the camera.
        aims_m: heights of the targets on the walls.
        seed: seed of the knots' deviations from the ellipse.
    """
    rng = np.random.default_rng((seed, 11))
    heading = np.radians(np.asarray(headings_deg, dtype=np.float64))
    count = len(heading)
    along = heading + np.radians(rng.uniform(-14, 14, count))
    reach = np.asarray(reaches) * rng.uniform(0.88, 1.08, count)
    positions = np.stack([-1.3 * reach * np.cos(along), -0.95 * reach * np.sin(along), np.asarray(heights_m)], axis=1)
    targets = np.stack([2.3 * np.cos(heading), 1.8 * np.sin(heading), np.asarray(aims_m)], axis=1)
    return Route(positions, targets)
