# SPDX-License-Identifier: Apache-2.0
"""The ROS side of a replay, a process of its own: waits for the nodes, plays the bag, records the answers.

Speaks with its parent through lines of JSON on standard output: ``waiting``, ``ready``, ``progress``,
``error`` and ``done``. SIGINT ends the play early; what was recorded until then is still written.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import rclpy
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from tf2_msgs.msg import TFMessage

from kfloc_ros.bags.stream import BagEvent, BagStream, ReplayRange
from kfloc_ros.bags.truth import BagTransforms, Edge, TransformEvent
from kfloc_ros.errors import KflocError
from kfloc_ros.messages.poses import fill_stamp, read_tum
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.runtime import make_executor
from kfloc_ros.nodes.transforms import stamped
from kfloc_ros.replay.recorder import Recorder, TruthPath
from kfloc_ros.replay.recording import Played, Recording


class Timed(Protocol):
    """Something that was recorded."""

    @property
    def log_ns(self) -> int:
        """When."""
        ...


TimedT = TypeVar("TimedT", bound=Timed)
CLOCK_PERIOD_S = 0.025
"""Wall time between two ticks of /clock while nothing is played, as `ros2 bag play --clock` has it."""


def play(
    events: Iterable[TimedT],
    *,
    rate: float,
    publish: Callable[[TimedT], None],
    tick: Callable[[int], None],
    stopped: Callable[[], bool],
    now_s: Callable[[], float] = time.monotonic,
    sleep_s: Callable[[float], None] = time.sleep,
) -> int:
    """Hand every event to ``publish`` when its time has come.

    Args:
        rate: 1 plays as recorded, 2 twice as fast.
        tick: takes the replay's time in nanoseconds, at least every ``CLOCK_PERIOD_S`` and before each event of another
            time: a tick wakes every node.
        stopped: asked before every wait; True ends the play.

    Returns:
        How many events were published.
    """
    count = 0
    origin_ns: int | None = None
    told_ns, origin_s = -1, now_s()
    for event in events:
        if origin_ns is None:
            origin_ns, origin_s = event.log_ns, now_s()
        due_s = origin_s + (event.log_ns - origin_ns) * 1e-9 / rate
        while not stopped() and (wait_s := due_s - now_s()) > 0:
            sleep_s(min(wait_s, CLOCK_PERIOD_S))
            if due_s - now_s() > 0:
                tick(origin_ns + int((now_s() - origin_s) * rate * 1e9))
        if stopped():
            break
        if event.log_ns != told_ns:
            tick(event.log_ns)
            told_ns = event.log_ns
        publish(event)
        count += 1
    return count


class TransformPlayer:
    """Says ``/tf_static`` at once, to all who come, and ``/tf`` when it is told to."""

    def __init__(self, node: Node, source: BagTransforms) -> None:
        self.source = source
        self._moving = node.create_publisher(TFMessage, "/tf", qos.results(100))
        self._static = node.create_publisher(TFMessage, "/tf_static", qos.static_transforms())
        self._static.publish(_message(source.static))

    def publish(self, event: TransformEvent) -> None:
        """Publish one recorded message."""
        self._moving.publish(_message(event.edges))


def _message(edges: Iterable[Edge]) -> TFMessage:
    return TFMessage(transforms=[stamped(e.parent, e.child, e.stamp_ns, e.T_parent_child) for e in edges])


SENSOR_OUT = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=5, reliability=ReliabilityPolicy.RELIABLE)
SETTLE_S = 0.5
"""Wait after discovery, so that both sides of every connection know it."""
QUIET_S = 3.0
"""Without any answer for this long after the last image, the nodes are taken to be through."""
ANSWER_S = 10.0
"""With --every-frame, an image that is not answered for this long is taken to be refused."""
TF_AHEAD_S = 1.0
"""With --every-frame, TF is played this much ahead: an answer may need odometry that was recorded after its image."""
TAIL_S = 1.2
"""Wait after the last status for the messages that come with it and for one more /diagnostics, with final counts."""


class Agent:
    """Publishers, recorder and the wait for the nodes."""

    def __init__(
        self, node: Node, stream: BagStream, truth: TruthPath, transforms: BagTransforms | None, map_frame: str
    ) -> None:
        self.recording = Recording()
        self.stopped = threading.Event()
        self.abandoned = False
        """Nobody waits for what is recorded any more: by SIGTERM, which also comes when the parent was killed."""
        self._node, self._stream, self._truth = node, stream, truth
        self._transforms = None if transforms is None else TransformPlayer(node, transforms)
        self._compressed = stream.transport == "compressed"
        image_type, image_topic = (CompressedImage, "image/compressed") if self._compressed else (Image, "image")
        self._image = node.create_publisher(image_type, image_topic, SENSOR_OUT)
        self._info = node.create_publisher(CameraInfo, "camera_info", SENSOR_OUT)
        self._clock = node.create_publisher(Clock, "/clock", SENSOR_OUT)
        self.recorder = Recorder(node, self.recording, map_frame)

    def events(self, part: ReplayRange, tf_ahead_s: float) -> Iterable[BagEvent | TransformEvent]:
        """What is played of a part, in recorded order, but TF earlier than it was recorded."""
        images = self._stream.events(part)
        if self._transforms is None:
            return images
        moving = self._transforms.source.moving(part, tf_ahead_s)
        return heapq.merge(moving, images, key=lambda event: event.log_ns)

    def wait_for_nodes(self, names: Sequence[str], patience_s: float, clock_ns: int) -> str:
        """Wait until all nodes are there, connected, and have said so on /diagnostics.

        Returns:
            What is still missing after ``patience_s``, or an empty string.
        """
        deadline = time.monotonic() + patience_s
        missing = "everything"
        while not self.stopped.is_set():
            self.tick(clock_ns)
            missing = self._missing(names)
            if not missing:
                self.stopped.wait(SETTLE_S)
                return ""
            if time.monotonic() > deadline:
                return missing
            self.stopped.wait(0.05)
        return "interrupted"

    def _missing(self, names: Sequence[str]) -> str:
        present = set(self._node.get_node_names())
        absent = [name for name in names if name not in present]
        if absent:
            return f"no node {', '.join(absent)}"
        for what, publisher in (("image", self._image), ("camera_info", self._info), ("/clock", self._clock)):
            if publisher.get_subscription_count() < (len(names) if what == "/clock" else 1):
                return f"nobody listens to {what}"
        for topic in ("pose", "coarse_pose", "status"):
            if self._node.count_publishers(topic) < 1:
                return f"nobody publishes {topic}"
        heard = self.recorder.diagnosed
        return "" if heard >= len(names) else f"heartbeats of {len(names) - heard} nodes on /diagnostics"

    def tick(self, time_ns: int) -> None:
        """Publish the replay's time."""
        message = Clock()
        fill_stamp(message.clock, time_ns)
        self._clock.publish(message)

    def publish(self, event: BagEvent | TransformEvent) -> None:
        """Publish one recorded message as it is."""
        if isinstance(event, TransformEvent):
            assert self._transforms is not None
            self._transforms.publish(event)
        elif event.is_image:
            self.recording.played.append(Played(event.stamp_ns, time.monotonic_ns()))
            self._image.publish(event.data)
            self._truth.show(event.stamp_ns)
            if len(self.recording.played) % 5 == 0:
                say("progress", played=len(self.recording.played), answered=len(self.recording.status))
        else:
            self._info.publish(event.data)

    def wait_for_answer(self) -> None:
        """Wait until the last image is answered; not for ever, since one that is refused never is."""
        sent_s = time.monotonic()
        while not self.stopped.is_set() and not self.recorder.has_answer(self.recording.played[-1]):
            if time.monotonic() - sent_s > ANSWER_S:
                break
            self.stopped.wait(0.002)

    def drain(self, clock_ns: int) -> None:
        """Wait until the last image is answered or nothing comes any more."""
        played = self.recording.played
        end_s = time.monotonic()
        while played and not self.stopped.is_set():
            if self.recorder.has_answer(played[-1]):
                break
            if min(self.recorder.quiet_s(), time.monotonic() - end_s) > QUIET_S:
                break
            self.tick(clock_ns)
            self.stopped.wait(0.05)
        time.sleep(TAIL_S if played and not self.abandoned else 0.0)


