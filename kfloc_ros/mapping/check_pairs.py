# SPDX-License-Identifier: Apache-2.0
"""Pairs of images along a recording, with matched points: what a source's poses, calibration and depth are held to.

Pairs are chosen by the images alone, because the poses may be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.frames import FrameSource
from kfloc_ros.types import Frame, Matrix

Array = NDArray[np.float64]

WORKING_SIDE_PX = 640
"""Longer side of the images that features are found in; smaller images stay as they are."""
FEATURES = 900
RATIO = 0.85
"""A match counts if it is closer than this share of the second-best one (Lowe's ratio test)."""
MIN_MATCHES = 40
USED_MATCHES = 150
OUTLIER_PX = 2.0
"""Sampson distance from the pair's own fundamental matrix, in the working image."""
MOTION = (0.06, 0.22)
"""Median motion of the points between the two images that is aimed at, as a share of the image's longer side."""
LEAST_MOTION = 0.01
"""Motion below which two images tell nothing of poses and depth."""
TRIES = 3
REACH = 6
"""Frames on either side of an image whose poses are tried for it."""
DEPTH_EDGE = 0.04
"""Depth counts at a pixel if its 3x3 neighbours differ by no more than this share."""


@dataclass(frozen=True, eq=False)
class View:
    """One image of a pair, small and grey, and its features."""

    position: int
    frame: Frame
    grey: NDArray[np.uint8]
    pixels: Array
    """(N, 2) positions of the features in the full image."""
    descriptors: NDArray[np.float32]
    """(N, 128), RootSIFT."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two views and the points that were matched between them, outliers left out."""

    first: View
    second: View
    pixels: tuple[Array, Array]
    """(N, 2) in the full images."""
    depths_m: tuple[Array, Array]
    """(N,) depth at the pixels, NaN where unknown."""
    motion: float
    """Median motion of the points, as a share of the image's longer side."""

    def __len__(self) -> int:
        return len(self.pixels[0])


class PairFinder:
    """Finder of pairs: from places spread over the recording, steps forward until the image has moved enough.

    Args:
        source: frames; images of 48 or so are read.
        count: pairs to find at most.
    """

    def __init__(self, source: FrameSource, count: int = 22) -> None:
        self._source = source
        self._count = count
        self._views: dict[int, View | None] = {}
        self._sift = cv2.SIFT.create(nfeatures=FEATURES, contrastThreshold=0.02)
        self._sequences = source.sequences()
        self._places = self._at_rest = 0

    @property
    def views(self) -> list[View]:
        """Every view that was read."""
        return [view for _, view in sorted(self._views.items()) if view is not None]

    @property
    def at_rest(self) -> float:
        """Share of the places, so far, at which a later image shows the same from the same place."""
        return self._at_rest / max(self._places, 1)

    def pairs(self) -> Iterator[Pair]:
        """Find the pairs, in temporal order."""
        n = len(self._source)
        step = max(min(4, n // 4), 1)
        margin = min(REACH, n // 8)
        anchors = np.unique(np.linspace(margin, max(n - 1 - margin - step, margin), self._count).astype(int))
        for anchor in anchors.tolist():
            best: Pair | None = None
            tried: set[int] = set()
            for _ in range(TRIES):
                other = min(anchor + step, n - 1)
                if other in tried or other == anchor or self._sequences[other] != self._sequences[anchor]:
                    break
                tried.add(other)
                pair = self._match(anchor, other)
                if pair is None:
                    if step == 1:
                        break
                    step = max(step // 2, 1)
                    continue
                if best is None or _off(pair) < _off(best):
                    best = pair
                if pair.motion < MOTION[0]:
                    step = min(max(round(step * min(0.12 / max(pair.motion, 1e-3), 3.0)), step + 1), max(n // 4, 1))
                elif pair.motion > MOTION[1] and step > 1:
                    step = max(round(step * 0.12 / pair.motion), 1)
                else:
                    break
            self._places += 1
            if best is not None and best.motion > LEAST_MOTION:
                yield best
            elif best is not None:
                self._at_rest += 1

    def _match(self, a: int, b: int) -> Pair | None:
        first, second = self._view(a), self._view(b)
        if first is None or second is None:
            return None
        return match_views(first, second)

    def _view(self, position: int) -> View | None:
        if position not in self._views:
            frame = self._source.read(position)
            self._views[position] = None if frame is None else self._features(position, frame)
        return self._views[position]

    def _features(self, position: int, frame: Frame) -> View:
        height, width = frame.image.shape[:2]
        scale = min(WORKING_SIDE_PX / max(height, width), 1.0)
        grey = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
        if scale < 1:
            grey = cv2.resize(grey, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        keypoints, descriptors = self._sift.detectAndCompute(grey, None)
        if descriptors is None:
            keypoints, descriptors = (), np.zeros((0, 128), np.float32)
        roots = np.sqrt(descriptors / np.maximum(np.abs(descriptors).sum(1, keepdims=True), 1e-9))
        size = np.array([width / grey.shape[1], height / grey.shape[0]])
        pixels = (np.array([k.pt for k in keypoints], dtype=np.float64).reshape(-1, 2) + 0.5) * size - 0.5
        # The colour image is not needed any more; kept, sixty of them would be a lot of memory.
        small = np.asarray(grey, dtype=np.uint8)
        return View(position, replace(frame, image=frame.image[:1, :1]), small, pixels, roots.astype(np.float32))


def _off(pair: Pair) -> float:
    """Return how far a pair's motion is from the one aimed at."""
    return abs(float(np.log(max(pair.motion, 1e-6) / 0.12)))


def match_views(first: View, second: View) -> Pair | None:
    """Match two views by mutual nearest neighbours; None if they do not share enough points."""
    if min(len(first.pixels), len(second.pixels)) < MIN_MATCHES:
        return None
    likeness = first.descriptors @ second.descriptors.T
    nearest = likeness.argmax(1)
    rows = np.arange(len(nearest))
    mutual = likeness.argmax(0)[nearest] == rows
    best = likeness[rows, nearest]
    likeness[rows, nearest] = -1
    distinct = (1 - best) < RATIO**2 * (1 - likeness.max(1))
    kept = rows[mutual & distinct]
    x1, x2 = first.pixels[kept], second.pixels[nearest[kept]]
    if len(x1) < MIN_MATCHES:
        return None
    side = max(first.frame.camera.width, first.frame.camera.height)
    limit = OUTLIER_PX * max(side / WORKING_SIDE_PX, 1.0)
    mask = _inliers(x1, x2, limit)
    if mask.sum() < MIN_MATCHES:
        return None
    x1, x2 = x1[mask], x2[mask]
    motion = float(np.median(np.linalg.norm(x1 - x2, axis=1))) / side
    if len(x1) > USED_MATCHES:
        some = np.random.default_rng(0).permutation(len(x1))[:USED_MATCHES]
        x1, x2 = x1[some], x2[some]
    depths = depth_at(first.frame.depth_m, x1), depth_at(second.frame.depth_m, x2)
    return Pair(first, second, (x1, x2), depths, motion)


def _inliers(x1: Array, x2: Array, limit_px: float) -> NDArray[np.bool_]:
    """Return which matches (N, 2) and (N, 2) fit one motion of the camera, or stay in place where most do."""
    stays = np.linalg.norm(x1 - x2, axis=1) < limit_px
    if stays.mean() > 0.5:  # a camera at rest has no epipolar lines, and OpenCV may raise an error
        return np.asarray(stays, dtype=bool)
    cv2.setRNGSeed(7)
    try:
        _, inliers = cv2.findFundamentalMat(x1, x2, cv2.USAC_MAGSAC, limit_px, 0.999, 2000)
    except cv2.error:  # of points without a solution
        inliers = None
    return np.zeros(len(x1), dtype=bool) if inliers is None else inliers.ravel().astype(bool)


def depth_at(depth_m: NDArray[np.float32] | None, pixels: Array) -> Array:
    """Return the depth (N,) at pixels (N, 2); NaN where it is unknown, at an edge, or outside of the image."""
    found = np.full(len(pixels), np.nan)
    if depth_m is None or not len(pixels):
        return found
    height, width = depth_m.shape
    x, y = np.rint(pixels).astype(int).T
    inside = np.flatnonzero((x >= 1) & (y >= 1) & (x < width - 1) & (y < height - 1))
    offsets = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    patch = np.stack([depth_m[y[inside] + dy, x[inside] + dx] for dx, dy in offsets]).astype(np.float64)
    low, high = patch.min(0), patch.max(0)
    good = (low > 0) & np.isfinite(high) & (high - low < DEPTH_EDGE * high)
    found[inside[good]] = np.median(patch[:, good], axis=0)
    return found


class Poses:
    """Poses of a source at fractional positions, interpolated between frames of one recording."""

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self._sequences = source.sequences()
        self._known: dict[int, Matrix | None] = {}

    def at(self, position: int, offset: float = 0.0) -> Matrix | None:
        """Return ``T_map_camera`` at a position and some frames later; None where a frame has none, or none follows."""
        from kfloc_ros.geometry.lie import interpolate

        place = position + offset
        low = int(np.floor(place))
        share = place - low
        before = self._pose(low, position)
        if share < 1e-9 or before is None:
            return before
        after = self._pose(low + 1, position)
        return None if after is None else interpolate(before, after, share)

    def _pose(self, position: int, beside: int) -> Matrix | None:
        if not 0 <= position < len(self._sequences) or self._sequences[position] != self._sequences[beside]:
            return None
        if position not in self._known:
            try:
                self._known[position] = self._source.pose(position)
            except FrameError:
                self._known[position] = None
        return self._known[position]
