# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share: SOURCE and its check, key=value words, and the options of a build."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.datasets import SOURCE_KINDS, FrameSource, open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import SPLITS

if TYPE_CHECKING:
    from kfloc_ros.mapping.build import MapBuildConfig
    from kfloc_ros.mapping.source_check import SourceCheck


class OverridesParser(argparse.ArgumentParser):
    """Argument parser that collects ``key=value`` words, at any position, as ``overrides``, and takes options with
    underscores (``--from_poses``), as the originals have them, for those with hyphens.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, without the ``key=value`` words: argparse requires all positionals in one place."""
        words = list(sys.argv[1:] if args is None else args)
        overrides = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
        rest = [self._hyphened(word) for word in words if word not in overrides]
        found, unknown = super().parse_known_args(rest, namespace)
        found.overrides = overrides
        return found, unknown

    def _hyphened(self, word: str) -> str:
        """Return an option as this parser has it."""
        name, separator, value = word.partition("=")
        known = self._option_string_actions
        if not name.startswith("--") or name in known or name.replace("_", "-") not in known:
            return word
        return name.replace("_", "-") + separator + value


def add_source_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add SOURCE, --poses, --frames and --split; :func:`open_source_from` reads them.

    Args:
        required: False makes SOURCE optional, with the default None.
    """
    text = f"frames, written KIND:PATH; KIND is {', '.join(SOURCE_KINDS)} (details: `kfloc sources`)"
    parser.add_argument("source", metavar="SOURCE", nargs=None if required else "?", help=text)
    group = parser.add_argument_group("frames and ground truth")
    group.add_argument(
        "--poses",
        choices=("file", "sfm"),
        default="file",
        help="ground truth, if a source has two: file for its pose files, sfm for poses_sfm.txt (default: file)",
    )
    group.add_argument(
        "--frames", metavar="RANGES", help="use only these frame indices, such as 0:150,200:350 or 0:300:2"
    )
    group.add_argument("--split", metavar="NAME", help=f"use only a named split: {', '.join(SPLITS)}")
    group.add_argument(
        "--strict", action="store_true", help="stop at a frame that cannot be used (default: omit it and report it)"
    )


def add_recursion_argument(parser: argparse.ArgumentParser) -> None:
    """Add --recursion, the option of the localizer."""
    parser.add_argument(
        "--recursion",
        choices=("auto", "robust", "published", "published_nis"),
        default="auto",
        help="recursion of the filter: this package's, or KFNet's without or with its NIS test on the output (default: "
        "auto: KFNet's for maps with converted KFNet weights, else this package's)",
    )


def open_source_from(args: argparse.Namespace, *, depth: bool = True) -> FrameSource:
    """Open the source given by the arguments of :func:`add_source_arguments`.

    Args:
        depth: False skips reading the depth images.

    Raises:
        SourceError: see :func:`kfloc_ros.datasets.open_source`.
    """
    return open_source(
        args.source, poses=args.poses, frames=args.frames, split=args.split, depth=depth, strict=args.strict
    )


def need_camera(source: FrameSource) -> None:
    """Refuse images whose camera is only a guess, for commands whose result would be wrong with it.

    Raises:
        SourceError: the camera is a guess.
    """
    if source.camera_is_guess:
        raise SourceError(
            f"The camera of '{source.name}' is not known. Put a camera.txt with 'width height fx fy cx cy' and the "
            "distortion beside the images; `kfloc map build ... --sfm DIR` estimates the camera and writes "
            "DIR/camera.txt."
        )


NO_CHECK = "--no-check"
MAX_NUMBER = 1e9
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


def add_no_check(parser: argparse.ArgumentParser) -> None:
    """Add the option that leaves the check out at the start of a command."""
    parser.add_argument(
        NO_CHECK, action="store_true", help="do not check poses, calibration and depth by the images (see kfloc check)"
    )


def check_first(source: FrameSource, *, skip: bool, use_poses: bool = True) -> SourceCheck | None:
    """Check a source before it is worked on; warnings go to stderr. Poses that are not used are not checked.

    Returns:
        The check; None if it is skipped.

    Raises:
        SourceError: the images contradict the source beyond doubt.
    """
    from kfloc_ros.mapping.source_check import check_source

    if skip:
        return None
    check = check_source(source, use_poses=use_poses)
    for finding in check.findings:
        if finding.severity != "error":
            print(f"Warning: {finding.text}", file=sys.stderr)
    if check.errors:
        text = " ".join(finding.text for finding in check.errors)
        mend = f" Add '{check.words}' to the source." if check.words else ""
        raise SourceError(f"'{check.name}' contradicts itself. {text}{mend} {NO_CHECK} goes on all the same.")
    return check


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


def positive(text: str) -> float:
    """Return the positive number of an option."""
    value = _number(text)
    if not 0 < value < MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def not_negative(text: str) -> float:
    """Return the number of an option, which can be 0."""
    value = _number(text)
    if not 0 <= value < MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


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
