# SPDX-License-Identifier: Apache-2.0
"""``kfloc show``: pictures, videos, point clouds and pages of the localizer's intermediate results."""

from __future__ import annotations

import argparse
from pathlib import Path

from kfloc_ros.cli.arguments import add_source_arguments, not_negative, positive

DESCRIPTION = """\
Run the localizer over SOURCE in a map and draw its intermediate results.

  cells       scene coordinates: coloured point clouds per frame and of all frames (PLY), and pictures
  filter      noise of measurement, process and posterior, NIS and flow, side by side
  flow        motion of the cells since the previous frame, without uncertain flow
  trajectory  truth and estimate of a result folder in two colours, beside the images
  confidence  reliability of the features
  alignment   one frame: the map's points over the image before and after the alignment, and its steps
  basin       basin of convergence of the alignment
  html        one interactive page: points, cameras, and every step of every alignment

Pictures are written to OUT/VERB/<frame>.png, and for several frames a video to OUT/VERB.mp4.
"""

EPILOG = """\
examples:
  kfloc show filter 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/filter
  kfloc show cells out/coordinates --out out/cells           # files of `kfloc coordinates`, or of the original KFNet
  kfloc show trajectory out/kitchen --out out/video          # result folder of `kfloc localize`
  kfloc show alignment 7scenes:DIR --frame 160 --map maps/kitchen --out out/alignment --offset-m 0.15
  kfloc show html 7scenes:DIR --frames 150:200:5 --map maps/kitchen --out out/page

`kfloc show VERB --help` describes one verb.
"""

