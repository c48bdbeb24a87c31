# SPDX-License-Identifier: Apache-2.0
"""Poses and covariances: messages there and back, and the move to another frame of the same body."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp, so3_log
from kfloc_ros.messages.poses import (
    BodyPose,
    fill_pose,
    fill_pose_with_covariance,
    fill_stamp,
    pose_from_message,
    stamp_to_ns,
)


def pose_message() -> SimpleNamespace:
    return SimpleNamespace(position=SimpleNamespace(), orientation=SimpleNamespace())


def random_pose(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return make_pose(so3_exp(rng.normal(size=3)), rng.normal(size=3))


@pytest.mark.parametrize("seed", range(5))
def test_pose_there_and_back(seed: int) -> None:
    T = random_pose(seed)
    message = pose_message()
    fill_pose(message, T)
    assert np.allclose(pose_from_message(message), T, atol=1e-12)


@pytest.mark.parametrize("stamp_ns", [0, 1, 999_999_999, 1_000_000_000, 1_700_000_000_123_456_789])
def test_stamp_there_and_back(stamp_ns: int) -> None:
    stamp = SimpleNamespace()
    fill_stamp(stamp, stamp_ns)
    assert stamp_to_ns(stamp) == stamp_ns and 0 <= stamp.nanosec < 1_000_000_000


def test_covariance_of_a_moved_frame_is_that_of_moved_samples() -> None:
    rng = np.random.default_rng(3)
    T, T_body_other = random_pose(1), random_pose(2)
    root = rng.normal(size=(6, 6)) * 1e-3
    pose = BodyPose(T, root @ root.T)
    moved = pose.moved(T_body_other)
    assert np.allclose(moved.T_map_body, T @ T_body_other)

    errors = []
    for _ in range(20_000):
        d = root @ rng.normal(size=6)
        sample = make_pose(so3_exp(d[3:]) @ T[:3, :3], T[:3, 3] + d[:3]) @ T_body_other
        turned = so3_log(sample[:3, :3] @ moved.T_map_body[:3, :3].T)
        errors.append(np.concatenate([sample[:3, 3] - moved.T_map_body[:3, 3], turned]))
    sampled = np.cov(np.array(errors).T)
    assert np.abs(sampled - moved.covariance).max() < 0.05 * np.abs(moved.covariance).max()


def test_moving_there_and_back_changes_nothing() -> None:
    T_body_other = random_pose(7)
    root = np.random.default_rng(0).normal(size=(6, 6))
    pose = BodyPose(random_pose(6), root @ root.T)
    back = pose.moved(T_body_other).moved(np.linalg.inv(T_body_other))
    assert np.allclose(back.T_map_body, pose.T_map_body) and np.allclose(back.covariance, pose.covariance)


def test_the_message_is_symmetric_and_may_be_diagonal() -> None:
    root = np.random.default_rng(0).normal(size=(6, 6))
    pose = BodyPose(random_pose(0), root @ root.T)
    message = SimpleNamespace(pose=pose_message())
    fill_pose_with_covariance(message, pose)
    assert np.allclose(np.reshape(message.covariance, (6, 6)), pose.covariance)
    fill_pose_with_covariance(message, pose, diagonal=True)
    assert np.allclose(np.reshape(message.covariance, (6, 6)), np.diag(np.diagonal(pose.covariance)))


@pytest.mark.parametrize(("place", "value"), [((0, 3), np.nan), ((1, 1), np.inf)])
def test_a_pose_that_is_not_finite_has_a_fault(place: tuple[int, int], value: float) -> None:
    T = np.eye(4)
    T[place] = value
    assert BodyPose(T, np.eye(6)).fault()
    assert BodyPose(np.eye(4), np.zeros((6, 6))).fault(), "zero variances claim a certainty that nobody has"
    assert not BodyPose(np.eye(4), np.eye(6)).fault()


def test_a_quaternion_without_length_is_refused() -> None:
    message = pose_message()
    fill_pose(message, np.eye(4))
    message.orientation.w = 0.0
    with pytest.raises(ValueError, match="quaternion"):
        pose_from_message(message)
