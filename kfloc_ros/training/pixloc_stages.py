# SPDX-License-Identifier: Apache-2.0
"""What a step of training PixLoc's network is made of: the alignment of pairs, or GN-Net's losses on features."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from kfloc_ros.pixloc.feature_map import FeatureMap
from kfloc_ros.pixloc.model import PixLocModel
from kfloc_ros.pixloc.two_view import align_two_views, training_settings
from kfloc_ros.training.kfnet_stages import StepLoss
from kfloc_ros.training.pixloc_losses import GnNetLoss, gnnet_loss, two_view_loss
from kfloc_ros.training.pixloc_samples import Pairs

GRADIENT_PAD = 1
"""Cells at a map's border where a central difference would leave it."""


class PairStage(ABC):
    """A way to train on pairs."""

    name: str

    def __init__(self, model: PixLocModel) -> None:
        self.model = model

    @abstractmethod
    def loss(self, pairs: Pairs, generator: torch.Generator) -> StepLoss:
        """Of a batch on the model's device."""


class TwoViewStage(PairStage):
    """PixLoc as published: the pose error after every level, through all iterations of the alignment."""

    name = "pixloc"

    def __init__(self, model: PixLocModel, *, success_px: float = 3.0, clamp_px: float = 50.0) -> None:
        super().__init__(model)
        self._success_px, self._clamp_px = success_px, clamp_px

    def loss(self, pairs: Pairs, generator: torch.Generator) -> StepLoss:
        del generator
        model = self.model
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

    def loss(self, pairs: Pairs, generator: torch.Generator) -> StepLoss:
        model = self.model
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
