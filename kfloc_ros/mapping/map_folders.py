# SPDX-License-Identifier: Apache-2.0
"""Where maps lie: the folder that a path or a name means."""

from __future__ import annotations

import os
from pathlib import Path

from kfloc_ros.errors import MapError
from kfloc_ros.mapping.map_format import DESCRIPTION


def maps_search_path() -> list[Path]:
    """Folders in which a map is looked up by name."""
    folders = [Path(p) for p in os.environ.get("KFLOC_MAPS", "").split(os.pathsep) if p]
    folders.append(Path.home() / ".ros" / "kfloc_maps")
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix:
            folders.append(Path(prefix) / "share" / "kfloc_ros" / "maps")
    folders.append(Path(__file__).resolve().parents[2] / "maps")
    return folders


def resolve_map(name_or_path: str) -> Path:
    """Folder of a map given by path or by name.

    Raises:
        MapError: nothing found; the message lists where it was looked for.
    """
    if not name_or_path:
        raise MapError("No map was named; give a map folder or the name of one, such as map:=kitchen.")
    try:
        path = Path(name_or_path).expanduser()
        if path.is_dir() or path.is_absolute() or len(path.parts) > 1:
            return path
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a zero byte
        raise MapError(f"There is no map '{name_or_path[:200]}': {error}.") from error
    searched = maps_search_path()
    for folder in searched:
        if (folder / name_or_path / DESCRIPTION).is_file():
            return folder / name_or_path
    places = ", ".join(f"'{folder}'" for folder in [Path.cwd(), *searched])
    raise MapError(f"There is no map '{name_or_path}' in {places}. Name a folder, or set KFLOC_MAPS.")
