# SPDX-License-Identifier: Apache-2.0
"""What the three components hand on, in memory or over topics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from kfloc_ros.nodes.health import Counters
from kfloc_ros.stages import CoarseResult
from kfloc_ros.types import Frame


@dataclass(frozen=True, eq=False)
class CameraFrame:
    """A frame of the map's camera, with where and when it came from."""

    frame: Frame
    frame_id: str
    """TF frame of the camera."""
    receipt_unix_ns: int
    """When the image message came in, by the system's clock, whatever the ROS time is."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    upstream: Counters | None = None
    """Counters of the processes that the frame came through; None if it never left this one."""

    def latency_ms(self) -> float:
        """Time since the image came in."""
        return 1e-6 * (time.time_ns() - self.receipt_unix_ns)

    def counters(self, own: Counters) -> Counters:
        """Counters of the whole path, given those of this process."""
        return own if self.upstream is None else own.after(self.upstream)


@dataclass(frozen=True, eq=False)
class CoarseFrame:
    """A frame with its coarse pose."""

    camera: CameraFrame
    result: CoarseResult
