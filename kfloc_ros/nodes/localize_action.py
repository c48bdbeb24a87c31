# SPDX-License-Identifier: Apache-2.0
"""Action ``~/localize``: find the pose anew, with feedback after every image; only where kfloc_msgs is built."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseWithCovarianceStamped
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.task import Future

from kfloc_ros.messages.poses import stamp_to_ns
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import read_values
from kfloc_ros.nodes.worker import EnableSwitch
from kfloc_ros.types import TrackingState

try:
    from kfloc_msgs.action import Localize
    from rclpy.action import ActionServer, CancelResponse, GoalResponse
except ImportError:
    Localize = None

DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S = 30.0, 3600.0
_TICK_S = 0.1
_POSE_WAIT_S = 0.5


def stage_of(values: Mapping[str, str]) -> str:
    """Return the stage that a ``status`` message tells of: tried, matched, ambiguous or found."""
    has_pose = values.get("published") == "true"
    if has_pose and values.get("state") == TrackingState.TRACKING.value:
        return "found"
    if "look alike" in values.get("reason", ""):
        return "ambiguous"
    return "matched" if has_pose else "tried"


@dataclass(eq=False)
class _Search:
    """A goal that is being worked on."""

    handle: Any
    deadline_s: float
    done: Future = field(default_factory=Future)
    images: int = 0
    skipped: bool = False
    reason: str = "no image was processed"
    found_ns: int = 0
    found_s: float = 0.0


class LocalizeAction:
    """Action server of one node, available in every lifecycle state; a goal needs an active node.

    It listens to the node's own ``status`` and ``pose`` while there is a goal. A new goal ends the one before.

    Args:
        start: resets the stage; the argument is True if the last pose is to be forgotten, too. Returns the reset's
            reason, or an empty string if there is nothing to reset.
    """

    def __init__(self, node: Node, switch: EnableSwitch, start: Callable[[bool], str]) -> None:
        self._node, self._switch, self._start = node, switch, start
        self._search: _Search | None = None
        self._reset_reason = ""
        self._subscriptions: list[Any] = []
        self._poses: dict[int, Any] = {}
        self._timer = node.create_timer(_TICK_S, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._timer.cancel()
        self._server = ActionServer(
            node,
            Localize,
            "~/localize",
            self._execute,
            goal_callback=self._on_goal,
            cancel_callback=lambda _: CancelResponse.ACCEPT,
        )

    def close(self) -> None:
        """End the server, before the node is destroyed."""
        self._server.destroy()

    def _on_goal(self, request: Any) -> Any:
        if self._switch.is_on:
            return GoalResponse.ACCEPT
        self._node.get_logger().warning(f"A goal of ~/localize was refused: {self._switch.off_reason}.")
        return GoalResponse.REJECT

    async def _execute(self, handle: Any) -> Any:
        if self._search is not None:
            self._end("another goal was accepted")
        given_s = handle.request.timeout.sec + 1e-9 * handle.request.timeout.nanosec
        timeout_s = min(given_s, MAX_TIMEOUT_S) if given_s > 0.0 else DEFAULT_TIMEOUT_S
        search = self._search = _Search(handle, time.monotonic() + timeout_s)
        self._listen()
        self._reset_reason = self._start(bool(handle.request.forget))
        self._timer.reset()
        pose = await search.done
        result = Localize.Result(found=pose is not None, reason="" if pose is not None else search.reason)
        if pose is not None:
            result.pose = pose
            handle.succeed()
        elif handle.is_cancel_requested:
            handle.canceled()
        else:
            handle.abort()
        return result

    def _listen(self) -> None:
        """Subscribe; a reload of the stage destroys all subscriptions, so they are made anew then."""
        if self._subscriptions and all(item in list(self._node.subscriptions) for item in self._subscriptions):
            return
        self._poses.clear()
        self._subscriptions = [
            self._node.create_subscription(DiagnosticArray, "status", self._on_status, qos.results()),
            self._node.create_subscription(PoseWithCovarianceStamped, "pose", self._on_pose, qos.results()),
        ]

    def _on_pose(self, message: Any) -> None:
        self._poses[stamp_to_ns(message.header.stamp)] = message
        while len(self._poses) > 8:
            del self._poses[next(iter(self._poses))]

    def _on_status(self, message: Any) -> None:
        search, values = self._search, read_values(message)
        if search is None or search.found_ns:
            return
        if not search.images and not search.skipped and values.get("filter_reset") != self._reset_reason:
            search.skipped = True  # it was in work when the goal came
            return
        search.images += 1
        stage, search.reason = stage_of(values), values.get("reason", "")
        ratio = values.get("inlier_ratio", "0")
        feedback = Localize.Feedback(stage=stage, reason=search.reason, images=search.images)
        feedback.inlier_ratio = float(ratio) if ratio not in ("", "nan") else 0.0
        search.handle.publish_feedback(feedback)
        if stage == "found":
            search.found_ns, search.found_s = stamp_to_ns(message.header.stamp), time.monotonic()
            self._tick()

    def _tick(self) -> None:
        search = self._search
        if search is None:
            self._timer.cancel()
            return
        self._listen()
        now_s = time.monotonic()
        pose = self._poses.get(search.found_ns) if search.found_ns else None
        if pose is not None:
            self._end("", pose)
        elif search.handle.is_cancel_requested:
            self._end("cancelled")
        elif not self._switch.is_on:
            self._end(self._switch.off_reason)
        elif search.found_ns and now_s - search.found_s > _POSE_WAIT_S:
            search.found_ns = 0  # lost on its way: the next image has one, too
        elif now_s > search.deadline_s:
            self._end(f"not found in time, after {search.images} images: {search.reason or 'the pose is not trusted'}")

    def _end(self, reason: str, pose: Any = None) -> None:
        search, self._search = self._search, None
        assert search is not None
        search.reason = reason
        for item in self._subscriptions:
            if item in list(self._node.subscriptions):
                self._node.destroy_subscription(item)
        self._subscriptions = []
        search.done.set_result(pose)


def localize_action(node: Node, switch: EnableSwitch, start: Callable[[bool], str]) -> LocalizeAction | None:
    """Return the action server, or None where kfloc_msgs is not built."""
    return None if Localize is None else LocalizeAction(node, switch, start)
