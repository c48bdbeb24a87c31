# SPDX-License-Identifier: Apache-2.0
"""Files of a map folder: reading, checking and writing. The data that are checked are the data that are used.

A file is read once, and its checksum computed from the data read. Memory-mapped tensors would change with the file, and
a process that reads beyond the end of a truncated file is killed.
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
from dataclasses import replace
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
from kfloc_ros.pixloc.patch_kernels import PATCH_SIDE
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

T = TypeVar("T")

MAX_FILE_BYTES = 1_000_000_000
MAX_POINTS = 500_000
"""Limit on reference points of a map: 76 MB on disk, and about three times as much in memory."""
MAX_REFERENCES_BYTES = 100_000_000
REPLACED_S, RETRY_S = 2.0, 0.02
"""Total time and interval of retries if a map is replaced while it is read, in seconds."""
_EXCHANGE = 2
"""Flag of Linux's ``renameat2`` that exchanges two folders atomically."""


def file_checksum(data: bytes) -> dict[str, Any]:
    """Return the entry of a file in ``map.yaml``."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_file(folder: Path, name: str, description: Mapping[str, Any], max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the data of one file of a map, as listed in its description.

    Raises:
        MapError: the file is not listed, missing, a link, too large, or differs from its entry.
        OSError: the file cannot be read.
    """
    path, listed = folder / name, description.get("files")
    expected = listed.get(name) if isinstance(listed, dict) else None
    if not isinstance(expected, dict):
        raise MapError(f"The map '{folder}' is damaged: its description does not list {name}.")
    if not path.is_file():
        raise MapError(f"The map '{folder}' is incomplete: {name} is missing. Build it again.")
    if path.is_symlink():
        raise MapError(f"'{path}' is a link to another file; a map must contain its files. Copy the file there.")
    size = path.stat().st_size
    if size > max_bytes:
        raise MapError(f"The map '{folder}' is damaged: {name} has {size} bytes, more than the limit of {max_bytes}.")
    if size != expected.get("bytes"):
        raise MapError(
            f"The map '{folder}' is damaged: {name} has {size} bytes, not the listed number. Build it again."
        )
    data = read_bytes(path, max_bytes)
    if file_checksum(data) != expected:
        raise MapError(f"The map '{folder}' is damaged: {name} does not match its checksum. Build it again.")
    return data


def read_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        ValueError: a value is not finite; a damaged file can raise other exceptions, see ``DAMAGE``.
    """
    check_tensor_list(data[:8])
    tensors: dict[str, torch.Tensor] = load(data)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite")
    return tensors


@contextmanager
def appearing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder``, which replaces it if the block succeeds, and is removed otherwise.

    Args:
        folder: absolute path; its parents are created.
        overwrite: replace an existing folder; it is moved aside first, and restored on failure.

    Raises:
        OSError: the folder cannot be created or replaced.
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
    """Replace a folder by another: atomically if the file system can, else with a moment without either."""
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
    """Return True if two folders were exchanged atomically; if not, both are unchanged."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here = -100  # paths are relative to the working directory
    return bool(rename(here, os.fsencode(a), here, os.fsencode(b), _EXCHANGE) == 0)


def read_whole(folder: Path, read: Callable[[Path], T]) -> T:
    """Return the result of ``read`` for a map folder; if the folder was replaced meanwhile, read it again.

    Raises:
        MapError: ``read`` failed on a folder that was not replaced.
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
    """Return an identifier of a folder, which differs if another folder takes its path; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def appearing_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file beside ``path``, which replaces it if the block succeeds, and is removed otherwise.

    Raises:
        OSError: the file cannot be written or replaced.
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
"""Unit features are stored in one signed byte per channel; the rounding is far below the features' own noise."""
STORED_TYPES = {"points": torch.float32, "coarse": torch.int8, "fine": torch.int8, "confidence": torch.float16}


def head_size(heads: Sequence[SCoordNet]) -> dict[str, int]:
    """Return the entry of the heads in ``map.yaml``; all heads have one size."""
    count = {"count": len(heads)} if len(heads) > 1 else {}
    return {"width": heads[0].width, "blocks": heads[0].blocks, **count}


def pack_heads(heads: Sequence[SCoordNet]) -> dict[str, torch.Tensor]:
    """Return the stored tensors of heads: half precision, except for the input normalization and the output offset."""
    tensors = {}
    for number, head in enumerate(heads):
        for key, value in head.state_dict().items():
            exact = key.startswith("input_") or key == "centre"
            tensors[f"heads.{number}.{key}" if len(heads) > 1 else key] = value if exact else value.half()
    return {key: value.contiguous().cpu() for key, value in tensors.items()}


