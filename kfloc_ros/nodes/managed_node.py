# SPDX-License-Identifier: Apache-2.0
"""Lifecycle node that hosts a stage: configure loads the map, cleanup releases all memory."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from std_srvs.srv import Empty, SetBool, Trigger

from kfloc_ros.device import choose_device
from kfloc_ros.errors import KflocError
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import localizer_for
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.place import AnyMap, load_map, single_map
from kfloc_ros.nodes import qos
from kfloc_ros.nodes.health import Health
from kfloc_ros.nodes.localize_action import localize_action
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.parameters import NodeConfig
from kfloc_ros.nodes.pose_file import check_replaceable, pose_path
from kfloc_ros.nodes.worker import EnableSwitch, reported_error

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class Stage(Protocol):
    """Stage that a node hosts while it is configured."""

    def pause(self) -> None:
        """Wait until the current frame is processed; after the return nothing more is published."""
        ...

    def stop(self) -> None:
        """End the worker thread; the node still exists."""
        ...

    def request_reset(self, reason: str) -> None:
        """Request a reset: the next frame starts without the state of earlier frames."""
        ...


Build = Callable[[Node, ParameterServer, AnyMap, EnableSwitch], Stage]


class ManagedNode(LifecycleNode):  # type: ignore[misc]
    """Lifecycle node that hosts a stage.

    If a changed parameter cannot take effect in a running stage, the stage is built again between two turns of
    the executor (:meth:`apply_pending`), in the same lifecycle state.

    Raises:
        ConfigError: a given parameter is unknown or its value is invalid.
    """

    def __init__(self, name: str, build: Build) -> None:
        super().__init__(name, automatically_declare_parameters_from_overrides=True)
        self._build = build
        self._switch = EnableSwitch()
        self._stage: Stage | None = None
        self._map: AnyMap | None = None
        self._next_map: AnyMap | None = None
        self._reload_asked = False
        self._applied: tuple[NodeConfig, LocalizerConfig] | None = None
        self.fault = ""
        """Error of the last failed configuration; empty if none."""
        self.parameters = ParameterServer(self, self._check_reload)
        is_whole = bool(getattr(build, "IS_WHOLE", False))
        self._switches = Services(self, self._switch, lambda: self._stage, is_whole=is_whole)
        self._action = localize_action(self, self._switch, self._switches.start_anew) if is_whole else None
        self._own = {id(entity) for entity in self._entities()}

    def apply_pending(self) -> None:
        """Apply deferred parameter changes; the executor calls this when no callback runs."""
        self._apply_requested()
        if not self._reload_asked:
            return
        self._reload_asked = False
        scene_map, self._next_map = self._next_map or self._map, None
        if self._stage is None or scene_map is None:
            return
        former_map, former = self._map, self._applied
        self._tear_down()
        try:
            self._set_up(scene_map)
        except Exception as error:
            self._explain(error)
            self._undo(former_map or scene_map, former or (self.parameters.node, self.parameters.localizer))

    def close(self) -> None:
        """End the stage and the node."""
        self._switch.active = False
        self._tear_down()
        if self._action is not None:
            self._action.close()
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
        if self._stage is not None:
            self._stage.request_reset("activated")
        self._switch.active = True
        return SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._switch.active = False
        if self._stage is not None:
            self._stage.pause()
        return SUCCESS

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._switch.active = False
        self._tear_down()
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.on_cleanup(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.on_cleanup(state)

    def _set_up(self, scene_map: AnyMap) -> None:
        try:
            self._stage = self._build(self, self.parameters, scene_map, self._switch)
        except torch.cuda.OutOfMemoryError as error:
            fault = reported_error(error, self.parameters)
            self._tear_down()
            if not self._apply_requested():
                raise fault from error
            self.get_logger().warning(str(fault))
            self._stage = self._build(self, self.parameters, scene_map, self._switch)
        self._map, self.fault = scene_map, ""
        self._applied = (self.parameters.node, self.parameters.localizer)
        self.get_logger().info(f"Ready: map '{scene_map.name}', waiting for images.")

    def _undo(self, scene_map: AnyMap, former: tuple[NodeConfig, LocalizerConfig]) -> None:
        """Return to the former parameters and map after a change that failed; without success, to unconfigured."""
        self._tear_down()
        changes = self.parameters.changes_to(*former)
        self.set_parameters(changes)
        try:
            self._set_up(scene_map)
        except Exception as error:
            self._explain(error)
            if self._switch.active:
                self.trigger_deactivate()
            self.trigger_cleanup()
            return
        names = ", ".join(f"'{change.name}'" for change in changes) or "no parameter"
        self.get_logger().error(f"The change was undone: the node continues, with the former value of {names}.")

    def _apply_requested(self) -> bool:
        """Apply parameter changes requested by the stage; return True if there were any."""
        requested = list(self.parameters.requested())
        if requested:
            self.set_parameters(requested)
        return bool(requested)

    def _tear_down(self) -> None:
        """Destroy the stage and all entities made since the node was constructed."""
        stage, self._stage, self._map = self._stage, None, None
        # In this order: nothing may publish on a destroyed publisher.
        if stage is not None:
            stage.stop()
        destroy: list[tuple[Iterable[Any], Callable[[Any], object]]] = [
            (self.timers, self.destroy_timer),
            (self.subscriptions, self.destroy_subscription),
            (self.services, self.destroy_service),
            (self.publishers, self.destroy_publisher),
        ]
        for entities, destroy_one in destroy:
            for entity in [item for item in entities if id(item) not in self._own]:
                destroy_one(entity)
        del stage
        gc.collect()  # the objects of a stage reference each other in cycles
        torch.cuda.empty_cache()  # torch caches freed memory: release it to other processes; no effect without a GPU

    def _entities(self) -> Iterable[Any]:
        yield from self.timers
        yield from self.subscriptions
        yield from self.services
        yield from self.publishers

    def _check_reload(self, node: NodeConfig, localizer: LocalizerConfig) -> None:
        """Schedule a new stage for changed parameters. Raises KflocError if it cannot be built."""
        if self._stage is None:
            return  # configure will read them
        choose_device(localizer.device)
        if node.pose_file and node.pose_file != self.parameters.node.pose_file:
            check_replaceable(pose_path(node.pose_file))
        if node.map != self.parameters.node.map:
            next_map = load_map(resolve_map(node.map))
            if getattr(self._build, "ONE_MAP_ONLY", False):
                single_map(next_map)
            self._next_map = next_map
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


class _Resettable(Protocol):
    def request_reset(self, reason: str) -> None: ...


class Services:
    """Services of one node, available in every lifecycle state; the response says if there is nothing to do.

    Args:
        is_whole: the node does everything, so that one call suffices.
    """

    def __init__(
        self, node: Node, switch: EnableSwitch, stage: Callable[[], _Resettable | None], *, is_whole: bool = False
    ) -> None:
        self._switch, self._stage = switch, stage
        self._logger = node.get_logger()
        for name, reason in (("~/relocalize", RELOCALIZE), ("~/reset", RESET)):

            def reset(request: Any, response: Any, reason: str = reason) -> Any:
                return self._request_reset(reason, response)

            node.create_service(Trigger, name, reset, qos_profile=qos.services())
        node.create_service(SetBool, "~/enable", self._enable, qos_profile=qos.services())
        if is_whole:  # by the name and the type that AMCL has, which Nav2's behaviour trees call
            node.create_service(
                Empty, "reinitialize_global_localization", self._reinitialize, qos_profile=qos.services()
            )

    def _request_reset(self, reason: str, response: Any) -> Any:
        stage = self._stage()
        if stage is None:
            return _answer(response, False, "The node is not configured, so there is nothing to reset.")
        stage.request_reset(reason)
        self._logger.info(f"Reset: {reason}.")
        off = self._switch.off_reason
        waits = f" once frames are processed again; now {off}" if off else " with the next image"
        return _answer(response, True, f"Reset{waits}.")

    def start_anew(self, forget: bool = False) -> str:
        """Reset the stage and return the reset's reason; empty if the node is not configured."""
        stage, reason = self._stage(), RESET if forget else RELOCALIZE
        if stage is None:
            return ""
        stage.request_reset(reason)
        self._logger.info(f"Reset: {reason}.")
        return reason

    def _reinitialize(self, request: Any, response: Any) -> Any:
        self.start_anew()
        return response

    def _enable(self, request: Any, response: Any) -> Any:
        stage = self._stage()
        if request.data and not self._switch.enabled and stage is not None:
            stage.request_reset("switched on again")
        self._switch.enabled = bool(request.data)
        if not request.data:
            return _answer(response, True, "Images are ignored until ~/enable is called with true.")
        off = self._switch.off_reason
        return _answer(response, True, f"Switched on, but {off}." if off else "Images are processed.")


def _answer(response: Any, success: bool, message: str) -> Any:
    response.success, response.message = success, message
    return response


def warm_up(scene_map: AnyMap, config: LocalizerConfig) -> None:
    """Run all steps in a temporary localizer; the process keeps what was loaded and compiled for them."""
    localizer_for(scene_map, config).warm_up()


def tell_runtime(health: Health, note: str) -> None:
    """Log which run-time computes the backbone, and why; ``status`` says it too."""
    health.runtime = note
    if note:
        health.inform(f"Backbone: {note}.")
