# SPDX-License-Identifier: Apache-2.0
"""From frame to frame: prediction, tracking without a coarse pose, first poses, support, places alike, repeats."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.covariance import CHI2_6_999, UncertainPose
from kfloc_ros.geometry.lie import (
    Matrix,
    inverse_pose,
    is_farther,
    jumped,
    make_pose,
    rotation_angle_deg,
    so3_exp,
    so3_log,
)
from kfloc_ros.pixloc.image_check import BlockMatch
from kfloc_ros.types import Alignment, CoarsePose, PoseEstimate, TrackingState


class ConstantVelocity:
    """Constant-velocity motion model from the last two poses.

    Args:
        max_gap_s: longest gap between two poses of one motion.
    """

    def __init__(self, max_gap_s: float) -> None:
        self._max_gap_ns = int(max_gap_s * 1e9)
        self._last: list[tuple[int, Matrix]] = []

    def observe(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Add a pose; a gap or a jump starts a new motion."""
        if self._last and not 0 < stamp_ns - self._last[-1][0] <= self._max_gap_ns:
            self.reset()
        if self._last and jumped(self._last[-1][1], T_map_camera):
            self.reset()  # relocalized elsewhere: the difference is not a motion
        self._last = [*self._last[-1:], (stamp_ns, T_map_camera)]

    def predict(self, stamp_ns: int) -> Matrix | None:
        """Return the pose at a later time, or None without a recent pose."""
        if not self._last or not 0 < stamp_ns - self._last[-1][0] <= self._max_gap_ns:
            return None
        (t1, T1) = self._last[-1]
        if len(self._last) == 1:
            return T1
        (t0, T0) = self._last[0]
        share = (stamp_ns - t1) / (t1 - t0)
        step = inverse_pose(T0) @ T1
        return T1 @ make_pose(so3_exp(share * so3_log(step[:3, :3])), share * step[:3, 3])

    def reset(self) -> None:
        """Drop all poses."""
        self._last = []


@dataclass(frozen=True)
class TrackSettings:
    """Conditions for accepting a pose that was aligned from the predicted one alone."""

    check_period: int = 10
    """Frames between two checks by a coarse pose."""
    max_correction_m: float = 0.15
    max_correction_deg: float = 6.0
    """A correction of the prediction by more than either limit is not a camera motion, or the alignment is wrong."""
    max_cost_ratio: float = 1.5
    """Largest ratio of the alignment's cost to that at the last check."""


class Track:
    """Track: permission to align the next frame from the predicted pose alone.

    A track begins with an alignment that agrees with its frame's coarse pose. It ends with any contradiction. A coarse
    pose, which is independent of earlier poses, must confirm it every few frames; so a wrong place that looks right
    cannot persist.
    """

    def __init__(self, settings: TrackSettings | None = None) -> None:
        self._settings = settings or TrackSettings()
        self._checked_cost: float | None = None
        self._unchecked = 0

    @property
    def holds(self) -> bool:
        """True if there is a track whose next check is not due yet."""
        return self._checked_cost is not None and self._unchecked + 1 < self._settings.check_period

    def check(self, alignment: Alignment, coarse: CoarsePose) -> bool:
        """Begin or continue the track if an alignment agrees with its frame's coarse pose, else end it.

        Returns:
            True if the two agree.
        """
        agree = agrees(alignment, coarse)
        self._checked_cost, self._unchecked = (alignment.final_cost, 0) if agree else (None, 0)
        return agree

    def contradiction(self, alignment: Alignment, predicted: Matrix) -> str:
        """Return the reason against an alignment from the predicted pose, or an empty string; update the track."""
        s = self._settings
        limit = (self._checked_cost or 0.0) * s.max_cost_ratio
        reason = alignment.reason
        if alignment.success and alignment.T_map_camera is not None:
            moved = inverse_pose(predicted) @ alignment.T_map_camera
            moved_m, moved_deg = float(np.linalg.norm(moved[:3, 3])), rotation_angle_deg(moved[:3, :3])
            if moved_m > s.max_correction_m or moved_deg > s.max_correction_deg:
                reason = f"the prediction was wrong by {moved_m:.2f} m and {moved_deg:.1f} deg"
            elif alignment.final_cost > limit:
                reason = f"the image looks less like the map than before (cost {alignment.final_cost:.3f})"
        if reason:
            self.end()
        else:
            self._unchecked += 1
        return reason

    def end(self) -> None:
        """End the track; the next frame needs a coarse pose."""
        self._checked_cost, self._unchecked = None, 0


