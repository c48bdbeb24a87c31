# SPDX-License-Identifier: Apache-2.0
"""The GPU's memory runs out: while frames are worked on, while the node is set up, with and without a choice."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy

from kfloc_ros.nodes import managed_node
from kfloc_ros.nodes.managed_node import SUCCESS, ManagedNode
from kfloc_ros.nodes.worker import GpuMemoryError, reported_error
from kfloc_ros.replay.processes import free_domain

pytestmark = pytest.mark.ros

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Stage:
    """Notes on which device it was made; the first ``failures`` times there is no memory."""

    devices: list[str]
    failures: int

    def __init__(self, node: Any, parameters: Any, scene_map: Any, switch: Any) -> None:
        self.devices.append(parameters.localizer.device)
        if len(self.devices) <= self.failures:
            raise OUT_OF_MEMORY

    def pause(self) -> None: ...
    def stop(self) -> None: ...
    def request_reset(self, reason: str) -> None: ...


@pytest.fixture
def make_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ManagedNode]]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setattr(managed_node, "load_map", lambda path: SimpleNamespace(name="room"))
    rclpy.init(args=["--ros-args", "-p", "map:=/"], domain_id=free_domain(os.getpid()))
    nodes: list[ManagedNode] = []

    def make(failures: int) -> ManagedNode:
        Stage.devices, Stage.failures = [], failures
        nodes.append(ManagedNode("gpu_test", Stage))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()
    rclpy.try_shutdown()


def test_a_node_that_may_choose_goes_on_on_the_cpu(make_node: Callable[..., ManagedNode]) -> None:
    node = make_node(failures=0)
    assert node.trigger_configure() == SUCCESS
    said = reported_error(OUT_OF_MEMORY, node.parameters)  # in the worker's thread
    assert isinstance(said, GpuMemoryError) and "device is now 'cpu'" in str(said)
    node.apply_pending()
    assert Stage.devices == ["auto", "cpu"]
    assert node.get_parameter("device").value == "cpu", "what it does can be seen"


def test_a_node_without_memory_at_the_start_is_set_up_on_the_cpu(make_node: Callable[..., ManagedNode]) -> None:
    node = make_node(failures=1)
    assert node.trigger_configure() == SUCCESS and Stage.devices == ["auto", "cpu"]
    node.apply_pending()
    assert Stage.devices == ["auto", "cpu"], "once"


def test_where_the_user_chose_the_gpu_the_way_out_is_named(make_node: Callable[..., ManagedNode]) -> None:
    server = SimpleNamespace(localizer=SimpleNamespace(device="cuda"))
    said = reported_error(OUT_OF_MEMORY, server)
    assert isinstance(said, GpuMemoryError) and "set device to 'cpu'" in str(said)


def test_other_errors_are_left_as_they_are() -> None:
    error = RuntimeError("something else")
    assert reported_error(error, SimpleNamespace()) is error


RUNS_OUT_ONCE = """
import sys
import torch
from kfloc_ros.features.backbone import Backbone

extract, calls = Backbone.extract, []

def runs_out_once(backbone, image):
    calls.append(image)
    if len(calls) == {call}:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
    return extract(backbone, image)

Backbone.extract = runs_out_once
from kfloc_ros.nodes.executables import main
sys.exit(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 5])
def test_the_live_localizer_goes_on_on_the_cpu(
    new_world: Callable[[], Any], room_map: Path, room: Any, tmp_path: Path, call: int
) -> None:
    import signal
    import subprocess

    world, log = new_world(), tmp_path / "log"
    command = [
        sys.executable,
        "-c",
        RUNS_OUT_ONCE.format(call=call),
        "localizer",
        "--ros-args",
        "-p",
        f"map:={room_map}",
    ]
    with log.open("w") as sink:
        process = subprocess.Popen(command, env=world.environment, stdout=sink, stderr=subprocess.STDOUT)
    try:
        harness = world.harness
        harness.wait(harness.listens, 120.0)
        harness.spin(0.5)
        for position in range(30):
            harness.send(room[position % 8])
            harness.spin(0.3)
            if "device is now 'cpu'" in log.read_text():
                break
        assert "The GPU is out of memory. device is now 'cpu'" in log.read_text()
        harness.wait(harness.listens, 60.0)
        harness.spin(0.5)
        harness.localize(room[4])
        assert "Traceback" not in log.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(30.0) == 0
    finally:
        process.kill()
        process.wait()
