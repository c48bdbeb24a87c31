# SPDX-License-Identifier: Apache-2.0
"""Several heads speak as one: the most certain one is used, in the map's frame, with its own calibration."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from kfloc_ros import device
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.kfnet import scoordnet
from kfloc_ros.kfnet.scoordnet import (
    CellRegression,
    SCoordNet,
    SCoordNetEnsemble,
    ensemble_of,
    head_input,
    heads_of,
    measure,
    packed,
    quantized,
    transformed_head,
    with_variance_scale,
)


def head(seed: int, log_scale: float = -2.0) -> SCoordNet:
    torch.manual_seed(seed)
    net = SCoordNet(width=16, blocks=1)
    net.normalize_with(torch.randn(100, 192), torch.randn(100, 3))
    with torch.no_grad():
        net.output.bias[3] = log_scale
    return net.eval()


def features() -> BackboneFeatures:
    torch.manual_seed(5)
    return BackboneFeatures(
        torch.randn(1, 64, 4, 6), torch.zeros(1, 24, 8, 12), torch.randn(1, 128, 4, 6), torch.ones(1, 4, 6)
    )


def test_each_cell_is_told_by_its_surest_head() -> None:
    heads = [head(1), head(2)]
    alone = [measure(h, features()) for h in heads]
    both = measure(SCoordNetEnsemble(heads), features())
    first = alone[0].variance <= alone[1].variance
    assert 0 < int(first.sum()) < first.numel()
    torch.testing.assert_close(both.mean, torch.where(first, alone[0].mean, alone[1].mean))
    torch.testing.assert_close(both.variance, torch.minimum(alone[0].variance, alone[1].variance))
    assert both.valid.all()


def test_a_head_that_tells_nonsense_is_not_believed() -> None:
    broken = head(1, log_scale=-6.0)
    with torch.no_grad():
        broken.output.bias[:3] = torch.nan
    measured = measure(SCoordNetEnsemble([broken, head(2)]), features())
    torch.testing.assert_close(measured.mean, measure(head(2), features()).mean)
    assert measured.valid.all()


def test_a_moved_head_tells_the_moved_points() -> None:
    T = make_pose(so3_exp(np.array([0.3, -1.0, 0.2])), np.array([5.0, -3.0, 1.0]))
    inputs = head_input(features())[0]
    points, log_scale = head(1)(inputs)
    told, told_log_scale = transformed_head(head(1), T)(inputs)
    expected = points.detach().double().numpy() @ T[:3, :3].T + T[:3, 3]
    np.testing.assert_allclose(told.detach().numpy(), expected, atol=1e-5)
    torch.testing.assert_close(told_log_scale, log_scale)


def test_a_scale_of_the_variance_becomes_part_of_the_head() -> None:
    scaled = measure(with_variance_scale(head(1), 2.5), features())
    torch.testing.assert_close(scaled.variance, 2.5 * measure(head(1), features()).variance)


def test_one_head_stays_one_and_sizes_must_agree() -> None:
    assert isinstance(ensemble_of([head(1)]), SCoordNet)
    assert len(heads_of(ensemble_of([head(1), head(2)]))) == 2
    with pytest.raises(ValueError, match="same size"):
        SCoordNetEnsemble([head(1), SCoordNet(width=8, blocks=1)])


@pytest.mark.parametrize("count", [1, 2])
def test_some_cells_alone_are_measured_as_among_all(count: int) -> None:
    heads = ensemble_of([head(k) for k in range(count)])
    cells = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    whole, part = measure(heads, features()), measure(heads, features(), cells=cells)
    assert torch.equal(part.valid, cells) and part.mean.shape == whole.mean.shape
    assert torch.allclose(part.mean[:, cells], whole.mean[:, cells], atol=2e-2)  # bfloat16 depends on the batch
    assert torch.allclose(part.variance[cells], whole.variance[cells], rtol=1e-2)
    assert torch.isfinite(part.mean).all() and (part.variance[~cells] > 100).all()


def test_what_threads_regress_in_pieces_is_what_one_regresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoordnet, "PIECE_CELLS", 2)
    net, cells = head(1), torch.zeros(4, 6, dtype=torch.bool)
    cells[1::2, ::2] = True
    alone = measure(net, features())
    shared = CellRegression(net, features(), scoordnet.UNCALIBRATED, cells)
    helpers = [threading.Thread(target=shared.help) for _ in range(3)]
    for helper in helpers:
        helper.start()
    part, whole = shared.coordinates(cells), shared.coordinates()  # completed: the others are regressed, too
    for helper in helpers:
        helper.join()
    assert torch.equal(part.valid, cells) and torch.equal(part.mean[:, cells], alone.mean[:, cells])
    assert torch.equal(whole.mean, alone.mean) and torch.equal(whole.variance, alone.variance)
    assert torch.equal(shared.coordinates(cells).mean, part.mean)


@pytest.mark.parametrize("count", [1, 2])
def test_packed_layers_change_no_point(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = ensemble_of([head(k, -2.0 - k) for k in range(count)])
    quick, before = packed(heads), measure(heads, features())
    assert (quick is heads) != device.computes_bfloat16(torch.device("cpu"))
    after = measure(quick, features())
    torch.testing.assert_close(after.mean, before.mean, atol=2e-3, rtol=0.0)
    torch.testing.assert_close(after.variance, before.variance, atol=0.0, rtol=2e-3)
    monkeypatch.setattr(device, "computes_bfloat16", lambda device: False)
    assert packed(heads) is heads


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="int8 layers for x86 only")
@pytest.mark.parametrize("count", [1, 2])
def test_hidden_layers_in_int8_change_points_little_and_leave_the_head_as_it_was(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "computes_bfloat16", lambda device: False)  # as where int8 is preferred
    exact = ensemble_of([head(k, -2.0 - k) for k in range(count)])
    before = measure(exact, features())
    quick = measure(quantized(exact), features())
    spread = before.mean.std()
    assert 0 < (quick.mean - before.mean).norm(dim=0).median() < 0.02 * spread
    assert torch.allclose(quick.variance.log(), before.variance.log(), atol=0.1)
    assert torch.equal(measure(exact, features()).mean, before.mean)
