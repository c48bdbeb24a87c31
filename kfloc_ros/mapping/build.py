# SPDX-License-Identifier: Apache-2.0
"""Building a map: one pass over the views, training of the head, calibration on views held out."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfloc_ros import __version__
from kfloc_ros.config import option
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.device import choose_device
from kfloc_ros.errors import MapError, SourceError
from kfloc_ros.features.trunk import Trunk, TrunkFeatures, find_weights
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.kfnet.scoordnet import INPUT_CHANNELS
from kfloc_ros.mapping.calibration import calibrate
from kfloc_ros.mapping.scene_map import DESCRIPTION, Calibration, SceneMap
from kfloc_ros.mapping.views import (
    IDENTITY,
    Cells,
    ReferenceCollector,
    View,
    map_camera,
    random_similarity,
    sample_cells,
    warp_image,
)
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, extract_reference_points
from kfloc_ros.training.scene_head import HeadProgress, HeadTraining, train_head
from kfloc_ros.types import Frame

MIN_VIEWS = 8
HOLD_OUT_PERIOD = 100
"""Of every 100 views, the middle ``HOLD_OUT_LENGTH`` are kept from training, for calibration."""
HOLD_OUT_LENGTH = 8
MAX_CELLS = 5_000_000
"""Cells in the training buffer (about 2 GB); long sources give fewer cells a view."""


@dataclass(frozen=True)
class MapBuildConfig:
    """Options of ``kfloc map build``."""

    train_seconds: float = option(
        240.0, "Time for training the head; the whole build takes a minute or two more.", low=1.0, high=86_400.0
    )
    train_steps: int = option(
        0, "End training after so many steps, for a repeatable map on a machine of any speed; 0: by time.", low=0
    )
    augmentations: int = option(1, "Rotated and zoomed copies of every view for training.", low=0, high=10)
    points_per_view: int = option(300, "Points kept of every reference view.", low=50, high=5000)
    reference_spacing_m: float = option(
        0.04, "A view becomes a reference if none is nearer (a degree counts as 2 cm).", low=0.001, high=10.0
    )
    max_references: int = option(500, "Reference views kept at most; the spacing grows as needed.", low=4, high=10_000)
    device: str = option(
        "auto", "Where networks run: auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda")
    )
    seed: int = option(0, "Seed of every random choice.", low=0)


@dataclass(frozen=True)
class BuildProgress:
    """Where a build stands, for display."""

    stage: str
    share_done: float
    text: str = ""


@dataclass(frozen=True, eq=False)
class _Survey:
    """What one pass over the views yields."""

    cells: Cells
    references: ReferenceViews
    all_references: ReferenceViews
    """With those of the held-out views, which may join once calibration is done: there is no reason for a gap."""
    held_out: list[View]
    stamps_ns: list[int]
    used: int
    skipped: int


def build_map(
    source: FrameSource,
    out: Path,
    config: MapBuildConfig | None = None,
    *,
    name: str = "",
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
) -> SceneMap:
    """Build a map from a source with depth and poses and write it.

    Nothing is written before the end, so an interruption leaves an older map as it was.

    Raises:
        SourceError: too few views with depth and pose.
        MapError: the folder exists and ``overwrite`` is false, or cannot be written.
    """
    config = config or MapBuildConfig()
    if out.exists() and not (overwrite and (out / DESCRIPTION).is_file()):
        raise MapError(f"'{out}' exists; pass --force to replace a map, or name another folder.")
    start = time.monotonic()
    device = choose_device(config.device)
    trunk = Trunk(device=device)
    camera = map_camera(source.camera)
    survey = _survey(source, camera, trunk, config, on_progress)

    def training(progress: HeadProgress) -> None:
        text = f"loss {progress.loss:.2f}, error {progress.median_error_m * 100:.1f} cm, step {progress.step}"
        on_progress(BuildProgress("train", progress.share_done, text))

    settings = HeadTraining(seconds=config.train_seconds, steps=config.train_steps, seed=config.seed)
    head = train_head(survey.cells.inputs, survey.cells.coordinates, settings, device, training)
    points = survey.cells.coordinates
    draft = SceneMap(
        name=name or out.name,
        frame_id="map",
        camera=camera,
        head=head,
        references=survey.references,
        calibration=Calibration(),
        bounds_m=_bounds(points),
        provenance={
            "source": source.name,
            "views": survey.used,
            "views_skipped": survey.skipped,
            "references": len(survey.all_references.ids),
            "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "kfloc_ros": __version__,
            "trunk": find_weights().name,
            **(provenance or {}),
            "build_seconds": round(time.monotonic() - start, 1),
        },
    )

    def calibrating(share: float, text: str) -> None:
        on_progress(BuildProgress("calibrate", share, text))

    finished = calibrate(draft, survey.held_out, survey.stamps_ns, config.device, calibrating)
    finished = dataclasses.replace(finished, references=survey.all_references)
    finished.save(out, overwrite=overwrite)
    on_progress(BuildProgress("done", 1.0, f"'{out}' after {time.monotonic() - start:.0f} s"))
    return SceneMap.load(out)


def _survey(
    source: FrameSource,
    camera: Camera,
    trunk: Trunk,
    config: MapBuildConfig,
    on_progress: Callable[[BuildProgress], None],
) -> _Survey:
    """Read every view once: training cells, reference views, and the views held out."""
    rng = np.random.default_rng(config.seed)
    copies = 1 + config.augmentations
    limit = max(64, MAX_CELLS // (len(source) * copies))
    collector = ReferenceCollector(config.reference_spacing_m, config.max_references)
    adapter = ImageAdapter(source.camera, camera)
    inputs: list[torch.Tensor] = []
    coordinates: list[torch.Tensor] = []
    held_out: list[View] = []
    held_out_points: list[ReferencePoints] = []
    stamps: list[int] = []
    used = 0

    def reference_points(view: View, features: TrunkFeatures) -> ReferencePoints:
        return extract_reference_points(features, view.depth_m, camera, view.T_map_camera, config.points_per_view)

    for position, frame in enumerate(source):
        on_progress(BuildProgress("read", position / len(source), f"view {position + 1} of {len(source)}"))
        view = _view(frame, adapter)
        if view is None:
            continue
        used += 1
        features = trunk.extract(view.image)
        if is_held_out(position, len(source)):
            held_out.append(view)
            stamps.append(frame.stamp_ns)
            held_out_points.append(reference_points(view, features))
            continue
        samples = [sample_cells(view, features, IDENTITY, limit, rng)]
        for _ in range(config.augmentations):
            similarity = random_similarity(camera, rng)
            augmented = trunk.extract(warp_image(view.image, similarity))
            samples.append(sample_cells(view, augmented, similarity, limit, rng))
        inputs += [s.inputs for s in samples]
        coordinates += [s.coordinates for s in samples]
        if collector.wants(view.T_map_camera):
            collector.add(view.index, view.T_map_camera, reference_points(view, features))
    if used < MIN_VIEWS or not len(collector) or sum(map(len, inputs)) < MIN_CELLS:
        raise SourceError(
            f"'{source.name}' has {used} views with depth and pose out of {len(source)}; "
            f"a map needs at least {MIN_VIEWS}, with usable depth in most of the image."
        )
    cells = Cells(torch.cat(inputs), torch.cat(coordinates))
    assert cells.inputs.shape[1] == INPUT_CHANNELS
    references = collector.views()
    for view, points in zip(held_out, held_out_points, strict=True):
        if collector.wants(view.T_map_camera):
            collector.add(view.index, view.T_map_camera, points)
    return _Survey(cells, references, collector.views(), held_out, stamps, used, len(source) - used)


MIN_CELLS = 5_000


def is_held_out(position: int, count: int) -> bool:
    """Whether the view at a position is kept from training: short runs, so that the filter can be calibrated too."""
    if count < 2 * HOLD_OUT_PERIOD:  # a short source cannot spare runs of eight in a hundred
        period, length = max(count // 4, 4), max(2, min(HOLD_OUT_LENGTH, count // 24))
    else:
        period, length = HOLD_OUT_PERIOD, HOLD_OUT_LENGTH
    phase = position % period - period // 2
    return 0 <= phase < length


def _view(frame: Frame, adapter: ImageAdapter) -> View | None:
    """A frame as a view of the map's camera, or None if it has no depth or no finite pose."""
    if frame.depth_m is None or frame.T_map_camera is None or not np.isfinite(frame.T_map_camera).all():
        return None
    depth = adapter.nearest(frame.depth_m)
    if np.count_nonzero(depth) < 0.05 * depth.size:
        return None
    return View(adapter(frame.image), depth, adapter.target, frame.T_map_camera, frame.index)


def _bounds(points: torch.Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Box that holds 99.8 % of the points in every axis: a few depth outliers would make it meaningless."""
    sample = points[:: max(1, len(points) // 100_000)].double()
    low, high = (torch.quantile(sample, q, dim=0).tolist() for q in (0.001, 0.999))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])
