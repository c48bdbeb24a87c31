# SPDX-License-Identifier: Apache-2.0
"""``kfloc show``: what the localizer sees, believes and does, as pictures, videos, point clouds and pages."""

from __future__ import annotations

import argparse
from pathlib import Path

from kfloc_ros.cli.arguments import add_source_arguments

DESCRIPTION = """\
See what happens inside: run the localizer over SOURCE in a map and draw it.

  cells       scene coordinates: a coloured point cloud of every frame and of all (PLY), and pictures
  filter      noise of measurement, process and posterior, NIS and flow, side by side
  flow        how the cells moved since the frame before; uncertain flow is suppressed
  confidence  how reliable the features are
  alignment   one frame: the map's points over the image, before and after the alignment, and the way between
  basin       from how far away the alignment finds back
  html        one page to look around in: points, cameras, and every step of every alignment

Pictures go to OUT/VERB/<frame>.png, and with several frames a video to OUT/VERB.mp4.
"""

EPILOG = """\
examples:
  kfloc show filter 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/filter
  kfloc show cells out/coordinates --out out/cells           # files of `kfloc coordinates`, or of KFNet itself
  kfloc show alignment 7scenes:DIR --frame 160 --map maps/kitchen --out out/alignment --offset-m 0.15
  kfloc show html 7scenes:DIR --frames 150:200:5 --map maps/kitchen --out out/page

`kfloc show VERB --help` explains one of them.
"""