def agrees(alignment: Alignment, coarse: CoarsePose) -> bool:
    """Return true if an alignment lies within the covariance of a coarse pose."""
    if not (alignment.success and coarse.success):
        return False
    if alignment.T_map_camera is None or coarse.T_map_camera is None or coarse.covariance is None:
        return False
    own = np.zeros((6, 6)) if alignment.covariance is None else alignment.covariance
    aligned = UncertainPose(alignment.T_map_camera, own)
    return UncertainPose(coarse.T_map_camera, coarse.covariance).chi2(aligned) <= CHI2_6_999


CERTAIN_CONFIDENCE = 0.7
"""Confidence from which a first pose counts without others that agree."""
FIRST_POSES_S = 5.0
"""Longest time between poses of one chain, in seconds."""
AGREE_M, AGREE_DEG = 0.25, 15.0
SPEED_M_S, SPEED_DEG_S = 2.0, 90.0
MAX_AGREE_M, MAX_AGREE_DEG = 1.0, 90.0
"""Two poses of a chain differ at most by the first, plus the way at the second, and never by more than the third."""


class FirstPoses:
    """Chain of poses since the last one that contradicted them; the first ones are tentative.

    Args:
        needed: number of agreeing poses from which all are committed; 1: every pose is.
    """

    def __init__(self, needed: int) -> None:
        self._needed = needed
        self._last: tuple[int, Matrix] | None = None
        self._count = 0

    def missing(self, stamp_ns: int, T_map_camera: Matrix, confidence: float) -> int:
        """Add a pose (4, 4); return the number of agreeing poses that it still lacks, 0 if it is committed."""
        last, self._last = self._last, (stamp_ns, T_map_camera)
        if last is None or not self._agree(last, stamp_ns, T_map_camera):
            self._count = 0
        self._count = self._needed if confidence >= CERTAIN_CONFIDENCE else min(self._count + 1, self._needed)
        return self._needed - self._count

    def reset(self) -> None:
        """Begin a new chain with the next pose."""
        self._last, self._count = None, 0

    @staticmethod
    def _agree(last: tuple[int, Matrix], stamp_ns: int, T: Matrix) -> bool:
        elapsed_s = 1e-9 * (stamp_ns - last[0])
        if not 0.0 < elapsed_s <= FIRST_POSES_S:
            return False
        limit_m = min(AGREE_M + SPEED_M_S * elapsed_s, MAX_AGREE_M)
        return not is_farther(last[1], T, limit_m, min(AGREE_DEG + SPEED_DEG_S * elapsed_s, MAX_AGREE_DEG))


LEAST_SUPPORT = 2.0
"""Support by the points' own matches below which a pose is not TRACKING, in standard deviations: as many points agree
with one wrong pose of 44 by chance. Good frames of five maps have 1.0 and more, of four of them 4.2 and more."""
FEW_BLOCKS = 7
"""Number of matching blocks of the image, of 48, below which a pose is not TRACKING if most others do not match."""
HELD_S, CONFIRMED_POSES, CONFIRMED_S = 1.0, 3, 2.0
"""This session's points may stand in for the map's up to the first time after a pose that the map confirmed, if as many
have been within the last: a single one may be wrong."""


class Support:
    """Support of poses by the map's points, or for a moment by this session's points in their place."""

    def __init__(self) -> None:
        self._confirmed: deque[tuple[int, Matrix]] = deque(maxlen=CONFIRMED_POSES)
        """Stamps and poses of the last images whose poses the map itself confirmed."""

    def judged(self, estimate: PoseEstimate, blocks: BlockMatch | None, is_certain: bool) -> PoseEstimate:
        """Return the estimate; DEGRADED if the points' own matches speak against it, or little of the image is for it.

        Args:
            estimate: aligned estimate.
            blocks: agreement of the image with the map at its pose, by blocks.
            is_certain: true if the map's points and this session's together make the pose certain, which is enough for
                a moment after poses that the map confirmed.
        """
        alignment, reason = estimate.alignment, ""
        if alignment is None or estimate.state is not TrackingState.TRACKING:
            return estimate
        if alignment.map_support < LEAST_SUPPORT:
            reason = (
                "hardly more points find themselves where the pose has them than at a wrong pose: by "
                f"{alignment.map_support:.1f} standard deviations, and {LEAST_SUPPORT:g} are needed"
            )
        elif blocks is not None and blocks.matching < FEW_BLOCKS and blocks.matching_share < 0.5:
            reason = f"only {blocks.matching} parts of the image match the map at the pose, and {blocks.blocks} should"
        if not reason:
            return estimate
        if is_certain and self._goes_on(estimate):
            return replace(estimate, held=True)
        return replace(estimate, state=TrackingState.DEGRADED, reason=reason)

    def observe(self, estimate: PoseEstimate) -> None:
        """Add a judged pose; one that is held only, or not TRACKING, confirms nothing."""
        if estimate.state is TrackingState.TRACKING and not estimate.held and estimate.T_map_camera is not None:
            self._confirmed.append((estimate.stamp_ns, estimate.T_map_camera))

    def reset(self) -> None:
        """Forget the last poses."""
        self._confirmed.clear()

    def _goes_on(self, estimate: PoseEstimate) -> bool:
        """Return true if a pose goes on from the last ones that the map confirmed, a moment ago."""
        T = estimate.T_map_camera
        if T is None or len(self._confirmed) < CONFIRMED_POSES:
            return False
        first_s, last_s = (1e-9 * (estimate.stamp_ns - self._confirmed[k][0]) for k in (0, -1))
        return 0.0 < last_s <= HELD_S and first_s <= CONFIRMED_S and not jumped(self._confirmed[-1][1], T)


