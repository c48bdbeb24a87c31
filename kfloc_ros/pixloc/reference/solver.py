# SPDX-License-Identifier: Apache-2.0
"""Batched Levenberg-Marquardt on the feature-metric cost: PixLoc's fixed (learned) damping, classic LM, Gauss-Newton.

Only the stop test waits for the GPU. An element whose system cannot be solved keeps its pose and is marked as failed;
the others continue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import torch

from kfloc_ros.errors import ConfigError
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureCost, NormalEquations
from kfloc_ros.pixloc.reference.losses import RobustLoss

DAMPING_FLOOR = 1e-6
CLASSIC_START, CLASSIC_MIN, CLASSIC_MAX = 1e-2, 1e-7, 1e4


class Method(Enum):
    """Damping method, and treatment of steps that do not lower the cost."""

    FIXED = "fixed"
    """PixLoc's method: the damping is given (learned, or one number), and every step is taken. Damping 0 is
    Gauss-Newton."""
    CLASSIC = "classic"
    """Damping adapts per element; a step that does not lower the cost is rejected."""


@dataclass(frozen=True)
class SolverSettings:
    """Settings of the optimisation of one level; the defaults are the original's.

    Raises:
        ConfigError: a number is out of its range.
    """

    method: Method = Method.FIXED
    num_iters: int = 100
    loss: RobustLoss = field(default_factory=lambda: RobustLoss.parse("scaled_barron(0, 0.1)"))
    jacobi_scaling: bool = False
    min_valid: int = 10
    """Smallest number of valid points; an element with fewer at any iteration fails."""
    stop_period: int = 10
    """Iterations between two stop tests, from the first iteration on; 0: no stop test (training)."""
    stop_step_m: float = 5e-3
    stop_step_deg: float = 0.05
    stop_gradient: float = 1e-4
    legacy: bool = False
    """Measure the step's angle as the original does, in steps of about 0.02 deg, so that the numbers of iterations
    agree."""

    def __post_init__(self) -> None:
        if self.num_iters < 1 or self.stop_period < 0 or self.min_valid < 1:
            raise ConfigError(
                "A solver takes at least one iteration, one point, and no negative stop period, got "
                f"{self.num_iters}, {self.min_valid}, {self.stop_period}."
            )


@dataclass(frozen=True, eq=False)
class Iteration:
    """State after one iteration, for an observer."""

    index: int
    """Index of the iteration, from 0."""
    T: Pose
    """(B,) poses after the step."""
    delta: torch.Tensor
    """(B, 6) accepted or rejected step."""
    at: NormalEquations
    """Normal equations before the step."""
    accepted: torch.Tensor
    """(B,) bool"""


Observer = Callable[[Iteration], None]


@dataclass(frozen=True, eq=False)
class SolverResult:
    """Result of a level."""

    T: Pose
    """(B,) float64"""
    failed: torch.Tensor
    """(B,) bool: too few valid points at some iteration, or a system without a solution."""
    iterations: int
    initial: NormalEquations
    """Normal equations at the start."""


class Step(NamedTuple):
    """Solution of a damped system."""

    delta: torch.Tensor
    """(B, 6) solution, zero where there is none."""
    solved: torch.Tensor
    """(B,) bool"""


class Recentred(NamedTuple):
    """Problem in coordinates near its own points."""

    points: torch.Tensor
    """(B, N, 3) in the requested type."""
    T: Pose
    """(B,) float64, from the local frame."""
    origin: torch.Tensor
    """(B, 3) float64, origin of the local frame."""


def recentre(points: torch.Tensor, T: Pose, dtype: torch.dtype = torch.float32) -> Recentred:
    """Move the origin into the points' mean, so that single precision is stays wherever the world's origin is.

    The optimiser perturbs the camera's side of the pose, so only rounding changes.
    """
    points, T = points.double(), T.double()
    origin = points.mean(dim=-2) if points.shape[-2] else points.new_zeros(*points.shape[:-2], 3)
    local = Pose.from_Rt(T.R, T.transform(origin[..., None, :])[..., 0, :])
    return Recentred((points - origin[..., None, :]).to(dtype), local, origin)


def from_recentred(T: Pose, origin: torch.Tensor) -> Pose:
    """Return the pose from the world frame, given the pose from a frame at ``origin``."""
    return Pose.from_Rt(T.R, T.transform(-origin[..., None, :])[..., 0, :])


def damped_step(H: torch.Tensor, g: torch.Tensor, damping: torch.Tensor, active: torch.Tensor) -> Step:
    """Solve (H + max(damping diag H, 1e-6)) delta = -g by Cholesky.

    Args:
        H, g: (B, 6, 6) and (B, 6).
        damping: (6,) or (B, 6) or (B, 1), relative to the diagonal.
        active: (B,) bool; other elements get zero.
    """
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    damped = H + torch.diag_embed((damping * diagonal).clamp(min=DAMPING_FLOOR))
    eye = torch.eye(6, dtype=H.dtype, device=H.device)
    usable = active & damped.isfinite().all(-1).all(-1) & g.isfinite().all(-1)
    factor, info = torch.linalg.cholesky_ex(torch.where(usable[:, None, None], damped, eye))
    usable = usable & (info == 0)
    factor = torch.where(usable[:, None, None], factor, eye)
    delta = -torch.cholesky_solve(torch.where(usable[:, None], g, torch.zeros_like(g))[..., None], factor)[..., 0]
    finite = delta.isfinite().all(-1)
    return Step(torch.where(finite[:, None], delta, torch.zeros_like(delta)), usable & finite)


def minimize(
    cost: FeatureCost,
    T: Pose,
    settings: SolverSettings,
    damping: torch.Tensor | float = 0.0,
    observer: Observer | None = None,
) -> SolverResult:
    """Minimise the cost of one level from poses T (B,).

    Args:
        cost: the problem.
        T: starting poses, from the points' frame to the query camera.
        settings: settings of the solver.
        damping: for :attr:`Method.FIXED`: a number, or (6,) factors in the order tx, ty, tz, rx, ry, rz.
        observer: called after every iteration.
    """
    run = _Run(cost, T.double(), settings, observer)
    if settings.method is Method.CLASSIC:
        return run.classic()
    return run.fixed(torch.as_tensor(damping, dtype=torch.float64, device=T.device))


class _Run:
    def __init__(self, cost: FeatureCost, T: Pose, settings: SolverSettings, observer: Observer | None) -> None:
        self.cost, self.T, self.settings, self.observer = cost, T, settings, observer
        self.scaling: torch.Tensor | None = None
        self.failed = torch.zeros(T.shape, dtype=torch.bool, device=T.device)

    def fixed(self, damping: torch.Tensor) -> SolverResult:
        initial: NormalEquations | None = None
        index = 0
        for index in range(self.settings.num_iters):
            at = self._linearize(self.T)
            initial = initial or at
            self.failed = self.failed | (at.valid_count < self.settings.min_valid)
            step = self._step(at, damping)
            self.failed = self.failed | ~step.solved
            self.T = self.T.retract(step.delta)
            self._tell(Iteration(index, self.T, step.delta, at, step.solved))
            if self._due(index) and bool((self._small(step.delta) | self._flat(at)).all()):
                break
        assert initial is not None
        return SolverResult(self.T, self.failed, index + 1, initial)

    def classic(self) -> SolverResult:
        at = initial = self._linearize(self.T)
        self.failed = at.valid_count < self.settings.min_valid
        damping = torch.full((*self.T.shape, 1), CLASSIC_START, dtype=torch.float64, device=self.T.device)
        done = self.failed
        index = 0
        for index in range(self.settings.num_iters):
            step = self._step(at, damping)
            tried = self.T.retract(step.delta)
            new = self._linearize(tried)
            # Points that leave the image no longer add to the cost; that must not count as progress.
            stays = new.valid_count * 3 >= at.valid_count * 2
            accept = step.solved & (new.mean_cost < at.mean_cost) & stays & (new.valid_count >= self.settings.min_valid)
            self.T = Pose(torch.where(accept[:, None], tried.data, self.T.data))
            self._tell(Iteration(index, self.T, step.delta, at, accept))
            done = done | (self._small(step.delta) & step.solved) | self._flat(at) | (damping[:, 0] >= CLASSIC_MAX)
            at = _select(accept, new, at)
            damping = torch.where(accept[:, None], damping / 10, damping * 10).clamp(CLASSIC_MIN, CLASSIC_MAX)
            if self._due(index) and bool(done.all()):
                break
        return SolverResult(self.T, self.failed, index + 1, initial)

    def _linearize(self, T: Pose) -> NormalEquations:
        first = self.settings.jacobi_scaling and self.scaling is None
        at = self.cost.linearize(T, self.settings.loss, column_norms=first)
        if first and at.column_norms is not None:
            norms = at.column_norms * at.valid[..., None]
            mean = norms.sum(-2) / at.valid_count.clamp(min=1)[:, None]
            self.scaling = 1 / (1 + mean.double())
        return at

    def _step(self, at: NormalEquations, damping: torch.Tensor) -> Step:
        if self.scaling is None:
            return damped_step(at.H, at.g, damping, ~self.failed)
        s = self.scaling
        step = damped_step(s[:, :, None] * at.H * s[:, None, :], s * at.g, damping, ~self.failed)
        return Step(s * step.delta, step.solved)

    def _due(self, index: int) -> bool:
        return self.settings.stop_period > 0 and index % self.settings.stop_period == 0

    def _small(self, delta: torch.Tensor) -> torch.Tensor:
        """Return (B,) bool: the step is below the stop limits."""
        angle = _coarse_angle_deg(delta[:, 3:]) if self.settings.legacy else delta[:, 3:].norm(dim=-1).rad2deg()
        short: torch.Tensor = (delta[:, :3].norm(dim=-1) < self.settings.stop_step_m) & (
            angle < self.settings.stop_step_deg
        )
        return short

    def _flat(self, at: NormalEquations) -> torch.Tensor:
        g = at.g if self.scaling is None else at.g * self.scaling
        flat: torch.Tensor = g.norm(dim=-1) < self.settings.stop_gradient
        return flat

    def _tell(self, iteration: Iteration) -> None:
        if self.observer is not None:
            self.observer(iteration)


def _select(accept: torch.Tensor, new: NormalEquations, old: NormalEquations) -> NormalEquations:
    def pick(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.where(accept.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return replace(
        old,
        H=pick(new.H, old.H),
        g=pick(new.g, old.g),
        scatter=pick(new.scatter, old.scatter),
        cost=pick(new.cost, old.cost),
        confidence=pick(new.confidence, old.confidence),
        valid=pick(new.valid, old.valid),
        column_norms=None,
    )


def _coarse_angle_deg(rotation_vector: torch.Tensor) -> torch.Tensor:
    """Return the angle of rotation vectors (B, 3) as acos((trace - 1) / 2) of a single-precision matrix gives it."""
    w = rotation_vector.float()
    theta = w.norm(dim=-1, keepdim=True)
    tiny = theta < 1e-7
    x, y, z = (w / torch.where(tiny, torch.ones_like(theta), theta)).unbind(-1)
    minus_squares = torch.stack([-z * z - y * y, -z * z - x * x, -y * y - x * x], dim=-1)
    diagonal = 1 + torch.where(tiny, torch.zeros_like(minus_squares), minus_squares * (1 - theta.cos()))
    return ((diagonal.sum(-1) - 1) / 2).clamp(-1, 1).acos().rad2deg()
