# SPDX-License-Identifier: Apache-2.0
"""Format of ``map.yaml``, the description of a map or a place: reading, checks and writing. Nothing is executed.

``docs/reference/map-format.md`` and ``docs/places.md`` are the specification.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import SIZE_MULTIPLE
from kfloc_ros.files import SafeLoader, read_text
from kfloc_ros.geometry.camera import Camera

FORMAT = "kfloc_map"
FORMAT_VERSION = 4
"""Versions 1 to 3 were never released and are refused."""
PLACE_FORMAT = "kfloc_place"
PLACE_VERSION = 1
VERSIONS = {FORMAT: FORMAT_VERSION, PLACE_FORMAT: PLACE_VERSION}
"""Formats of a ``map.yaml`` (map, or place, see ``place.py``), with the version that can be read."""
MAX_VERSION = 1_000_000
DESCRIPTION = "map.yaml"
HEAD_FILE = "scoordnet.safetensors"
REFERENCES_FILE = "references.safetensors"
KFNET_FILE = "kfnet.safetensors"
"""File of KFNet's networks, only in maps of the reference family."""
FAST, REFERENCE = "fast", "reference"
"""Families of a map, by the networks that compute the coarse pose."""
INDEX_FILE = "index.safetensors"
SUBMAPS = "submaps"
"""Folder in a place that contains its submaps, each under its name."""
MAX_DESCRIPTION_BYTES = 1_000_000
MAX_DESCRIPTION_DEPTH = 16
MAX_DESCRIPTION_EVENTS = 250_000
MAX_SCALAR_CHARACTERS = 10_000
MAX_CAMERA_SIDE_PX = 4096
MAX_CAMERA_PIXELS = 2_100_000
"""Limit on the pixels of a map's camera: a larger image takes the networks more than a gigabyte. Maps are built with at
most
640 pixels a side.
"""

DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    RuntimeError,
    SafetensorError,
)
"""Exceptions that reading a damaged map can raise, whatever the file contents."""


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write ``map.yaml`` and flush it to disk.

    Raises:
        OSError: it cannot be written.
    """
    with (folder / DESCRIPTION).open("w") as stream:
        yaml.safe_dump(dict(description), stream, sort_keys=False)
        stream.flush()
        os.fsync(stream.fileno())


def read_description(folder: Path, *formats: str) -> dict[str, Any]:
    """Return the checked content of ``map.yaml``.

    Args:
        folder: folder of the map.
        formats: accepted formats of :data:`VERSIONS`; by default all.

    Raises:
        MapError: the folder does not exist, is not a map, cannot be read, or has another format version.
    """
    path = folder / DESCRIPTION
    try:
        if not folder.is_dir():
            beside = [path.parent.name for path in folder.absolute().parent.glob(f"*/{DESCRIPTION}")]
            near = difflib.get_close_matches(folder.name, beside, n=1)
            if near:
                raise MapError(f"There is no map folder '{folder}'. Did you mean '{folder.parent / near[0]}'?")
            way_out = f"Build one with `kfloc map build SOURCE --out {folder}`."
            raise MapError(f"There is no map folder '{folder}'. {way_out}")
        if not path.is_file():
            way_out = f"If it is a recording, `kfloc map build {folder} --out MAP` makes a map of it."
            raise MapError(f"'{folder}' is not a map: it has no {DESCRIPTION}. {way_out}")
        if path.is_symlink():
            raise MapError(f"'{path}' is a link to another file; a map must contain its files. Copy the file there.")
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise MapError(f"'{path}' is larger than any map description; it is damaged.")
        text = read_text(path, MAX_DESCRIPTION_BYTES)
        _check_structure(path, text)
        description = yaml.load(text, Loader=SafeLoader)
    except (OSError, yaml.YAMLError, ValueError, ArithmeticError, RecursionError) as error:
        raise MapError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise MapError(f"'{path}' does not describe a map of this package.")
    known = description.get("format")
    if not isinstance(known, str) or known not in VERSIONS:
        raise MapError(f"'{path}' does not describe a map of this package.")
    if formats and known not in formats:
        if known == PLACE_FORMAT:
            raise MapError(
                f"'{folder}' is a place of several maps, but one map is required: give one of its submaps, the "
                f"folders in '{folder / SUBMAPS}'. `kfloc map info {folder}` lists them."
            )
        raise MapError(f"'{folder}' is a single map, but a place is required: see `kfloc map place --help`.")
    version = description.get("version")
    if type(version) is not int or not 1 <= version < MAX_VERSION:
        raise MapError(f"'{path}' has no valid format version.")
    if version != VERSIONS[known]:
        age, remedy = "newer", "Update kfloc_ros, or build the map again."
        if version < VERSIONS[known]:
            age, remedy = "older", f"Build the map again: `kfloc map build SOURCE --out {folder} --force`."
        raise MapError(
            f"The map '{folder}' has format version {version}, {age} than the {VERSIONS[known]} that this installation "
            f"reads. {remedy}"
        )
    return description


def _check_structure(path: Path, text: str) -> None:
    """Refuse YAML that would take too long to read: aliases, deep nesting, and too many entries."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=SafeLoader)):
        if count > MAX_DESCRIPTION_EVENTS or (
            isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR_CHARACTERS
        ):
            raise MapError(f"'{path}' has more entries, or a longer one, than any map description.")
        if isinstance(event, yaml.AliasEvent):
            raise MapError(f"'{path}' has YAML aliases, which map descriptions do not use.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DESCRIPTION_DEPTH:
            raise MapError(f"'{path}' is nested deeper than any map description.")


def read_name(name: object) -> str:
    """Return a name in a description; raise ValueError if it is not a name."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is not a name")
    return name


def read_camera(values: Mapping[str, Any]) -> Camera:
    """Return the camera in a description; an invalid one is refused before memory is allocated for its images.

    Raises:
        ValueError: the camera is not valid for a map.
        FrameError: the values are not those of a camera.
    """
    camera = Camera(**{**values, "distortion": tuple(values.get("distortion", ()))})
    for side in (camera.width, camera.height):
        if type(side) is not int or side > MAX_CAMERA_SIDE_PX or side % SIZE_MULTIPLE:
            raise ValueError(f"its camera has {camera.width}x{camera.height} pixels")
    if camera.width * camera.height > MAX_CAMERA_PIXELS:
        raise ValueError(f"its camera has {camera.width}x{camera.height} pixels, more than {MAX_CAMERA_PIXELS}")
    if not camera.is_pinhole:
        raise ValueError("its camera has a distortion")
    return camera


def maps_search_path() -> list[Path]:
    """Return the folders in which a map is looked up by name."""
    folders = [Path(p) for p in os.environ.get("KFLOC_MAPS", "").split(os.pathsep) if p]
    folders.append(Path.home() / ".ros" / "kfloc_maps")
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix:
            folders.append(Path(prefix) / "share" / "kfloc_ros" / "maps")
    folders.append(Path(__file__).resolve().parents[2] / "maps")
    return folders


def resolve_map(name_or_path: str) -> Path:
    """Return the folder of a map given by path or by name.

    Raises:
        MapError: there is no such map; the message lists the folders searched.
    """
    if not name_or_path:
        raise MapError("No map is given; give a map folder or the name of a map, such as map:=kitchen.")
    try:
        path = Path(name_or_path).expanduser()
        if path.is_dir() or path.is_absolute() or len(path.parts) > 1:
            return path
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a null byte
        raise MapError(f"There is no map '{name_or_path[:200]}': {error}.") from error
    searched = maps_search_path()
    for folder in searched:
        if (folder / name_or_path / DESCRIPTION).is_file():
            return folder / name_or_path
    places = ", ".join(f"'{folder}'" for folder in [Path.cwd(), *searched])
    installed = [path.parent.name for folder in searched if folder.is_dir() for path in folder.glob(f"*/{DESCRIPTION}")]
    near = difflib.get_close_matches(name_or_path, installed, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    raise MapError(f"There is no map '{name_or_path}' in {places}. {hint}Give a folder, or set KFLOC_MAPS.")
