# SPDX-License-Identifier: Apache-2.0
"""Which of the fast family's two flows carries the belief: the network's, or the cost volume's by soft-argmax."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Protocol

import torch

from kfloc_ros.kfnet.filter import FlowFunction
from kfloc_ros.kfnet.flow_network import shipped_flow_network
from kfloc_ros.kfnet.oflownet import backward_flow

LEARNED_FLOOR_M2 = 0.002**2
"""Process noise that is always added to the network's, m^2. Its own says where flow is worse; the centimetre that the
cost volume needs on top would drown that."""


STEPS_ALIKE = 3.0
"""Factor on the noise that one step of the network's flow adds. Errors of successive steps are alike (the same edge,
the same texture), so they add up faster than independent ones would: a correlation of r between neighbours makes the
variance of a long sum (1 + r) / (1 - r) times as large, and r is about a half."""


class FlowKind(Enum):
    """How flow is read from the cost volume."""

    LEARNED = "learned"
    """By the network that this package ships."""
    COST_VOLUME = "cost_volume"
    """By soft-argmax; nothing is trained."""


class FlowCalibration(Protocol):
    """What a map says of both."""

    @property
    def flow_temperature(self) -> float: ...

    @property
    def process_scale(self) -> float: ...

    @property
    def process_floor_m2(self) -> float: ...

    @property
    def learned_process_scale(self) -> float | None: ...


@dataclass(frozen=True)
class ChosenFlow:
    """A flow, and the scale of its process noise in one map."""

    kind: FlowKind
    flow: FlowFunction
    process_scale: float
    process_floor_m2: float
    """Process noise that is always added."""
    note: str
    """Why it is not what was asked for; empty if it is."""


def choose_flow(asked: FlowKind, calibration: FlowCalibration, device: torch.device) -> ChosenFlow:
    """The flow that was asked for, or the cost volume's where the map knows no process noise for the network's."""
    scale = calibration.learned_process_scale
    if asked is FlowKind.LEARNED and scale is not None:
        flow = shipped_flow_network(device).flow
        return ChosenFlow(FlowKind.LEARNED, flow, STEPS_ALIKE * scale, STEPS_ALIKE * LEARNED_FLOOR_M2, "")
    soft = partial(backward_flow, temperature=calibration.flow_temperature)
    note = ""
    if asked is FlowKind.LEARNED:
        note = (
            "The map's process noise was calibrated for the cost volume alone, so that gives the flow. "
            "Build the map again to use the network (oflownet: learned)."
        )
    return ChosenFlow(FlowKind.COST_VOLUME, soft, calibration.process_scale, calibration.process_floor_m2, note)
