# SPDX-License-Identifier: Apache-2.0
"""``kfloc show cells|filter|flow|confidence``: one sheet of pictures per frame."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.cli.arguments import open_source_from
from kfloc_ros.cli.tables import progress_bar
from kfloc_ros.datasets.images import read_image
from kfloc_ros.errors import DrawingError
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.visualization.cells import CERTAINTY, SIGMA, Scale
from kfloc_ros.visualization.filter import caption, confidence_panels, filter_panels, flow_panels
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.rerun_views import log_filter
from kfloc_ros.visualization.sheet import Panel, Sheet
from kfloc_ros.visualization.stream import View, find_coordinates, find_flows, find_images, is_stored, watch
from kfloc_ros.visualization.stream_cells import CellStream, StoredView, show_flows, show_stored
from kfloc_ros.visualization.video import PictureSeries

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, unit: str = "frame") -> Iterable[Item]:
    """Yield the items, with a progress bar if stderr is a terminal."""
    bar: Iterable[Item] = progress_bar(items, total=total, unit=unit)
    return bar


def open_recording(
    args: argparse.Namespace, title: str, up: tuple[int, float] | None, **views: Sequence[str]
) -> Any | None:
    """Open the Rerun recording that the arguments ask for, or return None.

    Raises:
        DrawingError: Rerun is not installed, or there is no display for it.
    """
    if not args.rerun and not args.live:
        return None
    path = args.out / f"{args.verb}.rrd" if args.rerun else None
    return Recording(title, path=path, live=args.live, up=up, **views)


def filter_sheets(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show filter``; return the lines to print."""
    config = LocalizerConfig(device=args.device)
    pictures = ("map/camera/image", *(f"filter/{name}" for name in ("measurement", "nis", "flow", "posterior")))

    def log(recording: Recording, view: View) -> None:
        log_filter(recording, view, config.nis_threshold)

    noise = noise_scale(args)
    return _sheets(
        args, 3, lambda s: filter_panels(s.frame, s.coarse, config.nis_threshold, noise), log, {"pictures": pictures}
    )


