# SPDX-License-Identifier: Apache-2.0
"""Checks of what a recording measured: depth (unit, registration, clock), images (exposure, repeats), the path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.mapping.check_geometry import Array, Model, Observations
from kfloc_ros.mapping.check_pairs import REACH, Pair, View

DARK, BRIGHT = 18.0, 238.0
"""Median grey value of an image, of 255."""
BLURRED = 0.10
"""Share of the gradients that survives a further blur by a pixel, below which an image counts as sharp."""
MANY = 0.5
NEIGHBOURS = 6
"""Neighbours that are read to see whether images repeat."""
SAME_GREY = 0.4
PATH_FRAMES = 200
SEEN_AGAIN_SHARE = 0.1
"""Of the recording, that must lie between two frames of one place for it to be seen twice."""


@dataclass(frozen=True)
class ImageFacts:
    """What the images are like, as shares of those that were looked at."""

    dark: float
    bright: float
    blurred: float
    repeated: float
    rate_hz: float
    """Images in a second; NaN if there is no pair of them."""
    features: float
    """Median number of features of an image."""
    depth_known: float
    """Median share of pixels with depth; NaN without depth."""
    seen_twice: float
    """Share of the path that the camera passes again later; NaN without poses."""

    def figures(self) -> dict[str, float]:
        """The facts by name, those that are unknown left out."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: round(float(value), 3) for name, value in known.items() if np.isfinite(value)}

    def faults(self) -> list[tuple[str, str, float]]:
        """(kind, sentence, share) of what makes mapping hard."""
        found = []
        for kind, share, what in (
            ("dark", self.dark, "nearly black"),
            ("bright", self.bright, "nearly white"),
            ("blur", self.blurred, "blurred"),
            ("repeated", self.repeated, "followed by the same image again"),
        ):
            if share > MANY:
                found.append((kind, f"Of the images looked at, {100 * share:.0f} % are {what}.", share))
        return found


def image_facts(source: FrameSource, views: Sequence[View], pairs: Sequence[Pair]) -> ImageFacts:
    """Return what images are like, from those that were read and some of their neighbours."""
    greys = [float(np.median(view.grey)) for view in views]
    steps = [(p.second.frame.stamp_ns - p.first.frame.stamp_ns) / (p.second.position - p.first.position) for p in pairs]
    period_ns = float(np.median(steps)) if steps else 0.0
    depths = [float((v.frame.depth_m > 0).mean()) for v in views if v.frame.depth_m is not None]
    return ImageFacts(
        dark=float(np.mean([grey < DARK for grey in greys])) if greys else 0.0,
        bright=float(np.mean([grey > BRIGHT for grey in greys])) if greys else 0.0,
        blurred=float(np.mean([sharpness(view) < BLURRED for view in views])) if views else 0.0,
        repeated=_repeated(source, views),
        rate_hz=1e9 / period_ns if period_ns > 0 else float("nan"),
        features=float(np.median([len(view.pixels) for view in views])) if views else 0.0,
        depth_known=float(np.median(depths)) if depths else float("nan"),
        seen_twice=_seen_twice(source),
    )


def sharpness(view: View) -> float:
    """Share of an image's gradient energy that a blur by a pixel takes away: 0 for one that is blurred already."""
    grey = view.grey.astype(np.float32)
    energy = [
        float((cv2.Sobel(image, cv2.CV_32F, 1, 0) ** 2 + cv2.Sobel(image, cv2.CV_32F, 0, 1) ** 2).mean())
        for image in (grey, cv2.GaussianBlur(grey, (0, 0), 1.0))
    ]
    return 1 - energy[1] / energy[0] if energy[0] > 0 else 0.0


