# SPDX-License-Identifier: Apache-2.0
"""``kfloc train oflownet --family fast``: the network that reads the flow of the fast family."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kfloc_ros.cli.arguments import open_source_from
from kfloc_ros.cli.train_run import run_training
from kfloc_ros.errors import ConfigError

if TYPE_CHECKING:
    from kfloc_ros.frames import FrameSource

RUN_LENGTH, RUN_EVERY = 15, 4
"""Of the simulated recordings, one run of 15 frames in four is used: each frame takes time to render."""


def add_family(stage: argparse.ArgumentParser) -> None:
    """Add ``--family`` to the stage's arguments."""
    stage.add_argument(
        "--family",
        choices=("reference", "fast"),
        default="reference",
        help="reference: as published (default); fast: the small network on the backbone's cost volume, trained on the "
        "project's simulated recordings if no SOURCE is named",
    )


def run(args: argparse.Namespace) -> int:
    """Train; 130 when interrupted."""
    import torch

    from kfloc_ros.config import build_config, parse_overrides
    from kfloc_ros.device import choose_device
    from kfloc_ros.kfnet.flow_network import FlowNetwork, load_flow_network
    from kfloc_ros.training.distributed import own_device
    from kfloc_ros.training.flow import FLOW_DEFAULTS, FLOW_OPTIONS, FastFlowStage, FlowPairs
    from kfloc_ros.training.kfnet_config import TrainConfig

    overrides = parse_overrides(TrainConfig, args.overrides)
    config = build_config(TrainConfig, {**FLOW_DEFAULTS, **overrides})
    if unused := sorted(set(overrides) - FLOW_OPTIONS):
        raise ConfigError(
            f"'{unused[0]}' means nothing to the fast family; its options: {', '.join(sorted(FLOW_OPTIONS))}."
        )
    sources = simulated_sources() if args.source is None else [open_source_from(args)]
    samples = FlowPairs(sources, max_step=config.max_step, augment=config.augment != "none", seed=config.seed)
    torch.manual_seed(config.seed)
    network = FlowNetwork() if args.oflownet is None else load_flow_network(args.oflownet)
    device = own_device(choose_device(args.device))
    return run_training(args, FastFlowStage(network, device), samples, config)


def simulated_sources() -> Sequence[FrameSource]:
    """What the shipped weights are trained on: rooms with other pictures than the demo's, which is left for tests."""
    from kfloc_ros.frames import Selection
    from kfloc_ros.simulation.source import SimulatedSource

    sources = []
    for seed in (1, 2):
        for which in ("map", "localize"):
            whole = SimulatedSource(which, seed=seed)
            chosen = [p for p in range(len(whole)) if p // RUN_LENGTH % RUN_EVERY == seed]
            sources.append(Selection(whole, chosen))
    return sources
