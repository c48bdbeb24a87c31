#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Soak test: a looping bag, played to the live localizer over DDS for half an hour; growth, drift and leaks.

    python benchmarks/soak.py --map maps/demo_room --bag demo_out/localize_bag --minutes 30 --json soak.json

At the bag's end it starts again, and `/clock` and stamps jump back. Once a minute the table gets a row: resident
memory, file handles, threads, latency p50 and p95 (from `status`: from the image's arrival to its answer), processor
time a frame (independent of the machine's load, unlike the latency), frames answered and with a pose.

Exit code 1 if a limit is exceeded. Memory after the warm-up may grow by --max-growth-mb an hour (the median of all
slopes between two samples, which one jump does not move), handles and threads by --max-handles, and the processor time
a frame by --max-drift, from the first third after the warm-up to the last. Enough frames must have a pose, and the node
must end with exit code 0 within 5 s of SIGINT.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.bags.stream import BagEvent, BagStream, ReplayRange
from kfloc_ros.device import describe_hardware
from kfloc_ros.maps.format import read_description, resolve_map
from kfloc_ros.replay.agent import play
from kfloc_ros.replay.processes import ros_environment

_CHILD = "KFLOC_BENCHMARK_CHILD"
SAMPLE_S = 5.0
NODE = "localizer"


@dataclass(frozen=True)
class Limits:
    """Limits of the run."""

    growth_mb_per_h: float
    handles: int
    drift: float
    with_pose: float
    shutdown_s: float = 5.0


@dataclass(frozen=True)
class Sample:
    """Resources of the node's process at a time."""

    minute: float
    rss_mb: float
    handles: int
    threads: int
    cpu_s: float
    load_average: float
    """Load of the whole machine."""


@dataclass(frozen=True)
class Answer:
    """Content of one ``status``."""

    minute: float
    latency_ms: float
    has_pose: bool


@dataclass(frozen=True)
class Minute:
    """Row of the table."""

    minute: int
    rss_mb: float
    handles: int
    threads: int
    answered: int
    with_pose: int
    latency_p50_ms: float
    latency_p95_ms: float
    cpu_ms_per_frame: float
    load_average: float


def sample(pid: int, minute: float) -> Sample:
    """Read a sample from /proc."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return Sample(
        minute=minute,
        rss_mb=int(status["VmRSS"].split()[0]) / 1024,
        handles=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(status["Threads"]),
        cpu_s=sum(int(tick) for tick in ticks) / os.sysconf("SC_CLK_TCK"),
        load_average=os.getloadavg()[0],
    )


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the median of the slopes between all pairs of points (Theil and Sen); 0 for fewer than two."""
    xs, ys = np.asarray(x), np.asarray(y)
    first, second = np.triu_indices(len(xs), 1)
    if len(first) == 0:
        return 0.0
    return float(np.median((ys[second] - ys[first]) / (xs[second] - xs[first])))


def row(minute: int, samples: Sequence[Sample], answers: Sequence[Answer]) -> Minute:
    """Return one minute's table row."""
    here = [s for s in samples if minute <= s.minute < minute + 1] or list(samples[-1:])
    answered = [a for a in answers if minute <= a.minute < minute + 1]
    latencies = [a.latency_ms for a in answered] or [float("nan")]
    p50, p95 = np.percentile(latencies, [50, 95])
    cpu_ms = 1e3 * (here[-1].cpu_s - here[0].cpu_s)
    between = sum(here[0].minute <= a.minute < here[-1].minute for a in answered)
    return Minute(
        minute=minute,
        rss_mb=round(float(np.median([s.rss_mb for s in here])), 1),
        handles=max(s.handles for s in here),
        threads=max(s.threads for s in here),
        answered=len(answered),
        with_pose=sum(a.has_pose for a in answered),
        latency_p50_ms=round(float(p50), 1),
        latency_p95_ms=round(float(p95), 1),
        cpu_ms_per_frame=round(cpu_ms / between, 1) if between else float("nan"),
        load_average=round(float(np.median([s.load_average for s in here])), 1),
    )


def judge(
    rows: Sequence[Minute], samples: Sequence[Sample], warm_up: float, limits: Limits, ending: dict[str, Any]
) -> dict[str, Any]:
    """Return the result of the run, with every limit that was exceeded."""
    steady = [s for s in samples if s.minute >= warm_up]
    after = [r for r in rows if r.minute >= warm_up]
    third = max(len(after) // 3, 1)
    drifts = {}
    for what in ("latency_p50_ms", "latency_p95_ms", "cpu_ms_per_frame"):
        first, last = (
            float(np.nanmedian([getattr(r, what) for r in part])) for part in (after[:third], after[-third:])
        )
        drifts[what] = round(last / first, 3)
    answered = sum(r.answered for r in rows)
    growth = slope([s.minute / 60 for s in steady], [s.rss_mb for s in steady])
    result = {
        "answered": answered,
        "with_pose": round(sum(r.with_pose for r in rows) / max(answered, 1), 4),
        "growth_mb_per_h": round(growth, 2),
        "rss_mb": [round(steady[0].rss_mb, 1), round(steady[-1].rss_mb, 1)],
        "handles": [steady[0].handles, steady[-1].handles],
        "threads": [steady[0].threads, steady[-1].threads],
        "drift_last_to_first_third": drifts,
        **ending,
    }
    passed = []
    if growth > limits.growth_mb_per_h:
        passed.append(f"memory grows by {growth:.1f} MB/h, more than {limits.growth_mb_per_h:g}")
    for what in ("handles", "threads"):
        more = result[what][1] - result[what][0]
        if more > limits.handles:
            passed.append(f"{more} {what} more at the end than after the warm-up")
    if not drifts["cpu_ms_per_frame"] <= 1 + limits.drift:
        passed.append(f"a frame takes {drifts['cpu_ms_per_frame']:.2f} times the processor time that it took")
    if not result["with_pose"] >= limits.with_pose:
        passed.append(f"only {result['with_pose']:.0%} of the answered frames have a pose")
    if ending["exit_code"] != 0 or ending["shutdown_s"] > limits.shutdown_s:
        passed.append(f"the node ended with code {ending['exit_code']} after {ending['shutdown_s']:.1f} s")
    return {**result, "limits_passed": passed}


class Client:
    """Player of the bag, and subscriber of the answers."""

    def __init__(self, stream: BagStream) -> None:
        import rclpy
        from diagnostic_msgs.msg import DiagnosticArray
        from geometry_msgs.msg import PoseWithCovarianceStamped
        from nav_msgs.msg import Path as PathMessage
        from rclpy.executors import SingleThreadedExecutor
        from rosgraph_msgs.msg import Clock
        from sensor_msgs.msg import CameraInfo, CompressedImage, Image

        rclpy.init()
        self.answers: list[Answer] = []
        self.stopped = threading.Event()
        self._stream, self._clock_type = stream, Clock
        self._node = rclpy.create_node("soak_benchmark")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        compressed = stream.transport == "compressed"
        kind, topic = (CompressedImage, "image/compressed") if compressed else (Image, "image")
        self._images = self._node.create_publisher(kind, topic, 5)
        self._infos = self._node.create_publisher(CameraInfo, "camera_info", 5)
        self._clock = self._node.create_publisher(Clock, "/clock", 5)
        self._start_s = time.monotonic()
        self._node.create_subscription(DiagnosticArray, "status", self._on_status, 50)
        # Subscribers as on a robot, so that all messages are sent.
        self._node.create_subscription(PoseWithCovarianceStamped, "pose", lambda message: None, 10)
        self._node.create_subscription(PathMessage, "path", lambda message: None, 1)
        self._thread = threading.Thread(target=self._spin, name="hear")
        self._thread.start()

    def wait_for_node(self, process: subprocess.Popen[bytes], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while min(p.get_subscription_count() for p in (self._images, self._infos, self._clock)) == 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("The node did not come up.")
            time.sleep(0.1)
        time.sleep(1.0)
        self._start_s = time.monotonic()

    def minute(self) -> float:
        """Return the minutes since the node is up."""
        return (time.monotonic() - self._start_s) / 60

    def play_for(self, minutes: float) -> int:
        """Play the bag in a loop; return the number of loops."""
        loops = 0
        while self.minute() < minutes and not self.stopped.is_set():
            loops += 1
            play(
                self._stream.events(ReplayRange()),
                rate=1.0,
                publish=self._publish,
                tick=self._tick,
                stopped=lambda: self.minute() >= minutes or self.stopped.is_set(),
            )
        return loops

    def close(self) -> None:
        self.stopped.set()
        self._thread.join()

    def _publish(self, event: BagEvent) -> None:
        (self._images if event.is_image else self._infos).publish(event.data)

    def _tick(self, time_ns: int) -> None:
        message = self._clock_type()
        message.clock.sec, message.clock.nanosec = divmod(time_ns, 10**9)
        self._clock.publish(message)

    def _on_status(self, message: Any) -> None:
        values = {pair.key: pair.value for pair in message.status[0].values}
        self.answers.append(Answer(self.minute(), float(values["latency_ms"]), values["published"] == "true"))

    def _spin(self) -> None:
        while not self.stopped.is_set():
            self._executor.spin_once(timeout_sec=0.1)


def main() -> int:
    """Run the test, print the table and one line of JSON; return 1 if a limit was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", required=True, help="map folder or the name of a map")
    parser.add_argument("--bag", required=True, type=Path, help="rosbag2 to play in a loop")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, help="minutes left out of the result (default: a sixth, at most 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the whole report goes")
    parser.add_argument("--max-growth-mb", type=float, default=10.0, help="growth of memory allowed, MB an hour")
    parser.add_argument("--max-handles", type=int, default=2, help="growth allowed of file handles, and of threads")
    parser.add_argument("--max-drift", type=float, default=0.25, help="growth allowed of processor time a frame")
    parser.add_argument("--min-with-pose", type=float, default=0.9, help="share of answered frames with a pose")
    args = parser.parse_args()
    if os.environ.get(_CHILD) is None:  # run again in a separate ROS domain
        return subprocess.call([sys.executable, *sys.argv], env={**ros_environment(None), _CHILD: "1"})
    map_path = resolve_map(args.map).absolute()
    read_description(map_path)
    limits = Limits(args.max_growth_mb, args.max_handles, args.max_drift, args.min_with_pose)
    warm_up = min(args.minutes / 6, 5.0) if args.warm_up is None else args.warm_up
    samples: list[Sample] = []
    with BagStream(args.bag) as stream, tempfile.TemporaryDirectory(prefix="kfloc_soak_") as folder:
        settings = {"map": map_path, "use_sim_time": "true", "image_transport": stream.transport}
        settings["pose_file"] = Path(folder) / "last_pose.json"  # written regularly, as on a robot
        command = [sys.executable, "-m", "kfloc_ros.nodes.executables", NODE, "--ros-args", "--log-level", "error"]
        for name, value in settings.items():
            command += ["-p", f"{name}:={value}"]
        process = subprocess.Popen(command)
        client = Client(stream)
        try:
            client.wait_for_node(process, 120.0)
            sampler = threading.Thread(target=_sample_until_stopped, args=(client, process, samples), name="sample")
            sampler.start()
            loops = client.play_for(args.minutes)
        finally:
            client.stopped.set()
            start_s = time.monotonic()
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            code = process.wait(30)
            ending = {"exit_code": code, "shutdown_s": round(time.monotonic() - start_s, 2)}
            client.close()
        sampler.join()
    rows = [row(minute, samples, client.answers) for minute in range(int(args.minutes))]
    result = judge(rows, samples, warm_up, limits, ending)
    report = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": describe_hardware(),
        "minutes": args.minutes,
        "warm_up_minutes": warm_up,
        "loops": loops,
        "limits": asdict(limits),
        **result,
        "by_minute": [asdict(r) for r in rows],
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("min    RSS MB  handles threads  frames  poses  p50 ms  p95 ms  CPU ms/frame")
    for r in rows:
        print(
            f"{r.minute:3d}  {r.rss_mb:8.1f}  {r.handles:7d} {r.threads:7d} {r.answered:7d} {r.with_pose:6d} "
            f"{r.latency_p50_ms:7.1f} {r.latency_p95_ms:7.1f} {r.cpu_ms_per_frame:13.1f}"
        )
    print(json.dumps(result))
    return int(bool(result["limits_passed"]))


def _sample_until_stopped(client: Client, process: subprocess.Popen[bytes], samples: list[Sample]) -> None:
    while not client.stopped.is_set() and process.poll() is None:
        try:
            samples.append(sample(process.pid, client.minute()))
        except OSError:  # it has just ended
            return
        client.stopped.wait(SAMPLE_S)


if __name__ == "__main__":
    raise SystemExit(main())