def _repeated(source: FrameSource, views: Sequence[View]) -> float:
    """Share of some images that are the same as the next one."""
    chosen = [view for view in views if view.position + 1 < len(source)]
    chosen = chosen[:: max(len(chosen) // NEIGHBOURS, 1)][:NEIGHBOURS]
    known = {view.position: view for view in views}
    same = []
    for view in chosen:
        following = known.get(view.position + 1)
        if following is not None:
            grey = following.grey
        else:
            frame = source.read(view.position + 1)
            if frame is None:
                continue
            grey = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
            if grey.shape != view.grey.shape:
                grey = cv2.resize(grey, view.grey.shape[::-1], interpolation=cv2.INTER_AREA)
        same.append(float(np.abs(grey.astype(np.int16) - view.grey).mean()) < SAME_GREY)
    return float(np.mean(same)) if same else 0.0


def _seen_twice(source: FrameSource) -> float:
    """Share of the path near which, and looking the same way, the camera is again at another time."""
    positions = np.unique(np.linspace(0, len(source) - 1, min(PATH_FRAMES, len(source))).astype(int)).tolist()
    poses = []
    for position in positions:
        try:
            poses.append(source.pose(position))
        except FrameError:
            poses.append(None)
    places = np.array([T[:3, 3] for T in poses if T is not None]).reshape(-1, 3)
    views = np.array([T[:3, 2] for T in poses if T is not None]).reshape(-1, 3)
    times = np.array([p for p, T in zip(positions, poses, strict=True) if T is not None])
    if len(places) < 20:
        return float("nan")
    extent = float(np.linalg.norm(places.max(0) - places.min(0)))
    near = np.linalg.norm(places[:, None] - places[None], axis=2) < 0.15 * extent
    alike = views @ views.T > np.cos(np.radians(30))
    later = np.abs(times[:, None] - times[None]) > SEEN_AGAIN_SHARE * len(source)
    return float((near & alike & later).any(1).mean())


MIN_POINTS = 12
"""Matches with depth that a pair needs."""
MIN_BASELINE = 0.02
"""Least way between two views, as a share of the depth, that tells the unit."""
MIN_DEPTH_PAIRS = 6
SEARCH_SHARE = 0.08
"""Depth is looked for as far from its place as this share of the image's width."""
EDGE_SIGMA_PX = 1.5
MIN_PEAK = 6.0
"""Height of a peak of the correlation over its surroundings, in standard deviations."""
MIN_EDGE_VIEWS = 10
MIN_LEVEL, MIN_GAIN = 1.2, 1.5
"""Mean height of the views' correlations at a delay, in standard deviations, and by that without delay."""


@dataclass(frozen=True, eq=False)
class DepthUnit:
    """What depth must be multiplied by to fit the poses, the motion in the images being what it is."""

    factor: float
    spread: float
    """Robust standard deviation of the logarithm over pairs."""
    pairs: int
    median_m: float
    """Median depth as given."""


@dataclass(frozen=True, eq=False)
class DepthPlace:
    """Where depth edges lie on the colour images, and in which frame, if that is clear."""

    shift_px: tuple[float, float]
    """Of the depth against the colour image, in its full size: right and down."""
    clear: bool
    delay_frames: float
    """Frames after an image at which its depth was taken; NaN if it cannot be told."""
    gain: float
    """Height of the correlation at that delay, by that at no delay."""
    delay_clear: bool
    views: int


def depth_unit(observed: Observations, model: Model) -> DepthUnit | None:
    """Return the factor by which depth differs from the unit of the poses; None if too few pairs tell."""
    motions, known = observed.relative(model)
    x, y = observed.rays(model)
    factors = []
    for k, pair in enumerate(observed.pairs):
        if not known[k]:
            continue
        own = observed.pair_of == k
        there, back = motions[k], inverse_pose(motions[k])
        logs = [
            _log_factors(there, x[own], y[own], pair.depths_m[0]),
            _log_factors(back, y[own], x[own], pair.depths_m[1]),
        ]
        both = np.concatenate(logs)
        if len(both) >= MIN_POINTS:
            factors.append(float(np.median(both)))
    if len(factors) < MIN_DEPTH_PAIRS:
        return None
    middle = float(np.median(factors))
    spread = 1.4826 * float(np.median(np.abs(np.array(factors) - middle)))
    depths = np.concatenate([d for pair in observed.pairs for d in pair.depths_m])
    return DepthUnit(float(np.exp(middle)), spread, len(factors), float(np.nanmedian(depths)))


def _log_factors(T: Array, x: Array, y: Array, depth: Array) -> Array:
    """Logarithm of triangulated depth by measured depth of each match with enough parallax."""
    a, t = x @ T[:3, :3].T, T[:3, 3]
    # y ~ s d a + t: the component across y, by least squares
    ca, ct = np.cross(y, a), np.cross(y, np.broadcast_to(t, y.shape))
    parallax = np.linalg.norm(ca, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(y, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        triangulated = -(ca * ct).sum(1) / (ca * ca).sum(1)
        good = (triangulated > 0) & np.isfinite(depth) & (parallax > MIN_BASELINE)
        return np.asarray(np.log(triangulated[good] / depth[good]))


def depth_place(views: Sequence[View], observed: Observations, model: Model) -> DepthPlace | None:
    """Return where edges of depth lie on edges of the colour images; None if too few views have both."""
    surfaces, used = [], []
    for view in views:
        surface = _correlation(view)
        if surface is not None:
            surfaces.append(surface)
            used.append(view)
    if len(surfaces) < MIN_EDGE_VIEWS:
        return None
    width = used[0].frame.camera.width
    scale = width / used[0].grey.shape[1]
    total = np.mean(surfaces, axis=0)
    shift, height = _peak(total)
    clear = height > MIN_PEAK
    delay, level, gain = _delay(used, surfaces, observed, model, scale)
    sure = level > MIN_LEVEL and gain > MIN_GAIN
    return DepthPlace((shift[0] * scale, shift[1] * scale), clear, delay, gain, sure, len(used))


def _correlation(view: View) -> Array | None:
    """Correlation of depth edges with image edges over shifts of the depth, standardised."""
    depth = view.frame.depth_m
    if depth is None:
        return None
    height, width = view.grey.shape
    small = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST)
    known = small > 0
    if known.mean() < 0.2:
        return None
    inverse = np.where(known, 1 / np.maximum(small, 1e-6), 0).astype(np.float32)
    step = np.zeros((height, width), np.float32)
    for axis in (0, 1):
        ahead, before = np.roll(inverse, -1, axis), np.roll(inverse, 1, axis)
        both = np.roll(known, -1, axis) & np.roll(known, 1, axis)
        step = np.maximum(step, np.where(both, np.abs(ahead - before), 0))
    usual = np.median(inverse[known])
    edges = np.clip(step / usual / 0.15, 0, 1)
    edges[:3], edges[-3:], edges[:, :3], edges[:, -3:] = 0, 0, 0, 0
    if edges.mean() < 0.002:
        return None
    grey = cv2.GaussianBlur(view.grey, (0, 0), 1.0).astype(np.float32)
    gradient = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    gradient = np.minimum(gradient / max(float(np.percentile(gradient, 90)), 1e-6), 1.0)
    gradient = cv2.GaussianBlur(gradient, (0, 0), EDGE_SIGMA_PX)
    reach = _reach(view)
    inner = edges[reach:-reach, reach:-reach]
    # shift d of the depth: depth edge at p belongs to image point p - d
    surface = cv2.matchTemplate(gradient, np.ascontiguousarray(inner), cv2.TM_CCORR)[::-1, ::-1]
    spread = surface.std()
    return None if spread < 1e-9 else np.asarray((surface - np.median(surface)) / spread, dtype=np.float64)


def _reach(view: View) -> int:
    return max(int(SEARCH_SHARE * view.grey.shape[1]), 4)


def _peak(surface: Array) -> tuple[tuple[float, float], float]:
    """Place of the highest value, from the middle, and its height over the rest in robust standard deviations."""
    row, column = np.unravel_index(int(surface.argmax()), surface.shape)
    middle = surface.shape[0] // 2
    centre = float(np.median(surface))
    spread = 1.4826 * float(np.median(np.abs(surface - centre)))
    return (float(column) - middle, float(row) - middle), (float(surface.max()) - centre) / max(spread, 1e-9)


def _delay(
    views: Sequence[View], surfaces: Sequence[Array], observed: Observations, model: Model, scale: float
) -> tuple[float, float, float]:
    """Delay in frames at which the shifts that the motion predicts meet the views' own correlations best; how high
    they are there, and by which factor higher than without delay."""
    camera, depths = observed.camera, np.concatenate([d for pair in observed.pairs for d in pair.depths_m])
    far = float(np.nanmedian(depths))
    T = model.T_body_camera
    heights = {}
    for delay in range(-REACH, REACH + 1):
        values = []
        for view, surface in zip(views, surfaces, strict=True):
            moved = _moved_px(view, delay, observed, model, T, far)
            if moved is None:
                continue
            middle = surface.shape[0] // 2
            column, row = round(middle + moved[0] * camera.fx / scale), round(middle + moved[1] * camera.fy / scale)
            if 0 <= column < surface.shape[1] and 0 <= row < surface.shape[0]:
                values.append(surface[row, column])
            else:
                values.append(float(np.min(surface)))
        if len(values) >= MIN_EDGE_VIEWS:
            heights[delay] = float(np.mean(values))
    if 0 not in heights or len(heights) < REACH:
        return float("nan"), 0.0, 1.0
    best = max(heights, key=lambda key: heights[key])
    return float(best), heights[best], heights[best] / max(heights[0], 1e-6)


def _moved_px(
    view: View, delay: int, observed: Observations, model: Model, T: Array, far: float
) -> NDArray[np.float64] | None:
    """Where the middle of the scene moves in the image until some frames later, on the plane z = 1."""
    now = observed.poses.at(view.position, model.offset)
    then = observed.poses.at(view.position, model.offset + delay)
    if now is None or then is None:
        return None
    motion = then @ inverse_pose(now) if model.inverted else inverse_pose(then) @ now
    point = (inverse_pose(T) @ motion @ T @ np.array([0, 0, far, 1.0]))[:3]
    return np.asarray(point[:2] / point[2]) if point[2] > 0.1 * far else None
