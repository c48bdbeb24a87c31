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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load

from kfloc_ros.errors import MapError

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
