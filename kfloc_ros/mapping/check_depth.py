# SPDX-License-Identifier: Apache-2.0
"""Checks of a recording's depth against its poses and colour images: unit, registration, clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.mapping.check_geometry import Array, Model, Observations, normalised
from kfloc_ros.mapping.check_pairs import REACH, View

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


CLOCK_PAIRS, CLOCK_POINTS = 40, 600
"""Largest number of pairs of depth images, and of points of each, that the clock is measured with."""
CLOCK_ANGLE_DEG, CLOCK_SHARE = 40.0, 0.5
"""Largest angle between two views, and their largest distance as a share of the depth."""
MIN_CLOCK_PAIRS = 8
CLOCK_GAIN, CLOCK_MOST = 0.8, 0.65
"""Disagreement of depth images at a delay by that without, and the share of pairs that it must be less in."""


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


@dataclass(frozen=True, eq=False)
class DepthClock:
    """Poses that depth images agree with best among themselves."""

    delay_frames: float
    """Frames after an image at which its depth was taken."""
    before: float
    """Median disagreement of depth seen from two views, as a share of it, with the poses of the images."""
    after: float
    """The same with the poses at the delay."""
    clear: bool


def depth_clock(views: Sequence[View], observed: Observations, model: Model, factor: float) -> DepthClock | None:
    """Return at which delay depth images of different views agree; None if too few pairs of views tell.

    Depth of two views that overlap and move differently agrees only with the poses of the time that it was taken at.

    Args:
        views: with depth.
        observed: poses.
        model: how the poses are to be read.
        factor: metres of the poses by a metre of depth.
    """
    seen = [view for view in views if view.frame.depth_m is not None]
    pairs = _clock_pairs(seen, observed, model, factor)
    delays = np.arange(-REACH, REACH + 1)
    rows = [_disagreements(seen[i], seen[j], observed, model, factor, delays) for i, j in pairs]
    table = np.array([row for row in rows if np.isfinite(row).all()]).reshape(-1, len(delays))
    if len(table) < MIN_CLOCK_PAIRS:
        return None
    usual = np.median(table, axis=0)
    best, now = int(usual.argmin()), int(np.flatnonzero(delays == 0)[0])
    better = float((table[:, best] < 0.95 * table[:, now]).mean())
    inside = 0 < best < len(delays) - 1
    clear = inside and usual[best] < CLOCK_GAIN * usual[now] and better >= CLOCK_MOST
    return DepthClock(float(delays[best]), float(usual[now]), float(usual[best]), bool(clear))


def _clock_pairs(views: Sequence[View], observed: Observations, model: Model, factor: float) -> list[tuple[int, int]]:
    """Pairs of views that overlap, those first whose relative pose changes most within the delays tried."""
    poses = [[_camera_pose(view, observed, model, step) for step in (-4.0, 0.0, 4.0)] for view in views]
    usual = [factor * _usual_depth(view) for view in views]
    found = []
    for i, first in enumerate(poses):
        for j in range(i + 1, len(views)):
            known = [T for T in (*first, *poses[j]) if T is not None]
            if len(known) < 6:
                continue
            a, b = known[:3], known[3:]
            far = usual[i]
            apart = inverse_pose(a[1]) @ b[1]
            if not far > 0 or np.linalg.norm(apart[:3, 3]) > CLOCK_SHARE * far:
                continue
            if rotation_angle_deg(apart[:3, :3]) > CLOCK_ANGLE_DEG:
                continue
            change = [inverse_pose(a[k]) @ b[k] for k in (0, 2)]
            moved = inverse_pose(change[0]) @ change[1]
            size = np.linalg.norm(moved[:3, 3]) / far + np.radians(rotation_angle_deg(moved[:3, :3]))
            found.append((float(size), i, j))
    return [(i, j) for _, i, j in sorted(found, reverse=True)[:CLOCK_PAIRS]]


def _usual_depth(view: View) -> float:
    depth = view.frame.depth_m
    values = depth[::8, ::8] if depth is not None else np.zeros(0)
    return float(np.median(values[values > 0])) if (values > 0).any() else 0.0


def _camera_pose(view: View, observed: Observations, model: Model, delay: float) -> Array | None:
    """Pose of the optical camera some frames after a view."""
    T = observed.poses.at(view.position, model.offset + delay)
    return None if T is None else (inverse_pose(T) if model.inverted else T) @ model.T_body_camera


def _disagreements(
    first: View, second: View, observed: Observations, model: Model, factor: float, delays: NDArray[np.int_]
) -> Array:
    """Median difference of the second view's depth from the first's moved there, as a share, at each delay."""
    camera = observed.camera.pinhole() if model.pinhole else observed.camera
    depth, other = first.frame.depth_m, second.frame.depth_m
    result = np.full(len(delays), np.nan)
    if depth is None or other is None:
        return result
    v, u = np.nonzero(depth > 0)
    some = np.random.default_rng(0).permutation(len(u))[:CLOCK_POINTS]
    u, v = u[some], v[some]
    rays = normalised(camera, np.stack([u, v], axis=1).astype(np.float64))
    points = np.column_stack([rays, np.ones(len(rays))]) * (factor * depth[v, u])[:, None]
    for k, delay in enumerate(delays.tolist()):
        a, b = (_camera_pose(view, observed, model, float(delay)) for view in (first, second))
        if a is None or b is None:
            return result
        T = inverse_pose(b) @ a
        moved = points @ T[:3, :3].T + T[:3, 3]
        moved = moved[moved[:, 2] > 1e-3]
        x, y = np.rint(camera.distort(moved[:, :2] / moved[:, 2:])).T
        inside = (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
        measured = factor * other[y[inside].astype(int), x[inside].astype(int)]
        near = np.abs(measured / moved[inside, 2] - 1)[measured > 0]
        near = near[near < 0.3]  # else another surface is in front
        if len(near) < CLOCK_POINTS // 6:
            return result
        result[k] = np.median(near)
    return result
