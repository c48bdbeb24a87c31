# SPDX-License-Identifier: Apache-2.0
"""The first stage, image to coarse pose: what KFNet does."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from kfloc_ros.device import choose_device
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.kfnet.filter import FlowFunction, SceneCoordinateFilter
from kfloc_ros.kfnet.flow_network import FlowKind, choose_flow
from kfloc_ros.kfnet.fusion import NO_PRIOR, Filtered, FilterSettings, NisMode
from kfloc_ros.kfnet.pnp import solve_pnp
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
from kfloc_ros.kfnet.scoordnet import measure
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.stages import CoarseResult, Observation, observe, pnp_settings, timed
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import FilterReport, Frame, Matrix, SceneCoordinates


class CoarseStage:
    """Backbone, the networks of the map's family, Kalman filter, RANSAC-PnP.

    Args:
        scene_map: of the place.
        config: options.
        backbone: to share with other stages; made here by default.
    """

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig, backbone: Backbone | None = None) -> None:
        device = choose_device(config.device)
        calibration = scene_map.calibration
        self._backbone = backbone or Backbone(device=device)
        self._networks = networks_of(scene_map, config.oflownet, device)
        self._camera = scene_map.camera
        self._use_filter = config.filter
        self._learns = config.filter and config.pose_feedback
        self._passed_by: tuple[int, Observation] | None = None
        self.note = self._networks.note if config.filter else ""
        """What of the configuration could not be had, in a sentence; empty if all could."""
        self._filter = SceneCoordinateFilter(
            FilterSettings(
                flow_temperature=calibration.flow_temperature,
                process_scale=self._networks.process_scale,
                process_floor_m2=self._networks.process_floor_m2,
                nis_threshold=config.nis_threshold,
                nis_mode=NisMode(config.nis_mode),
                max_gap_s=config.max_gap_s,
            ),
            self._networks.flow,
        )
        self._pnp = pnp_settings(config, self._networks.stride, calibration.coarse_covariance_scale)

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have (``ImageAdapter`` brings images to it)."""
        return self._camera

    def observe(self, frame: Frame) -> Observation:
        """Run the backbone.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        return observe(frame, self._camera, self._backbone)

    def process(self, frame: Frame, observation: Observation | None = None) -> CoarseResult:
        """Measure, filter, and solve for the coarse pose.

        A frame that was passed by just before is filtered first, so that the belief is one frame old and a bad picture,
        for which alone a track mostly ends, does not meet an older one or none.

        Args:
            frame: to localize.
            observation: of the frame, if the backbone has run.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        observation = observation or self.observe(frame)
        features, timings = observation.features, observation.timings_ms
        if self._passed_by is not None and self._use_filter:
            with timed(timings, "filter"), torch.inference_mode():
                stamp_ns, before = self._passed_by
                self._filtered(stamp_ns, before, self._networks.measure(before))
        self._passed_by = None
        with timed(timings, "measure"):
            measurement = self._networks.measure(observation)
        with timed(timings, "filter"), torch.inference_mode():
            filtered = self._filtered(frame.stamp_ns, observation, measurement)
        with timed(timings, "pnp"):
            pose = solve_pnp(filtered.posterior, self._camera, self._pnp)
        self._filter.judge(pose)
        return CoarseResult(
            frame.stamp_ns, pose, filtered.report, timings, features, filtered.posterior, measurement, filtered
        )

    def pass_by(self, stamp_ns: int, observation: Observation) -> None:
        """Take note of a frame that needs no coarse pose.

        The belief ends: the coarse pose that checks a track must know nothing of the poses before.
        """
        self._passed_by = (stamp_ns, observation)
        self._filter.reset("frames before were only tracked")

    def learn(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Take the refined pose of one of the last frames into account; it must be beyond doubt."""
        if self._learns:
            self._filter.learn(stamp_ns, self._camera, T_map_camera)

    def _filtered(self, stamp_ns: int, observation: Observation, measurement: SceneCoordinates) -> Filtered:
        if not self._use_filter:
            return Filtered(measurement, FilterReport("the filter is off", 0.0, NO_PRIOR, 0.0))
        return self._filter.step(stamp_ns, self._networks.flow_features(observation), measurement)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        self._filter.reset(reason)
        self._passed_by = None


class CoarseNetworks(Protocol):
    """What the coarse stage asks of a family."""

    flow: FlowFunction
    """Between what :meth:`flow_features` gives."""
    process_scale: float
    process_floor_m2: float
    stride: int
    """Pixels of the map's camera per cell."""
    note: str
    """What of the configuration could not be had, in a sentence; empty if all could."""

    def measure(self, observation: Observation) -> SceneCoordinates:
        """Scene coordinates of a frame; cells in pixels of the map's camera."""
        ...

    def flow_features(self, observation: Observation) -> torch.Tensor:
        """(C, h, w) by which the cells of two frames are matched."""
        ...


def networks_of(scene_map: SceneMap, oflownet: str, device: torch.device) -> CoarseNetworks:
    """The networks that a map was made with.

    Args:
        scene_map: of the place.
        oflownet: of :class:`FlowKind`, for the fast family.
        device: where they run.
    """
    if scene_map.kfnet is None:
        return FastNetworks(scene_map, FlowKind(oflownet), device)
    return ReferencePair(scene_map, scene_map.kfnet, device)


class FastNetworks:
    """The map's head, and the flow on the backbone's features."""

    stride = COARSE_STRIDE

    def __init__(self, scene_map: SceneMap, kind: FlowKind, device: torch.device) -> None:
        self._head = scene_map.head.to(device)
        self._calibration = scene_map.calibration
        chosen = choose_flow(kind, scene_map.calibration, device)
        self.flow, self.note = chosen.flow, chosen.note
        self.process_scale, self.process_floor_m2 = chosen.process_scale, chosen.process_floor_m2

    def measure(self, observation: Observation) -> SceneCoordinates:
        return measure(self._head, observation.features, self._calibration)

    def flow_features(self, observation: Observation) -> torch.Tensor:
        return observation.features.coarse[0]


class ReferencePair:
    """KFNet's own networks, on the image itself."""

    note = ""

    def __init__(self, scene_map: SceneMap, networks: ReferenceNetworks, device: torch.device) -> None:
        self._networks = networks.to(device)
        self._device = device
        self._adapter = ImageAdapter(scene_map.camera, networks.camera(scene_map.camera))
        self._times = scene_map.camera.width // self._adapter.target.width
        calibration = scene_map.calibration
        self._variance_scale = calibration.measurement_variance_scale
        self.stride = networks.stride(scene_map.camera)
        self.flow: FlowFunction = networks.oflownet.flow
        self.process_scale, self.process_floor_m2 = calibration.process_scale, calibration.process_floor_m2

    def measure(self, observation: Observation) -> SceneCoordinates:
        measured = self._networks.scoordnet.measure(self._adapter(observation.image), self._variance_scale)
        first = (measured.pixel_offset + 0.5) * self._times - 0.5  # pixel (0, 0) is the centre of a pixel
        return replace(measured, stride=self.stride, first_pixel=first)

    def flow_features(self, observation: Observation) -> torch.Tensor:
        image = torch.from_numpy(self._adapter(observation.image)).to(self._device)
        features: torch.Tensor = self._networks.oflownet.features(image.permute(2, 0, 1)[None].float())
        return features[0]
