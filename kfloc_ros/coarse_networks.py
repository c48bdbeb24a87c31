# SPDX-License-Identifier: Apache-2.0
"""The networks of the coarse stage, of either family: what measures scene coordinates, and what carries them."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from kfloc_ros.features.trunk import COARSE_STRIDE
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.filter import FlowFunction
from kfloc_ros.kfnet.flow_choice import FlowKind, choose_flow
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
from kfloc_ros.kfnet.roughness import measure
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.stages import Observation
from kfloc_ros.types import SceneCoordinates


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
    """The map's head, and the flow on the trunk's features."""

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
