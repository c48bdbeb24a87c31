# SPDX-License-Identifier: Apache-2.0
"""The last known pose, carried on for as long as there is no new one; imports nothing of ROS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kfloc_ros.nodes.pose_messages import BodyPose
from kfloc_ros.nodes.transform_buffer import TransformUnknownError
from kfloc_ros.types import Matrix


class _Lookup(Protocol):
    def lookup(self, target: str, source: str, stamp_ns: int, wait_s: float = 0.0) -> Matrix: ...


_MAX_SIGMA_M = 1e4
"""Nav2 refuses poses with a covariance beyond 1e9."""


@dataclass(frozen=True, eq=False)
class HeldPose:
    """A pose of the base frame and when it was true."""

    stamp_ns: int
    base_frame: str
    body: BodyPose

    def travelled(self, transforms: _Lookup, odom_frame: str, stamp_ns: int) -> Matrix | None:
        """``T_then_now`` of the base by odometry, or None where odometry does not know."""
        return travelled(transforms, odom_frame, self.base_frame, self.stamp_ns, stamp_ns)

    def grown(self, stamp_ns: int, growth: float, T_then_now: Matrix | None = None) -> BodyPose:
        """The pose at a later time: moved as odometry says, with standard deviations ``growth`` m/s and rad/s wider."""
        body = self.body if T_then_now is None else self.body.moved(T_then_now)
        wider = min(growth * max(stamp_ns - self.stamp_ns, 0) * 1e-9, _MAX_SIGMA_M)
        turned = min(wider, math.pi)  # nothing is known of a rotation any more
        variances = np.array([wider**2] * 3 + [turned**2] * 3)
        return BodyPose(body.T_map_body, body.covariance + np.diag(variances))


def travelled(transforms: _Lookup, odom_frame: str, base_frame: str, since_ns: int, until_ns: int) -> Matrix | None:
    """``T_then_now`` of the base frame between two times by odometry, or None where odometry does not know."""
    try:
        T_then_odom = transforms.lookup(base_frame, odom_frame, since_ns)
        return T_then_odom @ transforms.lookup(odom_frame, base_frame, until_ns)
    except TransformUnknownError:
        return None
