# SPDX-License-Identifier: Apache-2.0
"""Watch over a recording for a map while it is made: blur, speed, coverage, loops, and when it is enough."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.types import Matrix

Gray = NDArray[np.uint8]
WIDTH_PX = 320
"""Images are looked at in this width."""
_CELL_M = 1.0
_HEADINGS = 8


@dataclass(frozen=True)
class WatchSettings:
    """Limits of a good recording."""

    min_duration_s: float = 30.0
    min_keyframes: int = 40
    blur_ratio: float = 0.4
    """An image is blurred if it has this share of the sharpness that is usual in the recording, or less."""
    max_flow: float = 0.8
    """Image motion, in image widths a second, beyond which the walk is too fast."""
    min_sharp_share: float = 0.8
    keyframe_share: float = 0.5
    """A keyframe is taken when fewer of the last one's points are still seen."""
    loop_gap_s: float = 15.0
    """A view of an earlier keyframe closes a loop if it is this much older."""
    loop_inliers: int = 25
    min_loop_share: float = 0.6
    """Share of the way that must lie in loops: an open end drifts."""
    min_heading_share: float = 0.4
    """Share of the directions that must have been seen at the places visited, where poses are known."""


@dataclass(frozen=True)
class WatchReport:
    """State of a recording."""

    images: int
    duration_s: float
    sharp_share: float
    fast_share: float
    keyframes: int
    loops: int
    loop_share: float
    """Share of the way, in keyframes, that lies in loops."""
    cells: int
    """Places of 1 m visited; 0 without poses."""
    heading_share: float
    """Share of eight directions seen at them; NaN without poses."""
    missing: tuple[str, ...]
    """What to do until it is enough, one sentence each; empty if it is."""

    @property
    def is_enough(self) -> bool:
        """True if nothing is missing."""
        return not self.missing

    @property
    def line(self) -> str:
        """How the recording is going, and what is missing first."""
        state = (
            f"{self.duration_s:.0f} s, {self.images} images, {self.keyframes} views, {self.loops} loops, "
            f"{100 * self.sharp_share:.0f} % sharp"
        )
        return f"{state}. It is enough." if self.is_enough else f"{state}. {self.missing[0]}"


@dataclass(frozen=True, eq=False)
class _Keyframe:
    stamp_ns: int
    thumbnail: NDArray[np.float32]
    points: NDArray[np.float32]
    descriptors: NDArray[np.uint8] | None


@dataclass
class _Counts:
    images: int = 0
    sharp: int = 0
    fast: int = 0
    first_ns: int = 0
    last_ns: int = 0
    loops: list[tuple[int, int]] = field(default_factory=list)
    seen: dict[tuple[int, int], set[int]] = field(default_factory=dict)


