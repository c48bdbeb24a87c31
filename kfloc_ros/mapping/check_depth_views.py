# SPDX-License-Identifier: Apache-2.0
"""Agreement of depth between views, by which a wrong clock or registration of the depth shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kfloc_ros.geometry.lie import inverse_pose, rotation_angle_deg
from kfloc_ros.mapping.check_camera import Corrected, LooseFit, fit_camera
from kfloc_ros.mapping.check_depth import moved_px
from kfloc_ros.mapping.check_geometry import READOUT, Array, Model, Observations, normalised
from kfloc_ros.mapping.check_pairs import REACH, Pair, View, depth_at

CLOCK_PAIRS, CLOCK_POINTS = 40, 600
"""Largest number of pairs of depth images, and of points of each, that the clock is measured with."""
CLOCK_ANGLE_DEG, CLOCK_SHARE = 40.0, 0.5
"""Largest angle between two views, and their largest distance as a share of the depth."""
MIN_CLOCK_PAIRS = 8
SHIFT_SHARE, SHIFT_STEPS = 0.06, 5
"""Largest shift that is tried, as a share of the image's width, and the steps to it."""
SHIFT_GAIN, SHIFT_MOST = 0.7, 0.7
MIN_SHIFT_PAIRS, MAX_SHIFTED = 15, 0.012
"""Pairs that a shift needs, and the largest disagreement that may be left with it: inaccurate poses feign shifts."""
CLOCK_GAIN, CLOCK_MOST = 0.8, 0.65
"""Disagreement of depth images at a delay by that without, and the share of pairs that it must be less in."""


MATCHES_GAIN, MATCHES_SIGMAS = 0.92, 2.0
"""Cost of the matches with depth moved, by that of now, and standard errors of its change over pairs."""


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
    measure: str = ""
    """What ``before`` and ``after`` are, if not the disagreement."""

    def sentence(self, period_s: float) -> str:
        """Return what is wrong, given the seconds from frame to frame."""
        side = "later" if self.delay_frames > 0 else "earlier"
        text = (
            f"The depth images are those of about {abs(self.delay_frames):.0f} frames {side} "
            f"({abs(self.delay_frames) * period_s:.3f} s): "
        )
        if self.measure:
            return f"{text}then, {self.measure} is {self.after:.2f}, and {self.before:.2f} at the time of the images."
        return (
            f"{text}with the poses of that time, depth of two views differs by {100 * self.after:.1f} %, and by "
            f"{100 * self.before:.1f} % with those of the images."
        )


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
    trials = [(float(delay), 0.0, 0.0) for delay in delays]
    rows = [_disagreements(seen[i], seen[j], observed, model, factor, trials) for i, j in pairs]
    table = np.array([row for row in rows if np.isfinite(row).all()]).reshape(-1, len(delays))
    if len(table) < MIN_CLOCK_PAIRS:
        return None
    usual = np.median(table, axis=0)
    best, now = int(usual.argmin()), int(np.flatnonzero(delays == 0)[0])
    better = float((table[:, best] < 0.95 * table[:, now]).mean())
    inside = 0 < best < len(delays) - 1
    clear = inside and usual[best] < CLOCK_GAIN * usual[now] and better >= CLOCK_MOST
    return DepthClock(float(delays[best]), float(usual[now]), float(usual[best]), bool(clear))


@dataclass(frozen=True, eq=False)
class DepthShift:
    """Shift of depth images against the colour images at which they agree best among themselves."""

    shift_px: tuple[float, float]
    """Right and down."""
    before: float
    """Median disagreement of depth seen from two views, as a share of it, without a shift."""
    after: float
    clear: bool
    measure: str = ""
    """What ``before`` and ``after`` are, if not the disagreement."""

    def sentence(self) -> str:
        """Return what is wrong."""
        dx, dy = self.shift_px
        if self.measure:
            return (
                f"The depth lies {dx:.0f} pixels right and {dy:.0f} down of where it belongs, and is not registered to "
                f"the colour camera: there, {self.measure} is {self.after:.2f}, and {self.before:.2f} as it is."
            )
        return (
            f"The depth lies {dx:.0f} pixels right and {dy:.0f} down of where it belongs, and is not registered to the "
            f"colour camera: there, depth of two views differs by {100 * self.after:.1f} %, and by "
            f"{100 * self.before:.1f} % as it is."
        )


