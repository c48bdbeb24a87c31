# SPDX-License-Identifier: Apache-2.0
"""``kfloc pixloc preprocess``: PixLoc's training data from COLMAP models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kfloc_ros.errors import SourceError

DESCRIPTION = """\
Compute the overlap of the views of COLMAP models, and write one scene each for `kfloc train pixloc megadepth:DIR` or
cmu:DIR. DIR has the layout of the original's data path:

  megadepth  DIR/megadepth/Undistorted_SfM/SCENE/{sparse,images}, undistorted; can be any reconstruction
  cmu        DIR/CMU/sliceN/{database,query,camera-poses}, and a model of the references (--sfm)

The scenes are written to DIR/megadepth_pixloc_training or DIR/cmu_pixloc_training, as .npz; existing ones are kept.
"""

EPILOG = """\
examples:
  kfloc pixloc preprocess megadepth DIR
  kfloc pixloc preprocess megadepth DIR --scenes kitchen --depth 'DIR/megadepth/depths/{}' --min-side 240
  kfloc pixloc preprocess cmu DIR --sfm 'hloc/CMU/{}/sfm_superpoint+superglue/model'
"""

ROOTS = {"megadepth": "megadepth/Undistorted_SfM", "cmu": "CMU"}


def add_parser(actions: Any) -> None:
    """Register ``kfloc pixloc preprocess``."""
    parser = actions.add_parser(
        "preprocess",
        help="compute training data from COLMAP models",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=tuple(ROOTS), help="the layout")
    parser.add_argument("root", type=Path, metavar="DIR", help="data path")
    parser.add_argument("--scenes", nargs="+", metavar="NAME", help="scenes or slices (default: all)")
    parser.add_argument(
        "--sfm", metavar="PATTERN", help="path of the model of a scene, with {} for its name (default: in its folder)"
    )
    parser.add_argument(
        "--depth", metavar="PATTERN",
        help="megadepth: folder of depth images (.npy, .h5, .png in thousandths), with {} for the scene's name",
    )  # fmt: skip
    parser.add_argument(
        "--min-common",
        type=int,
        default=50,
        metavar="N",
        help="smallest number of points that two views share (default: 50)",
    )
    parser.add_argument(
        "--min-side",
        type=int,
        default=480,
        metavar="PX",
        help="megadepth: shortest side of an image, in pixels (default: 480)",
    )
    parser.set_defaults(run_action=run)


def run(args: argparse.Namespace) -> int:
    """Write the scenes that do not exist yet."""
    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.datasets.colmap import find_model
    from kfloc_ros.training.preprocess import (
        preprocess_cmu,
        preprocess_megadepth,
        read_model,
        read_query_poses,
        write_scene,
    )
    from kfloc_ros.training.preprocessed import KINDS

    root = args.root / ROOTS[args.kind]
    if not root.is_dir():
        raise SourceError(f"There is no folder '{root}'; see `kfloc pixloc preprocess --help` for the layout.")
    if args.depth is not None and args.kind != "megadepth":
        raise SourceError("--depth applies only to megadepth: CMU's queries overlap as their nearest references do.")
    names = args.scenes or sorted(path.name for path in root.iterdir() if path.is_dir())
    out = args.root / KINDS[args.kind]
    made = 0
    for name in progress_bar(names, unit="scene"):
        path = out / f"{name}.npz"
        if path.is_file():
            print(f"{path}: exists already")
            continue
        model = read_model(Path(args.sfm.replace("{}", name)) if args.sfm else find_model(root / name))
        if args.kind == "megadepth":
            depths = None if args.depth is None else Path(args.depth.replace("{}", name))
            scene = preprocess_megadepth(model, depths=depths, min_common=args.min_common, min_side_px=args.min_side)
            overlap = scene["overlap_matrix"]
        else:
            queries = read_query_poses(root / name / "camera-poses")
            scene = preprocess_cmu(model, queries, min_common=args.min_common)
            overlap = scene["query_overlap_matrix"]
        write_scene(path, scene)
        made += 1
        print(f"{path}: {len(model.names)} images, {len(scene['points3D'])} points, {int((overlap > 0).sum())} pairs")
    print(f"{out}: {made} scenes written; train with `kfloc train pixloc {args.kind}:{args.root} --out OUT`")
    return 0
