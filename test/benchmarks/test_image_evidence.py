# SPDX-License-Identifier: Apache-2.0
"""The bundle adjustment of the benchmark: it finds the poses of its matches, and stays where there are none."""

from __future__ import annotations

import numpy as np
import pytest
from image_evidence import Pair, adjusted, epipolar_px, nearest

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp

CAMERA = Camera(640, 480, 500.0, 500.0, 320.0, 240.0)
MAPPED = [make_pose(np.eye(3), [x, 0.0, 0.0]) for x in (-0.3, 0.3)]
TRUE = {k: make_pose(so3_exp(np.array([0.0, 0.05 * k, 0.02])), [0.1 * k, 0.05, 0.1]) for k in range(3)}


def seen(points: np.ndarray, T: Matrix) -> np.ndarray:
    local = (points - T[:3, 3]) @ T[:3, :3]
    return local[:, :2] / local[:, 2:] * (CAMERA.fx, CAMERA.fy) + (CAMERA.cx, CAMERA.cy)


@pytest.fixture
def pairs() -> list[Pair]:
    """Matches of 60 points: with the mapped images, of which one has depth, and between the frames."""
    points = np.random.default_rng(0).uniform((-1.0, -0.8, 2.0), (1.0, 0.8, 4.0), size=(60, 3))
    unknown = np.full_like(points, np.nan)
    at = {k: seen(points, T) for k, T in TRUE.items()}
    found = []
    for k in TRUE:
        for m, T in enumerate(MAPPED):
            found.append(Pair(k, m, True, at[k], seen(points, T), points if m else unknown))
        found += [Pair(k, j, False, at[k], at[j], unknown) for j in range(k)]
    return found


def test_matches_lie_on_their_epipolar_lines_at_the_true_poses(pairs) -> None:
    for pair in pairs:
        T_other = MAPPED[pair.other] if pair.mapped else TRUE[pair.other]
        assert np.abs(epipolar_px(pair, TRUE[pair.frame], T_other, CAMERA)).max() < 1e-6
        assert (
            np.abs(epipolar_px(pair, TRUE[pair.frame] @ make_pose(np.eye(3), [0, 0.1, 0]), T_other, CAMERA)).max() > 1.0
        )


def test_poses_are_those_that_the_matches_tell(pairs) -> None:
    off = make_pose(so3_exp(np.array([0.01, -0.01, 0.0])), [0.03, -0.02, 0.02])
    found = adjusted({k: T @ off for k, T in TRUE.items()}, pairs, MAPPED, CAMERA)
    for k, T in TRUE.items():
        assert np.allclose(found[k], T, atol=1e-3)


def test_a_frame_without_matches_stays(pairs) -> None:
    found = adjusted(TRUE, [p for p in pairs if 2 not in (p.frame, p.other if not p.mapped else 0)], MAPPED, CAMERA)
    assert np.allclose(found[2], TRUE[2])


def test_images_too_far_away_are_not_matched() -> None:
    poses = [make_pose(np.eye(3), [x, 0.0, 0.0]) for x in (0.0, 0.5, 3.0)]
    poses.append(make_pose(so3_exp(np.array([0.0, 1.2, 0.0])), [0.0, 0.0, 0.0]))
    assert nearest(np.eye(4), poses, range(4), 5) == [0, 1]
    assert nearest(np.eye(4), poses, range(1, 4), 1) == [1]
