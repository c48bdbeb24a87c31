# SPDX-License-Identifier: Apache-2.0
"""Transform buffers: tf2's own where it is installed, and the one that stands in for it, by the same tests."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.messages.poses import BodyPose
from kfloc_ros.messages.transforms import (
    NEWEST,
    TransformStore,
    TransformTimeError,
    TransformTree,
    TransformUnknownError,
)
from kfloc_ros.nodes.pose_publisher import LastPose
from kfloc_ros.replay.processes import free_domain

S = 1_000_000_000


def tf2_buffer() -> TransformStore:
    from kfloc_ros.nodes.transforms import Tf2Buffer

    return Tf2Buffer(10.0)


@pytest.fixture(params=["own", "tf2"])
def store(request: pytest.FixtureRequest) -> TransformStore:
    if request.param == "own":
        return TransformTree(10.0)
    if importlib.util.find_spec("tf2_ros") is None:
        pytest.skip("tf2_ros comes only with a ROS 2 installation")
    return tf2_buffer()


def pose(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return make_pose(so3_exp(rng.normal(size=3)), rng.normal(size=3))


@pytest.fixture
def tree(store: TransformStore) -> TransformStore:
    store.set("base", "mast", 0, pose(1), static=True)
    store.set("mast", "camera", 0, pose(2), static=True)
    store.set("base", "/imu", 0, pose(3), static=True)
    store.set("elsewhere", "lamp", 0, pose(4), static=True)
    return store


def moving(store: TransformStore, *seconds: float) -> None:
    for second in seconds:
        T = make_pose(so3_exp([0, 0, 0.1 * second]), [second, 0, 0])
        store.set("odom", "base", int(second * S), T)


def test_up_down_and_across(tree: TransformStore) -> None:
    assert np.allclose(tree.lookup("base", "camera", NEWEST), pose(1) @ pose(2))
    assert np.allclose(tree.lookup("camera", "base", 5 * S), np.linalg.inv(pose(1) @ pose(2)))
    assert np.allclose(tree.lookup("imu", "camera", NEWEST), np.linalg.inv(pose(3)) @ pose(1) @ pose(2))
    assert np.allclose(tree.lookup("camera", "camera", NEWEST), np.eye(4))


def test_unconnected_frames_are_refused_and_the_known_ones_named(tree: TransformStore) -> None:
    with pytest.raises(TransformUnknownError, match="base, camera, elsewhere, imu, lamp, mast"):
        tree.lookup("camera", "lamp", NEWEST)


def test_an_empty_buffer_says_so() -> None:
    with pytest.raises(TransformUnknownError, match="Known frames: none"):
        TransformTree().lookup("camera", "base", NEWEST)


def test_between_two_times_is_interpolated_through_static_mounts(tree: TransformStore) -> None:
    moving(tree, 10.0, 12.0)
    T = tree.lookup("odom", "camera", 11 * S) @ np.linalg.inv(pose(1) @ pose(2))
    assert np.allclose(T[:3, 3], [11, 0, 0], atol=1e-6)
    assert rotation_angle_deg(T[:3, :3]) == pytest.approx(np.degrees(1.1), abs=1e-3)


def test_nothing_is_extrapolated_and_waiting_is_offered_only_where_it_can_help(tree: TransformStore) -> None:
    moving(tree, 10.0, 11.0)
    with pytest.raises(TransformTimeError) as later:
        tree.lookup("odom", "camera", 11 * S + 1_000_000)
    with pytest.raises(TransformTimeError) as earlier:
        tree.lookup("odom", "camera", 9 * S)
    assert later.value.ahead and not earlier.value.ahead
    assert np.allclose(tree.lookup("odom", "base", NEWEST)[:3, 3], [11, 0, 0])


def test_out_of_order_transforms_are_sorted_in(store: TransformStore) -> None:
    moving(store, 10.0, 12.0, 11.0)
    assert np.allclose(store.lookup("odom", "base", int(11.5 * S))[:3, 3], [11.5, 0, 0], atol=1e-6)


def test_the_past_is_forgotten_and_what_is_older_ignored(store: TransformStore) -> None:
    moving(store, *range(100))
    moving(store, 50.0)
    assert np.allclose(store.lookup("odom", "base", 95 * S)[:3, 3], [95, 0, 0], atol=1e-6)
    with pytest.raises(TransformTimeError):
        store.lookup("odom", "base", 60 * S)


def test_a_flood_of_transforms_costs_the_same_for_each(tree: TransformStore) -> None:
    T = np.eye(4)
    start = time.process_time()
    for k in range(50_000):
        tree.set("odom", "base", 10 * S + k * 100_000, T)
    assert time.process_time() - start < 5.0, "copying what is kept for each would take minutes"
    assert np.allclose(tree.lookup("odom", "base", 14 * S), T)


def test_recorded_transforms_have_gaps_and_a_root() -> None:
    tree = TransformTree(max_gap_s=0.2, near_s=0.02)
    tree.set("base", "camera", 0, pose(2), static=True)
    moving(tree, 10.0, 10.1, 11.0)
    assert tree.find("odom", "camera", int(10.05 * S)) is not None
    assert tree.find("odom", "camera", int(10.5 * S)) is None, "nothing is interpolated over a gap"
    assert tree.find("odom", "camera", int(11.01 * S)) is not None, "a pose this near in time counts"
    assert tree.root("camera") == "odom" and tree.parent("camera") == "base" and tree.parent("odom") is None
    assert tree.moves("camera", "odom") and not tree.moves("camera", "base") and not tree.moves("camera", "nowhere")
    assert np.allclose(tree.fixed("base", "camera"), pose(2)) and tree.fixed("odom", "camera") is None
    tree.set("camera", "odom", 10 * S, pose(3))
    with pytest.raises(SourceError, match="circle"):
        tree.root("camera")


def test_after_a_jump_back_in_time_a_cleared_buffer_starts_anew_and_keeps_static_ones(tree: TransformStore) -> None:
    moving(tree, 500.0, 501.0)
    tree.clear()
    with pytest.raises(TransformUnknownError):
        tree.lookup("odom", "base", 500 * S)
    assert np.allclose(tree.lookup("base", "camera", NEWEST), pose(1) @ pose(2))
    moving(tree, 3.0, 4.0)
    assert np.allclose(tree.lookup("odom", "base", int(3.5 * S))[:3, 3], [3.5, 0, 0], atol=1e-6)


def test_a_frame_has_one_parent_the_last(store: TransformStore) -> None:
    store.set("a", "child", 0, pose(1), static=True)
    store.set("b", "child", 0, pose(2), static=True)
    assert np.allclose(store.lookup("b", "child", NEWEST), pose(2))


def test_a_loop_ends_in_words() -> None:
    buffer = TransformTree()
    buffer.set("a", "b", 0, pose(1), static=True)
    buffer.set("b", "a", 0, pose(2), static=True)
    with pytest.raises(TransformUnknownError):
        buffer.lookup("c", "a", NEWEST)


@pytest.mark.ros
def test_a_listener_notices_a_jump_back_without_a_clock_and_warns_of_nonsense(store: TransformStore) -> None:
    pytest.importorskip("rclpy", reason="rclpy is not installed: `make setup` brings it, or source ROS 2")
    import rclpy
    from rclpy.node import Node
    from tf2_msgs.msg import TFMessage

    from kfloc_ros.nodes.transforms import TransformListener, stamped

    context = rclpy.Context()
    rclpy.init(context=context, domain_id=free_domain(os.getpid()))
    node = Node("tf_test", context=context)
    said: list[str] = []
    try:
        listener = TransformListener(node, said.append, store)

        def hear(second: float, x: float) -> None:
            item = stamped("odom", "base", int(second * S), make_pose(np.eye(3), [x, 0, 0]))
            listener._add(TFMessage(transforms=[item]), static=False)

        hear(500.0, 1.0)
        hear(501.0, 2.0)
        hear(3.0, 3.0)  # the bag began again
        hear(4.0, 4.0)
        assert np.allclose(listener.lookup("odom", "base", int(3.5 * S))[:3, 3], [3.5, 0, 0])
        assert listener.parent("base") == "odom" and listener.parent("odom") is None
        hear(5.0, float("nan"))
        assert "cannot be used" in said[0]
        with pytest.raises(TransformTimeError):
            listener.lookup("odom", "base", 5 * S, wait_s=0.01)
    finally:
        node.destroy_node()
        context.try_shutdown()


def lookup_of(T: dict[tuple[str, str, int], Any]) -> Any:
    class Lookup:
        def lookup(self, target: str, source: str, stamp_ns: int, wait_s: float = 0.0) -> Any:
            try:
                return T[target, source, stamp_ns]
            except KeyError:
                raise TransformUnknownError("no") from None

    return Lookup()


def test_a_held_pose_moves_with_odometry_and_grows_unsure() -> None:
    held = LastPose(10 * S, "base", BodyPose(pose(1), 1e-4 * np.eye(6)))
    lookup = lookup_of({("base", "odom", 10 * S): np.linalg.inv(pose(2)), ("odom", "base", 12 * S): pose(3)})
    T_then_now = held.travelled(lookup, "odom", 12 * S)
    later = held.grown(12 * S, 0.5, T_then_now)
    assert np.allclose(later.T_map_body, pose(1) @ np.linalg.inv(pose(2)) @ pose(3))
    assert (np.sqrt(np.diagonal(later.covariance)) >= 1.0).all()
    assert held.travelled(lookup, "odom", 13 * S) is None
    much_later: Callable[[int], BodyPose] = lambda s: held.grown(s * S, 0.5)  # noqa: E731
    assert np.diagonal(much_later(10_000).covariance)[3:].max() < 10, "no rotation is more unknown than half a turn"
