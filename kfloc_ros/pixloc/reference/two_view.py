# SPDX-License-Identifier: Apache-2.0
"""PixLoc on two views, as in training: points of the reference camera are aligned to the query, coarse to fine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureCost, FeatureMap, NormalEquations
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel
from kfloc_ros.pixloc.reference.solver import Iteration, SolverSettings, from_recentred, minimize, recentre
from kfloc_ros.pixloc.reference.unet import FeaturePyramid

LevelObserver = Callable[[int, Iteration], None]
"""Observer called with the level (0 is the finest) and the iteration."""


@dataclass(frozen=True, eq=False)
class TraceStep:
    """Pose of an alignment, with the cost of every reference point there."""

    T_map_camera: Matrix
    image_scale: int
    stride: int
    """Image pixels per cell of the level, at full image size."""
    rows: NDArray[np.int64]
    """(N,) rows of the scene's points."""
    costs: NDArray[np.float32]
    """(N,) robust costs; NaN where out of view."""

    @property
    def cost(self) -> float:
        """Mean cost of the points in view; NaN without any."""
        seen = np.isfinite(self.costs)
        return float(self.costs[seen].mean()) if seen.any() else float("nan")


class AlignmentTrace:
    """Observer that keeps every step of an alignment by the reference family's refiner, and the confidences."""

    def __init__(self) -> None:
        self.steps: list[TraceStep] = []
        self.confidences: tuple[torch.Tensor, ...] = ()
        """(1, 1, h, w) each, fine to coarse, at the last image scale."""
        self.strides: tuple[int, ...] = ()
        self.camera_scale = 1.0
        """Scale of the network's last image."""
        self._scale = 1
        self._rows: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._T: Matrix | None = None

    def begin(
        self, T_map_camera: Matrix, image_scale: int, camera_scale: float, pyramid: FeaturePyramid, rows: torch.Tensor
    ) -> None:
        """Note the start of an image scale: the pose, the image's features, and the rows of the points."""
        self._T, self._scale, self.camera_scale = T_map_camera, image_scale, camera_scale
        self.confidences, self.strides = pyramid.confidences, pyramid.strides
        self._rows = rows.cpu().numpy()

    def __call__(self, level: int, iteration: Iteration) -> None:
        """Add the state before an iteration."""
        self._add(level, iteration.at)
        self._T = iteration.T.inv().matrix_numpy()[0]

    def end(self, level: int, at: NormalEquations) -> None:
        """Add the state after the last iteration."""
        self._add(level, at)

    def _add(self, level: int, at: NormalEquations) -> None:
        assert self._T is not None
        costs = torch.where(at.valid[0], at.cost[0], torch.nan).float().cpu().numpy()
        stride = self._scale * self.strides[level]
        self.steps.append(TraceStep(self._T, self._scale, stride, self._rows, costs))


@dataclass(frozen=True, eq=False)
class TwoViewLevel:
    """Result of one level."""

    level: int
    """Index of the level; 0 is the finest."""
    T_init: Pose
    T_opt: Pose
    failed: torch.Tensor
    """(B,) bool"""
    iterations: int


@dataclass(frozen=True, eq=False)
class TwoViewResult:
    """Results of all levels, in the order run: coarse to fine."""

    levels: tuple[TwoViewLevel, ...]

    @property
    def T_query_reference(self) -> Pose:
        """(B,) float64: result of the finest level."""
        return self.levels[-1].T_opt

    @property
    def failed(self) -> torch.Tensor:
        """(B,) bool: failed at any level."""
        return torch.stack([level.failed for level in self.levels]).any(0)


def solver_settings(config: PixLocConfig, *, num_iters: int | None = None, legacy: bool = False) -> SolverSettings:
    """Return the settings of the solver that a model was trained with.

    Args:
        config: configuration of the model.
        num_iters: largest number of iterations; None: the model's.
        legacy: see :class:`SolverSettings`.
    """
    return SolverSettings(
        num_iters=config.num_iters if num_iters is None else num_iters,
        loss=RobustLoss.parse(config.loss),
        jacobi_scaling=config.jacobi_scaling,
        legacy=legacy,
    )


def align_two_views(
    model: PixLocModel,
    reference: FeaturePyramid,
    query: FeaturePyramid,
    camera_reference: CameraTensor,
    camera_query: CameraTensor,
    points_reference: torch.Tensor,
    T_init: Pose,
    *,
    settings: SolverSettings | None = None,
    observer: LevelObserver | None = None,
) -> TwoViewResult:
    """Align a batch of pairs.

    Args:
        model: provides damping and configuration; features are passed in.
        reference, query: features of the two images.
        camera_reference, camera_query: (B,) of the images as given to the extractor.
        points_reference: (B, N, 3) in the reference camera's frame.
        T_init: (B,) T_query_reference to start from.
        settings: settings of the solver (default: the model's).
        observer: called after every iteration; its poses are T_query_reference.
    """
    settings = settings or solver_settings(model.config)
    pad = model.config.pad
    dtype = query.features[0].dtype
    local = recentre(points_reference, T_init, dtype)
    T = local.T
    levels: list[TwoViewLevel] = []
    for level in reversed(range(len(query))):
        scale = 1.0 / query.strides[level]
        uv, seen = camera_reference.scale(scale).world2image(points_reference, legacy=settings.legacy)
        maps = FeatureMap.with_confidence(reference.features[level], reference.confidences[level])
        values, inside = maps.sample(uv.to(dtype), pad)
        features, query_features = values[..., :-1], query.features[level]
        if model.config.normalize_features:
            features, query_features = F.normalize(features, dim=-1), F.normalize(query_features, dim=1)
        cost = FeatureCost(
            query=FeatureMap.with_confidence(query_features, query.confidences[level]),
            camera=camera_query.double().scale(scale),
            points=local.points,
            features=features,
            confidence=values[..., -1],
            mask=seen & inside,
            pad=pad,
            legacy=settings.legacy,
        )
        tell = None if observer is None else in_world(observer, level, local.origin)
        start = T.detach()
        result = minimize(cost, start, settings, model.damping(level).double(), tell)
        T = result.T
        levels.append(
            TwoViewLevel(
                level,
                from_recentred(start, local.origin),
                from_recentred(T, local.origin),
                result.failed,
                result.iterations,
            )
        )
    return TwoViewResult(tuple(levels))


def in_world(observer: LevelObserver, level: int, origin: torch.Tensor) -> Callable[[Iteration], None]:
    """Return an observer of one level of a recentred problem that passes poses from the world frame on."""

    def tell(iteration: Iteration) -> None:
        observer(level, replace(iteration, T=from_recentred(iteration.T, origin)))

    return tell


def training_settings(config: PixLocConfig) -> SolverSettings:
    """Return the model's solver with all its iterations, so that all elements of a batch are treated equally."""
    return replace(solver_settings(config), stop_period=0)
