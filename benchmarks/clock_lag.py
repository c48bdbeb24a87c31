# SPDX-License-Identifier: Apache-2.0
"""Benchmark of a localizer's /clock lag and service latency while it computes.

rclpy delays both behind a heavy callback; here all the work is in a separate thread. The benchmark starts a localizer
with use_sim_time, publishes /clock 100 times a second, and compares a minute without images with a minute in which
images come faster than they can be processed. The lag is this process's /clock minus the node's clock, from the stamps
of /diagnostics, transport included; the wait is that of a service call.

    python benchmarks/clock_lag.py --map demo_room --seconds 60

Exit code 1 if the median lag at work exceeds --max-lag-ms.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.device import describe_hardware
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.replay.processes import ros_environment

_CHILD = "KFLOC_BENCHMARK_CHILD"
CLOCK_HZ = 100.0


class Client:
    """Publisher of /clock and images from its own threads, and timer of the node's answers."""

    def __init__(self, scene_map: SceneMap) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from lifecycle_msgs.srv import GetState
        from rclpy.executors import SingleThreadedExecutor
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CameraInfo, Image

        rclpy.init()
        self._node = rclpy.create_node("clock_lag_benchmark")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._clock = self._node.create_publisher(Clock, "/clock", 1)
        self._images = self._node.create_publisher(Image, "image", 2)
        self._infos = self._node.create_publisher(CameraInfo, "camera_info", 2)
        self._client = self._node.create_client(GetState, "/localizer/get_state")
        self._node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        self._node.create_subscription(DiagnosticArray, "status", self._on_status, 10)
        self._camera = scene_map.camera
        shape = scene_map.camera.height, scene_map.camera.width, 3
        self._image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self._ended = threading.Event()
        self.lags_ms: list[float] = []
        self.answered = 0
        self._ticker = threading.Thread(target=self._tick)
        self._ticker.start()

    def close(self) -> None:
        self._ended.set()
        self._ticker.join()
        self._executor.shutdown()
        self._node.destroy_node()

    def wait_ready(self, patience_s: float) -> None:
        """Wait for the node's image subscription and its first /diagnostics."""
        until_s = time.monotonic() + patience_s
        while self._images.get_subscription_count() == 0 or not self.lags_ms:
            if time.monotonic() > until_s:
                raise SystemExit("The node did not come up.")
            self._executor.spin_once(timeout_sec=0.1)

    def measure(self, seconds: float, images_hz: float) -> dict[str, Any]:
        """Return lags and waits over some time, with images or (0) without."""
        from lifecycle_msgs.srv import GetState

        self.lags_ms, self.answered, waits_ms = [], 0, []
        until_s = next_image_s = time.monotonic()
        until_s += seconds
        while time.monotonic() < until_s:
            if images_hz and time.monotonic() >= next_image_s:
                next_image_s = max(next_image_s + 1 / images_hz, time.monotonic())
                self._show()
            start_s = time.perf_counter()
            future = self._client.call_async(GetState.Request())
            while not future.done() and time.perf_counter() - start_s < 10:
                self._executor.spin_once(timeout_sec=0.005)
            waits_ms.append(1e3 * (time.perf_counter() - start_s))
            self._executor.spin_once(timeout_sec=0.01)
        return {"clock_lag_ms": figures(self.lags_ms), "service_ms": figures(waits_ms), "frames": self.answered}

    def _show(self) -> None:
        from sensor_msgs.msg import CameraInfo, Image

        from kfloc_ros.messages.camera_info import fill_info
        from kfloc_ros.messages.images import fill_image
        from kfloc_ros.messages.poses import fill_stamp

        info, image = fill_info(CameraInfo(), self._camera), fill_image(Image(), self._image)
        for message in (info, image):
            fill_stamp(message.header.stamp, time.time_ns())
            message.header.frame_id = "camera"
        self._infos.publish(info)
        self._images.publish(image)

    def _tick(self) -> None:
        from rosgraph_msgs.msg import Clock

        from kfloc_ros.messages.poses import fill_stamp

        message = Clock()
        while not self._ended.wait(1 / CLOCK_HZ):
            fill_stamp(message.clock, time.time_ns())
            self._clock.publish(message)

    def _on_diagnostics(self, message: Any) -> None:
        stamp = message.header.stamp
        self.lags_ms.append(1e-6 * (time.time_ns() - (stamp.sec * 10**9 + stamp.nanosec)))

    def _on_status(self, message: Any) -> None:
        self.answered += 1


def figures(values: list[float]) -> dict[str, float | int | None]:
    """Return p50, p95, largest and number of values."""
    if not values:
        return {"p50": None, "p95": None, "max": None, "count": 0}
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(p50, 1), "p95": round(p95, 1), "max": round(max(values), 1), "count": len(values)}


def main() -> int:
    """Run both minutes and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part (default: 60)")
    parser.add_argument("--images-hz", type=float, default=30.0, help="in the part at work (default: 30)")
    parser.add_argument("--max-lag-ms", type=float, default=100.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if os.environ.get(_CHILD) is None:  # run again in a separate ROS domain
        return subprocess.call([sys.executable, *sys.argv], env={**ros_environment(None), _CHILD: "1"})
    path = resolve_map(args.map)
    command = [sys.executable, "-m", "kfloc_ros.nodes.executables", "--ros-args", "--log-level", "error"]
    command += ["-p", f"map:={path}", "-p", "use_sim_time:=true", "-p", "max_age_s:=0.0"]
    process = subprocess.Popen(command)
    client = Client(SceneMap.load(path))
    try:
        client.wait_ready(120.0)
        report = {"idle": client.measure(args.seconds, 0.0), "at_work": client.measure(args.seconds, args.images_hz)}
    finally:
        client.close()
        process.send_signal(signal.SIGINT)
        code = process.wait(15)
    content = {**report, "images_hz": args.images_hz, "exit_code": code, "hardware": describe_hardware()}
    print(json.dumps(content))
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n")
    lag_ms = report["at_work"]["clock_lag_ms"]["p50"]
    return int(code != 0 or lag_ms is None or lag_ms > args.max_lag_ms)


if __name__ == "__main__":
    raise SystemExit(main())
