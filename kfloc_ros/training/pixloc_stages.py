# SPDX-License-Identifier: Apache-2.0
"""PixLoc's network in training: by the alignment of pairs, or by GN-Net's losses on features; and the options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.config import option
from kfloc_ros.errors import ConfigError
from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel, save_model
from kfloc_ros.pixloc.reference.two_view import align_two_views, training_settings
from kfloc_ros.pixloc.reference.unet import ENCODERS, UNetConfig
from kfloc_ros.training.loop import LoopConfig, Schedule
from kfloc_ros.training.losses import GnNetLoss, gnnet_loss, two_view_loss
from kfloc_ros.training.pixloc_samples import PairRule, Pairs, together
from kfloc_ros.training.stage import Stage, StepLoss

GRADIENT_PAD = 1
"""Cells at a map's border where a central difference would leave it."""
MAX_SKIPPED = 20
"""Steps in a row without a finite gradient after which training ends."""
NOT_CLIPPED = 1e9


@dataclass(frozen=True)
class PixLocTrainConfig(LoopConfig):
    """Options of ``kfloc train pixloc`` and ``gnnet``, each settable as key=value."""

    FREE_KEYS: ClassVar[frozenset[str]] = LoopConfig.FREE_KEYS | {"validate_every"}

    steps: int = option(20_000, "Steps in all.", low=1)
    learning_rate: float = option(1e-5, "Of the features; published: 5e-6 (MegaDepth), 1e-5 (CMU).", low=0.0, high=1.0)
    damping_rate: float = option(100.0, "Times the learning rate, for the damping factors.", low=0.0, high=1e6)
    batch: int = option(3, "Pairs in a step.", low=1, high=256)
    clip: float = option(1.0, "Largest value of a gradient.", low=1e-9, high=NOT_CLIPPED)
    seed: int = option(0, "Of initial weights and pairs.", low=0)
    validate_every: int = option(500, "Steps between looks at the held-out part; also at the start and end.", low=1)
    validation_pairs: int = option(60, "Pairs of the held-out part that are looked at, always the same.", low=1)
    snapshot_every: int = option(500, "Steps between checkpoints; one is also written at the end.", low=1)
    log_every: int = option(20, "Steps between lines of the log.", low=1)
    encoder: str = option("vgg16", "Of a network without --weights.", choices=ENCODERS)
    decoder: str = option("64,64,64,32", "Of a network without --weights: channels of its blocks.")
    output_scales: str = option("0,2,4", "Of a network without --weights: exponents of the strides, fine to coarse.")
    output_dim: str = option("32,128,128", "Of a network without --weights: channels of its maps, fine to coarse.")
    average_pooling: bool = option(False, "Of a network without --weights.")
    normalize_features: bool = option(True, "Features of unit length, in a network without --weights.")
    loss: str = option("scaled_barron(0, 0.1)", "Robust loss of the residuals, in a network without --weights.")
    jacobi_scaling: bool = option(False, "Scale the degrees of freedom alike, in a network without --weights.")
    iterations: int = option(15, "Of the alignment, a level.", low=1, high=1000)
    pad: int = option(2, "Cells at a map's border that are not used.", low=1, high=16)
    success_px: float = option(3.0, "Error, in a level's cells, above which the next level does not count.", low=0.0)
    clamp_px: float = option(50.0, "Error above which there is no gradient.", low=0.0)
    resize: int = option(640, "Side that images are brought to.", low=32, high=8192)
    resize_by: str = option(
        "longer", "The side that is brought to it: longer, or shorter as published.", choices=("longer", "shorter")
    )
    crop: int = option(512, "Side of the squares that are cut out of them.", low=32, high=8192)
    points: int = option(512, "Points of a pair.", low=10, high=100_000)
    max_distance_m: float = option(2.0, "Between the views of a pair; a radian counts as 1.2 m.", low=0.0, high=1e6)
    min_overlap: float = option(0.3, "Share of the reference's points that the query sees.", low=0.0, high=1.0)
    max_overlap: float = option(1.0, "The same at most, in cmu: and megadepth:.", low=0.0, high=1.0)
    min_baseline_m: float = option(0.0, "Between the views of a pair of cmu:, at least.", low=0.0, high=1e6)
    max_baseline_m: float = option(7.0, "The same at most.", low=0.0, high=1e6)
    train_scenes: str = option("", "Scenes of cmu: or megadepth: to train on, such as slice8,slice9.")
    validation_scenes: str = option("", "Scenes of cmu: or megadepth: to validate on.")
    init: str = option("interpolate", "Where alignments start.", choices=("identity", "interpolate", "max_error"))
    init_low: float = option(0.75, "Interpolate: least share of the true motion.", low=-10.0, high=10.0)
    init_high: float = option(1.0, "Interpolate: largest share.", low=-10.0, high=10.0)
    validation_share: float = option(
        0.1, "Share of the source, its last frames, that is held out for validation.", low=0.0, high=0.9
    )

    def schedule(self, stage: Stage[Any]) -> Schedule:
        del stage
        rates = (self.learning_rate, self.learning_rate * self.damping_rate)
        return Schedule(
            first=0,
            last=self.steps,
            batch=self.batch,
            rates=lambda step: rates,
            clip=self.clip,
            max_skipped=MAX_SKIPPED,
            validate_every=self.validate_every,
            validation_items=self.validation_pairs,
        )

    def rule(self) -> PairRule:
        """Return which pairs are used, and how they are shown."""
        return PairRule(
            self.max_distance_m, self.min_overlap, self.resize, self.resize_by, self.crop, self.points, self.init,
            self.init_low, self.init_high, self.max_overlap, self.min_baseline_m, self.max_baseline_m,
        )  # fmt: skip

    def model(self) -> PixLocConfig:
        """Return the configuration of a network that starts from random weights.

        Raises:
            ConfigError: its numbers do not fit each other.
        """
        extractor = UNetConfig(
            encoder=self.encoder,
            decoder=_integers("decoder", self.decoder),
            output_scales=_integers("output_scales", self.output_scales),
            output_dim=_integers("output_dim", self.output_dim),
            average_pooling=self.average_pooling,
        )
        return self.trained(
            PixLocConfig(
                extractor=extractor,
                normalize_features=self.normalize_features,
                loss=self.loss,
                jacobi_scaling=self.jacobi_scaling,
            )
        )

    def trained(self, config: PixLocConfig) -> PixLocConfig:
        """Return a network's configuration with the iterations and the border that it is trained with."""
        return replace(config, num_iters=self.iterations, pad=self.pad)

    def scenes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the scenes to train and to validate on; empty: those that the data say."""
        parts = (self.train_scenes, self.validation_scenes)
        training, held_out = (tuple(word.strip() for word in part.split(",") if word.strip()) for part in parts)
        return training, held_out


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f"'{name}' takes numbers such as 32,128,128, got '{text}'.") from error


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
    leaves_parameters_out = True  # the damping and the confidences

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
