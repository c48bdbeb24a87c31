# SPDX-License-Identifier: Apache-2.0
"""What a step of training is made of. For PixLoc's network: the alignment of pairs, or GN-Net's losses on features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.model import PixLocModel, save_model
from kfloc_ros.pixloc.reference.two_view import align_two_views, training_settings
from kfloc_ros.training.kfnet_stages import StepLoss
from kfloc_ros.training.pixloc_losses import GnNetLoss, gnnet_loss, two_view_loss
from kfloc_ros.training.pixloc_samples import Pairs

GRADIENT_PAD = 1
"""Cells at a map's border where a central difference would leave it."""


BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


class Samples(Protocol[BatchT_co]):
    """Draws batches; the k-th sample is always the same."""

    def batch(
        self, first: int, count: int, workers: ThreadPoolExecutor | None = None, device: torch.device | None = None
    ) -> BatchT_co:
        """Samples ``first`` to ``first + count - 1``, on a device."""


class TrainingStage(ABC, Generic[BatchT]):
    """A way to train something that aligns images."""

    name: str
    model: nn.Module
    weights_name: str
    """Of the file with the weights, without ending."""

    @abstractmethod
    def groups(self, learning_rate: float, damping_rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups of parameters; the damping's rate is ``damping_rate`` times the others'."""

    @abstractmethod
    def save(self, path: Path, origin: str) -> None:
        """Write the weights as they are now."""

    @abstractmethod
    def loss(self, batch: BatchT, generator: torch.Generator) -> StepLoss:
        """Of a batch on the model's device."""


class PairStage(TrainingStage[Pairs]):
    """A way to train PixLoc's network on pairs."""

    weights_name = "pixloc"
    model: PixLocModel

    def __init__(self, model: PixLocModel) -> None:
        self.model = model

    def groups(self, learning_rate: float, damping_rate: float) -> list[dict[str, Any]]:
        return [
            {"params": list(self.model.extractor.parameters()), "lr": learning_rate},
            {"params": list(self.model.optimizer.parameters()), "lr": learning_rate * damping_rate},
        ]

    def save(self, path: Path, origin: str) -> None:
        save_model(path, self.model, origin=origin)


class TwoViewStage(PairStage):
    """PixLoc as published: the pose error after every level, through all iterations of the alignment."""

    name = "pixloc"

    def __init__(self, model: PixLocModel, *, success_px: float = 3.0, clamp_px: float = 50.0) -> None:
        super().__init__(model)
        self._success_px, self._clamp_px = success_px, clamp_px

    def loss(self, batch: Pairs, generator: torch.Generator) -> StepLoss:
        del generator
        pairs, model = batch, self.model
        result = align_two_views(
            model,
            model.extractor(pairs.reference),
            model.extractor(pairs.query),
            pairs.camera_reference,
            pairs.camera_query,
            pairs.points,
            pairs.T_init,
            settings=training_settings(model.config),
        )
        found = two_view_loss(
            result, pairs.T_init, pairs.T_true, pairs.camera_query, pairs.points, model.extractor.strides,
            success_px=self._success_px, clamp_px=self._clamp_px,
        )  # fmt: skip
        usable = found.usable
        figures = {"usable": float(usable.double().mean()), "reprojection_px/init": _mean(found.initial_px, usable)}
        for level, error in zip(result.levels, found.errors_px, strict=True):
            figures[f"reprojection_px/{level.level}"] = _mean(error, usable)
        left = (result.T_query_reference @ pairs.T_true.double().inv()).magnitude()
        figures |= {"rotation_deg": _mean(left[0].detach(), usable), "translation_m": _mean(left[1].detach(), usable)}
        return StepLoss(found.total.mean(), figures)


class GnNetStage(PairStage):
    """GN-Net: a contrastive and a Gauss-Newton loss at true correspondences; no pose takes part."""

    name = "gnnet"

    def loss(self, batch: Pairs, generator: torch.Generator) -> StepLoss:
        pairs, model = batch, self.model
        reference, query = model.extractor(pairs.reference), model.extractor(pairs.query)
        moved = pairs.T_true.double().transform(pairs.points)
        parts: list[GnNetLoss] = []
        for level, stride in enumerate(model.extractor.strides):
            maps, places, inside = [], [], []
            for pyramid, camera, points in (
                (reference, pairs.camera_reference, pairs.points),
                (query, pairs.camera_query, moved),
            ):
                features = pyramid.features[level]
                if model.config.normalize_features:
                    features = F.normalize(features, dim=1)
                found = FeatureMap.from_maps(features)
                uv, seen = camera.scale(1.0 / stride).world2image(points)
                maps.append(found)
                places.append(uv.to(features.dtype))
                inside.append(seen & found.inside(uv, GRADIENT_PAD))
            mask = inside[0] & inside[1]
            for here, there in ((0, 1), (1, 0)):
                features = maps[here].sample(places[here]).values
                parts.append(gnnet_loss(maps[there], features, places[there], mask, generator))
        total = torch.stack([part.total for part in parts]).mean()
        figures = {
            "gauss_newton": float(torch.stack([part.gauss_newton for part in parts]).mean().detach()),
            "contrastive": float(torch.stack([part.contrastive for part in parts]).mean().detach()),
        }
        return StepLoss(total, figures)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> float:
    return float(values[mask].double().mean()) if bool(mask.any()) else float("nan")
