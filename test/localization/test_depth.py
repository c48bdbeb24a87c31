# SPDX-License-Identifier: Apache-2.0
"""Depth of query images: corrects poses, refuses prints and places of another size, changes nothing where absent."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.depth import SCALE_SIGMA, DepthPairs, corrected
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState

TRUTH = make_pose(so3_exp([0.3, -0.2, 0.1]), [1.0, -2.0, 0.5])
Depth = NDArray[np.float32]


def plane(T: Matrix, seed: int, scale: float = 1.0) -> DepthPairs:
    """A plane 1.5 m before TRUTH, measured from there with noise and some gross errors, for the pose T."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-0.6, 0.6, 300), rng.uniform(-0.45, 0.45, 300)
    P = np.stack([x, y, 1.5 + 0.1 * x], axis=1)
    points = P @ TRUTH[:3, :3].T + TRUTH[:3, 3]
    depth = scale * P[:, 2] + rng.normal(0.0, 0.01, 300)
    depth[rng.random(300) < 0.1] += 0.8
    known = (points - T[:3, 3]) @ T[:3, 2]
    return DepthPairs(points, depth, np.full(300, 0.02), np.log(depth / known))


@pytest.mark.parametrize("seed", range(4))
def test_depth_corrects_distance_and_tilt_which_a_plane_leaves_open(seed: int) -> None:
    rng = np.random.default_rng(seed)
    covariance = np.diag([0.1**2] * 3 + [0.05**2] * 3)
    error = rng.normal(size=6) * np.sqrt(np.diag(covariance))
    T = make_pose(so3_exp(error[3:]) @ TRUTH[:3, :3], TRUTH[:3, 3] + error[:3])
    better, smaller = corrected(T, covariance, plane(T, seed))
    normal = TRUTH[:3, :3] @ np.array([-0.1, 0.0, 1.0]) / np.hypot(1.0, 0.1)

    def along(pose: Matrix) -> float:
        """Error along the normal at the middle of the plane."""
        e = pose_tangent_error(pose, TRUTH)
        return float(normal @ (e[:3] + np.cross(e[3:], TRUTH[:3, :3] @ [0.0, 0.0, 1.5])))

    assert abs(along(better)) < 3 * 1.5 * SCALE_SIGMA
    assert np.linalg.eigvalsh(covariance - smaller).min() > -1e-12, "a measurement never takes away"
    assert normal @ smaller[:3, :3] @ normal < 0.25 * 0.1**2
    left = pose_tangent_error(better, TRUTH)
    assert left @ np.linalg.solve(smaller, left) < 22.5, "chi-square, 6 degrees of freedom, 99.9 %"


def test_a_common_factor_of_a_percent_moves_no_pose_that_the_image_knows() -> None:
    known = np.diag([0.003**2] * 3 + [0.002**2] * 3)
    T, _ = corrected(TRUTH, known, plane(TRUTH, 0, scale=1.02))
    assert np.linalg.norm(T[:3, 3] - TRUTH[:3, 3]) < 0.003


def test_what_a_depth_says_against_a_pose_is_a_sentence() -> None:
    pairs = plane(TRUTH, 0)
    assert pairs.contradiction == "" and pairs.scale_fault == ""
    larger = plane(TRUTH, 0, scale=1.12)
    assert larger.contradiction == "" and "1.12 times as far away" in larger.scale_fault
    assert "100 % of the points" in plane(TRUTH, 0, scale=1.6).contradiction
    for unit, factor in ((1000.0, r"(99\d|100\d)"), (5.0, r"(4.9\d|5.0\d)"), (0.2, "0.20")):
        said = plane(TRUTH, 0, scale=unit).contradiction
        assert re.search(f" {factor} times that in the map: the unit of the depth", said)
    few = DepthPairs(pairs.points[:9], 3 * pairs.depth_m[:9], pairs.sigma_m[:9], pairs.log_ratio[:9] + np.log(3))
    assert few.contradiction == "" and few.scale_fault == ""


