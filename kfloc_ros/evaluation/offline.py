# SPDX-License-Identifier: Apache-2.0
"""Offline run of a localizer over a source, frame after frame, without ROS."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from kfloc_ros.errors import FrameError
from kfloc_ros.evaluation.records import FrameRecord, record_of
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.localization.place_localizer import AnyLocalizer
from kfloc_ros.localization.results import Localization
from kfloc_ros.types import Frame, PoseEstimate, TrackingState


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


def localize_source(localizer: AnyLocalizer, source: FrameSource) -> Iterator[FrameRecord]:
    """Yield one record a frame, in order; see :func:`localize_frames`.

    Raises:
        SourceError: an image cannot be read.
    """
    for item in localize_frames(localizer, source):
        yield record_of(item.frame, item.estimate, latency_ms=item.latency_ms, rectify_ms=item.rectify_ms)


def localize_frames(localizer: AnyLocalizer, source: FrameSource) -> Iterator[LocalizedFrame]:
    """Localize frame after frame: the run that ``localize`` writes and that ``show`` and ``view`` draw.

    A frame that the localizer refuses is ``LOST`` with the reason; the localizer itself resets where stamps jump.

    Raises:
        SourceError: an image cannot be read.
    """
    adapter = ImageAdapter(source.camera, localizer.camera)
    for frame in source:
        start = time.perf_counter()
        try:
            adapted = Frame(
                image=adapter(frame.image),
                camera=adapter.target,
                stamp_ns=frame.stamp_ns,
                index=frame.index,
                name=frame.name,
                T_map_camera=frame.T_map_camera,
                source_camera=frame.camera,
            )
            rectify_ms = 1e3 * (time.perf_counter() - start)
            localization = localizer.process(adapted)
            estimate = localization.estimate
        except FrameError as error:
            localization, rectify_ms = None, 0.0
            estimate = PoseEstimate(frame.stamp_ns, TrackingState.LOST, str(error))
        yield LocalizedFrame(frame, estimate, localization, 1e3 * (time.perf_counter() - start), rectify_ms)