VERBS = {
    "cells": (
        "scene coordinates as coloured point clouds",
        "Scene coordinates of every frame: OUT/cells/<frame>.ply with x y z, the image's colours and sigma; of all\n"
        "frames together OUT/cloud.ply and a picture of it; and sheets: image, coordinates, noise, the cloud so far.\n"
        "SOURCE may also be a folder of coord_<i>.npy in KFNet's format; it needs no --map, and has no image, so that\n"
        "its points are coloured by their standard deviation.",
        "examples:\n"
        "  kfloc show cells 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/cells\n"
        "  kfloc show cells out/coordinates --out out/cells\n",
    ),
    "filter": (
        "noise, NIS and flow of the filter",
        "Six pictures a frame. Upper row: the image; the standard deviation of the measurement; the normalised\n"
        "innovation squared, white at the threshold, red where prior and measurement contradict each other.\n"
        "Lower row: the backward flow; the noise that carrying the belief along it adds; what the update leaves.\n"
        "The colours are the same in every frame and run. Grey: no value, or not valid.",
        "example:\n  kfloc show filter 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/filter\n",
    ),
    "flow": (
        "how the image's cells moved",
        "Two pictures a frame: arrows from where cells were in the frame before to where they are now, and the\n"
        "backward flow in colours (key in the corner). Flow that fails its test, or whose standard deviation is above\n"
        "0.9 cells, is left out.",
        "example:\n  kfloc show flow 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/flow\n",
    ),
    "confidence": (
        "how reliable the features are",
        "Two pictures a frame: the image, and over it the backbone's reliability, which weighs an alignment's points.",
        "example:\n  kfloc show confidence 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/confidence\n",
    ),
    "alignment": (
        "one alignment, from start to end",
        "One frame: the reference views' points over the image where the pose at the start and at the end puts them,\n"
        "coloured by the residual of their features and by their weight; and cost and distance to the end by step.\n"
        "The start is the coarse pose; with --offset-m or --offset-deg, the end moved away, to see it find back.\n"
        "With --rerun: the map's points, the reference views and the camera at every step, in 3-D.",
        "example:\n"
        "  kfloc show alignment 7scenes:DIR --frame 160 --map maps/kitchen --out out/alignment --offset-m 0.15\n",
    ),
    "basin": (
        "from how far away the alignment finds back",
        "For a few frames the alignment is started from poses that are moved and turned away from the right one by\n"
        "given amounts in random directions. OUT/basin.png: the share that comes back, and how near; basin.csv: the\n"
        "numbers. The right pose is where the alignment ends from the source's own pose.",
        "example:\n  kfloc show basin 7scenes:DIR --frames 150:190:20 --map maps/kitchen --out out/basin\n",
    ),
    "html": (
        "one page to look around in",
        "OUT/localization.html, which needs nothing beside it and no network: the map's points, the coloured points\n"
        "of the frames, reference views and cameras in 3-D, and beside it the image with the map's points over it, at\n"
        "the start and at the chosen step of the frame's alignment. Sliders step through frames and alignments.",
        "example:\n  kfloc show html 7scenes:DIR --frames 150:200:5 --map maps/kitchen --out out/page\n",
    ),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``kfloc show`` and its verbs."""
    parser = subparsers.add_parser(
        "show",
        help="see what happens inside: cells, filter, flow, confidence, alignment, basin, a page",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", dest="verb", required=True)
    for name, (text, description, epilog) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=text,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(name, verb)


def _add_arguments(name: str, verb: argparse.ArgumentParser) -> None:
    add_source_arguments(verb)
    verb.add_argument("--map", required=name != "cells", metavar="DIR", help="map folder, or the name of a shipped map")
    verb.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run")
    if name in ("cells", "filter", "flow", "confidence"):
        group = verb.add_argument_group("what is written")
        group.add_argument("--no-pictures", action="store_true", help="the video alone")
        group.add_argument("--no-video", action="store_true", help="the pictures alone")
        group.add_argument(
            "--codec",
            choices=("vp9", "mpeg4"),
            default="vp9",
            help="of the video: vp9 plays everywhere, mpeg4 is written 30 times faster, but browsers do not play it",
        )
        group.add_argument("--fps", type=_positive, default=10.0, help="pictures a second of the video (default: 10)")
    if name in ("cells", "filter", "alignment"):
        viewer = verb.add_argument_group("Rerun viewer (needs the package rerun-sdk)")
        viewer.add_argument("--rerun", action="store_true", help=f"write OUT/{name}.rrd")
        viewer.add_argument("--live", action="store_true", help="open the viewer now; needs a display")
    if name == "cells":
        verb.add_argument("--no-filter", action="store_true", help="each frame's measurement alone")
        verb.add_argument(
            "--max-sigma", type=_positive, default=0.1, metavar="M", help="leave out less certain points (default: 0.1)"
        )
        verb.add_argument(
            "--voxel", type=_positive, default=0.02, metavar="M", help="one point per cube of this side (default: 0.02)"
        )
    if name == "alignment":
        verb.add_argument("--frame", required=True, type=_index, metavar="N", help="index of the frame")
        verb.add_argument("--offset-m", type=_not_negative, default=0.0, metavar="M", help="move the start sideways")
        verb.add_argument(
            "--offset-deg", type=_not_negative, default=0.0, metavar="DEG", help="turn the start sideways"
        )
    if name == "basin":
        verb.add_argument(
            "--offsets-m", type=_numbers, default=(0.0, 0.05, 0.1, 0.2, 0.3, 0.5), metavar="M,M,...",
            help="distances of the starts (default: 0,0.05,0.1,0.2,0.3,0.5)",
        )  # fmt: skip
        verb.add_argument(
            "--offsets-deg", type=_numbers, default=(0.0, 2.0, 5.0, 10.0, 15.0), metavar="DEG,DEG,...",
            help="turns of the starts (default: 0,2,5,10,15)",
        )  # fmt: skip
        verb.add_argument(
            "--starts", type=_count, default=4, metavar="N", help="starts of each kind and frame (default: 4)"
        )
        verb.add_argument("--seed", type=int, default=0, help="of the directions (default: 0)")
    if name == "html":
        verb.add_argument(
            "--width", type=_count, default=480, metavar="PX", help="of the images in the page (default: 480)"
        )


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc show``."""
    # Imported late: --help does not wait for torch.
    from kfloc_ros.cli import show_alignment, show_stream

    actions = {
        "cells": show_stream.cells,
        "filter": show_stream.filter_sheets,
        "flow": show_stream.flow,
        "confidence": show_stream.confidence,
        "alignment": show_alignment.alignment,
        "basin": show_alignment.basin,
        "html": show_alignment.page,
    }
    written = actions[args.verb](args)
    print("\n".join(written))
    return 0


def _positive(text: str) -> float:
    value = _not_negative(text)
    if value == 0.0:
        raise argparse.ArgumentTypeError("a number above 0 is needed")
    return value


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(sorted({_not_negative(part) for part in text.split(",")}))


def _count(text: str) -> int:
    return max(round(_positive(text)), 1)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not the index of a frame")
    return int(text)
