# SPDX-License-Identifier: Apache-2.0
"""The one table of ROS parameters: what the nodes declare, ``config/localizer.yaml`` and the documentation.

``python -m kfloc_ros.nodes.parameters --yaml`` prints the file, ``--markdown`` the table. Needs no ROS.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kfloc_ros.config import Option, build_config, option, options_of
from kfloc_ros.errors import ConfigError
from kfloc_ros.localization.config import LocalizerConfig


@dataclass(frozen=True)
class NodeConfig:
    """Options of the ROS side."""

    map: str = option("", "Map folder, or the name of a shipped map. Must be given.")
    autostart: bool = option(True, "Configure and activate by itself; false leaves that to a lifecycle manager.")
    map_frame: str = option("", "TF frame of the map; empty: the name written in the map.")
    base_frame: str = option(
        "",
        "TF frame whose pose is published; empty: the frame_id of the images. "
        "If it is another frame, /tf_static must connect the two.",
    )
    image_transport: str = option(
        "raw", "raw: sensor_msgs/Image on image; compressed: CompressedImage on image/compressed.",
        choices=("raw", "compressed"),
    )  # fmt: skip
    image_reliability: str = option(
        "best_effort", "Reliability asked of the publisher of images; best_effort hears every publisher.",
        choices=("best_effort", "reliable"),
    )  # fmt: skip
    camera_info_reliability: str = option(
        "best_effort", "Reliability asked of the publisher of camera_info.", choices=("best_effort", "reliable")
    )
    camera_info_durability: str = option(
        "volatile",
        "Durability asked of the publisher of camera_info; transient_local for one that publishes only once.",
        choices=("volatile", "transient_local"),
    )  # fmt: skip
    initialpose_reliability: str = option(
        "reliable", "Reliability asked of the publisher of initialpose; best_effort hears every publisher.",
        choices=("best_effort", "reliable"),
    )  # fmt: skip
    tf_reliability: str = option(
        "reliable", "Reliability asked of the publishers of /tf; best_effort hears every one, and may miss transforms.",
        choices=("best_effort", "reliable"),
    )  # fmt: skip
    rectified: bool = option(
        False, "The images are rectified already: take P of camera_info and no distortion, instead of K and D."
    )
    max_age_s: float = option(
        1.0, "Images older than this on the node's clock are dropped and counted, in seconds; 0: never.",
        low=0.0, high=3600.0, live=True,
    )  # fmt: skip
    tf_mode: str = option(
        "map_to_base",
        "What is broadcast on /tf: map_to_odom (REP-105, beside odometry), map_to_base (without odometry), or none.",
        choices=("map_to_odom", "map_to_base", "none"), live=True,
    )  # fmt: skip
    odom_frame: str = option(
        "odom", "TF frame of the odometry, which must publish odom_frame -> base_frame; for tf_mode map_to_odom.",
        live=True,
    )  # fmt: skip
    transform_tolerance: float = option(
        0.3, "map -> odom is stamped this long after the image, in seconds, so that it is valid until the next one.",
        low=0.0, high=10.0, live=True,
    )  # fmt: skip
    transform_rate_hz: float = option(
        20.0, "How often the last map -> odom is sent again; 0: only with a new pose.", low=0.0, high=200.0
    )
    max_odom_jump: float = option(
        0.0,
        "With map_to_odom, a pose this far from where the odometry has carried the last one, in metres (30 degrees a "
        "metre), is DEGRADED and does not move the map until a second one agrees; 0: never.",
        low=0.0, high=100.0, live=True,
    )  # fmt: skip
    transform_timeout: float = option(
        0.1, "How long a pose waits for the odometry at its image's time, in seconds.", low=0.0, high=2.0, live=True
    )
    when_lost: str = option(
        "hold",
        "While lost: hold keeps sending the last map -> odom; stop does not, so that consumers notice; mark holds and "
        "publishes the held pose on pose with a covariance that grows.",
        choices=("hold", "stop", "mark"), live=True,
    )  # fmt: skip
    lost_after_s: float = option(
        2.0, "Without a pose for this long, in seconds, stop stops even if no image comes that says LOST.",
        low=0.1, high=3600.0, live=True,
    )  # fmt: skip
    lost_growth: float = option(
        0.5, "How fast the standard deviations of a marked pose grow, in m/s and rad/s.", low=0.0, high=100.0, live=True
    )
    diagonal_covariance: bool = option(
        False, "Publish only the variances: Nav2 refuses covariances with negative cross terms.", live=True
    )
    pose_file: str = option("", "File that the last pose is saved in and searched from at the next start; empty: none.")
    pose_file_period_s: float = option(
        2.0, "How often the last pose is saved, in seconds.", low=0.1, high=3600.0, live=True
    )
    path_length: int = option(1000, "How many of the last poses path holds; 0: no path.", low=0, high=100000, live=True)


CONFIG_TYPES: tuple[type, ...] = (NodeConfig, LocalizerConfig)
"""Every node declares the options of all of these, so that one file serves them all."""

START_ONLY = ("autostart",)


class Change(Enum):
    """What setting a parameter does to a running node."""

    LIVE = "at once"
    RELOAD = "reload"
    """The application is made anew, within a few seconds, without leaving the lifecycle state."""
    START = "no"


@dataclass(frozen=True)
class Parameter:
    """One row of the table."""

    option: Option
    group: type

    @property
    def change(self) -> Change:
        if self.option.name in START_ONLY:
            return Change.START
        return Change.LIVE if self.option.live else Change.RELOAD


def parameter_table() -> dict[str, Parameter]:
    """Every parameter by name."""
    return {item.name: Parameter(item, group) for group in CONFIG_TYPES for item in options_of(group)}


def build_configs(values: Mapping[str, Any]) -> tuple[NodeConfig, LocalizerConfig]:
    """Both configurations from one flat mapping.

    Raises:
        ConfigError: a name is unknown or a value does not fit.
    """
    table = parameter_table()
    unknown = [name for name in values if name not in table]
    if unknown:
        if unknown[0] in LocalizerConfig.FORMER:
            raise ConfigError(f"There is no parameter '{unknown[0]}' any more. {LocalizerConfig.FORMER[unknown[0]]}")
        near = difflib.get_close_matches(unknown[0], table, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(table)}."
        raise ConfigError(f"There is no parameter '{unknown[0]}'. {hint}")

    def of(group: type) -> dict[str, Any]:
        return {name: value for name, value in values.items() if table[name].group is group}

    return build_config(NodeConfig, of(NodeConfig)), build_config(LocalizerConfig, of(LocalizerConfig))


def render_yaml() -> str:
    """The text of ``config/localizer.yaml``: every parameter with its default."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# Every parameter of the nodes with its default. Made by: python -m kfloc_ros.nodes.parameters --yaml",
        "/**:",
        "  ros__parameters:",
    ]
    for row in parameter_table().values():
        note = "; ".join(part for part in (_range(row.option), f"change: {row.change.value}") if part)
        lines.append(f"    # {row.option.text}" + (f" ({note})" if note else ""))
        lines.append(f"    {row.option.name}: {_literal(row.option.default)}")
    return "\n".join(lines) + "\n"


def render_markdown() -> str:
    """The parameter table of ``docs/ros_interface.md``."""
    lines = ["| parameter | type | default | range | change | meaning |", "|---|---|---|---|---|---|"]
    for row in parameter_table().values():
        item = row.option
        cells = (
            f"`{item.name}`", item.kind.__name__, f"`{_literal(item.default)}`", _range(item),
            row.change.value, item.text.replace("|", "\\|"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(item: Option) -> str:
    if item.choices:
        return ", ".join(item.choices)
    if item.low is not None and item.high is not None:
        return f"{item.low:g} to {item.high:g}"
    if item.low is not None:
        return f"at least {item.low:g}"
    return "" if item.high is None else f"at most {item.high:g}"


def _literal(value: Any) -> str:
    """A default as YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the parameter file or the documentation table."""
    parser = argparse.ArgumentParser(prog="python -m kfloc_ros.nodes.parameters", description=__doc__)
    shape = parser.add_mutually_exclusive_group(required=True)
    shape.add_argument("--yaml", action="store_true", help="the text of config/localizer.yaml")
    shape.add_argument("--markdown", action="store_true", help="the table in docs/ros_interface.md")
    args = parser.parse_args(argv)
    sys.stdout.write(render_yaml() if args.yaml else render_markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
