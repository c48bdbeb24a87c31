# SPDX-License-Identifier: Apache-2.0
"""``kfloc coordinates`` and ``kfloc labels``: scene coordinates of the filter and of a source in KFNet's formats."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kfloc_ros.cli.arguments import add_recursion_argument, add_source_arguments, need_poses, open_source_from
from kfloc_ros.device import choose_device
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.kfnet.reference.files import MapDescription, write_coordinates, write_description, write_flow, write_pose
from kfloc_ros.localization.coarse import filter_settings, networks_of
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame

DESCRIPTION = """\
Write the scene coordinates of every frame of SOURCE in KFNet's format: OUT/coord_<i>.npy, h x w x 4 float32 with map
coordinates in metres and 1/sigma (the inverse standard deviation), i counting from 0. With --flow, also write
<a>_<b>_flow.npy, h x w x 3, the flow from each frame to the previous one. coordinates.json lists the frames and the
pixel of a cell. `kfloc pnp OUT` computes poses from the files; --gt-out writes the true poses for its --gt.
"""

EPILOG = """\
example:
  kfloc coordinates 7scenes:DIR --split blocks50:test --map maps/kitchen --out out/coordinates
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc coordinates``."""
    parser = subparsers.add_parser(
        "coordinates",
        help="write scene-coordinate maps in KFNet's format",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="DIR", help="map folder, or the name of a shipped map")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument("--no-filter", action="store_true", help="write the measurements only, without filtering")
    add_recursion_argument(parser)
    parser.add_argument("--flow", action="store_true", help="also write the flow between frames")
    parser.add_argument(
        "--gt-out", type=Path, metavar="DIR", help="write the true poses and gt_list.txt to this folder"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc coordinates``; return 0."""
    source = open_source_from(args, depth=False)

    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap

    scene_map = SceneMap.load(resolve_map(args.map))
    config = LocalizerConfig(device=args.device, filter=not args.no_filter, recursion=args.recursion)
    written = export_coordinates(source, scene_map, config, args.out, flow=args.flow, truth=args.gt_out)
    count = sum(1 for _ in progress_bar(written, total=len(source), unit="frame"))
    print(f"{args.out}: {count} coordinate maps")
    return 0


def export_coordinates(
    source: FrameSource,
    scene_map: SceneMap,
    config: LocalizerConfig,
    out: Path,
    *,
    flow: bool = False,
    truth: Path | None = None,
) -> Iterator[int]:
    """Write ``coord_<i>.npy`` of every frame, i counting from 0; yields each i.

    Args:
        source: source of frames.
        scene_map: map to localize in.
        config: options of the localizer.
        out: folder for the coordinate maps and ``coordinates.json``.
        flow: also write the flow from each frame to the previous one.
        truth: folder for the true poses, one file per frame, and ``gt_list.txt``.
    """
    localizer = Localizer(scene_map, config)
    adapter = ImageAdapter(source.camera, localizer.camera)
    for folder in filter(None, (out, truth)):
        folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    flows = _FlowWriter(out, scene_map, config) if flow else None
    description = MapDescription(localizer.camera)
    for i, frame in enumerate(source):
        seen = Frame(adapter(frame.image), localizer.camera, frame.stamp_ns, frame.index, frame.name)
        result = localizer.coarse_half(seen)
        coordinates = result.scene_coordinates
        assert coordinates is not None  # the localizer runs in this process
        write_coordinates(out, i, coordinates)
        if flows is not None:
            flows.add(i, seen, result)
        if truth is not None:
            write_pose(truth / f"gt_{i}.txt", frame.T_map_camera)
        description = MapDescription(localizer.camera, coordinates.stride, coordinates.pixel_offset)
        entries.append({"map": f"coord_{i}.npy", "index": frame.index, "name": frame.name, "stamp_ns": frame.stamp_ns})
        yield i
    write_description(out, description, entries)
    if truth is not None:
        (truth / "gt_list.txt").write_text("".join(f"gt_{i}.txt\n" for i in range(len(entries))))


class _FlowWriter:
    """Writer of the flow from each image to the one before it, whether or not the filter used that flow."""

    def __init__(self, out: Path, scene_map: SceneMap, config: LocalizerConfig) -> None:
        self._out, self._networks = out, networks_of(scene_map, choose_device(config.device))
        self._settings = filter_settings(scene_map, config, self._networks)
        self._before: tuple[Frame, CoarseResult] | None = None

    @torch.inference_mode()
    def add(self, i: int, frame: Frame, now: CoarseResult) -> None:
        """Write the flow of frame i, and 1/sigma of the prior that it makes of the belief of frame i - 1."""
        before, self._before = self._before, (frame, now)
        if before is None:
            return
        networks, (earlier, result) = self._networks, before
        flow = None if now.filtered is None else now.filtered.flow
        if flow is None:  # the filter is off, or was reset between the two images
            flow = networks.flow(
                networks.flow_features(frame, now.features), networks.flow_features(earlier, result.features)
            )
        assert result.filtered is not None  # the localizer runs in this process
        belief = result.filtered.belief or result.filtered.posterior
        s = self._settings
        prior = warp(belief, flow, s.process_scale, s.process_floor_m2, blend_sigma=s.blend_sigma)
        write_flow(self._out, i, i - 1, flow.offset, prior.variance)


LABELS = """\
Write a source with poses as a training folder of the original KFNet: image_list.txt, label_list.txt (raw float32
H x W x 4: x, y, z in metres and a mask), transform.txt, and in addition camera.txt and pose_list.txt. The folder can be
used as the SOURCE kfnet:OUT. If the source has no depth (such as a COLMAP model), depth is estimated from the motion
between the views and the points of the reconstruction; pixels without depth are masked out.
"""

LABELS_EXAMPLES = """\
examples:
  kfloc labels 7scenes:DIR --split blocks50:train --eighth --out out/labels
  kfloc labels colmap:DIR --out out/labels
  kfloc map build kfnet:out/labels --out maps/kitchen
"""


def add_labels_parser(subparsers: Any) -> None:
    """Register ``kfloc labels``."""
    parser = subparsers.add_parser(
        "labels",
        help="write scene-coordinate labels in KFNet's format",
        description=LABELS,
        epilog=LABELS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--eighth", action="store_true", help="labels of every eighth pixel in both directions: 1/64 of the size"
    )
    parser.add_argument(
        "--absolute", action="store_true", help="write absolute paths in the lists, as the original KFNet expects"
    )
    parser.add_argument(
        "--no-depth", action="store_true", help="estimate depth from the views' motion, even if the source has depth"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device for depth estimation")
    parser.set_defaults(run_action=run_labels)


def run_labels(args: argparse.Namespace) -> int:
    """Run ``kfloc labels``; return 0."""
    source = open_source_from(args, depth=not args.no_depth)
    need_poses(source)

    import numpy as np

    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.datasets.kfnet import write_kfnet_folder
    from kfloc_ros.mapping.motion_depth import MotionDepth, MotionDepthSettings, with_depth

    every_view = MotionDepthSettings(max_views=len(source))
    source = with_depth(source, hide=args.no_depth, device=args.device, settings=every_view)
    written = write_kfnet_folder(source, args.out, full_resolution=not args.eighth, absolute=args.absolute)
    bar = progress_bar(written, total=len(source), unit="frame")
    known = [float(np.mean(frame.depth_m > 0)) for frame in bar if frame.depth_m is not None]
    origin = "depth from motion" if isinstance(source, MotionDepth) else "measured depth"
    print(f"{args.out}: {len(known)} labelled images of {len(source)}, {np.mean(known):.0%} of the pixels ({origin})")
    return 0