def noisy(depth_m: Depth, seed: int) -> Depth:
    """As a structured-light camera sees it: noise, a common factor, holes."""
    rng = np.random.default_rng(seed)
    depth = depth_m * (1 + rng.normal(0, 0.005)) + rng.normal(size=depth_m.shape) * (0.005 + 0.004 * depth_m**2)
    depth[cv2.GaussianBlur(rng.normal(size=depth_m.shape), (0, 0), 6) > 0.07] = 0
    return depth.astype(np.float32)


@pytest.fixture(scope="module")
def localize(room: Any, room_map: Path) -> Callable[..., PoseEstimate]:
    """Localizes frames of the room, each for itself."""
    scene_map = SceneMap.load(room_map)
    localizers = {
        use: Localizer(scene_map, LocalizerConfig(device="cpu", use_depth=use, max_repeat_s=0.0))
        for use in (False, True)
    }

    def run(frame: Frame, *, use: bool = True) -> PoseEstimate:
        localizers[use].reset("each frame for itself")
        return localizers[use].process(frame).estimate

    return run


def test_without_depth_nothing_changes(localize: Callable[..., PoseEstimate], room: Any) -> None:
    frame = replace(room[3], depth_m=None)
    off, on = localize(frame, use=False), localize(frame, use=True)
    assert np.array_equal(off.T_map_camera, on.T_map_camera) and np.array_equal(off.covariance, on.covariance)
    unused = localize(replace(room[3], depth_m=room[3].depth_m * 3), use=False)
    assert np.array_equal(off.T_map_camera, unused.T_map_camera)


def test_good_depth_keeps_a_good_pose(localize: Callable[..., PoseEstimate], room: Any) -> None:
    for k in (0, 12, 24):
        estimate = localize(replace(room[k], depth_m=noisy(room[k].depth_m, k)))
        assert estimate.state is TrackingState.TRACKING, estimate.reason
        error = pose_tangent_error(estimate.T_map_camera, room[k].T_map_camera)
        assert np.linalg.norm(error[:3]) < 0.03
        assert error @ np.linalg.solve(estimate.covariance, error) < 40.0


def test_a_print_of_the_room_is_refused(localize: Callable[..., PoseEstimate], room: Any) -> None:
    """It hangs before the camera, at 0.9 m: the image is the room's, and flat."""
    frame = room[3]
    assert localize(frame, use=False).state is TrackingState.TRACKING, "the image alone cannot tell"
    estimate = localize(replace(frame, depth_m=noisy(np.full_like(frame.depth_m, 0.9), 0)))
    assert estimate.T_map_camera is None and estimate.state is not TrackingState.TRACKING
    assert "the depth contradicts the map" in estimate.reason


def test_a_place_of_another_size_is_said(localize: Callable[..., PoseEstimate], room: Any) -> None:
    estimate = localize(replace(room[3], depth_m=np.float32(1.12) * room[3].depth_m))
    assert estimate.state is TrackingState.DEGRADED and "times as far away as in the map" in estimate.reason
    plain = localize(room[3], use=False)
    assert np.trace(estimate.covariance) > 4 * np.trace(plain.covariance)


def test_a_person_before_the_camera_does_not_count(localize: Callable[..., PoseEstimate], room: Any) -> None:
    image, depth = room[3].image.copy(), noisy(room[3].depth_m, 1)
    image[60:, 100:220], depth[60:, 100:220] = (90, 70, 60), 0.6
    estimate = localize(replace(room[3], image=image, depth_m=depth))
    assert estimate.T_map_camera is not None and "depth" not in estimate.reason


def test_depth_of_another_size_is_refused(localize: Callable[..., PoseEstimate], room: Any) -> None:
    with pytest.raises(FrameError, match="registered to the image"):
        localize(replace(room[3], depth_m=room[3].depth_m[::2, ::2]))


def test_holes_are_no_evidence(localize: Callable[..., PoseEstimate], room: Any) -> None:
    frame = replace(room[3], depth_m=np.zeros_like(room[3].depth_m))
    assert np.array_equal(localize(frame).T_map_camera, localize(frame, use=False).T_map_camera)
    broken = replace(room[3], depth_m=np.full_like(room[3].depth_m, np.nan))
    assert np.array_equal(localize(broken).T_map_camera, localize(frame).T_map_camera)
