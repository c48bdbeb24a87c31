# SPDX-License-Identifier: Apache-2.0
"""Poses in the map and odometry together: consistency, steady corrections of ``map -> odom``, poses between images."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import Matrix, interpolate, inverse_pose, make_pose, rotation_angle_deg, so3_exp, so3_log
from kfloc_ros.messages.poses import BodyPose

RECENT_S = 2.0
"""Time without any pose, in seconds, after which any pose is accepted: wheels may have slipped meanwhile."""
HOLD_S = 10.0
"""Time, in seconds, over which small steps away from the odometry add up, and after which poses that went on
contradicting it are accepted."""
SLIP_PER_M = 0.05
"""Error of odometry, in metres per metre driven, that is no contradiction."""
DEG_PER_M = 30.0
"""Rotation, in degrees, that counts as much as a translation of one metre."""


@dataclass(frozen=True, eq=False)
class _Observation:
    stamp_ns: int
    T_map_odom: Matrix
    driven_m: float


class OdometryCheck:
    """Consistency check of poses with the odometry.

    A pose that jumps is suspect until a second pose agrees with it: a single wrong pose never moves the map, and a
    robot that was really moved waits for one more image. Poses are also compared with those of the last ten seconds,
    so that small steps add up: a camera that shows an old image while the robot drives on is suspect for as long.
    """

    def __init__(self) -> None:
        self._accepted: deque[_Observation] = deque()
        self._seen: _Observation | None = None
        self._suspect: _Observation | None = None
        self._creeping: _Observation | None = None
        self._odometry: Matrix | None = None

    def check(self, stamp_ns: int, T_map_base: Matrix, T_odom_base: Matrix, limit_m: float) -> str:
        """Return the reason why a pose is suspect; empty if it is accepted.

        Args:
            stamp_ns: stamp of the image.
            T_map_base: pose estimated from the image.
            T_odom_base: odometry at the same stamp.
            limit_m: largest accepted distance between the two, in metres; 0: no limit.
        """
        before, self._odometry = self._odometry, T_odom_base
        step_m = 0.0 if before is None else float(np.linalg.norm(T_odom_base[:3, 3] - before[:3, 3]))
        driven_m = step_m + (0.0 if self._seen is None else self._seen.driven_m)
        now = _Observation(stamp_ns, T_map_base @ inverse_pose(T_odom_base), driven_m)
        seen, self._seen = self._seen, now
        suspect, self._suspect = self._suspect, None
        if limit_m == 0.0 or not _is_within_s(seen, stamp_ns, RECENT_S) or not self._accepted:
            return self._restart(now)
        if not _is_within_s(self._accepted[-1], stamp_ns, HOLD_S):
            return self._restart(now)
        while not _is_within_s(self._accepted[0], stamp_ns, HOLD_S):
            self._accepted.popleft()

        def agrees(other: _Observation | None) -> bool:
            return other is not None and _within(*_apart(other, T_map_base, T_odom_base), limit_m)

        if agrees(self._accepted[-1]):
            oldest = self._accepted[0]
            allowed_m = limit_m + SLIP_PER_M * (driven_m - oldest.driven_m)
            if _within(*_apart(oldest, T_map_base, T_odom_base), allowed_m):
                self._accepted.append(now)
                self._creeping = None
                return ""
        elif not agrees(self._creeping):
            if agrees(suspect):
                return self._restart(now)
            self._suspect = now
            apart_m, apart_deg = _apart(self._accepted[-1], T_map_base, T_odom_base)
            return (
                f"The pose is {apart_m:.2f} m and {apart_deg:.1f} deg from its prediction by odometry, more than "
                f"max_odom_jump {limit_m:g} m; a second image has to confirm it."
            )
        self._creeping, oldest = now, self._accepted[0]
        apart_m, apart_deg = _apart(oldest, T_map_base, T_odom_base)
        return (
            f"In {1e-9 * (stamp_ns - oldest.stamp_ns):.1f} s the poses have moved away from the odometry by "
            f"{apart_m:.2f} m and {apart_deg:.1f} deg in small steps, more than max_odom_jump {limit_m:g} m allows; "
            "the wheels slip, or the camera shows an old image or another place."
        )

    def reset(self) -> None:
        """Accept the next pose unconditionally."""
        self._accepted.clear()
        self._seen = self._suspect = self._creeping = self._odometry = None

    def _restart(self, observation: _Observation) -> str:
        self._accepted.clear()
        self._accepted.append(observation)
        self._creeping = None
        return ""


def _is_within_s(observation: _Observation | None, stamp_ns: int, limit_s: float) -> bool:
    return observation is not None and 0 < stamp_ns - observation.stamp_ns <= limit_s * 1e9


def _apart(observation: _Observation, T_map_base: Matrix, T_odom_base: Matrix) -> tuple[float, float]:
    """Return metres and degrees between a pose and an earlier one moved by odometry."""
    between = inverse_pose(observation.T_map_odom @ T_odom_base) @ T_map_base
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


def _within(apart_m: float, apart_deg: float, limit_m: float) -> bool:
    return apart_m <= limit_m and apart_deg <= limit_m * DEG_PER_M


MAX_SPEED_M_S, MAX_TURN_DEG_S = 30.0, 1080.0
"""Odometry that moves faster was set to another place."""
_LEAST_JUMP_M, _LEAST_JUMP_DEG = 1.0, 90.0


@dataclass(frozen=True)
class CorrectionLimits:
    """Limits on the speed at which ``map -> odom`` moves the base; 0: no limit."""

    m_s: float = 0.0
    deg_s: float = 0.0

    @property
    def are_off(self) -> bool:
        """True if neither speed has a limit."""
        return self.m_s == 0.0 and self.deg_s == 0.0


class SteadyCorrection:
    """Rate limiter of ``map -> odom``.

    The limits apply to the base, not to the origin of the odometry's frame: that may be far away, where a small
    rotation is a large movement. The time is that of the transforms' stamps, so that the limits hold for whoever looks
    transforms up, whenever they were sent.
    """

    def __init__(self) -> None:
        self._current: Matrix | None = None
        self._target: Matrix | None = None
        self._may_jump = False
        self._stamp_ns = 0
        self._odometry: tuple[int, Matrix] | None = None

    def allow_jump(self) -> None:
        """Let the next new target be reached at once: the robot was lost, or a user has asked for a new start."""
        self._may_jump = True

    def observe(self, stamp_ns: int, T_odom_base: Matrix) -> bool:
        """Record the odometry of an image; if it was set to another place, allow a jump and return True."""
        before, self._odometry = self._odometry, (stamp_ns, T_odom_base)
        if before is None or stamp_ns <= before[0]:
            return False
        elapsed_s = 1e-9 * (stamp_ns - before[0])
        step = inverse_pose(before[1]) @ T_odom_base
        moved_m, turned_deg = float(np.linalg.norm(step[:3, 3])), rotation_angle_deg(step[:3, :3])
        if moved_m <= max(_LEAST_JUMP_M, MAX_SPEED_M_S * elapsed_s) and turned_deg <= max(
            _LEAST_JUMP_DEG, MAX_TURN_DEG_S * elapsed_s
        ):
            return False
        self.allow_jump()
        return True

    def step(self, target: Matrix, T_odom_base: Matrix, stamp_ns: int, limits: CorrectionLimits) -> Matrix:
        """Return the ``T_map_odom`` (4, 4) to send.

        Args:
            target: newest ``T_map_odom``; the same object as in the last step if there is no newer one.
            T_odom_base: newest odometry, whose base the limits apply to.
            stamp_ns: stamp of the transform; not before that of the last step.
            limits: limits on the speed.
        """
        elapsed_s = 1e-9 * max(stamp_ns - self._stamp_ns, 0)
        self._stamp_ns = stamp_ns
        is_new, self._target = target is not self._target, target
        if self._current is None or limits.are_off or (is_new and self._may_jump):
            self._current, self._may_jump = target, False
            return target
        now, wanted = self._current @ T_odom_base, target @ T_odom_base
        between = inverse_pose(now) @ wanted
        share = 1.0
        for size, limit in (
            (float(np.linalg.norm(between[:3, 3])), limits.m_s),
            (rotation_angle_deg(between[:3, :3]), limits.deg_s),
        ):
            if limit > 0.0 and size > limit * elapsed_s:
                share = min(share, limit * elapsed_s / size)
        moved = target if share == 1.0 else interpolate(now, wanted, share) @ inverse_pose(T_odom_base)
        self._current = moved
        return moved


@dataclass(frozen=True)
class OdometryDrift:
    """Growth of the standard deviations of a pose that odometry carries on."""

    per_m: float = 0.02
    """Metres per metre driven."""
    deg_per_m: float = 0.5
    """Degrees per metre driven."""
    per_turn: float = 0.03
    """Radians per radian turned."""
    bridged_m_s: float = 0.5
    """Metres per second that a gyroscope bridges without odometry."""


@dataclass(frozen=True, eq=False)
class CarriedPose:
    """Pose between images."""

    stamp_ns: int
    body: BodyPose
    velocity_m_s: Matrix
    """(3,) in the base frame."""
    turn_rate_rad_s: Matrix
    """(3,) in the base frame."""


_KEEP_S = 20.0
_VELOCITY_S = 0.1
"""Time over which velocities are measured, in seconds."""
MAX_BRIDGED_S = 0.5
"""Longest time, in seconds, for which a pose goes on beyond the newest odometry by gyroscope and constant velocity."""


class DeadReckoning:
    """Pose between images: the last pose from an image, carried on by odometry, and by a gyroscope beyond that."""

    def __init__(self, drift: OdometryDrift | None = None) -> None:
        self._drift = drift or OdometryDrift()
        self._fix: tuple[int, BodyPose, Matrix] | None = None
        self._stamps: list[int] = []
        self._poses: list[Matrix] = []
        self._driven_m: list[float] = []
        self._turned_rad: list[float] = []
        self._rates: deque[tuple[int, Matrix]] = deque(maxlen=1024)

    def reset(self) -> None:
        """Discard everything."""
        self._fix = None
        self._stamps, self._poses, self._driven_m, self._turned_rad = [], [], [], []
        self._rates.clear()

    def fix(self, stamp_ns: int, body: BodyPose, T_odom_base: Matrix) -> None:
        """Set the last pose from an image, with the odometry at its stamp."""
        self._fix = (stamp_ns, body, T_odom_base)

    def observe(self, stamp_ns: int, T_odom_base: Matrix) -> None:
        """Add the newest odometry; an older one is ignored, and one of a clock set back starts anew."""
        if self._stamps and stamp_ns <= self._stamps[-1]:
            if self._stamps[-1] - stamp_ns < 1e9:
                return
            self.reset()
        driven_m = turned_rad = 0.0
        if self._stamps:
            step = inverse_pose(self._poses[-1]) @ T_odom_base
            driven_m = self._driven_m[-1] + float(np.linalg.norm(step[:3, 3]))
            turned_rad = self._turned_rad[-1] + math.radians(rotation_angle_deg(step[:3, :3]))
        self._stamps.append(stamp_ns)
        self._poses.append(T_odom_base)
        self._driven_m.append(driven_m)
        self._turned_rad.append(turned_rad)
        old = bisect_left(self._stamps, stamp_ns - int(_KEEP_S * 1e9))
        if 2 * old >= len(self._stamps):
            for values in (self._stamps, self._poses, self._driven_m, self._turned_rad):
                del values[:old]

    def turn(self, stamp_ns: int, rate_rad_s: Matrix) -> None:
        """Add an angular rate (3,) of the base in its own frame, as a gyroscope measures it."""
        if self._rates and stamp_ns <= self._rates[-1][0]:
            return
        self._rates.append((stamp_ns, np.asarray(rate_rad_s, dtype=np.float64)))

    def newest(self) -> CarriedPose | None:
        """Return the pose at the newest time that odometry or gyroscope tell of, or None without a pose."""
        if self._fix is None or not self._stamps or self._stamps[-1] < self._fix[0]:
            return None
        fix_ns, body, T_odom_then = self._fix
        stamp_ns = self._stamps[-1]
        velocity, rate = self._velocity()
        moved = body.moved(inverse_pose(T_odom_then) @ self._poses[-1])
        since = bisect_left(self._stamps, fix_ns)
        driven_m = self._driven_m[-1] - self._driven_m[since]
        turned_rad = self._turned_rad[-1] - self._turned_rad[since]
        # Until the first odometry after the image, a part of the way is not counted.
        first = inverse_pose(T_odom_then) @ self._poses[since]
        driven_m += float(np.linalg.norm(first[:3, 3]))
        turned_rad += math.radians(rotation_angle_deg(first[:3, :3]))
        sigma_rad = math.radians(self._drift.deg_per_m) * driven_m + self._drift.per_turn * turned_rad
        # A heading error that grows on the way moves the end by up to half of itself times the way.
        sigma_m = self._drift.per_m * driven_m + 0.5 * sigma_rad * driven_m
        bridged_s, turn = self._bridge(stamp_ns)
        if bridged_s > 0.0:
            stamp_ns = self._rates[-1][0]
            rate = self._rates[-1][1]
            moved = moved.moved(make_pose(turn, velocity * bridged_s))
            sigma_m += self._drift.bridged_m_s * bridged_s
            sigma_rad += self._drift.per_turn * float(np.linalg.norm(so3_log(turn)))
        grown = moved.covariance + np.diag([sigma_m**2] * 3 + [min(sigma_rad, math.pi) ** 2] * 3)
        return CarriedPose(stamp_ns, BodyPose(moved.T_map_body, grown), velocity, rate)

    def _velocity(self) -> tuple[Matrix, Matrix]:
        """Return velocity (3,) and angular rate (3,) of the base over the last tenth of a second, in its frame.

        Both are zero where odometry is missing for longer than half a second.
        """
        before = bisect_left(self._stamps, self._stamps[-1] - int(_VELOCITY_S * 1e9))
        before = max(min(before, len(self._stamps) - 2), 0)
        elapsed_s = 1e-9 * (self._stamps[-1] - self._stamps[before])
        if not 0.0 < elapsed_s <= MAX_BRIDGED_S:
            return np.zeros(3), np.zeros(3)
        step = inverse_pose(self._poses[before]) @ self._poses[-1]
        turn = so3_log(step[:3, :3])
        # The displacement is along the chord; in the present frame, half the turn away from it.
        return so3_exp(-0.5 * turn) @ step[:3, 3] / elapsed_s, turn / elapsed_s

    def _bridge(self, since_ns: int) -> tuple[float, Matrix]:
        """Return time and rotation (3, 3) from the newest odometry to the newest angular rate; none if it is long."""
        turn, last_ns = np.eye(3), since_ns
        if not self._rates or not 0 < self._rates[-1][0] - since_ns <= MAX_BRIDGED_S * 1e9:
            return 0.0, turn
        for stamp_ns, rate in self._rates:
            if stamp_ns > last_ns:
                turn = turn @ so3_exp(rate * (1e-9 * (stamp_ns - last_ns)))
                last_ns = stamp_ns
        return 1e-9 * (last_ns - since_ns), turn
