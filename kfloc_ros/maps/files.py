# SPDX-License-Identifier: Apache-2.0
"""The files of a map folder: what is checked is what is used, and nothing depends on the disk afterwards.

A file is read once, and its checksum taken of what was read. Tensors that were mapped from the file instead would
change with it, and a process that reads behind the end of a file that was cut off is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load

from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import COARSE_CHANNELS, FINE_CHANNELS
from kfloc_ros.files import check_tensor_list, read_bytes
from kfloc_ros.kfnet.scoordnet import MAX_HEADS, Head, SCoordNet, ensemble_of
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

T = TypeVar("T")

MAX_FILE_BYTES = 1_000_000_000
MAX_POINTS = 500_000
"""Reference points of a map: 51 MB on disk, and about four times as much in memory."""
MAX_REFERENCES_BYTES = 100_000_000
REPLACED_S, RETRY_S = 2.0, 0.02
"""How long, and how often, a map that is replaced while it is read is read again."""
_EXCHANGE = 2
"""Linux: ``renameat2`` exchanges two folders at once."""


def file_checksum(data: bytes) -> dict[str, Any]:
    """What ``map.yaml`` lists of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_file(folder: Path, name: str, description: Mapping[str, Any], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """One file of a map, as listed in its description.

    Raises:
        MapError: it is not listed, missing, a link, too large, or not what is listed.
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
    if size > max_bytes:
        raise MapError(f"The map '{folder}' is damaged: {name} has {size} bytes, more than the {max_bytes} allowed.")
    if size != expected.get("bytes"):
        raise MapError(f"The map '{folder}' is damaged: {name} has {size} bytes, not those listed. Build it again.")
    data = read_bytes(path, max_bytes)
    if file_checksum(data) != expected:
        raise MapError(f"The map '{folder}' is damaged: {name} does not match its checksum. Build it again.")
    return data


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: a value is not finite; and whatever a damaged file makes the reader raise.
    """
    check_tensor_list(data[:8])
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
    """Put a folder in the place of another; at once where the file system can, else with a moment without either."""
    if _exchanged(temporary, folder):
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        temporary.rename(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old / folder.name, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Whether two folders were exchanged at once; if not, both are as they were."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here = -100  # paths are relative to the working directory
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), _EXCHANGE) == 0)


def read_whole(folder: Path, read: Callable[[Path], T]) -> T:
    """Return what ``read`` makes of a map folder; if that was replaced meanwhile, it is read again.

    Raises:
        MapError: what ``read`` raises of a folder that stayed as it was.
    """
    until = time.monotonic() + REPLACED_S
    while True:
        before = _identity(folder)
        try:
            return read(folder)
        except MapError:
            missing = before is None and not any(folder.parent.glob(f".{folder.name}.old.*"))
            if missing or (before is not None and before == _identity(folder)) or time.monotonic() > until:
                raise
            time.sleep(RETRY_S)


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What tells a folder from another in its place; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


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
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in _heads(width, blocks, count).state_dict().items()}
    if shapes != {key: value.shape for key, value in tensors.items()}:
        raise ValueError(f"its tensors are not those of {count} heads with {blocks} blocks of {width}")
    head = _heads(width, blocks, count)
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


def _heads(width: int, blocks: int, count: int) -> Head:
    return ensemble_of([SCoordNet(width, blocks) for _ in range(count)])


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
    if int(tensors["counts"].min()) < 0 or int(tensors["counts"].max()) > MAX_POINTS:
        raise ValueError("a reference view has a number of points that none can have")
    total = int(tensors["counts"].sum())
    if total > MAX_POINTS:
        raise ValueError(f"it has {total} reference points, more than the {MAX_POINTS} allowed")
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
