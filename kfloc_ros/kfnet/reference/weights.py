# SPDX-License-Identifier: Apache-2.0
"""Weights of the reference networks in safetensors files that say what they are for."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kfloc_ros.errors import SourceError, WeightsError
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet

FORMAT = "kfloc_kfnet"
FORMAT_VERSION = "1"
SCOORDNET, OFLOWNET = "scoordnet", "oflownet"
MAX_WIDTH = 4.0
"""Of SCoordNet, in published channels; more is damage."""


def save_network(path: Path, network: ReferenceSCoordNet | ReferenceOFlowNet) -> None:
    """Write a network's weights and its padding; of SCoordNet also its width, its frame, and the size of its images."""
    is_scoordnet = isinstance(network, ReferenceSCoordNet)
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "network": SCOORDNET if is_scoordnet else OFLOWNET,
        "padding": network.padding.value,
        "width": repr(network.width) if is_scoordnet else "1.0",
    }
    if isinstance(network, ReferenceSCoordNet) and network.image_size is not None:
        metadata["image_size"] = "{}x{}".format(*network.image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(tensors, path, metadata)
    path.chmod(0o644)  # safetensors makes it private


def load_scoordnet(path: Path) -> ReferenceSCoordNet:
    """Read a SCoordNet, in evaluation mode.

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    metadata = _metadata(path, SCOORDNET)
    try:
        width, size = float(metadata["width"]), _image_size(metadata.get("image_size", ""))
        if not 0.0 < width <= MAX_WIDTH:
            raise ValueError(f"it has {width} times the published channels")
    except (KeyError, ValueError) as error:
        raise WeightsError(f"'{path}' is damaged: {error}.") from error
    network = ReferenceSCoordNet(Padding(metadata["padding"]), width, image_size=size)
    _fill(network, path)
    try:
        _ = network.frame  # checked when it is made
    except SourceError as error:
        raise WeightsError(f"'{path}' is damaged: {error}") from error
    return network.eval()


def load_oflownet(path: Path) -> ReferenceOFlowNet:
    """Read an OFlowNet, in evaluation mode.

    Raises:
        WeightsError: the file is missing, damaged, or holds something else.
    """
    network = ReferenceOFlowNet(Padding(_metadata(path, OFLOWNET)["padding"]))
    _fill(network, path)
    return network.eval()


def _metadata(path: Path, network: str) -> dict[str, str]:
    if not path.is_file():
        raise WeightsError(f"There is no file '{path}' with the weights of {network}.")
    try:
        with safe_open(path, "pt") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"'{path}' is not a safetensors file: {error}.") from error
    if metadata.get("format") != FORMAT or metadata.get("network") != network:
        found = metadata.get("network", "something else")
        raise WeightsError(f"'{path}' holds {found}, not weights of {network} that this package wrote.")
    if metadata.get("version") != FORMAT_VERSION:
        raise WeightsError(
            f"'{path}' has format version {metadata.get('version')}; this installation reads {FORMAT_VERSION}."
        )
    if metadata.get("padding") not in {padding.value for padding in Padding}:
        raise WeightsError(f"'{path}' names the unknown padding {metadata.get('padding')!r}.")
    return metadata


def _image_size(text: str) -> tuple[int, int] | None:
    if not text:
        return None  # converted, or written by an older version
    width, height = (int(side) for side in text.split("x"))
    if width <= 0 or height <= 0:
        raise ValueError(f"it is for images of {text} pixels")
    return width, height


def _fill(network: ReferenceSCoordNet | ReferenceOFlowNet, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, SafetensorError) as error:
        raise WeightsError(f"'{path}' does not fit the network that it names: {error}") from error
