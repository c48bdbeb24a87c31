# SPDX-License-Identifier: Apache-2.0
"""Archives that others made, unpacked only below their folder, and never half."""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from kfloc_ros.errors import DownloadError
from kfloc_ros.files import FREE_BYTES, MAX_RATIO

CHUNK_BYTES = 1 << 18
SPARE_BYTES = 1_000_000_000
"""Space left free on the disk."""


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


def is_archive(path: Path) -> bool:
    """Return True if the name is that of an archive."""
    return path.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))


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
        names = [_checked(archive, item.filename) for item in members]
        _check_unpacked(archive, sum(item.file_size for item in members), temporary)
        for item, name in zip(members, names, strict=True):
            with packed.open(item) as source:
                _write(source, temporary / name, item.file_size)
    return names


def _unpack_tar(archive: Path, temporary: Path) -> list[str]:
    with tarfile.open(archive) as packed:
        members = [item for item in packed.getmembers() if not item.isdir()]
        for item in members:
            if not item.isreg():
                raise DownloadError(f"'{archive}' has '{item.name}', which is a link or a device; not unpacked.")
        names = [_checked(archive, item.name) for item in members]
        _check_unpacked(archive, sum(item.size for item in members), temporary)
        for item, name in zip(members, names, strict=True):
            source = packed.extractfile(item)
            assert source is not None, "a regular member has content"
            with source:
                _write(source, temporary / name, item.size)
    return names


def _checked(archive: Path, name: str) -> str:
    """Return the name of a member, without steps that change nothing.

    Raises:
        DownloadError: it leads out of the folder.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or ":" in parts[0]:
        raise DownloadError(f"'{archive}' has the name '{name}', which leads out of its folder; not unpacked.")
    return "/".join(parts)


def _check_unpacked(archive: Path, size_bytes: int, folder: Path) -> None:
    if size_bytes > FREE_BYTES + MAX_RATIO * archive.stat().st_size:
        raise DownloadError(f"'{archive}' would unpack to {size_bytes} bytes, which no data set does; not unpacked.")
    check_space(folder, size_bytes)


def _write(source: IO[bytes], target: Path, size_bytes: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as stream:
        shutil.copyfileobj(source, stream, CHUNK_BYTES)
    if target.stat().st_size != size_bytes:
        raise zipfile.BadZipFile(f"'{target.name}' has another size than announced")
