# SPDX-License-Identifier: Apache-2.0
"""PixLoc's network in training: by the alignment of pairs, or by GN-Net's losses on features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.model import PixLocModel, save_model
from kfloc_ros.pixloc.reference.two_view import align_two_views, training_settings
from kfloc_ros.training.pixloc_losses import GnNetLoss, gnnet_loss, two_view_loss
from kfloc_ros.training.pixloc_samples import Pairs, together
from kfloc_ros.training.stage import Stage, StepLoss

GRADIENT_PAD = 1
"""Cells at a map's border where a central difference would leave it."""


class PairStage(Stage[Pairs]):
    """A way to train PixLoc's network on pairs."""

    def __init__(self, model: PixLocModel) -> None:
        self.model = model

    def modules(self) -> dict[str, nn.Module]:
        return {"pixloc": self.model}

    def groups(self) -> list[list[nn.Parameter]]:
        return [list(self.model.extractor.parameters()), list(self.model.optimizer.parameters())]

    def write(self, name: str, path: Path, origin: str) -> None:
        del name
        save_model(path, self.model, origin=origin)


class TwoViewStage(PairStage):
    """PixLoc as published: the pose error after every level, through all iterations of the alignment."""

    name = "pixloc"

    def __init__(self, model: PixLocModel, *, success_px: float = 3.0, clamp_px: float = 50.0) -> None:
        super().__init__(model)
        self._success_px, self._clamp_px = success_px, clamp_px

    def loss(self, items: Sequence[Pairs], generator: torch.Generator) -> StepLoss:
        del generator
        pairs, model = together(items), self.model
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

    def loss(self, items: Sequence[Pairs], generator: torch.Generator) -> StepLoss:
        pairs, model = together(items), self.model
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