def unpack_heads(tensors: Mapping[str, torch.Tensor], size: Mapping[str, Any]) -> Head:
    """Return the heads of a size; an invalid size or number is refused before memory is allocated.

    Raises:
        ValueError: the size is not valid for a map.
        RuntimeError: the tensors do not match the size.
    """
    width, blocks, count = int(size["width"]), int(size["blocks"]), int(size.get("count", 1))
    if not (1 <= width <= MAX_HEAD_WIDTH and 0 <= blocks <= MAX_HEAD_BLOCKS and 1 <= count <= MAX_HEADS):
        raise ValueError(f"no map has {count} heads with {blocks} blocks of {width}")
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in _heads(width, blocks, count).state_dict().items()}
    if shapes != {key: value.shape for key, value in tensors.items()}:
        raise ValueError(f"its tensors do not match {count} heads with {blocks} blocks of {width}")
    head = _heads(width, blocks, count)
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


def _heads(width: int, blocks: int, count: int) -> Head:
    return ensemble_of([SCoordNet(width, blocks) for _ in range(count)])


def pack_references(references: ReferenceViews) -> dict[str, torch.Tensor]:
    """Return the views' stored tensors, concatenated."""
    everything = ReferencePoints.concatenate(references.views)
    counts = [len(view) for view in references.views]
    sessions = {"sessions": torch.tensor(references.sessions, dtype=torch.int64)} if references.sessions else {}
    return {
        "ids": torch.tensor(references.ids, dtype=torch.int64),
        "T_map_camera": torch.from_numpy(references.T_map_camera.copy()),
        "counts": torch.tensor(counts, dtype=torch.int64),
        "points": everything.points.contiguous(),
        "coarse": _quantize(everything.coarse),
        "fine": _quantize(everything.fine),
        "confidence": everything.confidence.half().contiguous(),
        **_stored_patches(references.views),
        **sessions,
    }


def _stored_patches(views: Sequence[ReferencePoints]) -> dict[str, torch.Tensor]:
    """Return the patches of all views, if any has some; those of a view without have no contrast, and do not count."""
    if all(view.patches is None for view in views):
        return {}
    none = torch.zeros(1, PATCH_SIDE**2, dtype=torch.uint8)
    return {"patches": torch.cat([none.expand(len(v), -1) if v.patches is None else v.patches for v in views])}


def _quantize(unit_features: torch.Tensor) -> torch.Tensor:
    """Return unit vectors (N, C) as int8 (N, C); their length is restored on reading."""
    return (unit_features * FEATURE_STEPS).round().to(torch.int8).contiguous()


def unpack_references(tensors: Mapping[str, torch.Tensor]) -> ReferenceViews:
    """Return the views in stored tensors.

    Raises:
        ValueError: the tensors do not match each other, or have invalid values.
        KeyError: a tensor is missing.
    """
    if tensors["counts"].ndim != 1 or tensors["ids"].shape != tensors["counts"].shape or not len(tensors["counts"]):
        raise ValueError("the reference views are not listed")
    if int(tensors["counts"].min()) < 0 or int(tensors["counts"].max()) > MAX_POINTS:
        raise ValueError("a reference view has an invalid number of points")
    total = int(tensors["counts"].sum())
    if total > MAX_POINTS:
        raise ValueError(f"it has {total} reference points, more than the limit of {MAX_POINTS}")
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
    if "patches" in tensors:
        patches = tensors["patches"]
        if patches.dtype != torch.uint8 or tuple(patches.shape) != (total, PATCH_SIDE**2):
            raise ValueError(f"the references' patches have the shape {tuple(patches.shape)} of {patches.dtype}")
        cut = zip(views, torch.split(patches, counts), strict=True)
        views = tuple(replace(view, patches=own) for view, own in cut)
    poses = tensors["T_map_camera"].double().numpy()
    if poses.shape != (len(views), 4, 4):
        raise ValueError("the reference poses do not match the reference views")
    R = poses[:, :3, :3]
    turned = R @ R.transpose(0, 2, 1) - np.eye(3)
    if not (np.abs(turned).max() < 1e-2 and (np.linalg.det(R) > 0).all() and (poses[:, 3] == [0, 0, 0, 1]).all()):
        raise ValueError("the reference poses are not rigid poses")
    sessions = tensors.get("sessions", tensors["ids"][:0])
    fits = sessions.dtype == torch.int64 and tuple(sessions.shape) in ((0,), (len(views),))
    if not fits or bool((sessions < 0).any()):
        raise ValueError("the sessions do not match the reference views")
    return ReferenceViews(tuple(tensors["ids"].tolist()), poses, views, tuple(sessions.tolist()))
