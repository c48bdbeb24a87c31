# SPDX-License-Identifier: Apache-2.0
"""The files of a map folder: what is checked is what is used, and nothing depends on the disk afterwards.

A file is read once, and its checksum taken of what was read. Tensors that were mapped from the file instead would
change with it, and a process that reads behind the end of a file that was cut off is killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load

from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import COARSE_CHANNELS, FINE_CHANNELS
from kfloc_ros.kfnet.scoordnet import MAX_HEADS, Head, SCoordNet, together
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

MAX_FILE_BYTES = 4_000_000_000


def file_checksum(data: bytes) -> dict[str, Any]:
    """What ``map.yaml`` lists of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_file(folder: Path, name: str, description: Mapping[str, Any]) -> bytes:
    """One file of a map, as listed in its description.

    Raises:
        MapError: it is not listed, missing, a link, or not what is listed.
        OSError: it cannot be read.
    """
    path, listed = folder / name, description.get("files")
    expected = listed.get(name) if isinstance(listed, dict) else None
    if not isinstance(expected, dict):
        raise MapError(f"The map '{folder}' is damaged: its description does not list {name}.")
    if not path.is_file():
        raise MapError(f"The map '{folder}' is incomplete: {name} is missing. Build it again.")
    if path.is_symlink():
        raise MapError(f"'{path}' is a link to another file; a map holds its files itself. Copy it there.")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES or size != expected.get("bytes"):
        raise MapError(f"The map '{folder}' is damaged: {name} has {size} bytes, not those listed. Build it again.")
    with path.open("rb") as stream:
        data = stream.read(size + 1)
    if file_checksum(data) != expected:
        raise MapError(f"The map '{folder}' is damaged: {name} does not match its checksum. Build it again.")
    return data


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: a value is not finite; and whatever a damaged file makes the reader raise.
    """
    tensors: dict[str, torch.Tensor] = load(data)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite")
    return tensors


@contextmanager
def appearing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder``, which takes its place when the block ends well, and is gone otherwise.

    Args:
        folder: absolute path; its parents are made.
        overwrite: replace what is there; it is moved aside first, and brought back if that fails.

    Raises:
        OSError: it cannot be made, or put into place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if overwrite and folder.exists():
            _swap_in(temporary, folder)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_in(temporary: Path, folder: Path) -> None:
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        temporary.rename(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old / folder.name, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def appearing_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside ``path``, which takes its place when the block ends well, and is gone otherwise.

    Raises:
        OSError: it cannot be written, or put into place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
        partial.chmod(0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


MAX_HEAD_WIDTH, MAX_HEAD_BLOCKS = 2048, 32
FEATURE_STEPS = 127
"""Unit features are stored in one signed byte a channel; the rounding is far below the features' own noise."""
STORED_TYPES = {"points": torch.float32, "coarse": torch.int8, "fine": torch.int8, "confidence": torch.float16}


def head_size(heads: Sequence[SCoordNet]) -> dict[str, int]:
    """What ``map.yaml`` says of the heads, all of which have one size."""
    count = {"count": len(heads)} if len(heads) > 1 else {}
    return {"width": heads[0].width, "blocks": heads[0].blocks, **count}


def pack_heads(heads: Sequence[SCoordNet]) -> dict[str, torch.Tensor]:
    """Half precision but for what the inputs are normalised with, and where the outputs are relative to."""
    tensors = {}
    for number, head in enumerate(heads):
        for key, value in head.state_dict().items():
            exact = key.startswith("input_") or key == "centre"
            tensors[f"heads.{number}.{key}" if len(heads) > 1 else key] = value if exact else value.half()
    return {key: value.contiguous().cpu() for key, value in tensors.items()}


def unpack_heads(tensors: Mapping[str, torch.Tensor], size: Mapping[str, Any]) -> Head:
    """The heads of a size; it and their number are refused before memory is taken for them.

    Raises:
        ValueError: the size is no map's.
        RuntimeError: the tensors are not those of such heads.
    """
    width, blocks, count = int(size["width"]), int(size["blocks"]), int(size.get("count", 1))
    if not (1 <= width <= MAX_HEAD_WIDTH and 0 <= blocks <= MAX_HEAD_BLOCKS and 1 <= count <= MAX_HEADS):
        raise ValueError(f"no map has {count} heads with {blocks} blocks of {width}")
    head = together([SCoordNet(width, blocks) for _ in range(count)])
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


def pack_references(references: ReferenceViews) -> dict[str, torch.Tensor]:
    """The views' tensors, one after the other, as stored."""
    everything = ReferencePoints.concatenate(references.views)
    counts = [len(view) for view in references.views]
    return {
        "ids": torch.tensor(references.ids, dtype=torch.int64),
        "T_map_camera": torch.from_numpy(references.T_map_camera.copy()),
        "counts": torch.tensor(counts, dtype=torch.int64),
        "points": everything.points.contiguous(),
        "coarse": _quantize(everything.coarse),
        "fine": _quantize(everything.fine),
        "confidence": everything.confidence.half().contiguous(),
    }


def _quantize(unit_features: torch.Tensor) -> torch.Tensor:
    """(N, C) int8 of unit vectors (N, C); their length is restored on reading."""
    return (unit_features * FEATURE_STEPS).round().to(torch.int8).contiguous()


def unpack_references(tensors: Mapping[str, torch.Tensor]) -> ReferenceViews:
    """The views.

    Raises:
        ValueError: the tensors do not fit each other, or hold what no view can.
        KeyError: one is missing.
    """
    if tensors["counts"].ndim != 1 or tensors["ids"].shape != tensors["counts"].shape or not len(tensors["counts"]):
        raise ValueError("the reference views are not listed")
    total = int(tensors["counts"].sum())
    shapes = {"points": (3,), "coarse": (COARSE_CHANNELS,), "fine": (FINE_CHANNELS,), "confidence": ()}
    for name, channels in shapes.items():
        if tuple(tensors[name].shape) != (total, *channels):
            raise ValueError(f"the references' {name} have the shape {tuple(tensors[name].shape)}")
        if tensors[name].dtype != STORED_TYPES[name]:
            raise ValueError(f"the references' {name} are stored as {tensors[name].dtype}, not {STORED_TYPES[name]}")
    counts = tensors["counts"].tolist()
    columns = {name: tensors[name].float() for name in ("points", "confidence")}
    columns |= {name: F.normalize(tensors[name].float(), dim=1) for name in ("coarse", "fine")}
    parts = {name: torch.split(columns[name], counts) for name in ("points", "coarse", "fine", "confidence")}
    views = tuple(
        ReferencePoints(points, coarse, fine, confidence)
        for points, coarse, fine, confidence in zip(*parts.values(), strict=True)
    )
    poses = tensors["T_map_camera"].double().numpy()
    if poses.shape != (len(views), 4, 4):
        raise ValueError("the reference poses do not fit the reference views")
    R = poses[:, :3, :3]
    turned = R @ R.transpose(0, 2, 1) - np.eye(3)
    if not (np.abs(turned).max() < 1e-2 and (np.linalg.det(R) > 0).all() and (poses[:, 3] == [0, 0, 0, 1]).all()):
        raise ValueError("the reference poses are no rigid poses")
    return ReferenceViews(tuple(int(i) for i in tensors["ids"].tolist()), poses, views)
