# SPDX-License-Identifier: Apache-2.0
"""``kfloc map``: the actions build, kfnet, info and verify; registers the other map actions."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import (
    add_build_options,
    add_no_check,
    add_source_arguments,
    build_config_from,
    check_first,
    need_poses,
    open_source_from,
    provenance_of,
    words_of,
)
from kfloc_ros.cli.map_join import add_join, describe_place
from kfloc_ros.cli.map_scale import add_scale, add_scale_options, notes_beside, scale_method, scaled_source
from kfloc_ros.cli.map_tools import add_tools
from kfloc_ros.cli.tables import DONE, BuildBars, StageBars, describe, progress_bar
from kfloc_ros.errors import KflocError, SourceError

if TYPE_CHECKING:
    from kfloc_ros.frames import FrameSource

BUILD_EXAMPLE = """\
examples:
  kfloc map build 7scenes:/data/redkitchen --split blocks50:train --out maps/kitchen
  kfloc map build photos --sfm out/photos --scale-marker 0.15 --out maps/hall
  kfloc map build 'walk.mp4?every=10' --sfm out/walk --sfm-length 0 12 1.50 --out maps/walk

A build trains the map's scene-coordinate head, selects reference views, and calibrates on held-out views. The folder is
written in one step at the end: an interrupted build leaves no files.
"""

KFNET = """\
Copy a map and put trained reference networks (`kfloc train`, `kfloc convert kfnet-checkpoint`) into the copy. The copy
has the family `reference`: all commands and nodes use its networks for measurement, flow and filter; alignment is
unchanged. The networks must be trained in the map's frame. SOURCE gives frames with depth and poses that were not used
for training: on them, the scales of the networks' sigmas and of the coarse covariance are calibrated. Without SOURCE
they are not calibrated.
"""

KFNET_EXAMPLE = """\
example:
  kfloc map build 7scenes:DIR@train --out maps/kitchen
  kfloc map kfnet 7scenes:DIR@test --frames 0:100 --map maps/kitchen --scoordnet out/stage3/scoordnet.safetensors \\
      --oflownet out/stage3/oflownet.safetensors --out maps/kitchen_kfnet
  kfloc localize 7scenes:DIR@test --map maps/kitchen_kfnet --out out/kitchen_kfnet
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc map``."""
    parser = subparsers.add_parser(
        "map", help="build, update, scale, merge, join, migrate, describe, verify, draw, export, pack and crop maps"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="build a map from a source",
        epilog=BUILD_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(build)
    build.add_argument("--out", type=Path, required=True, metavar="DIR", help="map folder to write")
    build.add_argument("--name", default="", help="name of the map (default: name of the folder)")
    build.add_argument("--force", action="store_true", help="replace an existing map")
    add_build_options(build)
    build.add_argument(
        "--adjust-poses",
        action="store_true",
        help="adjust the source's poses to its images, by matches between views of different times: for poses of a "
        "tracking camera or of odometry, which drift by a degree or a centimetre until a place is seen again",
    )
    add_no_check(build)
    structure = build.add_argument_group("poses from images alone (structure from motion)")
    structure.add_argument(
        "--sfm",
        type=Path,
        metavar="DIR",
        help="estimate the poses by structure from motion; model and images are written to DIR (as SOURCE: "
        "colmap:DIR), and used again if they are there; scale: by depth or poses, or by an option below",
    )
    add_scale_options(build)
    build.set_defaults(run_action=run_build)
    info = actions.add_parser("info", help="describe a map, or a place and its submaps")
    info.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    info.set_defaults(run_action=run_info)
    verify = actions.add_parser(
        "verify", help="verify a map's files, checksums and values, or those of a place and its submaps"
    )
    verify.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    verify.set_defaults(run_action=run_verify)
    add_join(actions)
    add_tools(actions)
    add_scale(actions)
    _add_kfnet(actions)


def _add_kfnet(actions: Any) -> None:
    """Add the ``kfnet`` action."""
    parser = actions.add_parser(
        "kfnet",
        help="put trained reference networks into a copy of a map",
        description=KFNET,
        epilog=KFNET_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser, required=False)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder, or name of an installed map")
    parser.add_argument("--scoordnet", type=Path, required=True, metavar="FILE", help="weights")
    parser.add_argument("--oflownet", type=Path, required=True, metavar="FILE", help="weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the map folder to write")
    parser.add_argument("--force", action="store_true", help="replace an existing map")
    parser.add_argument(
        "--runs",
        type=int,
        default=8,
        metavar="N",
        help="number of runs of SOURCE's frames to calibrate on (default: 8)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    parser.set_defaults(run_action=run_kfnet)


def run_build(args: argparse.Namespace) -> int:
    """Run ``kfloc map build``; return 0."""
    started = time.monotonic()

    from kfloc_ros.mapping.build import build_map, check_free, weaknesses
    from kfloc_ros.mapping.motion_depth import MotionDepth, poses_doubt, with_depth
    from kfloc_ros.mapping.structure import reconstruct
    from kfloc_ros.mapping.structure_scale import SCALE_HELP, UNSCALED, Unscaled

    config, method, check = build_config_from(args), scale_method(args), None
    frames = open_source_from(args, depth=not args.no_depth)
    check_free(args.out, overwrite=args.force)
    if args.scale_marker is not None:
        print("Looking for markers in the images ...", file=sys.stderr)
    notes: dict[str, Any] = {"scale": "of the source's poses", "intrinsics": "given by the source"}
    if args.sfm is not None:
        if frames.camera_is_guess:
            notes["intrinsics"] = "found from the images"
        check_first(frames, skip=args.no_check, use_poses=False)
        frames = reconstruct(frames, args.sfm, method=method, on_progress=StageBars())
        notes |= {"poses": "from the images", "model": str(args.sfm), "scale": frames.scale.origin}
        if doubt := frames.camera_doubt:
            print(f"Warning: {doubt}", file=sys.stderr)
    else:
        need_poses(frames)
        made = notes_beside(args.source)
        if made is not None and made.scale is not None:
            notes["scale"] = made.scale.origin
        if made is not None and (made.scale is None or made.scale.origin == UNSCALED) and method is None:
            raise SourceError(f"The model '{args.source}' has no scale. {SCALE_HELP}")
        if method is not None:
            frames, scale = scaled_source(frames, method)
            notes["scale"] = scale.origin
        check = check_first(frames, skip=args.no_check)
    if isinstance(method, Unscaled):
        print(f"Warning: the map's scale is {UNSCALED}. `kfloc map scale` can set it.", file=sys.stderr)
    source = with_depth(frames, hide=args.no_depth, device=config.device)
    epipolar_px = 0.0 if check is None else check.figures.get("epipolar_px_mended", 0.0)
    if isinstance(source, MotionDepth) and (doubt := poses_doubt(epipolar_px, frames.camera)):
        print(f"Warning: {doubt}", file=sys.stderr)
    if args.adjust_poses:
        source = _adjusted(source, config.device, notes)
    try:
        scene_map = build_map(
            source,
            args.out,
            config,
            name=args.name,
            overwrite=args.force,
            provenance=provenance_of(args, source, words_of(args)) | notes,
            started=started,
            on_progress=BuildBars(),
        )
    except (KflocError, KeyboardInterrupt):
        if args.sfm is not None:
            print(f"The model is kept in '{args.sfm}': the same command goes on from there.", file=sys.stderr)
        raise
    print(describe(scene_map))
    for sentence in weaknesses(scene_map):
        print(f"Warning: {sentence}", file=sys.stderr)
    return 0


def _adjusted(source: FrameSource, device: str, notes: dict[str, Any]) -> FrameSource:
    """Return the source with poses adjusted to its images, and note by how much they disagreed."""
    from kfloc_ros.device import choose_device
    from kfloc_ros.features.backbone import Backbone
    from kfloc_ros.mapping.pose_adjustment import AdjustedPoses, adjust_poses
    from kfloc_ros.mapping.views import map_camera

    bars, backbone = StageBars(), Backbone(device=choose_device(device))
    camera = map_camera(source.camera)
    adjustment = adjust_poses(source, camera, backbone, lambda share: bars("adjust", share))
    bars(DONE, 1.0)
    if adjustment is None:
        notes["poses_adjusted"] = "no: no part of the recording is seen twice"
        print("The poses are not adjusted: no part of the recording is seen twice.", file=sys.stderr)
        return source
    notes["poses_adjusted"] = adjustment.text
    print(f"Poses: {adjustment.text}", file=sys.stderr)
    return AdjustedPoses(source, adjustment.T_map_camera)


def run_info(args: argparse.Namespace) -> int:
    """Run ``kfloc map info``; return 0."""
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import Place, load_map

    loaded = load_map(resolve_map(args.map))
    print(describe_place(loaded) if isinstance(loaded, Place) else describe(loaded))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Run ``kfloc map verify``; return 1 if the map is damaged."""
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import is_place, verify_place
    from kfloc_ros.maps.scene_map import verify_map

    folder = resolve_map(args.map)
    problems = verify_place(folder) if is_place(folder) else verify_map(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        what = "the index and all submaps are consistent, " if is_place(folder) else ""
        print(f"'{folder}' is intact: {what}checksums match and all values are finite.")
    return 1 if problems else 0


def run_kfnet(args: argparse.Namespace) -> int:
    """Run ``kfloc map kfnet``; print the description of the map."""
    source = None if args.source is None else open_source_from(args)

    from dataclasses import replace

    from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
    from kfloc_ros.kfnet.reference.weights import load_oflownet, load_scoordnet
    from kfloc_ros.mapping.build import check_free
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.training.kfnet_family import calibrate_networks, with_networks

    check_free(args.out, overwrite=args.force)
    networks = ReferenceNetworks(load_scoordnet(args.scoordnet), load_oflownet(args.oflownet))
    made = with_networks(SceneMap.load(resolve_map(args.map)), networks)
    noted = {"kfnet": f"{args.scoordnet.name}, {args.oflownet.name}, not calibrated"}
    if source is not None:
        with progress_bar(total=100, unit="%") as bar:

            def show(share: float, text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update(round(100 * share) - bar.n)

            made = calibrate_networks(made, source, args.runs, args.device, show)
        noted = {"kfnet": f"{args.scoordnet.name}, {args.oflownet.name}, calibrated on {source.name}"}
    made = replace(made, name=args.out.name, provenance={**made.provenance, **noted})
    made.save(args.out, overwrite=args.force)
    print(describe(SceneMap.load(args.out)))
    return 0
