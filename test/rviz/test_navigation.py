# SPDX-License-Identifier: Apache-2.0
"""The configurations for Nav2, robot_localization and fuse agree with the nodes, with each other and with the tree."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from kfloc_ros.nodes.parameters import build_configs
from kfloc_ros.nodes.topic_table import TOPICS

FOLDER = Path(__file__).resolve().parents[2] / "config" / "navigation"
PUBLISHED = {topic.name: topic for topic in TOPICS}
CHI2_3_999 = 16.266

NAV2_NODES = {
    "BackUp", "ClearEntireCostmap", "ComputePathToPose", "FollowPath", "GoalCheckerSelector", "GoalUpdated",
    "PipelineSequence", "RateController", "RecoveryNode", "ReinitializeGlobalLocalization", "RoundRobin", "Spin",
    "Wait",
}  # fmt: skip
"""Of nav2_behavior_tree (its nav2_tree_nodes.xml)."""
BT_NODES = {
    "Fallback", "Inverter", "ReactiveFallback", "ReactiveSequence", "RetryUntilSuccessful", "ScriptCondition",
    "Sequence", "SubTree",
}  # fmt: skip
"""Of BehaviorTree.CPP 4."""
DECORATORS = {"Inverter", "RateController", "RetryUntilSuccessful"}


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tree() -> ElementTree.Element:
    return ElementTree.parse(FOLDER / "navigate_and_relocalize.xml").getroot()


def test_the_localizers_parameters_are_its_own() -> None:
    node, _ = build_configs(load("localizer.yaml")["/**"]["ros__parameters"])
    assert node.planar and node.tf_mode == "map_to_odom" and not node.autostart
    assert node.max_correction_m_s > 0.02 * 1.0, "more than the drift of a robot at 1 m/s"


def test_the_tree_is_made_of_nodes_that_there_are(tree: ElementTree.Element) -> None:
    trees = {item.get("ID"): item for item in tree.iter("BehaviorTree")}
    assert tree.get("main_tree_to_execute") in trees
    for item in trees.values():
        assert len(item) == 1
        for node in item.iter():
            assert node.tag in NAV2_NODES | BT_NODES | {"BehaviorTree"}, node.tag
            if node.tag in DECORATORS:
                assert len(node) == 1, f"{node.tag} has one child"
            if node.tag == "RecoveryNode":
                assert len(node) == 2, "what to do, and what to do if that fails"
            if node.tag == "SubTree":
                assert node.get("ID") in trees


def test_the_trees_condition_is_a_topic_of_the_localizer_and_its_states(tree: ElementTree.Element) -> None:
    selector, condition = next(tree.iter("GoalCheckerSelector")), next(tree.iter("ScriptCondition"))
    topic = PUBLISHED[str(selector.get("topic_name"))]
    assert topic.type == "std_msgs/msg/String" and topic.latched, "as the selector subscribes"
    name = str(selector.get("selected_goal_checker")).strip("{}")
    assert str(condition.get("code")).count(f"{name} == '") == 2
    assert {"TRACKING", "DEGRADED"} == set(str(condition.get("code")).split("'")[1::2])


def test_the_robot_turns_once_round_while_it_is_not_localized(tree: ElementTree.Element) -> None:
    look = next(item for item in tree.iter("RetryUntilSuccessful") if item.get("name") == "LookAround")
    spin = next(look.iter("Spin"))
    assert int(str(look.get("num_attempts"))) * float(str(spin.get("spin_dist"))) > 2 * np.pi


def test_frames_agree_everywhere() -> None:
    ours = load("localizer.yaml")["/**"]["ros__parameters"]
    nav2, ekf = load("nav2.yaml"), load("robot_localization.yaml")
    fuse = load("fuse.yaml")["state_estimator"]["ros__parameters"]["filtered"]
    assert nav2["bt_navigator"]["ros__parameters"]["robot_base_frame"] == ours["base_frame"]
    assert nav2["behavior_server"]["ros__parameters"]["global_frame"] == ours["odom_frame"]
    assert "localizer" in nav2["lifecycle_manager_localization"]["ros__parameters"]["node_names"]
    for filter_node in ekf.values():
        values = filter_node["ros__parameters"]
        assert (values["odom_frame"], values["base_link_frame"]) == (ours["odom_frame"], ours["base_frame"])
    assert (fuse["odom_frame_id"], fuse["base_link_frame_id"]) == (ours["odom_frame"], ours["base_frame"])
    assert fuse["world_frame_id"] == fuse["map_frame_id"] == "map"


def test_filters_take_the_pose_on_the_plane_and_gate_it() -> None:
    values = load("robot_localization.yaml")["ekf_filter_node_map"]["ros__parameters"]
    assert PUBLISHED[values["pose0"]].type == "geometry_msgs/msg/PoseWithCovarianceStamped"
    for key, config in values.items():
        if key.endswith("_config"):
            assert len(config) == 15, key
    assert [k for k, used in enumerate(values["pose0_config"]) if used] == [0, 1, 5]
    assert values["pose0_rejection_threshold"] ** 2 == pytest.approx(CHI2_3_999, rel=0.01)
    smoother = load("fuse.yaml")["state_estimator"]["ros__parameters"]
    localizer = smoother["localizer"]
    assert PUBLISHED[localizer["topic"]].type == "geometry_msgs/msg/PoseWithCovarianceStamped"
    models = {**smoother["motion_models"], **smoother["sensor_models"], **smoother["publishers"]}
    assert set(models) <= set(smoother), "every model has parameters"
    assert len(smoother["start"]["initial_sigma"]) == 8


def test_the_gate_lets_planar_poses_in_and_wrong_ones_not() -> None:
    """The Mahalanobis distance as robot_localization computes it, of poses that planar makes."""
    from kfloc_ros.geometry.covariance import planar_pose, yaw
    from kfloc_ros.geometry.lie import make_pose, so3_exp

    gate = load("robot_localization.yaml")["ekf_filter_node_map"]["ros__parameters"]["pose0_rejection_threshold"]
    rng, kept = np.random.default_rng(1), [0, 1, 5]
    sigma = np.array([0.01, 0.01, 0.01, 0.005, 0.005, 0.005])
    predicted = np.diag([0.01**2, 0.01**2, 0.01**2])
    passed = []
    for error in rng.normal(size=(2000, 6)) * sigma:
        planar = planar_pose(make_pose(so3_exp(error[3:]), error[:3]), np.diag(sigma**2))
        innovation = np.array([*planar.T_map_base[:2, 3], yaw(planar.T_map_base)])
        spread = planar.covariance[np.ix_(kept, kept)] + predicted
        passed.append(np.sqrt(innovation @ np.linalg.solve(spread, innovation)) <= gate)
        wrong = innovation + np.array([0.3, 0.0, 0.0])
        assert np.sqrt(wrong @ np.linalg.solve(spread, wrong)) > gate
    assert np.mean(passed) > 0.995


def test_gnss_joins_the_filter_that_has_the_poses() -> None:
    gnss, ekf = load("gnss.yaml"), load("robot_localization.yaml")
    filtered = "ekf_filter_node_map"
    added, values = gnss[filtered]["ros__parameters"], ekf[filtered]["ros__parameters"]
    assert not set(added) & set(values), "the file adds a source and changes none"
    assert added["odom1_config"] == [True, True] + 13 * [False]
    assert added["odom1_rejection_threshold"] == pytest.approx(np.sqrt(-2 * np.log(0.001)), abs=0.01)
    navsat = gnss["navsat_transform"]["ros__parameters"]
    assert navsat["use_odometry_yaw"] and navsat["wait_for_datum"] and len(navsat["datum"]) == 3
