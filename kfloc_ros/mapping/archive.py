# SPDX-License-Identifier: Apache-2.0
"""A map as one file: a ZIP archive that holds the files of the map folder and nothing else.

Reading trusts nothing that the archive says: only the names of a map's files are accepted, sizes are counted while
reading, and the result is checked as a map before it appears.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path

from kfloc_ros.errors import MapError
from kfloc_ros.mapping.map_files import MAX_FILE_BYTES
from kfloc_ros.mapping.scene_map import DESCRIPTION, HEAD_FILE, MAX_DESCRIPTION_BYTES, REFERENCES_FILE, SceneMap

ENDING = ".kfmap"
LIMITS = {DESCRIPTION: MAX_DESCRIPTION_BYTES, HEAD_FILE: MAX_FILE_BYTES, REFERENCES_FILE: MAX_FILE_BYTES}
CHUNK_BYTES = 1 << 20


def pack_map(folder: Path, archive: Path, *, overwrite: bool = False) -> Path:
    """Write a map folder into one file; it appears whole or not at all.

    Raises:
        MapError: the folder is no whole map, or the file exists or cannot be written.
    """
    SceneMap.load(folder)
    if archive.exists() and not overwrite:
        raise MapError(f"'{archive}' exists; pass --force to replace it or name another file.")
    partial: Path | None = None
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{archive.name}.", dir=archive.parent)
        partial = Path(name)
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
            for item in LIMITS:
                packed.write(folder / item, item)
        partial.chmod(0o644)
        os.replace(partial, archive)
    except OSError as error:
        raise MapError(f"'{archive}' cannot be written: {error}.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return archive


def unpack_map(archive: Path, folder: Path, *, max_bytes: int = 2 * MAX_FILE_BYTES) -> SceneMap:
    """Read a packed map into a new folder; it appears whole or not at all.

    Args:
        archive: the packed map.
        folder: to create.
        max_bytes: the most that the unpacked files may take together.

    Raises:
        MapError: the folder exists, or the file is missing, damaged, too large, or holds anything but a map.
    """
    if folder.exists() or folder.is_symlink():
        raise MapError(f"'{folder}' exists; name another folder.")
    temporary: Path | None = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        with zipfile.ZipFile(archive) as packed:
            _check_names(archive, packed)
            for item, limit in LIMITS.items():
                max_bytes -= _extract(packed, item, temporary / item, min(limit, max_bytes))
        SceneMap.load(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except MapError as error:
        raise MapError(
            f"'{archive}' does not hold a whole map: {error}".replace(str(temporary), str(folder))
        ) from error
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, NotImplementedError) as error:
        raise MapError(f"'{archive}' cannot be unpacked: {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return SceneMap.load(folder)


def _check_names(archive: Path, packed: zipfile.ZipFile) -> None:
    names = sorted(item.filename for item in packed.infolist())
    if names != sorted(LIMITS):
        shown = ", ".join(repr(name[:60]) for name in names[:5])
        raise MapError(f"it must hold {', '.join(sorted(LIMITS))} and nothing else, but holds {shown or 'nothing'}.")
    if any(item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for item in packed.infolist()):
        raise MapError("its files are compressed in a way that packed maps are not.")


def _extract(packed: zipfile.ZipFile, name: str, path: Path, limit: int) -> int:
    """Write one member as a plain file and return its size, counted and not believed."""
    written = 0
    with packed.open(name) as source, path.open("xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            written += len(chunk)
            if written > limit:
                raise MapError(f"{name} is larger than the {limit} bytes allowed.")
            target.write(chunk)
    return written
