# SPDX-License-Identifier: Apache-2.0
"""Poses through images that neither the map nor this session's points explain: by optical flow, else by the motion.

A pose that is carried on so is no measurement in the map. It says where the camera must be by now, and how far off that
may be; it starts the next alignments, and it ends where its standard deviation is no longer of use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import map_frame_covariance
from kfloc_ros.geometry.lie import Matrix, inverse_pose, jumped, make_pose, so3_exp, so3_log
from kfloc_ros.kfnet.pnp import absolute_pose
from kfloc_ros.pixloc.cost import NEAR_M, projection_jacobian
from kfloc_ros.types import Frame

Doubles = NDArray[np.float64]
UsualDepth = Callable[[Doubles, Matrix], float]
"""Returns the usual depth, in metres, of pixels (N, 2) in an image with a pose (4, 4)."""


@dataclass(frozen=True)
class MotionSettings:
    """Model of a motion: velocities that are forgotten, driven by noise (an Ornstein-Uhlenbeck process).

    The times are those that predict three recordings of hand-held cameras best over 0.3 to 3 s; see
    docs/results/second-visit.md.
    """

    forget_s: float = 0.7
    """Time after which a velocity has decreased to 37 %."""
    window_s: float = 0.35
    """Time over which velocities are measured."""
    memory_s: float = 3.0
    """Time over which the usual speed is measured."""
    usual_m_s: float = 0.25
    usual_deg_s: float = 30.0
    """Speeds (root mean square) of a camera in the hand: a calm one may begin to move at any time."""


class FadingMotion:
    """Motion model whose velocity fades, with the covariance of its prediction.

    The stationary variance of the velocity is that of the motion seen in the last seconds, but at least the usual one.

    Args:
        max_gap_s: longest gap between two poses of one motion.
        settings: model; None: the defaults.
    """

    def __init__(self, max_gap_s: float, settings: MotionSettings | None = None) -> None:
        self._settings, self._max_gap_ns = settings or MotionSettings(), round(1e9 * max_gap_s)
        self._poses: deque[tuple[int, Matrix]] = deque()
        self._seen_s, self._squares = 0.0, np.zeros(2)

    def reset(self) -> None:
        """Forget the poses; the usual speed stays that of this camera."""
        self._poses.clear()

    def observe(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Add a pose (4, 4), or replace the last one of this time; a gap or a jump starts a new motion."""
        if self._poses and self._poses[-1][0] == stamp_ns:
            self._poses.pop()
        if self._poses:
            passed_ns = stamp_ns - self._poses[-1][0]
            if not 0 < passed_ns <= self._max_gap_ns or jumped(self._poses[-1][1], T_map_camera):
                self._poses.clear()
        self._poses.append((stamp_ns, T_map_camera))
        while len(self._poses) > 2 and stamp_ns - self._poses[1][0] >= 1e9 * self._settings.window_s:
            self._poses.popleft()
        if len(self._poses) > 1:
            passed_s = 1e-9 * (stamp_ns - self._poses[-2][0])
            kept = np.exp(-passed_s / self._settings.memory_s)
            squares = [float(v @ v) for v in self._velocity()]
            self._squares = kept * self._squares + passed_s * np.array(squares)
            self._seen_s = kept * self._seen_s + passed_s

    def predict(self, stamp_ns: int) -> tuple[Matrix, Matrix] | None:
        """Return the pose (4, 4) at a later time, and the covariance (6, 6) that is added to the last pose's."""
        if not self._poses or stamp_ns <= self._poses[-1][0]:
            return None
        s, T = self._settings, self._poses[-1][1]
        ages = 1e-9 * (stamp_ns - self._poses[-1][0]) / s.forget_s
        way_s = s.forget_s * (1.0 - np.exp(-ages))
        velocity, turn = self._velocity()
        moved = make_pose(so3_exp(way_s * turn) @ T[:3, :3], T[:3, 3] + way_s * velocity)
        usual = np.array([s.usual_m_s, np.radians(s.usual_deg_s)]) ** 2
        per_axis = np.maximum(usual, self._squares / max(self._seen_s, 1e-9)) / 3.0
        spread = 2.0 * (ages - 1.0 + np.exp(-ages))
        if len(self._poses) > 1:  # the velocity is known at first
            spread -= (1.0 - np.exp(-ages)) ** 2
        return moved, np.diag(np.repeat(s.forget_s**2 * spread * per_axis, 3))

    def _velocity(self) -> tuple[Doubles, Doubles]:
        """Return the velocity (3,), m/s, and the rate of turn (3,), rad/s, about the axes of the map."""
        if len(self._poses) < 2:
            return np.zeros(3), np.zeros(3)
        (t0, T0), (t1, T1) = self._poses[0], self._poses[-1]
        passed_s = 1e-9 * (t1 - t0)
        return (T1[:3, 3] - T0[:3, 3]) / passed_s, so3_log(T1[:3, :3] @ T0[:3, :3].T) / passed_s


