# SPDX-License-Identifier: Apache-2.0
"""A planar robot that drives round a room, with odometry that drifts, and what TF says of its place."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.covariance import planar_map_to_odom, planar_pose
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.localization.odometry import CorrectionLimits, SteadyCorrection
from kfloc_ros.messages.transforms import TransformTree
from kfloc_ros.simulation.render import Renderer, Sensor
from kfloc_ros.simulation.scene import build_room
from kfloc_ros.simulation.source import CAMERA, DAY
from kfloc_ros.simulation.trajectory import look_at
from kfloc_ros.types import Frame, Matrix

Array = NDArray[np.float64]
STEP_S = 0.02
IMAGE_S = 0.2
SEND_S = 0.05


def flat(x: float, y: float, turn_rad: float) -> Matrix:
    return make_pose(so3_exp([0.0, 0.0, turn_rad]), [x, y, 0.0])


LAP_S = 12.0
HEIGHT_M = 1.4
T_BASE_CAMERA = look_at([0.1, 0.05, HEIGHT_M], [0.1, 1.0, HEIGHT_M - 0.1])
"""The mount of a camera that looks to the left, and a little down."""


def true_pose(seconds: float) -> Matrix:
    """``T_map_base`` of a robot that drives round the middle of the room at about 0.4 m/s, 5 m a lap."""
    at = 2 * np.pi * seconds / LAP_S
    turn = np.arctan2(0.72 * np.cos(at), -0.88 * np.sin(at))
    return flat(0.88 * np.cos(at), 0.72 * np.sin(at), turn)


def lap_frames(rate_hz: float) -> list[Frame]:
    """Images of one lap in the demo's room."""
    renderer, sensor, frames = Renderer(build_room(), CAMERA), Sensor(CAMERA), []
    for index in range(round(LAP_S * rate_hz)):
        half_s = sensor.model.exposure_s / 2
        start, middle, end = (true_pose(index / rate_hz + dt) @ T_BASE_CAMERA for dt in (-half_s, 0.0, half_s))
        image = sensor.expose(renderer.render(middle, DAY), start, middle, end, np.random.default_rng(index))
        frames.append(Frame(image, CAMERA, 0, index))
    return frames


def drifting(poses: list[Matrix], drift: float, start: Matrix) -> list[Matrix]:
    """Odometry of true poses: every way is too long by ``drift``, and it turns by 0.6 deg for every metre."""
    odometry = [start]
    for before, after in pairwise(poses):
        step = inverse_pose(before) @ after
        way_m = float(np.linalg.norm(step[:3, 3]))
        step[:3, 3] *= 1.0 + drift
        odometry.append(odometry[-1] @ step @ flat(0, 0, np.radians(0.6) * way_m))
    return odometry


@dataclass(frozen=True, eq=False)
class DriveErrors:
    """Errors of ``map -> base`` at every time, and the speed at which ``map -> odom`` moved the base."""

    away_m: Array
    turned_deg: Array
    speed_m_s: Array
    speed_deg_s: Array


class SimulatedDrive:
    """A drive of 50 s: odometry at 50 Hz, poses of noisy 6-D estimates at 5 Hz after a latency."""

    def __init__(self, rng: np.random.Generator, *, drift: float, latency_s: float) -> None:
        self._rng, self._latency_s = rng, latency_s
        self.times = np.arange(0.0, 50.0, STEP_S)
        self.poses = [true_pose(t) for t in self.times]
        self.odometry = drifting(self.poses, drift, flat(30.0, -12.0, 2.0))
        self.driven_m = float(sum(np.linalg.norm(b[:3, 3] - a[:3, 3]) for a, b in pairwise(self.poses)))
        carried = self.poses[0] @ inverse_pose(self.odometry[0]) @ self.odometry[-1]
        self.odometry_error_m = float(np.linalg.norm(carried[:3, 3] - self.poses[-1][:3, 3]))

    def run(self, limits: CorrectionLimits) -> DriveErrors:
        """Send ``map -> odom`` as the node does, and look ``map -> base`` up at the present time and between."""
        sigma = np.array([0.007] * 3 + [np.radians(0.25)] * 3)
        lead_s = max(0.3, self._latency_s + 2 * SEND_S)
        steady, tree = SteadyCorrection(), TransformTree(10.0)
        target: Matrix | None = None
        rows: list[tuple[float, float, float, float]] = []
        sent: tuple[int, Matrix] | None = None
        for k, now in enumerate(self.times):
            tree.set("odom", "base", ns(now), self.odometry[k])
            seen = now - self._latency_s
            if seen >= 0 and is_multiple(seen, IMAGE_S):
                error = sigma * self._rng.normal(size=6)
                at = round(seen / STEP_S)
                T = make_pose(so3_exp(error[3:]) @ self.poses[at][:3, :3], self.poses[at][:3, 3] + error[:3])
                planar = planar_pose(T, np.diag(sigma**2))
                target = planar_map_to_odom(planar.T_map_base, self.odometry[at])
            if target is not None and is_multiple(now, SEND_S, STEP_S):
                stamp_ns = ns(now - self._latency_s + lead_s)
                T_map_odom = steady.step(target, self.odometry[k], stamp_ns, limits)
                tree.set("map", "odom", stamp_ns, T_map_odom)
                if sent is not None:
                    moved = inverse_pose(sent[1] @ self.odometry[k]) @ T_map_odom @ self.odometry[k]
                    seconds = 1e-9 * (stamp_ns - sent[0])
                    speeds = np.linalg.norm(moved[:3, 3]) / seconds, rotation_angle_deg(moved[:3, :3]) / seconds
                else:
                    speeds = 0.0, 0.0
                sent = stamp_ns, T_map_odom
            found = tree.find("map", "base", ns(now))
            if found is not None and sent is not None:
                off = inverse_pose(self.poses[k]) @ found
                rows.append((float(np.linalg.norm(off[:3, 3])), rotation_angle_deg(off[:3, :3]), *speeds))
        assert len(rows) > 0.9 * len(self.times)
        return DriveErrors(*np.array(rows).T)


def ns(seconds: float) -> int:
    return round(seconds * 1e9) + 10**12


def is_multiple(seconds: float, period_s: float, tolerance_s: float = 1e-6) -> bool:
    rest = (seconds + 1e-9) % period_s
    return bool(rest < tolerance_s)
