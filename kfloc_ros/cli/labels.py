# SPDX-License-Identifier: Apache-2.0
"""``kfloc labels``: export of scene-coordinate labels in the format of the original KFNet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.build_options import need_poses

DESCRIPTION = """\
Write a source with poses as a training folder of the original KFNet: image_list.txt, label_list.txt (raw float32
H x W x 4: x, y, z in metres and a mask), transform.txt, and in addition camera.txt and pose_list.txt. The folder can be
used as the SOURCE kfnet:OUT. If the source has no depth (such as a COLMAP model), depth is estimated from the motion
between the views and the points of the reconstruction; pixels without depth are masked out.
"""

EPILOG = """\
examples:
  kfloc labels 7scenes:DIR --split blocks50:train --eighth --out out/labels
  kfloc labels colmap:DIR --out out/labels
  kfloc map build kfnet:out/labels --out maps/kitchen
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc labels``."""
    parser = subparsers.add_parser(
        "labels",
        help="write scene-coordinate labels in KFNet's format",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--eighth", action="store_true", help="labels of every eighth pixel in both directions: 1/64 of the size"
    )
    parser.add_argument(
        "--absolute", action="store_true", help="write absolute paths in the lists, as the original KFNet expects"
    )
    parser.add_argument(
        "--no-depth", action="store_true", help="estimate depth from the views' motion, even if the source has depth"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device for depth estimation")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc labels``; return 0."""
    source = open_source_from(args, depth=not args.no_depth)
    need_poses(source)

    import numpy as np

    from kfloc_ros.cli.progress import progress_bar
    from kfloc_ros.datasets.labels import write_kfnet_folder
    from kfloc_ros.mapping.motion_depth import MotionDepth, MotionDepthSettings, with_depth

    every_view = MotionDepthSettings(max_views=len(source))
    source = with_depth(source, hide=args.no_depth, device=args.device, settings=every_view)
    written = write_kfnet_folder(source, args.out, full_resolution=not args.eighth, absolute=args.absolute)
    bar = progress_bar(written, total=len(source), unit="frame")
    known = [float(np.mean(frame.depth_m > 0)) for frame in bar if frame.depth_m is not None]
    origin = "depth from motion" if isinstance(source, MotionDepth) else "measured depth"
    print(f"{args.out}: {len(known)} labelled images of {len(source)}, {np.mean(known):.0%} of the pixels ({origin})")
    return 0
