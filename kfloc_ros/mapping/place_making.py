# SPDX-License-Identifier: Apache-2.0
"""Making a place of maps: copies them, indexes them, and describes them; it appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import save_file

from kfloc_ros import __version__
from kfloc_ros.errors import MapError
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.mapping.map_files import file_checksum
from kfloc_ros.mapping.place import INDEX_FILE, MAX_SUBMAPS, SUBMAPS, Place, description_bytes, in_frame, is_submap_name
from kfloc_ros.mapping.place_index import are_rigid, make_index
from kfloc_ros.mapping.scene_map import (
    DESCRIPTION,
    FORMAT,
    HEAD_FILE,
    MAX_DESCRIPTION_BYTES,
    PLACE_FORMAT,
    PLACE_VERSION,
    REFERENCES_FILE,
    SceneMap,
    read_description,
    swap_in,
)


def make_place(
    folders: Sequence[Path],
    out: Path,
    *,
    name: str = "",
    T_place_submaps: Mapping[str, Matrix] | None = None,
    overwrite: bool = False,
) -> Place:
    """Make a place of maps, which are copied into it; it appears whole or not at all.

    Args:
        folders: the maps. A submap is called as its folder.
        out: the folder to write.
        name: of the place; that of the folder by default.
        T_place_submaps: by name, where a submap's frame lies in the place's, (4, 4); the others have that frame.
        overwrite: replace a place that is there.

    Raises:
        MapError: a map is damaged, two have one name, their cameras differ, or the folder cannot be written.
    """
    out, motions = out.absolute(), dict(T_place_submaps or {})
    names = _names_of(folders)
    for unknown in motions.keys() - set(names):
        raise MapError(f"There is no submap '{unknown}' to be placed; there are: {', '.join(names)}.")
    if not are_rigid(np.stack([*motions.values(), np.eye(4)])):
        raise MapError("The frames of submaps must be placed by rigid motions.")
    check_free_for_place(out, overwrite=overwrite)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        for submap, folder in zip(names, folders, strict=True):
            _copy(folder, temporary / SUBMAPS / submap)
        _describe(temporary, name or out.name, [(submap, motions.get(submap, np.eye(4))) for submap in names])
        temporary.chmod(0o755)
        swap_in(temporary, out)
    except OSError as error:
        raise MapError(f"The place cannot be written to '{out}': {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return Place.load(out)


def check_free_for_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that may not be written.

    Raises:
        MapError: it exists and is not to be replaced, or is neither a place nor a map.
    """
    if out.exists() and not (overwrite and (out / DESCRIPTION).is_file()):
        raise MapError(f"'{out}' exists; pass --force to replace a place, or name another folder.")


def _describe(folder: Path, name: str, motions: Sequence[tuple[str, Matrix]]) -> None:
    """Write the index and the description of a place whose submaps are there."""
    first = SceneMap.load(folder / SUBMAPS / motions[0][0])
    submaps: list[dict[str, Any]] = []

    def load(number: int) -> SceneMap:
        submap, T = motions[number]
        return in_frame(SceneMap.load(folder / SUBMAPS / submap), T, first.frame_id)

    for number, (submap, T) in enumerate(motions):
        scene_map = load(number)
        if scene_map.camera != first.camera:
            raise MapError(
                f"The maps '{motions[0][0]}' and '{submap}' are for different cameras, and a place has one. Build them "
                "from images of one camera."
            )
        submaps.append({
            "name": submap,
            "T_place_submap": np.asarray(T, float).tolist(),
            "bounds_m": [list(corner) for corner in scene_map.bounds_m],
            "description": file_checksum(description_bytes(folder / SUBMAPS / submap)),
        })  # fmt: skip
    index = make_index(lambda number: load(number).references, len(motions))
    save_file(index.tensors(), folder / INDEX_FILE)
    (folder / INDEX_FILE).chmod(0o644)  # safetensors makes it private
    description = {
        "format": PLACE_FORMAT,
        "version": PLACE_VERSION,
        "name": name,
        "frame_id": first.frame_id,
        "units": {"length": "metre", "angle": "radian"},
        "camera": {**asdict(first.camera), "distortion": list(first.camera.distortion)},
        "submaps": submaps,
        "provenance": {"kfloc_ros": __version__, "references": len(index.submap)},
        "files": {INDEX_FILE: file_checksum((folder / INDEX_FILE).read_bytes())},
    }
    with (folder / DESCRIPTION).open("w") as stream:
        yaml.safe_dump(description, stream, sort_keys=False)
        stream.flush()
        os.fsync(stream.fileno())
    if (folder / DESCRIPTION).stat().st_size > MAX_DESCRIPTION_BYTES:
        raise MapError(f"{len(motions)} submaps are more than a place can describe; merge some of them.")


def _names_of(folders: Sequence[Path]) -> list[str]:
    names = [folder.absolute().name for folder in folders]
    if not names:
        raise MapError("A place needs at least one map.")
    if len(names) > MAX_SUBMAPS:
        raise MapError(f"A place has at most {MAX_SUBMAPS} submaps, got {len(names)}.")
    for name in names:
        if not is_submap_name(name):
            raise MapError(
                f"'{name}' cannot be a submap's name: up to 64 letters, digits, '_' and '-'. Rename the map's folder."
            )
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise MapError(f"Two of the maps are called '{name}', as their folders are. Rename one of them.")
    return names


def _copy(folder: Path, to: Path) -> None:
    """The files of a map and nothing else; they are checked when the copy is read."""
    read_description(folder, FORMAT)
    to.mkdir(parents=True)
    for name in (DESCRIPTION, HEAD_FILE, REFERENCES_FILE):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise MapError(f"The map '{folder}' is incomplete: {name} is missing, or a link. Build it again.")
        shutil.copyfile(folder / name, to / name)
