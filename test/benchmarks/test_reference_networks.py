# SPDX-License-Identifier: Apache-2.0
"""Figures of the reference networks on held-out frames, where they can be worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from poster import CAMERA, Poster

from kfloc_ros.errors import SourceError
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.mapping.views import true_flow
from kfloc_ros.training.kfnet_family import HeldOutFrames
from studies.flow_accuracy import FlowStatistics
from studies.reference_networks import evaluate_kfnet, evaluate_oflownet, evaluate_scoordnet

SIGMA_M = 0.3


@pytest.fixture
def frames() -> HeldOutFrames:
    return HeldOutFrames(Poster(), CAMERA, torch.device("cpu"))


def constant_scoordnet() -> ReferenceSCoordNet:
    """Says (0, 0, 2) with a sigma of 30 cm of every cell."""
    network = ReferenceSCoordNet(width=1 / 64)
    with torch.no_grad():
        network.prediction.weight.zero_()
        network.prediction.bias.copy_(torch.tensor([0.0, 0.0, 2.0, math.log(SIGMA_M)]))
    return network


def test_runs_do_not_cross_jumps(frames: HeldOutFrames) -> None:
    assert frames.runs(2, 100) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert frames.runs(3, 100) == [range(0, 3), range(4, 7)]
    assert frames.runs(2, 2) == [range(0, 2), range(6, 8)]
    assert frames.runs(2, 100, spacing=3) == [range(0, 4, 3), range(4, 8, 3)]
    with pytest.raises(SourceError, match="5 consecutive"):
        frames.runs(5, 1)


def test_true_flow_carries_true_coordinates(frames: HeldOutFrames) -> None:
    """Both are of the pixels (8 c, 8 r): along the true flow the wall's points come out right to a millimetre."""
    statistics = FlowStatistics()
    for before, now in pairwise(frames.view(position) for position in range(4)):
        offset, _, visible = (torch.from_numpy(part) for part in true_flow(now, before, first_pixel=0.0))
        shape = visible.shape
        flow = Flow(offset, torch.ones(shape), visible, process_variance_m2=torch.full(shape, 1e-6))
        statistics.add(flow, offset, visible, frames.truth(now), frames.truth(before))
    found = statistics.result()
    assert found.median_cells == 0.0 and found.known == 1.0
    assert found.prior_axis_rms_m < 1e-3


def test_errors_of_a_measurement_that_is_always_the_same(frames: HeldOutFrames) -> None:
    found = evaluate_scoordnet(constant_scoordnet(), frames, every=2)
    medians = []
    for position in (0, 2, 4, 6):
        truth = frames.truth(frames.view(position))
        error = truth.mean - torch.tensor([0.0, 0.0, 2.0]).reshape(3, 1, 1)
        medians.append(float(error[:, truth.valid].norm(dim=0).median()))
    assert found.cells.frames == 4
    assert found.cells.median_error_m == pytest.approx(np.median(medians), rel=1e-4)
    assert found.poses.frames == 4 and found.poses.recall["5cm_5deg"] == 0.0


def test_filtering_the_same_again_only_makes_it_surer(frames: HeldOutFrames) -> None:
    """Wherever the flow leads, a constant measurement stays what it is, and its variance shrinks."""
    torch.manual_seed(0)
    found = evaluate_kfnet(constant_scoordnet(), ReferenceOFlowNet(), frames, frames.runs(4, 2))
    assert found.measurement.frames == found.posterior.frames == 6  # the first of each run has no prior
    assert found.poses.frames == found.measurement_poses.frames == 6
    assert found.posterior.median_error_m == pytest.approx(found.measurement.median_error_m, rel=1e-4)
    assert found.prior.median_error_m == pytest.approx(found.measurement_there.median_error_m, rel=1e-4)
    assert found.posterior.coverage[0] < found.measurement.coverage[0]
    assert 0.3 < found.prior_share < 1.0


def test_an_untrained_flow_knows_little(frames: HeldOutFrames) -> None:
    torch.manual_seed(0)
    found = evaluate_oflownet(ReferenceOFlowNet(), frames, count=4)
    assert found.pairs == 4
    assert found.median_cells > 0.2 and 0.0 < found.known < 1.0
