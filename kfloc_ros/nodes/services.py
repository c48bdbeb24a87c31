# SPDX-License-Identifier: Apache-2.0
"""``~/relocalize``, ``~/reset`` and ``~/enable``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger

from kfloc_ros.nodes.gate import Gate

RELOCALIZE = "asked to relocalize"
RESET = "asked to reset"


class _CanStartAnew(Protocol):
    def start_anew(self, reason: str) -> None: ...


class Services:
    """The services of one node; they are there in every lifecycle state and say when they can do nothing."""

    def __init__(self, node: Node, gate: Gate, application: Callable[[], _CanStartAnew | None]) -> None:
        self._gate, self._application = gate, application
        self._logger = node.get_logger()
        node.create_service(Trigger, "~/relocalize", lambda _, response: self._start_anew(RELOCALIZE, response))
        node.create_service(Trigger, "~/reset", lambda _, response: self._start_anew(RESET, response))
        node.create_service(SetBool, "~/enable", self._enable)

    def _start_anew(self, reason: str, response: Any) -> Any:
        application = self._application()
        if application is None:
            return _answer(response, False, "The node is not configured, so there is nothing to start anew.")
        application.start_anew(reason)
        self._logger.info(f"Starting anew: {reason}.")
        closed = self._gate.closed_reason
        waits = f" once frames are worked on again; now {closed}" if closed else " with the next image"
        return _answer(response, True, f"Starting anew{waits}.")

    def _enable(self, request: Any, response: Any) -> Any:
        application = self._application()
        if request.data and not self._gate.enabled and application is not None:
            application.start_anew("switched on again")
        self._gate.enabled = bool(request.data)
        if not request.data:
            return _answer(response, True, "Images are ignored until ~/enable is called with true.")
        closed = self._gate.closed_reason
        return _answer(response, True, f"Switched on, but {closed}." if closed else "Images are worked on.")


def _answer(response: Any, success: bool, message: str) -> Any:
    response.success, response.message = success, message
    return response
