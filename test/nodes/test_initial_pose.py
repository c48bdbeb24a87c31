# SPDX-License-Identifier: Apache-2.0
"""Initial poses: what is refused, how a flat one is completed, and where the search then begins."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, matrix_to_quaternion, rotation_angle_deg, so3_exp
from kfloc_ros.nodes.initial_pose import InitialPoseError, completed, nearest, read_initial_pose, spread


def message(T: Any, *, frame: str = "map", covariance: Any = None, scale: float = 1.0) -> Any:
    """As a PoseWithCovarianceStamped."""
    x, y, z, w = matrix_to_quaternion(T[:3, :3]) * scale
    pose = SimpleNamespace(
        position=SimpleNamespace(x=T[0, 3], y=T[1, 3], z=T[2, 3]), orientation=SimpleNamespace(x=x, y=y, z=z, w=w)
    )
    values = np.zeros(36) if covariance is None else np.asarray(covariance, dtype=float).reshape(-1)
    return SimpleNamespace(
        header=SimpleNamespace(frame_id=frame, stamp=SimpleNamespace(sec=3, nanosec=5)),
        pose=SimpleNamespace(pose=pose, covariance=list(values)),
    )


def yaw(angle: float) -> Any:
    return so3_exp([0, 0, angle])


def test_a_sound_pose_is_read_as_it_is() -> None:
    T = make_pose(so3_exp([0.1, 0.2, 0.3]), [1, 2, 3])
    given = read_initial_pose(message(T, frame="/map", covariance=0.25 * np.eye(6)))
    assert np.allclose(given.T_frame_base, T) and given.frame_id == "map" and given.stamp_ns == 3_000_000_005
    assert not given.is_flat
    assert read_initial_pose(message(make_pose(yaw(2.0), [1, 2, 0]))).is_flat


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"frame": ""}, "no frame_id"),
        ({"T": make_pose(np.eye(3), [math.nan, 0, 0])}, "finite"),
        ({"scale": 0.0}, "norm 0"),
        ({"scale": 1.5}, "norm 1.5"),
        ({"scale": math.nan}, "norm nan"),
        ({"covariance": np.full(36, math.inf)}, "covariance"),
        ({"covariance": -np.eye(6)}, "covariance"),
    ],
)
def test_nonsense_is_refused_in_words(changes: dict[str, Any], said: str) -> None:
    T = changes.pop("T", np.eye(4))
    with pytest.raises(InitialPoseError, match=said):
        read_initial_pose(message(T, **changes))


def test_a_flat_pose_gets_height_and_tilt_of_the_last_one_and_keeps_what_was_drawn() -> None:
    tilt = so3_exp([0.2, -0.1, 0.0])
    known = make_pose(yaw(0.4) @ tilt, [9, 9, 0.7])
    pose = completed(make_pose(yaw(2.5), [1, 2, 0]), known)
    assert np.allclose(pose[:3, 3], [1, 2, 0.7])
    assert math.atan2(pose[1, 0], pose[0, 0]) == pytest.approx(2.5)
    assert np.allclose(pose[2, :3], known[2, :3]), "the same tilt against the vertical"


def test_without_a_last_one_the_nearest_view_that_looks_the_same_way_serves() -> None:
    views = np.stack([make_pose(yaw(a), [x, 0, 1]) for x, a in ((0, 0), (0.2, np.pi), (5, 0))])
    assert np.allclose(nearest(make_pose(yaw(-np.pi + 0.1), [0, 0, 0]), views), views[1])
    assert np.allclose(nearest(make_pose(yaw(0.1), [4, 0, 0]), views), views[2])


def test_the_search_begins_at_the_pose_and_covers_its_uncertainty() -> None:
    T = make_pose(so3_exp([0.5, 0.1, 0.3]), [1, 2, 3])
    assert len(spread(T, np.zeros((6, 6)))) == 1
    starts = spread(T, np.diag([0.25, 0.04, 0, 0, 0, 0.01]))
    assert len(starts) == 27 and np.allclose(starts[0], T)
    away = np.array([start[:3, 3] - T[:3, 3] for start in starts])
    assert np.abs(away).max(axis=0) == pytest.approx([0.5, 0.2, 0.0])
    turned = max(rotation_angle_deg(T[:3, :3].T @ start[:3, :3]) for start in starts)
    assert turned == pytest.approx(math.degrees(0.1))
    boundless = spread(T, 1e6 * np.eye(6))
    assert max(np.linalg.norm(start[:3, 3] - T[:3, 3]) for start in boundless) < 2.0
