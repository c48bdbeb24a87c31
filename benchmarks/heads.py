# SPDX-License-Identifier: Apache-2.0
"""Alignment with and without alignment heads: the same frames, the same coarse poses, one run.

Every frame of a SOURCE is aligned from its coarse pose by the plain refiner and with every file of heads, in turns.
None rejects anything, so that only the alignment is compared. Basins are of every ``--basin-every``-th frame, started
beside the truth in random directions, the same for all; a start converges that ends within 2 cm and 2 deg.

    python benchmarks/heads.py 7scenes:DATA/7scenes/redkitchen --poses sfm --split blocks50:test --map MAP \
        --heads out/heads/heads_best.safetensors --json out/heads.json
    python benchmarks/heads.py sim:localize --map maps/demo_room --heads out/heads/heads_best.safetensors
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.evaluation.hardware import describe_hardware
from kfloc_ros.evaluation.metrics import PoseError, pose_error, recall
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.localization.coarse import CoarseStage
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.heads import load_heads
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings
from kfloc_ros.types import Alignment, Frame

STARTS = ((0.05, 2.0), (0.10, 4.0), (0.20, 8.0), (0.30, 12.0))
"""Distances in metres and degrees, both in random directions."""
CONVERGED_M, CONVERGED_DEG = 0.02, 2.0
UNLIMITED = {"max_cost": math.inf, "max_correction_m": math.inf, "max_correction_deg": math.inf}


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--heads", required=True, type=Path, nargs="+", metavar="FILE", help="of `kfloc train heads`")
    parser.add_argument("--basin-every", type=int, default=10, metavar="N", help="frames between basins (default: 10)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = open_source_from(args, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    settings = RefinerSettings(**UNLIMITED)
    refiners = {
        "XFeat": Refiner(scene_map.references, scene_map.camera, settings),
    }
    for path in args.heads:
        name = "heads" if len(args.heads) == 1 else str(path)
        refiners[name] = Refiner(scene_map.references, scene_map.camera, settings, load_heads(path))
    stage = CoarseStage(scene_map, LocalizerConfig(device="cpu"))
    adapter = ImageAdapter(source.camera, scene_map.camera)
    errors: dict[str, list[PoseError]] = defaultdict(list)
    times_ms: dict[str, list[float]] = defaultdict(list)
    basins: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in ("coarse", *refiners)}
    for position in range(len(source)):
        frame = source[position]
        truth = frame.T_map_camera
        if truth is None:
            continue
        shown = Frame(adapter(frame.image), adapter.target, frame.stamp_ns, frame.index, frame.name)
        result = stage.process(shown)
        coarse = result.pose.T_map_camera
        errors["coarse"].append(pose_error(coarse, truth))
        order = list(refiners) if position % 2 else list(reversed(refiners))
        for name in order:
            begin = time.process_time()
            found = None if coarse is None else refiners[name].align(result.features, [coarse])
            times_ms[name].append(1e3 * (time.process_time() - begin))
            errors[name].append(pose_error(end_of(found), truth))
        if position % args.basin_every == 0:
            rng = np.random.default_rng(position)
            for distance_m, angle_deg in STARTS:
                start = truth @ beside(distance_m, angle_deg, rng)
                for name in order:
                    error = pose_error(end_of(refiners[name].align(result.features, [start])), truth)
                    basins[name][f"{100 * distance_m:.0f} cm, {angle_deg:.0f} deg"].append(
                        error.translation_m < CONVERGED_M and error.rotation_deg < CONVERGED_DEG
                    )
    rows = {name: summary(errors[name], times_ms.get(name, []), basins[name]) for name in errors}
    for name, row in rows.items():
        print(f"{name:8s}" + "  ".join(f"{key} {value:.3g}" for key, value in row.items()))
    if args.json is not None:
        content = {
            "source": source.name, "map": str(args.map), "heads": [str(path) for path in args.heads],
            "frames": len(errors["coarse"]), "rows": rows, "hardware": describe_hardware(),
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def end_of(alignment: Alignment | None) -> Matrix | None:
    """Where an alignment ended, accepted or not."""
    return None if alignment is None else alignment.T_map_camera


def beside(distance_m: float, angle_deg: float, rng: np.random.Generator) -> Matrix:
    """A motion of this size in random directions."""
    shift, axis = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 3)))
    return make_pose(so3_exp(np.radians(angle_deg) * axis), distance_m * shift)


def summary(errors: list[PoseError], times_ms: list[float], basin: dict[str, list[bool]]) -> dict[str, Any]:
    """Recall in %, medians, time, basin in %."""
    row: dict[str, Any] = {
        f"{k} cm/{k} deg %": 100 * recall(errors, k / 100, float(k)) for k in (1, 2, 5)
    }  # fmt: skip
    row["median cm"] = 100 * float(np.median([e.translation_m for e in errors]))
    row["median deg"] = float(np.median([e.rotation_deg for e in errors]))
    row["mean cm (best 95 %)"] = 100 * float(
        np.mean(np.sort([e.translation_m for e in errors])[: math.ceil(0.95 * len(errors))])
    )
    if times_ms:
        row["ms"] = float(np.median(times_ms))
    return {**row, **{f"basin {start} %": 100 * float(np.mean(ended)) for start, ended in basin.items()}}


if __name__ == "__main__":
    sys.exit(main())
