# SPDX-License-Identifier: Apache-2.0
"""KFNet's two networks as one thing, trained for one scene: what a map of the `reference` family holds."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from kfloc_ros.errors import SourceError, WeightsError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.kfnet.reference.frame import NetworkFrame
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import STRIDE, ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import MAX_WIDTH, OFLOWNET, SCOORDNET

MIN_IMAGE_SIDE_PX = 64
"""Eight cells, as many as OFlowNet's window has."""
EXACT = ("T_network_map", "scale")
"""Kept in double precision."""


@dataclass(frozen=True, eq=False)
class ReferenceNetworks:
    """SCoordNet and OFlowNet, in evaluation mode."""

    scoordnet: ReferenceSCoordNet
    oflownet: ReferenceOFlowNet

    def to(self, device: torch.device) -> ReferenceNetworks:
        """The same on a device; the networks themselves move."""
        self.scoordnet.to(device)
        self.oflownet.to(device)
        return self

    def transformed(self, T: Matrix) -> ReferenceNetworks:
        """A copy that tells its coordinates in another frame: each point p becomes T p."""
        scoordnet = copy.deepcopy(self.scoordnet)
        frame = scoordnet.frame
        scoordnet.set_frame(NetworkFrame(frame.T_network_map @ inverse_pose(T), frame.scale))
        return replace(self, scoordnet=scoordnet)

    def camera(self, map_camera: Camera) -> Camera:
        """The camera whose images the networks take: a map's, made smaller by a whole number.

        Raises:
            WeightsError: the images that the networks were trained on are not of such a size.
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
        """Pixels of the map's camera per cell."""
        return STRIDE * map_camera.width // self.camera(map_camera).width


def pack_networks(networks: ReferenceNetworks) -> dict[str, torch.Tensor]:
    """The tensors of both, for a map's file."""
    parts = {SCOORDNET: networks.scoordnet, OFLOWNET: networks.oflownet}
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, network in parts.items()
        for key, value in network.state_dict().items()
    }


def describe_networks(networks: ReferenceNetworks) -> dict[str, Any]:
    """What ``map.yaml`` says of them."""
    size = networks.scoordnet.image_size
    return {
        "width": networks.scoordnet.width,
        "image_size": None if size is None else list(size),
        "padding": {SCOORDNET: networks.scoordnet.padding.value, OFLOWNET: networks.oflownet.padding.value},
    }


def unpack_networks(tensors: Mapping[str, torch.Tensor], described: Mapping[str, Any]) -> ReferenceNetworks:
    """The networks of a map's file; no memory is taken that the file does not fill.

    Raises:
        ValueError: the description is not one of networks.
        KeyError, TypeError, RuntimeError: as above, or the tensors do not fit it.
    """
    width, size = float(described["width"]), described.get("image_size")
    if not 0.0 < width <= MAX_WIDTH:
        raise ValueError(f"no SCoordNet has {width} times the published channels")
    if size is not None:
        size = int(size[0]), int(size[1])
        if min(size) < MIN_IMAGE_SIDE_PX:
            raise ValueError(f"no network takes images of {size[0]}x{size[1]} pixels")
    paddings = {name: Padding(described["padding"][name]) for name in (SCOORDNET, OFLOWNET)}
    with torch.device("meta"):  # shapes without memory: the description is not to be believed
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
        _ = scoordnet.frame  # checked when it is made
    except SourceError as error:
        raise ValueError(str(error)) from error
    return ReferenceNetworks(scoordnet, oflownet)
