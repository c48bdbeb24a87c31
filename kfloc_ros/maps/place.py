# SPDX-License-Identifier: Apache-2.0
"""Place: several maps (submaps) in one frame, with an index of their views. Nothing in it is executed.

A place is read like a map folder: the ``format`` in its ``map.yaml`` identifies it. The submaps are map folders inside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kfloc_ros.errors import FrameError, MapError
from kfloc_ros.features.backbone import COARSE_CHANNELS, FINE_CHANNELS
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.maps.files import file_checksum, read_file, read_tensors, read_whole
from kfloc_ros.maps.format import (
    DAMAGE,
    DESCRIPTION,
    INDEX_FILE,
    MAX_DESCRIPTION_BYTES,
    PLACE_FORMAT,
    SUBMAPS,
    read_camera,
    read_description,
    read_name,
)
from kfloc_ros.maps.place_index import PlaceIndex, are_rigid
from kfloc_ros.maps.scene_map import Box, SceneMap, in_frame
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

MAX_SUBMAPS = 10_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True, eq=False)
class Submap:
    """Entry of a submap in a place's description."""

    name: str
    T_place_submap: Matrix
    bounds_m: Box
    """Smallest and largest corner of the box around its points, in the place's frame."""
    description: Mapping[str, Any]
    """Size and checksum of its ``map.yaml``, which detect that the submap was replaced by another map."""


@dataclass(frozen=True, eq=False)
class Place:
    """Several submaps in one frame, loaded on demand."""

    name: str
    frame_id: str
    camera: Camera
    """Pinhole camera of all submaps."""
    submaps: tuple[Submap, ...]
    index: PlaceIndex
    provenance: Mapping[str, Any]
    path: Path

    @cached_property
    def bounds_m(self) -> Box:
        """Box around all submaps."""
        low = np.min([s.bounds_m[0] for s in self.submaps], axis=0).tolist()
        high = np.max([s.bounds_m[1] for s in self.submaps], axis=0).tolist()
        return (low[0], low[1], low[2]), (high[0], high[1], high[2])

    @cached_property
    def references(self) -> ReferenceViews:
        """All views with a few points each, without features, for display."""
        points, poses = self.index.points, self.index.T_place_camera
        nothing = torch.zeros(1, max(COARSE_CHANNELS, FINE_CHANNELS)).expand(points.shape[1], -1)
        coarse, fine = nothing[:, :COARSE_CHANNELS], nothing[:, :FINE_CHANNELS]
        views = tuple(ReferencePoints(item, coarse, fine, nothing[:, 0]) for item in points)
        return ReferenceViews(tuple(range(len(points))), poses, views)

    def folder(self, submap: int) -> Path:
        """Return the folder of a submap.

        Raises:
            MapError: the folder is a link.
        """
        folder = self.path / SUBMAPS / self.submaps[submap].name
        for path in (folder.parent, folder):
            if path.is_symlink():
                raise MapError(f"'{path}' is a link; a place must contain its submaps. Copy them there.")
        return folder

    def number_of(self, name: str) -> int:
        """Return the number of the submap with a name.

        Raises:
            MapError: there is no such submap.
        """
        names = [submap.name for submap in self.submaps]
        if name not in names:
            raise MapError(f"The place '{self.path}' has no submap '{name}'; its submaps are: {listed(names)}.")
        return names.index(name)

    def check_description(self, submap: int, folder: Path) -> None:
        """Check that the map in a folder is the one that the place was made from.

        Raises:
            MapError: it is another map.
            OSError: its description cannot be read.
        """
        if file_checksum(description_bytes(folder)) != self.submaps[submap].description:
            name = self.submaps[submap].name
            raise MapError(
                f"The submap '{name}' of '{self.path}' is not the map that the place was made from. {_AGAIN}"
            )

    def load_submap(self, submap: int) -> SceneMap:
        """Return a submap in the place's frame, by its number.

        Raises:
            MapError: it is missing, damaged, or not the map that the place was made from.
        """
        folder = self.folder(submap)
        try:
            scene_map = in_frame(SceneMap.load(folder), self.submaps[submap].T_place_submap, self.frame_id)
            self.check_description(submap, folder)
        except OSError as error:
            raise MapError(f"The submap '{folder}' cannot be read: {error}.") from error
        if scene_map.camera != self.camera or len(scene_map.references.ids) != self.index.view_count(submap):
            raise MapError(f"The submap '{folder}' does not match the place's index. {_AGAIN}")
        return scene_map

    @classmethod
    def load(cls, folder: Path | str) -> Place:
        """Read a place's description and index, not its submaps; a place replaced meanwhile is read again.

        Raises:
            MapError: missing, damaged, or of another format version; the message names the fault and the remedy.
        """
        return read_whole(Path(folder), cls._read)

    @classmethod
    def _read(cls, folder: Path) -> Place:
        description = read_description(folder, PLACE_FORMAT)
        submaps = submaps_of(folder, description)
        try:
            tensors = read_tensors(read_file(folder, INDEX_FILE, description))
            return cls(
                name=read_name(description["name"]),
                frame_id=read_name(description["frame_id"]),
                camera=read_camera(description["camera"]),
                submaps=submaps,
                index=PlaceIndex.from_tensors(tensors, len(submaps)),
                provenance=dict(description.get("provenance", {})),
                path=folder,
            )
        except (*DAMAGE, FrameError) as error:
            raise MapError(f"The place '{folder}' is damaged: {error}. {_AGAIN}") from error
        except OSError as error:
            raise MapError(f"The place '{folder}' cannot be read: {error}.") from error

    def size_bytes(self) -> int:
        """Return the size of the folder on disk, including submaps, in bytes."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file() and not path.is_symlink())


AnyMap = SceneMap | Place
_AGAIN = "Make the place again with `kfloc map place`."


def verify_place(folder: Path) -> list[str]:
    """Return the faults of a place and its submaps, one sentence each; empty if it is intact."""
    try:
        place = Place.load(folder)
    except MapError as error:
        return [str(error)]
    problems = []
    for submap, entry in enumerate(place.submaps):
        try:
            poses = place.load_submap(submap).references.T_map_camera
        except MapError as error:
            problems.append(str(error))
            continue
        indexed = place.index.T_place_camera[place.index.submap == submap]
        if not np.allclose(indexed, poses, atol=1e-6):
            problems.append(f"The place's index has other poses of views than the submap '{entry.name}'. {_AGAIN}")
    return problems


def is_place(folder: Path) -> bool:
    """Return True if a folder's description is that of a place; other faults are left to the reader."""
    try:
        return bool(read_description(folder)["format"] == PLACE_FORMAT)
    except MapError:
        return False


