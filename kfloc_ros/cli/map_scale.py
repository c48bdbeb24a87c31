# SPDX-License-Identifier: Apache-2.0
"""Scale of a map: the options of ``kfloc map build``, and ``kfloc map scale|measure``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from, positive
from kfloc_ros.errors import MapError, SourceError

if TYPE_CHECKING:
    from kfloc_ros.frames import FrameSource
    from kfloc_ros.mapping.measured_scale import Scale
    from kfloc_ros.mapping.structure import ModelNotes
    from kfloc_ros.mapping.structure_scale import ScaleMethod
    from kfloc_ros.maps.scene_map import SceneMap

SCALE = """\
Multiply all lengths of a map: by a factor, or by what something of known size gives. For the latter, SOURCE gives
images with poses in the map's frame, such as the model that `kfloc map build --sfm DIR` has written (colmap:DIR).
"""
SCALE_EXAMPLE = """\
examples:
  kfloc map scale maps/hall --factor 1.27 --out maps/hall_m
  kfloc map scale maps/hall colmap:out/hall --scale-object 0.60 3:100,200,340,210 9:80,220,330,215 --out maps/hall_m
"""
MEASURE = """\
Write an HTML page with some images of a source. Click both ends of an object in two of them, write its length, and the
page shows the words of --scale-object for `kfloc map build` and `kfloc map scale`.
"""
SAME_FRAME = 1e-3
"""Largest usual distance between a map's reference views and the poses of its model, in units of the map."""


def add_scale_options(parser: Any) -> None:
    """Add the options that give the scale; :func:`scale_method` reads them."""
    group = parser.add_argument_group("scale, if images alone do not give it").add_mutually_exclusive_group()
    group.add_argument(
        "--scale-object",
        nargs="+",
        metavar=("METRES", "IMAGE:X,Y,X,Y"),
        help="length of an object, and the pixels of both ends in two or more images, counted from 0, such as "
        "0.60 3:100,200,340,210 9:80,220,330,215 (`kfloc map measure SOURCE` yields them by clicks)",
    )
    group.add_argument(
        "--scale-marker",
        type=positive,
        metavar="METRES",
        help="side of the black square of printed ArUco or AprilTag markers that two or more images show",
    )
    group.add_argument(
        "--scale-height", type=positive, metavar="METRES", help="usual height of the camera above a level floor"
    )
    group.add_argument(
        "--sfm-length",
        nargs=3,
        metavar=("FRAME", "FRAME", "METRES"),
        help="distance between the camera positions of two frames, counted from 0",
    )
    group.add_argument("--unscaled", action="store_true", help="no scale; `kfloc map scale` can set it later")


def scale_method(args: argparse.Namespace) -> ScaleMethod | None:
    """Return the origin of the scale that the options give; None without one.

    Raises:
        SourceError: the words of an option have another form.
    """
    from kfloc_ros.mapping.measured_scale import CameraHeight, MarkerSize
    from kfloc_ros.mapping.structure_scale import Unscaled, known_length, object_length

    if args.scale_object is not None:
        return object_length(args.scale_object)
    if args.scale_marker is not None:
        return MarkerSize(args.scale_marker)
    if args.scale_height is not None:
        return CameraHeight(args.scale_height)
    return Unscaled() if args.unscaled else known_length(args.sfm_length)


def scaled_source(source: FrameSource, method: ScaleMethod) -> tuple[FrameSource, Scale]:
    """Return a source with poses in the scale that a method gives.

    Raises:
        SourceError: the method does not give one, or the source has depth, which has a scale already.
    """
    from kfloc_ros.datasets.source_options import Reading, ReadOtherwise
    from kfloc_ros.mapping.measured_scale import PosedViews

    if any(frame is not None and frame.depth_m is not None for frame in [source.read(0)]):
        raise SourceError(
            f"'{source.name}' has depth and poses, which have a scale. Where it is wrong, the source's options "
            "pose_scale and depth_scale change it (see kfloc check)."
        )
    method.check(source)
    scale = method.measure(PosedViews.of(source))
    if scale.metres_per_unit == 1:
        return source, scale
    return ReadOtherwise(source, Reading(pose_scale=scale.metres_per_unit)), scale


