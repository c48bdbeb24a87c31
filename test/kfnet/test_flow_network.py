# SPDX-License-Identifier: Apache-2.0
"""The fast family's OFlowNet: what ships, what it finds on features of known motion, and who uses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kfloc_ros.errors import WeightsError
from kfloc_ros.kfnet.flow import WINDOW_CELLS, cost_window, ends_inside, window_offsets
from kfloc_ros.kfnet.flow_network import (
    STEP_CORRELATION_FACTOR,
    WEIGHTS_FILE,
    FlowNetwork,
    cost_volume_flow,
    flow_of,
    load_flow_network,
    save_flow_network,
    shipped_flow_network,
)

CPU = torch.device("cpu")


def smooth_features(h: int, w: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 64, h // 2 + 8, w // 2 + 8, generator=generator)
    return F.interpolate(noise, scale_factor=2, mode="bicubic")[0]


@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (-3, 2), (6, -5)])
def test_shipped_weights_find_motion_on_features_they_never_saw(shift: tuple[int, int]) -> None:
    dx, dy = shift
    world = smooth_features(48, 64)
    previous = F.normalize(world[:, 8:48, 8:64], dim=0)
    current = F.normalize(world[:, 8 + dy : 48 + dy, 8 + dx : 64 + dx], dim=0)
    flow = shipped_flow_network(CPU).flow(current, previous)
    inner = flow.valid[8:-8, 8:-8]
    assert inner.float().mean() > 0.5
    error = (flow.offset - torch.tensor([dx, dy]).reshape(2, 1, 1)).norm(dim=0)[8:-8, 8:-8][inner]
    assert error.median() < 0.15


def test_noise_is_not_matched_and_the_answer_is_finite() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (F.normalize(torch.randn(64, 30, 40, generator=generator), dim=0) for _ in range(2))
    network = shipped_flow_network(CPU)
    flow, same = network.flow(a, b), network.flow(a, a)
    assert torch.isfinite(flow.offset).all() and torch.isfinite(flow.variance).all()
    assert flow.valid.float().mean() < 0.5 * same.valid.float().mean()
    assert flow.variance.median() > 4 * same.variance.median()


def test_the_precision_of_the_shipped_network_hardly_moves_a_flow() -> None:
    world = smooth_features(48, 64)
    previous, current = F.normalize(world[:, 8:48, 8:64], dim=0), F.normalize(world[:, 9:49, 10:66], dim=0)
    fast, exact = (net.flow(current, previous) for net in (shipped_flow_network(CPU), load_flow_network()))
    apart = (fast.offset - exact.offset).abs()  # cells of 8 px
    assert apart.median() < 1e-3 and apart.max() < 0.05
    assert (fast.variance / exact.variance).log().abs().max() < 0.1
    assert (fast.valid != exact.valid).float().mean() < 0.01


def test_shipped_weights_are_small_and_whole() -> None:
    assert WEIGHTS_FILE.stat().st_size < 200_000  # the limit is 4 MB
    network = load_flow_network()
    assert not network.training and all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_windows_hold_the_cosines_of_the_cells_they_name() -> None:
    world = smooth_features(30, 40)
    previous, current = (F.normalize(world[:, 2 : 2 + 24, k : k + 32], dim=0) for k in (0, 2))
    window = cost_window(current, previous)
    assert window.scores.shape == (24 * 32, WINDOW_CELLS) and window.grid == (24, 32)
    y, x, k = 11, 17, 7
    to = torch.tensor([x, y]) + window.base[:, y, x] + window_offsets()[k]
    expected = (current[:, y, x] * previous[:, to[1], to[0]]).sum()
    assert window.scores[y * 32 + x, k] == pytest.approx(float(expected), abs=1e-5)
    assert window.inside[y * 32 + x].all() and not window.inside[0].all()
    assert ends_inside(torch.zeros(2, 4, 5)).all() and not ends_inside(torch.full((2, 4, 5), -4.5)).any()


@dataclass(frozen=True)
class Calibrated:
    flow_temperature: float = 0.04
    process_scale: float = 0.5
    process_floor_m2: float = 1e-4
    learned_process_scale: float | None = 0.25


def test_a_map_decides_which_flow_can_be_had() -> None:
    learned = flow_of(Calibrated(), CPU)
    assert learned.process_scale == 0.25 * STEP_CORRELATION_FACTOR
    older = flow_of(Calibrated(learned_process_scale=None), CPU)
    assert older.process_scale == cost_volume_flow(Calibrated()).process_scale == 0.5


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    with pytest.raises(WeightsError, match="no file"):
        load_flow_network(path)
    path.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="damaged"):
        load_flow_network(path)
    save_file({"a": torch.zeros(1)}, path, {"format": "other"})
    with pytest.raises(WeightsError, match="holds no weights"):
        load_flow_network(path)
    save_flow_network(path, FlowNetwork(width=8))
    assert load_flow_network(path).width == 8
    save_file({"a": torch.zeros(1)}, path, {"format": "kfloc_flow", "version": "1", "width": "8"})
    with pytest.raises(WeightsError, match="damaged"):
        load_flow_network(path)
