# SPDX-License-Identifier: Apache-2.0
"""The lifecycle node that hosts an application: configure loads the map, cleanup gives everything back."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger

from kfloc_ros.device import choose_device
from kfloc_ros.errors import KflocError
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import localizer_for
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.place import AnyMap, load_map
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.parameters import NodeConfig
from kfloc_ros.nodes.worker import Gate, explained
from kfloc_ros.types import Frame

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class Application(Protocol):
    """What a node hosts while it is configured."""

    def pause(self) -> None:
        """Let the frame in work come to its end; when this returns nothing more is published."""
        ...

    def stop(self) -> None:
        """End the worker thread; the node is still there."""
        ...

    def start_anew(self, reason: str) -> None:
        """Forget what was carried over from earlier frames, before the next one is worked on."""
        ...


Build = Callable[[Node, ParameterServer, AnyMap, Gate], Application]


class ManagedNode(LifecycleNode):  # type: ignore[misc]
    """A lifecycle node around an application.

    A parameter that cannot change under a running application makes a new one, between two turns of the
    executor (:meth:`settle`), without leaving the lifecycle state.

    Raises:
        ConfigError: a given parameter is unknown or its value does not fit.
    """

    def __init__(self, name: str, build: Build) -> None:
        super().__init__(name, automatically_declare_parameters_from_overrides=True)
        self._build = build
        self._gate = Gate()
        self._application: Application | None = None
        self._map: AnyMap | None = None
        self._next_map: AnyMap | None = None
        self._reload_asked = False
        self.fault = ""
        """Why the last attempt to configure failed."""
        self.parameters = ParameterServer(self, self._check_reload)
        self._switches = Services(self, self._gate, lambda: self._application)
        self._kept = {id(entity) for entity in self._entities()}

    def settle(self) -> None:
        """Do what was put off until no callback runs."""
        self._set_what_was_asked()
        if not self._reload_asked:
            return
        self._reload_asked = False
        scene_map, self._next_map = self._next_map or self._map, None
        if self._application is None or scene_map is None:
            return
        self._tear_down()
        try:
            self._set_up(scene_map)
        except Exception as error:
            self._explain(error)
            if self._gate.active:
                self.trigger_deactivate()
            self.trigger_cleanup()

    def close(self) -> None:
        """End the application and the node."""
        self._gate.active = False
        self._tear_down()
        self.destroy_node()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        try:
            self._set_up(load_map(resolve_map(self.parameters.node.map)))
        except Exception as error:
            self._explain(error)
            self._tear_down()
            return FAILURE
        return SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        if self._application is not None:
            self._application.start_anew("activated")
        self._gate.active = True
        return SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._gate.active = False
        if self._application is not None:
            self._application.pause()
        return SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._gate.active = False
        self._tear_down()
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.on_cleanup(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.on_cleanup(state)

    def _set_up(self, scene_map: AnyMap) -> None:
        try:
            self._application = self._build(self, self.parameters, scene_map, self._gate)
        except torch.cuda.OutOfMemoryError as error:
            fault = explained(error, self.parameters)
            self._tear_down()
            if not self._set_what_was_asked():
                raise fault from error
            self.get_logger().warning(str(fault))
            self._application = self._build(self, self.parameters, scene_map, self._gate)
        self._map, self.fault = scene_map, ""
        self.get_logger().info(f"Ready: map '{scene_map.name}', waiting for images.")

    def _set_what_was_asked(self) -> bool:
        """Make the changes of parameters that came from within; whether there were any."""
        asked = list(self.parameters.asked())
        if asked:
            self.set_parameters(asked)
        return bool(asked)

    def _tear_down(self) -> None:
        """Back to what the node had before it was configured."""
        application, self._application, self._map = self._application, None, None
        # In this order: nothing may publish on a publisher that is gone.
        if application is not None:
            application.stop()
        destroy: list[tuple[Iterable[Any], Callable[[Any], object]]] = [
            (self.timers, self.destroy_timer),
            (self.subscriptions, self.destroy_subscription),
            (self.services, self.destroy_service),
            (self.publishers, self.destroy_publisher),
        ]
        for entities, destroy_one in destroy:
            for entity in [item for item in entities if id(item) not in self._kept]:
                destroy_one(entity)
        del application
        gc.collect()  # components know each other in circles
        torch.cuda.empty_cache()  # for others: torch keeps what it once had; does nothing without a GPU

    def _entities(self) -> Iterable[Any]:
        yield from self.timers
        yield from self.subscriptions
        yield from self.services
        yield from self.publishers

    def _check_reload(self, node: NodeConfig, localizer: LocalizerConfig) -> None:
        """Whether an application can be made from changed parameters; has it made soon. Raises KflocError if not."""
        if self._application is None:
            return  # configuring will read them
        choose_device(localizer.device)
        if node.map != self.parameters.node.map:
            self._next_map = load_map(resolve_map(node.map))
        self._reload_asked = True

    def _explain(self, error: Exception) -> None:
        if isinstance(error, KflocError):
            self.fault = " ".join(str(error).split())
        else:
            self.fault = f"The node cannot be set up: {type(error).__name__}: {error}"
            self.get_logger().error("".join(traceback.format_exception(error)))
        self.get_logger().error(self.fault)


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


def warm_up(scene_map: AnyMap, config: LocalizerConfig) -> None:
    """Run a frame of noise through a localizer that is then thrown away.

    The first pass of a network chooses and compiles its kernels, which takes several times as long as a
    frame and is remembered by the process. A localizer of its own, so that nothing is carried over.
    """
    camera = scene_map.camera
    image = np.random.default_rng(0).integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
    localizer = localizer_for(scene_map, config)
    for stamp_ns in (1, 2):  # the second frame has a prior, if the first one found anything
        localizer.process(Frame(image=image, camera=camera, stamp_ns=stamp_ns))