def notes_beside(spec: str) -> ModelNotes | None:
    """Return the notes of a model that this package made, for a SOURCE that is one; else None.

    Raises:
        SourceError: they are damaged.
    """
    from kfloc_ros.mapping.structure import read_notes

    return read_notes(Path(spec.removeprefix("colmap:").partition("?")[0]))


def add_scale(actions: Any) -> None:
    """Register ``scale`` and ``measure`` below ``kfloc map``."""
    scale = actions.add_parser(
        "scale",
        help="multiply all lengths of a map, for one without a scale",
        description=SCALE,
        epilog=SCALE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale.add_argument("map", metavar="MAP", help="map folder, or name of an installed map")
    add_source_arguments(scale, required=False)
    scale.add_argument("--factor", type=positive, metavar="F", help="metres of one unit of the map")
    add_scale_options(scale)
    scale.add_argument("--out", type=Path, required=True, metavar="DIR", help="map folder to write")
    scale.add_argument("--force", action="store_true", help="replace an existing map")
    scale.set_defaults(run_action=run_scale)
    measure = actions.add_parser(
        "measure", help="write a page on which an object is clicked, for --scale-object", description=MEASURE
    )
    add_source_arguments(measure)
    measure.add_argument("--out", type=Path, required=True, metavar="HTML", help="page to write")
    measure.add_argument(
        "--images", type=int, nargs="+", metavar="N", help="numbers of the images to show (default: 16, evenly chosen)"
    )
    measure.set_defaults(run_action=run_measure)


def run_scale(args: argparse.Namespace) -> int:
    """Run ``kfloc map scale``; return 0."""
    from dataclasses import replace

    from kfloc_ros.cli.tables import describe
    from kfloc_ros.mapping.build import check_free
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import load_map, single_map
    from kfloc_ros.maps.scene_map import SceneMap, scaled_map

    method = scale_method(args)
    if (args.factor is None) == (method is None):
        raise SourceError("kfloc map scale takes either --factor or one of the --scale options with a SOURCE.")
    check_free(args.out, overwrite=args.force)
    scene_map = single_map(load_map(resolve_map(args.map)))
    factor, origin = args.factor, f"a factor of {args.factor} given to kfloc map scale"
    if method is not None:
        scale = _measured(scene_map, args, method)
        factor, origin = scale.metres_per_unit, scale.origin
    made = scaled_map(scene_map, factor)
    provenance = {**made.provenance, "scale": origin, "scaled_by": round(factor, 6)}
    replace(made, provenance=provenance).save(args.out, overwrite=args.force)
    print(describe(SceneMap.load(args.out)))
    return 0


def _measured(scene_map: SceneMap, args: argparse.Namespace, method: ScaleMethod) -> Scale:
    """Return the metres per unit of a map, measured in images with poses in its frame."""
    import numpy as np

    from kfloc_ros.mapping.measured_scale import PosedViews

    if args.source is None:
        raise SourceError("A SOURCE is missing: images with poses in the map's frame, such as colmap:DIR of --sfm DIR.")
    source = open_source_from(args)
    method.check(source)
    views = PosedViews.of(source)
    if not views.poses:
        raise SourceError(f"'{source.name}' has no poses; name the model of the map, colmap:DIR of --sfm DIR.")
    centres = np.stack([T[:3, 3] for T in views.poses.values()])
    references = scene_map.references.T_map_camera[:, :3, 3]
    apart = np.linalg.norm(references[:, None] - centres[None], axis=2).min(axis=1)
    if np.median(apart) > SAME_FRAME * max(1.0, float(np.ptp(centres, axis=0).max())):
        raise MapError(
            f"'{source.name}' is not in the frame of the map '{scene_map.name}': its poses are not those of the map's "
            "views. Name the source that the map was built from."
        )
    return method.measure(views)


def run_measure(args: argparse.Namespace) -> int:
    """Run ``kfloc map measure``; return 0."""
    from kfloc_ros.mapping.export import write_new_file
    from kfloc_ros.mapping.source_pages import measure_page

    page = measure_page(open_source_from(args, depth=False), args.images)
    print(f"Written to '{write_new_file(args.out, page.encode())}'. Open it in a browser.")
    return 0
