# SPDX-License-Identifier: Apache-2.0
"""Recorder of a bag for a map: writes the right topics of a running robot and watches how the walk is going."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rclpy
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import deserialize_message
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, Imu
from tf2_msgs.msg import TFMessage

from kfloc_ros.bags.topics import IMAGE_TYPES, THIS_MACHINE, Topic, choose_image, choose_recorded
from kfloc_ros.bags.writer import BAG_VERSION, offered_profile
from kfloc_ros.errors import FrameError, KflocError, SourceError
from kfloc_ros.mapping.recording_watch import RecordingWatch, WatchReport
from kfloc_ros.messages.images import NAMES_DEPTH, decode_compressed, decode_image
from kfloc_ros.messages.poses import stamp_to_ns
from kfloc_ros.messages.transforms import TransformUnknownError
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.runtime import signals_set
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.worker import LatestWorker

_KINDS: dict[str, type] = {
    "sensor_msgs/msg/Image": Image,
    "sensor_msgs/msg/CompressedImage": CompressedImage,
    "sensor_msgs/msg/CameraInfo": CameraInfo,
    "sensor_msgs/msg/Imu": Imu,
    "nav_msgs/msg/Odometry": Odometry,
    "geometry_msgs/msg/PoseStamped": PoseStamped,
    "geometry_msgs/msg/PoseWithCovarianceStamped": PoseWithCovarianceStamped,
    "tf2_msgs/msg/TFMessage": TFMessage,
}
"""Message types that are recorded; their definitions are those of ROS 2's own packages."""
_SETTLED_S = 1.0
"""DDS announces topics one by one: those to record are known once nothing has changed for so long."""
_TELL_S = 3.0
_FREE_BYTES = 100_000_000
"""A recording ends while so much of the disk is free: without space for its index, a bag cannot be read."""
_WORLDS = ("map", "odom")
"""TF frames in which the camera's pose is looked for."""


@dataclass(frozen=True)
class RecordingPlan:
    """Topics to record. Empty: chosen by their types and names; ``none`` for depth: none."""

    image: str = ""
    camera_info: str = ""
    depth: str = ""
    also: tuple[str, ...] = ()
    duration_s: float = 0.0
    """End after this time; 0: no limit."""
    stop_when_enough: bool = False
    wait_s: float = 10.0
    """Longest wait for the topics."""


@dataclass(frozen=True)
class RecordingResult:
    """A finished recording."""

    path: Path
    counts: dict[str, int]
    """Messages by topic."""
    report: WatchReport


