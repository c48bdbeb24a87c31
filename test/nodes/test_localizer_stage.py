# SPDX-License-Identifier: Apache-2.0
"""The stage of ``localizer`` in this process: features computed beside the frame before change no bit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

import rclpy
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.jobs import HELPERS
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.camera_info import fill_info
from kfloc_ros.messages.images import fill_image
from kfloc_ros.messages.poses import fill_stamp
from kfloc_ros.nodes.localizer_stage import LocalizerStage, PoseOutput
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.replay.processes import free_domain
from kfloc_ros.types import PoseEstimate

pytestmark = pytest.mark.ros
FRAMES = 4


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=free_domain(os.getpid()))
    arguments = ["--ros-args", "-p", "max_age_s:=0.0"]
    node = Node("stage_test", context=context, cli_args=arguments, automatically_declare_parameters_from_overrides=True)
    yield node
    node.destroy_node()
    context.try_shutdown()


def test_features_computed_beside_the_frame_before_change_no_bit(
    node: Node, room: Any, room_map: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracting: set[str] = set()
    extract = Backbone.extract

    def noted(self: Backbone, image: Any) -> Any:
        extracting.add(threading.current_thread().name)
        return extract(self, image)

    monkeypatch.setattr(Backbone, "extract", noted)
    scene_map, found, threads = SceneMap.load(room_map), [], []
    parameters, began_ns = ParameterServer(node), time.time_ns()
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: cores)
        monkeypatch.setattr(HELPERS, "spare", len(cores) - 1)
        found.append(estimates(node, parameters, scene_map, room, began_ns, extracting, monkeypatch))
        threads.append(set(extracting))
    assert threads == [{"localizer"}, {"camera"}]
    plain, ahead = found
    assert [estimate.state for estimate in ahead] == [estimate.state for estimate in plain]
    for one, other in zip(plain, ahead, strict=True):
        np.testing.assert_array_equal(one.T_map_camera, other.T_map_camera)
        np.testing.assert_array_equal(one.covariance, other.covariance)


def estimates(
    node: Node,
    parameters: ParameterServer,
    scene_map: SceneMap,
    room: Any,
    began_ns: int,
    extracting: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> list[PoseEstimate]:
    """What a new stage publishes for the first frames of the room, each given when the one before is taken."""
    seen: list[PoseEstimate] = []
    publish = PoseOutput.publish
    with monkeypatch.context() as patch:
        patch.setattr(PoseOutput, "publish", lambda self, *given: (seen.append(publish(self, *given)), seen[-1])[1])
        stage = LocalizerStage(node, parameters, scene_map, EnableSwitch(active=True))
        try:
            extracting.clear()
            stage._camera._on_info(fill_info(CameraInfo(), scene_map.camera))
            for number in range(FRAMES):
                message = fill_image(Image(), room[number].image)
                fill_stamp(message.header.stamp, began_ns + number * 33_000_000)
                stage._camera._on_image(message)
                deadline = time.monotonic() + 20.0
                while len(seen) < number + 1:  # none is dropped
                    assert time.monotonic() < deadline, "no pose in time"
                    time.sleep(0.002)
        finally:
            stage.stop()
    return seen
