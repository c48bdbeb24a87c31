# SPDX-License-Identifier: Apache-2.0
"""``kfloc replay``: a bag over DDS to the live nodes, and the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Play a bag with /clock over DDS to the live ROS 2 nodes, record what they answer, and evaluate it.

The nodes are started as processes of their own, in a ROS domain of their own, and end with this
command. Writes into OUT what `kfloc localize` writes, and the nodes' output into OUT/logs.
Ctrl-C stops early and still evaluates what was played.
"""

EPILOG = """\
examples:
  kfloc replay out/kitchen_bag --map maps/kitchen --out out/kitchen_live
  kfloc replay out/kitchen_bag --map maps/kitchen --out out/three --separate --start 10 --duration 20
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``replay`` subcommand."""
    parser = subparsers.add_parser(
        "replay",
        help="play a bag to the live ROS 2 nodes and evaluate what they answer",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", metavar="BAG", type=Path, help="rosbag2 folder, such as `kfloc bag make` writes")
    parser.add_argument("--map", required=True, metavar="DIR", help="map folder, or the name of a shipped map")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--rate", type=_positive, default=1.0, metavar="R", help="2 plays twice as fast (default: 1)")
    parser.add_argument("--separate", action="store_true", help="camera, filter and refiner in a process each")
    parser.add_argument("--start", type=_not_negative, default=0.0, metavar="S", help="seconds to skip")
    parser.add_argument("--duration", type=_positive, metavar="S", help="seconds to play (default: to the end)")
    parser.add_argument("--image-topic", metavar="TOPIC", help="which images to play where the bag has several")
    parser.add_argument(
        "--truth", metavar="WHERE",
        help="ground truth of the camera in the map: /TOPIC (PoseStamped, PoseWithCovarianceStamped, Odometry), "
        "tf:MAP:CAMERA, or a TUM file (default: the bag's one PoseStamped topic, if it has one)",
    )  # fmt: skip
    parser.add_argument("--no-filter", action="store_true", help="each frame on its own: no belief carried over")
    parser.add_argument("--no-refine", action="store_true", help="stop at the coarse pose")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run")
    parser.add_argument(
        "--domain-id", type=int, choices=range(102), metavar="N", help="ROS domain, 0 to 101 (default: a private one)"
    )
    parser.add_argument(
        "--patience", type=_positive, default=90.0, metavar="S", help="seconds for the nodes to come up (default: 90)"
    )
    parser.add_argument(
        "--require", action="append", default=[], metavar="FIGURE<=N",
        help="a figure of summary.json that must hold, such as recall.5cm_5deg>=0.95, or exit code 1; may be repeated",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc replay``; 0 when done, 1 if a requirement is not met, 130 when interrupted."""
    from tqdm import tqdm

    from kfloc_ros.cli.tables import summary_table
    from kfloc_ros.evaluation.report import command_line
    from kfloc_ros.evaluation.requirements import parse_requirement
    from kfloc_ros.replay import ReplayConfig, run_replay

    requirements = [parse_requirement(text) for text in args.require]
    config = ReplayConfig(
        bag=args.bag,
        map=args.map,
        out=args.out,
        rate=args.rate,
        separate=args.separate,
        start_s=args.start,
        duration_s=args.duration,
        image_topic=args.image_topic,
        truth=args.truth,
        device=args.device,
        filter=not args.no_filter,
        refine=not args.no_refine,
        patience_s=args.patience,
        domain_id=args.domain_id,
    )
    with tqdm(unit="frame", disable=args.quiet or not sys.stderr.isatty()) as bar:

        def progress(text: str, done: int, total: int) -> None:
            bar.set_description_str(text, refresh=False)
            bar.total, bar.n = total, done
            bar.refresh()

        summary = run_replay(config, command=command_line(sys.argv[1:]), progress=progress)
    if not args.quiet:
        print(summary_table(summary))
        print(f"\nResults: {args.out / 'report.html'}; output of the nodes: {args.out / 'logs'}")
    if summary.run.interrupted:
        print("Interrupted; the results cover what was played until then.", file=sys.stderr)
        return 130
    figures = summary.to_dict()
    failures = [failure for item in requirements if (failure := item.failure(figures))]
    for failure in failures:
        print(f"Not met: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _positive(text: str) -> float:
    value = _not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"must be 0 or more, and finite, not {text}")
    return value
