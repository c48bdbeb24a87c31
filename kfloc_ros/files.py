# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote, read within limits: plain files only, and sizes are known before memory is taken."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError

MAX_FILE_BYTES = 1_000_000_000
MAX_TEXT_BYTES = 200_000_000
MAX_FRAMES = 200_000
"""Of one list: two hours at 30 Hz."""
MAX_IMAGE_PIXELS = 64_000_000
"""Of one image; OpenCV is told the same in ``kfloc_ros/__init__.py``, for formats whose headers are not read here."""
MAX_TENSOR_LIST_BYTES = 1_000_000
MAX_RATIO, FREE_BYTES = 50, 20_000_000
"""An archive may unpack to so many times its size, and so much besides; weights and features hardly shrink."""
_NOT_A_NUMBER = re.compile(r"[-+]?(1\.#(IND|QNAN|SNAN|INF)\d*|nan\(\w+\))", re.IGNORECASE)


def read_bytes(path: Path, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a plain file.

    Raises:
        OSError: it is missing, a folder, pipe or device, larger than ``max_bytes``, or cannot be read.
    """
    with open_plain(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > max_bytes:
            raise OSError(27, f"it has {size} bytes, more than the {max_bytes} allowed", str(path))
        return stream.read(max_bytes + 1)


def open_plain(path: Path) -> IO[bytes]:
    """Return a plain file, open for reading; a pipe is not waited for.

    Raises:
        OSError: it is missing, or a folder, pipe or device.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(22, "it is a folder, a pipe or a device, not a plain file", str(path))
    return os.fdopen(handle, "rb")


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the content of a plain UTF-8 text file.

    Raises:
        OSError: see :func:`read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, max_bytes).decode("utf-8")


def check_count(count: int, path: Path) -> None:
    """Have a list name no more frames than can be looked at in some seconds.

    Raises:
        SourceError: it names more.
    """
    if count > MAX_FRAMES:
        raise SourceError(f"'{path}' names {count} frames, more than the {MAX_FRAMES} allowed; cut it into several.")


def _may_lead_out(folder: Path, name: str) -> bool:
    """False for names without steps up and without links, which is told much faster than where a path ends."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\0" in name:
        return True
    at = str(folder)
    for part in parts:
        at = f"{at}/{part}"
        if os.path.islink(at):
            return True
    return False


def inside(folder: Path, name: str) -> Path:
    """Return the file of a name that a data set gives, which must lie in the data set's own folder.

    Raises:
        SourceError: the name, or a link, leads elsewhere.
    """
    path = folder / name
    if not _may_lead_out(folder, name):
        return path
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise SourceError(f"The name '{name[:200]}' in '{folder}' is no file's: {error}.") from error
    if not within:
        raise SourceError(f"The name '{name[:200]}' leads out of the folder '{folder}'.")
    return path


def number(word: str) -> float:
    """Return a float; NaN for the ways in which Windows programs print one, such as ``-1.#IND``.

    Raises:
        ValueError: it is none.
    """
    return float("nan") if _NOT_A_NUMBER.fullmatch(word) else float(word)


def number_rows(path: Path) -> list[list[float]]:
    """Return the numbers of a text file by line; empty lines and lines that begin with ``#`` are passed over.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: a word is no number, or the text is no UTF-8.
    """
    lines = (line.split() for line in read_text(path).splitlines() if not line.lstrip().startswith("#"))
    return [[number(word) for word in words] for words in lines if words]


def read_array(path: Path) -> NDArray[Any]:
    """Return the array of a ``.npy`` file, whose header may not announce more than the file holds.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: it is no such file, or holds objects.
    """
    return _array(read_bytes(path))


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` file by name; one that holds a hundred times its own size is refused.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: an array is damaged, holds objects, or the archive unpacks to too much.
        zipfile.BadZipFile: it is no archive.
    """
    data = read_bytes(path)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        size = sum(member.file_size for member in members)
        if size > MAX_RATIO * len(data) + FREE_BYTES:
            raise ValueError(f"it would unpack to {size} bytes, from {len(data)}")
        return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}


def _array(data: bytes) -> NDArray[Any]:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format version {version} is not known")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects, and nothing is unpickled here")
    announced = dtype.itemsize * math.prod(shape)
    if announced != len(data) - stream.tell():
        raise ValueError(f"it announces {announced} bytes and holds {len(data) - stream.tell()}")
    return np.asarray(np.load(io.BytesIO(data), allow_pickle=False))


def read_json(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """Return the content of a plain JSON file.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(read_text(path, max_bytes))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def hdf5_values(dataset: Any, path: Path, taken: int = 0) -> NDArray[Any]:
    """Return the values of a data set of an HDF5 file, whose size is checked before memory is taken.

    Args:
        dataset: of h5py.
        path: file that it is in.
        taken: bytes that were read from the file before.

    Raises:
        ValueError: it is larger than what the file can hold, lies in another file, or is no array of numbers.
    """
    limit = FREE_BYTES + MAX_RATIO * path.stat().st_size
    if getattr(dataset, "dtype", None) is None or dataset.dtype.kind not in "fiu" or dataset.external:
        raise ValueError(f"'{dataset.name}' is no array of numbers in this file")
    if taken + dataset.size * dataset.dtype.itemsize > limit:
        raise ValueError(f"'{dataset.name}' unpacks to more than {limit} bytes")
    return np.asarray(dataset[()])


def check_tensor_list(start: bytes) -> None:
    """Have the list of tensors at the start of a safetensors file, whose first 8 bytes are its length, be short.

    Raises:
        ValueError: it is longer than that of any network; reading it takes a hundred times as much memory.
    """
    if len(start) < 8 or int.from_bytes(start[:8], "little") > MAX_TENSOR_LIST_BYTES:
        raise ValueError("the list of its tensors is longer than that of any network")


def check_tensor_file(path: Path) -> None:
    """Have a safetensors file be a plain one, with a list of tensors that can be read.

    Raises:
        OSError: it is missing, or a folder, pipe or device.
        ValueError: see :func:`check_tensor_list`.
    """
    with open_plain(path) as stream:
        check_tensor_list(stream.read(8))
