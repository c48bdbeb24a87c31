# SPDX-License-Identifier: Apache-2.0
"""Weights of the reference networks in safetensors files, and import of the original's weights."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from kfloc_ros.errors import SourceError, WeightsError
from kfloc_ros.files import check_tensor_list, read_arrays, save_tensors
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import NetworkFrame, ReferenceSCoordNet, read_transform

FORMAT = "kfloc_kfnet"
FORMAT_VERSION = "1"
SCOORDNET, OFLOWNET = "scoordnet", "oflownet"
CONVERTED = "converted"
"""Metadata ``origin`` of weights that were published, not trained further here."""
MAX_WIDTH = 4.0
"""Largest width of SCoordNet, as a multiple of the published channels; a larger one means a damaged file."""


def save_network(path: Path, network: ReferenceSCoordNet | ReferenceOFlowNet) -> None:
    """Write a network's weights, padding and origin; for SCoordNet also its width, frame, and image size."""
    is_scoordnet = isinstance(network, ReferenceSCoordNet)
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "network": SCOORDNET if is_scoordnet else OFLOWNET,
        "padding": network.padding.value,
        "width": repr(network.width) if is_scoordnet else "1.0",
    }
    if network.converted:
        metadata["origin"] = CONVERTED
    if isinstance(network, ReferenceSCoordNet) and network.image_size is not None:
        metadata["image_size"] = "{}x{}".format(*network.image_size)
    save_tensors(network.state_dict(), path, metadata)


def load_scoordnet(path: Path) -> ReferenceSCoordNet:
    """Read a SCoordNet, in evaluation mode.

    Raises:
        WeightsError: the file is missing, damaged, or of another kind.
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
        _ = network.frame  # its constructor checks it
    except SourceError as error:
        raise WeightsError(f"'{path}' is damaged: {error}") from error
    network.converted = metadata.get("origin") == CONVERTED
    return network.eval()


def load_oflownet(path: Path) -> ReferenceOFlowNet:
    """Read an OFlowNet, in evaluation mode.

    Raises:
        WeightsError: the file is missing, damaged, or of another kind.
    """
    metadata = _metadata(path, OFLOWNET)
    network = ReferenceOFlowNet(Padding(metadata["padding"]))
    _fill(network, path)
    network.converted = metadata.get("origin") == CONVERTED
    return network.eval()


def _read_metadata(path: Path, network: str) -> dict[str, str]:
    if not path.is_file():
        raise WeightsError(f"There is no file '{path}' with the weights of {network}.")
    try:
        check_tensor_list(path)
        with safe_open(path, "pt") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"'{path}' is not a safetensors file: {error}.") from error
    return metadata


def _metadata(path: Path, network: str) -> dict[str, str]:
    metadata = _read_metadata(path, network)
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


SCOPES = {"scoordnet": "ScoreNet", "oflownet": "Temporal"}

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Imported:
    """Networks read from an archive."""

    scoordnet: ReferenceSCoordNet | None
    oflownet: ReferenceOFlowNet | None
    skipped: tuple[str, ...]
    """Names that belong to neither network: optimizer slots, counters."""

    def to(self, device: torch.device) -> Imported:
        """Move the networks to a device and return them."""
        for network in (self.scoordnet, self.oflownet):
            if network is not None:
                network.to(device)
        return self


def read_networks(paths: Sequence[Path], transform: Path, scale: float = 1.0) -> Imported:
    """Return the networks of weight files, of a folder with both, or of an archive of the original's checkpoint.

    Args:
        paths: ``scoordnet.safetensors``, ``oflownet.safetensors``, a folder with either, or an ``.npz``.
        transform: ``transform.txt`` of the scene, for an archive's SCoordNet.
        scale: network units per metre, for an archive's SCoordNet.

    Raises:
        WeightsError: a file is missing, damaged, or of another kind.
        SourceError: an archive has a SCoordNet, and there is no transform.
    """
    found = Imported(None, None, ())
    for path in paths:
        files = sorted(path.glob("[!.]*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise WeightsError(f"'{path}' has no .safetensors file; `kfloc convert` and `kfloc train` write them.")
        for file in files:
            if file.suffix == ".npz":
                arrays = read_archive(file)
                has_scene = any(name.startswith(f"{SCOPES[SCOORDNET]}/") for name in arrays)
                read = import_networks(arrays, read_transform(transform, scale) if has_scene else None)
                found = Imported(read.scoordnet or found.scoordnet, read.oflownet or found.oflownet, read.skipped)
            elif _read_metadata(file, "a network").get("network") == OFLOWNET:
                found = replace(found, oflownet=load_oflownet(file))
            else:
                found = replace(found, scoordnet=load_scoordnet(file))
    return found


def read_archive(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the named arrays of an ``.npz``, without unpickling.

    Raises:
        WeightsError: the file is missing, not an archive, or contains something other than numbers.
    """
    if not path.is_file():
        raise WeightsError(f"There is no archive '{path}'.")
    try:
        found = {name.removesuffix(":0"): array for name, array in read_arrays(path).items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"'{path}' is not an .npz of plain arrays: {error}") from error
    return {name: np.asarray(a, dtype=np.float32) for name, a in found.items() if a.dtype.kind in "fiu"}