def depth_shift(views: Sequence[View], observed: Observations, model: Model, factor: float) -> DepthShift | None:
    """Return the shift at which depth images of different views agree; None if too few pairs of views tell.

    A pixel's depth moves with the colour camera, whose poses are known. Where depth belongs to other pixels, views that
    are turned against each other disagree.

    Args:
        views: with depth.
        observed: poses.
        model: how the poses are to be read.
        factor: metres of the poses by a metre of depth.
    """
    seen = [view for view in views if view.frame.depth_m is not None]
    pairs = _turned_pairs(seen, observed, model, factor)
    width = observed.camera.width
    step = SHIFT_SHARE * width / SHIFT_STEPS
    places = np.arange(-SHIFT_STEPS, SHIFT_STEPS + 1)
    grid = np.array([(x, y) for y in places for x in places], dtype=np.float64)
    zero = int(np.flatnonzero((grid == 0).all(axis=1))[0])
    table = _shift_table(seen, pairs, observed, model, factor, step * grid)
    if len(table) < MIN_CLOCK_PAIRS:
        return None
    usual = np.median(table, axis=0)
    best = int(usual.argmin())
    fine = step * grid[best] + step / 4 * grid[np.abs(grid).max(axis=1) <= 3]
    finer = _shift_table(seen, pairs, observed, model, factor, fine)
    shift = fine[int(np.median(finer, axis=0).argmin())] if len(finer) else step * grid[best]
    better = float((table[:, best] < 0.95 * table[:, zero]).mean())
    inside = np.abs(grid[best]).max() < SHIFT_STEPS
    clear = len(table) >= MIN_SHIFT_PAIRS and inside and usual[best] < min(SHIFT_GAIN * usual[zero], MAX_SHIFTED)
    clear = clear and better >= SHIFT_MOST
    return DepthShift((float(shift[0]), float(shift[1])), float(usual[zero]), float(usual[best]), bool(clear))


def depth_by_matches(observed: Observations, model: Model, factor: float) -> DepthClock | DepthShift | None:
    """Return the delay or the shift of depth at which matches fit best, poses being corrected; None if there is none.

    For poses that are too inaccurate to compare depth of different views by them.

    Args:
        observed: matches and poses.
        model: how the poses are to be read.
        factor: metres of the poses by a metre of depth.
    """
    camera, depths = observed.camera, np.concatenate([d for pair in observed.pairs for d in pair.depths_m])
    if np.isfinite(depths).sum() < CLOCK_POINTS:
        return None
    far, size = factor * float(np.nanmedian(depths)), np.array([camera.fx, camera.fy])

    def later(delay: float) -> LooseFit:
        def move(view: View) -> Array:
            moved = moved_px(view, int(delay), observed, model, far)
            return np.zeros(2) if moved is None else moved * size

        return _with_depth_moved(observed, model, factor, move)

    def shifted(right: float, down: float) -> LooseFit:
        return _with_depth_moved(observed, model, factor, lambda view: np.array([right, down]))

    now = shifted(0.0, 0.0)
    step = SHIFT_SHARE / 4 * camera.width
    across = {k: now if k == 0 else shifted(k * step, 0.0) for k in range(-3, 4)}
    x = step * _lowest(across)
    down = {k: shifted(x, k * step) for k in range(-3, 4)}
    y = step * _lowest(down)
    delays = {k: now if k == 0 else later(k) for k in range(-REACH, REACH + 1, 2)}
    coarse = min(delays, key=lambda k: delays[k].cost)
    delays |= {k: later(k) for k in (coarse - 1, coarse + 1) if abs(k) <= REACH}
    delay = min(delays, key=lambda k: delays[k].cost)
    moved, late = shifted(x, y), delays[delay]
    found = late if late.cost < moved.cost else moved
    gains = np.log(np.maximum(now.pair_costs, 1e-6) / np.maximum(found.pair_costs, 1e-6))
    is_sure = gains.mean() > MATCHES_SIGMAS * gains.std() / np.sqrt(len(gains))
    if found.cost > MATCHES_GAIN * now.cost or not is_sure:
        return None
    if found is late:
        return DepthClock(float(delay), now.cost, late.cost, True, "the cost of matches with depth")
    return DepthShift((x, y), now.cost, moved.cost, True, "the cost of matches with depth")


