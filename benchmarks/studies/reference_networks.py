# SPDX-License-Identifier: Apache-2.0
"""Accuracy of KFNet's reference networks after each of their three training stages, on frames not in the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.evaluation.metrics import Accuracy, PoseError, accuracy, pose_error
from kfloc_ros.kfnet.filter import SceneCoordinateFilter
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.fusion import FilterSettings
from kfloc_ros.kfnet.pnp import PnpSettings, solve_pnp
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import CELL_PIXEL_OFFSET, STRIDE, ReferenceSCoordNet
from kfloc_ros.mapping.views import View, true_flow
from kfloc_ros.training.kfnet_family import HeldOutFrames
from kfloc_ros.types import SceneCoordinates
from studies.cells import CellAccuracy, CellStatistics
from studies.flow_accuracy import FlowAccuracy, FlowStatistics

AS_PUBLISHED = FilterSettings.published()
"""Filter settings of the joint training stage, except for the mask of invalid priors."""


STILL_SIGMA_M = 0.01


@dataclass(frozen=True)
class MeasurementAccuracy:
    """Accuracy of SCoordNet alone, image by image."""

    cells: CellAccuracy
    poses: Accuracy


@dataclass(frozen=True)
class FilterAccuracy:
    """Accuracy of both networks with the filter, over runs of consecutive frames, without the first frame of each."""

    measurement: CellAccuracy
    """Accuracy of all cells before the filter."""
    prior: CellAccuracy
    """Accuracy of the prior, over the cells that have one."""
    measurement_there: CellAccuracy
    """Accuracy of the measurement over the same cells, for comparison."""
    posterior: CellAccuracy
    """Accuracy of all cells after the filter."""
    prior_share: float
    """Share of cells with a valid prior."""
    measurement_poses: Accuracy
    poses: Accuracy
    """Accuracy of poses after the filter."""


def evaluate_scoordnet(network: ReferenceSCoordNet, frames: HeldOutFrames, every: int) -> MeasurementAccuracy:
    """Return the errors of cells and of poses on every ``every``-th frame.

    Raises:
        SourceError: a frame has no depth or pose.
    """
    network.eval()
    cells, errors = CellStatistics(), list[PoseError]()
    for position in range(0, len(frames), every):
        view = frames.view(position)
        measured, truth = network.measure(view.image), frames.truth(view)
        cells.add(measured, truth.mean, truth.valid)
        errors.append(_pose_error(measured, view))
    return MeasurementAccuracy(cells.result(), accuracy(errors))


@torch.inference_mode()
def evaluate_oflownet(network: ReferenceOFlowNet, frames: HeldOutFrames, count: int, spacing: int = 1) -> FlowAccuracy:
    """Return the errors of the flow from a frame to an earlier one, and of true coordinates propagated along it.

    Args:
        network: the flow network.
        frames: frames not in the training.
        count: largest number of pairs.
        spacing: distance of the two frames of a pair.

    Raises:
        SourceError: no two frames follow each other, or one has no depth or pose.
    """
    network.eval()

    def flow_of(now: View, before: View) -> Flow:
        features = [network.features(frames.pixels(view))[0] for view in (now, before)]
        return network.flow(features[0], features[1])

    return _evaluate_flow(flow_of, frames, count, spacing)


def evaluate_zero_flow(frames: HeldOutFrames, count: int, spacing: int = 1) -> FlowAccuracy:
    """Return the errors of zero flow with a centimetre of process noise, the baseline of a network."""

    def flow_of(now: View, before: View) -> Flow:
        h, w = frames.truth(now).valid.shape
        cells = torch.ones(h, w, device=frames.device)
        return Flow(
            torch.zeros(2, h, w, device=frames.device), cells, cells > 0, process_variance_m2=cells * STILL_SIGMA_M**2
        )

    return _evaluate_flow(flow_of, frames, count, spacing)


def _evaluate_flow(
    flow_of: Callable[[View, View], Flow], frames: HeldOutFrames, count: int, spacing: int
) -> FlowAccuracy:
    statistics = FlowStatistics()
    for pair in frames.runs(2, count, spacing):
        before, now = (frames.view(position) for position in pair)
        flow = flow_of(now, before)
        offset, _, visible = (
            torch.from_numpy(part).to(frames.device) for part in true_flow(now, before, first_pixel=CELL_PIXEL_OFFSET)
        )
        statistics.add(flow, offset, visible, frames.truth(now), frames.truth(before))
    return statistics.result()


@torch.inference_mode()
def evaluate_kfnet(
    scoordnet: ReferenceSCoordNet,
    oflownet: ReferenceOFlowNet,
    frames: HeldOutFrames,
    runs: Sequence[range],
    settings: FilterSettings = AS_PUBLISHED,
) -> FilterAccuracy:
    """Return the errors of cells before the filter, of the prior and after the filter, and of poses before and after.

    Args:
        scoordnet: measurement network.
        oflownet: flow network.
        frames: frames not in the training.
        runs: positions of consecutive frames; the filter is reset before each run.
        settings: settings of the filter.

    Raises:
        SourceError: a frame has no depth or pose.
    """
    scoordnet.eval()
    oflownet.eval()
    cells = {name: CellStatistics() for name in ("measurement", "prior", "measurement_there", "posterior")}
    errors: dict[str, list[PoseError]] = {"measurement": [], "posterior": []}
    shares: list[float] = []
    for run in runs:
        recursion = SceneCoordinateFilter(settings, oflownet.flow)
        for number, position in enumerate(run):
            view = frames.view(position)
            measured, truth = scoordnet.measure(view.image), frames.truth(view)
            features = oflownet.features(frames.pixels(view))[0]
            filtered = recursion.step(33_000_000 * number, features, measured)
            if number == 0:
                continue
            cells["measurement"].add(measured, truth.mean, truth.valid)
            cells["posterior"].add(filtered.posterior, truth.mean, truth.valid)
            if (prior := filtered.prior) is not None:
                propagated = SceneCoordinates(prior.mean, prior.variance, prior.valid, STRIDE, CELL_PIXEL_OFFSET)
                cells["prior"].add(propagated, truth.mean, truth.valid)
                cells["measurement_there"].add(measured, truth.mean, truth.valid & prior.valid)
            shares.append(filtered.report.prior_ratio)
            errors["measurement"].append(_pose_error(measured, view))
            errors["posterior"].append(_pose_error(filtered.posterior, view))
    return FilterAccuracy(
        **{name: statistics.result() for name, statistics in cells.items()},
        prior_share=float(np.mean(shares)),
        measurement_poses=accuracy(errors["measurement"]),
        poses=accuracy(errors["posterior"]),
    )


def _pose_error(coordinates: SceneCoordinates, view: View) -> PoseError:
    return pose_error(solve_pnp(coordinates, view.camera, PnpSettings()).T_map_camera, view.T_map_camera)