def load_map(folder: Path) -> AnyMap:
    """Load a map or a place.

    Raises:
        MapError: it is neither, or damaged.
    """
    return Place.load(folder) if is_place(folder) else SceneMap.load(folder)


def each_map(known: AnyMap) -> Iterator[tuple[str, SceneMap]]:
    """Yield a map, without a name, or a place's submaps one by one, with their names, in the place's frame.

    Raises:
        MapError: a submap cannot be read.
    """
    if isinstance(known, SceneMap):
        yield "", known
    else:
        yield from ((submap.name, known.load_submap(number)) for number, submap in enumerate(known.submaps))


def single_map(known: AnyMap) -> SceneMap:
    """Return the map itself, for callers that accept only a single map.

    Raises:
        MapError: it is a place.
    """
    if isinstance(known, Place):
        raise MapError(
            f"'{known.name}' is a place of several maps, which only the node `localizer` accepts; filter_node and "
            "refiner_node need a single map."
        )
    return known


def submaps_of(folder: Path, description: Mapping[str, Any]) -> tuple[Submap, ...]:
    """Return the submaps in a place's description.

    Raises:
        MapError: an entry is invalid.
    """
    try:
        return _read_submaps(description["submaps"])
    except DAMAGE as error:
        raise MapError(f"The place '{folder}' is damaged: {error}. {_AGAIN}") from error


def _read_submaps(listed: object) -> tuple[Submap, ...]:
    """Return the submaps in a list of entries. Raises ValueError, KeyError or TypeError if it is invalid."""
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_SUBMAPS:
        raise ValueError("it lists no submaps")
    submaps = []
    for item in listed:
        name, T = item["name"], np.array(item["T_place_submap"], dtype=np.float64)
        if not isinstance(name, str) or not is_submap_name(name):
            raise ValueError(f"{name!r} is not a valid name of a submap")
        if T.shape != (4, 4) or not are_rigid(T[None]):
            raise ValueError(f"the pose of the submap '{name}' is not a rigid motion")
        low, high = (tuple(float(v) for v in corner) for corner in item["bounds_m"])
        if len(low) != 3 or len(high) != 3 or not np.isfinite([low, high]).all():
            raise ValueError(f"the bounds of the submap '{name}' are not a box")
        submaps.append(Submap(name, T, (low, high), dict(item["description"])))
    if len({submap.name.lower() for submap in submaps}) < len(submaps):
        raise ValueError("two submaps have the same name")
    return tuple(submaps)


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names for a sentence; of many, only some."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def description_bytes(folder: Path) -> bytes:
    with (folder / DESCRIPTION).open("rb") as stream:
        return stream.read(MAX_DESCRIPTION_BYTES + 1)


def is_submap_name(name: str) -> bool:
    """Return True if the name is valid for a submap; names are those of folders, and cannot point outside."""
    return _NAME.fullmatch(name) is not None


class MapInfo(Protocol):
    """Properties that maps and places share."""

    @property
    def name(self) -> str:
        """Name for display."""
        ...

    @property
    def frame_id(self) -> str:
        """TF frame of all poses."""
        ...

    @property
    def camera(self) -> Camera:
        """Pinhole camera to which images are adapted."""
        ...

    @property
    def references(self) -> ReferenceViews:
        """Views with points; of a place a few points each, without features."""
        ...

    @property
    def path(self) -> Path | None:
        """Folder, or None if it was never saved."""
        ...
