# SPDX-License-Identifier: Apache-2.0
"""Packed maps: a ZIP archive with exactly the files of a map's or a place's folder.

Archives are not trusted. Only the names of a map's files are accepted, or of the submaps listed in a place's
description;
sizes are counted while reading; and the result is verified before it appears.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from kfloc_ros.errors import MapError
from kfloc_ros.files import FREE_BYTES, MAX_RATIO
from kfloc_ros.maps.files import MAX_FILE_BYTES, MAX_REFERENCES_BYTES, appearing, appearing_file
from kfloc_ros.maps.format import (
    DESCRIPTION,
    HEAD_FILE,
    INDEX_FILE,
    KFNET_FILE,
    MAX_DESCRIPTION_BYTES,
    PLACE_FORMAT,
    REFERENCES_FILE,
    SUBMAPS,
    read_description,
)
from kfloc_ros.maps.place import AnyMap, load_map, submaps_of, verify_place
from kfloc_ros.maps.scene_map import SceneMap

LIMITS = {DESCRIPTION: MAX_DESCRIPTION_BYTES, HEAD_FILE: MAX_FILE_BYTES, REFERENCES_FILE: MAX_REFERENCES_BYTES}
"""Files of a map, with the size limit of each."""
MAX_UNPACKED_BYTES = 8_000_000_000
CHUNK_BYTES = 1 << 20


def pack_map(folder: Path, archive: Path, *, overwrite: bool = False) -> Path:
    """Pack the folder of a map or of a place into one file, atomically.

    Raises:
        MapError: the folder is not an intact map or place, it is too large, or the file exists or cannot be written.
    """
    limits = _check(folder)
    size = sum((folder / item).stat().st_size for item in limits)
    if size > MAX_UNPACKED_BYTES:
        raise MapError(
            f"'{folder}' has {size / 1e9:.1f} GB, more than the limit of {MAX_UNPACKED_BYTES / 1e9:.0f} GB for a "
            "packed file; copy the folder instead."
        )
    if archive.exists() and not overwrite:
        raise MapError(f"'{archive}' exists; pass --force to replace it or give another file.")
    try:
        with appearing_file(archive) as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
            for item in limits:
                packed.write(folder / item, item)
    except OSError as error:
        raise MapError(f"'{archive}' cannot be written: {error}.") from error
    return archive


def unpack_map(archive: Path, folder: Path, *, max_bytes: int = MAX_UNPACKED_BYTES) -> AnyMap:
    """Unpack a packed map or place into a new folder, atomically.

    Args:
        archive: packed map.
        folder: folder to create.
        max_bytes: limit on the total size of the unpacked files.

    Raises:
        MapError: the folder exists, or the file is missing, damaged, too large, or contains anything but a map.
    """
    if folder.exists() or folder.is_symlink():
        raise MapError(f"'{folder}' exists; give another folder.")
    temporary: Path | None = None
    try:
        with appearing(folder.absolute()) as temporary, zipfile.ZipFile(archive) as packed:
            max_bytes = min(max_bytes, FREE_BYTES + MAX_RATIO * archive.stat().st_size)
            for item, limit in _listed(packed, temporary).items():
                (temporary / item).parent.mkdir(parents=True, exist_ok=True)
                max_bytes -= _extract(packed, item, temporary / item, min(limit, max_bytes))
            _check(temporary)
    except MapError as error:
        raise MapError(
            f"'{archive}' does not contain an intact map: {error}".replace(str(temporary), str(folder))
        ) from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise MapError(f"'{archive}' cannot be unpacked: {error}.") from error
    return load_map(folder)


def _check(folder: Path) -> dict[str, int]:
    """Verify a map or place; return its files by relative name, with the size limit of each.

    Raises:
        MapError: it is not intact.
    """
    limits = _limits(folder)
    if limits == LIMITS:
        SceneMap.load(folder)
    elif problems := verify_place(folder):
        raise MapError(problems[0])
    return _with_networks(limits, lambda item: (folder / item).is_file())


def _limits(folder: Path) -> dict[str, int]:
    """Return the files of the map or place described in a folder, the description first."""
    description = read_description(folder)
    if description["format"] != PLACE_FORMAT:
        return LIMITS
    limits = {DESCRIPTION: MAX_DESCRIPTION_BYTES, INDEX_FILE: MAX_FILE_BYTES}
    for submap in submaps_of(folder, description):
        limits |= {f"{SUBMAPS}/{submap.name}/{item}": limit for item, limit in LIMITS.items()}
    return limits


def _with_networks(limits: Mapping[str, int], is_there: Callable[[str], bool]) -> dict[str, int]:
    """Return the same files with the networks that a map can contain in addition to its head, if they exist."""
    possible = [item.removesuffix(HEAD_FILE) + KFNET_FILE for item in limits if item.endswith(HEAD_FILE)]
    return {**limits, **{item: MAX_FILE_BYTES for item in possible if is_there(item)}}


def _listed(packed: zipfile.ZipFile, folder: Path) -> dict[str, int]:
    """Return the files to unpack, with the size limit of each; leaves nothing in the folder.

    Raises:
        MapError: the archive contains anything but the files of a map or a place, or in another layout.
    """
    names = sorted(item.filename for item in packed.infolist())
    if any(item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for item in packed.infolist()):
        raise MapError("its files use a compression that packed maps do not.")
    limits = LIMITS
    if INDEX_FILE in names and names.count(DESCRIPTION) == 1:
        _extract(packed, DESCRIPTION, folder / DESCRIPTION, MAX_DESCRIPTION_BYTES)
        limits = _limits(folder)
        (folder / DESCRIPTION).unlink()
    limits = _with_networks(limits, lambda item: item in names)
    if names != sorted(limits):
        shown = ", ".join(repr(name[:60]) for name in names if name not in limits)[:400] or f"{len(names)} files"
        raise MapError(f"it must contain {', '.join(sorted(limits)[:5])} and nothing else, but contains {shown}.")
    return limits


def _extract(packed: zipfile.ZipFile, name: str, path: Path, limit: int) -> int:
    """Extract one member as a regular file and return its size, as counted."""
    written = 0
    with packed.open(name) as source, path.open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > limit:
                raise MapError(f"{name} is larger than the limit of {limit} bytes.")
            target.write(chunk)
    return written
