# SPDX-License-Identifier: Apache-2.0
"""Training of a map's head: precision that the processor is fast in, and time that is kept."""

from __future__ import annotations

import itertools

import pytest
import torch

from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.mapping import scene_head
from kfloc_ros.mapping.scene_head import MAX_STRETCH, HeadProgress, HeadTraining, train_head

CPU = torch.device("cpu")


def cells(count: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.rand(count, 3, generator=generator)
    inputs = torch.cat([coordinates.repeat(1, 64)], dim=1).half()
    return inputs, coordinates


def test_a_slow_machine_ends_within_twice_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far more steps are asked for than any machine makes; the clock advances by 0.1 s each time it is read."""
    ticks = itertools.count()
    monkeypatch.setattr(scene_head.time, "monotonic", lambda: 0.1 * next(ticks))
    monkeypatch.setattr(scene_head, "MIN_STEPS_PER_SECOND", 1e9)
    monkeypatch.setattr(scene_head, "MIN_STEPS", 10**9)
    settings = HeadTraining(seconds=3.0, width=16, blocks=1, batch=64)
    train_head(*cells(), settings, CPU, lambda progress: None)
    assert 3.0 < 0.1 * next(ticks) <= MAX_STRETCH * 3.0 + 0.5


def test_a_machine_that_becomes_busy_ends_within_twice_the_time_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a hundred times as fast from the 150th step on."""
    now, steps = [0.0], [0]

    def clock() -> float:
        now[0] += 0.005 if steps[0] < 150 else 0.5
        return now[0]

    def told(progress: HeadProgress) -> None:
        steps[0] = progress.step
        if progress.step <= 2 * scene_head.ANNOUNCING_STEPS and progress.share_done > 0:
            announced.append(now[0] / progress.share_done)

    announced: list[float] = []
    monkeypatch.setattr(scene_head.time, "monotonic", clock)
    settings = HeadTraining(seconds=1e4, width=16, blocks=1, batch=64)
    train_head(*cells(), settings, CPU, told)
    assert announced and now[0] < MAX_STRETCH * min(announced) * 1.1 and steps[0] < scene_head.MAX_STEPS / 2


def test_training_ends_when_the_error_on_other_cells_stops_falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other cells whose coordinates have nothing to do with their features: no step makes their error fall for long."""
    monkeypatch.setattr(scene_head, "CHECK_STEPS", 10)
    settings = HeadTraining(seconds=600.0, width=16, blocks=1, batch=64)
    inputs, _ = cells(256)
    unrelated = inputs, torch.rand(256, 3, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(scene_head, "MAX_STEPS", 600)
    ended = []
    for others in (unrelated, None):
        made: list[int] = []
        train_head(*cells(), settings, CPU, lambda progress, made=made: made.append(progress.step), others)
        ended.append(made[-1])
    assert ended[0] < 300 and ended[1] == 600


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
