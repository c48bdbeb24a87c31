# SPDX-License-Identifier: Apache-2.0
"""Takes ``initialpose`` and turns it into poses of the camera that a frame may start from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.node import Node

from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.held_pose import HeldPose, travelled
from kfloc_ros.nodes.initial_pose import (
    OPTICAL_TO_BODY,
    InitialPose,
    InitialPoseError,
    completed,
    nearest,
    read_initial_pose,
    spread,
)
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.transform_buffer import NEWEST, TransformUnknownError
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.types import Matrix

_MAX_TRIES = 10
"""Images that try an initial pose before it is given up."""


@dataclass(frozen=True, eq=False)
class _Body:
    """The frame that an initial pose is of: the base, or the camera where no base is named."""

    frame: str
    T_camera_body: Matrix


class InitialPoseInput:
    """Keeps the last initial pose until a frame can use it; it is accepted in every lifecycle state.

    Args:
        reference_poses: ``T_map_camera`` (N, 4, 4) of the map's views, for the height of a first flat pose.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        map_frame: str,
        reference_poses: Matrix,
        listener: TransformListener,
        health: Health,
    ) -> None:
        self._parameters, self._map_frame, self._references = parameters, map_frame.lstrip("/"), reference_poses
        self._listener, self._health, self._logger = listener, health, node.get_logger()
        self._waiting: InitialPose | None = None
        self._tried: InitialPose | None = None
        self._tries = 0
        profile = qos.results(1, parameters.node.initialpose_reliability)
        events = qos.on_mismatch(node.resolve_topic_name("initialpose"), "initialpose_reliability", health.warn)
        node.create_subscription(
            PoseWithCovarianceStamped, "initialpose", self._on_pose, profile, event_callbacks=events
        )

    def take(self, camera_frame: str, stamp_ns: int, last: HeldPose | None) -> list[Matrix]:
        """Poses ``T_map_camera`` to start a frame from; empty where there are none. For the worker.

        Args:
            camera_frame: TF frame of the camera.
            stamp_ns: of the frame; the base is moved there from the time of the pose where odometry knows how.
            last: the last known pose, which completes one that was drawn flat.
        """
        given, self._waiting = self._waiting, None
        if given is None:
            return []
        self._tries = self._tries + 1 if given is self._tried else 1
        self._tried = given
        base_frame = self._parameters.node.base_frame
        try:
            body = self._body(given, camera_frame, base_frame)
        except TransformUnknownError as error:
            self._waiting = given  # for the next frame
            self._health.warn(f"The initial pose has to wait. {error}")
            return []
        T_map_body = given.T_frame_base
        if given.is_flat:
            same = last is not None and last.base_frame == body.frame and bool(base_frame)
            known = last.body.T_map_body if same and last is not None else self._nearest_view(T_map_body, body)
            T_map_body = completed(T_map_body, known)
        starts = spread(T_map_body, given.covariance)
        moved = self._moved_since(given, body.frame, stamp_ns)
        T_body_camera = inverse_pose(body.T_camera_body)
        return [start @ moved @ T_body_camera for start in starts]

    def judge(self, found: bool) -> None:
        """Say whether the frame that the last pose was taken for found a pose; if not, the next one tries it again."""
        if self._tried is None:
            return
        if found or self._tries >= _MAX_TRIES:
            if not found:
                self._health.warn(
                    f"The initial pose did not help: {self._tries} images do not look like the map there."
                )
            self._tried = None
        elif self._waiting is None:
            self._waiting = self._tried

    def _on_pose(self, message: Any) -> None:
        try:
            self._waiting = self._in_map(read_initial_pose(message))
        except (InitialPoseError, TransformUnknownError) as error:
            self._health.warn(str(error))
            return
        x, y, z = self._waiting.T_frame_base[:3, 3]
        self._logger.info(
            f"Initial pose at ({x:.2f}, {y:.2f}, {z:.2f}) in '{self._map_frame}': the next image tries it."
        )

    def _in_map(self, given: InitialPose) -> InitialPose:
        if given.frame_id == self._map_frame:
            return given
        try:
            T = self._listener.lookup(self._map_frame, given.frame_id, NEWEST)
        except TransformUnknownError as error:
            raise InitialPoseError(
                f"An initial pose was refused: it is in the frame '{given.frame_id}', the map is '{self._map_frame}', "
                f"and nothing connects the two. {error}"
            ) from error
        return InitialPose(self._map_frame, given.stamp_ns, T @ given.T_frame_base, given.covariance)

    def _body(self, given: InitialPose, camera_frame: str, base_frame: str) -> _Body:
        if base_frame and base_frame != camera_frame:
            return _Body(base_frame, self._listener.lookup(camera_frame, base_frame, NEWEST))
        # An arrow drawn on the floor points where the camera looks; a full pose is one such as we publish.
        return _Body(camera_frame, OPTICAL_TO_BODY if given.is_flat else np.eye(4))

    def _nearest_view(self, T_map_flat: Matrix, body: _Body) -> Matrix:
        return nearest(T_map_flat, self._references @ body.T_camera_body)

    def _moved_since(self, given: InitialPose, body_frame: str, stamp_ns: int) -> Matrix:
        if given.stamp_ns == 0 or self._parameters.node.tf_mode != "map_to_odom":
            return np.eye(4)
        T = travelled(self._listener, self._parameters.node.odom_frame, body_frame, given.stamp_ns, stamp_ns)
        return np.eye(4) if T is None else T
