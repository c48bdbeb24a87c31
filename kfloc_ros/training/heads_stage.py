# SPDX-License-Identifier: Apache-2.0
"""A step of training alignment heads: pose errors through all iterations of both levels, as PixLoc is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.config import option
from kfloc_ros.features.backbone import COARSE_STRIDE, FINE_STRIDE
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.heads import LEVELS, AlignmentHeads, save_heads
from kfloc_ros.pixloc.reference.cost import FeatureCost, FeatureMap
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.solver import SolverSettings, from_recentred, minimize, recentre
from kfloc_ros.pixloc.refiner import RefinerSettings
from kfloc_ros.training.heads_views import HeadPairs
from kfloc_ros.training.pixloc_losses import MIN_COMMON_POINTS
from kfloc_ros.training.pixloc_stages import AlignmentConfig
from kfloc_ros.training.stage import Stage, StepLoss

STRIDES = (COARSE_STRIDE, FINE_STRIDE)
KNEE_PX = 0.5
"""Errors below count by their square, errors above by their length."""
RATIO_STEP = 0.02
"""Of the running mean of cost ratios, a step."""


@dataclass(frozen=True)
class HeadsTrainConfig(AlignmentConfig):
    """Options of ``kfloc train heads``."""

    steps: int = option(1500, "Steps in all.", low=1)
    learning_rate: float = option(1e-3, "Of the heads.", low=0.0, high=1.0)
    damping_rate: float = option(10.0, "Times the learning rate, for the damping factors.", low=0.0, high=1e6)
    batch: int = option(4, "Pairs in a step.", low=1, high=256)
    validate_every: int = option(100, "Steps between looks at the held-out room; also at the start and end.", low=1)
    validation_pairs: int = option(64, "Pairs of the held-out room that are looked at, always the same.", low=1)
    snapshot_every: int = option(100, "Steps between checkpoints; one is also written at the end.", low=1)
    fine: bool = option(False, "A head for the fine level, too; it costs time and has brought nothing so far.")
    iterations: int = option(8, "Of the alignment, a level.", low=1, high=100)
    success_px: float = option(3.0, "Error, in coarse cells, above which the fine level does not count.", low=0.0)
    clamp_px: float = option(50.0, "Error above which there is no gradient.", low=0.0)
    rooms: int = option(8, "Simulated rooms.", low=1, high=1000)
    places: int = option(12, "In each room.", low=1, high=1000)
    views: int = option(6, "Around each place, each in a light of its own.", low=2, high=100)


class HeadsStage(Stage[HeadPairs]):
    """Both heads and the damping of both levels.

    Args:
        heads: to train.
        iterations: of the alignment, a level.
        success_px: see :class:`HeadsTrainConfig`.
        clamp_px: see :class:`HeadsTrainConfig`.
    """

    name = "heads"

    def __init__(
        self, heads: AlignmentHeads, *, iterations: int = 8, success_px: float = 3.0, clamp_px: float = 50.0
    ) -> None:
        self.model, self._plain = heads, AlignmentHeads(heads.config)
        self._success_px, self._clamp_px = success_px, clamp_px
        self._settings = SolverSettings(
            num_iters=iterations,
            loss=RobustLoss("barron", 0.0, RefinerSettings().loss_scale),
            min_valid=MIN_COMMON_POINTS,
            stop_period=0,
        )

    def modules(self) -> dict[str, nn.Module]:
        return {"heads": self.model}

    def groups(self) -> list[list[nn.Parameter]]:
        damping = list(self.model.damping.parameters())
        known = {id(parameter) for parameter in damping}
        return [[parameter for parameter in self.model.parameters() if id(parameter) not in known], damping]

    def write(self, name: str, path: Path, origin: str) -> None:
        del name
        save_heads(path, self.model, origin=origin)

    def loss(self, items: Sequence[HeadPairs], generator: torch.Generator) -> StepLoss:
        del generator
        batch = HeadPairs.together(items)
        if self.model.training:
            self._note_cost(batch)
        points, camera = batch.points, batch.camera
        true_uv, true_seen = camera.world2image(batch.T_true.transform(points))
        _, init_seen = camera.world2image(batch.T_init.transform(points))
        common = true_seen & init_seen
        usable = common.sum(-1) >= MIN_COMMON_POINTS

        def error_px(T: Pose) -> torch.Tensor:
            """(B,) mean distance of the common points from where they belong, in pixels, rounded off below the knee."""
            uv, _ = camera.world2image(T.transform(points))
            squared = torch.where(common, ((uv - true_uv) ** 2).sum(-1), torch.zeros_like(uv[..., 0]))
            distance = (squared + KNEE_PX**2).sqrt() - KNEE_PX
            return (distance * common).sum(-1) / common.sum(-1).clamp(min=1)

        ends = self.align(batch)
        total = torch.zeros_like(usable, dtype=torch.float64)
        counts, figures = torch.ones_like(usable), {}
        for level, stride, T in zip(LEVELS, STRIDES, ends, strict=True):
            error = error_px(T).clamp(max=self._clamp_px)
            usable = usable & error.detach().isfinite()
            total = total + torch.where(counts, error, torch.full_like(error, self._clamp_px)) / len(ends)
            # where the coarse level went wrong, the fine one can learn nothing
            counts = counts & (error.detach() < self._success_px * stride)
            figures[f"error_px/{level}"] = error.detach()
        total = torch.where(usable, total, torch.zeros_like(total))
        left = (ends[-1].detach() @ batch.T_true.inv()).magnitude()
        figures |= {
            "error_px/init": error_px(batch.T_init).detach(),
            "rotation_deg": left[0],
            "translation_m": left[1],
            "within_1cm": (left[1] < 0.01).double(),
            "within_5cm": (left[1] < 0.05).double(),
        }
        named = {
            key: float(value[usable].mean()) if bool(usable.any()) else float("nan") for key, value in figures.items()
        }
        for level in LEVELS:
            named |= {
                f"log10_damping_{level}/{name}": float(value)
                for name, value in zip(
                    ("tx", "ty", "tz", "rx", "ry", "rz"), self.model.damping_of(level).detach().log10(), strict=True
                )
            }
        return StepLoss(total.mean(), named)

    def align(self, batch: HeadPairs) -> list[Pose]:
        """(B,) T_query_reference after the coarse and after the fine level, differentiable within each level."""
        local = recentre(batch.points, batch.T_init, batch.coarse.dtype)
        ends, T = [], local.T
        for level, cost in zip(LEVELS, level_costs(self.model, batch, local.points), strict=True):
            T = minimize(cost, T.detach(), self._settings, self.model.damping_of(level).double()).T
            ends.append(from_recentred(T, local.origin))
        return ends

    @torch.no_grad()
    def _note_cost(self, batch: HeadPairs) -> None:
        """Follow how the fine level's cost at the true pose compares with that of plain features."""
        local = recentre(batch.points, batch.T_true, batch.coarse.dtype)
        costs = [
            level_costs(heads, batch, local.points)[-1].linearize(local.T, self._settings.loss).mean_cost
            for heads in (self.model, self._plain)
        ]
        ratio = (costs[0] / costs[1]).median()
        if bool(ratio.isfinite()):
            self.model.cost_ratio.lerp_(ratio.to(self.model.cost_ratio), RATIO_STEP)


def level_costs(heads: AlignmentHeads, batch: HeadPairs, points: torch.Tensor) -> list[FeatureCost]:
    """The alignment problems of both levels, coarse then fine.

    Args:
        heads: that features pass through.
        batch: of pairs.
        points: (B, N, 3) the batch's, in the frame that poses are from.
    """
    maps = heads.of_maps(batch.coarse, batch.fine)
    references = heads.of_points(batch.point_coarse, batch.point_fine)
    costs = []
    for stride, here, there in zip(STRIDES, maps, references, strict=True):
        reliability = F.interpolate(batch.reliability[:, None], here.features.shape[1:3], mode="bilinear")
        costs.append(
            FeatureCost(
                query=FeatureMap.with_confidence(here.features.permute(0, 3, 1, 2), reliability * here.trust[:, None]),
                camera=batch.camera.scale(1.0 / stride),
                points=points,
                features=there.features,
                confidence=batch.point_confidence * there.trust,
                pad=0,
            )
        )
    return costs
