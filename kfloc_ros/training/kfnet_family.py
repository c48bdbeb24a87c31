# SPDX-License-Identifier: Apache-2.0
"""Maps of the `reference` family: trained networks put into a map, and calibrated on views that they have not seen.

The map gives what the networks lack: the camera, reference views to align with, and thresholds of the alignment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from kfloc_ros.device import choose_device
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.covariance import mahalanobis, median_scale
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
from kfloc_ros.kfnet.reference.scoordnet import CELL_PIXEL_OFFSET, STRIDE
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.calibration import PropagationErrors, scale_of_worse_runs
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.training.kfnet_samples import cell_points, consecutive, identity
from kfloc_ros.types import Frame, SceneCoordinates

RUN_LENGTH = 8
"""Consecutive frames that the filter is calibrated on at a time."""
PERIOD_NS = 33_333_333
"""Between them: the filter is told of no gap."""
NO_FLOOR_M2 = 1e-10
"""The networks say all of their process noise themselves."""


def with_networks(scene_map: SceneMap, networks: ReferenceNetworks) -> SceneMap:
    """A copy of a map whose coarse poses come from reference networks; their sigmas are taken as they are.

    Raises:
        WeightsError: the networks take images that the map's camera cannot be made to give.
    """
    networks.camera(scene_map.camera)
    calibration = replace(
        scene_map.calibration,
        measurement_variance_scale=1.0,
        process_scale=networks.process_scale,
        process_floor_m2=NO_FLOOR_M2,
        coarse_covariance_scale=1.0,
        roughness=None,
        min_inlier_ratio=Calibration().min_inlier_ratio,
    )
    return replace(scene_map, kfnet=networks, calibration=calibration, path=None)


@torch.inference_mode()
def calibrate_networks(
    scene_map: SceneMap,
    source: FrameSource,
    runs: int,
    device: str,
    on_progress: Callable[[float, str], None] = lambda share, text: None,
) -> SceneMap:
    """The map with scales under which 68 % of the axis errors of cells lie inside one sigma, and poses' do likewise.

    Args:
        scene_map: of the reference family.
        source: with depth and poses, in the map's frame, of which the networks have seen nothing.
        runs: of consecutive frames that are looked at, at most.
        device: where networks run.
        on_progress: told the share that is done.

    Raises:
        SourceError: the source has no consecutive frames with depth and poses.
    """
    if scene_map.kfnet is None:
        raise ValueError("the map is not of the reference family")
    target = choose_device(device)
    networks = scene_map.kfnet.to(target)
    frames = HeldOutFrames(source, networks.camera(scene_map.camera), target)
    chosen = frames.runs(RUN_LENGTH, runs)
    looked_at = []
    for number, run in enumerate(chosen):
        on_progress(0.5 * number / len(chosen), "cells and flow")
        looked_at.append(_look_at(networks, frames, run))
    ratios, squared_m2, process_m2 = zip(*looked_at, strict=True)
    propagated = PropagationErrors(torch.cat(squared_m2), torch.cat(process_m2), math.nan)
    calibration = replace(
        scene_map.calibration,
        measurement_variance_scale=scale_of_worse_runs(ratios),
        process_scale=propagated.scale(0.0),
    )
    draft = replace(scene_map, calibration=calibration)
    on_progress(0.5, "poses")
    scale = median_scale(_pose_errors(draft, source, chosen, device))
    networks.to(torch.device("cpu"))
    return replace(draft, calibration=replace(calibration, coarse_covariance_scale=scale))


def _look_at(
    networks: ReferenceNetworks, frames: HeldOutFrames, run: range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the axis errors of a run's cells: of the measurements, and of coordinates propagated along the flow.

    Returns:
        (n,) |error| / sigma of the measurements; (m,) squared errors of true coordinates that were carried over from
        the frame before, in square metres; (m,) the process noise that they were given.
    """
    views = [frames.view(position) for position in run]
    truths = [frames.truth(view) for view in views]
    features = [networks.oflownet.features(frames.pixels(view))[0] for view in views]
    squared, process = [], []
    for k in range(1, len(views)):
        prior = warp(truths[k - 1], networks.oflownet.flow(features[k], features[k - 1]), 1.0, 0.0)
        both = prior.valid & truths[k].valid
        squared.append((prior.mean - truths[k].mean)[:, both].square().reshape(-1).cpu())
        process.append(prior.variance[both].repeat(3).cpu())
    ratios = []
    for view, truth in zip(views, truths, strict=True):
        measured = networks.scoordnet.measure(view.image)
        ratio = (measured.mean - truth.mean).abs() / measured.variance.sqrt()
        ratios.append(ratio[:, truth.valid & measured.valid].reshape(-1).cpu())
    return torch.cat(ratios), torch.cat(squared), torch.cat(process)