VERBS = {
    "cells": (
        "scene coordinates as coloured point clouds",
        "Scene coordinates of every frame: OUT/cells/<frame>.ply with x y z, the image's colours and sigma. All\n"
        "frames together: OUT/cloud.ply and a picture of it. Pictures: image, coordinates, noise, the cloud so far.\n"
        "SOURCE can also be a folder of coord_<i>.npy in KFNet's format, one such file, or a list of them. They need\n"
        "no --map. Their points are coloured by their standard deviation, or with --images by the images.",
        "examples:\n"
        "  kfloc show cells 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/cells\n"
        "  kfloc show cells out/coordinates --out out/cells --images fire/test/image_list.txt --step 10\n"
        "  kfloc show cells coord_12.npy --out out/one --thres 20\n",
    ),
    "filter": (
        "noise, NIS and flow of the filter",
        "Six pictures per frame. Upper row: the image; the standard deviation of the measurement; the normalized\n"
        "innovation squared (white at the threshold, red where prior and measurement contradict each other).\n"
        "Lower row: the backward flow; the process noise of the prediction; the standard deviation of the posterior.\n"
        "Colours are the same in every frame and run. Grey: no valid value. With --inverse, noise is drawn as KFNet\n"
        "draws it: bright where sure.",
        "example:\n  kfloc show filter 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/filter\n",
    ),
    "flow": (
        "motion of the image's cells",
        "Two pictures per frame: arrows from the previous to the current position of the cells, and the backward\n"
        "flow in colours (key in the corner). Flow that fails its test, or whose standard deviation is above\n"
        "0.9 cells, is omitted.\n"
        "SOURCE can also be a folder of <a>_<b>_flow.npy in KFNet's format, one such file, or a list of them, without\n"
        "--map. With --images (a list, a folder, or two images), arrows lead from the cells of image a to where\n"
        "they lie in image b, over the two images.",
        "examples:\n"
        "  kfloc show flow 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/flow\n"
        "  kfloc show flow out/flows --images fire/test/image_list.txt --out out/flow\n"
        "  kfloc show flow 8_7_flow.npy --images 8.png 7.png --out out/flow --thres 100\n",
    ),
    "trajectory": (
        "truth and estimate of a result folder, beside the images",
        "A video of a result folder of `kfloc localize`, `kfloc replay` or `kfloc pnp`, or of the file of `kfloc\n"
        "pixloc run`: the image, and the plan from above with the true path in green and the estimated one in red,\n"
        "with the frame's error. The images are of the SOURCE that was localized, if it is still there; --source or\n"
        "--images names others.",
        "examples:\n"
        "  kfloc show trajectory out/kitchen --out out/video\n"
        "  kfloc show trajectory out/poses --gt test/pose_list.txt --images test/image_list.txt --out out/video\n",
    ),
    "confidence": (
        "reliability of the features",
        "Two pictures per frame: the image, and over it the backbone's reliability, the weight of an alignment's "
        "points. With --weights, and no --map: the confidences of PixLoc's network at its levels, and their mean.",
        "examples:\n"
        "  kfloc show confidence 7scenes:DIR --frames 150:200 --map maps/kitchen --out out/confidence\n"
        "  kfloc show confidence 7scenes:DIR --weights pixloc_megadepth.safetensors --out out/confidence\n",
    ),
    "alignment": (
        "steps of one alignment",
        "One frame: the reference views' points over the image, projected by the initial and final pose, coloured by\n"
        "the residual of their features and by their weight; and cost and distance to the final pose by step.\n"
        "The initial pose is the coarse pose; with --offset-m or --offset-deg it is the final pose plus an offset.\n"
        "With --rerun: the map's points, the reference views and the camera at every step, in 3-D.",
        "example:\n"
        "  kfloc show alignment 7scenes:DIR --frame 160 --map maps/kitchen --out out/alignment --offset-m 0.15\n",
    ),
    "basin": (
        "basin of convergence of the alignment",
        "For the given frames, the alignment starts at the reference pose plus offsets of given lengths and angles in\n"
        "random directions. OUT/basin.png shows the share that converges, and the final error; basin.csv has the\n"
        "numbers. The reference pose is the result of an alignment that starts at the source's own pose.",
        "example:\n  kfloc show basin 7scenes:DIR --frames 150:190:20 --map maps/kitchen --out out/basin\n",
    ),
    "html": (
        "one interactive page",
        "OUT/localization.html, a single file that needs no network: the map's points, the coloured points of the\n"
        "frames, reference views and cameras in 3-D, and beside them the image with the map's points projected by the\n"
        "initial pose and by the selected step of the frame's alignment. Sliders select frame and step.",
        "example:\n  kfloc show html 7scenes:DIR --frames 150:200:5 --map maps/kitchen --out out/page\n",
    ),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register ``kfloc show`` and its verbs."""
    parser = subparsers.add_parser(
        "show",
        help="draw results: cells, filter, flow, confidence, trajectory, alignment, basin, a page",
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
    if name == "trajectory":
        verb.add_argument("result", type=Path, metavar="RESULT", help="result folder, or file of `kfloc pixloc run`")
        verb.add_argument("--source", metavar="SOURCE", help="frames with the images (default: named by the result)")
        verb.add_argument("--gt", type=Path, metavar="LIST", help="for `kfloc pnp`: list of the true pose files")
    else:
        add_source_arguments(verb)
        needed = name not in ("cells", "flow", "confidence")
        verb.add_argument("--map", required=needed, metavar="DIR", help="map folder, or the name of a shipped map")
    verb.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    if name in ("cells", "flow", "trajectory"):
        verb.add_argument(
            "--images",
            type=Path,
            nargs="+",
            metavar="PATH",
            help="with files: list or folder of their images, or images",
        )
        verb.add_argument(
            "--step", type=_count, default=1, metavar="N", help="with files: draw every N-th (default: 1)"
        )
    if name in ("cells", "flow"):
        limit = verb.add_mutually_exclusive_group()
        usual = "0.05 for files, else 0.1" if name == "cells" else "0.01 for files"
        limit.add_argument(
            "--max-sigma",
            type=positive,
            metavar="M",
            help=f"omit points with a larger standard deviation (default: {usual})",
        )
        limit.add_argument(
            "--thres", dest="max_sigma", type=_confidence, metavar="C", help="the same as KFNet's 1/sigma, in 1/m"
        )
    if name == "confidence":
        verb.add_argument("--weights", type=Path, metavar="FILE", help="model of PixLoc, instead of a map")
        verb.add_argument(
            "--resize", type=_count, default=1024, metavar="PX", help="longer side of PixLoc's images (default: 1024)"
        )
    if name in ("cells", "filter"):
        verb.add_argument("--inverse", action="store_true", help="draw noise bright where sure, as KFNet does")
    if name in ("cells", "filter", "flow", "confidence", "trajectory"):
        group = verb.add_argument_group("output")
        group.add_argument("--no-pictures", action="store_true", help="write only the video")
        group.add_argument("--no-video", action="store_true", help="write only the pictures")
        group.add_argument(
            "--codec",
            choices=("vp9", "mpeg4"),
            default="vp9",
            help="codec: vp9 plays everywhere; mpeg4 is written 30 times faster, but browsers do not play it",
        )
        group.add_argument("--fps", type=positive, default=10.0, help="frame rate of the video, in Hz (default: 10)")
    if name in ("cells", "filter", "alignment"):
        viewer = verb.add_argument_group("Rerun viewer (needs the package rerun-sdk)")
        viewer.add_argument("--rerun", action="store_true", help=f"write OUT/{name}.rrd")
        viewer.add_argument("--live", action="store_true", help="open the viewer; needs a display")
    if name == "cells":
        verb.add_argument("--no-filter", action="store_true", help="use the measurements only, without filtering")
        verb.add_argument(
            "--rotate", type=_angle, default=0.0, metavar="DEG", help="with files: rotate the points about the x axis"
        )
        verb.add_argument(
            "--voxel",
            type=positive,
            default=0.02,
            metavar="M",
            help="keep one point per cube of this side (default: 0.02)",
        )
    if name == "alignment":
        verb.add_argument("--frame", required=True, type=_index, metavar="N", help="index of the frame")
        verb.add_argument(
            "--offset-m",
            type=not_negative,
            default=0.0,
            metavar="M",
            help="offset of the start along the camera's x axis",
        )
        verb.add_argument(
            "--offset-deg",
            type=not_negative,
            default=0.0,
            metavar="DEG",
            help="rotation of the start about the camera's y axis",
        )
    if name == "basin":
        verb.add_argument(
            "--offsets-m", type=_numbers, default=(0.0, 0.05, 0.1, 0.2, 0.3, 0.5), metavar="M,M,...",
            help="distances of the initial poses (default: 0,0.05,0.1,0.2,0.3,0.5)",
        )  # fmt: skip
        verb.add_argument(
            "--offsets-deg", type=_numbers, default=(0.0, 2.0, 5.0, 10.0, 15.0), metavar="DEG,DEG,...",
            help="rotations of the initial poses (default: 0,2,5,10,15)",
        )  # fmt: skip
        verb.add_argument(
            "--starts", type=_count, default=4, metavar="N", help="number of starts per offset and frame (default: 4)"
        )
        verb.add_argument("--seed", type=int, default=0, help="seed of the directions (default: 0)")
    if name == "html":
        verb.add_argument(
            "--width", type=_count, default=480, metavar="PX", help="width of the images in the page (default: 480)"
        )


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc show``."""
    # Imported late, so that --help does not load torch.
    from kfloc_ros.cli import show_alignment, show_stream

    actions = {
        "cells": show_stream.cells,
        "filter": show_stream.filter_sheets,
        "flow": show_stream.flow,
        "confidence": show_stream.confidence,
        "trajectory": show_stream.trajectory,
        "alignment": show_alignment.alignment,
        "basin": show_alignment.basin,
        "html": show_alignment.page,
    }
    written = actions[args.verb](args)
    print("\n".join(written))
    return 0


def _angle(text: str) -> float:
    return not_negative(text.removeprefix("-")) * (-1.0 if text.startswith("-") else 1.0)


def _confidence(text: str) -> float:
    return 1.0 / positive(text)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(sorted({not_negative(part) for part in text.split(",")}))


def _count(text: str) -> int:
    return max(round(positive(text)), 1)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a frame index")
    return int(text)
