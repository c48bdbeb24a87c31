# SPDX-License-Identifier: Apache-2.0
"""``kfloc bag``: writes a source as a rosbag2 recording (``make``) and lists the content of a recording (``info``)."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from kfloc_ros.cli.arguments import add_source_arguments, need_camera, open_source_from

MAKE_DESCRIPTION = """\
Write the frames of SOURCE as a rosbag2 folder (mcap), with their original time stamps.

Topics: /camera/image/compressed (sensor_msgs/CompressedImage), /camera/camera_info, /camera/depth/compressed
(16-bit PNG in millimetres). The ground truth is written as /ground_truth/pose (geometry_msgs/PoseStamped) and in /tf as
map -> camera_ground_truth. JPEG images of SOURCE are copied unchanged. Needs no ROS.
"""

MAKE_EPILOG = """\
examples:
  kfloc bag make 7scenes:DIR --split blocks50:test --poses sfm --out out/kitchen_bag
  kfloc bag make sim:localize --out out/room_bag
"""

INFO_DESCRIPTION = """\
List the topics and TF frames of a bag, the topics that `kfloc replay` and `kfloc map build` select, and the choices
left to the user.
"""

INFO_EPILOG = """\
examples:
  kfloc bag info my_bag

exit codes: 0 `kfloc replay` needs no choice of topics, 1 it needs one, 2 the bag cannot be read
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bag`` subcommand."""
    parser = subparsers.add_parser("bag", help="write a source as a rosbag2, or list the content of one")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    make = actions.add_parser(
        "make",
        help="write a source as a rosbag2",
        description=MAKE_DESCRIPTION,
        epilog=MAKE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(make)
    make.add_argument("--out", required=True, type=Path, metavar="BAG", help="folder of the new bag")
    make.add_argument("--no-depth", action="store_true", help="omit the depth images")
    make.add_argument("--force", action="store_true", help="replace an existing bag")
    make.add_argument("--quiet", action="store_true", help="print only errors")
    make.set_defaults(run_action=run_make)
    info = actions.add_parser(
        "info",
        help="list the topics and frames of a bag, and what can be made of it",
        description=INFO_DESCRIPTION,
        epilog=INFO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    info.add_argument("bag", metavar="BAG", type=Path, help="rosbag2 folder, or rosbag1 file")
    info.set_defaults(run_action=run_info)


def run_make(args: argparse.Namespace) -> int:
    """Run ``kfloc bag make``; return 0 when the bag is complete."""
    from kfloc_ros.bags.writer import write_bag
    from kfloc_ros.cli.tables import progress_bar

    source = open_source_from(args, depth=not args.no_depth)
    need_camera(source)
    with progress_bar(total=len(source), unit="frame", disable=args.quiet) as bar:
        report = write_bag(
            source, args.out, depth=not args.no_depth, force=args.force, progress=lambda done: bar.update(done - bar.n)
        )
    if not args.quiet:
        print(
            f"{args.out}: {report.frames} frames, {report.with_truth} with ground truth, {report.with_depth} with "
            f"depth; {report.duration_s:.1f} s, {report.size_bytes / 1e6:.0f} MB."
        )
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Run ``kfloc bag info``; return 0 if the topics follow from the bag, 1 if the user has to choose."""
    from kfloc_ros.bags.reader import BagReader
    from kfloc_ros.bags.topics import choose_image, choose_info, choose_truth
    from kfloc_ros.cli.tables import format_table
    from kfloc_ros.errors import SourceError

    with BagReader(args.bag) as bag:
        rows = [
            (
                topic.name,
                topic.kind,
                str(topic.count),
                " -> ".join(filter(None, (topic.frame_id, topic.child_frame_id))),
            )
            for topic in bag.topics
        ]
        print(f"{args.bag}: {bag.duration_s:.1f} s\n")
        print(format_table(rows, header=("topic", "type", "messages", "frame")))
        links = [f"{link.parent} -> {link.child}{' (static)' if link.static else ''}" for link in bag.links()]
        print(f"\nTF: {', '.join(links) or 'none'}.")
        code = 0
        try:
            image = choose_image(args.bag, bag.topics, None)
            print(f"Images: {image.name}{' (rectified)' if image.is_rectified else ''}.")
            print(f"Calibration: {choose_info(args.bag, bag.topics, image, None).name}.")
            truth = choose_truth(args.bag, bag.topics)
            print(f"Ground truth: {truth.name if truth is not None else 'none; --truth selects one'}.")
        except SourceError as error:
            print(error)
            code = 1
    print(f"\nFor a map: {_for_a_map(args.bag)}")
    return code


def _for_a_map(bag: Path) -> str:
    """Return the topics that ``kfloc map build`` uses and its command, or the choice left to the user."""
    from kfloc_ros.datasets.ros_bag import RosBag
    from kfloc_ros.errors import SourceError

    try:
        source = RosBag(bag, {})
    except SourceError as error:
        return str(error)
    chosen = source.choices()
    with_pose = sum(source.pose(position) is not None for position in range(len(source)))
    listed = ", ".join(f"{word} {topic}" for word, topic in chosen.items())
    if not with_pose:
        return f"{listed}. No image has a pose: kfloc map build bag:{bag} --sfm DIR --out MAP estimates poses."
    return f"{listed}; {with_pose} of {len(source)} images have a pose: kfloc map build bag:{bag} --out MAP."


RECORD = """\
Record what a map is made of from a running camera or robot: images, calibration, depth if there is any, /tf, /tf_static
and odometry. While you walk, every few seconds a line says how it is going and what is missing; blurred images and a
walk that is too fast are told at once. It is enough when there are enough different views, most of them sharp, and most
of the way lies in loops, that is, when you have returned to where you were before. Where TF knows the camera's pose in
odom or map, the directions that you have looked in count, too.
"""

RECORD_EXAMPLES = """\
examples:
  kfloc record --out hall_bag
  kfloc record --out hall_bag --image /camera/color/image_raw --camera-info /camera/color/camera_info --depth none
  kfloc record --out hall_bag --stop-when-enough
then:
  kfloc check bag:hall_bag
  kfloc map build bag:hall_bag --out maps/hall
"""


def add_record_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``record`` subcommand."""
    parser = subparsers.add_parser(
        "record",
        help="record a running camera for a map, with help while walking",
        description=RECORD,
        epilog=RECORD_EXAMPLES,
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
    parser.set_defaults(run_action=run_record)


def run_record(args: argparse.Namespace) -> int:
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
