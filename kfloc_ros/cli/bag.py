# SPDX-License-Identifier: Apache-2.0
"""``kfloc bag make``: a source of frames as a real rosbag2 recording."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from

DESCRIPTION = """\
Write the frames of SOURCE as a rosbag2 folder (mcap), at the rate at which they were recorded.

Topics: /camera/image/compressed (sensor_msgs/CompressedImage), /camera/camera_info, /camera/depth/compressed
(16-bit PNG in millimetres), and the truth as /ground_truth/pose (geometry_msgs/PoseStamped) and in /tf as
map -> camera_ground_truth. Needs no ROS. Images that SOURCE has as JPEG are stored as they are.
"""

EPILOG = """\
examples:
  kfloc bag make 7scenes:DIR --split blocks50:test --poses sfm --out out/kitchen_bag
  kfloc bag make sim:localize --out out/room_bag
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bag`` subcommand."""
    parser = subparsers.add_parser("bag", help="write a source as a rosbag2")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    make = actions.add_parser(
        "make",
        help="write a source as a rosbag2",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(make)
    make.add_argument("--out", required=True, type=Path, metavar="BAG", help="folder of the new bag")
    make.add_argument("--no-depth", action="store_true", help="leave the depth images out")
    make.add_argument("--force", action="store_true", help="replace a bag that is there")
    make.add_argument("--quiet", action="store_true", help="print nothing but errors")
    make.set_defaults(action=run_make)


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc bag``."""
    return int(args.action(args))


def run_make(args: argparse.Namespace) -> int:
    """Run ``kfloc bag make``; 0 when the bag is complete."""
    from tqdm import tqdm

    from kfloc_ros.bags.writer import write_bag

    source = open_source_from(args, depth=not args.no_depth)
    with tqdm(total=len(source), unit="frame", disable=args.quiet or not sys.stderr.isatty()) as bar:
        report = write_bag(
            source, args.out, depth=not args.no_depth, force=args.force, progress=lambda done: bar.update(done - bar.n)
        )
    if not args.quiet:
        print(
            f"{args.out}: {report.frames} frames, {report.with_truth} with truth, {report.with_depth} with depth; "
            f"{report.duration_s:.1f} s, {report.size_bytes / 1e6:.0f} MB."
        )
    return 0
