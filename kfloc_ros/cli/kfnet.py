# SPDX-License-Identifier: Apache-2.0
"""``kfloc kfnet``: KFNet's networks on folders in KFNet's format, without a map."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EVAL = """\
Evaluate KFNet's networks on a folder with image_list.txt and label_list.txt, as the original's eval scripts do. Writes
to the output folder:
  scoordnet   coord_<i>.npy of the measurements
  oflownet    <i>_<i - 1>_flow.npy of consecutive images
  kfnet       coord_<i>.npy of the filter with the published recursion, reset at every sequence of the list
and evaluation.json with the printed figures. A frame's error is the median distance of its cells to their labels; the
figures are median, mean and standard deviation over the frames of d_m (measurement), d_t (prior) and d_kf (posterior),
the mean share of cells below 2 cm, and the share of the axes' NIS within the chi-square band of 80 %.
"""

EVAL_EXAMPLE = """\
examples:
  kfloc labels 7scenes:DIR@test --out fire/test
  kfloc kfnet eval scoordnet --input fire/test --output out/s --model weights/fire/scoordnet.safetensors
  kfloc kfnet eval kfnet --input fire/test --output out/kf --model weights/fire
  kfloc pnp out/kf --out out/poses --gt fire/test/pose_list.txt
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc kfnet``."""
    parser = subparsers.add_parser("kfnet", help="evaluate KFNet's networks on a folder in KFNet's format")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    evaluate = actions.add_parser(
        "eval",
        help="errors of networks against a folder's labels",
        description=EVAL,
        epilog=EVAL_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("stage", choices=("scoordnet", "oflownet", "kfnet"), help="network, or both with the filter")
    evaluate.add_argument(
        "--input",
        "--input_folder",
        dest="input",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the lists",
    )
    evaluate.add_argument(
        "--output", "--output_folder", dest="output", type=Path, required=True, metavar="FOLDER", help="folder to write"
    )
    evaluate.add_argument(
        "--model",
        "--model_folder",
        dest="model",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="scoordnet.safetensors, oflownet.safetensors, a folder with them, or the .npz of a checkpoint, whose "
        "SCoordNet needs the transform.txt of the input folder",
    )
    evaluate.add_argument(
        "--scene", metavar="NAME", help="scene of the tables, such as fire: image size, and the scale of an .npz"
    )
    evaluate.add_argument(
        "--nis", "--NIS", dest="nis", action="store_true", help="kfnet: emit the measurement where the NIS test fails"
    )
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    evaluate.set_defaults(run_action=run_eval)

    _add_report(actions)


REPORT = """\
Compare one-shot with filtered localization as in KFNet's paper, from result folders: per scene and as means over the
scenes that have both, in Markdown. Rows of different ground truth stand apart, and each names its own.

RESULT is a folder of `kfloc localize` (with --no-filter: one-shot) or `kfloc replay`, of `kfloc pnp`, or of `kfloc
kfnet eval` (errors of scene coordinates against labels). If a folder does not say which of the two it is, put
one-shot: or filtered: before its name.
"""

REPORT_EXAMPLE = """\
examples:
  kfloc localize 7scenes:DIR@test --map maps/fire --no-filter --out out/fire_one
  kfloc localize 7scenes:DIR@test --map maps/fire --out out/fire_kf
  kfloc kfnet report out/fire_one out/fire_kf out/chess_one out/chess_kf --out report.md
  kfloc kfnet report out/kf one-shot:out/poses_m filtered:out/poses_kf
"""


def _add_report(actions: Any) -> None:
    report = actions.add_parser(
        "report",
        help="one-shot against filtered, per scene and as means",
        description=REPORT,
        epilog=REPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("results", nargs="+", metavar="RESULT", help="result folder, or METHOD:FOLDER")
    report.add_argument("--out", type=Path, metavar="FILE", help="also write the report to this file (.md)")
    report.set_defaults(run_action=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Run ``kfloc kfnet report``; print the tables."""
    from kfloc_ros.evaluation.kfnet_report import METHODS, read_results, report_text

    results = []
    for word in args.results:
        method, _, path = word.partition(":")
        known = method in METHODS
        results += read_results(Path(path if known else word), method if known else None)
    text = report_text(results)
    print(text, end="")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Run ``kfloc kfnet eval``; print the figures."""
    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.datasets.posed_images import read_calibration
    from kfloc_ros.datasets.scenes import find_scene
    from kfloc_ros.device import choose_device
    from kfloc_ros.evaluation.kfnet import LabelledFolder, evaluation_of, report_of
    from kfloc_ros.kfnet.reference.files import MapDescription, write_description
    from kfloc_ros.kfnet.reference.weights import read_networks

    scene = find_scene(args.scene) if args.scene else None
    folder = LabelledFolder(args.input, None if scene is None else scene.image_size)
    device = choose_device(args.device)
    networks = read_networks(args.model, args.input / "transform.txt", 1.0 if scene is None else scene.scale).to(device)
    evaluation = evaluation_of(args.stage, networks, folder.size, nis_test=args.nis)
    args.output.mkdir(parents=True, exist_ok=True)
    done = evaluation.run(folder, args.output)
    count = sum(1 for _ in progress_bar(done, total=len(folder), unit="image"))
    camera = args.input / "camera.txt"
    if args.stage != "oflownet" and camera.is_file():  # for `kfloc pnp`
        entries = [{"map": f"coord_{i}.npy", "index": i} for i in range(count)]
        write_description(args.output, MapDescription(read_calibration(camera)), entries)
    report = report_of(evaluation)
    content = {"stage": args.stage, "input": str(args.input), "images": count, **report}
    (args.output / "evaluation.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(f"{args.output}: {count} images")
    for name, figures in report.items():
        if name != "nis_share":
            print(
                f"{name}: median {figures['median_cm']:.2f} cm, mean {figures['mean_cm']:.2f} cm, "
                f"std {figures['std_cm']:.2f} cm; {100 * figures['near']:.1f} % below 2 cm; "
                f"sigma {figures['sigma_cm']:.2f} cm; {figures['frames']} frames"
            )
    if "nis_share" in report:
        print(f"NIS within the band of 80 %: {100 * report['nis_share']:.1f} %")
    return 0
