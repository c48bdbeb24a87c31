# SPDX-License-Identifier: Apache-2.0
"""Mapping pass over a source: collects training cells, reference views and held-out views in bounded memory."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone, BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.kfnet.scoordnet import INPUT_CHANNELS
from kfloc_ros.mapping.checked_references import CheckedReferences
from kfloc_ros.mapping.frame_checks import DEPTH, UNREADABLE, CheckedFrame, FrameChecks
from kfloc_ros.mapping.point_evidence import PointEvidence
from kfloc_ros.mapping.schedule import HeldOut, HoldOut, TimeBudget
from kfloc_ros.mapping.views import (
    IDENTITY,
    Cells,
    ReferenceCollector,
    View,
    joined,
    random_similarity,
    sample_cells,
    warp_image,
)
from kfloc_ros.pixloc.patches import with_patches
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, extract_reference_points
from kfloc_ros.types import Frame

MIN_VIEWS = 8
MIN_CELLS = 5_000
MAX_CELLS = 5_000_000
"""Limit on cells in the training buffer (2 GB); of long sources, fewer cells per view are used."""
MIN_CELLS_PER_VIEW = 64
HELD_OUT_CELLS = 64
"""Number of cells of a held-out view that are kept."""
MIN_DEPTH_SHARE = 0.05


@dataclass(frozen=True)
class MappingPassSettings:
    """Amounts of data taken from every view."""

    augmentations: int
    points_per_view: int
    reference_spacing_m: float
    max_points: int
    seed: int


@dataclass(frozen=True, eq=False)
class MappingPass:
    """Result of a mapping pass."""

    cells: Cells
    references: CheckedReferences
    """References without the held-out views."""
    all_references: ReferenceViews
    """References including the held-out views, which join after calibration so that the map has no gap there."""
    held_out: list[HeldOut]
    held_out_cells: Cells
    """Some cells of every held-out view, to tell when training stops helping."""
    used: int
    left_out: Mapping[str, int]
    """Number of frames that failed a check, by reason."""
    unread: int
    """Number of frames left out for lack of time."""
    backbone_pass_s: float
    """Time per backbone pass in seconds, including all other work of the mapping pass."""


class CellBuffer:
    """Training cells of all views in one block of memory; when it is full, later cells replace random ones.

    Args:
        capacity: limit on cells.
        rng: random generator of the replacement.
    """

    def __init__(self, capacity: int, rng: np.random.Generator) -> None:
        # untouched pages of an empty tensor use no memory, and nothing is copied at the end
        self._inputs = torch.empty(capacity, INPUT_CHANNELS, dtype=torch.float16)
        self._coordinates = torch.empty(capacity, 3)
        self._rng, self._seen = rng, 0

    def __len__(self) -> int:
        return min(self._seen, len(self._inputs))

    def add(self, cells: Cells) -> None:
        """Add cells; every cell ever added has the same probability of being stored (Vitter's reservoir sampling)."""
        count, capacity = len(cells.inputs), len(self._inputs)
        numbers = np.arange(self._seen, self._seen + count)
        places = numbers.copy()
        late = numbers >= capacity
        places[late] = self._rng.integers(0, numbers[late] + 1)
        places, first = np.unique(places, return_index=True)  # no index twice: inputs and coordinates must not mix
        chosen = torch.from_numpy(first[places < capacity])
        rows = torch.from_numpy(places[places < capacity])
        self._inputs[rows] = cells.inputs[chosen]
        self._coordinates[rows] = cells.coordinates[chosen]
        self._seen += count

    def cells(self) -> Cells:
        """Return the stored cells."""
        return Cells(self._inputs[: len(self)], self._coordinates[: len(self)])


@dataclass(frozen=True, eq=False)
class _Taken:
    """What one view gives."""

    view: View
    features: BackboneFeatures
    cells: list[Cells]
    """Of the view and of its augmented copies."""


class _Taker:
    """Takes from one view what the map needs of it; several threads call it.

    Args:
        camera: camera of the map.
        adapter: adapts images to that camera.
        backbone: feature network.
        settings: amounts of data.
        limit: limit on the training cells of a view.
    """

    def __init__(
        self, camera: Camera, adapter: ImageAdapter, backbone: Backbone, settings: MappingPassSettings, limit: int
    ) -> None:
        self._camera, self._adapter, self._backbone = camera, adapter, backbone
        self._settings, self._limit = settings, limit

    def take(self, position: int, frame: Frame, *, held_out: bool) -> _Taken | None:
        """Return what a frame gives, a held-out one without augmented copies; None if it has almost no depth."""
        view = _view(frame, self._adapter)
        if view is None:
            return None
        features = self._backbone.extract(view.image)
        rng = np.random.default_rng((self._settings.seed, position))  # of its own: threads finish in any order
        cells = [sample_cells(view, features, IDENTITY, HELD_OUT_CELLS if held_out else self._limit, rng)]
        for _ in range(0 if held_out else self._settings.augmentations):
            similarity = random_similarity(self._camera, rng)
            augmented = self._backbone.extract(warp_image(view.image, similarity))
            cells.append(sample_cells(view, augmented, similarity, self._limit, rng))
        return _Taken(view, features, cells)

    def reference_points(self, taken: _Taken) -> ReferencePoints:
        """Return the reference points of a view, with their patches."""
        view = taken.view
        points = extract_reference_points(
            taken.features, view.depth_m, self._camera, view.T_map_camera, self._settings.points_per_view
        )
        return with_patches(points, view.image, self._camera, view.T_map_camera)


def mapping_pass_over(
    source: FrameSource,
    camera: Camera,
    backbone: Backbone,
    settings: MappingPassSettings,
    time_budget: TimeBudget,
    on_view: Callable[[int], None],
) -> MappingPass:
    """Run the mapping pass over a source.

    Args:
        source: views with depth and poses.
        camera: camera of the map, to which images are adapted.
        backbone: feature network.
        settings: amounts of data taken from every view.
        time_budget: decides how many views are read.
        on_view: called with the position of every used view.

    Raises:
        SourceError: too few views with depth and pose.
    """
    copies = 1 + settings.augmentations
    grid_cells = (camera.width // COARSE_STRIDE) * (camera.height // COARSE_STRIDE)
    limit = max(MIN_CELLS_PER_VIEW, MAX_CELLS // (len(source) * copies))
    capacity = min(MAX_CELLS, len(source) * copies * min(limit, grid_cells))
    buffer = CellBuffer(capacity, np.random.default_rng(settings.seed))
    collector = ReferenceCollector(settings.reference_spacing_m, settings.max_points)
    taker = _Taker(camera, ImageAdapter(source.camera, camera), backbone, settings, limit)
    checks, evidence = FrameChecks(), PointEvidence(camera)
    held_out: list[HeldOut] = []
    held_out_points: list[ReferencePoints] = []
    held_out_cells: list[Cells] = []
    used = passes = 0
    start = time.monotonic()
    reading, recordings = _Reading(source, time_budget), source.sequences()

    def take(position: int, frame: Frame) -> _Taken | None:
        return taker.take(position, frame, held_out=position in reading.held_out)

    for (position, frame), taken in _beside(take, checks.passing(iter(reading))):
        if taken is None:
            checks.left_out[DEPTH] += 1
            continue
        on_view(position)
        used += 1
        passes += len(taken.cells)
        run = reading.held_out.get(position)
        if run is not None:
            held_out.append(HeldOut(taken.view, frame.stamp_ns, run, recordings[position]))
            held_out_points.append(taker.reference_points(taken))
            held_out_cells += taken.cells
            continue
        for cells in taken.cells:
            buffer.add(cells)
        evidence.add(taken.view, taken.features)
        if collector.extends_coverage(taken.view.T_map_camera):
            collector.add(taken.view.index, taken.view.T_map_camera, taker.reference_points(taken))
    if source.left_out:
        checks.left_out[UNREADABLE] += len(source.left_out)
    if used < MIN_VIEWS or not len(collector) or len(buffer) < MIN_CELLS:
        raise SourceError(
            f"'{source.name}' has {used} usable views with depth and pose out of {len(source)}"
            f"{_reasons(checks.left_out)}; a map needs at least {MIN_VIEWS}, with usable depth in most of the image."
        )
    references = _check_references(collector, held_out, held_out_points, evidence)
    return MappingPass(
        buffer.cells(),
        references,
        collector.views(),
        held_out,
        joined(held_out_cells),
        used,
        dict(checks.left_out),
        reading.unread,
        (time.monotonic() - start) / max(passes, 1),
    )


def _check_references(
    collector: ReferenceCollector,
    held_out: list[HeldOut],
    held_out_points: list[ReferencePoints],
    evidence: PointEvidence,
) -> CheckedReferences:
    """Check the points of all views, add held-out views that extend the coverage; return references without them."""
    collected = collector.views()
    ids = (*collected.ids, *(held.view.index for held in held_out))
    poses = np.stack([*collected.T_map_camera, *(held.view.T_map_camera for held in held_out)])
    checked = CheckedReferences.of(evidence, ReferenceViews(ids, poses, (*collected.views, *held_out_points)))
    references = checked.first(len(collected.views))
    collector.replace(references.views)
    for held, points in zip(held_out, checked.views.views[len(collected.views) :], strict=True):
        if collector.extends_coverage(held.view.T_map_camera):
            collector.add(held.view.index, held.view.T_map_camera, points)
    return references


def _beside(
    take: Callable[[int, Frame], _Taken | None], frames: Iterable[CheckedFrame]
) -> Iterator[tuple[CheckedFrame, _Taken | None]]:
    """Yield each frame with what it gives, in order; as many threads as there are cores work a few frames ahead.

    Frames are read in the caller's thread: what reads a bag may belong to the thread that opened it.
    """
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, "views") as pool:
        waiting: deque[tuple[CheckedFrame, Future[_Taken | None]]] = deque()
        try:
            for item in frames:
                waiting.append((item, pool.submit(take, item.position, item.frame)))
                if len(waiting) > threads + 1:
                    first, taken = waiting.popleft()
                    yield first, taken.result()
            while waiting:
                first, taken = waiting.popleft()
                yield first, taken.result()
        finally:
            for _, taken in waiting:
                taken.cancel()


class _Reading:
    """Reader of the frames that fit into the time budget, with their positions."""

    def __init__(self, source: FrameSource, time_budget: TimeBudget) -> None:
        self._source, self._time_budget = source, time_budget
        self.unread = 0
        self.held_out: dict[int, int] = {}
        """Run number by position of the held-out views."""

    def __iter__(self) -> Iterator[tuple[int, Frame]]:
        count = len(self._source)
        hold_out = HoldOut(count)
        for position in range(count):
            held_out = hold_out.holds_out(position)
            if not self._time_budget.allows_view(count - position, needed=held_out):
                self.unread += 1
                continue
            frame = self._source.read(position)
            if frame is None:
                continue
            if held_out:
                self.held_out[position] = hold_out.runs
                hold_out.record(position, frame.T_map_camera)
            yield position, frame


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Return text such as ``3 blurred, 1 without a pose``; empty if no frame was left out."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items(), key=lambda item: -item[1]))


def _reasons(left_out: Mapping[str, int]) -> str:
    text = describe_left_out(left_out)
    return f" ({text})" if text else ""


def _view(frame: Frame, adapter: ImageAdapter) -> View | None:
    """Return a frame with a pose as a view of the map's camera, or None if it has almost no depth."""
    if frame.depth_m is None or frame.T_map_camera is None:
        return None
    depth = adapter.nearest(frame.depth_m)
    if np.count_nonzero(depth) < MIN_DEPTH_SHARE * depth.size:
        return None
    return View(adapter(frame.image), depth, adapter.target, frame.T_map_camera, frame.index)
