# SPDX-License-Identifier: Apache-2.0
"""The three training stages of KFNet's reference networks: what a step's loss is made of.

1. SCoordNet on single images; 2. OFlowNet on pairs, supervised by warped true coordinates; 3. both, through the
Kalman recursion over four frames. Where the original warps from outside the image it takes the origin for a confident
prior; here such cells take no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.errors import ConfigError
from kfloc_ros.frames import FrameSource
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.fusion import kalman_update, warp
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import MIN_SIGMA, NetworkFrame, ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import OFLOWNET, SCOORDNET, load_oflownet, load_scoordnet, save_network
from kfloc_ros.training import losses
from kfloc_ros.training.distributed import draw
from kfloc_ros.training.kfnet_config import TrainConfig
from kfloc_ros.training.kfnet_samples import Group, Samples
from kfloc_ros.training.stage import Stage, StepLoss
from kfloc_ros.types import SceneCoordinates

NOISE_SIGMA = (0.005, 0.01)
"""Of the coordinates that stage 2 warps, least and largest, network units, as published."""


class KfnetStage(Stage[Group]):
    """One of the three stages."""

    group_length: ClassVar[int]
    """Frames in a sample."""
    augment: ClassVar[str]
    both_directions: ClassVar[bool] = False

    def write(self, name: str, path: Path, origin: str) -> None:
        del origin
        save_network(path, self.modules()[name])  # type: ignore[arg-type]

    def compiled_parts(self) -> list[nn.Module]:
        parts: list[nn.Module] = []
        for module in self.modules().values():
            parts += [module.features, module.unet] if isinstance(module, ReferenceOFlowNet) else [module]
        return parts


class MeasurementStage(KfnetStage):
    """Stage 1: the likelihood of single images, not truncated."""

    name, group_length, batch, augment = "scoordnet", 1, 4, "full"

    def __init__(self, scoordnet: ReferenceSCoordNet, truncation: float | None = None) -> None:
        self.scoordnet, self._truncation = scoordnet, truncation

    def modules(self) -> dict[str, nn.Module]:
        return {"scoordnet": self.scoordnet}

    def loss(self, items: Sequence[Group], generator: torch.Generator) -> StepLoss:
        del generator
        images = torch.cat([group.images for group in items])
        mask = torch.cat([group.mask for group in items])
        truth = to_network(torch.cat([group.points for group in items]), self.scoordnet)
        predicted = self.scoordnet(images)
        total = losses.likelihood(
            predicted.coordinates, predicted.log_sigma.exp(), truth, mask, self._truncation, whole_batch=True
        )
        error_m = (predicted.coordinates - truth).detach().norm(dim=1)[mask] / self.scoordnet.scale.float()
        return StepLoss(total, {"nll": float(total.detach()), **error_figures(error_m)})


class FlowStage(KfnetStage):
    """Stage 2: a pair in both directions; true coordinates of one frame, warped, explain those of the other.

    Args:
        oflownet: to train; its sigma is in metres.
        truncation: of the likelihood, in network units; None: not truncated.
        scale: network units per metre, below 1 for large outdoor scenes.
        noise: disturb the coordinates that are warped, and tell the filter by how much.
    """

    name, group_length, batch, augment = "oflownet", 2, 1, "rotate"

    def __init__(
        self,
        oflownet: ReferenceOFlowNet,
        truncation: float | None = -1.0,
        *,
        scale: float = 1.0,
        noise: bool = False,
    ) -> None:
        self.oflownet, self._truncation, self._scale, self._noise = oflownet, truncation, scale, noise

    def modules(self) -> dict[str, nn.Module]:
        return {"oflownet": self.oflownet}

    def loss(self, items: Sequence[Group], generator: torch.Generator) -> StepLoss:
        noise = self._draw_noise(items, generator)
        parts = []
        for k, group in enumerate(items):
            features = self.oflownet.features(group.images)
            parts += [
                self._direction(group, features, now, 1 - now, None if noise is None else noise[k, now])
                for now in (0, 1)
            ]
        nll, smooth, photo, error_m = (list(column) for column in zip(*parts, strict=True))
        n = len(parts)
        terms = {"nll": sum(nll) / n, "smoothness": sum(smooth) / n, "photometric": sum(photo) / n}
        total = (
            terms["nll"]
            + losses.SMOOTHNESS_WEIGHT * terms["smoothness"]
            + losses.PHOTOMETRIC_WEIGHT * terms["photometric"]
        )
        figures = {key: float(value.detach()) for key, value in terms.items()}
        return StepLoss(total, {**figures, **error_figures(torch.cat(error_m))})

    def _draw_noise(self, items: Sequence[Group], generator: torch.Generator) -> torch.Tensor | None:
        """(B, 2, 4, h, w): noise of each direction's coordinates, and its sigma; None without noise."""
        if not self._noise:
            return None
        _, _, h, w = items[0].points.shape
        low, high = NOISE_SIGMA
        sigma = low + (high - low) * draw(torch.rand, (len(items), 2, 1, 1, 1), generator)
        noise = sigma * draw(torch.randn, (len(items), 2, 3, h, w), generator)
        return torch.cat([noise, sigma.expand(-1, -1, 1, h, w)], dim=2)

    def _direction(
        self, group: Group, features: torch.Tensor, now: int, before: int, noise: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        flow = self.oflownet.flow(features[now], features[before])
        truth, known = group.points[now] * self._scale, group.points[before] * self._scale
        variance = torch.full_like(known[0], MIN_SIGMA**2)
        if noise is not None:
            noise = noise.to(known)
            known, variance = known + noise[:3], noise[3].square()
        last = SceneCoordinates(known, variance, group.mask[before], 8)
        prior = warp(last, flow, self._scale**2, 0.0)
        mask = losses.window_mask(group.mask[now], group.mask[before])
        image = group.small_images[now]
        nll = losses.likelihood(
            prior.mean[None], prior.variance.sqrt()[None], truth[None], mask[None], self._truncation
        )
        smooth = losses.smoothness(prior.mean[None], image[None], mask[None])
        seen = sample(group.small_images[before], flow)
        photo = losses.photometric(seen[None], image[None], group.mask[now][None])
        return nll, smooth, photo, (prior.mean - truth).detach().norm(dim=0)[mask] / self._scale


class JointStage(KfnetStage):
    """Stage 3: measurement, prior and posterior of four frames, with gradients through the recursion."""

    name, group_length, batch, augment = "kfnet", 4, 1, "rotate"
    both_directions, last_halving_only = True, True
    weights = (0.2, 0.2, 0.6)
    """Of measurement, prior and posterior."""

    def __init__(
        self,
        scoordnet: ReferenceSCoordNet,
        oflownet: ReferenceOFlowNet,
        truncation: float | None = -2.0,
        fix_flow: bool = False,
    ) -> None:
        self.scoordnet, self.oflownet, self._truncation = scoordnet, oflownet, truncation
        oflownet.requires_grad_(not fix_flow)

    def modules(self) -> dict[str, nn.Module]:
        return {"scoordnet": self.scoordnet, "oflownet": self.oflownet}

    def loss(self, items: Sequence[Group], generator: torch.Generator) -> StepLoss:
        del generator
        results = [self._group(group) for group in items]
        total = torch.stack([result.total for result in results]).mean()
        figures = {key: sum(r.figures[key] for r in results) / len(results) for key in results[0].figures}
        return StepLoss(total, figures)

    def _group(self, group: Group) -> StepLoss:
        truth = to_network(group.points, self.scoordnet)
        measured = self.scoordnet(group.images)
        variance = measured.log_sigma.exp().clamp(min=MIN_SIGMA).square()
        features = self.oflownet.features(group.images)
        scale2 = self.scoordnet.scale.float().square()
        everywhere = torch.ones_like(group.mask[0])
        stages = [[(measured.coordinates[0], variance[0], everywhere)] * 3]
        for k in range(1, len(group.images)):
            mean, spread, _ = stages[-1][2]
            flow = self.oflownet.flow(features[k], features[k - 1])
            prior = warp(SceneCoordinates(mean, spread, everywhere, 8), flow, float(scale2), 0.0)
            fused = kalman_update(prior.mean, prior.variance, measured.coordinates[k], variance[k])
            posterior = torch.where(prior.valid, fused.mean, measured.coordinates[k])
            certainty = torch.where(prior.valid, fused.variance, variance[k])
            stages.append(
                [
                    (measured.coordinates[k], variance[k], everywhere),
                    (prior.mean, prior.variance, prior.valid),
                    (posterior, certainty, everywhere),
                ]
            )
        total = truth.new_zeros(())
        figures: dict[str, float] = {}
        for name, weight, column in zip(("measurement", "prior", "posterior"), self.weights, range(3), strict=True):
            mean, spread, usable = (torch.stack([frame[column][i] for frame in stages]) for i in range(3))
            mask = group.mask & usable
            nll = losses.likelihood(mean, spread.sqrt(), truth, mask, self._truncation)
            smooth = losses.smoothness(mean, group.small_images, mask)
            total = total + weight * (nll + losses.SMOOTHNESS_WEIGHT * smooth)
            error_m = (mean - truth).detach().norm(dim=1)[mask] / self.scoordnet.scale.float()
            figures |= {f"{name}_nll": float(nll.detach())}
            figures |= {f"{name}_{key}": value for key, value in error_figures(error_m).items()}
        return StepLoss(total, figures)


def to_network(points: torch.Tensor, scoordnet: ReferenceSCoordNet) -> torch.Tensor:
    """Network coordinates (B, 3, h, w) of map points (B, 3, h, w)."""
    T = scoordnet.T_network_map
    moved = torch.einsum("ij,bjhw->bihw", T[:3, :3], points.double()) + T[:3, 3].reshape(1, 3, 1, 1)
    return (moved * scoordnet.scale).to(points.dtype)


def sample(image: torch.Tensor, flow: Flow) -> torch.Tensor:
    """An image (C, h, w) seen along a backward flow, bilinear; 0 outside."""
    _, h, w = image.shape
    x = torch.arange(w, device=image.device) + flow.offset[0]
    y = torch.arange(h, device=image.device)[:, None] + flow.offset[1]
    grid = torch.stack([2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1], dim=-1)
    return F.grid_sample(image[None], grid[None], align_corners=True)[0]


def error_figures(error_m: torch.Tensor) -> dict[str, float]:
    """Median, and share below 5 cm, of error lengths (N,)."""
    if not len(error_m):
        return {"median_error_m": float("nan"), "within_5cm": float("nan")}
    return {"median_error_m": float(error_m.median()), "within_5cm": float((error_m < 0.05).float().mean())}


JOINT = "kfnet"
KINDS: Mapping[str, type[KfnetStage]] = {SCOORDNET: MeasurementStage, OFLOWNET: FlowStage, JOINT: JointStage}
"""The stages in their order."""
TRUNCATION: Mapping[str, float] = {OFLOWNET: -1.0, JOINT: -2.0}
"""Of the likelihood, as published; stage 1 has none."""


@dataclass(frozen=True)
class StartWeights:
    """Files to start from, and where SCoordNet is to regress."""

    scoordnet: Path | None = None
    oflownet: Path | None = None
    frame: NetworkFrame | None = None
    """Of a fresh SCoordNet; by default made from the source's points."""


def samples_of(name: str, source: FrameSource, config: TrainConfig) -> Samples:
    """A stage's samples of a source.

    Args:
        name: of :data:`KINDS`.
        source: with depth and poses.
        config: of the training.

    Raises:
        SourceError: there are not as many consecutive frames as the stage takes.
    """
    kind = KINDS[name]
    return Samples(
        source,
        kind.group_length,
        both_directions=kind.both_directions,
        image_width=config.image_width,
        image_height=config.image_height,
        augment=kind.augment if config.augment == "stage" else config.augment,
        seed=config.seed,
        max_step=config.max_step,
        spacing=config.spacing,
        remembered_bytes=config.remember_mb * 1_000_000,
    )


def stage_of(name: str, samples: Samples, config: TrainConfig, start: StartWeights) -> KfnetStage:
    """A stage with its networks; fresh ones depend on the seed alone.

    Raises:
        ConfigError: stage 3 has nothing to start from, or a SCoordNet is of other images than the samples.
        SourceError: no frame can be made, for want of depth.
        WeightsError: a file cannot be read.
    """
    torch.manual_seed(config.seed)
    padding = Padding(config.padding)
    truncation = TRUNCATION.get(name) if config.truncation else None
    if name == OFLOWNET:
        oflownet = _started(start.oflownet) if start.oflownet else fresh_oflownet(padding, config.scale)
        return FlowStage(oflownet, truncation, scale=config.scale, noise=config.noise)
    if name == SCOORDNET:
        return MeasurementStage(_scoordnet(samples, config, start))
    if start.scoordnet is None or start.oflownet is None:
        raise ConfigError("Stage 3 starts from the weights of stages 1 and 2; name both.")
    return JointStage(_scoordnet(samples, config, start), _started(start.oflownet), truncation, config.fix_flow)


def _started(path: Path) -> ReferenceOFlowNet:
    """Return an OFlowNet to train on; it is no longer the converted one."""
    network = load_oflownet(path)
    network.converted = False
    return network


def fresh_oflownet(padding: Padding, scale: float) -> ReferenceOFlowNet:
    """Return an OFlowNet whose sigma starts at 1 cm in network units, as published, and so at 1 cm / scale."""
    network = ReferenceOFlowNet(padding)
    with torch.no_grad():
        network.unet.uncertainty.bias.sub_(math.log(scale))
    return network


def _scoordnet(samples: Samples, config: TrainConfig, start: StartWeights) -> ReferenceSCoordNet:
    size = samples.camera.width, samples.camera.height
    if start.scoordnet is None:
        frame = start.frame or samples.network_frame(config.scale)
        return ReferenceSCoordNet(Padding(config.padding), config.width, frame, size)
    network = load_scoordnet(start.scoordnet)
    had = network.image_size
    if had is not None and had != size:
        raise ConfigError(
            f"'{start.scoordnet}' was trained on images of {had[0]}x{had[1]} pixels, and these have "
            f"{size[0]}x{size[1]}; pass image_width={had[0]} image_height={had[1]}."
        )
    network.image_size, network.converted = size, False  # trained on, it is no longer the converted one
    return network
