# SPDX-License-Identifier: Apache-2.0
"""Runs a localizer over a source, frame after frame, without ROS."""

from __future__ import annotations

import time
from collections.abc import Iterator

from kfloc_ros.errors import FrameError
from kfloc_ros.evaluation.records import FrameRecord, record_of
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.localization.localizer import Pipeline
from kfloc_ros.types import Frame, PoseEstimate, TrackingState


def localize_source(localizer: Pipeline, source: FrameSource) -> Iterator[FrameRecord]:
    """Yield one record a frame, in order.

    The latency runs from the decoded image to the pose: adapting the image to the map's camera and
    localizing, but not reading the file. A frame that the localizer refuses becomes a ``LOST`` record
    with the reason; the localizer itself resets where stamps jump.

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
            )
            adapt_ms = 1e3 * (time.perf_counter() - start)
            estimate = localizer.process(adapted)
        except FrameError as error:
            adapt_ms = 0.0
            estimate = PoseEstimate(frame.stamp_ns, TrackingState.LOST, str(error))
        latency_ms = 1e3 * (time.perf_counter() - start)
        yield record_of(frame, estimate, latency_ms=latency_ms, adapt_ms=adapt_ms)
