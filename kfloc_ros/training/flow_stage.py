# SPDX-License-Identifier: Apache-2.0
"""Training of the fast family's OFlowNet: the likelihood of the true flow, and whether a point is seen at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.features.trunk import Trunk
from kfloc_ros.kfnet.flow_network import FlowNetwork, laplace_nll, laplace_variance, save_flow_network
from kfloc_ros.kfnet.oflownet import cost_window
from kfloc_ros.training.flow_pairs import FlowPair
from kfloc_ros.training.kfnet_stages import Stage, StepLoss

FLOW_DEFAULTS: Mapping[str, Any] = {
    "steps": 600,
    "halving_steps": 120,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "batch": 4,
    "max_step": 4,
    "snapshot_every": 100,
}
"""Defaults of ``kfloc train oflownet --family fast`` where they are not the published schedule's."""
FLOW_OPTIONS = frozenset(FLOW_DEFAULTS) | {"augment", "precision", "seed", "log_every", "workers"}
"""Options that mean something to it."""
SEEN_WEIGHT = 0.5
MAX_NLL = 12.0
"""A cell counts with at most this: a match in a wholly wrong place teaches nothing about flow."""


class FastFlowStage(Stage[FlowPair]):
    """The network learns; the trunk, whose features it compares, stays as it is.

    Args:
        network: to train.
        device: where the trunk runs.
    """

    name, group_length, batch, augment = "oflownet", 2, 4, "full"

    def __init__(self, network: FlowNetwork, device: torch.device | str = "cpu") -> None:
        self.network = network
        self._trunk = Trunk(device=device)

    def modules(self) -> dict[str, nn.Module]:
        return {"oflownet": self.network}

    def save(self, folder: Path) -> None:
        save_flow_network(folder / "oflownet.safetensors", self.network)

    def loss(self, groups: Sequence[FlowPair]) -> StepLoss:
        coarse = self._trunk(torch.cat([pair.images for pair in groups])).coarse
        with torch.no_grad():
            windows = [cost_window(coarse[2 * k], coarse[2 * k + 1]) for k in range(len(groups))]
        read = self.network(windows)
        truth = torch.stack([pair.flow for pair in groups])
        known = torch.stack([pair.known for pair in groups])
        seen = torch.stack([pair.seen for pair in groups])
        within = seen & ~torch.stack([window.at_edge for window in windows])
        difference = read.offset - truth
        error = (difference.square().sum(1) + 1e-8).sqrt()
        nll = laplace_nll(error, read.log_scale).clamp(max=MAX_NLL)[within].sum() / (within.sum() + 1)
        visibility = F.binary_cross_entropy_with_logits(read.seen[known], seen[known].float())
        sigma = laplace_variance(read.log_scale.detach()).sqrt()
        inside = (difference.detach().abs() < sigma[:, None]).float().mean(1)[within]
        figures = {
            "nll": float(nll.detach()),
            "seen_loss": float(visibility.detach()),
            "median_error_cells": float(error.detach()[within].median()),
            "inside_1sigma": float(inside.mean()),
        }
        return StepLoss(nll + SEEN_WEIGHT * visibility, figures)
