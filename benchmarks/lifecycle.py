# SPDX-License-Identifier: Apache-2.0
"""Benchmark of many lifecycle transitions of a live localizer: memory, file handles, threads, time.

    python benchmarks/lifecycle.py --map maps/kitchen --cycles 200

One cycle is configure, activate, a second of images, deactivate, cleanup. The images are noise, which keeps every
stage at work; accuracy is measured elsewhere. Exit code 1 if a transition failed, the node ended badly, or memory
grew by more than ``--max-growth-kb`` a cycle over the second half of the cycles.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.replay.processes import ros_environment

_CHILD = "KFLOC_BENCHMARK_CHILD"
TRANSITIONS = {"configure": 1, "activate": 3, "deactivate": 4, "cleanup": 2}


@dataclass(frozen=True)
class Footprint:
    """Resources of a process."""

    rss_kb: int
    handles: int
    threads: int


def footprint(pid: int) -> Footprint:
    """Read the resources from /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    handles = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Footprint(int(status["VmRSS"].split()[0]), handles, int(status["Threads"]))


def growth_per_cycle(rss_kb: list[int]) -> float:
    """Return the growth from the third to the last quarter of the cycles, by medians.

    Memory that a cycle holds only for a while is no leak.
    """
    quarter = max(len(rss_kb) // 4, 1)
    third, last = rss_kb[-2 * quarter : -quarter], rss_kb[-quarter:]
    return (float(np.median(last)) - float(np.median(third))) / quarter if third else 0.0


class Client:
    """Client of the node over DDS."""

    def __init__(self, scene_map: SceneMap) -> None:
        import rclpy
        from lifecycle_msgs.srv import ChangeState
        from rclpy.executors import SingleThreadedExecutor
        from sensor_msgs.msg import CameraInfo, Image

        rclpy.init()
        self._node = rclpy.create_node("lifecycle_benchmark")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._client = self._node.create_client(ChangeState, "/localizer/change_state")
        self._images = self._node.create_publisher(Image, "image", 2)
        self._infos = self._node.create_publisher(CameraInfo, "camera_info", 2)
        self._camera = scene_map.camera
        self._image = np.random.default_rng(0).integers(0, 256, (scene_map.camera.height, scene_map.camera.width, 3))

    def wait_for_node(self, patience_s: float) -> None:
        if not self._client.wait_for_service(patience_s):
            raise SystemExit("The node did not come up.")

    def change(self, name: str) -> float:
        """Make a transition; return its seconds."""
        from lifecycle_msgs.srv import ChangeState

        request = ChangeState.Request()
        request.transition.id = TRANSITIONS[name]
        start_s = time.perf_counter()
        future = self._client.call_async(request)
        while not future.done():
            self._executor.spin_once(timeout_sec=0.1)
            if time.perf_counter() - start_s > 120:
                raise SystemExit(f"The transition '{name}' did not end.")
        if not future.result().success:
            raise SystemExit(f"The transition '{name}' failed.")
        return time.perf_counter() - start_s

    def show(self, seconds: float) -> None:
        """Publish images."""
        from sensor_msgs.msg import CameraInfo, Image

        from kfloc_ros.messages.camera_info import fill_info
        from kfloc_ros.messages.images import fill_image
        from kfloc_ros.messages.poses import fill_stamp

        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            info, image = fill_info(CameraInfo(), self._camera), fill_image(Image(), self._image.astype(np.uint8))
            for message in (info, image):
                fill_stamp(message.header.stamp, time.time_ns())
                message.header.frame_id = "camera"
            self._infos.publish(info)
            self._images.publish(image)
            time.sleep(0.1)


def main() -> int:
    """Run the cycles and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", required=True)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--images-s", type=float, default=1.0, help="seconds of images in each cycle")
    parser.add_argument("--max-growth-kb", type=float, default=200.0, help="growth of memory allowed per cycle")
    args = parser.parse_args()
    environment = ros_environment(None)
    if os.environ.get(_CHILD) is None:  # run again in a separate ROS domain
        return subprocess.call([sys.executable, *sys.argv], env={**environment, _CHILD: "1"})
    environment = dict(os.environ)
    path = resolve_map(args.map)
    command = [sys.executable, "-m", "kfloc_ros.nodes.executables", "--ros-args", "-p", f"map:={path}"]
    process = subprocess.Popen([*command, "-p", "autostart:=false", "--log-level", "warn"], env=environment)
    seconds: dict[str, list[float]] = {name: [] for name in TRANSITIONS}
    prints: list[Footprint] = []
    try:
        client = Client(SceneMap.load(path))
        client.wait_for_node(60.0)
        for _ in range(args.cycles):
            seconds["configure"].append(client.change("configure"))
            seconds["activate"].append(client.change("activate"))
            client.show(args.images_s)
            seconds["deactivate"].append(client.change("deactivate"))
            seconds["cleanup"].append(client.change("cleanup"))
            prints.append(footprint(process.pid))
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(15)
    growth_kb = growth_per_cycle([p.rss_kb for p in prints])
    report = {
        "cycles": args.cycles,
        "rss_mb": [round(p.rss_kb / 1024, 1) for p in prints[:: max(args.cycles // 10, 1)]],
        "growth_kb_per_cycle": round(growth_kb, 1),
        "handles": [prints[0].handles, prints[-1].handles],
        "threads": [prints[0].threads, prints[-1].threads],
        "median_s": {name: round(float(np.median(values)), 3) for name, values in seconds.items()},
        "exit_code": code,
    }
    print(json.dumps(report))
    return int(code != 0 or growth_kb > args.max_growth_kb)


if __name__ == "__main__":
    raise SystemExit(main())
