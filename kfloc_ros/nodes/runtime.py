# SPDX-License-Identifier: Apache-2.0
"""Runs one node from the command line to a clean exit, whatever ends it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import rclpy
from rclpy.exceptions import ROSInterruptException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.logging import get_logger
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from kfloc_ros.errors import KflocError
from kfloc_ros.mapping.scene_map import SceneMap, resolve_map
from kfloc_ros.nodes.parameter_server import ParameterServer

_WAIT_S = 0.1
"""How long the executor waits at a time; a signal is answered within it."""


class Application(Protocol):
    """What a node hosts."""

    def stop(self) -> None:
        """End the worker thread; the node is still there."""
        ...


Build = Callable[[Node, ParameterServer, SceneMap], Application]


def run_node(name: str, build: Build) -> int:
    """Make a node, let ``build`` attach to it, and spin until SIGINT or SIGTERM.

    Returns the exit code: 0 after a signal, 1 if the node cannot start, said in one FATAL sentence.
    """
    with _signals_set() as asked_to_stop:
        try:
            rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
        except RuntimeError as error:  # arguments that rcl does not understand
            get_logger(name).fatal(f"The arguments cannot be read: {error}")
            return 1
        try:
            return _run(name, build, asked_to_stop)
        finally:
            rclpy.try_shutdown()


def _run(name: str, build: Build, asked_to_stop: threading.Event) -> int:
    node = Node(name, automatically_declare_parameters_from_overrides=True)
    application: Application | None = None
    try:
        parameters = ParameterServer(node)
        scene_map = SceneMap.load(resolve_map(parameters.node.map))
        application = build(node, parameters, scene_map)
        node.get_logger().info(f"Ready: map '{scene_map.name}', waiting for images.")
        _spin(node, asked_to_stop)
        return 0
    except KflocError as error:
        node.get_logger().fatal(" ".join(str(error).split()))
        return 1
    finally:
        # In this order: nothing may publish on a node that is gone.
        if application is not None:
            application.stop()
        node.destroy_node()


def _spin(node: Node, asked_to_stop: threading.Event) -> None:
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        while not asked_to_stop.is_set() and rclpy.ok():
            executor.spin_once(timeout_sec=_WAIT_S)
    except (ExternalShutdownException, ROSInterruptException):
        pass
    finally:
        executor.shutdown()


@contextmanager
def _signals_set() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, in place of rclpy's handlers, which shut down under a running spin."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        asked.set()

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