@dataclass(frozen=True)
class RivalSettings:
    """Conditions under which images decide between a submap and another one that looks like it."""

    apart_m: float = 0.1
    apart_deg: float = 5.0
    """An image counts if its view differs from the last one that counted by more than either limit."""
    margin: float = 1.25
    """Ratio of the costs of two submaps at which an image counts as one, for or against; no image counts more."""
    refuted: float = 3.0
    """Images, counted so, from which a rival is dropped."""
    taken_over: float = -2.0
    """Images from which the rival is the place."""


class Rivals:
    """Submaps that fitted the first image too, with the evidence of the images since, for and against each of them."""

    def __init__(self, settings: RivalSettings | None = None) -> None:
        self._settings = settings or RivalSettings()
        self._moves: dict[int, Matrix] = {}
        self._evidence: dict[int, float] = {}
        self._view: Matrix | None = None

    def begin(self, chosen: Matrix, rivals: Sequence[tuple[int, Alignment]]) -> None:
        """Begin with the pose (4, 4) of the first image in the chosen submap, and its alignments in others."""
        self.end()
        for submap, alignment in rivals:
            if alignment.T_map_camera is not None:
                self._moves[submap] = alignment.T_map_camera @ inverse_pose(chosen)
                self._evidence[submap] = 0.0

    def end(self) -> None:
        """Drop all rivals."""
        self._moves, self._evidence, self._view = {}, {}, None

    def weigh(self, T: Matrix, cost: float, align: Callable[[int, Matrix], Alignment]) -> tuple[int, Alignment] | None:
        """Count an image for or against every rival.

        Args:
            T: pose (4, 4) of the image in the chosen submap.
            cost: cost of its alignment there.
            align: returns the alignment in a submap from a starting pose.

        Returns:
            The rival that the images have decided for, with the image's alignment there; None: they have not.
        """
        s = self._settings
        if not self._moves or (self._view is not None and not is_farther(self._view, T, s.apart_m, s.apart_deg)):
            return None
        self._view = T
        for submap, move in list(self._moves.items()):
            found = align(submap, move @ T)
            ratio = found.final_cost / max(cost, 1e-9) if found.success else s.margin
            self._evidence[submap] += float(np.clip(np.log(max(ratio, 1e-9)) / np.log(s.margin), -1.0, 1.0))
            if self._evidence[submap] >= s.refuted:
                del self._moves[submap], self._evidence[submap]
            elif self._evidence[submap] <= s.taken_over and found.success:
                self.end()
                return submap, found
        return None

    @property
    def likelier(self) -> int | None:
        """Submap that the images so far fit better than the chosen one; None if there is none."""
        worst = min(self._evidence, key=lambda submap: self._evidence[submap], default=None)
        return worst if worst is not None and self._evidence[worst] < 0.0 else None


_ROWS_APART = 60
"""Rows between those that are compared first: they tell most images from the last one."""


class RepeatGuard:
    """Detector of a camera that repeats its last image with new stamps.

    Args:
        limit_s: time after which a repeated image is no new image; 0: never.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._image: NDArray[np.uint8] | None = None
        self._since_ns = self._stamp_ns = 0

    def fault(self, image: NDArray[np.uint8], stamp_ns: int) -> str:
        """Return the reason why an image (H, W, 3) is a repeated one, or an empty string; equal for all calls of one
        stamp.
        """
        if self._limit_s == 0.0:
            return ""
        last = self._image if stamp_ns >= self._stamp_ns else None
        repeated = last is not None and all(np.array_equal(image[::n], last[::n]) for n in (_ROWS_APART, 1))
        if not repeated:
            self._image, self._since_ns = image, stamp_ns
        self._stamp_ns = stamp_ns
        repeated_s = 1e-9 * (stamp_ns - self._since_ns)
        if repeated_s <= self._limit_s:
            return ""
        return f"the camera repeats one image, byte for byte, for {repeated_s:.1f} s (max_repeat_s {self._limit_s:g})"
