# SPDX-License-Identifier: Apache-2.0
"""Collection of poor frames with good poses: what a map lacks, as a source for its next update.

A frame is poor if its pose is not certain: DEGRADED or LOST, of low confidence, or of a higher alignment cost than the
map's own views. Its pose is good if the certain frames around it confirm it: it lies on their path, or where odometry
from the first of them expects it. A short gap without a pose is bridged by that path, a longer one by odometry that
arrives at the second. The frames are written as a TUM sequence in the map's frame, which ``kfloc map update``
reads as it is, with some of the certain frames, which connect them.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from kfloc_ros.datasets.posed_images import CALIBRATION_FILE, read_calibration, write_calibration
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, interpolate, inverse_pose, rotation_angle_deg
from kfloc_ros.maps.files import appearing_file
from kfloc_ros.maps.place import AnyMap
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.poses import tum_text
from kfloc_ros.pixloc.references import view_distances
from kfloc_ros.types import Frame, PoseEstimate, TrackingState

POOR_CONFIDENCE, CERTAIN_CONFIDENCE = 0.8, 0.9
"""Confidence below which a frame is poor, and from which it is certain."""
MAX_GAP_S = 1.5
"""Longest time between two certain frames that confirm those between them."""
BRIDGED_S = 0.5
"""Longest time between two certain frames whose path gives poses to frames without one."""
CONFIRMED_M, CONFIRMED_DEG = 0.08, 4.0
"""Largest distance of a pose from the path of the certain frames around it."""
SPACING_M = 0.05
"""Smallest distance of collected frames, in metres (1 deg counts as 0.02 m)."""
MAX_WAITING = 60
DEPTH_UNITS_PER_M = 5000.0
"""Unit of depth images of TUM sequences."""


@dataclass(frozen=True, eq=False)
class _Seen:
    frame: Frame
    estimate: PoseEstimate
    expected: Matrix | None
    """Pose by odometry from the last certain frame; None if it is not known."""


class Collection:
    """Folder to which poor frames with good poses are written; nothing is written before the first one.

    Frames are offered in the order of their stamps. An existing collection of the same camera is continued.

    Args:
        folder: folder of the TUM sequence.
        max_mb: limit on the size of the folder, in megabytes; then nothing more is collected.
        max_cost: alignment cost above which a frame is poor; that of the map's calibration.

    Raises:
        SourceError: the folder contains something else.
    """

    def __init__(self, folder: Path, *, max_mb: float = 500.0, max_cost: float = float("inf")) -> None:
        self._folder, self._limit_bytes, self._max_cost = folder, 1e6 * max_mb, max_cost
        self._last: _Seen | None = None
        self._posed: tuple[Matrix, Matrix | None] | None = None
        """Pose of the last frame that had one, and its pose by odometry from the last certain frame."""
        self._waiting: deque[_Seen] = deque(maxlen=MAX_WAITING)
        self._poses: list[Matrix] = []
        self._stamps: set[str] = set()
        self._bytes = 0
        self.count = 0
        """Number of poor frames that were written."""
        self.problem = ""
        """Reason for which nothing more is collected; empty if there is none."""
        if folder.exists():
            self._continue()

    @property
    def text(self) -> str:
        """Sentence on what was collected."""
        if not self.count:
            return self.problem + "." if self.problem else "No poor frame with a confirmed pose was found to collect."
        frames = "poor frame" if self.count == 1 else "poor frames"
        more = f" Nothing more is collected: {self.problem}." if self.problem else ""
        return f"{self.count} {frames} with confirmed poses collected in '{self._folder}'.{more}"

    def _continue(self) -> None:
        lists = [self._folder / name for name in ("rgb.txt", CALIBRATION_FILE)]
        if any(self._folder.iterdir()) and not all(path.is_file() for path in lists):
            raise SourceError(f"'{self._folder}' is no collection of frames; give a new or an empty folder.")
        if lists[0].is_file():
            self._stamps = {line.split()[0] for line in lists[0].read_text().splitlines() if line.strip()}
        self._bytes = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())

    def offer(self, frame: Frame, estimate: PoseEstimate, predicted: Matrix | None = None) -> None:
        """Take note of a localized frame, and write the frames that it confirms.

        Args:
            frame: image of any camera; its depth is written, too.
            estimate: its result.
            predicted: pose (4, 4) predicted by odometry from the last frame with a pose; None if it is not known.
        """
        if self.problem:
            return
        expected = None
        if predicted is not None and self._posed is not None and self._posed[1] is not None:
            expected = self._posed[1] @ inverse_pose(self._posed[0]) @ predicted
        seen = _Seen(frame, estimate, expected)
        if estimate.T_map_camera is not None:
            certain = self._is_certain(estimate)
            self._posed = (estimate.T_map_camera, estimate.T_map_camera if certain else expected)
        if self._last is not None and not 0 < estimate.stamp_ns - self._last.estimate.stamp_ns < 1e9 * MAX_GAP_S:
            self._last = None
            self._waiting.clear()
        if not self._is_certain(estimate):
            if self._last is not None and self._is_poor(estimate):
                self._waiting.append(seen)
            return
        if self._last is not None and self._waiting:
            self._judge(self._last, seen)
        self._last = seen
        self._waiting.clear()

    def _is_poor(self, estimate: PoseEstimate) -> bool:
        if estimate.state is not TrackingState.TRACKING or estimate.alignment is None:
            return True
        sure = estimate.confidence is None or estimate.confidence >= POOR_CONFIDENCE
        return not sure or estimate.alignment.final_cost > self._max_cost

    def _is_certain(self, estimate: PoseEstimate) -> bool:
        sure = estimate.confidence is not None and estimate.confidence >= CERTAIN_CONFIDENCE
        return sure and not self._is_poor(estimate)

    def _judge(self, before: _Seen, after: _Seen) -> None:
        """Write the waiting frames whose poses two certain frames confirm, and those two."""
        first, last = before.estimate, after.estimate
        assert first.T_map_camera is not None and last.T_map_camera is not None
        gap_s = 1e-9 * (last.stamp_ns - first.stamp_ns)
        odometry = after.expected is not None and _is_near(after.expected, last.T_map_camera)
        found = False
        for seen in self._waiting:
            share = (seen.estimate.stamp_ns - first.stamp_ns) / (last.stamp_ns - first.stamp_ns)
            path = interpolate(first.T_map_camera, last.T_map_camera, share)
            T = seen.estimate.T_map_camera
            expected = seen.expected if odometry else None
            if T is None or not _is_near(T, path if expected is None else expected):
                T = expected if expected is not None else path if gap_s <= BRIDGED_S else None
            if T is not None and self._write(seen.frame, seen.estimate.stamp_ns, T):
                found = True
                self.count += 1
        if found:
            self._write(before.frame, first.stamp_ns, first.T_map_camera)
            self._write(after.frame, last.stamp_ns, last.T_map_camera)

    def _write(self, frame: Frame, stamp_ns: int, T_map_camera: Matrix) -> bool:
        """Write a frame unless one is near it; images first, so that no list names a missing one."""
        if self._poses and view_distances(np.stack(self._poses), T_map_camera).min() < SPACING_M:
            return False
        stamp = f"{stamp_ns // 10**9}.{stamp_ns % 10**9:09d}"
        if stamp in self._stamps or self.problem:
            return False
        images = {"rgb": np.ascontiguousarray(frame.image[..., ::-1])}
        if frame.depth_m is not None:
            images["depth"] = np.clip(np.rint(frame.depth_m * DEPTH_UNITS_PER_M), 0, 65535).astype(np.uint16)
        files = {kind: cv2.imencode(".png", image)[1].tobytes() for kind, image in images.items()}
        size = sum(map(len, files.values()))
        if self._bytes + size > self._limit_bytes:
            self.problem = f"'{self._folder}' has reached its limit of {self._limit_bytes / 1e6:g} MB"
            return False
        try:
            self._start(frame.camera)
            for kind, data in files.items():
                with appearing_file(self._folder / kind / f"{stamp}.png") as stream:
                    stream.write(data)
            _append(self._folder / "groundtruth.txt", tum_text([(stamp_ns, T_map_camera)]))
            for kind in reversed(files):  # the list of images comes last
                _append(self._folder / f"{kind}.txt", f"{stamp} {kind}/{stamp}.png\n")
        except (OSError, SourceError) as error:
            self.problem = f"'{self._folder}' cannot be written: {error}"
            return False
        self._stamps.add(stamp)
        self._poses.append(T_map_camera)
        self._bytes += size
        return True

    def _start(self, camera: Camera) -> None:
        """Write the camera, or check that it is that of the collection.

        Raises:
            SourceError: it is another camera.
        """
        path = self._folder / CALIBRATION_FILE
        self._folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_calibration(path, camera)
        elif read_calibration(path) != camera:
            raise SourceError(f"it has frames of another camera ({CALIBRATION_FILE})")


def cost_limit(loaded: AnyMap) -> float:
    """Return the alignment cost of a map above which its frames are poor; of a place, the largest there is."""
    return loaded.calibration.max_alignment_cost if isinstance(loaded, SceneMap) else float("inf")


def _is_near(a: Matrix, b: Matrix) -> bool:
    away_m = float(np.linalg.norm(a[:3, 3] - b[:3, 3]))
    return away_m < CONFIRMED_M and rotation_angle_deg(a[:3, :3].T @ b[:3, :3]) < CONFIRMED_DEG


def _append(path: Path, text: str) -> None:
    """Append a line in one write, so that an interruption leaves it whole or absent."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)