@dataclass(frozen=True)
class FlowSettings:
    """Optical flow from image to image, by corners (pyramidal Lucas-Kanade)."""

    corners: int = 200
    quality: float = 0.01
    apart_px: float = 10.0
    """Number and quality of corners, and the smallest distance between two."""
    window_px: int = 31
    levels: int = 4
    """Window of a corner, and the number of times that the image is halved."""
    step_px: float = 0.1
    """Step below which a corner is not followed further: a small part of its standard deviation."""
    return_px: float = 1.5
    """Largest distance between a corner and where the flow leads back to."""
    max_error_px: float = 3.0
    """Inlier threshold of the reprojection error."""
    min_inliers: int = 15
    min_share: float = 0.5
    """Number and share of corners that a pose needs."""
    sigma_px: float = 1.5
    """Standard deviation of a corner's place."""
    depth_sigma: float = 0.5
    """Relative standard deviation of the usual depth. Depths of the map and of the session are those of what was in
    view before, and are often not what hides it now."""
    independent: float = 30.0
    """Largest number of corners that count as independent."""


@dataclass(eq=False)
class _Corners:
    """Corners of an image, with the points that they show."""

    pixels: Doubles
    """(N, 2)"""
    points: Doubles
    """(N, 3) metres, map frame; at the usual depth in the image in which they were new."""

    def __getitem__(self, kept: NDArray[np.bool_]) -> _Corners:
        return _Corners(self.pixels[kept], self.points[kept])


