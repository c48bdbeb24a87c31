# SPDX-License-Identifier: Apache-2.0
"""Places: made of copies of maps, extended by a recording, or cropped; they are indexed and written atomically."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros import __version__
from kfloc_ros.errors import MapError
from kfloc_ros.files import save_tensors
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import PlaceLocalizer
from kfloc_ros.mapping.build import MapBuildConfig, Report, check_writable
from kfloc_ros.mapping.merge import NothingInside, crop_map
from kfloc_ros.mapping.update import Updated, update_map
from kfloc_ros.maps.files import appearing, file_checksum
from kfloc_ros.maps.format import (
    DESCRIPTION,
    FORMAT,
    HEAD_FILE,
    INDEX_FILE,
    KFNET_FILE,
    MAX_DESCRIPTION_BYTES,
    PLACE_FORMAT,
    PLACE_VERSION,
    REFERENCE,
    REFERENCES_FILE,
    SUBMAPS,
    read_description,
    write_description,
)
from kfloc_ros.maps.place import MAX_SUBMAPS, Place, description_bytes, is_place, is_submap_name, listed
from kfloc_ros.maps.place_index import are_rigid, make_index
from kfloc_ros.maps.scene_map import SceneMap, in_frame

PROBES = 24
"""Number of frames of a recording that are read to find its submap."""
MIN_PROBES_FOUND = 3


@dataclass(frozen=True, eq=False)
class Part:
    """Submap to be written."""

    name: str
    T_place_submap: Matrix
    write: Callable[[Path], object]
    """Writes the map folder, which does not exist yet."""


def make_place(
    folders: Sequence[Path],
    out: Path,
    *,
    name: str = "",
    T_place_submaps: Mapping[str, Matrix] | None = None,
    overwrite: bool = False,
) -> Place:
    """Make a place from copies of maps; it is written atomically.

    Args:
        folders: the maps. A submap has the name of its folder. Of a place, all submaps are taken at their poses.
        out: folder to write; can be one of the places.
        name: name of the place; by default the name of the folder.
        T_place_submaps: pose (4, 4) of a submap's frame in the place's frame, by name; identity by default.
        overwrite: replace an existing place.

    Raises:
        MapError: a map is damaged, two have one name, their cameras differ, or the folder cannot be written.
    """
    motions = dict(T_place_submaps or {})
    parts = [part for folder in folders for part in _parts_of(folder)]
    names = [part.name for part in parts]
    for unknown in motions.keys() - set(names):
        raise MapError(f"There is no submap '{unknown}' to give a pose for; there are: {', '.join(names)}.")
    if not are_rigid(np.stack([*motions.values(), np.eye(4)])):
        raise MapError("The poses of submaps' frames must be rigid motions.")
    parts = [replace(part, T_place_submap=motions.get(part.name, part.T_place_submap)) for part in parts]
    return write_place(parts, out, name=name, overwrite=overwrite)


def write_place(parts: Sequence[Part], out: Path, *, name: str = "", overwrite: bool = False) -> Place:
    """Write a place of submaps atomically.

    Raises:
        MapError: see :func:`make_place`.
    """
    out = out.absolute()
    _check_names([part.name for part in parts])
    check_free_for_place(out, overwrite=overwrite)
    try:
        with appearing(out, overwrite=overwrite) as temporary:
            (temporary / SUBMAPS).mkdir()
            for part in parts:
                part.write(temporary / SUBMAPS / part.name)
            _describe(temporary, name or out.name, [(part.name, part.T_place_submap) for part in parts])
    except OSError as error:
        raise MapError(f"The place cannot be written to '{out}': {error}.") from error
    return Place.load(out)


def existing_part(place: Place, number: int) -> Part:
    """Return an existing submap of a place, with its pose."""

    def write(to: Path) -> None:
        _copy(place.folder(number), to)
        place.check_description(number, to)

    info = place.submaps[number]
    return Part(info.name, info.T_place_submap, write)


def check_free_for_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that must not be written.

    Raises:
        MapError: the folder exists and ``overwrite`` is false, or it is neither a place nor a map.
    """
    if out.exists() and not (overwrite and (out / DESCRIPTION).is_file()):
        raise MapError(f"'{out}' exists; pass --force to replace a place, or give another folder.")
    check_writable(out)


def _describe(folder: Path, name: str, motions: Sequence[tuple[str, Matrix]]) -> None:
    """Write the index and the description of a place whose submaps are already written."""
    first = SceneMap.load(folder / SUBMAPS / motions[0][0])
    submaps: list[dict[str, Any]] = []

    def load(number: int) -> SceneMap:
        submap, T = motions[number]
        return in_frame(SceneMap.load(folder / SUBMAPS / submap), T, first.frame_id)

    for number, (submap, T) in enumerate(motions):
        scene_map = load(number)
        if scene_map.camera != first.camera:
            raise MapError(
                f"The maps '{motions[0][0]}' and '{submap}' are for different cameras, but a place has one camera. "
                "Build them from images of one camera."
            )
        submaps.append({
            "name": submap,
            "T_place_submap": np.asarray(T, float).tolist(),
            "bounds_m": [list(corner) for corner in scene_map.bounds_m],
            "description": file_checksum(description_bytes(folder / SUBMAPS / submap)),
        })  # fmt: skip
    index = make_index(lambda number: load(number).references, len(motions))
    save_tensors(index.tensors(), folder / INDEX_FILE)
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
    write_description(folder, description)
    if (folder / DESCRIPTION).stat().st_size > MAX_DESCRIPTION_BYTES:
        raise MapError(f"{len(motions)} submaps are more than a place can describe; merge some of them.")


