# SPDX-License-Identifier: Apache-2.0
"""Options of a map build, shared by ``kfloc map build``, ``update`` and ``place``, and the build of a submap."""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.check import check_first
from kfloc_ros.errors import SourceError

if TYPE_CHECKING:
    from kfloc_ros.frames import FrameSource
    from kfloc_ros.mapping.build import MapBuildConfig

BUDGET = "budget_s"
UNITS_S = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a build; :func:`build_config_from` reads them."""
    from kfloc_ros.config import options_of
    from kfloc_ros.mapping.build import MapBuildConfig

    parser.add_argument(
        "--no-depth", action="store_true", help="estimate depth from the views' motion, even if the source has depth"
    )
    parser.add_argument(
        "--budget",
        dest=BUDGET,
        type=duration_s,
        default=0.0,
        metavar="TIME",
        help="time budget of the whole build, such as 5min or 90s: views are left out if necessary, and training "
        "uses the remaining time (default: all views, and --train-seconds for training)",
    )
    for item in options_of(MapBuildConfig):
        if item.name != BUDGET:
            parser.add_argument(
                f"--{item.name.replace('_', '-')}",
                type=item.kind,
                default=item.default,
                choices=item.choices or None,
                help=f"{item.text} (default: {item.default})",
            )


def build_config_from(args: argparse.Namespace) -> MapBuildConfig:
    """Return the options of a build.

    Raises:
        ConfigError: a value is out of range.
    """
    from kfloc_ros.config import build_config, options_of
    from kfloc_ros.mapping.build import MapBuildConfig

    return build_config(MapBuildConfig, {o.name: getattr(args, o.name) for o in options_of(MapBuildConfig)})


def need_poses(source: FrameSource) -> None:
    """Refuse images without poses before any computation.

    Raises:
        SourceError: no frame has a pose.
    """
    if source.camera_is_guess or all(source.pose(position) is None for position in range(len(source))):
        raise SourceError(
            f"'{source.name}' has images without poses. `kfloc map build ... --sfm DIR` estimates them and writes "
            "them to DIR, which is then the source colmap:DIR; without depth, it also needs a scale, such as "
            "--scale-marker."
        )


def provenance_of(args: argparse.Namespace, source: FrameSource, command: str) -> dict[str, Any]:
    """Return the origin of a map as stored in it: command line and selection of frames."""
    from kfloc_ros.mapping.motion_depth import MotionDepth

    return {
        "depth": "from motion" if isinstance(source, MotionDepth) else "measured",
        "command": command,
        "poses": args.poses,
        "frames": args.frames or "all",
        "split": args.split or "none",
    }


def words_of(args: argparse.Namespace) -> str:
    """Return the command line, as typed, so that it can be repeated."""
    return shlex.join(["kfloc", *args.words])


def duration_s(text: str) -> float:
    """Return the seconds in ``5min``, ``90s``, ``1h`` or ``300``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a duration; write 5min, 90s or 1h")
    return float(match[1]) * UNITS_S[match[2]]


@dataclass(frozen=True)
class Submap:
    """Submap to be built by one worker."""

    source: str
    out: Path
    config: MapBuildConfig
    no_depth: bool
    no_check: bool
    command: str


def build_submap(submap: Submap) -> Path:
    """Build the map of a submap from its recording; return its folder.

    Raises:
        SourceError: the recording cannot be mapped.
        MapError: the folder cannot be written.
    """
    from kfloc_ros.datasets import open_source
    from kfloc_ros.mapping.build import build_map
    from kfloc_ros.mapping.motion_depth import with_depth

    frames = open_source(submap.source, depth=not submap.no_depth)
    need_poses(frames)
    check_first(frames, skip=submap.no_check)
    source = with_depth(frames, hide=submap.no_depth, device=submap.config.device)
    build_map(source, submap.out, submap.config, provenance={"command": submap.command})
    return submap.out