def _pose_errors(draft: SceneMap, source: FrameSource, runs: Sequence[range], device: str) -> list[float]:
    """Squared Mahalanobis lengths of the coarse poses' errors, where there is a pose."""
    localizer = Localizer(draft, LocalizerConfig(device=device))
    adapter = ImageAdapter(source.camera, draft.camera)
    squared = []
    for run in runs:
        localizer.reset("another run")
        for k, position in enumerate(run):
            frame = source[position]
            if frame.T_map_camera is None:
                raise SourceError(f"Frame {frame.index} of '{source.name}' has no pose.")
            pose = localizer.coarse_half(Frame(adapter(frame.image), draft.camera, PERIOD_NS * k, frame.index)).pose
            squared.append(mahalanobis(frame.T_map_camera, pose.T_map_camera, pose.covariance))
    return squared


class HeldOutFrames:
    """A source's frames as the networks see them, with their truth.

    Args:
        source: with depth and poses.
        camera: that the networks were trained for.
        device: where they run.
    """

    def __init__(self, source: FrameSource, camera: Camera, device: torch.device) -> None:
        self.source, self.camera, self.device = source, camera, device
        self._adapter = ImageAdapter(source.camera, camera)

    def __len__(self) -> int:
        return len(self.source)

    def view(self, position: int) -> View:
        """One frame.

        Raises:
            SourceError: it has no depth or pose.
        """
        frame = self.source[position]
        if frame.depth_m is None or frame.T_map_camera is None:
            raise SourceError(f"Frame {frame.index} of '{self.source.name}' has no depth or no pose to compare with.")
        depth_m = self._adapter.nearest(frame.depth_m)
        return View(self._adapter(frame.image), depth_m, self.camera, frame.T_map_camera, frame.index)

    def truth(self, view: View) -> SceneCoordinates:
        """True coordinates of a view's cells, without variance."""
        points, known = cell_points(view.depth_m, view.camera, view.T_map_camera, identity())
        mean, valid = (torch.from_numpy(part).to(self.device) for part in (points, known))
        return SceneCoordinates(mean, torch.zeros_like(mean[0]), valid, STRIDE, CELL_PIXEL_OFFSET)

    def pixels(self, view: View) -> torch.Tensor:
        """The image as the networks take it, (1, 3, H, W)."""
        return torch.from_numpy(view.image).to(self.device).permute(2, 0, 1)[None].float()

    def runs(self, length: int, count: int, spacing: int = 1) -> list[range]:
        """Positions of at most ``count`` runs of ``length`` frames, ``spacing`` apart, spread over the source.

        Raises:
            SourceError: there is none.
        """
        found: list[range] = []
        for run in consecutive(self.source, length, spacing=spacing):
            if not found or run[0] > found[-1][-1]:
                found.append(run)
        if not found:
            raise SourceError(f"'{self.source.name}' has no {length} consecutive frames; check --frames and --split.")
        chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int))
        return [found[k] for k in chosen]
