# SPDX-License-Identifier: Apache-2.0
"""Offline run of a localizer over a source, frame after frame, and the record kept of each frame."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource, Selection
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.judgement import EVIDENCE
from kfloc_ros.localization.place_localizer import AnyLocalizer, localizer_for, preparer
from kfloc_ros.localization.results import Ahead, Localization
from kfloc_ros.maps.place import load_map
from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState

STATISTICS = {
    "inlier_count": "inliers",
    "inlier_ratio": "inlier_ratio",
    "prior_ratio": "prior_ratio",
    "nis_mean": "nis",
    "rejected_ratio": "rejected_ratio",
    "alignment_initial_cost": "alignment_initial_cost",
    "alignment_final_cost": "alignment_final_cost",
    "alignment_valid_ratio": "alignment_valid_ratio",
    "alignment_iterations": "alignment_iterations",
    "confidence": "confidence",
    **{name: name for name in EVIDENCE},
}
"""Statistics of the stages by their names in records, with their keys in the nodes' ``status``."""
STAGES = (
    "decode", "rectify", "backbone", "measure", "filter", "pnp", "refine", "search_near", "relocalize", "check",
    "change_over", "publish", "total",
)  # fmt: skip
"""Stages in the order of their work, as named in ``timings_ms``; no run has times of all."""


@dataclass(frozen=True, eq=False)
class FrameRecord:
    """Frame given to the localizer, with its result and the truth.

    Poses are ``T_map_camera`` (4, 4); ``covariance`` is 6x6 in the order of :mod:`kfloc_ros.types`.
    """

    index: int
    stamp_ns: int
    truth: Matrix | None
    estimate: Matrix | None = None
    coarse: Matrix | None = None
    """Pose before refinement."""
    state: str = TrackingState.LOST.value
    reason: str = ""
    covariance: Matrix | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    """Numbers of the stages, by the names of ``STATISTICS``."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    """Offline: time in the localizer. Replay: wall time from the image's publication to the pose's arrival."""
    tracked: bool = False
    """True if the frame was aligned from the predicted pose alone, so that it has no coarse pose."""
    name: str = ""
    """Name of the image; empty if it has none."""
    processed: bool = True
    """False for a frame that was played but not answered by the nodes (dropped or lost)."""


def record_of(frame: Frame, estimate: PoseEstimate, *, latency_ms: float, rectify_ms: float) -> FrameRecord:
    """Return the record of one frame that was localized in this process."""
    stats: dict[str, float] = {}
    if estimate.coarse is not None:
        stats["inlier_count"] = estimate.coarse.inlier_count
        stats["inlier_ratio"] = estimate.coarse.inlier_ratio
    if estimate.filter is not None:
        stats["prior_ratio"] = estimate.filter.prior_ratio
        stats["nis_mean"] = estimate.filter.nis_mean
        stats["rejected_ratio"] = estimate.filter.rejected_ratio
    if estimate.alignment is not None:
        stats["alignment_initial_cost"] = estimate.alignment.initial_cost
        stats["alignment_final_cost"] = estimate.alignment.final_cost
        stats["alignment_valid_ratio"] = estimate.alignment.valid_ratio
        stats["alignment_iterations"] = estimate.alignment.iterations
    if estimate.confidence is not None:
        stats |= {"confidence": estimate.confidence, **estimate.evidence}
    return FrameRecord(
        index=frame.index,
        stamp_ns=frame.stamp_ns,
        truth=frame.T_map_camera,
        estimate=estimate.T_map_camera,
        coarse=estimate.coarse.T_map_camera if estimate.coarse is not None and estimate.coarse.success else None,
        state=estimate.state.value,
        reason=estimate.reason,
        covariance=estimate.covariance,
        stats=stats,
        timings_ms={"rectify": rectify_ms, **estimate.timings_ms},
        latency_ms=latency_ms,
        tracked=estimate.tracked,
        name=frame.name,
    )


@dataclass(frozen=True)
class Recording:
    """One recording of a source, to be localized by a localizer of its own."""

    source: str
    poses: str
    frames: str | None
    split: str | None
    strict: bool
    number: int
    """As :meth:`FrameSource.sequences` numbers it."""
    map: Path
    config: LocalizerConfig


def localize_recording(recording: Recording) -> tuple[list[FrameRecord], str]:
    """Return the records of one recording, and the localizer's note on its camera.

    Raises:
        SourceError: an image cannot be read.
    """
    source = open_source(
        recording.source, poses=recording.poses, frames=recording.frames, split=recording.split,
        depth=recording.config.use_depth, strict=recording.strict,
    )  # fmt: skip
    positions = [position for position, number in enumerate(source.sequences()) if number == recording.number]
    localizer = localizer_for(load_map(recording.map), recording.config)
    return list(localize_source(localizer, Selection(source, positions))), localizer.camera_note


@dataclass(frozen=True, eq=False)
class LocalizedFrame:
    """Frame of a source with its result."""

    frame: Frame
    """Frame of the source, unchanged."""
    estimate: PoseEstimate
    localization: Localization | None
    """None if the localizer refused the frame; the estimate then has the reason."""
    latency_ms: float
    """Time from the decoded image to the pose: adapting the image to the map's camera, and localizing."""
    rectify_ms: float

    @property
    def record(self) -> FrameRecord:
        """Record of the frame."""
        return record_of(self.frame, self.estimate, latency_ms=self.latency_ms, rectify_ms=self.rectify_ms)


