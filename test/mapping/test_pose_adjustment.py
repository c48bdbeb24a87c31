# SPDX-License-Identifier: Apache-2.0
"""Tests of the adjustment of poses to images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.mapping.pose_adjustment import AdjustedPoses, RelativePose, adjust_poses, solve_graph
from kfloc_ros.mapping.views import map_camera


def tangent(scale_m: float, scale_rad: float, rng: np.random.Generator) -> np.ndarray:
    return make_pose(so3_exp(rng.normal(0, scale_rad, 3)), rng.normal(0, scale_m, 3))


def relative_errors(poses: np.ndarray, truth: np.ndarray) -> np.ndarray:
    errors = []
    for a in range(len(poses)):
        for b in range(a):
            E = inverse_pose(inverse_pose(truth[b]) @ truth[a]) @ inverse_pose(poses[b]) @ poses[a]
            errors.append((np.linalg.norm(E[:3, 3]), rotation_angle_deg(E[:3, :3])))
    return np.median(errors, axis=0)


@pytest.mark.parametrize("wrong_pairs", [0, 6])
def test_graph_recovers_relative_poses_and_ignores_wrong_pairs(wrong_pairs: int) -> None:
    rng = np.random.default_rng(0)
    truth = np.array([make_pose(so3_exp(np.array([0, 0.2 * k, 0])), [0.1 * k, 0, 0.05 * k]) for k in range(12)])
    given = np.array([T @ tangent(0.01, 0.015, rng) for T in truth])
    information = np.diag([1 / 0.002**2] * 3 + [1 / 0.002**2] * 3)
    pairs = [
        RelativePose(a, b, inverse_pose(truth[b]) @ truth[a], information)
        for a in range(12)
        for b in range(a)
        if a - b < 4 or (a + b) % 5 == 0
    ]
    for _ in range(wrong_pairs):
        a, b = rng.choice(12, 2, replace=False)
        pairs.append(
            RelativePose(int(a), int(b), inverse_pose(truth[b]) @ truth[a] @ tangent(0.2, 0.2, rng), information)
        )
    adjusted = solve_graph(given, pairs)
    before, after = relative_errors(given, truth), relative_errors(adjusted, truth)
    assert (after < 0.1 * before).all()
    assert np.allclose(adjusted.mean(axis=0)[:3, 3], given.mean(axis=0)[:3, 3], atol=0.01)  # the given frame stays


@pytest.mark.thorough
def test_drifted_poses_of_a_walk_become_consistent() -> None:
    from kfloc_ros.datasets import open_source

    source = open_source("sim:map")
    walk = AdjustedPoses(source, np.array([source.pose(p) for p in range(len(source))]))
    chosen = range(0, len(source), max(1, len(source) // 60))
    truth = np.array([source.pose(p) for p in chosen])
    drift = [
        make_pose(so3_exp(np.array([0.0, 0.03 * np.sin(k / 9), 0.0])), np.array([0.02 * np.cos(k / 7), 0, 0]))
        for k in range(len(source))
    ]
    drifted = AdjustedPoses(walk, np.array([source.pose(p) @ d for p, d in enumerate(drift)]))
    adjustment = adjust_poses(drifted, map_camera(source.camera), Backbone(device=torch.device("cpu")))
    assert adjustment is not None
    before = relative_errors(np.array([drifted.pose(p) for p in chosen]), truth)
    after = relative_errors(adjustment.T_map_camera[list(chosen)], truth)
    assert (after < 0.5 * before).all()
    assert adjustment.after[1] < adjustment.before[1]
