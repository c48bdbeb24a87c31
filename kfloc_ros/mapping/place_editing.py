# SPDX-License-Identifier: Apache-2.0
"""Changes of a place: adds a recording to one of its submaps, or crops it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.errors import MapError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import PlaceLocalizer
from kfloc_ros.mapping.build import MapBuildConfig, Report
from kfloc_ros.mapping.merge import NothingInside, crop_map
from kfloc_ros.mapping.place_making import Part, existing_part, write_place
from kfloc_ros.mapping.update import Updated, update_map
from kfloc_ros.maps.place import Place, listed
from kfloc_ros.maps.scene_map import SceneMap

PROBES = 24
"""Number of frames of a recording that are read to find its submap."""
MIN_PROBES_FOUND = 3


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
