# SPDX-License-Identifier: Apache-2.0
"""``kfloc replay``: plays a bag to the live nodes over DDS, or offline to the same localizer, and evaluates the
poses.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kfloc_ros.cli.arguments import add_no_check, not_negative, positive
from kfloc_ros.cli.sources import check_bag

DESCRIPTION = """\
Play a bag with /clock over DDS to the live ROS 2 nodes, record their poses, and evaluate them.

The nodes run in processes and a ROS domain of their own, and end with this command. Writes the same files to OUT as
`kfloc localize`, and the nodes' output to OUT/logs. Ctrl-C stops early and still evaluates the played part.

--offline runs the same localizer in this process instead: every frame is processed, no ROS is needed, and the poses
are reproducible.
"""

EPILOG = """\
examples:
  kfloc bag info my_bag                                  # topics of the bag
  kfloc replay out/kitchen_bag --map maps/kitchen --out out/kitchen_live
  kfloc replay out/kitchen_bag --map maps/kitchen --out out/three --separate --start 10 --duration 20
  kfloc replay my_bag --map maps/lab --out out/lab --image-topic /left/image_raw --truth /mocap --truth-of base_link
  kfloc replay my_bag --map maps/lab --out out/lab --offline --require 'recall.5cm_5deg>=0.95'
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``replay`` subcommand."""
    parser = subparsers.add_parser(
        "replay",
        help="play a bag to the live ROS 2 nodes and evaluate their poses",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", metavar="BAG", type=Path, help="rosbag2 folder, such as one of `kfloc bag make`")
    parser.add_argument("--map", required=True, metavar="DIR", help="map folder, or the name of a shipped map")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--force", action="store_true", help="replace the results of another run in OUT")
    _add_playing(parser.add_argument_group("playback"))
    _add_topics(parser.add_argument_group("topics and ground truth"))
    parser.add_argument(
        "--no-filter", action="store_true", help="localize each frame independently, without the filter"
    )
    parser.add_argument("--no-refine", action="store_true", help="output the coarse pose, without alignment")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    parser.add_argument(
        "--require", action="append", default=[], metavar="FIGURE<=N",
        help="required metric of summary.json, such as recall.5cm_5deg>=0.95; exit code 1 if not met; can be repeated",
    )  # fmt: skip
    add_no_check(parser)
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def _add_playing(group: argparse._ArgumentGroup) -> None:
    how = group.add_mutually_exclusive_group()
    how.add_argument("--separate", action="store_true", help="run camera, filter and refiner in separate processes")
    how.add_argument(
        "--offline", action="store_true", help="run the localizer on every image in this process, without nodes"
    )
    group.add_argument(
        "--rate", type=positive, default=1.0, metavar="R", help="playback rate; 2 is twice real time (default: 1)"
    )
    group.add_argument(
        "--every-frame", action="store_true",
        help="wait for the result of each image before the next one, so that slow nodes drop none",
    )  # fmt: skip
    group.add_argument("--start", type=not_negative, default=0.0, metavar="S", help="seconds to skip")
    group.add_argument("--duration", type=positive, metavar="S", help="seconds to play (default: to the end)")
    group.add_argument(
        "--loop", type=_count, default=1, metavar="N", help="play N times; the clock jumps back in between"
    )
    group.add_argument(
        "--domain-id", type=int, choices=range(102), metavar="N", help="ROS domain, 0 to 101 (default: a private one)"
    )
    group.add_argument(
        "--patience",
        type=positive,
        default=90.0,
        metavar="S",
        help="seconds to wait for the nodes to start (default: 90)",
    )


def _add_topics(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image-topic", metavar="TOPIC", help="image topic, if the bag has several")
    group.add_argument("--camera-info-topic", metavar="TOPIC", help="camera_info topic, if it is not beside the images")
    group.add_argument(
        "--rectified", action=argparse.BooleanOptionalAction,
        help="the images are rectified: use P of camera_info (default: if the topic is called image_rect...)",
    )  # fmt: skip
    group.add_argument(
        "--base-frame", default="", metavar="FRAME",
        help="publish the pose of this frame, such as base_link: the bag's TF is played to the nodes, except for the "
             "map frame, and with odometry in it they broadcast map -> odom (default: the camera's frame, no TF)",
    )  # fmt: skip
    group.add_argument(
        "--tf", metavar="NAMESPACE",
        help="robot whose transforms are used, if several robots use the same frame names, such as /robot1 (default: "
             "that of the images' namespace)",
    )  # fmt: skip
    group.add_argument(
        "--truth", metavar="WHERE",
        help="ground truth in the map frame: /TOPIC (PoseStamped, PoseWithCovarianceStamped, Odometry), "
             "tf:MAP:CAMERA, or a TUM file (default: the bag's PoseStamped topic, if it has exactly one)",
    )  # fmt: skip
    group.add_argument(
        "--truth-of", metavar="FRAME",
        help="frame of the ground truth, such as base_link; the camera's pose on it is read from the bag's "
             "/tf_static (default: the camera's optical frame; for an Odometry, its child_frame_id)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc replay``; return 0 when done, 1 if no image was processed or a requirement is not met, 130 when
    interrupted.
    """
    from kfloc_ros.cli.tables import progress_bar, summary_table
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.evaluation.compare import parse_requirement
    from kfloc_ros.evaluation.report import command_line
    from kfloc_ros.evaluation.results import result_folder
    from kfloc_ros.replay.recording import ReplayConfig

    if args.offline:
        from kfloc_ros.replay.offline import run_offline as replay
    else:
        from kfloc_ros.replay.session import run_replay as replay

    if args.offline and args.base_frame:
        raise ConfigError("--base-frame applies to the live nodes; --offline has no TF. Omit one of them.")
    requirements = [parse_requirement(text) for text in args.require]
    config = ReplayConfig(
        bag=args.bag,
        map=args.map,
        out=args.out,
        rate=args.rate,
        separate=args.separate,
        start_s=args.start,
        duration_s=args.duration,
        loops=args.loop,
        every_frame=args.every_frame,
        image_topic=args.image_topic,
        info_topic=args.camera_info_topic,
        tf=args.tf,
        rectified=args.rectified,
        base_frame=args.base_frame,
        truth=args.truth,
        truth_of=args.truth_of,
        device=args.device,
        filter=not args.no_filter,
        refine=not args.no_refine,
        patience_s=args.patience,
        domain_id=args.domain_id,
    )
    with result_folder(args.out, force=args.force):
        if not args.no_check:
            check_bag(args)
        with progress_bar(unit="frame", disable=args.quiet) as bar:

            def progress(text: str, done: int, total: int) -> None:
                bar.set_description_str(text, refresh=False)
                bar.total, bar.n = total, done
                bar.refresh()

            summary = replay(config, command=command_line(args.words), progress=progress)
    if not args.quiet:
        print(_what_was_played(summary.run.options, summary.run.poses))
        print(summary_table(summary))
        logs = "" if args.offline else f"; logs of the nodes: {args.out / 'logs'}"
        print(f"\nResults: {args.out / 'report.html'}; poses: {args.out / 'frames.csv'}{logs}")
    if summary.run.interrupted:
        print("Interrupted; the results cover the played part.", file=sys.stderr)
        return 130
    if not summary.run.processed:
        print(f"No image was processed. {_why_none(args.out, () if args.offline else config.nodes)}", file=sys.stderr)
        return 1
    figures = summary.to_dict()
    failures = [failure for item in requirements if (failure := item.failure(figures))]
    for failure in failures:
        print(f"Requirement not met: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _why_none(out: Path, nodes: Sequence[str]) -> str:
    """Return what the nodes warned of last, or else the most frequent reason in ``frames.csv``."""
    logs = [out / "logs" / f"{name}.log" for name in nodes]
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    warnings = [line.split("]: ", 1)[-1] for line in lines if line.startswith(("[WARN]", "[ERROR]"))]
    if warnings:
        return f"The nodes say: {' '.join(dict.fromkeys(warnings[-3:]))}"
    with (out / "frames.csv").open(encoding="utf-8", newline="") as stream:
        reasons = Counter(row["reason"] for row in csv.DictReader(stream))
    return reasons.most_common(1)[0][0] if reasons else ""


def _what_was_played(options: object, truth: str) -> str:
    assert isinstance(options, dict)
    kind = ", rectified" if options["rectified"] else ""
    return (
        f"Images: {options['image_topic']}{kind}; calibration: {options['camera_info_topic']}; ground truth: {truth}.\n"
    )


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"must lie between 1 and 10000, not {text}")
    return value
