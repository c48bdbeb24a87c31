# SPDX-License-Identifier: Apache-2.0
"""The topics for eyes over real DDS: they come only where somebody subscribes, and show what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.clouds import read_cloud
from kfloc_ros.messages.images import decode_image
from kfloc_ros.nodes.topic_table import REPLAY, TOPICS, published_by

pytestmark = pytest.mark.ros

HALF_ROOM_M = np.array([2.2, 1.4, 1.8])
"""As in the room of helpers/textured_room.py."""
PICTURES = ("flow_image", "noise_image", "overlay")


def message_class(name: str) -> Any:
    package, _, kind = name.split("/")
    module = __import__(f"{package}.msg", fromlist=[kind])
    return getattr(module, kind)


@pytest.fixture(scope="module")
def world(new_world: Callable[[], Any], room_map: Path) -> Any:
    world = new_world()
    world.start_localizer(f"map:={room_map}")
    return world


@pytest.fixture(scope="module")
def seen(world: Any, room: Any) -> dict[str, list[Any]]:
    """What came on every topic that only comes when asked for, after some frames in a row."""
    from kfloc_ros.nodes import qos

    seen: dict[str, list[Any]] = {}
    for topic in TOPICS:
        if topic.name in ("map_points", "reference_views", "scene_coordinates", *PICTURES):
            seen[topic.name] = []
            profile = qos.latched() if topic.latched else qos.results()
            world.harness.node.create_subscription(
                message_class(topic.type), topic.name, seen[topic.name].append, profile
            )
    for k in range(4, 16):
        world.harness.localize(room[k])
        if all(seen.values()):
            break
        world.harness.spin(0.1)
    world.harness.wait(lambda: all(seen.values()), must=False)
    assert [name for name, messages in seen.items() if not messages] == []
    return seen


def test_the_node_publishes_the_table_and_nothing_else(world: Any) -> None:
    own = {"/parameter_events", "/rosout", "/localizer/transition_event"}
    own |= {f"/localizer/localize/_action/{name}" for name in ("feedback", "status")}
    found = dict(world.harness.node.get_publisher_names_and_types_by_node("localizer", "/"))
    expected = {f"/{topic.name.lstrip('/')}": [topic.type] for topic in published_by("localizer").values()}
    del expected["/odometry/map"]  # only with rate_hz
    assert {name: kinds for name, kinds in found.items() if name not in own} == expected
    assert all(topic.publishers == (REPLAY,) or "localizer" in topic.publishers for topic in TOPICS)


def test_map_points_are_the_maps_and_come_once(world: Any, seen: dict[str, list[Any]], room_map: Path) -> None:
    message = seen["map_points"][0]
    assert message.header.frame_id == "map" and message.height == 1
    cloud = read_cloud(message)
    known = SceneMap.load(room_map)
    assert cloud.points.shape[1] == sum(len(view) for view in known.references.views)
    assert (np.abs(cloud.points) < HALF_ROOM_M + 0.05).all()
    assert len(np.unique(cloud.colours.reshape(-1, 3), axis=0)) > 20
    assert len(seen["map_points"]) == 1

    from kfloc_ros.nodes import qos

    late: list[Any] = []
    subscription = world.harness.node.create_subscription(type(message), "map_points", late.append, qos.latched())
    world.harness.wait(lambda: bool(late))  # who comes late gets it, too
    world.harness.node.destroy_subscription(subscription)


def test_reference_views_are_cameras_inside_the_room(seen: dict[str, list[Any]], room_map: Path) -> None:
    (marker,) = seen["reference_views"][0].markers
    assert marker.header.frame_id == "map" and marker.type == marker.LINE_LIST
    ends = np.array([[p.x, p.y, p.z] for p in marker.points]).reshape(-1, 8, 2, 3)
    known = SceneMap.load(room_map).references.T_map_camera
    assert np.allclose(ends[:, 0, 0], known[:, :3, 3])
    assert marker.color.a > 0 and marker.scale.x > 0


def test_scene_coordinates_are_organised_and_lie_on_the_walls(seen: dict[str, list[Any]], room: Any) -> None:
    message = seen["scene_coordinates"][-1]
    camera = room.camera
    assert (message.height, message.width) == (camera.height // 8, camera.width // 8)
    assert message.header.frame_id == "map" and message.header.stamp.sec > 0
    cloud = read_cloud(message)
    assert cloud.sigma_m is not None
    sure = cloud.sigma_m < np.nanmedian(cloud.sigma_m)
    points = cloud.points[sure]
    assert (np.abs(points) < HALF_ROOM_M + 0.2).all(axis=1).mean() > 0.95
    to_wall = (HALF_ROOM_M - np.abs(points)).min(axis=1)
    assert np.median(np.abs(to_wall)) < 0.1
    assert cloud.colours.std() > 10


def test_pictures_show_something(seen: dict[str, list[Any]], room: Any) -> None:
    for name in PICTURES:
        picture = decode_image(seen[name][-1])
        assert picture.std() > 5, name
        assert seen[name][-1].header.frame_id == "camera"
    overlay = decode_image(seen["overlay"][-1])
    assert overlay.shape == (room.camera.height, room.camera.width, 3)
    strong = overlay.max(axis=2).astype(int) - overlay.min(axis=2) > 150
    assert 0.005 < strong[30:].mean() < 0.5  # points in the colours of the palette


@pytest.mark.slow
def test_three_nodes_publish_what_the_table_says_of_each(
    new_world: Callable[[], Any], room: Any, room_map: Path
) -> None:
    world = new_world()
    nodes = ("camera_node", "filter_node", "refiner_node")
    for name in nodes:
        world.start(name, f"map:={room_map}", "rate_hz:=10.0")  # for odometry/map
    world.wait_ready()
    node = world.harness.node
    hand_over = ("/frame/", "/coarse_status", "/refined_pose", "/parameter_events", "/rosout")

    def missing() -> list[str]:
        if not set(nodes) <= set(node.get_node_names()):
            return ["not all of the nodes are there"]
        found = {
            (name, topic, *kinds)
            for name in nodes
            for topic, kinds in node.get_publisher_names_and_types_by_node(name, "/")
            if not topic.startswith(hand_over) and not topic.endswith("/transition_event")
        }
        expected = {
            (name, f"/{topic.name.lstrip('/')}", topic.type) for name in nodes for topic in published_by(name).values()
        }
        return sorted(map(str, expected ^ found))

    world.harness.wait(lambda: not missing(), 90.0, must=False)
    assert missing() == []
    seen: dict[str, list[Any]] = {"scene_coordinates": [], "overlay": []}
    for topic in TOPICS:
        if topic.name in seen:
            node.create_subscription(message_class(topic.type), topic.name, seen[topic.name].append, 10)
    for k in range(4, 16):
        world.harness.localize(room[k])
        world.harness.spin(0.3)
        if all(seen.values()):
            break
    assert read_cloud(seen["scene_coordinates"][-1]).points.shape[:2] == (
        room.camera.height // 8,
        room.camera.width // 8,
    )
    assert decode_image(seen["overlay"][-1]).std() > 5
