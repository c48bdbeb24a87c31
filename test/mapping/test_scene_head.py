# SPDX-License-Identifier: Apache-2.0
"""Training of a map's head: precision that the processor is fast in, and time that is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.mapping import scene_head
from kfloc_ros.mapping.scene_head import MAX_STRETCH, HeadTraining, train_head

CPU = torch.device("cpu")


def cells(count: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.rand(count, 3, generator=generator)
    inputs = torch.cat([coordinates.repeat(1, 64)], dim=1).half()
    return inputs, coordinates


def test_a_slow_machine_ends_within_twice_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor of steps asks for far more than any machine makes; the clock advances by 0.1 s each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(scene_head.time, "monotonic", lambda: 0.1 * next(ticks))
    settings = HeadTraining(seconds=3.0, width=16, blocks=1, batch=64, min_steps_per_second=1e9)
    train_head(*cells(), settings, CPU, lambda progress: None)
    assert 3.0 < 0.1 * next(ticks) <= MAX_STRETCH * 3.0 + 0.5


def test_without_native_bfloat16_training_is_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 is emulated, it takes twice as long as float32."""
    reduced = []
    forward = SCoordNet.forward

    def recorded(self: SCoordNet, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reduced.append(torch.is_autocast_enabled("cpu"))
        return forward(self, inputs)

    monkeypatch.setattr(SCoordNet, "forward", recorded)
    settings = HeadTraining(seconds=60.0, steps=2, width=16, blocks=1, batch=64)
    for native in ({}, {"avx512_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: native, raising=False)
        train_head(*cells(), settings, CPU, lambda progress: None)
    assert reduced == [False, False, True, True]