class FlowTracks:
    """Corners that are followed from an image with a pose through images without.

    Args:
        camera: pinhole camera of the images.
        settings: corners and conditions; None: the defaults.
    """

    def __init__(self, camera: Camera, settings: FlowSettings | None = None) -> None:
        self._camera, self._settings = camera, settings or FlowSettings()
        self._image: NDArray[np.uint8] | None = None
        self._corners: _Corners | None = None
        self._T = np.eye(4)
        self._way_m = 0.0

    def begin(self, image: NDArray[np.uint8], T_map_camera: Matrix) -> None:
        """Begin at an image (H, W, 3) with its pose (4, 4); nothing is computed before :meth:`follow`."""
        self._image, self._T, self._corners, self._way_m = image, T_map_camera, None, 0.0

    def reset(self) -> None:
        """Forget the image."""
        self._image = self._corners = None

    def follow(self, image: NDArray[np.uint8], usual_depth: UsualDepth) -> tuple[Matrix, Matrix] | None:
        """Return the pose (4, 4) of the next image (H, W, 3), and the covariance (6, 6) of the way since the first.

        None if too few corners are found again; then nothing more is followed. New corners have the usual depth.
        """
        if self._image is None:
            return None
        s = self._settings
        old, new = (cv2.cvtColor(i, cv2.COLOR_RGB2GRAY) if i.ndim == 3 else i for i in (self._image, image))
        corners = self._replenished(old, usual_depth)
        self._image = self._corners = None
        if corners is None or len(corners.pixels) < s.min_inliers:
            return None
        ends = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 30, s.step_px)
        window = {"winSize": (s.window_px, s.window_px), "maxLevel": s.levels, "criteria": ends}
        start = corners.pixels.astype(np.float32)[:, None]
        there, found, _ = cv2.calcOpticalFlowPyrLK(old, new, start, None, **window)  # type: ignore[call-overload]
        kept = found.ravel() == 1
        corners, start, there = corners[kept], start[kept], there[kept]
        if len(there) < s.min_inliers:
            return None
        back, found, _ = cv2.calcOpticalFlowPyrLK(new, old, there, None, **window)  # type: ignore[call-overload]
        kept = (np.linalg.norm((back - start)[:, 0], axis=1) < s.return_px) & (found.ravel() == 1)
        corners = _Corners(there[kept, 0].astype(np.float64), corners.points[kept])
        if kept.sum() < s.min_inliers:
            return None
        origin = self._T[:3, 3].copy()
        given = corners.pixels, corners.points - origin
        T_camera_local, inliers = absolute_pose(*given, self._camera, s.max_error_px, max_iterations=500)
        if inliers.sum() < max(s.min_inliers, s.min_share * len(inliers)):
            return None
        corners = corners[inliers]
        local = (corners.points - origin) @ T_camera_local[:3, :3].T + T_camera_local[:3, 3]
        J = projection_jacobian(torch.from_numpy(local), self._camera, 1.0).numpy().reshape(-1, 6)
        share = min(1.0, s.independent / len(local))
        covariance = map_frame_covariance(share * J.T @ J / s.sigma_px**2, T_camera_local)
        if covariance is None:
            return None
        T = inverse_pose(T_camera_local)
        T[:3, 3] += origin
        self._way_m += float(np.linalg.norm(T[:3, 3] - self._T[:3, 3]))
        self._image, self._corners, self._T = new, corners, T
        # A wrong depth makes the way too long or too short, and what is missing is taken for a turn.
        off_m, depth_m = s.depth_sigma * self._way_m, max(float(np.median(local[:, 2])), NEAR_M)
        return T, covariance + np.diag(np.repeat([off_m, off_m / depth_m], 3) ** 2)

    def _replenished(self, grey: NDArray[np.uint8], usual_depth: UsualDepth) -> _Corners | None:
        """Return the followed corners, and new ones where the image has others."""
        s, c, old = self._settings, self._camera, self._corners
        free = np.full(grey.shape, 255, dtype=np.uint8)
        if old is not None:
            for u, v in old.pixels:
                cv2.circle(free, (round(u), round(v)), round(s.apart_px), 0, -1)
        wanted = s.corners - (0 if old is None else len(old.pixels))
        found = None if wanted <= 0 else cv2.goodFeaturesToTrack(grey, wanted, s.quality, s.apart_px, mask=free)
        if found is None:
            return old
        pixels = found[:, 0].astype(np.float64)
        rays = np.stack([(pixels[:, 0] - c.cx) / c.fx, (pixels[:, 1] - c.cy) / c.fy, np.ones(len(pixels))], axis=1)
        points = usual_depth(pixels, self._T) * rays @ self._T[:3, :3].T + self._T[:3, 3]
        if old is not None:
            pixels, points = np.concatenate([old.pixels, pixels]), np.concatenate([old.points, points])
        return _Corners(pixels, points)


@dataclass(frozen=True, eq=False)
class BridgedPose:
    """Pose that neither the map nor this session's points confirm."""

    T_map_camera: Matrix
    covariance: Matrix
    by_flow: bool
    """True if the image's optical flow gave it; false if only the motion model did."""
    since_s: float
    """Time since the last pose."""
    is_blind: bool = False
    """True if the image shows too little to be found anywhere."""


@dataclass(frozen=True)
class BridgeSettings:
    """Limits of a bridge."""

    max_sigma_deg: float = 20.0
    """Largest standard deviation of the orientation about any axis."""
    reliable: float = 0.5
    blind_share: float = 0.5
    """Share of the reliable cells (above the first) of the last images with a pose, below which an image shows too
    little to be followed. One that shows more, and nothing of the image before, was taken elsewhere."""