def _parts_of(folder: Path) -> list[Part]:
    """Return the map, or the submaps of the place, in a folder."""
    if not is_place(folder):
        return [Part(folder.absolute().name, np.eye(4), lambda to: _copy(folder, to))]
    place = Place.load(folder)
    return [existing_part(place, number) for number in range(len(place.submaps))]


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise MapError("A place needs at least one map.")
    if len(names) > MAX_SUBMAPS:
        raise MapError(f"A place has at most {MAX_SUBMAPS} submaps, got {len(names)}.")
    seen: set[str] = set()
    for name in names:
        if not is_submap_name(name):
            raise MapError(
                f"'{name}' is not a valid name of a submap: up to 64 letters, digits, '_' and '-'. Rename the map's "
                "folder."
            )
        if name.lower() in seen:
            raise MapError(f"Two of the maps have the name '{name}', from their folders. Rename one of them.")
        seen.add(name.lower())


def _copy(folder: Path, to: Path) -> None:
    """Copy only the files of a map; they are verified when the copy is read."""
    description = read_description(folder, FORMAT)
    more = [KFNET_FILE] if description.get("family") == REFERENCE else []
    to.mkdir(parents=True)
    for name in (DESCRIPTION, HEAD_FILE, REFERENCES_FILE, *more):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise MapError(f"The map '{folder}' is incomplete: {name} is missing, or a link. Build it again.")
        shutil.copyfile(folder / name, to / name)


def update_place(
    place: Place,
    submap: int,
    source: FrameSource,
    out: Path,
    config: MapBuildConfig | None = None,
    *,
    same_frame: bool = False,
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    started: float | None = None,
    on_progress: Report = lambda progress: None,
) -> tuple[Place, Updated]:
    """Add a recording to a submap; the others are copied. The updated submap is written in the place's frame.

    Args:
        place: place of the recording.
        submap: number of the submap that the recording is added to.
        source: see :func:`kfloc_ros.mapping.update.update_map`.
        out: folder of the place to write; can be the same place.
        config: see ``update_map``, as the following.
        same_frame: the recording's poses are in the place's frame.
        overwrite: replace an existing place.
        provenance: additional entries for the submap's description of its origin.
        started: start of the time budget.
        on_progress: called with the progress of the build.

    Raises:
        SourceError: too few views with depth and pose.
        MapError: the recording does not localize in the submap, or the place cannot be written.
    """
    updated = update_map(
        place.load_submap(submap),
        source,
        config,
        same_frame=same_frame,
        provenance=provenance,
        started=started,
        on_progress=on_progress,
    )
    parts = [
        Part(info.name, np.eye(4), updated.scene_map.save) if number == submap else existing_part(place, number)
        for number, info in enumerate(place.submaps)
    ]
    return write_place(parts, out, name=place.name, overwrite=overwrite), updated


def submap_of(place: Place, source: FrameSource, *, same_frame: bool = False, device: str = "cpu") -> int:
    """Return the number of a recording's submap: that nearest to its poses, or that in which its images localize.

    Args:
        place: place of the recording.
        source: the recording.
        same_frame: the recording's poses are in the place's frame; images are not used.
        device: device of the localizer.

    Raises:
        MapError: no submap fits, or several do.
    """
    positions = np.unique(np.linspace(0, len(source) - 1, min(PROBES, len(source))).round().astype(int)).tolist()
    if same_frame:
        poses = [T for T in (source.pose(position) for position in positions) if T is not None]
        found = [int(np.argmin(place.index.distances(T))) for T in poses]
    else:
        found = _found_in(place, source, positions, device)
    counts = Counter(found).most_common()
    if not counts or counts[0][1] < (1 if same_frame else MIN_PROBES_FOUND) or counts[0][1] < 0.75 * len(found):
        names = listed([f"'{place.submaps[number].name}' ({count})" for number, count in counts]) or "none"
        raise MapError(
            f"The submap of the recording in '{place.path}' is ambiguous: of {len(positions)} frames tried, "
            f"{len(found)} were localized, in {names}. Give it with --submap; add a recording of several submaps to "
            "each of them, with the frames that show it (--frames)."
        )
    return counts[0][0]


def crop_place(
    place: Place, low_m: Sequence[float], high_m: Sequence[float], out: Path, *, overwrite: bool = False
) -> Place:
    """Return the part of a place inside a box in its frame; one submap is in memory at a time.

    Raises:
        MapError: the corners are in the wrong order, nothing is inside, or the place cannot be written.
    """

    def part_of(number: int) -> SceneMap:
        return crop_map(place.load_submap(number), low_m, high_m)

    def anew(number: int) -> Part:
        return Part(place.submaps[number].name, np.eye(4), lambda to: part_of(number).save(to))

    parts = []
    for number in range(len(place.submaps)):
        with contextlib.suppress(NothingInside):
            part_of(number)
            parts.append(anew(number))
    if not parts:
        extent = " to ".join(str(tuple(round(v, 2) for v in corner)) for corner in place.bounds_m)
        raise NothingInside(f"No submap has enough points in the box; the place reaches from {extent} m.")
    return write_place(parts, out, name=place.name, overwrite=overwrite)


def _found_in(place: Place, source: FrameSource, positions: Sequence[int], device: str) -> list[int]:
    """Return the submaps in which frames localize, each frame independently."""
    localizer = PlaceLocalizer(place, LocalizerConfig(device=device))
    adapter = ImageAdapter(source.camera, place.camera)
    found = []
    for position in positions:
        localizer.reset("frames are judged independently")
        frame = source.read(position)
        if frame is None:
            continue
        adapted = replace(frame, image=adapter(frame.image), camera=adapter.target, depth_m=None)
        if localizer.process(adapted).estimate.T_map_camera is not None and localizer.guide.active is not None:
            found.append(localizer.guide.active.number)
    localizer.guide.cache.close()
    return found