def import_networks(arrays: Arrays, frame: NetworkFrame | None = None) -> Imported:
    """Return networks with the weights of an original checkpoint, padded as TensorFlow pads.

    Args:
        arrays: variable name to value; of either network or of both.
        frame: from ``transform.txt`` of the scene; SCoordNet's output is meaningless without it.

    Raises:
        WeightsError: no network is there, or one is incomplete or has other shapes.
    """
    wanted: dict[str, ReferenceSCoordNet | ReferenceOFlowNet] = {}
    for network, scope in SCOPES.items():
        if any(name.startswith(f"{scope}/") for name in arrays):
            wanted[network] = (
                ReferenceSCoordNet(Padding.TENSORFLOW, frame=frame)
                if network == "scoordnet"
                else ReferenceOFlowNet(Padding.TENSORFLOW)
            )
    if not wanted:
        seen = ", ".join(sorted(arrays)[:4]) or "nothing"
        raise WeightsError(f"The archive has no variable under ScoreNet/ or Temporal/; it has {seen}.")
    used: set[str] = set()
    for network, module in wanted.items():
        used |= _fill_scope(module, SCOPES[network], arrays)
        module.eval()
        module.converted = True
    scoordnet, oflownet = wanted.get("scoordnet"), wanted.get("oflownet")
    assert scoordnet is None or isinstance(scoordnet, ReferenceSCoordNet)
    assert oflownet is None or isinstance(oflownet, ReferenceOFlowNet)
    return Imported(scoordnet, oflownet, tuple(sorted(set(arrays) - used)))


def _fill_scope(network: nn.Module, scope: str, arrays: Arrays) -> set[str]:
    """Copy every layer's variables; return their names."""
    layers = {
        path.split(".")[-1]: layer
        for path, layer in network.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
    }
    names = {f"{scope}/{layer}/{kind}" for layer in layers for kind in ("kernel", "bias")}
    if missing := sorted(names - set(arrays)):
        raise WeightsError(f"The archive lacks {len(missing)} variables of {scope}, such as '{missing[0]}'.")
    for name, layer in layers.items():
        kernel = torch.from_numpy(arrays[f"{scope}/{name}/kernel"])
        # (h, w, a, b) -> (b, a, h, w): out, in for a convolution; in, out for a transposed one; out, in if dense
        weight = kernel.t() if isinstance(layer, nn.Linear) else kernel.permute(3, 2, 0, 1)
        for kind, value, target in (
            ("kernel", weight, layer.weight),
            ("bias", torch.from_numpy(arrays[f"{scope}/{name}/bias"]), layer.bias),
        ):
            if target is None or value.shape != target.shape:
                shape = None if target is None else tuple(target.shape)
                raise WeightsError(f"'{scope}/{name}/{kind}' has the shape {tuple(value.shape)}; expected {shape}.")
            if not torch.isfinite(value).all():
                raise WeightsError(f"'{scope}/{name}/{kind}' holds values that are not finite.")
            with torch.no_grad():
                target.copy_(value)
    return names
