# SPDX-License-Identifier: Apache-2.0
"""What ``status``, ``/diagnostics`` and the log say of a frame."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source a ROS 2 installation")

from kfloc_ros.nodes.diagnostics import StateLog
from kfloc_ros.nodes.pose_publisher import Outcome
from kfloc_ros.types import TrackingState


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(tf_mode="map_to_base"), "sound"),
        (Outcome(pose="TF does not connect", tf_mode="map_to_base"), "none is broadcast: TF does not connect"),
        (Outcome(pose="dark", tf_mode="map_to_odom", is_repeating=True), "the last one is sent again: dark"),
        (Outcome(transform="a loop", tf_mode="map_to_odom", is_repeating=True), "a loop"),
        (Outcome(tf_mode="none"), "none is broadcast: tf_mode is none"),
        (Outcome(pose="dark"), "none is broadcast: tf_mode is none"),
    ],
)
def test_a_transform_is_sound_only_if_one_was_broadcast(outcome: Outcome, said: str) -> None:
    assert outcome.transform_text == said


def test_the_first_pose_and_every_change_of_state_are_logged_without_a_flood() -> None:
    lines: list[str] = []
    now_s = [0.0]
    log = StateLog("kitchen", lines.append, lambda: now_s[0])
    for state, reason in (
        (TrackingState.INITIALIZING, "too dark"),
        (TrackingState.TRACKING, ""),
        (TrackingState.TRACKING, ""),
        (TrackingState.LOST, "It is dark."),
    ):
        now_s[0] += 2.0
        if state is TrackingState.TRACKING:
            log.note_pose(np.eye(4), 123.4)
        log.note_state(state, reason)
    assert lines == [
        "State INITIALIZING: too dark.",
        "First pose in map 'kitchen': the camera is at (0.00, 0.00, 0.00) m; latency 123 ms.",
        "State INITIALIZING -> TRACKING.",
        "State TRACKING -> LOST: It is dark.",
    ]
    del lines[:]
    for number in range(100):  # ten seconds of a state that flips with every frame
        now_s[0] += 0.1
        log.note_state(TrackingState.DEGRADED if number % 2 else TrackingState.TRACKING, "")
    assert 5 <= len(lines) <= 10
