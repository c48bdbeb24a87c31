# SPDX-License-Identifier: Apache-2.0
"""Table of all published topics, on which the documentation, RViz's configuration and Foxglove's layout agree.

``python -m kfloc_ros.nodes.topic_table`` prints the table in ``docs/ros_interface.md``. Needs no ROS.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

LOCALIZER, CAMERA, FILTER, REFINER = "localizer", "camera_node", "filter_node", "refiner_node"
REPLAY = "kfloc replay"

WATCHED = "while subscribed, as time allows"
ONCE = "once, at the first subscription, and latched"


@dataclass(frozen=True)
class Topic:
    """Published topic."""

    name: str
    """A relative name moves with the node's namespace."""
    type: str
    publishers: tuple[str, ...]
    when: str
    latched: bool = False
    """Transient local: late subscribers receive the last message."""


TOPICS: tuple[Topic, ...] = (
    Topic(
        "pose", "geometry_msgs/msg/PoseWithCovarianceStamped", (LOCALIZER, REFINER),
        "for every frame that has a pose; stamp of the image, in `map_frame`",
    ),
    Topic("/tf", "tf2_msgs/msg/TFMessage", (LOCALIZER, REFINER), "as set by `tf_mode`; see [Transforms](#transforms)"),
    Topic(
        "odometry/map", "nav_msgs/msg/Odometry", (LOCALIZER, REFINER),
        "with `rate_hz`, at that rate: the last pose carried on by odometry, with a growing covariance",
    ),
    Topic(
        "path", "nav_msgs/msg/Path", (LOCALIZER, REFINER),
        "while subscribed, with a new pose but at most twice a second; the last `path_length` poses",
    ),
    Topic(
        "status", "diagnostic_msgs/msg/DiagnosticArray", (LOCALIZER, REFINER),
        "for every processed frame, also without a pose; stamp of the image",
    ),
    Topic(
        "localization_state", "std_msgs/msg/String", (LOCALIZER, REFINER),
        "at every change, and latched: the state, `NO_IMAGES`, or `OFF` while inactive", latched=True,
    ),
    Topic(
        "coarse_pose", "geometry_msgs/msg/PoseWithCovarianceStamped", (LOCALIZER, FILTER),
        "for every frame that has a coarse pose; always the pose of the camera's optical frame",
    ),
    Topic(
        "/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", (LOCALIZER, CAMERA, FILTER, REFINER),
        "once a second, by each node",
    ),
    Topic(
        "map_points", "sensor_msgs/msg/PointCloud2", (LOCALIZER, REFINER),
        f"{ONCE}: x, y, z, rgb of the map's reference points, coloured by height", latched=True,
    ),
    Topic(
        "reference_views", "visualization_msgs/msg/MarkerArray", (LOCALIZER, REFINER),
        f"{ONCE}: a camera symbol for every reference view of the map", latched=True,
    ),
    Topic(
        "scene_coordinates", "sensor_msgs/msg/PointCloud2", (LOCALIZER, FILTER),
        f"{WATCHED}: filtered scene coordinates, organised like the image's cells; x, y, z, rgb of the image, sigma "
        "in metres",
    ),
    Topic(
        "flow_image", "sensor_msgs/msg/Image", (LOCALIZER, FILTER),
        f"{WATCHED}: optical flow to the previous frame, direction as hue; grey where the flow is uncertain",
    ),
    Topic(
        "noise_image", "sensor_msgs/msg/Image", (LOCALIZER, FILTER),
        f"{WATCHED}: standard deviations of measurement, process and posterior side by side",
    ),
    Topic(
        "overlay", "sensor_msgs/msg/Image", (LOCALIZER, REFINER),
        f"{WATCHED}: the image with the map's points projected by the pose; blue: they match, red: they do not",
    ),
    Topic(
        "ground_truth/path", "nav_msgs/msg/Path", (REPLAY,),
        "while subscribed, at most twice a second: the true path up to the replayed time",
    ),
)  # fmt: skip


def published_by(executable: str) -> dict[str, Topic]:
    """Return the topics of one executable, by name."""
    return {topic.name: topic for topic in TOPICS if executable in topic.publishers}


def short_type(name: str) -> str:
    """Return ``sensor_msgs/Image`` for ``sensor_msgs/msg/Image``."""
    return name.replace("/msg/", "/")


def render_markdown() -> str:
    """Return the table of ``docs/ros_interface.md``."""
    lines = ["| topic | type | from | when |", "|---|---|---|---|"]
    for topic in TOPICS:
        # "localizer" publishes all topics of the three nodes
        names = [name for name in topic.publishers if name != LOCALIZER] or list(topic.publishers)
        publishers = "all" if len(names) == 3 else ", ".join(f"`{name}`" for name in names)
        lines.append(f"| `{topic.name}` | `{short_type(topic.type)}` | {publishers} | {topic.when} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
