# SPDX-License-Identifier: Apache-2.0
"""Process of one node, from the command line to a clean exit."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import rclpy
from numpy.typing import ArrayLike
from rclpy.exceptions import ROSInterruptException
from rclpy.executors import Executor, ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.logging import get_logger
from rclpy.signals import SignalHandlerOptions

from kfloc_ros.device import limit_threads, spare_threads
from kfloc_ros.errors import KflocError
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.jobs import HELPERS
from kfloc_ros.messages.poses import Quaternions, use_quaternions
from kfloc_ros.nodes.managed_node import Build, ManagedNode
from kfloc_ros.types import Matrix

try:
    from rclpy.experimental import EventsExecutor
except ImportError:  # of an older rclpy
    EventsExecutor = None

try:
    import tf_transformations
except ImportError:  # it, or transforms3d, which it wraps
    tf_transformations = None

_MAX_FAILURES = 100
"""Number of consecutive failed callbacks that end the node."""
_REPEAT_S = 5.0
"""Shortest time between two logged failures, in seconds."""
_WAIT_S = 0.1
"""Longest wait of the executor, in seconds; a signal is handled within it."""


def run_node(name: str, build: Build) -> int:
    """Build a lifecycle node around ``build``, start it if ``autostart`` is set, and spin until SIGINT or SIGTERM.

    Returns the exit code: 0 after a signal; 1 if the node cannot start, with one FATAL sentence in the log.
    """
    with signals_set() as stop_requested:
        try:
            rclpy.init(args=sys.argv, signal_handler_options=SignalHandlerOptions.NO)
        except RuntimeError as error:  # arguments that rcl does not understand
            get_logger(name).fatal(f"The arguments cannot be read: {error}")
            return 1
        try:
            return _run(name, build, stop_requested)
        finally:
            rclpy.try_shutdown()


def _run(name: str, build: Build, stop_requested: threading.Event) -> int:
    limit_threads()
    HELPERS.spare = spare_threads()
    use_quaternions(ros_quaternions())
    try:
        node = ManagedNode(name, build)
    except KflocError as error:
        get_logger(name).fatal(" ".join(str(error).split()))
        return 1
    try:
        if node.parameters.node.autostart and not stop_requested.is_set():
            if node.trigger_configure() != TransitionCallbackReturn.SUCCESS:
                node.get_logger().fatal(node.fault)
                return 1
            node.trigger_activate()
        _spin(node, stop_requested)
        return 0
    finally:
        node.close()


def make_executor() -> Executor:
    """Return rclpy's executor by events where rclpy has it, else the single-threaded one.

    The single-threaded one collects all entities of a node in Python before every wait. For the nodes here, with 16
    services and 40 event handlers, that takes 0.8 ms a callback, and the computing threads wait for the interpreter
    meanwhile. ``KFLOC_EXECUTOR=single_threaded`` in the environment chooses it nevertheless.
    """
    if EventsExecutor is None or os.environ.get("KFLOC_EXECUTOR", "") == "single_threaded":
        return SingleThreadedExecutor()
    executor: Executor = EventsExecutor()
    return executor


def _spin(node: ManagedNode, stop_requested: threading.Event) -> None:
    executor = make_executor()
    executor.add_node(node)
    failures = 0
    try:
        while not stop_requested.is_set() and rclpy.ok():
            try:
                executor.spin_once(timeout_sec=_WAIT_S)
                failures = 0
            except (ExternalShutdownException, ROSInterruptException):
                raise
            except Exception as error:  # raised by a callback: one message must not end the node
                failures += 1
                if failures > _MAX_FAILURES:
                    raise
                trace = "".join(traceback.format_exception(error))
                node.get_logger().error(
                    f"A callback failed; the node continues. Please report it:\n{trace}",
                    throttle_duration_sec=_REPEAT_S,
                )
            node.apply_pending()
    except (ExternalShutdownException, ROSInterruptException):
        pass
    finally:
        executor.shutdown()


@contextmanager
def signals_set() -> Iterator[threading.Event]:
    """Yield an event that SIGINT and SIGTERM set, in place of rclpy's handlers, which shut down during a spin."""
    stop_requested = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop_requested.set()

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop_requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ros_quaternions(package: Any = tf_transformations) -> Quaternions:
    """Return the conversions of ``tf_transformations``, with the sign w >= 0, or our own where it is not installed."""
    if package is None:
        return Quaternions()

    def from_matrix(R: Matrix) -> Matrix:
        q = np.asarray(package.quaternion_from_matrix(make_pose(R, np.zeros(3))), dtype=np.float64)
        return q if q[3] >= 0 else -q

    def to_matrix(xyzw: ArrayLike) -> Matrix:
        return np.asarray(package.quaternion_matrix(xyzw), dtype=np.float64)[:3, :3]

    return Quaternions(from_matrix, to_matrix)
