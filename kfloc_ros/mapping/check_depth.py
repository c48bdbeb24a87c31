# SPDX-License-Identifier: Apache-2.0
"""Checks of a recording's depth against its poses and colour images: unit, registration, clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.mapping.check_geometry import Array, Model, Observations
from kfloc_ros.mapping.check_pairs import REACH, View

MIN_POINTS = 12
"""Matches with depth that a pair needs."""
MIN_BASELINE = 0.02
"""Least way between two views, as a share of the depth, that tells the unit."""
ON_LINE_PX = 1.5
"""Largest distance of a match from its epipolar line, in pixels of the working images, for its depth to count."""
MIN_DEPTH_PAIRS = 6
SEARCH_SHARE = 0.08
"""Depth is looked for as far from its place as this share of the image's width."""
EDGE_SIGMA_PX = 1.5
MIN_PEAK = 6.0
"""Height of a peak of the correlation over its surroundings, in standard deviations."""
MIN_EDGE_VIEWS = 10
MIN_LEVEL, MIN_GAIN = 1.2, 1.5
"""Mean height of the views' correlations at a delay, in standard deviations, and by that without delay."""
DEPTH_FACTORS = (5.0, 0.2, 1000.0, 0.001, 10.0, 0.1)
"""Factors between the units that depth images are usually in, the likelier ones first: metres, millimetres, fifths of a
millimetre, tenths."""
DEPTH_CAMERA_M, INDOORS_M = (0.18, 40.0), (0.3, 15.0)
"""Median depths beyond which the unit is in doubt, and those that images of a room have."""


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


def depth_size_doubt(usual_m: float) -> str:
    """Return a sentence if images are too near or too far for a depth camera; for sources whose unit no pose tells."""
    if not np.isfinite(usual_m) or DEPTH_CAMERA_M[0] < usual_m < DEPTH_CAMERA_M[1]:
        return ""
    likely = next((value for value in DEPTH_FACTORS if INDOORS_M[0] < value * usual_m < INDOORS_M[1]), None)
    mended = "" if likely is None else f" With depth_scale={likely:g} it is {likely * usual_m:.3g} m."
    return (
        f"The depth is {usual_m:.3g} m in the median, which few depth cameras measure; its unit is probably another."
        + mended
    )


def triangulated_depths(observed: Observations, model: Model) -> Array:
    """Return the depths, in the poses' unit, of matches with enough parallax that lie on their epipolar lines.

    Every match gives its depth in both images. One that lies off its line is of poses that are wrong there, or no
    match; its depth may be anything.
    """
    motions, known = observed.relative(model)
    x, y = observed.rays(model)
    on_line = np.abs(observed.residuals(model)) < ON_LINE_PX
    found = [np.zeros(0)]
    for k in np.flatnonzero(known):
        own = (observed.pair_of == k) & on_line
        found += [_depths(motions[k], x[own], y[own]), _depths(inverse_pose(motions[k]), y[own], x[own])]
    depths = np.concatenate(found)
    return np.asarray(depths[np.isfinite(depths)])


def _depths(T: Array, x: Array, y: Array) -> Array:
    """Return the triangulated depth (N,) of matches in the first image; NaN without enough parallax, or behind it."""
    a, t = x @ T[:3, :3].T, T[:3, 3]
    # y ~ s d a + t: the component across y, by least squares
    ca, ct = np.cross(y, a), np.cross(y, np.broadcast_to(t, y.shape))
    parallax = np.linalg.norm(ca, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(y, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        depths = -(ca * ct).sum(1) / (ca * ca).sum(1)
    return np.where((depths > 0) & (parallax > MIN_BASELINE), depths, np.nan)


def _log_factors(T: Array, x: Array, y: Array, depth: Array) -> Array:
    """Logarithm of triangulated depth by measured depth of each match that has both."""
    triangulated = _depths(T, x, y)
    good = np.isfinite(triangulated) & np.isfinite(depth)
    return np.asarray(np.log(triangulated[good] / depth[good]))


def depth_place(views: Sequence[View], observed: Observations, model: Model, factor: float) -> DepthPlace | None:
    """Return where edges of depth lie on edges of the colour images; None if too few views have both.

    Args:
        views: with depth.
        observed: matches and poses.
        model: how the poses are to be read.
        factor: metres of the poses by a metre of depth.
    """
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
    depths = np.concatenate([d for pair in observed.pairs for d in pair.depths_m])
    delay, level, gain = _delay(used, surfaces, observed, model, scale, factor * float(np.nanmedian(depths)))
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
    views: Sequence[View], surfaces: Sequence[Array], observed: Observations, model: Model, scale: float, far: float
) -> tuple[float, float, float]:
    """Delay in frames at which the shifts that the motion predicts, of points this far in the poses' unit, meet the
    views' own correlations best; how high they are there, and by which factor higher than without delay."""
    camera = observed.camera
    heights = {}
    for delay in range(-REACH, REACH + 1):
        values = []
        for view, surface in zip(views, surfaces, strict=True):
            moved = moved_px(view, delay, observed, model, far)
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


def moved_px(view: View, delay: int, observed: Observations, model: Model, far: float) -> NDArray[np.float64] | None:
    """Return where the middle of the scene moves in the image until some frames later, on the plane z = 1.

    Args:
        view: the image at the start.
        delay: frames.
        observed: poses.
        model: how the poses are to be read.
        far: distance of the middle of the scene in the unit of the poses.
    """
    T = model.T_body_camera
    now = observed.poses.at(view.position, model.offset)
    then = observed.poses.at(view.position, model.offset + delay)
    if now is None or then is None:
        return None
    motion = then @ inverse_pose(now) if model.inverted else inverse_pose(then) @ now
    point = (inverse_pose(T) @ motion @ T @ np.array([0, 0, far, 1.0]))[:3]
    return np.asarray(point[:2] / point[2]) if point[2] > 0.1 * far else None
