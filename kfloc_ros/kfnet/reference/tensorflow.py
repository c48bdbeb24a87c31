# SPDX-License-Identifier: Apache-2.0
"""Original KFNet checkpoints, as an archive of named arrays, into the reference networks.

No TensorFlow is needed: the help of ``kfloc convert kfnet-checkpoint`` says how to write the ``.npz`` where
TensorFlow is installed. Variables are ``ScoreNet/<layer>/{kernel,bias}`` for the measurement network and
``Temporal/<layer>/{kernel,bias}`` for the process network; optimizer slots and counters are skipped.
Kernels are stored (height, width, in, out), transposed ones (height, width, out, in), dense ones (in, out).
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kfloc_ros.errors import WeightsError
from kfloc_ros.kfnet.reference.frame import NetworkFrame
from kfloc_ros.kfnet.reference.layers import Padding
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet

SCOPES = {"scoordnet": "ScoreNet", "oflownet": "Temporal"}

Arrays = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Imported:
    """What an archive held."""

    scoordnet: ReferenceSCoordNet | None
    oflownet: ReferenceOFlowNet | None
    skipped: tuple[str, ...]
    """Names that belong to neither network: optimizer slots, counters."""


def read_archive(path: Path) -> dict[str, NDArray[np.float32]]:
    """Named arrays of an ``.npz``; never unpickles.

    Raises:
        WeightsError: missing, not an archive, or holding something that is not numbers.
    """
    if not path.is_file():
        raise WeightsError(f"There is no archive '{path}'.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise WeightsError(f"'{path}' is a single array; write all variables with numpy.savez.")
            found = {name.removesuffix(":0"): archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(f"'{path}' is not an .npz of plain arrays: {error}") from error
    return {name: np.asarray(a, dtype=np.float32) for name, a in found.items() if a.dtype.kind in "fiu"}


def import_networks(arrays: Arrays, frame: NetworkFrame | None = None) -> Imported:
    """Networks with the weights of an original checkpoint, padded as TensorFlow pads.

    Args:
        arrays: variable name to value; either network or both.
        frame: from ``transform.txt`` of the scene; SCoordNet's output means nothing without.

    Raises:
        WeightsError: neither network is there, or one is incomplete or of other shapes.
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
        used |= _fill(module, SCOPES[network], arrays)
        module.eval()
    scoordnet, oflownet = wanted.get("scoordnet"), wanted.get("oflownet")
    assert scoordnet is None or isinstance(scoordnet, ReferenceSCoordNet)
    assert oflownet is None or isinstance(oflownet, ReferenceOFlowNet)
    return Imported(scoordnet, oflownet, tuple(sorted(set(arrays) - used)))


def _fill(network: nn.Module, scope: str, arrays: Arrays) -> set[str]:
    """Copy every layer's variables; returns their names."""
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