def _with_depth_moved(observed: Observations, model: Model, factor: float, move: Callable[[View], Array]) -> LooseFit:
    """The fit of the poses, the depth of each match being taken some pixels beside it."""

    def depths(pair: Pair, side: int) -> Array:
        view = (pair.first, pair.second)[side]
        return depth_at(view.frame.depth_m, pair.pixels[side] + move(view))

    both = [np.concatenate([depths(pair, side) for pair in observed.pairs]) for side in (0, 1)]
    return fit_camera(Corrected(observed, model, factor, both), model, READOUT)


def _lowest(fits: Mapping[int, LooseFit]) -> float:
    """Place of the lowest cost on a grid, by a parabola through its neighbours."""
    best = min(fits, key=lambda k: fits[k].cost)
    if best - 1 not in fits or best + 1 not in fits:
        return float(best)
    low, middle, high = (fits[k].cost for k in (best - 1, best, best + 1))
    return best + 0.5 * (low - high) / max(low - 2 * middle + high, 1e-9)


def _shift_table(
    views: Sequence[View],
    pairs: Sequence[tuple[int, int]],
    observed: Observations,
    model: Model,
    factor: float,
    shifts_px: Array,
) -> Array:
    """(pairs, shifts) disagreements, of the pairs in which all are known."""
    rows = [_disagreements(views[i], views[j], observed, model, factor, [(0.0, *s) for s in shifts_px.tolist()])
            for i, j in pairs]  # fmt: skip
    return np.array([row for row in rows if np.isfinite(row).all()]).reshape(-1, len(shifts_px))


def _turned_pairs(views: Sequence[View], observed: Observations, model: Model, factor: float) -> list[tuple[int, int]]:
    """Pairs of views that overlap, those first that are turned most against each other."""
    poses = [_camera_pose(view, observed, model, 0.0) for view in views]
    usual = [factor * _usual_depth(view) for view in views]
    found = []
    for i, a in enumerate(poses):
        for j in range(i + 1, len(views)):
            b = poses[j]
            if a is None or b is None or not usual[i] > 0:
                continue
            T = inverse_pose(a) @ b
            angle = rotation_angle_deg(T[:3, :3])
            if angle < CLOCK_ANGLE_DEG and np.linalg.norm(T[:3, 3]) < CLOCK_SHARE * usual[i]:
                found.append((angle, i, j))
    return [(i, j) for _, i, j in sorted(found, reverse=True)[:CLOCK_PAIRS]]


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
    first: View,
    second: View,
    observed: Observations,
    model: Model,
    factor: float,
    trials: Sequence[tuple[float, float, float]],
) -> Array:
    """Median difference of the second view's depth from the first's moved there, as a share; NaN where unknown.

    Args:
        first: view.
        second: view.
        observed: poses.
        model: how the poses are to be read.
        factor: metres of the poses by a metre of depth.
        trials: frames after an image at which its depth was taken, and pixels that depth lies right and down of colour.
    """
    camera = observed.camera.pinhole() if model.pinhole else observed.camera
    depth, other = first.frame.depth_m, second.frame.depth_m
    result = np.full(len(trials), np.nan)
    if depth is None or other is None:
        return result
    v, u = np.nonzero(depth > 0)
    some = np.random.default_rng(0).permutation(len(u))[:CLOCK_POINTS]
    u, v = u[some], v[some]
    pixels, depths = np.stack([u, v], axis=1).astype(np.float64), factor * depth[v, u]
    motions: dict[float, Array] = {}
    for delay in {trial[0] for trial in trials}:
        a, b = (_camera_pose(view, observed, model, delay) for view in (first, second))
        if a is None or b is None:
            return result
        motions[delay] = inverse_pose(b) @ a
    for k, (delay, right, down) in enumerate(trials):
        rays = normalised(camera, pixels - (right, down))
        T = motions[delay]
        moved = (np.column_stack([rays, np.ones(len(rays))]) * depths[:, None]) @ T[:3, :3].T + T[:3, 3]
        moved = moved[moved[:, 2] > 1e-3]
        x, y = np.rint(camera.distort(moved[:, :2] / moved[:, 2:]) + np.array([right, down])).T
        inside = (x >= 0) & (y >= 0) & (x < other.shape[1]) & (y < other.shape[0])
        measured = factor * other[y[inside].astype(int), x[inside].astype(int)]
        near = np.abs(measured / moved[inside, 2] - 1)[measured > 0]
        near = near[near < 0.3]  # else another surface is in front
        if len(near) < CLOCK_POINTS // 6:
            return result
        result[k] = np.median(near)
    return result
