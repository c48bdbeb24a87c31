# SPDX-License-Identifier: Apache-2.0
"""A harness that speaks to live nodes over DDS."""

from __future__ import annotations

import array
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.replay.processes import free_domain
from kfloc_ros.types import Frame

REPOSITORY = Path(__file__).resolve().parents[2]


class Harness:
    """Publishes images to nodes in other processes and collects what they answer."""

    def __init__(self, domain_id: int) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from geometry_msgs.msg import PoseWithCovarianceStamped
        from nav_msgs.msg import Path as PathMessage
        from rclpy.executors import SingleThreadedExecutor
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CameraInfo, CompressedImage, Image
        from tf2_msgs.msg import TFMessage

        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain_id)
        self.node = rclpy.create_node("harness", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self.poses: dict[int, Any] = {}
        self.coarse: dict[int, Any] = {}
        self.statuses: dict[int, dict[str, str]] = {}
        self.transforms: list[Any] = []
        self.paths: list[Any] = []
        self.diagnostics: dict[str, Any] = {}
        subscribe = self.node.create_subscription
        subscribe(PoseWithCovarianceStamped, "pose", lambda m: self.poses.update({_ns(m.header.stamp): m}), 50)
        subscribe(PoseWithCovarianceStamped, "coarse_pose", lambda m: self.coarse.update({_ns(m.header.stamp): m}), 50)
        subscribe(DiagnosticArray, "status", self._on_status, 50)
        subscribe(TFMessage, "/tf", lambda m: self.transforms.extend(m.transforms), 50)
        subscribe(PathMessage, "path", self.paths.append, 50)
        subscribe(DiagnosticArray, "/diagnostics", self._on_diagnostics, 50)
        self._publishers = {
            "raw": self.node.create_publisher(Image, "image", 10),
            "compressed": self.node.create_publisher(CompressedImage, "image/compressed", 10),
            "info": self.node.create_publisher(CameraInfo, "camera_info", 10),
            "clock": self.node.create_publisher(Clock, "/clock", 10),
        }

    def close(self) -> None:
        self._executor.shutdown()
        self.node.destroy_node()
        self._context.try_shutdown()

    def _on_status(self, message: Any) -> None:
        values = {pair.key: pair.value for pair in message.status[0].values}
        self.statuses[_ns(message.header.stamp)] = values

    def _on_diagnostics(self, message: Any) -> None:
        self.diagnostics.update({status.name: status for status in message.status})

    def spin(self, seconds: float) -> None:
        self.wait(lambda: False, seconds, must=False)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 40.0, *, must: bool = True) -> bool:
        """Spin until a condition holds; a failure of the test if it does not in time."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                assert not must, "nothing came in time"
                return False
            self._executor.spin_once(timeout_sec=0.02)
        return True

    def listens(self, topic: str = "raw") -> bool:
        """Whether a node subscribes to images and camera_info."""
        return all(self._publishers[name].get_subscription_count() > 0 for name in (topic, "info"))

    def send_info(self, camera: Camera, stamp_ns: int, **changes: Any) -> None:
        from sensor_msgs.msg import CameraInfo

        message = fill_info(CameraInfo(), camera)
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = "camera"
        for name, value in changes.items():
            setattr(message, name, value)
        self._publishers["info"].publish(message)

    def image_message(self, image: NDArray[np.uint8], stamp_ns: int = 0) -> Any:
        from sensor_msgs.msg import Image

        message = fill_image(Image(), image)
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = "camera"
        return message

    def send_image(self, image: NDArray[np.uint8], stamp_ns: int, **changes: Any) -> None:
        message = self.image_message(image, stamp_ns)
        for name, value in changes.items():
            setattr(message, name, value)
        self._publishers["raw"].publish(message)

    def send_compressed(self, data: bytes, stamp_ns: int) -> None:
        from sensor_msgs.msg import CompressedImage

        message = CompressedImage(format="jpeg", data=array.array("B", data))
        fill_stamp(message.header.stamp, stamp_ns)
        message.header.frame_id = "camera"
        self._publishers["compressed"].publish(message)

    def send_clock(self, stamp_ns: int) -> None:
        from rosgraph_msgs.msg import Clock

        message = Clock()
        fill_stamp(message.clock, stamp_ns)
        self._publishers["clock"].publish(message)

    def send_transform(self, parent: str, child: str, stamp_ns: int, T: Any, *, static: bool = False) -> None:
        """Publish one transform on /tf or /tf_static."""
        from tf2_msgs.msg import TFMessage

        from kfloc_ros.nodes.qos import results, static_transforms
        from kfloc_ros.nodes.transforms import stamped

        name = "tf_static" if static else "tf"
        if name not in self._publishers:
            profile = static_transforms() if static else results(100)
            self._publishers[name] = self.node.create_publisher(TFMessage, f"/{name}", profile)
            others = 0 if static else 1  # we hear ourselves on /tf
            self.wait(lambda: self._publishers[name].get_subscription_count() > others)
            self.spin(0.3)
        self._publishers[name].publish(TFMessage(transforms=[stamped(parent, child, stamp_ns, T)]))

    def call(self, kind: Any, name: str, request: Any) -> Any:
        """Call a service and return its response."""
        client = self.node.create_client(kind, name)
        self.wait(client.service_is_ready)
        future = client.call_async(request)
        self.wait(future.done)
        self.node.destroy_client(client)
        return future.result()

    def set_parameter(self, node: str, name: str, value: Any) -> Any:
        """Set one parameter of a node; returns the result with ``successful`` and ``reason``."""
        from rcl_interfaces.srv import SetParameters
        from rclpy.parameter import Parameter

        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        return self.call(SetParameters, f"{node}/set_parameters", request).results[0]

    def send(self, frame: Frame, stamp_ns: int | None = None) -> int:
        """Publish a good frame and its camera_info; returns the stamp, by default of now."""
        stamp_ns = time.time_ns() if stamp_ns is None else stamp_ns
        self.send_info(frame.camera, stamp_ns)
        self.send_image(frame.image, stamp_ns)
        return stamp_ns

    def localize(self, frame: Frame, send: Callable[[Frame], int] | None = None, tries: int = 5) -> Any:
        """Send a good frame until its pose comes back; returns the pose message."""
        for _ in range(tries):
            stamp_ns = (send or self.send)(frame)
            if self.wait(lambda stamp=stamp_ns: stamp in self.statuses, 10.0, must=False):
                assert stamp_ns in self.poses or self.wait(
                    lambda stamp=stamp_ns: stamp in self.poses, 1.0, must=False
                ), self.statuses[stamp_ns]
                return self.poses[stamp_ns]
        raise AssertionError("no good frame was localized")


READY_S = 300.0
"""Longest time until a node listens. The first node of a new clone, or after a change of compiled loops, compiles them:
on two cores 25 s, and two minutes beside three busy processes."""
PATIENCE_S = 5.0
"""Time in which a node ends after a signal, as launch has it, on a machine without other work."""


class NodeProcess:
    """A node in a process of its own; ends when the context does, and must end well."""

    def __init__(self, module: str, environment: dict[str, str], log: Path, *arguments: str) -> None:
        self.log_path = log
        command = [sys.executable, "-m", "kfloc_ros.nodes.executables", module, "--ros-args"]
        # Tests send one image again and again; `test_live_survival` has a frozen camera of its own.
        for argument in ("max_repeat_s:=0.0", *arguments):
            command += ["-p", argument]
        with log.open("w") as sink:
            self.process = subprocess.Popen(command, env=environment, stdout=sink, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def end(self, how: signal.Signals = signal.SIGINT, patience_s: float = 15.0) -> int:
        """Ask the process to end and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"The node did not end within {patience_s} s:\n{self.log}") from None

    def end_well(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the process, with exit code 0, without a traceback, and in time."""
        start_s = time.monotonic()
        code = self.end(how, 30.0)
        took_s = time.monotonic() - start_s
        assert code == 0 and "Traceback" not in self.log, self.log
        busy = max(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)  # others' work is not the node's fault
        assert took_s < PATIENCE_S * busy, f"{took_s:.1f} s"


_world_numbers = itertools.count()


class RosWorld:
    """A ROS domain with a harness and nodes."""

    def __init__(self, folder: Path) -> None:
        self.domain_id = free_domain(os.getpid() + 17 * next(_world_numbers))
        self._folder = folder
        self.environment = {
            **os.environ,
            "ROS_DOMAIN_ID": str(self.domain_id),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", "")))),
        }
        self.harness = Harness(self.domain_id)
        self.nodes: list[NodeProcess] = []

    def start(self, module: str, *arguments: str) -> NodeProcess:
        log = self._folder / f"{module}-{len(self.nodes)}.log"
        node = NodeProcess(module, self.environment, log, *arguments)
        self.nodes.append(node)
        return node

    def start_localizer(self, *arguments: str, transport: str = "raw") -> NodeProcess:
        """Start ``localizer`` and wait until it listens."""
        node = self.start("localizer", *arguments, f"image_transport:={transport}")
        self.wait_ready(transport)
        return node

    def wait_ready(self, transport: str = "raw") -> None:
        def ready() -> bool:
            for node in self.nodes:
                assert node.process.poll() is None, f"a node ended early:\n{node.log}"
            return self.harness.listens(transport)

        self.harness.wait(ready, READY_S)
        # We know of their subscriptions; they may not yet know of our publishers, and would not hear them.
        self.harness.spin(0.5)

    def close(self) -> None:
        self.harness.close()
        for node in self.nodes:
            if node.process.poll() is None:
                node.end(patience_s=30.0)


def _ns(stamp: Any) -> int:
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)