def flow(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show flow``; return the lines to print."""
    path = Path(args.source)
    if is_stored(path, "*_flow.npy"):
        flows = find_flows(path)[:: args.step]
        with series_of(args) as series:
            shown = show_flows(flows, path.name, series, _stored_view(args, FLOW_SIGMA_M))
            written = list(progress(shown, len(flows), "flow"))
        return [line for line in written if line] + series.written
    if args.map is None:
        raise DrawingError(
            f"The flow of '{args.source}' needs a map: give --map DIR. Only files <a>_<b>_flow.npy need none."
        )
    return _sheets(args, 2, lambda s: flow_panels(s.frame, s.coarse))


def confidence(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show confidence``; return the lines to print."""
    if args.weights is not None:
        return _published_confidence(args)
    if args.map is None:
        raise DrawingError("Give a map with --map DIR, or a model of PixLoc with --weights FILE.")
    return _sheets(args, 2, lambda s: confidence_panels(s.frame, s.coarse))


def _published_confidence(args: argparse.Namespace) -> list[str]:
    """Draw the confidences of PixLoc's network for every frame of the source."""
    from kfloc_ros.device import choose_device, computes_bfloat16
    from kfloc_ros.pixloc.reference.checkpoint import load_weights
    from kfloc_ros.pixloc.reference.model import extract
    from kfloc_ros.pixloc.reference.unet import ImageSize
    from kfloc_ros.visualization.pixloc import confidence_panels

    source, device = open_source_from(args, depth=False), choose_device(args.device)
    model, size = load_weights(args.weights).to(device), ImageSize(args.resize)
    half = device.type == "cuda" or computes_bfloat16(device)
    sheet = Sheet(3, source.camera.width, source.camera.height)
    with series_of(args) as series:
        for frame in progress((source.read(k) for k in range(len(source))), len(source)):
            if frame is not None:
                prepared = size.prepare(frame.image)
                found = extract(model, prepared.pixels, half=half)
                panels = confidence_panels(frame.image, found.confidences, found.strides, prepared.scale)
                series.add(frame.index, sheet.draw(f"{source.name}, frame {frame.index}", panels))
    return series.written


def _sheets(
    args: argparse.Namespace,
    columns: int,
    panels_of: Callable[[View], list[Panel]],
    log: Callable[[Recording, View], None] | None = None,
    views: dict[str, Sequence[str]] | None = None,
) -> list[str]:
    source = open_source_from(args, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    localizer = Localizer(scene_map, LocalizerConfig(device=args.device))
    recording = None
    if log is not None:
        recording = open_recording(args, f"{scene_map.name}: {args.verb}", up_axis(scene_map), **(views or {}))
    sheet = Sheet(columns, scene_map.camera.width, scene_map.camera.height)
    with series_of(args) as series:
        for view in progress(watch(localizer, source), len(source)):
            series.add(view.frame.index, sheet.draw(caption(source.name, view.frame, view.coarse), panels_of(view)))
            if recording is not None and log is not None:
                log(recording, view)
    return series.written + closed(recording, args)


def cells(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show cells``; return the lines to print."""
    folder = Path(args.source)
    if is_stored(folder):
        recording = open_recording(args, f"{folder.name}: cells", None)
        files = find_coordinates(folder).every(args.step)
        with series_of(args) as series:
            options = _stored_view(args, CELL_SIGMA_M)
            stored = show_stored(files, folder.name, args.out, series, options, recording)
            written = list(progress(stored, len(files.paths), "map"))
        return [line for line in written if line] + series.written + closed(recording, args)
    if args.map is None:
        raise DrawingError(
            f"Scene coordinates of '{args.source}' need a map: give --map DIR. Only coordinate maps, "
            "coord_<number>.npy, need none."
        )
    source = open_source_from(args, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    localizer = Localizer(scene_map, LocalizerConfig(device=args.device, filter=not args.no_filter))
    up = up_axis(scene_map)
    recording = open_recording(args, f"{scene_map.name}: cells", up, pictures=("map/camera/image",))
    max_sigma_m = args.max_sigma or MAP_SIGMA_M
    stream = CellStream(scene_map.bounds_m, up, max_sigma_m, args.voxel, noise_scale(args))
    camera = scene_map.camera
    sheet = Sheet(2, camera.width, camera.height)
    with series_of(args) as series:
        for view in progress(watch(localizer, source), len(source)):
            panels = stream.add(view, args.out / "cells")
            series.add(view.frame.index, sheet.draw(caption(source.name, view.frame, view.coarse), panels))
            if recording is not None:
                stream.log(recording, view)
    title = f"{source.name} in {scene_map.name}"
    return stream.write(args.out, title) + series.written + closed(recording, args)


CELL_SIGMA_M, FLOW_SIGMA_M, MAP_SIGMA_M = 0.05, 0.01, 0.1
"""Largest standard deviations that are drawn: of stored maps and flows as in KFNet's viewers, and of a run."""


def noise_scale(args: argparse.Namespace) -> Scale:
    """Return the scale of noise pictures: bright where unsure, or with --inverse, as KFNet has it, where sure."""
    return CERTAINTY if args.inverse else SIGMA


def _stored_view(args: argparse.Namespace, max_sigma_m: float) -> StoredView:
    return StoredView(
        args.max_sigma or max_sigma_m,
        getattr(args, "voxel", 0.02),
        rotate_deg=getattr(args, "rotate", 0.0),
        noise=CERTAINTY if getattr(args, "inverse", False) else SIGMA,
        images=find_images(args.images or ()),
    )


def trajectory(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show trajectory``; return the lines to print."""
    from kfloc_ros.datasets import SOURCE_KINDS, open_source
    from kfloc_ros.visualization.trajectory import read_track, trajectory_pictures

    track = read_track(args.result, args.gt)
    name = args.source or track.source
    if args.images or not name:
        files = find_images(args.images) if args.images else track.images

        def image_of(index: int) -> NDArray[np.uint8] | None:
            return read_image(files[index]) if index < len(files) else None

    else:
        source = open_source(
            name if name.partition(":")[0] in SOURCE_KINDS else f"bag:{name}", poses=track.poses, depth=False
        )
        positions = {index: k for k, index in enumerate(source.indices())}

        def image_of(index: int) -> NDArray[np.uint8] | None:
            frame = source.read(positions[index]) if index in positions else None
            return None if frame is None else frame.image

    with series_of(args) as series:
        total = -(-len(track.frames) // args.step)
        for index, picture in progress(trajectory_pictures(track, image_of, args.step), total):
            series.add(index, picture)
    return series.written


def series_of(args: argparse.Namespace) -> PictureSeries:
    """Return the output of a verb's sheets.

    Raises:
        DrawingError: both outputs are disabled.
    """
    if args.no_pictures and args.no_video:
        raise DrawingError("With both --no-pictures and --no-video there is nothing to write; omit one of them.")
    return PictureSeries(
        args.out,
        args.verb,
        pictures=not args.no_pictures,
        video=not args.no_video,
        fps=float(np.clip(args.fps, 1, 60)),
        codec=args.codec,
    )


def closed(recording: Recording | None, args: argparse.Namespace) -> list[str]:
    """Close a recording; return the lines to print."""
    if recording is None:
        return []
    recording.close()
    return [f"{args.out / (args.verb + '.rrd')}: open it with `rerun FILE`"] if args.rerun else []