class Bridge:
    """Poses from one pose to the next through images that have none.

    Args:
        camera: pinhole camera of the images.
        max_gap_s: longest gap between two images of one motion.
        longest_s: longest time without a pose; 0: nothing is bridged.
        max_sigma_m: largest standard deviation of a position in any direction.
    """

    def __init__(self, camera: Camera, max_gap_s: float, longest_s: float, max_sigma_m: float) -> None:
        self._settings, self._longest_ns, self._max_sigma_m = BridgeSettings(), 1e9 * longest_s, max_sigma_m
        self._motion, self._tracks, self._max_gap_ns = FadingMotion(max_gap_s), FlowTracks(camera), 1e9 * max_gap_s
        self._pose_ns, self._seen_ns, self._reliable = 0, 0, 0.0
        self._last: Matrix | None = None
        """Covariance of the last pose that the motion model knows."""
        self._begun = np.zeros((6, 6))
        """Covariance of the pose at which the tracks began."""
        self._of_image: tuple[int, BridgedPose | None] = (0, None)

    def reset(self) -> None:
        """Forget everything."""
        self._motion.reset()
        self._end()

    def observe(self, frame: Frame, reliability: torch.Tensor, T_map_camera: Matrix, covariance: Matrix) -> None:
        """Add an image with a pose (4, 4) and its covariance (6, 6), and the reliability (h, w) of its cells."""
        self._motion.observe(frame.stamp_ns, T_map_camera)
        self._tracks.begin(frame.image, T_map_camera)
        self._reliable += (1.0 if self._last is None else 0.5) * (self._count(reliability) - self._reliable)
        self._last = self._begun = covariance
        self._pose_ns = self._seen_ns = frame.stamp_ns

    def shows_enough(self, reliability: torch.Tensor) -> bool:
        """Return true unless an image shows too little to be found anywhere, against the last images with a pose."""
        return self._last is None or self._count(reliability) > self._settings.blind_share * self._reliable

    def pose(self, stamp_ns: int) -> BridgedPose | None:
        """Return the result of :meth:`carry` for an image, if it was called for it."""
        return self._of_image[1] if self._of_image[0] == stamp_ns else None

    def carry(self, frame: Frame, reliability: torch.Tensor, usual_depth: UsualDepth) -> BridgedPose | None:
        """Return the pose of an image that has none otherwise; None if it is no longer known. Once an image.

        Args:
            frame: the image.
            reliability: (h, w) of its cells.
            usual_depth: returns the usual depth in earlier images.
        """
        if self._of_image[0] != frame.stamp_ns:
            bridged = self._carried(frame, reliability, usual_depth)
            if bridged is None:
                self._end()
            self._of_image = frame.stamp_ns, bridged
        return self._of_image[1]

    def _carried(self, frame: Frame, reliability: torch.Tensor, usual_depth: UsualDepth) -> BridgedPose | None:
        passed_ns, seen_ns = frame.stamp_ns - self._pose_ns, frame.stamp_ns - self._seen_ns
        if self._last is None or not 0 < passed_ns <= self._longest_ns or not 0 < seen_ns <= self._max_gap_ns:
            return None
        self._seen_ns, since_s = frame.stamp_ns, 1e-9 * passed_ns
        is_blind, followed = not self.shows_enough(reliability), self._tracks.follow(frame.image, usual_depth)
        if followed is not None:
            T, self._last = followed[0], self._begun + followed[1]
            self._motion.observe(frame.stamp_ns, T)
            bridged = BridgedPose(T, self._last, True, since_s, is_blind)
        else:
            predicted = self._motion.predict(frame.stamp_ns)
            if predicted is None or not is_blind:
                return None
            bridged = BridgedPose(predicted[0], self._last + predicted[1], False, since_s, is_blind)
            self._tracks.begin(frame.image, predicted[0])
            self._begun = bridged.covariance
        variances = [float(np.linalg.eigvalsh(bridged.covariance[k, k])[-1]) for k in (slice(3), slice(3, 6))]
        limits = self._max_sigma_m**2, np.radians(self._settings.max_sigma_deg) ** 2
        return bridged if variances[0] <= limits[0] and variances[1] <= limits[1] else None

    def _count(self, reliability: torch.Tensor) -> int:
        return int((reliability > self._settings.reliable).sum())

    def _end(self) -> None:
        self._tracks.reset()
        self._last = None
