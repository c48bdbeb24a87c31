# SPDX-License-Identifier: Apache-2.0
"""``kfloc show alignment|basin|html``: pictures and pages of the refinement."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np

from kfloc_ros.cli.arguments import open_source_from
from kfloc_ros.cli.show_stream import closed, open_recording, progress
from kfloc_ros.errors import DrawingError, SourceError
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Alignment
from kfloc_ros.visualization.alignment import alignment_panels, moved, steps_picture, summary
from kfloc_ros.visualization.basin import (
    NEAR_DEG,
    NEAR_M,
    Trial,
    basin_picture,
    reference_pose,
    summarize,
    trials,
    write_trials,
)
from kfloc_ros.visualization.page import LocalizationPage
from kfloc_ros.visualization.rerun_views import log_alignment
from kfloc_ros.visualization.sheet import Sheet
from kfloc_ros.visualization.stream import View, watch
from kfloc_ros.visualization.video import write_picture


def alignment(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show alignment``; return the lines to print."""
    source = open_source_from(args, depth=False)
    position = {index: k for k, index in enumerate(source.indices())}.get(args.frame)
    if position is None:
        known = source.indices()
        raise SourceError(
            f"There is no frame {args.frame} in '{args.source}'; its {len(known)} frames have the indices "
            f"{known[0]} to {known[-1]}."
        )
    scene_map = SceneMap.load(resolve_map(args.map))
    localizer = Localizer(scene_map, LocalizerConfig(device=args.device))
    recording = open_recording(
        args,
        f"{scene_map.name}: frame {args.frame}",
        up_axis(scene_map),
        pictures=("overlay",),
        curves=("cost",),
    )
    args.frames, args.split = str(args.frame), None
    (view,) = watch(localizer, open_source_from(args, depth=False))
    aligned = _aligned(localizer, view, args)
    panels = alignment_panels(view.frame, view.coarse.features, aligned, scene_map)
    sheet = Sheet(2, scene_map.camera.width, scene_map.camera.height)
    title = summary(view.frame, aligned, source.name)
    written = []
    for name, picture in (
        ("alignment", sheet.draw(title.replace("; ", "\n", 1), panels)),
        ("steps", steps_picture(title.partition(";")[0], aligned, view.frame.T_map_camera)),
    ):
        written.append(str(write_picture(args.out / f"{name}_{args.frame:06d}.png", picture)))
    if recording is not None:
        log_alignment(recording, view.frame, view.coarse.features, aligned, scene_map)
    return [title, *written, *closed(recording, args)]


def _aligned(localizer: Localizer, view: View, args: argparse.Namespace) -> Alignment:
    """Return the alignment of a frame, or one that starts at its final pose plus the offset of ``args``.

    Raises:
        DrawingError: the frame was not aligned.
    """
    aligned = view.estimate.alignment
    if aligned is None or not aligned.steps:
        reason = aligned.reason if aligned is not None else "no refinement"
        raise DrawingError(f"Frame {view.frame.index} was not aligned, so there is nothing to show: {reason}.")
    if not args.offset_m and not args.offset_deg:
        return aligned
    start = moved(aligned.steps[-1].T_map_camera, args.offset_m, args.offset_deg)
    return localizer.refiner.align(view.coarse.features, [start])


def basin(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show basin``; return the lines to print."""
    source = open_source_from(args, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    localizer = Localizer(scene_map, LocalizerConfig(device=args.device))
    refiner, rng = localizer.refiner, np.random.default_rng(args.seed)
    results: list[Trial] = []
    skipped: list[int] = []
    per_frame = len(args.offsets_m) * len(args.offsets_deg) * args.starts

    def run() -> Iterator[Trial]:
        for view in watch(localizer, source):
            features, index = view.coarse.features, view.frame.index
            start = view.frame.T_map_camera if view.frame.T_map_camera is not None else view.coarse.pose.T_map_camera
            goal: Matrix | None = None if start is None else reference_pose(refiner, features, start)
            if goal is None:
                skipped.append(index)
                continue
            yield from trials(refiner, features, index, goal, args.offsets_m, args.offsets_deg, args.starts, rng)

    for trial in progress(run(), len(source) * per_frame, "alignment"):
        results.append(trial)
    basin = summarize(results)
    frames = len({trial.frame for trial in results})
    wrong = f"{basin.falsely_accepted} of {len(results)} converged elsewhere and were accepted"
    title = f"{source.name} in {scene_map.name}: {frames} frames, {len(results)} alignments; {wrong}"
    write_trials(args.out / "basin.csv", results)
    written = [
        title,
        str(write_picture(args.out / "basin.png", basin_picture(title, basin))),
        f"{args.out / 'basin.csv'}",
    ]
    if skipped:
        written.append(f"Omitted, as not aligned from the source's own pose: {', '.join(map(str, skipped))}")
    near = [t for t in results if t.offset_m <= 0.1 and t.offset_deg <= 5.0]
    if near:
        share = np.mean([t.converged for t in near])
        near_to = f"{100 * NEAR_M:g} cm and {NEAR_DEG:g} deg"
        written.append(f"From at most 10 cm and 5 deg, {share:.0%} converge to within {near_to}.")
    return written


def page(args: argparse.Namespace) -> list[str]:
    """Run ``kfloc show html``; return the lines to print."""
    source = open_source_from(args, depth=False)
    scene_map = SceneMap.load(resolve_map(args.map))
    localizer = Localizer(scene_map, LocalizerConfig(device=args.device))
    made = LocalizationPage(scene_map, source.name, args.width)
    for view in progress(watch(localizer, source), len(source)):
        made.add(view)
    path = made.write(args.out / "localization.html")
    return [f"{path}: {made.count} frames, {path.stat().st_size / 1e6:.1f} MB; open it in any browser"]
