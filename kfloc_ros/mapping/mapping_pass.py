# SPDX-License-Identifier: Apache-2.0
"""One pass over a source: training cells, reference views, and views held out, all in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone, BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.kfnet.scoordnet import INPUT_CHANNELS
from kfloc_ros.mapping.depth_checks import DEPTH, UNREADABLE, DepthChecks
from kfloc_ros.mapping.schedule import HeldOut, HoldOut, TimeBudget
from kfloc_ros.mapping.views import (
    IDENTITY,
    Cells,
    ReferenceCollector,
    View,
    random_similarity,
    sample_cells,
    warp_image,
)
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, extract_reference_points
from kfloc_ros.types import Frame

MIN_VIEWS = 8
MIN_CELLS = 5_000
MAX_CELLS = 5_000_000
"""Cells in the training buffer (2 GB); long sources give fewer cells a view."""
MIN_CELLS_PER_VIEW = 64
MIN_DEPTH_SHARE = 0.05


@dataclass(frozen=True)
class MappingPassSettings:
    """What is taken from every view."""

    augmentations: int
    points_per_view: int
    reference_spacing_m: float
    max_points: int
    seed: int


@dataclass(frozen=True, eq=False)
class MappingPass:
    """What one pass over the views yields."""

    cells: Cells
    references: ReferenceViews
    all_references: ReferenceViews
    """With those of the held-out views, which may join once calibration is done: there is no reason for a gap."""
    held_out: list[HeldOut]
    used: int
    left_out: Mapping[str, int]
    """Frames that were not good enough, by reason."""
    unread: int
    """Frames left out for want of time."""
    backbone_pass_s: float
    """What a pass through the backbone took, with everything else divided among the passes."""


class CellBuffer:
    """Training cells of all views in one block of memory; when it is full, later cells replace random ones.

    Args:
        capacity: cells held at most.
        rng: for what is replaced.
    """

    def __init__(self, capacity: int, rng: np.random.Generator) -> None:
        # untouched pages of an empty tensor take no memory, and nothing is copied at the end
        self._inputs = torch.empty(capacity, INPUT_CHANNELS, dtype=torch.float16)
        self._coordinates = torch.empty(capacity, 3)
        self._rng, self._seen = rng, 0

    def __len__(self) -> int:
        return min(self._seen, len(self._inputs))

    def add(self, cells: Cells) -> None:
        """Take cells; every cell ever given has the same chance to be held (Vitter's reservoir)."""
        count, capacity = len(cells.inputs), len(self._inputs)
        numbers = np.arange(self._seen, self._seen + count)
        places = numbers.copy()
        late = numbers >= capacity
        places[late] = self._rng.integers(0, numbers[late] + 1)
        places, first = np.unique(places, return_index=True)  # no place twice: inputs and coordinates must not mix
        kept = torch.from_numpy(first[places < capacity])
        rows = torch.from_numpy(places[places < capacity])
        self._inputs[rows] = cells.inputs[kept]
        self._coordinates[rows] = cells.coordinates[kept]
        self._seen += count

    def cells(self) -> Cells:
        """What is held."""
        return Cells(self._inputs[: len(self)], self._coordinates[: len(self)])


def mapping_pass_over(
    source: FrameSource,
    camera: Camera,
    backbone: Backbone,
    settings: MappingPassSettings,
    time_budget: TimeBudget,
    on_view: Callable[[int], None],
) -> MappingPass:
    """Read the views of a source once.

    Args:
        source: views with depth and poses.
        camera: the map's, which images are brought to.
        backbone: for their features.
        settings: what is taken from them.
        time_budget: which of them there is time for.
        on_view: told the position of every view used.

    Raises:
        SourceError: too few views with depth and pose.
    """
    rng = np.random.default_rng(settings.seed)
    copies = 1 + settings.augmentations
    grid_cells = (camera.width // COARSE_STRIDE) * (camera.height // COARSE_STRIDE)
    limit = max(MIN_CELLS_PER_VIEW, MAX_CELLS // (len(source) * copies))
    buffer = CellBuffer(min(MAX_CELLS, len(source) * copies * min(limit, grid_cells)), rng)
    collector = ReferenceCollector(settings.reference_spacing_m, settings.max_points)
    adapter = ImageAdapter(source.camera, camera)
    screening = DepthChecks()
    held_out: list[HeldOut] = []
    held_out_points: list[ReferencePoints] = []
    used = passes = 0
    start = time.monotonic()

    def reference_points(view: View, features: BackboneFeatures) -> ReferencePoints:
        return extract_reference_points(features, view.depth_m, camera, view.T_map_camera, settings.points_per_view)

    reading = _Reading(source, time_budget)
    for position, frame in screening.good(iter(reading)):
        view = _view(frame, adapter)
        if view is None:
            screening.left_out[DEPTH] += 1
            continue
        on_view(position)
        used += 1
        passes += 1
        features = backbone.extract(view.image)
        run = reading.held_out.get(position)
        if run is not None:
            held_out.append(HeldOut(view, frame.stamp_ns, run))
            held_out_points.append(reference_points(view, features))
            continue
        buffer.add(sample_cells(view, features, IDENTITY, limit, rng))
        for _ in range(settings.augmentations):
            similarity = random_similarity(camera, rng)
            augmented = backbone.extract(warp_image(view.image, similarity))
            buffer.add(sample_cells(view, augmented, similarity, limit, rng))
            passes += 1
        if collector.wants(view.T_map_camera):
            collector.add(view.index, view.T_map_camera, reference_points(view, features))
    if source.left_out:
        screening.left_out[UNREADABLE] += len(source.left_out)
    if used < MIN_VIEWS or not len(collector) or len(buffer) < MIN_CELLS:
        raise SourceError(
            f"'{source.name}' has {used} usable views with depth and pose out of {len(source)}"
            f"{_told(screening.left_out)}; a map needs at least {MIN_VIEWS}, with usable depth in most of the image."
        )
    references = collector.views()
    for held, points in zip(held_out, held_out_points, strict=True):
        if collector.wants(held.view.T_map_camera):
            collector.add(held.view.index, held.view.T_map_camera, points)
    return MappingPass(
        buffer.cells(),
        references,
        collector.views(),
        held_out,
        used,
        dict(screening.left_out),
        reading.unread,
        (time.monotonic() - start) / max(passes, 1),
    )


class _Reading:
    """The frames that there is time for, with their positions."""

    def __init__(self, source: FrameSource, time_budget: TimeBudget) -> None:
        self._source, self._time_budget = source, time_budget
        self.unread = 0
        self.held_out: dict[int, int] = {}
        """Run of every position that is kept from training."""

    def __iter__(self) -> Iterator[tuple[int, Frame]]:
        count = len(self._source)
        hold_out = HoldOut(count)
        for position in range(count):
            kept = hold_out.wants(position)
            if not self._time_budget.wants(count - position, needed=kept):
                self.unread += 1
                continue
            frame = self._source.read(position)
            if frame is None:
                continue
            if kept:
                self.held_out[position] = hold_out.runs
                hold_out.saw(position, frame.T_map_camera)
            yield position, frame


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Such as ``3 blurred, 1 without a pose``; empty if nothing was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))


def _told(left_out: Mapping[str, int]) -> str:
    text = describe_left_out(left_out)
    return f" ({text})" if text else ""


def _view(frame: Frame, adapter: ImageAdapter) -> View | None:
    """A frame with a pose as a view of the map's camera, or None if it has hardly any depth."""
    if frame.depth_m is None or frame.T_map_camera is None:
        return None
    depth = adapter.nearest(frame.depth_m)
    if np.count_nonzero(depth) < MIN_DEPTH_SHARE * depth.size:
        return None
    return View(adapter(frame.image), depth, adapter.target, frame.T_map_camera, frame.index)
