# SPDX-License-Identifier: Apache-2.0
"""``kfloc show alignment|basin|html`` and ``kfloc pixloc ... --show``: pictures and pages of the refinement."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.cli.arguments import open_source_from
from kfloc_ros.cli.show_stream import closed, open_recording, progress
from kfloc_ros.errors import DrawingError, FrameError, SourceError
from kfloc_ros.files import inside
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.hloc.run import read_image
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.two_view import AlignmentTrace
from kfloc_ros.pixloc.reference.views import ReferenceScene
from kfloc_ros.types import Alignment
from kfloc_ros.visualization.alignment import (
    NEAR_DEG,
    NEAR_M,
    Trial,
    alignment_panels,
    basin_picture,
    moved,
    reference_pose,
    steps_picture,
    summarize,
    summary,
    trials,
    write_trials,
)
from kfloc_ros.visualization.page import LocalizationPage
from kfloc_ros.visualization.pixloc import AlignmentPictures, PixLocPage, confidence_panels
from kfloc_ros.visualization.rerun_views import log_alignment
from kfloc_ros.visualization.sheet import Sheet
from kfloc_ros.visualization.stream import View, watch
from kfloc_ros.visualization.video import PictureSeries, Video, write_picture


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


MAX_PAGE_FRAMES = 50
"""Alignments in a page; each takes about 0.2 MB."""
FPS = 12.0


class PixLocPictures:
    """Writer of the pictures of several alignments in one scene.

    Args:
        out: folder.
        title: title of the page.
        scene: points and images.
        images: folder of the references.
        loss: robust loss of the alignments.
        codec: codec of the animations.
    """

    def __init__(
        self, out: Path, title: str, scene: ReferenceScene, images: Path, loss: RobustLoss, codec: str = "vp9"
    ) -> None:

        self._out, self._scene, self._images, self._codec = out, scene, images, codec
        self._page = PixLocPage(title, scene, loss)
        self._confidences = PictureSeries(out, "confidence", fps=5.0, codec=codec)
        self._sheet: Sheet | None = None
        self._references: dict[int, NDArray[np.uint8] | None] = {}
        self._count = 0
        self.written: list[str] = []
        """Description of the files written."""

    def add(
        self,
        name: str,
        image: NDArray[np.uint8],
        camera: Camera,
        trace: AlignmentTrace,
        views: tuple[int, ...],
        reason: str = "",
    ) -> None:
        """Draw the alignment of an image (H, W, 3) by its trace; one that did not start is left out."""

        if not trace.steps:
            return
        if self._sheet is None:
            self._sheet = Sheet(3, image.shape[1], image.shape[0])
        panels = confidence_panels(image, trace.confidences, trace.strides, trace.camera_scale)
        self._confidences.add(self._count, self._sheet.draw(name, panels))
        references = {k: self._reference(k) for k in views}
        first = next(((k, picture) for k, picture in references.items() if picture is not None), None)
        if first is not None:
            drawn = AlignmentPictures(image, camera, self._scene, trace, (first[1], first[0]))
            stem = name.replace("/", "_").rpartition(".")[0] or name
            write_picture(self._out / "alignment" / f"{stem}.png", drawn.ends())
            with Video(self._out / "alignment" / f"{stem}.mp4", FPS, self._codec) as video:
                for picture in drawn.animation():
                    video.add(picture)
            if self._count < MAX_PAGE_FRAMES:
                self._page.add(name, image, camera, trace, references, kept=drawn.kept(), reason=reason)
        self._count += 1

    def _reference(self, position: int) -> NDArray[np.uint8] | None:

        if position not in self._references:
            try:
                image = self._scene.images[position]
                self._references[position] = read_image(inside(self._images, image.name), image.camera)
            except (FrameError, SourceError):
                self._references[position] = None
        return self._references[position]

    def close(self) -> list[str]:
        """Finish the files; return their description."""
        self._confidences.close()
        written = list(self._confidences.written)
        if self._count:
            written.append(f"{self._out / 'alignment'}: {self._count} alignments, .png and .mp4")
            page = self._page.write(self._out / "alignment.html")
            written.append(f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in any browser")
        return written
