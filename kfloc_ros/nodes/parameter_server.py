# SPDX-License-Identifier: Apache-2.0
"""Declares the parameter table on a node and keeps the configurations in step with live changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor, SetParametersResult
from rclpy.node import Node
from rclpy.parameter import Parameter as RosParameter

from kfloc_ros.errors import ConfigError
from kfloc_ros.nodes.parameters import Parameter, build_configs, parameter_table

_OF_RCLPY = ("use_sim_time", "start_type_description_service")
_PREFIXES_OF_RCLPY = ("qos_overrides.",)


class ParameterServer:
    """The configuration of one node.

    The node must have been made with ``automatically_declare_parameters_from_overrides``: only so are
    misspelt names seen, which rclpy otherwise passes over in silence.

    Raises:
        ConfigError: a given parameter is unknown or its value does not fit.
    """

    def __init__(self, node: Node) -> None:
        given = {
            name: parameter.value
            for name, parameter in node.get_parameters_by_prefix("").items()
            if name not in _OF_RCLPY and not name.startswith(_PREFIXES_OF_RCLPY)
        }
        self.node, self.localizer = build_configs(given)
        self._table = parameter_table()
        for name, row in self._table.items():
            value = row.option.check(given.get(name, row.option.default))
            if name in given:
                node.undeclare_parameter(name)
            node.declare_parameter(name, value, descriptor(row))
        node.add_on_set_parameters_callback(self._on_set)

    def _on_set(self, parameters: list[RosParameter]) -> SetParametersResult:
        changes: dict[str, Any] = {}
        for parameter in parameters:
            row = self._table.get(parameter.name)
            if row is None:  # one of rclpy's own
                continue
            if not row.live:
                reason = f"'{parameter.name}' is read when the node starts; set it there and restart the node."
                return SetParametersResult(successful=False, reason=reason)
            try:
                changes[parameter.name] = row.option.check(parameter.value)
            except ConfigError as error:
                return SetParametersResult(successful=False, reason=str(error))
        self.node = dataclasses.replace(self.node, **changes)
        return SetParametersResult(successful=True)


def descriptor(row: Parameter) -> ParameterDescriptor:
    """The ROS description of one row of the table; the parameter's type follows from its default."""
    item = row.option
    message = ParameterDescriptor(name=item.name, description=item.text, read_only=not row.live)
    if item.choices:
        message.additional_constraints = f"One of: {', '.join(item.choices)}."
    if item.low is not None and item.high is not None:
        if item.kind is float:
            message.floating_point_range = [FloatingPointRange(from_value=float(item.low), to_value=float(item.high))]
        elif item.kind is int:
            message.integer_range = [IntegerRange(from_value=int(item.low), to_value=int(item.high), step=1)]
    return message
