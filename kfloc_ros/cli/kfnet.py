# SPDX-License-Identifier: Apache-2.0
"""``kfloc kfnet`` and ``kfloc pnp``: KFNet's networks and poses, on folders in KFNet's format, without a map."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from kfloc_ros.jobs import add_jobs_arguments, run_parts, workers_from

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


MAPS_PER_PART = 8

PNP = """\
Compute the camera pose of every coordinate map (coord_<i>.npy: h x w x 4 float32, world coordinates in metres and
1/sigma) of a folder or a list file. Writes OUT/pose_<i>.txt (4x4, camera to world; nan if there is no pose),
poses.json, and with --gt the errors. The pixel of a cell and the camera are read from the folder's coordinates.json.
Without that file they are the original's: pixel (8 c, 8 r), 640x480, focal length 525 px, centre (320, 240).
"""

PNP_EXAMPLES = """\
examples:
  kfloc pnp out/coordinates --out out/poses --gt gt_list.txt
  kfloc pnp coord_list.txt --out out/poses --camera 848 480 744 744 424 240 --jobs 32
"""


def add_pnp_parser(subparsers: Any) -> None:
    """Register ``kfloc pnp``."""
    from kfloc_ros.kfnet.reference.files import MIN_CONFIDENCE_PER_M

    parser = subparsers.add_parser(
        "pnp",
        help="compute camera poses from scene-coordinate maps in KFNet's format",
        description=PNP,
        epilog=PNP_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("maps", type=Path, metavar="MAPS", help="folder, or text file with one .npy per line")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the poses")
    parser.add_argument("--gt", type=Path, metavar="LIST", help="text file with one true 4x4 pose file per line")
    parser.add_argument(
        "--camera", type=float, nargs=6, metavar=("W", "H", "FX", "FY", "CX", "CY"), help="camera of the images"
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=MIN_CONFIDENCE_PER_M,
        metavar="C",
        help=f"ignore cells with a smaller 1/sigma, in 1/m (default: {MIN_CONFIDENCE_PER_M:g}; 0 uses all)",
    )
    parser.add_argument("--max-error-px", type=float, default=10.0, metavar="PX", help="inlier threshold (default: 10)")
    add_jobs_arguments(parser, "maps", jobs=os.cpu_count() or 1)
    parser.set_defaults(run_action=run_pnp)


def run_pnp(args: argparse.Namespace) -> int:
    """Run ``kfloc pnp``; return 1 if no pose was found."""
    from dataclasses import replace

    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.errors import SourceError
    from kfloc_ros.evaluation.metrics import accuracy, pose_error
    from kfloc_ros.kfnet.pnp import PnpSettings
    from kfloc_ros.kfnet.reference.files import (
        PnpJob,
        PnpPart,
        find_maps,
        parse_camera,
        read_description,
        read_list,
        read_pose,
        solve_part,
        write_pose,
    )

    maps = find_maps(args.maps)
    truths = [read_pose(path) for path in read_list(args.gt)] if args.gt else None
    if truths is not None and len(truths) != len(maps):
        raise SourceError(f"'{args.gt}' lists {len(truths)} poses for {len(maps)} coordinate maps.")
    description = read_description(maps[0].parent)
    if args.camera:
        description = replace(description, camera=parse_camera(args.camera))
    job = PnpJob(description, PnpSettings(max_error_px=args.max_error_px), args.min_confidence)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    parts = [PnpPart(tuple(maps[i : i + MAPS_PER_PART]), job) for i in range(0, len(maps), MAPS_PER_PART)]
    with progress_bar(total=len(maps), unit="map") as bar:
        poses = run_parts(
            solve_part, parts, workers_from(args), on_done=lambda number: bar.update(len(parts[number].paths))
        )
    entries: list[dict[str, Any]] = []
    errors = []
    for i, pose in enumerate(pose for found in poses for pose in found):
        write_pose(args.out / f"pose_{i}.txt", pose.T_map_camera)
        entry: dict[str, Any] = {
            "map": str(maps[i]),
            "success": pose.success,
            "reason": pose.reason,
            "inliers": pose.inlier_count,
            "inlier_ratio": pose.inlier_ratio,
        }
        truth = truths[i] if truths is not None else None
        if truth is not None:
            error = pose_error(pose.T_map_camera, truth)
            errors.append(error)
            entry["translation_m"], entry["rotation_deg"] = _finite(error.translation_m), error.rotation_deg
        entries.append(entry)
    solved = sum(entry["success"] for entry in entries)
    content: dict[str, Any] = {"maps": len(maps), "solved": solved, "seconds": time.perf_counter() - start}
    print(f"{solved} of {len(maps)} poses in {content['seconds']:.1f} s: {args.out}")
    if errors:
        result = accuracy(errors)
        content["median_translation_m"] = _finite(result.median_translation_m)
        content["median_rotation_deg"] = result.median_rotation_deg
        content["recall"] = dict(result.recall)
        print(f"median error {100 * result.median_translation_m:.2f} cm, {result.median_rotation_deg:.2f} deg")
        for name, share in result.recall.items():
            print(f"within {name.replace('cm_', ' cm, ').replace('deg', ' deg')}: {100 * share:.1f} %")
    content["poses"] = entries
    (args.out / "poses.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0 if solved else 1


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
