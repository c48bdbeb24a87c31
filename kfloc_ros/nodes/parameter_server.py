# SPDX-License-Identifier: Apache-2.0
"""Parameter server: declares the parameter table on a node and applies live changes to the configurations."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from kfloc_ros.errors import KflocError
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.nodes.parameters import Change, NodeConfig, Parameter, build_configs, parameter_table

_OF_RCLPY = ("use_sim_time", "start_type_description_service")
_PREFIXES_OF_RCLPY = ("qos_overrides.",)
ConfigT = TypeVar("ConfigT")


class ParameterServer:
    """Configuration of one node.

    The node must be made with ``automatically_declare_parameters_from_overrides``: otherwise rclpy ignores
    misspelt names silently.

    Args:
        check_reload: called before a change that needs a new stage is accepted; raises KflocError to refuse it.

    Raises:
        ConfigError: a given parameter is unknown or its value is invalid.
    """

    def __init__(
        self, node: Node, check_reload: Callable[[NodeConfig, LocalizerConfig], None] = lambda node, localizer: None
    ) -> None:
        given = {
            name: parameter.value
            for name, parameter in node.get_parameters_by_prefix("").items()
            if name not in _OF_RCLPY and not name.startswith(_PREFIXES_OF_RCLPY)
        }
        self.node, self.localizer = build_configs(given)
        self._check_reload = check_reload
        self._requested: queue.SimpleQueue[RosParameter] = queue.SimpleQueue()
        self._table = parameter_table()
        for name, row in self._table.items():
            value = row.option.check(given.get(name, row.option.default))
            if name in given:
                node.undeclare_parameter(name)
            node.declare_parameter(name, value, descriptor(row))
        node.add_on_set_parameters_callback(self._on_set)

    def request(self, name: str, value: Any) -> None:
        """Request a change of one of the node's own parameters at the executor's next turn. Thread-safe."""
        self._requested.put(RosParameter(name, value=value))

    def requested(self) -> Iterator[RosParameter]:
        """Yield the changes requested since the last call; executor thread only."""
        while not self._requested.empty():
            yield self._requested.get()

    def changes_to(self, node: NodeConfig, localizer: LocalizerConfig) -> list[RosParameter]:
        """Return the changes of parameters with a reload that lead back to former configurations."""
        changes = []
        for name, row in self._table.items():
            value = getattr(node if row.group is NodeConfig else localizer, name)
            if row.change is Change.RELOAD and self._differs(name, value):
                changes.append(RosParameter(name, value=value))
        return changes

    def _on_set(self, parameters: list[RosParameter]) -> SetParametersResult:
        changes: dict[str, Any] = {}
        try:
            for parameter in parameters:
                row = self._table.get(parameter.name)
                if row is None:  # one of rclpy's own
                    continue
                changes[parameter.name] = row.option.check(parameter.value)
            node = self._changed(self.node, changes)
            localizer = self._changed(self.localizer, changes)
            if any(
                self._table[name].change is Change.RELOAD and self._differs(name, changes[name]) for name in changes
            ):
                self._check_reload(node, localizer)
        except KflocError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.node, self.localizer = node, localizer
        return SetParametersResult(successful=True)

    def _changed(self, config: ConfigT, changes: Mapping[str, Any]) -> ConfigT:
        mine = {name: value for name, value in changes.items() if self._table[name].group is type(config)}
        return dataclasses.replace(config, **mine)  # type: ignore[type-var]

    def _differs(self, name: str, value: Any) -> bool:
        config = self.node if self._table[name].group is NodeConfig else self.localizer
        return bool(getattr(config, name) != value)


def descriptor(row: Parameter) -> ParameterDescriptor:
    """Return the ROS descriptor of one row of the table; the parameter's type follows from its default."""
    item = row.option
    message = ParameterDescriptor(name=item.name, description=item.text, read_only=row.change is Change.START)
    if item.choices:
        message.additional_constraints = f"One of: {', '.join(item.choices)}."
    if item.low is not None and item.high is not None:
        if item.kind is float:
            message.floating_point_range = [FloatingPointRange(from_value=float(item.low), to_value=float(item.high))]
        elif item.kind is int:
            message.integer_range = [IntegerRange(from_value=int(item.low), to_value=int(item.high), step=1)]
    return message