class RecordingWatch:
    """Watch over the images of a recording, in the order taken; some milliseconds an image.

    Keyframes are taken by how many points of the last one are still tracked. A loop is closed by ORB matches with an
    older keyframe that one epipolar geometry explains.
    """

    def __init__(self, settings: WatchSettings | None = None) -> None:
        self._settings = settings or WatchSettings()
        self._orb = cv2.ORB.create(nfeatures=500)
        self._matcher = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True)
        self._counts = _Counts()
        self._usual: deque[float] = deque(maxlen=150)
        self._keyframes: list[_Keyframe] = []
        self._before: Gray | None = None
        self._tracked = np.zeros((0, 1, 2), np.float32)
        self._started = 1

    def add(self, stamp_ns: int, image: NDArray[np.uint8], T_world_camera: Matrix | None = None) -> str:
        """Add an image; return what the user should do differently now, or an empty string.

        Args:
            stamp_ns: stamp of the image; one that is not later than the last is ignored.
            image: (H, W, 3) RGB or (H, W).
            T_world_camera: (4, 4) optical pose in any frame with z up, such as odometry's; None if it is unknown.
        """
        counts = self._counts
        if counts.images and stamp_ns <= counts.last_ns:
            return ""
        elapsed_s = 1e-9 * (stamp_ns - counts.last_ns) if counts.images else 0.0
        counts.first_ns = counts.first_ns or stamp_ns
        counts.images, counts.last_ns = counts.images + 1, stamp_ns
        gray = _small(image)
        is_sharp = self._is_sharp(gray)
        flow = self._track(gray)
        is_fast = elapsed_s > 0.0 and flow / elapsed_s > self._settings.max_flow
        counts.sharp += is_sharp
        counts.fast += is_fast
        if is_sharp and len(self._tracked) < self._settings.keyframe_share * self._started:
            self._take_keyframe(stamp_ns, gray)
        self._before = gray
        if T_world_camera is not None:
            forward, (x, y) = T_world_camera[:3, 2], T_world_camera[:2, 3]
            cell = math.floor(x / _CELL_M), math.floor(y / _CELL_M)
            heading = round(math.atan2(forward[1], forward[0]) / (2 * math.pi) * _HEADINGS) % _HEADINGS
            counts.seen.setdefault(cell, set()).add(heading)
        if is_fast:
            return "Slower: the image moves too fast."
        return "" if is_sharp else "Blurred: move more slowly, or give more light."

    def report(self) -> WatchReport:
        """Return the state of the recording."""
        counts, s = self._counts, self._settings
        images = max(counts.images, 1)
        duration_s = 1e-9 * (counts.last_ns - counts.first_ns)
        in_loops = np.zeros(max(len(self._keyframes) - 1, 0), dtype=bool)
        for first, last in counts.loops:
            in_loops[first:last] = True
        loop_share = float(in_loops.mean()) if len(in_loops) else 0.0
        headings = [len(seen) / _HEADINGS for seen in counts.seen.values()]
        heading_share = float(np.mean(headings)) if headings else math.nan
        sharp_share, fast_share = counts.sharp / images, counts.fast / images
        missing = []
        if duration_s < s.min_duration_s:
            missing.append(f"Go on: {duration_s:.0f} of {s.min_duration_s:.0f} s.")
        if len(self._keyframes) < s.min_keyframes:
            missing.append(f"Show more: {len(self._keyframes)} of {s.min_keyframes} different views.")
        if sharp_share < s.min_sharp_share:
            missing.append(f"Only {100 * sharp_share:.0f} % of the images are sharp; move more slowly.")
        if loop_share < s.min_loop_share:
            missing.append(
                f"Return to where you began: {100 * loop_share:.0f} % of the way lies in loops, "
                f"{100 * s.min_loop_share:.0f} % should."
            )
        if heading_share < s.min_heading_share:  # not, if it is unknown
            missing.append(
                f"Look the other way, too: {100 * heading_share:.0f} % of the directions were seen at the places "
                f"visited, {100 * s.min_heading_share:.0f} % should."
            )
        return WatchReport(
            counts.images, duration_s, sharp_share, fast_share, len(self._keyframes), len(counts.loops), loop_share,
            len(counts.seen), heading_share, tuple(missing),
        )  # fmt: skip

    def _is_sharp(self, gray: Gray) -> bool:
        """Judge the share of fine detail against what is usual in this recording."""
        smooth = cv2.GaussianBlur(gray, (0, 0), 2.0)
        fine = float(cv2.Laplacian(gray, cv2.CV_32F).var())
        coarse = float(cv2.Laplacian(smooth, cv2.CV_32F).var())
        detail = fine / (coarse + 1.0)
        self._usual.append(detail)
        return detail > self._settings.blur_ratio * float(np.quantile(self._usual, 0.75))

    def _track(self, gray: Gray) -> float:
        """Follow the keyframe's points into this image; return their median motion in image widths."""
        if self._before is None or not len(self._tracked) or self._before.shape != gray.shape:
            self._tracked = self._tracked[:0]
            return 0.0
        after, found, _ = cv2.calcOpticalFlowPyrLK(
            self._before, gray, self._tracked, None, winSize=(15, 15), maxLevel=3
        )
        inside = (after >= 0).all(axis=2) & (after < [gray.shape[1], gray.shape[0]]).all(axis=2)
        kept = (found.reshape(-1) == 1) & inside.reshape(-1)
        moved = np.linalg.norm((after - self._tracked).reshape(-1, 2)[kept], axis=1)
        self._tracked = after[kept].reshape(-1, 1, 2)
        return float(np.median(moved)) / gray.shape[1] if len(moved) else 0.0

    def _take_keyframe(self, stamp_ns: int, gray: Gray) -> None:
        corners = cv2.goodFeaturesToTrack(gray, 200, 0.01, 6)
        self._tracked = np.zeros((0, 1, 2), np.float32) if corners is None else corners.astype(np.float32)
        self._started = max(len(self._tracked), 1)
        features, descriptors = self._orb.detectAndCompute(gray, None)
        points = np.array([item.pt for item in features], np.float32).reshape(-1, 2)
        thumbnail = cv2.resize(gray, (16, 12), interpolation=cv2.INTER_AREA).astype(np.float32)
        thumbnail = (thumbnail - thumbnail.mean()) / (thumbnail.std() + 1e-3)
        taken = _Keyframe(stamp_ns, thumbnail, points, descriptors)
        loop = self._loop(taken)
        self._keyframes.append(taken)
        if loop is not None:
            self._counts.loops.append((loop, len(self._keyframes) - 1))

    def _loop(self, new: _Keyframe) -> int | None:
        """Return the oldest earlier keyframe that shows the same scene, or None."""
        limit_ns = new.stamp_ns - int(self._settings.loop_gap_s * 1e9)
        older = [k for k, keyframe in enumerate(self._keyframes) if keyframe.stamp_ns <= limit_ns]
        alike = sorted(older, key=lambda k: -float((self._keyframes[k].thumbnail * new.thumbnail).mean()))[:8]
        return next((k for k in sorted(alike) if self._matches(self._keyframes[k], new)), None)

    def _matches(self, a: _Keyframe, b: _Keyframe) -> bool:
        if a.descriptors is None or b.descriptors is None:
            return False
        pairs = [match for match in self._matcher.match(a.descriptors, b.descriptors) if match.distance < 60]
        if len(pairs) < self._settings.loop_inliers:
            return False
        left = np.array([a.points[match.queryIdx] for match in pairs])
        right = np.array([b.points[match.trainIdx] for match in pairs])
        _, inliers = cv2.findFundamentalMat(left, right, cv2.FM_RANSAC, 1.5, 0.999, 500)
        return inliers is not None and int(inliers.sum()) >= max(self._settings.loop_inliers, 0.4 * len(pairs))


def _small(image: NDArray[np.uint8]) -> Gray:
    gray = image if image.ndim == 2 else cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    if gray.shape[1] <= WIDTH_PX:
        return np.ascontiguousarray(gray)
    height = max(round(gray.shape[0] * WIDTH_PX / gray.shape[1]), 1)
    return np.asarray(cv2.resize(gray, (WIDTH_PX, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)
