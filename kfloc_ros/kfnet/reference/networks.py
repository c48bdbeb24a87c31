# SPDX-License-Identifier: Apache-2.0
"""Pair of KFNet's two networks, trained for one scene, as a map of the `reference` family holds it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kfloc_ros.errors import SourceError, WeightsError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import STRIDE, NetworkFrame, ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import MAX_WIDTH, OFLOWNET, SCOORDNET

MIN_IMAGE_SIDE_PX = 64
"""Smallest image side: eight cells, the size of OFlowNet's window."""
EXACT = ("T_network_map", "scale")
"""Tensors kept in double precision."""


@dataclass(frozen=True, eq=False)
class ReferenceNetworks:
    """SCoordNet and OFlowNet, in evaluation mode."""

    scoordnet: ReferenceSCoordNet
    oflownet: ReferenceOFlowNet

    @property
    def converted(self) -> bool:
        """Both networks have published weights, as ``kfloc convert`` writes them."""
        return self.scoordnet.converted and self.oflownet.converted

    @property
    def process_scale(self) -> float:
        """Factor on OFlowNet's process variance that gives square metres.

        Published weights of a scaled scene have sigmas in network units; those trained here are in metres.
        """
        return float(self.scoordnet.scale) ** -2 if self.oflownet.converted else 1.0

    def to(self, device: torch.device) -> ReferenceNetworks:
        """Move the networks to a device and return them."""
        self.scoordnet.to(device)
        self.oflownet.to(device)
        return self

    def transformed(self, T: Matrix) -> ReferenceNetworks:
        """Return a copy that regresses in another frame: each point p becomes T p, T (4, 4)."""
        scoordnet = copy.deepcopy(self.scoordnet)
        frame = scoordnet.frame
        scoordnet.set_frame(NetworkFrame(frame.T_network_map @ inverse_pose(T), frame.scale))
        return replace(self, scoordnet=scoordnet)

    def camera(self, map_camera: Camera) -> Camera:
        """Return the camera whose images the networks take: a map's, reduced by a whole number.

        Raises:
            WeightsError: the networks were trained on images of another size.
        """
        width, height = self.scoordnet.image_size or (map_camera.width, map_camera.height)
        times = map_camera.width // width
        if times < 1 or (times * width, times * height) != (map_camera.width, map_camera.height):
            raise WeightsError(
                f"SCoordNet was trained on images of {width}x{height} pixels, and the map's camera has "
                f"{map_camera.width}x{map_camera.height}, which is not a multiple. Train it with "
                f"image_width={map_camera.width} image_height={map_camera.height}, or a half or a quarter of both."
            )
        return map_camera.scaled_to(width, height)

    def stride(self, map_camera: Camera) -> int:
        """Return the pixels of the map's camera per cell."""
        return STRIDE * map_camera.width // self.camera(map_camera).width


def pack_networks(networks: ReferenceNetworks) -> dict[str, torch.Tensor]:
    """Return the tensors of both networks, for a map's file."""
    parts = {SCOORDNET: networks.scoordnet, OFLOWNET: networks.oflownet}
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, network in parts.items()
        for key, value in network.state_dict().items()
    }


def describe_networks(networks: ReferenceNetworks) -> dict[str, Any]:
    """Return the networks' entry in ``map.yaml``."""
    size = networks.scoordnet.image_size
    converted = [name for name in (SCOORDNET, OFLOWNET) if getattr(networks, name).converted]
    return {
        "width": networks.scoordnet.width,
        "image_size": None if size is None else list(size),
        "padding": {SCOORDNET: networks.scoordnet.padding.value, OFLOWNET: networks.oflownet.padding.value},
        **({"converted": converted} if converted else {}),
    }


def unpack_networks(tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> ReferenceNetworks:
    """Return the networks of a map's file; memory use is bounded by the size of the file.

    Raises:
        ValueError: the description is not one of networks.
        KeyError, TypeError, RuntimeError: the description is incomplete, or the tensors do not fit it.
    """
    width, size = float(described["width"]), described.get("image_size")
    if not 0.0 < width <= MAX_WIDTH:
        raise ValueError(f"no SCoordNet has {width} times the published channels")
    if size is not None:
        size = int(size[0]), int(size[1])
        if min(size) < MIN_IMAGE_SIDE_PX:
            raise ValueError(f"no network takes images of {size[0]}x{size[1]} pixels")
    paddings = {name: Padding(described["padding"][name]) for name in (SCOORDNET, OFLOWNET)}
    with torch.device("meta"):  # shapes without memory: the description is not trusted
        scoordnet = ReferenceSCoordNet(paddings[SCOORDNET], width, image_size=size)
        oflownet = ReferenceOFlowNet(paddings[OFLOWNET])
    for name, network in ((SCOORDNET, scoordnet), (OFLOWNET, oflownet)):
        prefix = f"{name}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        network.load_state_dict(
            {key: value.double() if key in EXACT else value.float() for key, value in own.items()}, assign=True
        )
        network.eval().requires_grad_(False)
    try:
        _ = scoordnet.frame  # its constructor checks it
    except SourceError as error:
        raise ValueError(str(error)) from error
    converted = described.get("converted", [])
    if not isinstance(converted, list):
        raise ValueError("the list of converted networks is not a list")
    scoordnet.converted, oflownet.converted = SCOORDNET in converted, OFLOWNET in converted
    return ReferenceNetworks(scoordnet, oflownet)
