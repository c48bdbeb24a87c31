# SPDX-License-Identifier: Apache-2.0
"""How often is the first fix right? Cold starts in a sequence: a single frame, and after 1, 5 and 10 frames more.

Starts are taken at equal steps through the frames of a SOURCE. At each, the localizer forgets everything, and runs
over the frames that follow; the pose of the frame n is compared with the truth. A start whose sequence ends before
the frame n is not counted there. Prints recalls with and without the search of the map's reference views.

    python benchmarks/first_fix.py 7scenes:DATA/7scenes/redkitchen --split extrapolate:test --map MAP --starts 30
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
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.errors import KflocError
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.localizer import Localizer
from kfloc_ros.localizer_config import LocalizerConfig
from kfloc_ros.mapping.scene_map import SceneMap, resolve_map

AFTER = (0, 1, 5, 10)
"""Frames seen before the one that is judged."""
THRESHOLDS = ((0.05, 5.0), (0.25, 5.0))


@dataclass(frozen=True)
class Row:
    """Cold starts judged after some frames."""

    search: bool
    frames_before: int
    starts: int
    answered: float
    """Share of starts with a pose."""
    recall_5cm_5deg: float
    recall_25cm_5deg: float
    wrong: float
    """Share of starts whose pose is more than 0.5 m or 20 degrees off, and was claimed as TRACKING."""


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--starts", type=int, default=30, help="cold starts, equally spaced (default: 30)")
    parser.add_argument("--after", type=int, nargs="+", default=list(AFTER), help="frames seen before the judged one")
    parser.add_argument("--search", choices=("both", "on", "off"), default="both", help="search of the reference views")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args()
    try:
        source, scene_map = open_source_from(args, depth=False), SceneMap.load(resolve_map(args.map))
        wanted = {"both": (True, False), "on": (True,), "off": (False,)}[args.search]
        rows = [row for search in wanted for row in measure(source, scene_map, args.starts, args.after, search=search)]
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    header = ["search", "frames before", "starts", "pose given", "5 cm/5 deg", "25 cm/5 deg", "wrong, claimed"]
    lines = [
        ["yes" if r.search else "no", str(r.frames_before), str(r.starts)]
        + [f"{100 * v:.1f} %" for v in (r.answered, r.recall_5cm_5deg, r.recall_25cm_5deg, r.wrong)]
        for r in rows
    ]
    print(format_table(lines, header=header))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def measure(source: FrameSource, scene_map: SceneMap, starts: int, after: Sequence[int], *, search: bool) -> list[Row]:
    """One row for each number of frames before the judged one."""
    indices = list(source.indices())
    step = max(1, len(source) // starts)
    errors: dict[int, list[tuple[float, float, bool]]] = {n: [] for n in after}
    localizer = Localizer(scene_map, LocalizerConfig(first_fix=search))
    adapter = ImageAdapter(source.camera, localizer.camera)
    for start in range(0, len(source), step):
        localizer.reset("a cold start")
        for n in range(max(after) + 1):
            position = start + n
            if position >= len(source) or indices[position] - indices[start] > 3 * (n + 1):
                break  # the next block of a split is another sequence
            frame = source[position]
            estimate = localizer.process(replace(frame, image=adapter(frame.image), camera=adapter.target))
            if n not in errors or frame.T_map_camera is None:
                continue
            T = estimate.T_map_camera
            if T is None:
                errors[n].append((np.inf, np.inf, False))
                continue
            away_m = float(np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3]))
            away_deg = rotation_angle_deg(T[:3, :3].T @ frame.T_map_camera[:3, :3])
            errors[n].append((away_m, away_deg, estimate.state.value == "TRACKING"))
    return [_row(search, n, errors[n]) for n in after]


def _row(search: bool, frames_before: int, errors: Sequence[tuple[float, float, bool]]) -> Row:
    table = np.array(errors, dtype=np.float64).reshape(-1, 3)
    away_m, away_deg, claimed = table.T
    count = max(len(table), 1)
    recalls = [float(np.sum((away_m < m) & (away_deg < deg)) / count) for m, deg in THRESHOLDS]
    wrong = np.isfinite(away_m) & ((away_m > 0.5) | (away_deg > 20.0)) & (claimed > 0)
    return Row(
        search,
        frames_before,
        len(table),
        float(np.isfinite(away_m).sum() / count),
        *recalls,
        float(wrong.sum() / count),
    )


if __name__ == "__main__":
    sys.exit(main())
