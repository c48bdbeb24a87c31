# SPDX-License-Identifier: Apache-2.0
"""One replay from beginning to end: start the nodes, play, evaluate, and leave no process behind."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kfloc_ros.bags.truth import BagTransforms, read_truth
from kfloc_ros.device import choose_device, describe_hardware
from kfloc_ros.errors import ReplayError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.results import write_results
from kfloc_ros.evaluation.summary import RunInfo, Summary
from kfloc_ros.maps.format import read_description, resolve_map
from kfloc_ros.messages.poses import tum_text
from kfloc_ros.replay.evaluate import active_seconds, replay_counts, replay_records, transform_accuracy, wall_seconds
from kfloc_ros.replay.processes import ProcessSet, check_ros, ros_environment
from kfloc_ros.replay.recording import Recording, ReplayConfig

Progress = Callable[[str, int, int], None]
"""Called with what is going on, images played so far, and images in all."""

AGENT = "agent"


def run_replay(config: ReplayConfig, *, command: str = "", progress: Progress | None = None) -> Summary:
    """Play a bag to the live nodes and write the result folder.

    A KeyboardInterrupt ends the play; the summary of what was done until then is written and marked
    ``interrupted``. Every process that was started has ended when this returns or raises.

    Raises:
        RosUnavailableError: there is no rclpy.
        SourceError: the bag cannot be used.
        MapError: there is no such map.
        ReplayError: a node ended or did not come up.
    """
    check_ros()
    map_path = resolve_map(config.map).absolute()
    description = read_description(map_path)  # a missing map is told here, and not by a log
    map_frame = str(description.get("frame_id", "map"))
    with config.open() as stream:
        transforms = BagTransforms(stream, map_frame, config.base_frame) if config.base_frame else None
        total = stream.image_count(config.part) * config.loops
        truth, positions = read_truth(stream, config.truth, config.truth_of), stream.positions()
        parameters: dict[str, str | bool] = {
            "map": str(map_path),
            "use_sim_time": True,
            "device": config.device,
            "filter": config.filter,
            "refine": config.refine,
            "image_transport": stream.transport,
            "rectified": config.is_rectified(stream),
            **_frames(transforms),
        }
        played = config.played(stream)
    report = progress or (lambda text, done, total: None)
    interrupted = False
    with _logs(config.out / "logs") as logs, tempfile.TemporaryDirectory(prefix="kfloc_replay_") as folder:
        recording_path = Path(folder) / "recording.json"
        with ProcessSet(ros_environment(config.domain_id)) as processes:
            report("starting the nodes", 0, total)
            options = ["--ros-args", "--params-file", str(_write_parameters(Path(folder), parameters))]
            for name in config.nodes:
                processes.start(name, "kfloc_ros.nodes.executables", [name, *options], log=logs / f"{name}.log")
            arguments = [*_agent_arguments(config, recording_path), f"--map-frame={map_frame}"]
            if truth.poses:
                truth_path = Path(folder) / "truth.tum"
                truth_path.write_text(tum_text(sorted(truth.poses.items())), encoding="utf-8")
                arguments.append(f"--truth={truth_path}")
            output = processes.start(AGENT, "kfloc_ros.replay.agent", arguments, log=logs / "agent.log", pipe=True)
            assert output is not None
            lines = _lines(output)
            try:
                _follow(processes, lines, total, report)
            except KeyboardInterrupt:
                interrupted = True
                processes.interrupt(AGENT)
                with contextlib.suppress(ReplayError):
                    _follow(processes, lines, total, report)
        if not recording_path.exists():
            if interrupted:
                raise KeyboardInterrupt
            raise ReplayError(f"The replay agent wrote no recording: {processes.last_words(AGENT)}")
        recording = Recording.load(recording_path)
        if not recording.played:
            raise KeyboardInterrupt
    report("evaluating", len(recording.played), total)
    records = replay_records(recording, truth.poses, positions, transforms)
    transform = None
    if transforms is not None and config.loops == 1:
        transform = transform_accuracy(recording, truth.poses, transforms)
    counts = replay_counts(recording, records)
    device = str(choose_device(config.device))
    run = RunInfo(
        kind="replay",
        command=command,
        map=str(map_path),
        source=str(config.bag),
        poses=truth.name,
        split=None,
        frames=None,
        hardware=describe_hardware(device),
        received=counts.received,
        processed=counts.processed,
        dropped=counts.dropped,
        duration_s=wall_seconds(recording) if config.every_frame else active_seconds(recording, config.rate),
        interrupted=interrupted,
        transform=transform,
        options={
            **played,
            "rate": config.rate,
            "separate": config.separate,
            "every_frame": config.every_frame,
            **_frames(transforms),
            "played": counts.played,
            "lost_in_transport": counts.lost,
            "transforms": dict(recording.transforms),
            "node_exits": {name: asdict(ending) for name, ending in processes.endings.items()},
            "processes_left": processes.left(),
        },
    )

    def images_of(worst: Sequence[FrameRecord]) -> dict[int, NDArray[np.uint8]]:
        with config.open() as stream:
            return stream.images({record.stamp_ns for record in worst})

    return write_results(config.out, records, run, images_of=images_of)


@contextlib.contextmanager
def _logs(folder: Path) -> Iterator[Path]:
    """A folder for the logs of the processes; an interruption before there are results leaves none."""
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except KeyboardInterrupt:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _frames(transforms: BagTransforms | None) -> dict[str, str | bool]:
    """The parameters that say whose pose is published, and against what."""
    if transforms is None:
        return {}
    if not transforms.odom_frame:
        return {"base_frame": transforms.base_frame, "tf_mode": "map_to_base"}
    return {"base_frame": transforms.base_frame, "tf_mode": "map_to_odom", "odom_frame": transforms.odom_frame}


def _write_parameters(folder: Path, values: Mapping[str, str | bool]) -> Path:
    path = folder / "parameters.yaml"
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": dict(values)}}), encoding="utf-8")
    return path


def _agent_arguments(config: ReplayConfig, recording: Path) -> list[str]:
    arguments = [str(config.bag), str(recording), f"--rate={config.rate}", f"--start={config.start_s}"]
    arguments.append(f"--loops={config.loops}")
    arguments += ["--every-frame"] if config.every_frame else []
    if config.duration_s is not None:
        arguments.append(f"--duration={config.duration_s}")
    if config.image_topic is not None:
        arguments.append(f"--image-topic={config.image_topic}")
    if config.info_topic is not None:
        arguments.append(f"--camera-info-topic={config.info_topic}")
    if config.tf is not None:
        arguments.append(f"--tf={config.tf}")
    if config.base_frame:
        arguments.append(f"--base-frame={config.base_frame}")
    return [*arguments, f"--patience={config.patience_s}", "--nodes", *config.nodes]


def _lines(output: IO[str]) -> queue.Queue[str | None]:
    """Lines of a pipe, then None, through a thread, so that waiting for one can have a time limit."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with contextlib.suppress(ValueError, OSError):  # the pipe is closed under us at the end
            for line in output:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="agent output", daemon=True).start()
    return lines


def _follow(processes: ProcessSet, lines: queue.Queue[str | None], total: int, report: Progress) -> None:
    """Follow the agent until it is done. Raises ReplayError if it or a node fails."""
    for message in _messages(processes, lines):
        event = message["event"]
        if event == "waiting":
            report("waiting for the nodes", 0, total)
        elif event == "ready":
            report("playing", 0, total)
        elif event == "progress":
            report("playing", int(message["played"]), total)
        elif event == "error":
            raise ReplayError(str(message["message"]))
        elif event == "done":
            report("playing", int(message["played"]), total)
            return


def _messages(processes: ProcessSet, lines: queue.Queue[str | None]) -> Iterator[dict[str, Any]]:
    while True:
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            for name in processes.ended():
                if name != AGENT:
                    raise ReplayError(
                        f"{name} ended with exit code {processes.exit_code(name)} during the replay; "
                        f"its last words: {processes.last_words(name)}"
                    ) from None
            continue
        if line is None:
            raise ReplayError(f"The replay agent ended early; its last words: {processes.last_words(AGENT)}")
        with contextlib.suppress(json.JSONDecodeError):  # a library may print something of its own
            message = json.loads(line)
            if isinstance(message, dict) and "event" in message:
                yield message
