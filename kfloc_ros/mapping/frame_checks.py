# SPDX-License-Identifier: Apache-2.0
"""Frame checks of a map build: frames with wrong stamps, jumping poses or blur are counted and left out."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import is_farther
from kfloc_ros.types import Frame, Matrix

NO_POSE, NO_RIGID_POSE = "without a pose", "with an invalid pose"
UNREADABLE = "that cannot be read"
STAMP, JUMP, BLUR, DEPTH = "with a wrong stamp", "whose pose jumps", "blurred", "with almost no depth"


def _second_difference(row: int, column: int) -> NDArray[np.float32]:
    kernel = np.zeros((3, 3), np.float32)
    kernel[1, 1] = -2.0
    kernel[1 + row, 1 + column] = kernel[1 - row, 1 - column] = 1.0
    return kernel


JUMP_M, JUMP_M_PER_S = 0.15, 2.0
JUMP_DEG, JUMP_DEG_PER_S = 10.0, 180.0
"""Fastest motion between the frames of a carried camera. Poses of photos can be faster, see ``VIDEO_PAIRS``."""
VIDEO_PAIRS, VIDEO_JUMPS = 10, 0.1
"""A source is a video if at least this many pairs of neighbours were checked, of which at most this share jumps."""
BLUR_RATIO = 0.3
"""Share of the usual detail below which an image is blurred."""
BLUR_WINDOW, BLUR_LEAST = 30, 8
"""Number of previous images that give the usual detail, and the fewest needed.

RedKitchen's frames have 0.42 to 1.5 times the detail of the previous ones; a blur of 13 pixels leaves 0.2.
"""
GREY_WIDTH_PX = 320
CONTRAST_SHARE = 0.01
_AXES = ((0, 1), (1, 0), (1, 1), (1, -1))
SECOND_DIFFERENCES = [_second_difference(*axis) for axis in _AXES]


class CheckedFrame(NamedTuple):
    """Frame that passed the checks, with its position in the source."""

    position: int
    frame: Frame


class FrameChecks:
    """Checks of one source's frames, in order; each check uses the previous and the next frame."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        """Number of frames left out, by reason."""
        self._pairs = self._jumps = 0
        self._detail: deque[float] = deque(maxlen=BLUR_WINDOW)

    def passing(self, frames: Iterator[tuple[int, Frame]]) -> Iterator[CheckedFrame]:
        """Yield the frames that pass, with their positions; one frame behind the input."""
        before: Frame | None = None
        held: CheckedFrame | None = None
        for position, frame in frames:
            if fault := _pose_fault(frame.T_map_camera):
                self.left_out[fault] += 1
                continue
            if held is not None and self._is_good(before, held.frame, frame):
                before = held.frame
                yield held
            held = CheckedFrame(position, frame)
        if held is not None and self._is_good(before, held.frame, None):
            yield held

    def _is_good(self, before: Frame | None, frame: Frame, after: Frame | None) -> bool:
        fault = self._fault(before, frame, after)
        if fault:
            self.left_out[fault] += 1
        return not fault

    def _fault(self, before: Frame | None, frame: Frame, after: Frame | None) -> str:
        if before is not None and frame.stamp_ns <= before.stamp_ns:
            return STAMP
        late = after is not None and frame.stamp_ns >= after.stamp_ns
        if late and after is not None and (before is None or before.stamp_ns < after.stamp_ns):
            return STAMP
        if before is not None and self._jumped(before, frame, after):
            return JUMP
        return BLUR if self._blurred(frame.image) else ""

    def _jumped(self, before: Frame, frame: Frame, after: Frame | None) -> bool:
        """Return True if a pose jumps away and back in an otherwise steady source; a lasting jump is no fault."""
        away = _jump(before, frame)
        self._pairs, self._jumps = self._pairs + 1, self._jumps + away
        steady = self._pairs >= VIDEO_PAIRS and self._jumps <= 1 + VIDEO_JUMPS * self._pairs
        if not (away and steady and after is not None):
            return False
        return _jump(frame, after) and not _jump(before, after)

    def _blurred(self, image: NDArray[np.uint8]) -> bool:
        detail = fine_detail(image)
        usual = float(np.median(self._detail)) if len(self._detail) >= BLUR_LEAST else 0.0
        self._detail.append(detail)
        return detail < BLUR_RATIO * usual


def fine_detail(image: NDArray[np.uint8]) -> float:
    """Return the ratio of fine detail of an image (H, W, 3) to that of its half-sized copy, in the direction with less.

    As a ratio, it is independent of texture and light. It is weighted with the share of total contrast, so that the
    noise that remains in a strongly blurred image does not count as detail.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    scale = min(1.0, GREY_WIDTH_PX / grey.shape[1])
    grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    half = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    ratios = []
    for kernel in SECOND_DIFFERENCES:
        fine, coarse = (float(cv2.filter2D(part, cv2.CV_32F, kernel).var()) for part in (grey, half))
        ratios.append(fine / (coarse + CONTRAST_SHARE * float(grey.var()) + 1e-6))
    return min(ratios)


def _pose_fault(T: Matrix | None) -> str:
    if T is None or not np.isfinite(T).all():
        return NO_POSE
    R = T[:3, :3]
    return "" if np.abs(R @ R.T - np.eye(3)).max() < 1e-2 and np.linalg.det(R) > 0 else NO_RIGID_POSE


def _jump(a: Frame, b: Frame) -> bool:
    assert a.T_map_camera is not None and b.T_map_camera is not None
    seconds = max(b.stamp_ns - a.stamp_ns, 0) / 1e9
    limits = JUMP_M + JUMP_M_PER_S * seconds, JUMP_DEG + JUMP_DEG_PER_S * seconds
    return is_farther(a.T_map_camera, b.T_map_camera, *limits)
