# SPDX-License-Identifier: Apache-2.0
"""Arguments that several commands share: the SOURCE, which of its frames, which of its poses; key=value words."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from kfloc_ros.datasets import SOURCE_KINDS, FrameSource, open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import SPLITS


class OverridesParser(argparse.ArgumentParser):
    """Takes ``key=value`` words anywhere among the arguments, as ``overrides``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; the words are taken out first, since it wants all positionals in one place."""
        words = list(sys.argv[1:] if args is None else args)
        overrides = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
        rest = [word for word in words if word not in overrides]
        found, unknown = super().parse_known_args(rest, namespace)
        found.overrides = overrides
        return found, unknown


def add_source_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add SOURCE, --poses, --frames and --split; read them back with :func:`open_source_from`.

    Without ``required``, SOURCE may be left out and is None then.
    """
    text = f"frames, written KIND:PATH; KIND is {', '.join(SOURCE_KINDS)} (details: `kfloc sources`)"
    parser.add_argument("source", metavar="SOURCE", nargs=None if required else "?", help=text)
    group = parser.add_argument_group("which frames, which truth")
    group.add_argument(
        "--poses",
        choices=("file", "sfm"),
        default="file",
        help="ground truth to use where a source has two: the pose files, or poses_sfm.txt (default: file)",
    )
    group.add_argument("--frames", metavar="RANGES", help="keep frame indices such as 0:150,200:350 or 0:300:2")
    group.add_argument("--split", metavar="NAME", help=f"keep a named split: {', '.join(SPLITS)}")
    group.add_argument(
        "--strict", action="store_true", help="stop at a frame that cannot be used (default: leave it out and name it)"
    )


def open_source_from(args: argparse.Namespace, *, depth: bool = True) -> FrameSource:
    """Open what :func:`add_source_arguments` read; ``depth`` False saves reading the depth images.

    Raises:
        SourceError: see :func:`kfloc_ros.datasets.open_source`.
    """
    return open_source(
        args.source, poses=args.poses, frames=args.frames, split=args.split, depth=depth, strict=args.strict
    )


def need_camera(source: FrameSource) -> None:
    """Refuse images of a camera that is only guessed, where poses or a recording would be wrong with it.

    Raises:
        SourceError: what to do instead.
    """
    if source.camera_is_guess:
        raise SourceError(
            f"The camera of '{source.name}' is not known. Put a camera.txt with 'width height fx fy cx cy' and the "
            "distortion beside the images; `kfloc map build ... --sfm DIR` finds the camera and writes DIR/camera.txt."
        )
