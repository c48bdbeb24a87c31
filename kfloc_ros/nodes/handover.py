# SPDX-License-Identifier: Apache-2.0
"""Messages and types that camera, filter and refiner exchange, in memory or over internal topics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import is_rotation
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.features import fill_features, read_features
from kfloc_ros.messages.poses import (
    BodyPose,
    check_stamp,
    fill_pose,
    fill_pose_with_covariance,
    fill_stamp,
    pose_from_message,
    stamp_to_ns,
)
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.adapters import Messages, decode, encode, make_joiner, subscribe
from kfloc_ros.nodes.health import (
    Counters,
    Value,
    counter_values,
    make_status,
    number,
    read_counters,
    read_timings,
    read_values,
    timing_values,
    whole,
)
from kfloc_ros.types import CoarsePose, FilterReport, Frame, Matrix, PoseEstimate


@dataclass(frozen=True, eq=False)
class CameraFrame:
    """Frame of the map's camera, with its TF frame, time of receipt and timings."""

    frame: Frame
    frame_id: str
    """TF frame of the camera."""
    receipt_unix_ns: int
    """Time of receipt of the image message on the system's clock, independent of ROS time."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    upstream: Counters | None = None
    """Counters of the processes before this one; None if the frame never left this process."""

    def latency_ms(self) -> float:
        """Return the time since the image was received, in milliseconds."""
        return 1e-6 * (time.time_ns() - self.receipt_unix_ns)

    def counters(self, own: Counters) -> Counters:
        """Return the counters of the whole chain, given those of this process."""
        return own if self.upstream is None else own.after(self.upstream)


@dataclass(frozen=True, eq=False)
class CoarseFrame:
    """Frame with its coarse pose."""

    camera: CameraFrame
    result: CoarseResult


FRAME_TOPICS = {"frame/image": Image, "frame/status": DiagnosticArray}
"""Topics of a :class:`CameraFrame`. Every message costs the receiver 0.3 ms, so that there are few."""
COARSE_TOPICS = {"coarse_status": DiagnosticArray, "frame/features": CompressedImage}
"""Further topics of a :class:`CoarseFrame`; ``coarse_pose`` is for others, the status has the pose exactly."""
_INTRINSICS = "fx", "fy", "cx", "cy"


def join_frames(node: Node, pass_on: Callable[[Messages], None]) -> None:
    """Subscribe to the topics of a :class:`CameraFrame`, and pass on the messages of each stamp."""
    subscribe(node, FRAME_TOPICS, make_joiner(tuple(FRAME_TOPICS), pass_on))


def join_coarse(node: Node, pass_on: Callable[[Messages], None]) -> None:
    """Subscribe to the topics of a :class:`CoarseFrame`, and pass on the messages of each stamp."""
    topics = {**FRAME_TOPICS, **COARSE_TOPICS}
    subscribe(node, topics, make_joiner(tuple(topics), pass_on))


class FramePublisher:
    """Publisher of camera frames on the ``frame/...`` topics; ``frame/camera_info`` is for viewers."""

    def __init__(self, node: Node, own: Callable[[], Counters]) -> None:
        topics = {**FRAME_TOPICS, "frame/camera_info": CameraInfo}
        self._publishers = {topic: node.create_publisher(kind, topic, qos.results(2)) for topic, kind in topics.items()}
        self._own = own

    def __call__(self, camera_frame: CameraFrame) -> None:
        frame = camera_frame.frame
        info, image = fill_info(CameraInfo(), frame.camera), encode(frame.image)
        for message in (info, image):
            fill_stamp(message.header.stamp, frame.stamp_ns)
            message.header.frame_id = camera_frame.frame_id
        values: dict[str, Value] = {"receipt_unix_ns": str(camera_frame.receipt_unix_ns), "index": frame.index}
        values |= {name: repr(getattr(frame.camera, name)) for name in _INTRINSICS}
        values |= counter_values(camera_frame.counters(self._own())) | timing_values(camera_frame.timings_ms)
        self._publishers["frame/status"].publish(make_status(frame.stamp_ns, "frame", values))
        self._publishers["frame/image"].publish(image)
        self._publishers["frame/camera_info"].publish(info)


def read_frame(messages: Messages) -> CameraFrame:
    """Return the camera frame in the messages of one stamp. Raises FrameError if one of them is damaged."""
    image, values = messages["frame/image"], read_values(messages["frame/status"])
    stamp_ns = stamp_to_ns(image.header.stamp)
    check_stamp(stamp_ns)
    fx, fy, cx, cy = (number(values, name) for name in _INTRINSICS)
    frame = Frame(
        image=decode(image),
        camera=Camera(image.width, image.height, fx, fy, cx, cy),
        stamp_ns=stamp_ns,
        index=whole(values, "index"),
    )
    receipt_unix_ns = whole(values, "receipt_unix_ns")
    return CameraFrame(frame, image.header.frame_id, receipt_unix_ns, read_timings(values), read_counters(values))


class FeaturesPublisher:
    """Publisher of a frame's features, also before its coarse pose: the refiner's process reads them meanwhile."""

    def __init__(self, node: Node) -> None:
        self._publisher = node.create_publisher(CompressedImage, "frame/features", qos.results(2))

    def __call__(self, camera_frame: CameraFrame, features: BackboneFeatures) -> None:
        message = fill_features(CompressedImage(), features)
        fill_stamp(message.header.stamp, camera_frame.frame.stamp_ns)
        message.header.frame_id = camera_frame.frame_id
        self._publisher.publish(message)


class CoarsePublisher:
    """Publisher of coarse poses of the camera (not of the base frame).

    Args:
        for_refiner: also publish the status that a refiner in another process needs.
    """

    def __init__(self, node: Node, map_frame: str, own: Callable[[], Counters], *, for_refiner: bool) -> None:
        self._map_frame, self._own = map_frame, own
        self._poses = node.create_publisher(PoseWithCovarianceStamped, "coarse_pose", qos.results())
        self._for_refiner = for_refiner
        if for_refiner:
            self._statuses = node.create_publisher(DiagnosticArray, "coarse_status", qos.results())

    def __call__(self, coarse: CoarseFrame) -> None:
        result, pose = coarse.result, coarse.result.pose
        body = None
        if pose.success and pose.T_map_camera is not None and pose.covariance is not None:
            body = BodyPose(pose.T_map_camera, pose.covariance)
        if body is not None and body.fault():
            body = None
        if self._for_refiner:
            self._hand_over(coarse, body)
        if body is not None:
            message = PoseWithCovarianceStamped()
            fill_stamp(message.header.stamp, result.stamp_ns)
            message.header.frame_id = self._map_frame
            fill_pose_with_covariance(message.pose, body)
            self._poses.publish(message)

    def _hand_over(self, coarse: CoarseFrame, body: BodyPose | None) -> None:
        """Publish what a refiner in another process needs."""
        result, pose = coarse.result, coarse.result.pose
        values: dict[str, Value] = {
            "success": body is not None, "reason": pose.reason, "inliers": pose.inlier_count,
            "inlier_ratio": pose.inlier_ratio, "filter_reset": result.filter.reset_reason,
            "prior_ratio": result.filter.prior_ratio, "nis": result.filter.nis_mean,
            "rejected_ratio": result.filter.rejected_ratio, "confirmed": result.filter.confirmed,
        }  # fmt: skip
        if body is not None:
            values |= {"T_map_camera": _exactly(body.T_map_body), "covariance": _exactly(body.covariance)}
        values |= counter_values(coarse.camera.counters(self._own())) | timing_values(result.timings_ms)
        self._statuses.publish(make_status(result.stamp_ns, "coarse", values))


def _exactly(matrix: Matrix) -> str:
    """Return the values of a matrix as a text from which they are read back to the bit."""
    return " ".join(map(repr, matrix.ravel().tolist()))


def _matrix(values: Mapping[str, str], key: str, side: int) -> Matrix:
    """Return a square matrix of a status. Raises FrameError if there is none."""
    try:
        return np.array([float(word) for word in values[key].split()]).reshape(side, side)
    except (KeyError, ValueError) as error:
        raise FrameError(f"A coarse_status has no '{key}' of {side}x{side} numbers: {error}.") from error


def read_coarse(messages: Messages) -> CoarseFrame:
    """Return the coarse frame in the messages of one stamp. Raises FrameError if one of them is damaged."""
    camera = read_frame(messages)
    values = read_values(messages["coarse_status"])
    T = covariance = None
    if values.get("success") == "true":
        T, covariance = _matrix(values, "T_map_camera", 4), _matrix(values, "covariance", 6)
        fault = BodyPose(T, covariance).fault()
        if not fault and not (is_rotation(T[:3, :3]) and T[3].tolist() == [0.0, 0.0, 0.0, 1.0]):
            fault = "the pose is not a rigid transform"
        if fault:
            raise FrameError(f"A coarse_status cannot be used: {fault}.")
    result = CoarseResult(
        stamp_ns=camera.frame.stamp_ns,
        pose=CoarsePose(
            success=T is not None,
            reason=values.get("reason", ""),
            T_map_camera=T,
            covariance=covariance,
            inlier_count=whole(values, "inliers"),
            inlier_ratio=number(values, "inlier_ratio"),
        ),
        filter=FilterReport(
            reset_reason=values.get("filter_reset", ""),
            prior_ratio=number(values, "prior_ratio"),
            nis_mean=number(values, "nis"),
            rejected_ratio=number(values, "rejected_ratio"),
            confirmed=values.get("confirmed") == "true",
        ),
        timings_ms=read_timings(values),
        features=read_features(messages["frame/features"], camera.frame.camera),
    )
    whole_path = CameraFrame(
        camera.frame, camera.frame_id, camera.receipt_unix_ns, camera.timings_ms, read_counters(values)
    )
    return CoarseFrame(whole_path, result)


TOPIC = "refined_pose"


@dataclass(frozen=True, eq=False)
class RefinedPose:
    """Refined pose of a frame that corrects the filter's belief."""

    stamp_ns: int
    T_map_camera: Matrix


