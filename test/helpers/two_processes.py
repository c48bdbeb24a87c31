# SPDX-License-Identifier: Apache-2.0
"""Trains every stage for a step or two; run by ``torchrun`` in two processes, each reads half of every batch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from poster import Poster

from kfloc_ros.kfnet.flow_network import FlowNetwork
from kfloc_ros.pixloc.reference import unet
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel
from kfloc_ros.training.distributed import processes, rank
from kfloc_ros.training.flow import FastFlowStage, FlowPairs
from kfloc_ros.training.kfnet_config import TrainConfig
from kfloc_ros.training.kfnet_stages import StartWeights, samples_of, stage_of
from kfloc_ros.training.loop import TrainResult, train
from kfloc_ros.training.pixloc_samples import PairRule, Pairs, PairSamples
from kfloc_ros.training.pixloc_stages import GnNetStage, PixLocTrainConfig, TwoViewStage

NAMES = ("scoordnet", "oflownet", "kfnet", "fast", "pixloc", "gnnet")
CPU = torch.device("cpu")
FEW_CHANNELS = (8, 16, 32, 32, 32)
"""An eighth of VGG's."""
SMALL = {"steps": 2, "log_every": 1, "workers": 1, "learning_rate": 1e-4}


class DoublePairs(PairSamples):
    """In double precision: in single, rounding decides which cells are GN-Net's hardest negatives."""

    def __getitem__(self, number: int) -> Pairs:
        pairs = super().__getitem__(number)
        return replace(pairs, reference=pairs.reference.double(), query=pairs.query.double())


def run(name: str, batch: int, out: Path, **changes: object) -> TrainResult:
    """Train one stage."""
    if name in ("pixloc", "gnnet"):
        torch.manual_seed(0)
        model = PixLocModel(PixLocConfig(num_iters=3, pad=1)).double()
        pixloc = PixLocTrainConfig(batch=batch, validation_pairs=2, **{**SMALL, **changes})  # type: ignore[arg-type]
        samples = DoublePairs(Poster(), PairRule(resize=128, crop=96, points=64, min_overlap=0.2), 0)
        stage = GnNetStage(model) if name == "gnnet" else TwoViewStage(model)
        return train(stage, samples, pixloc, out, CPU, validation=samples)
    config = TrainConfig(batch=batch, width=1 / 16, noise=name == "oflownet", **{**SMALL, **changes})  # type: ignore[arg-type]
    if name == "fast":
        torch.manual_seed(0)
        return train(FastFlowStage(FlowNetwork()), FlowPairs([Poster()], max_step=2), config, out, CPU)
    start = StartWeights()
    if name == "kfnet":
        beside = out.parent / f"{out.name}-start-{rank()}"
        files = {part: beside / f"{part}.safetensors" for part in ("scoordnet", "oflownet")}
        for part, path in files.items():
            stage_of(part, samples_of(part, Poster(), config), config, StartWeights()).write(part, path, "")
        start = StartWeights(**files)
    groups = samples_of(name, Poster(), config)
    return train(stage_of(name, groups, config, start), groups, config, out, CPU)


if __name__ == "__main__":
    unet.BLOCK_CHANNELS = FEW_CHANNELS
    with processes(CPU):
        for name in sys.argv[2:]:
            run(name, 1, Path(sys.argv[1]) / name)