def say(event: str, **values: Any) -> None:
    """One line to the parent, if it is still there."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"event": event, **values}), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, record, and write the recording."""
    parser = argparse.ArgumentParser(prog="python -m kfloc_ros.replay.agent", description=__doc__)
    parser.add_argument("bag", type=Path)
    parser.add_argument("recording", type=Path)
    parser.add_argument("--image-topic")
    parser.add_argument("--camera-info-topic")
    parser.add_argument("--tf")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--start", type=float, default=0.0)
    parser.add_argument("--duration", type=float)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--every-frame", action="store_true")
    parser.add_argument("--truth", type=Path, help="TUM file of the true path, to show to who looks on")
    parser.add_argument("--map-frame", default="map")
    parser.add_argument("--base-frame", help="play the bag's TF, which leads from this frame to the camera")
    parser.add_argument("--nodes", nargs="+", required=True)
    parser.add_argument("--patience", type=float, default=60.0)
    args = parser.parse_args(argv)
    try:
        with BagStream(args.bag, image_topic=args.image_topic, info_topic=args.camera_info_topic, tf=args.tf) as stream:
            return _run(args, stream)
    except KflocError as error:
        say("error", message=str(error))
        return 1


def _run(args: argparse.Namespace, stream: BagStream) -> int:
    part = ReplayRange(args.start, args.duration)
    transforms = BagTransforms(stream, args.map_frame, args.base_frame) if args.base_frame else None
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("kfloc_replay")
    truth = TruthPath(node, args.map_frame, read_tum(args.truth) if args.truth else {})
    agent = Agent(node, stream, truth, transforms, args.map_frame)

    def stop(number: int, frame: object) -> None:
        agent.abandoned = number == signal.SIGTERM
        agent.stopped.set()

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, stop)
    executor = make_executor()
    executor.add_node(node)
    spinning = threading.Event()

    def spin() -> None:
        while not spinning.is_set():
            executor.spin_once(timeout_sec=0.1)

    thread = threading.Thread(target=spin, name="recorder")
    thread.start()
    try:
        if next(iter(stream.events(part)), None) is None:
            say("error", message=f"'{args.bag}' has no image between --start and --duration.")
            return 1
        say("waiting")
        tf_ahead_s = TF_AHEAD_S if args.every_frame else 0.0
        first_ns = next(iter(agent.events(part, tf_ahead_s))).log_ns
        missing = agent.wait_for_nodes(args.nodes, args.patience, first_ns)
        if missing:
            say("error", message=f"The nodes were not ready after {args.patience:g} s: {missing}.")
            return 1
        say("ready")
        last_ns = first_ns

        def publish(event: BagEvent | TransformEvent) -> None:
            nonlocal last_ns
            last_ns = event.log_ns
            agent.publish(event)
            if args.every_frame and isinstance(event, BagEvent) and event.is_image:
                agent.wait_for_answer()

        for number in range(args.loops):
            if number and args.every_frame:  # an image that overtook the clock that jumps back would be forgotten
                agent.tick(first_ns)
                agent.stopped.wait(SETTLE_S)
            events = agent.events(part, tf_ahead_s)
            play(events, rate=args.rate, publish=publish, tick=agent.tick, stopped=agent.stopped.is_set)
        agent.drain(last_ns)
    finally:
        spinning.set()
        thread.join()
        executor.shutdown()
        node.destroy_node()
        rclpy.try_shutdown()
    agent.recording.save(args.recording)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # we end anyway; while Python ends, it would kill us instead
    say("done", played=len(agent.recording.played), answered=len(agent.recording.status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
