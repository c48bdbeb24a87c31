# SPDX-License-Identifier: Apache-2.0
"""Table of all ROS parameters, from which declarations, ``config/localizer.yaml`` and the documentation are made.

``python -m kfloc_ros.nodes.parameters --yaml`` prints the file, ``--markdown`` the table. Needs no ROS.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kfloc_ros.config import Option, build_config, option, options_of
from kfloc_ros.errors import ConfigError
from kfloc_ros.localization.config import LocalizerConfig

MIN_RATE_HZ = 0.1
"""Lowest rate above 0 that a timer can have: its period has to fit into 64 bits of nanoseconds."""

MAX_CAMERAS = 8


@dataclass(frozen=True)
class NodeConfig:
    """Options of the nodes."""

    map: str = option("", "Map folder, or the name of a shipped map. Required.")
    autostart: bool = option(True, "Configure and activate the node at start; false: a lifecycle manager does both.")
    map_frame: str = option("", "TF frame of the map; empty: the frame in map.yaml.")
    base_frame: str = option(
        "",
        "TF frame whose pose is published; empty: the frame_id of the images. "
        "If it is another frame, /tf_static must connect the two.",
    )
    cameras: str = option(
        "",
        "Names of the cameras of a rig, separated by commas, with topics NAME/image and NAME/camera_info; needs "
        "base_frame. Empty: one camera.",
    )
    rig_window_s: float = option(
        0.05, "Images of a rig within this time are localized together, in seconds.", low=0.001, high=1.0, live=True
    )
    image_transport: str = option(
        "raw", "raw: sensor_msgs/Image on image; compressed: CompressedImage on image/compressed.",
        choices=("raw", "compressed"),
    )  # fmt: skip
    image_reliability: str = option(
        "best_effort", "Requested reliability of the image subscription; best_effort matches every publisher.",
        choices=("best_effort", "reliable"),
    )  # fmt: skip
    camera_info_reliability: str = option(
        "best_effort",
        "Requested reliability of the camera_info subscription; best_effort matches every publisher.",
        choices=("best_effort", "reliable"),
    )
    camera_info_durability: str = option(
        "volatile",
        "Requested durability of the camera_info subscription; volatile receives latched messages, too, and "
        "transient_local only these.",
        choices=("volatile", "transient_local"),
    )  # fmt: skip
    initialpose_reliability: str = option(
        "reliable", "Requested reliability of the initialpose subscription; best_effort matches every publisher.",
        choices=("best_effort", "reliable"),
    )  # fmt: skip
    tf_reliability: str = option(
        "reliable",
        "Requested reliability of the /tf subscription; best_effort matches every publisher, but may lose transforms.",
        choices=("best_effort", "reliable"),
    )  # fmt: skip
    rectified: bool = option(
        False, "The images are rectified: use P of camera_info without distortion, instead of K and D."
    )
    max_age_s: float = option(
        1.0, "Images older than this on the node's clock are dropped and counted, in seconds; 0: no limit.",
        low=0.0, high=3600.0, live=True,
    )  # fmt: skip
    tf_mode: str = option(
        "map_to_base",
        "Transform on /tf: map_to_odom (REP-105, with odometry), map_to_base (without odometry), or none.",
        choices=("map_to_odom", "map_to_base", "none"), live=True,
    )  # fmt: skip
    odom_frame: str = option(
        "odom", "TF frame of the odometry for tf_mode map_to_odom; the odometry must publish odom_frame -> base_frame.",
        live=True,
    )  # fmt: skip
    transform_tolerance: float = option(
        0.3,
        "map -> odom is stamped at least this long after the image, in seconds; longer if latency and period need it.",
        low=0.0, high=10.0, live=True,
    )  # fmt: skip
    transform_rate_hz: float = option(
        20.0,
        f"Rate at which the last map -> odom is sent again, in Hz, at least {MIN_RATE_HZ:g}; 0: only with a new pose.",
        low=0.0, high=200.0,
    )  # fmt: skip
    max_odom_jump: float = option(
        0.0,
        "Limit on the distance between a pose and its prediction by odometry, in metres (1 m counts as 30 degrees), "
        "for tf_mode map_to_odom; 0: no limit.",
        low=0.0, high=100.0, live=True,
    )  # fmt: skip
    max_correction_m_s: float = option(
        0.0,
        "Largest speed at which map -> odom moves the base to a new pose, in m/s; 0: it jumps, as after LOST.",
        low=0.0, high=100.0, live=True,
    )  # fmt: skip
    max_correction_deg_s: float = option(
        0.0, "The same for rotations, in deg/s; 0: no limit.", low=0.0, high=3600.0, live=True
    )
    planar: bool = option(
        False,
        "Project poses and map -> odom to the ground plane; a pose off it is DEGRADED. Needs base_frame.",
        live=True,
    )  # fmt: skip
    ground_height: float = option(
        0.0,
        "For planar: height of base_frame in the map, whose z axis points up, in metres.",
        low=-10000.0, high=10000.0, live=True,
    )  # fmt: skip
    rate_hz: float = option(
        0.0,
        f"Rate of odometry/map, the pose between images by odometry, in Hz, at least {MIN_RATE_HZ:g}; 0: off.",
        low=0.0, high=200.0,
    )  # fmt: skip
    use_imu: bool = option(False, "For odometry/map: turn by the angular rates on imu where odometry is late.")
    transform_timeout: float = option(
        0.1, "Time that a pose waits for the odometry at its image's stamp, in seconds.", low=0.0, high=2.0, live=True
    )
    when_lost: str = option(
        "hold",
        "While LOST: hold keeps sending the last map -> odom; stop stops; mark also publishes the last pose, with a "
        "growing covariance.",
        choices=("hold", "stop", "mark"), live=True,
    )  # fmt: skip
    lost_after_s: float = option(
        2.0, "For when_lost stop: time without a pose after which sending stops, even if no image arrives, in seconds.",
        low=0.1, high=3600.0, live=True,
    )  # fmt: skip
    lost_growth: float = option(
        0.5, "For when_lost mark: growth of the standard deviations, in m/s and rad/s.", low=0.0, high=100.0, live=True
    )
    diagonal_covariance: bool = option(
        False, "Publish only the variances: Nav2 refuses covariances with negative cross terms.", live=True
    )
    pose_file: str = option(
        "", "File in which the last pose is saved; the next start searches there first. Empty: no file."
    )
    pose_file_period_s: float = option(
        2.0, "Period at which the last pose is saved, in seconds.", low=0.1, high=3600.0, live=True
    )
    collect_dir: str = option(
        "",
        "Folder to which frames that the map lacks are written, with confirmed poses: a source for kfloc map update. "
        "Empty: none.",
    )
    collect_mb: float = option(500.0, "Limit on the size of collect_dir, in megabytes.", low=1.0, high=100_000.0)
    path_length: int = option(1000, "Number of poses in path; 0: no path.", low=0, high=100000, live=True)

    def __post_init__(self) -> None:
        for name in ("transform_rate_hz", "rate_hz"):
            if 0.0 < getattr(self, name) < MIN_RATE_HZ:
                raise ConfigError(f"'{name}' must be 0 or lie in [{MIN_RATE_HZ:g}, 200], got {getattr(self, name)!r}.")
        if self.planar and not self.base_frame:
            raise ConfigError(
                "'planar' needs 'base_frame', such as base_link: the frame of a camera does not stand upright."
            )
        names = self.camera_names
        if not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name) for name in names) or len(set(names)) < len(names):
            raise ConfigError(f"'cameras' must be different names of letters, digits and _, got {self.cameras!r}.")
        if len(names) > MAX_CAMERAS:
            raise ConfigError(f"'cameras' may have {MAX_CAMERAS} names, got {len(names)}.")
        if names and not self.base_frame:
            raise ConfigError("'cameras' needs 'base_frame', such as base_link: the pose is that of the rig's body.")
        for name in ("map_frame", "base_frame", "odom_frame"):
            if not getattr(self, name).isprintable():
                raise ConfigError(f"'{name}' must be a name in printable characters, got {getattr(self, name)!r}.")

    @property
    def camera_names(self) -> tuple[str, ...]:
        """Names of the cameras of a rig; none for a single camera."""
        return tuple(name.strip() for name in self.cameras.split(",")) if self.cameras.strip() else ()


CONFIG_TYPES: tuple[type, ...] = (NodeConfig, LocalizerConfig)
"""Option groups. Every node declares all of them, so that one file serves all nodes."""

START_ONLY = ("autostart",)


class Change(Enum):
    """Effect of setting a parameter on a running node."""

    LIVE = "at once"
    RELOAD = "reload"
    """The stage is built again within a few seconds, in the same lifecycle state."""
    START = "no"


@dataclass(frozen=True)
class Parameter:
    """Row of the table."""

    option: Option
    group: type

    @property
    def change(self) -> Change:
        if self.option.name in START_ONLY:
            return Change.START
        return Change.LIVE if self.option.live else Change.RELOAD


def parameter_table() -> dict[str, Parameter]:
    """Return all parameters by name."""
    return {item.name: Parameter(item, group) for group in CONFIG_TYPES for item in options_of(group)}


def build_configs(values: Mapping[str, Any]) -> tuple[NodeConfig, LocalizerConfig]:
    """Return both configurations from one flat mapping.

    Raises:
        ConfigError: a name is unknown or a value is invalid.
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
    """Return the text of ``config/localizer.yaml``: every parameter with its default."""
    lines = [
        "# SPDX-License-Identifier: Apache-2.0",
        "# All parameters of the nodes with their defaults. Made by: python -m kfloc_ros.nodes.parameters --yaml",
        "/**:",
        "  ros__parameters:",
    ]
    for row in parameter_table().values():
        note = "; ".join(part for part in (_range(row.option), f"change: {row.change.value}") if part)
        lines.append(f"    # {row.option.text}" + (f" ({note})" if note else ""))
        lines.append(f"    {row.option.name}: {_literal(row.option.default)}")
    return "\n".join(lines) + "\n"


def render_markdown() -> str:
    """Return the parameter table of ``docs/ros_interface.md``."""
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
    """Return a default as YAML."""
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