def record(plan: RecordingPlan, out: Path, say: Callable[[str], None]) -> RecordingResult:
    """Record until SIGINT or SIGTERM, the given time, or until it is enough.

    Args:
        plan: what to record.
        out: folder of the bag.
        say: called with a line for the user: what is wrong now, and once a few seconds how it is going.

    Raises:
        SourceError: the folder exists, or no topic of images or calibration can be chosen.
    """
    if out.exists():
        raise SourceError(f"'{out}' exists; give another folder.")
    with signals_set() as stop, _node() as (node, executor):
        chosen = _found(node, executor, plan, stop)
        say("Recording " + ", ".join(topic.name for topic in chosen) + ". Ctrl-C ends it.")
        with Writer(out.absolute(), version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as writer:
            recorder = _Recorder(node, writer, chosen, plan, say)
            try:
                started_s = told_s = time.monotonic()
                while not stop.is_set():
                    executor.spin_once(timeout_sec=0.1)
                    now_s = time.monotonic()
                    if plan.duration_s and now_s - started_s >= plan.duration_s:
                        break
                    if shutil.disk_usage(out).free < _FREE_BYTES:
                        say("The disk is almost full: the recording ends here.")
                        break
                    if now_s - told_s < _TELL_S:
                        continue
                    told_s = now_s
                    recorder.add_late()
                    report = recorder.tell()
                    if plan.stop_when_enough and report.is_enough:
                        break
            finally:
                recorder.close()
    return RecordingResult(out, recorder.counts, recorder.report())


class _Recorder:
    """Subscriptions that write what they receive, and a thread that watches the images."""

    def __init__(
        self, node: Node, writer: Writer, topics: list[Topic], plan: RecordingPlan, say: Callable[[str], None]
    ) -> None:
        self._node, self._writer, self._say, self._plan = node, writer, say, plan
        self._image, self._info = topics[0].name, topics[1].name
        self.counts: dict[str, int] = {}
        self._images, self._problem = 0, ""
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._profiles: dict[str, list[QoSProfile]] = {}
        self._unmatched: set[str] = set()
        self._watch, self._lock = RecordingWatch(), threading.Lock()
        self._told_s: dict[str, float] = {}
        self._listener = TransformListener(node, lambda sentence: None)
        self._worker: LatestWorker[tuple[bytes, type]] = LatestWorker("watch", self._look, self._on_error)
        self._typestore = get_typestore(Stores.ROS2_JAZZY)
        self._writers: dict[str, tuple[type, Callable[[bytes], None]]] = {}
        for topic in topics:
            self._add(topic)

    def _add(self, topic: Topic) -> None:
        """Record a topic from now on; the images tell how the walk is going."""
        name, kind, watched = topic.name, _KINDS[topic.kind], topic.name == self._image
        profiles = qos.matching(self._node, name)
        offer = offered_profile(
            is_reliable=profiles[0].reliability == ReliabilityPolicy.RELIABLE,
            is_latched=profiles[0].durability == DurabilityPolicy.TRANSIENT_LOCAL,
            depth=profiles[0].depth,
        )
        connection = self._writer.add_connection(
            name, topic.kind, typestore=self._typestore, offered_qos_profiles=[offer]
        )

        def write(data: bytes) -> None:
            self._writer.write(connection, time.time_ns(), data)
            self.counts[name] += 1
            if watched:
                self._worker.submit((data, kind))

        self.counts[name], self._writers[name] = 0, (kind, write)
        self._subscribe(name, profiles)

    def _subscribe(self, name: str, profiles: list[QoSProfile]) -> None:
        """Subscribe to a topic, in place of the former subscriptions."""
        kind, write = self._writers[name]
        events = SubscriptionEventCallbacks(incompatible_qos=lambda _: self._unmatched.add(name))
        former = self._subscriptions.get(name, [])
        self._profiles[name] = profiles
        self._subscriptions[name] = [
            self._node.create_subscription(kind, name, write, profile, raw=True, event_callbacks=events)
            for profile in profiles
        ]
        for subscription in former:
            self._node.destroy_subscription(subscription)

    def add_late(self) -> None:
        """Record what has come up since the start, and subscribe anew where a new publisher does not match."""
        unmatched, self._unmatched = self._unmatched, set()
        for name in unmatched:
            profiles = qos.matching(self._node, name)
            if profiles != self._profiles[name]:
                self._subscribe(name, profiles)
        problem, topics = "", _topics(self._node)
        recorded = [t.name for t in topics if t.is_depth and t.kind in IMAGE_TYPES and t.name in self.counts]
        depth = recorded[0] if recorded else self._plan.depth
        try:
            for topic in choose_recorded(topics, self._image, self._info, depth, self._plan.also):
                if topic.name not in self.counts:
                    self._say(f"Recording {topic.name}, too.")
                    self._add(topic)
            choose_image(THIS_MACHINE, topics, self._plan.image or None, "--image {}".format)
        except SourceError as error:  # such as a second camera, or one that has gone
            problem = f"{error} The recording goes on as it began."
        if problem and problem != self._problem:
            self._say(problem)
        self._problem = problem

    def tell(self) -> WatchReport:
        """Say how it is going, or what does not come."""
        report, images = self.report(), self.counts[self._image]
        if images == self._images:
            again = f"for {_TELL_S:.0f} s " if images else ""
            self._say(f"Nothing has come {again}on {self._image}. Is the camera running, or is another topic meant?")
        elif not self.counts[self._info]:
            self._say(f"Nothing has come on {self._info}. Is the camera running, or is another topic meant?")
        else:
            self._say(report.line)
        self._images = images
        return report

    def report(self) -> WatchReport:
        with self._lock:
            return self._watch.report()

    def close(self) -> None:
        """End the thread; before the node is destroyed."""
        self._worker.stop()

    def _look(self, item: tuple[bytes, type]) -> None:
        data, kind = item
        message = deserialize_message(data, kind)
        image = decode_compressed(message) if kind is CompressedImage else decode_image(message)
        stamp_ns = stamp_to_ns(message.header.stamp)
        with self._lock:
            said = self._watch.add(stamp_ns, image, self._pose(message.header.frame_id, stamp_ns))
        if said:
            self._tell(said)

    def _pose(self, frame: str, stamp_ns: int) -> Any:
        for world in _WORLDS:
            try:
                return self._listener.lookup(world, frame, stamp_ns)
            except TransformUnknownError:
                continue
        return None

    def _tell(self, sentence: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s.get(sentence, -10.0) > 2.0:
            self._told_s[sentence] = now_s
            self._say(sentence)

    def _on_error(self, error: Exception) -> None:
        said = str(error) if isinstance(error, KflocError) else f"{type(error).__name__}: {error}"
        self._tell(f"An image cannot be looked at: {said}")


def _found(node: Node, executor: SingleThreadedExecutor, plan: RecordingPlan, stop: threading.Event) -> list[Topic]:
    """Return the topics to record, once images and a calibration are among them and no more come up."""
    deadline_s = time.monotonic() + plan.wait_s
    chosen: list[Topic] = []
    changed_s = 0.0
    while True:
        executor.spin_once(timeout_sec=0.1)
        now_s, last = time.monotonic(), chosen
        is_late = now_s > deadline_s
        if stop.is_set():
            raise KeyboardInterrupt
        try:
            chosen = choose_recorded(_topics(node), plan.image, plan.camera_info, plan.depth, plan.also)
        except SourceError:
            chosen = []
            if is_late:
                raise
        if chosen != last:
            changed_s = now_s
        if chosen and (is_late or now_s - changed_s > _SETTLED_S):
            return chosen


def _topics(node: Node) -> list[Topic]:
    """Return what is published now of the types that are recorded."""
    return [
        Topic(name, kinds[0], 1, is_depth=bool(NAMES_DEPTH.search(name)))
        for name, kinds in node.get_topic_names_and_types()
        if kinds[0] in _KINDS and node.count_publishers(name)
    ]


@contextmanager
def _node() -> Iterator[tuple[Node, SingleThreadedExecutor]]:
    context = rclpy.Context()
    try:
        rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
    except RuntimeError as error:
        raise FrameError(f"ROS 2 cannot be started: {error}") from error
    node = rclpy.create_node("kfloc_record", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        yield node, executor
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
