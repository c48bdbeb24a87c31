# SPDX-License-Identifier: Apache-2.0
"""What each of KFNet's three stages starts from: its samples, and its networks, fresh or of the stages before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kfloc_ros.errors import ConfigError
from kfloc_ros.frames import FrameSource
from kfloc_ros.kfnet.reference.frame import NetworkFrame
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import OFLOWNET, SCOORDNET, load_oflownet, load_scoordnet
from kfloc_ros.training.kfnet_samples import Group, Samples
from kfloc_ros.training.kfnet_stages import FlowStage, JointStage, MeasurementStage, Stage
from kfloc_ros.training.kfnet_trainer import TrainConfig

JOINT = "kfnet"
KINDS: Mapping[str, type[Stage[Group]]] = {SCOORDNET: MeasurementStage, OFLOWNET: FlowStage, JOINT: JointStage}
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


def stage_of(name: str, samples: Samples, config: TrainConfig, start: StartWeights) -> Stage[Group]:
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
        return FlowStage(load_oflownet(start.oflownet) if start.oflownet else ReferenceOFlowNet(padding), truncation)
    if name == SCOORDNET:
        return MeasurementStage(_scoordnet(samples, config, start))
    if start.scoordnet is None or start.oflownet is None:
        raise ConfigError("Stage 3 starts from the weights of stages 1 and 2; name both.")
    return JointStage(_scoordnet(samples, config, start), load_oflownet(start.oflownet), truncation, config.fix_flow)


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
    network.image_size = size
    return network
