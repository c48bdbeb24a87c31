# SPDX-License-Identifier: Apache-2.0
"""Self-calibration where poses are inaccurate: the camera, fitted together with a correction of every relative pose.

A camera fitted over fixed poses takes their errors up. Here each pair of views has a correction of its relative pose,
with a Gaussian prior whose standard deviations are fitted, too (a mixed-effects model). What no correction of the usual
size explains is the camera's. Matches with depth are held to both coordinates of the image, the others to their
epipolar line. The corrections are eliminated from the normal equations by the Schur complement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import so3_exp
from kfloc_ros.mapping.check_depth import depth_unit
from kfloc_ros.mapping.check_geometry import PARAMETERS, STEPS, Array, Fit, Model, Observations
from kfloc_ros.types import Matrix

CAMERA = (7, 8, 9, 10, 11, 12)
"""Parameters of a model that are fitted: focal length, principal point, k1, aspect and readout."""
SIGNIFICANT, NUISANCE = 4.0, 2.5
"""Standard deviations from which on a parameter differs from what is given, and from which on it is fitted at all."""
LEAST = {7: 0.07, 8: 0.06, 9: 0.06, 10: 0.12, 11: 0.06, 12: 1.5}
"""Least size of a mistake: log of a factor, share of the focal length, k1, log of a factor, frames."""
DEPTH_NOISE = 0.015
"""Standard deviation of a measured depth, as a share of it."""
START_TURN_RAD, START_SHIFT = 0.01, 0.1
TURN_RAD, SHIFT = (0.002, 0.017), (0.01, 0.25)
"""Standard deviations of the corrections: where they start, and within which limits they are fitted. Those of the way
are shares of the usual distance between two views."""
ROUNDS, ITERATIONS = 4, 12
PIXEL_NOISE = 1.0
"""Scale of the Cauchy distribution of the residuals."""


@dataclass(frozen=True, eq=False)
class LooseFit:
    """The camera that fits the images where poses may be corrected."""

    fit: Fit
    cost: float
    """Mean of the penalised Cauchy cost."""
    residual_px: float
    """Median absolute residual."""
    turn_deg: float
    """Standard deviation of the corrections of the poses, in degrees."""
    pair_costs: Array
    """(K,) mean Cauchy cost of the matches of each pair."""


@dataclass(frozen=True, eq=False)
class CameraFound:
    """What is wrong with the calibration by the images."""

    kind: str
    """As of a cause; empty if nothing is."""
    found: LooseFit
    given: LooseFit
    """The fit of the poses alone, the camera being as it is given."""

    @property
    def is_trusted(self) -> bool:
        """The poses are near enough to the right ones to be corrected."""
        return self.found.turn_deg < 0.98 * float(np.degrees(TURN_RAD[1]))

    @property
    def is_certain(self) -> bool:
        """One parameter is wrong by twice what is told, and six standard deviations."""
        return self.kind == "pinhole" or any(_is_wrong(self.found, k, 6.0, 2.0) for k in CAMERA)


def find_camera(observed: Observations, base: Model, start: Model) -> CameraFound:
    """Return how the camera differs from the calibration, poses being merely near the right ones.

    Matches are held to epipolar lines: depth may be registered by the same wrong calibration. Only the readout, without
    which a rolling shutter passes for another lens, is fitted with depth.

    Args:
        observed: matches and poses.
        base: how the poses are to be read, with the camera as it is given.
        start: the same with a camera to start from.
    """
    lens = not observed.camera.is_pinhole and observed.camera.distortion_model != "equidistant"
    found, corrected = _least_camera(observed, start)
    pinhole = False
    if lens:
        flat, other = _least_camera(observed, replace(start, pinhole=True))
        pinhole = _size(flat, 10) < 0.5 * _size(found, 10) and _is_wrong(found, 10)
        found, corrected = (flat, other) if pinhole else (found, corrected)
    kind = "pinhole" if pinhole else camera_kind(found)
    if not kind or _is_wrong(found, 12):
        unit = depth_unit(observed, found.fit.model)
        if unit is not None:
            corrected = Corrected(observed, base, unit.factor)
            found = fit_camera(corrected, found.fit.model.changed([12], [0.0]), (7, 10, 12))
        kind = "rolling_shutter" if _is_wrong(found, 12) else ""
        if kind:  # the camera is the given one
            found = replace(found, fit=Fit(base.changed([12], found.fit.model.values[[12]]), found.fit.sigma))
    return CameraFound(kind, found, fit_camera(corrected, base, ()))


def camera_kind(found: LooseFit) -> str:
    """Return the kind of what is wrong, or nothing, but for the readout."""
    focal, centre = _is_wrong(found, 7), _is_wrong(found, 8) or _is_wrong(found, 9)
    if _is_wrong(found, 10) and _size(found, 10) > _size(found, 7):
        return "distortion"
    if _is_wrong(found, 11):
        return "aspect"
    if focal or centre:
        return "calibration" if focal and centre else "focal" if focal else "centre"
    return "distortion" if _is_wrong(found, 10) else ""


def _least_camera(observed: Observations, start: Model) -> tuple[LooseFit, Corrected]:
    """The fit of those parameters only that differ from what is given, and of the focal length."""
    corrected = Corrected(observed, start, None)
    found = fit_camera(corrected, start)
    free = [7]
    for group in ((8, 9), (10,), (11,), (12,)):
        least = 0.0 if group == (10,) else 0.5  # a lens always bends a little, which would change the focal length
        if any(_is_wrong(found, k, NUISANCE, least) for k in group):
            free += group
    fixed = found.fit.model.changed([k for k in CAMERA if k not in free], [0.0] * (len(CAMERA) - len(free)))
    return fit_camera(corrected, fixed, tuple(free)), corrected


def _size(found: LooseFit, parameter: int) -> float:
    return float(abs(found.fit.model.values[parameter]))


def _is_wrong(found: LooseFit, parameter: int, sigmas: float = SIGNIFICANT, share: float = 1.0) -> bool:
    size, sigma = _size(found, parameter), float(found.fit.sigma[parameter])
    return size > share * LEAST[parameter] and size > sigmas * sigma


class Corrected:
    """Matches whose relative poses may be corrected, for one reading of the poses.

    Args:
        observed: matches and poses.
        base: how the poses are to be read.
        depth_factor: what depth must be multiplied by to have the unit of the poses; None leaves the depth out.
        depths_m: (N,) depths of the matches in both views; None: those of the pairs.
    """

    def __init__(
        self,
        observed: Observations,
        base: Model,
        depth_factor: float | None,
        depths_m: Sequence[Array] | None = None,
    ) -> None:
        self.observed, self.base = observed, base
        self.motions, known = observed.relative(base)
        self.lengths = np.linalg.norm(self.motions[:, :3, 3], axis=1)
        known = known & (self.lengths > 1e-4 * observed.baseline)
        self.known = known[observed.pair_of]
        factor = float("nan") if depth_factor is None else depth_factor
        given = depths_m or [np.concatenate([p.depths_m[side] for p in observed.pairs]) for side in (0, 1)]
        self.depths = [factor * depths for depths in given]
        self.turns = observed.turns(base)

    def residuals(self, model: Model, corrections: Array) -> Array:
        """(N, 5) residuals in pixels over their noise, NaN where there is none: of the first view's depth in the second
        image, of the second's in the first, and of the epipolar line where depth is unknown.

        Args:
            model: camera.
            corrections: (K, 6) rotation vectors and ways by which the relative poses are changed.
        """
        pair_of = self.observed.pair_of
        x, y = self.observed.rays(model)
        if model.readout:
            x, y = (self._at_middle_row(rays, side, model.readout) for side, rays in enumerate((x, y)))
        focal = self.observed.focal_px * model.focal_factor
        scale = np.array([focal, focal * np.exp(model.values[11])])
        R = (so3_exp_all(corrections[:, :3]) @ self.motions[:, :3, :3])[pair_of]
        t = (self.motions[:, :3, 3] + corrections[:, 3:])[pair_of]
        a = np.einsum("nij,nj->ni", R, x)
        way = np.linalg.norm(t, axis=1)
        found = np.full((len(a), 5), np.nan)
        ahead = a * self.depths[0][:, None] + t
        back = np.einsum("nji,nj->ni", R, y * self.depths[1][:, None] - t)
        for column, moved, seen, depth in ((0, ahead, y, self.depths[0]), (2, back, x, self.depths[1])):
            with np.errstate(invalid="ignore", divide="ignore"):
                noise = np.hypot(PIXEL_NOISE, DEPTH_NOISE * way / depth * focal)
                miss = (moved[:, :2] / moved[:, 2:] - seen[:, :2]) * scale / noise[:, None]
            found[:, column : column + 2] = np.where((moved[:, 2] > 0.02 * depth)[:, None], miss, np.nan)
        t = t / np.maximum(way, 1e-12)[:, None]
        line, other = np.cross(t, a), -np.einsum("nji,nj->ni", R, np.cross(t, y))
        square = ((line[:, :2] / scale) ** 2).sum(1) + ((other[:, :2] / scale) ** 2).sum(1)
        lone = ~(np.isfinite(self.depths[0]) | np.isfinite(self.depths[1]))
        found[:, 4] = np.where(lone, (y * line).sum(1) / np.sqrt(np.maximum(square, 1e-30)), np.nan)
        found[~self.known] = np.nan
        return found

    def _at_middle_row(self, rays: Array, side: int, readout: float) -> Array:
        """Directions as seen when the middle row was exposed, the turn of the camera taken into account."""
        axis = (readout * self.observed.rows[side])[:, None] * self.turns[side][self.observed.pair_of] / 2
        bent = rays + np.cross(axis, rays) + np.cross(axis, np.cross(axis, rays)) / 2
        return np.asarray(bent / bent[:, 2:])


def so3_exp_all(vectors: Array) -> Matrix:
    """Return rotations (K, 3, 3) of rotation vectors (K, 3)."""
    return np.stack([so3_exp(vector) for vector in vectors])


def fit_camera(corrected: Corrected, start: Model, free: tuple[int, ...] = CAMERA) -> LooseFit:
    """Return the camera that fits, by Levenberg-Marquardt with Cauchy weights.

    Args:
        corrected: matches.
        start: where it begins.
        free: parameters of the model that are fitted.
    """
    pairs, usual = len(corrected.motions), corrected.observed.baseline
    sigma = np.repeat([START_TURN_RAD, START_SHIFT * usual], 3)
    state = _State(corrected, start, np.zeros((pairs, 6)), sigma)
    index = np.array(free, dtype=np.intp)
    for _ in range(ROUNDS):
        state, inverse, spread = _converged(state, index)
        square = np.einsum("kii->ki", inverse) + state.corrections**2
        turn = np.clip(np.sqrt(square[:, :3].mean()), *TURN_RAD)
        shift = np.clip(np.sqrt(square[:, 3:].mean()), SHIFT[0] * usual, SHIFT[1] * usual)
        state = replace(state, sigma=np.repeat([turn, shift], 3))
    sigmas = np.full(len(PARAMETERS), np.nan)
    sigmas[index] = spread
    good = np.isfinite(state.residuals)
    count = max(int(good.sum()), 1)
    left = float(np.median(np.abs(state.residuals[good]))) if good.any() else float("nan")
    fitted = Fit(state.model, sigmas)
    losses = np.log1p(np.where(good, state.residuals, 0) ** 2).sum(1)
    pair_of = corrected.observed.pair_of
    per_pair = np.bincount(pair_of, losses, pairs) / np.maximum(np.bincount(pair_of, good.sum(1), pairs), 1)
    return LooseFit(fitted, state.cost / count, left, float(np.degrees(state.sigma[0])), per_pair)


@dataclass(frozen=True, eq=False)
class _State:
    """One step of the fit."""

    corrected: Corrected
    model: Model
    corrections: Array
    sigma: Array
    """(6,) standard deviations of the corrections."""

    @property
    def residuals(self) -> Array:
        return self.corrected.residuals(self.model, self.corrections)

    @property
    def cost(self) -> float:
        r = self.residuals
        return float(np.log1p(np.where(np.isfinite(r), r, 0) ** 2).sum() + ((self.corrections / self.sigma) ** 2).sum())


def _converged(state: _State, index: NDArray[np.intp]) -> tuple[_State, Array, Array]:
    """(state, covariances (K, 6, 6) of its corrections, standard deviations of the camera by the scatter of pairs)."""
    damping, before = 1e-3, state.cost
    for _ in range(ITERATIONS):
        P, W, S, b_pose, b = _normal_equations(state, index)
        damped = np.linalg.inv(P + damping * np.einsum("kii->ki", P)[:, :, None] * np.eye(6))
        H = (S - np.einsum("kpi,kpq,kqj->kij", W, damped, W)).sum(0)
        gradient = (b - np.einsum("kpi,kpq,kq->ki", W, damped, b_pose)).sum(0)
        step = -np.linalg.pinv(H + damping * np.diag(np.diag(H))) @ gradient
        change = -np.einsum("kpq,kq->kp", damped, b_pose + np.einsum("kpi,i->kp", W, step))
        values = state.model.values[index] + step
        trial = replace(state, model=state.model.changed(index, values), corrections=state.corrections + change)
        after = trial.cost
        if after < before:
            gain, before, state, damping = before - after, after, trial, damping / 5
            if gain < 1e-4 * after:
                break
        else:
            damping *= 10
            if damping > 1e4:
                break
    P, W, S, b_pose, b = _normal_equations(state, index)  # undamped
    inverse = np.linalg.inv(P)
    H = np.linalg.pinv((S - np.einsum("kpi,kpq,kqj->kij", W, inverse, W)).sum(0))
    groups = b - np.einsum("kpi,kpq,kq->ki", W, inverse, b_pose)
    more = len(groups) / max(len(groups) - len(index), 1)
    spread = np.sqrt(np.maximum(np.diag(H @ (groups.T @ groups) @ H) * more, 0))
    return state, np.asarray(inverse, dtype=np.float64), np.asarray(spread, dtype=np.float64)


def _normal_equations(state: _State, index: NDArray[np.intp]) -> tuple[Array, Array, Array, Array, Array]:
    """Sums over each pair's matches: (K, 6, 6), (K, 6, F), (K, F, F), and the gradients (K, 6), (K, F)."""
    corrected, model, corrections = state.corrected, state.model, state.corrections
    r = state.residuals
    columns = []
    for j in range(6):
        step = 1e-6 if j < 3 else 1e-6 * corrected.observed.baseline
        columns.append((corrected.residuals(model, corrections + step * np.eye(6)[j]) - r) / step)
    for parameter in index.tolist():
        step = float(STEPS[parameter])
        moved = model.changed([parameter], [model.values[parameter] + step])
        columns.append((corrected.residuals(moved, corrections) - r) / step)
    J = np.stack(columns, axis=-1)
    good = np.isfinite(r) & np.isfinite(J).all(-1)
    weight = np.where(good, 1 / (1 + np.where(good, r, 0) ** 2), 0.0)
    J, r = np.where(good[..., None], J, 0), np.where(good, r, 0)
    sums = np.zeros((len(corrections), J.shape[-1], J.shape[-1]))
    gradients = np.zeros((len(corrections), J.shape[-1]))
    for k in range(len(corrections)):
        own = corrected.observed.pair_of == k
        block = J[own].reshape(-1, J.shape[-1])
        w = weight[own].ravel()
        sums[k] = block.T @ (w[:, None] * block)
        gradients[k] = block.T @ (w * r[own].ravel())
    P = sums[:, :6, :6] + np.diag(1 / state.sigma**2)
    return P, sums[:, :6, 6:], sums[:, 6:, 6:], gradients[:, :6] + corrections / state.sigma**2, gradients[:, 6:]
