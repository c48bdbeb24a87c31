# SPDX-License-Identifier: Apache-2.0
"""Command-line arguments that several commands share: SOURCE with its selection of frames and poses, and key=value
words.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from kfloc_ros.datasets import SOURCE_KINDS, FrameSource, open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import SPLITS


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
