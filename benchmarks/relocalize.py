# SPDX-License-Identifier: Apache-2.0
"""Benchmark of relocalization: cold starts in a sequence, from a single frame and after 1, 5 and 10 more frames.

Starts are equally spaced through the frames of a SOURCE. At each, the localizer is reset and runs over the frames that
follow; the pose of the frame n is compared with the truth. A start whose sequence ends before the frame n is not
counted there. Then the whole sequence is run once, and every frame counts. The table has recalls with and without the
search of the map's reference views. With --matcher it also has those of DISK + LightGlue and PnP on the starting
frames, with the same retrieved reference views (see disk_lightglue.py for the packages it needs).

    python benchmarks/relocalize.py 7scenes:DATA/7scenes/redkitchen --split extrapolate:test --map MAP --starts 30
    python benchmarks/relocalize.py transforms:TEST --map MAP --matcher disk_lightglue --mapped transforms:TRAIN
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import Matrix, rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap

AFTER = (0, 1, 5, 10)
"""Frames before the judged one."""
THRESHOLDS = ((0.05, 5.0), (0.25, 5.0))
Error = tuple[float, float, bool]


@dataclass(frozen=True)
class Row:
    """Poses of one method, judged after the same number of frames."""

    method: str
    frames_before: int | None
    """Frames since the cold start; None: every frame of the whole sequence."""
    judged: int
    answered: float
    """Share with a pose."""
    recall_5cm_5deg: float
    recall_25cm_5deg: float
    wrong: float
    """Share with a wrong pose, more than 0.5 m or 20 degrees off, that was claimed (as TRACKING, by the localizer)."""


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--starts", type=int, default=30, help="cold starts, equally spaced (default: 30)")
    parser.add_argument("--after", type=int, nargs="+", default=list(AFTER), help="frames seen before the judged one")
    parser.add_argument("--search", choices=("both", "on", "off"), default="both", help="search of the reference views")
    parser.add_argument("--matcher", choices=("disk_lightglue",), help="compare with a matcher, on single frames")
    parser.add_argument("--mapped", metavar="SOURCE", help="with --matcher: what the map was made of, with depth")
    parser.add_argument("--views", type=int, default=5, help="with --matcher: retrieved views (default: 5)")
    parser.add_argument("--keypoints", type=int, default=1024, help="with --matcher: of each image (default: 1024)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args()
    try:
        source, scene_map = open_source_from(args, depth=False), SceneMap.load(resolve_map(args.map))
        wanted = {"both": (True, False), "on": (True,), "off": (False,)}[args.search]
        rows = [row for search in wanted for row in measure(source, scene_map, args.starts, args.after, search=search)]
        rows += [measure_sequence(source, scene_map, search=search) for search in wanted]
        if args.matcher is not None:
            rows.append(measure_matcher(source, scene_map, args))
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    header = ["method", "frames before", "judged", "pose given", "5 cm/5 deg", "25 cm/5 deg", "wrong, claimed"]
    lines = [
        [r.method, "whole sequence" if r.frames_before is None else str(r.frames_before), str(r.judged)]
        + [f"{100 * v:.1f} %" for v in (r.answered, r.recall_5cm_5deg, r.recall_25cm_5deg, r.wrong)]
        for r in rows
    ]
    print(format_table(lines, header=header))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def measure(source: FrameSource, scene_map: SceneMap, starts: int, after: Sequence[int], *, search: bool) -> list[Row]:
    """Return one row for each number of frames before the judged one."""
    indices = list(source.indices())
    errors: dict[int, list[Error]] = {n: [] for n in after}
    localizer = Localizer(scene_map, LocalizerConfig(relocalize=search))
    adapter = ImageAdapter(source.camera, localizer.camera)
    for start in _starts(source, starts):
        localizer.reset("a cold start")
        for n in range(max(after) + 1):
            position = start + n
            if position >= len(source) or indices[position] - indices[start] > 3 * (n + 1):
                break  # the next block of a split is another sequence
            frame = source[position]
            estimate = localizer.process(replace(frame, image=adapter(frame.image), camera=adapter.target)).estimate
            if n in errors and frame.T_map_camera is not None:
                errors[n].append(_error(estimate.T_map_camera, frame.T_map_camera, estimate.state.value == "TRACKING"))
    return [_row(_method(search), n, errors[n]) for n in after]


def measure_sequence(source: FrameSource, scene_map: SceneMap, *, search: bool) -> Row:
    """Localize all frames in order, from one cold start; the localizer is not told where a block of a split ends."""
    localizer = Localizer(scene_map, LocalizerConfig(relocalize=search))
    adapter = ImageAdapter(source.camera, localizer.camera)
    errors = []
    for frame in source:
        estimate = localizer.process(replace(frame, image=adapter(frame.image), camera=adapter.target)).estimate
        if frame.T_map_camera is not None:
            errors.append(_error(estimate.T_map_camera, frame.T_map_camera, estimate.state.value == "TRACKING"))
    return _row(_method(search), None, errors)


def measure_matcher(source: FrameSource, scene_map: SceneMap, args: argparse.Namespace) -> Row:
    """Localize the starting frames by DISK + LightGlue.

    Raises:
        SourceError: the source of the map is not given.
        WeightsError: the packages are not installed.
    """
    from disk_lightglue import DiskLightGlue

    if args.mapped is None:
        raise SourceError("--matcher needs --mapped SOURCE, since a map holds no images.")
    matcher = DiskLightGlue(scene_map, open_source(args.mapped), views=args.views, keypoints=args.keypoints)
    backbone, adapter = Backbone(), ImageAdapter(source.camera, scene_map.camera)
    errors = []
    for start in _starts(source, args.starts):
        frame = source[start]
        if frame.T_map_camera is not None:
            image = adapter(frame.image)
            errors.append(_error(matcher.locate(image, backbone.extract(image)), frame.T_map_camera, True))
    return _row(f"DISK + LightGlue, {args.views} views", 0, errors)


def _starts(source: FrameSource, count: int) -> range:
    return range(0, len(source), max(1, len(source) // count))


def _method(search: bool) -> str:
    return "with the search" if search else "without"


def _error(T: Matrix | None, truth: Matrix, claimed: bool) -> Error:
    """Return metres, degrees (both infinite without a pose), and true for a claimed pose."""
    if T is None:
        return np.inf, np.inf, False
    away_m = float(np.linalg.norm(T[:3, 3] - truth[:3, 3]))
    return away_m, rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]), claimed


def _row(method: str, frames_before: int | None, errors: Sequence[Error]) -> Row:
    table = np.array(errors, dtype=np.float64).reshape(-1, 3)
    away_m, away_deg, claimed = table.T
    count = max(len(table), 1)
    recalls = [float(np.sum((away_m < m) & (away_deg < deg)) / count) for m, deg in THRESHOLDS]
    wrong = np.isfinite(away_m) & ((away_m > 0.5) | (away_deg > 20.0)) & (claimed > 0)
    return Row(
        method,
        frames_before,
        len(table),
        float(np.isfinite(away_m).sum() / count),
        *recalls,
        float(wrong.sum() / count),
    )


if __name__ == "__main__":
    sys.exit(main())