def localize_source(localizer: AnyLocalizer, source: FrameSource) -> Iterator[FrameRecord]:
    """Yield one record a frame, in order; see :func:`localize_frames`.

    Raises:
        SourceError: an image cannot be read.
    """
    for item in localize_frames(localizer, source):
        yield item.record


def localize_frames(
    localizer: AnyLocalizer, source: FrameSource, *, ahead: bool | None = None
) -> Iterator[LocalizedFrame]:
    """Localize frame after frame: the run that ``localize`` writes and that ``show`` and ``view`` draw.

    A frame that the localizer refuses is ``LOST`` with the reason; the localizer itself resets where stamps jump.

    Args:
        localizer: localizer of a map or a place.
        source: frames.
        ahead: run the networks on the next frame in a second thread while one is localized. The results are the
            same. None: on a processor with a second core.

    Raises:
        SourceError: an image cannot be read.
    """
    adapter = ImageAdapter(source.camera, localizer.camera)
    prepare = preparer(localizer, ahead)

    def prepared(frame: Frame) -> _Prepared:
        start = time.perf_counter()
        adapted = Frame(
            image=adapter(frame.image),
            camera=adapter.target,
            stamp_ns=frame.stamp_ns,
            index=frame.index,
            name=frame.name,
            depth_m=None if frame.depth_m is None else adapter.nearest(frame.depth_m),
            T_map_camera=frame.T_map_camera,
            source_camera=frame.camera,
        )
        rectify_ms = 1e3 * (time.perf_counter() - start)
        computed = None if prepare is None else prepare(adapted)
        return _Prepared(adapted, computed, rectify_ms, 1e3 * (time.perf_counter() - start))

    def help_with(ready: Future[_Prepared]) -> None:
        if ready.exception() is None and (given := ready.result().ahead) is not None:
            given.help()

    def localized(frame: Frame, work: Callable[[], _Prepared]) -> LocalizedFrame:
        start, before_ms, rectify_ms = time.perf_counter(), 0.0, 0.0
        try:
            given = work()
            if prepare is not None:  # what was waited for was done beside the frame before
                start, before_ms = time.perf_counter(), given.spent_ms
            rectify_ms = given.rectify_ms
            localization = localizer.process(given.frame, ahead=given.ahead)
            estimate = localization.estimate
        except FrameError as error:
            localization, rectify_ms = None, 0.0
            estimate = PoseEstimate(frame.stamp_ns, TrackingState.LOST, str(error))
        latency_ms = before_ms + 1e3 * (time.perf_counter() - start)
        return LocalizedFrame(frame, estimate, localization, latency_ms, rectify_ms)

    if prepare is None:
        for frame in source:
            yield localized(frame, partial(prepared, frame))
        return
    with ThreadPoolExecutor(1, "ahead") as pool:
        waiting: tuple[Frame, Future[_Prepared]] | None = None
        try:
            for frame in source:
                # images are read in this thread: what reads a bag may belong to the thread that opened it
                following = frame, pool.submit(prepared, frame)
                pool.submit(help_with, following[1])
                if waiting is not None:
                    yield localized(waiting[0], waiting[1].result)
                waiting = following
        except SourceError:  # the frames before it are localized first
            if waiting is not None:
                yield localized(waiting[0], waiting[1].result)
            raise
        if waiting is not None:
            yield localized(waiting[0], waiting[1].result)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Frame of the map's camera, with what was computed of it ahead."""

    frame: Frame
    ahead: Ahead | None
    rectify_ms: float
    spent_ms: float
