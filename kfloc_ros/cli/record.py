# SPDX-License-Identifier: Apache-2.0
"""``kfloc record``: record a running camera for a map, with help while walking."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

DESCRIPTION = """\
Record what a map is made of from a running camera or robot: images, calibration, depth if there is any, /tf, /tf_static
and odometry. While you walk, every few seconds a line says how it is going and what is missing; blurred images and a
walk that is too fast are told at once. It is enough when there are enough different views, most of them sharp, and most
of the way lies in loops, that is, when you have returned to where you were before. Where TF knows the camera's pose in
odom or map, the directions that you have looked in count, too.
"""

EPILOG = """\
examples:
  kfloc record --out hall_bag
  kfloc record --out hall_bag --image /camera/color/image_raw --camera-info /camera/color/camera_info --depth none
  kfloc record --out hall_bag --stop-when-enough
then:
  kfloc check bag:hall_bag
  kfloc map build bag:hall_bag --out maps/hall
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``record`` subcommand."""
    parser = subparsers.add_parser(
        "record",
        help="record a running camera for a map, with help while walking",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="BAG", help="folder of the bag to write")
    parser.add_argument(
        "--image", default="", metavar="TOPIC", help="images (default: the only topic of colour images)"
    )
    parser.add_argument("--camera-info", default="", metavar="TOPIC", help="calibration (default: the one beside them)")
    parser.add_argument("--depth", default="", metavar="TOPIC", help="depth images, or none (default: if there is one)")
    parser.add_argument("--also", action="append", default=[], metavar="TOPIC", help="another topic, such as /imu")
    parser.add_argument("--duration", type=float, default=0.0, metavar="S", help="end after so many seconds")
    parser.add_argument("--stop-when-enough", action="store_true", help="end as soon as it is enough")
    parser.add_argument(
        "--wait", type=float, default=10.0, metavar="S", help="longest wait for the topics, in seconds (default: 10)"
    )


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc record``; return 0 if the recording is enough for a map, 1 if it is not."""
    from kfloc_ros.errors import SourceError

    if importlib.util.find_spec("rclpy") is None:
        raise SourceError("Recording needs ROS 2: run `make setup`, or source a ROS 2 installation.")
    from kfloc_ros.nodes.recorder import RecordingPlan, record

    plan = RecordingPlan(
        args.image, args.camera_info, args.depth, tuple(args.also), args.duration, args.stop_when_enough, args.wait
    )
    result = record(plan, args.out, lambda line: print(line, flush=True))
    report = result.report
    print(f"\n{args.out}: {report.duration_s:.0f} s")
    for topic, count in result.counts.items():
        print(f"  {topic}: {count} messages")
    if report.is_enough:
        print(f"It is enough. Next: kfloc map build bag:{args.out} --out MAP")
        return 0
    print("It may not be enough for a map:")
    for sentence in report.missing:
        print(f"  {sentence}")
    return 1