class FeedbackPublisher:
    """Publisher of ``refined_pose``, in the refiner."""

    def __init__(self, node: Node, map_frame: str) -> None:
        self._publisher = node.create_publisher(PoseStamped, TOPIC, qos.results())
        self._map_frame = map_frame

    def __call__(self, estimate: PoseEstimate) -> None:
        """Publish the refined pose, if the estimate has one."""
        refined = estimate.refined_pose
        if refined is None:
            return
        message = PoseStamped()
        fill_stamp(message.header.stamp, estimate.stamp_ns)
        message.header.frame_id = self._map_frame
        fill_pose(message.pose, refined)
        self._publisher.publish(message)


SOON_S, LONGEST_S = 0.005, 0.1
"""Time, in seconds, before the usual one, at which an answer counts as here, and the longest one that counts: a second
thread then pays at once, and a search of the map is not usual."""
LEARNING_RATE = 0.1


class FeedbackQueue:
    """Subscriber of ``refined_pose``, in the filter; queues poses for the worker thread."""

    def __init__(self, node: Node, warn: Callable[[str], None]) -> None:
        self._waiting: deque[RefinedPose] = deque(maxlen=8)
        self._warn = warn
        self._asked_ns, self._asked_s, self._answered_ns, self._usual_s = -1, 0.0, -1, 0.0
        node.create_subscription(PoseStamped, TOPIC, self._receive, qos.results())

    def expect(self, stamp_ns: int) -> None:
        """Expect an answer to the frame that is handed over to the refiner now."""
        self._asked_ns, self._asked_s = stamp_ns, time.monotonic()

    @property
    def refiner_is_busy(self) -> bool:
        """True while the refiner works on the frame, and will for a while, as the times of earlier answers tell.

        False where no refiner answers, and for a frame without an answer soon after it was handed over.
        """
        is_open = self._answered_ns != self._asked_ns
        return is_open and time.monotonic() - self._asked_s < self._usual_s - SOON_S

    def take(self) -> Iterator[RefinedPose]:
        """Yield the poses received since the last call, in order."""
        while self._waiting:
            yield self._waiting.popleft()

    def _receive(self, message: PoseStamped) -> None:
        try:
            pose = pose_from_message(message.pose)
        except ValueError as error:
            self._warn(f"A refined_pose cannot be used: {error}")
            return
        self._answered_ns = stamp_to_ns(message.header.stamp)
        if self._answered_ns == self._asked_ns:
            took_s = min(time.monotonic() - self._asked_s, LONGEST_S)
            self._usual_s += LEARNING_RATE * (took_s - self._usual_s)
        self._waiting.append(RefinedPose(self._answered_ns, pose))
