# SPDX-License-Identifier: Apache-2.0
"""Files that others wrote, read and unpacked within limits: plain files only, and sizes are known beforehand.

Files of our own are written whole or not at all.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kfloc_ros.errors import DownloadError, SourceError

MAX_FILE_BYTES = 1_000_000_000
MAX_TEXT_BYTES = 200_000_000
MAX_YAML_BYTES, MAX_YAML_DEPTH = 1_000_000, 40
MAX_FRAMES = 200_000
"""Of one list: two hours at 30 Hz."""
MAX_IMAGE_PIXELS = 64_000_000
"""Of one image; OpenCV is told the same in ``kfloc_ros/__init__.py``, for formats whose headers are not read here."""
MAX_TENSOR_LIST_BYTES = 1_000_000
MAX_RATIO, FREE_BYTES = 50, 20_000_000
"""An archive may unpack to so many times its size, and so much besides; weights and features hardly shrink."""
CHUNK_BYTES = 1 << 18
SPARE_BYTES = 1_000_000_000  # left free on a disk
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OPENCV_HEADER = re.compile(r"\A%YAML:[^\n]*\n(---[^\n]*\n)?")
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
    """Return the content of a plain UTF-8 text file, without the mark that Windows programs put before it.

    Raises:
        OSError: see :func:`read_bytes`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return read_bytes(path, max_bytes).decode("utf-8-sig")


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


def read_yaml(path: Path) -> Any:
    """Return the content of a plain YAML file; OpenCV's first line and tags, which are no YAML 1.1, are passed over.

    Raises:
        OSError: see :func:`read_bytes`.
        ValueError: it is no YAML, nested too deeply, or has anchors, with which little text becomes very much.
    """
    text, depth = _OPENCV_HEADER.sub("", read_text(path, MAX_YAML_BYTES)).replace("!!opencv-matrix", ""), 0
    try:
        for event in yaml.parse(text, Loader=SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError("it is nested too deeply, or has anchors")
        return yaml.load(text, Loader=SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error


def check_tensor_list(file: Path | bytes) -> None:
    """Have the list of tensors of a safetensors file, or of the content of one, be short.

    Raises:
        OSError: the file is missing, or a folder, pipe or device.
        ValueError: it is longer than that of any network; reading it takes a hundred times as much memory.
    """
    with io.BytesIO(file) if isinstance(file, bytes) else open_plain(file) as stream:
        start = stream.read(8)  # the length of the list
    if len(start) < 8 or int.from_bytes(start, "little") > MAX_TENSOR_LIST_BYTES:
        raise ValueError("the list of its tensors is longer than that of any network")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``. The file written there replaces it if the block succeeds, and else is removed."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all.

    Raises:
        OSError: the disk is full or not writable, for which the library has an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # loads torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, metadata)
        except SafetensorError as error:
            found = re.search(r"(?:os error|code:) (\d+)", str(error))
            code = int(found[1]) if found else errno.EIO
            raise OSError(code, os.strerror(code), str(path)) from error
        partial.chmod(0o644)  # the library makes it private


def check_space(folder: Path, needed_bytes: int) -> None:
    """Have a disk hold so many bytes more.

    Raises:
        DownloadError: it does not.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_BYTES > free:
        raise DownloadError(
            f"'{folder}' has {free / 1e9:.1f} GB free; {needed_bytes / 1e9:.1f} GB are needed, and 1 GB is left free."
        )


def unpack(archive: Path, folder: Path) -> list[str]:
    """Unpack a ZIP or TAR archive into a folder; return the names of its files.

    All names are checked first. The files are written beside the folder's content and then moved in, so that a file
    that can be seen is complete.

    Raises:
        DownloadError: the archive is damaged, leads out of the folder, has links or devices, or unpacks to too much.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking.", dir=folder))
    try:
        is_zip = archive.name.endswith(".zip")
        names = _unpack_zip(archive, temporary) if is_zip else _unpack_tar(archive, temporary)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
        return names
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise DownloadError(f"'{archive}' is damaged, or no archive known here: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack_zip(archive: Path, temporary: Path) -> list[str]:
    with zipfile.ZipFile(archive) as packed:
        members = [item for item in packed.infolist() if not item.is_dir()]
        for item in members:
            if stat.S_IFMT(item.external_attr >> 16) not in (0, stat.S_IFREG):
                raise DownloadError(f"'{archive}' has '{item.filename}', which is a link or a device; not unpacked.")
        # Explorer leaves Thumbs.db, which has made extraction fail.
        members = [item for item in members if PurePosixPath(item.filename).name != "Thumbs.db"]
        return _write(archive, temporary, [(m.filename, m.file_size) for m in members], map(packed.open, members))


def _unpack_tar(archive: Path, temporary: Path) -> list[str]:
    with tarfile.open(archive) as packed:
        members = [item for item in packed.getmembers() if not item.isdir()]
        for item in members:
            if not item.isreg():
                raise DownloadError(f"'{archive}' has '{item.name}', which is a link or a device; not unpacked.")
        return _write(archive, temporary, [(m.name, m.size) for m in members], map(packed.extractfile, members))


def _checked(archive: Path, name: str) -> str:
    """Return the name of a member, without steps that change nothing.

    Raises:
        DownloadError: it leads out of the folder.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or ":" in parts[0]:
        raise DownloadError(f"'{archive}' has the name '{name}', which leads out of its folder; not unpacked.")
    return "/".join(parts)


def _write(
    archive: Path, folder: Path, sizes: list[tuple[str, int]], contents: Iterator[IO[bytes] | None]
) -> list[str]:
    """Write members by name and size, after a check of them all; return their names."""
    names = [_checked(archive, name) for name, _ in sizes]
    total = sum(size for _, size in sizes)
    if total > FREE_BYTES + MAX_RATIO * archive.stat().st_size:
        raise DownloadError(f"'{archive}' would unpack to {total} bytes, which no data set does; not unpacked.")
    check_space(folder, total)
    for name, (_, size), source in zip(names, sizes, contents, strict=True):
        assert source is not None, "a regular member has content"
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, open(target, "wb") as stream:
            shutil.copyfileobj(source, stream, CHUNK_BYTES)
        if target.stat().st_size != size:
            raise zipfile.BadZipFile(f"'{target.name}' has another size than announced")
    return names
