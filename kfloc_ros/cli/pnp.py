# SPDX-License-Identifier: Apache-2.0
"""``kfloc pnp``: camera poses from scene-coordinate maps in KFNet's format."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from kfloc_ros.jobs import add_jobs_arguments, run_parts, workers_from

MAPS_PER_PART = 8

DESCRIPTION = """\
Compute the camera pose of every coordinate map (coord_<i>.npy: h x w x 4 float32, world coordinates in metres and
1/sigma) of a folder or a list file. Writes OUT/pose_<i>.txt (4x4, camera to world; nan if there is no pose),
poses.json, and with --gt the errors. The pixel of a cell and the camera are read from the folder's coordinates.json.
Without that file they are the original's: pixel (8 c, 8 r), 640x480, focal length 525 px, centre (320, 240).
"""

EPILOG = """\
examples:
  kfloc pnp out/coordinates --out out/poses --gt gt_list.txt
  kfloc pnp coord_list.txt --out out/poses --camera 848 480 744 744 424 240 --jobs 32
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc pnp``."""
    from kfloc_ros.kfnet.reference.files import MIN_CONFIDENCE_PER_M

    parser = subparsers.add_parser(
        "pnp",
        help="compute camera poses from scene-coordinate maps in KFNet's format",
        description=DESCRIPTION,
        epilog=EPILOG,
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


def run(args: argparse.Namespace) -> int:
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
