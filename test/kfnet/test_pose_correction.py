# SPDX-License-Identifier: Apache-2.0
"""A refined pose corrects the belief: what it fixes, what it leaves, and when it must not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.device import torch_only
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.kfnet.filter import SceneCoordinateFilter, onto_rays
from kfloc_ros.kfnet.fusion import FilterSettings
from kfloc_ros.kfnet.pnp import PnpSettings, solve_pnp
from kfloc_ros.types import SceneCoordinates

H, W, STRIDE = 18, 24, 8
CAMERA = Camera(width=W * STRIDE, height=H * STRIDE, fx=180.0, fy=185.0, cx=95.0, cy=71.0)
POSE = make_pose(so3_exp([0.2, -0.4, 0.1]), [3.0, -1.0, 0.5])
FRAME_NS = 66_000_000
SETTINGS = FilterSettings(flow_temperature=0.02, process_scale=1.0, process_floor_m2=1e-6)


def seen_from(T_map_camera: np.ndarray, depth_m: torch.Tensor) -> SceneCoordinates:
    """True coordinates of a camera that sees every cell's surface at a depth."""
    u = (torch.arange(W) * STRIDE + (STRIDE - 1) / 2 - CAMERA.cx) / CAMERA.fx
    v = (torch.arange(H) * STRIDE + (STRIDE - 1) / 2 - CAMERA.cy) / CAMERA.fy
    rays = torch.stack([u.expand(H, W), v[:, None].expand(H, W), torch.ones(H, W)]) * depth_m
    R, t = torch.from_numpy(T_map_camera[:3, :3]).float(), torch.from_numpy(T_map_camera[:3, 3]).float()
    mean = torch.einsum("ik,khw->ihw", R, rays) + t[:, None, None]
    return SceneCoordinates(mean, torch.full((H, W), 0.2**2), torch.ones(H, W, dtype=torch.bool), STRIDE)


def depth() -> torch.Tensor:
    return 2.0 + torch.rand(H, W, generator=torch.Generator().manual_seed(3))


def features() -> torch.Tensor:
    return F.normalize(torch.randn(64, H, W, generator=torch.Generator().manual_seed(0)), dim=0)


def test_what_a_pose_shows_in_its_place_stays() -> None:
    truth = seen_from(POSE, depth())
    corrected = onto_rays(truth, CAMERA, POSE)
    assert torch.allclose(corrected.mean, truth.mean, atol=1e-5)
    assert corrected.valid.all()
    assert torch.equal(corrected.variance, truth.variance)


def test_points_go_onto_their_rays_and_keep_their_depth() -> None:
    noise = 0.1 * torch.randn(3, H, W, generator=torch.Generator().manual_seed(5))
    truth = seen_from(POSE, depth())
    corrected = onto_rays(replace(truth, mean=truth.mean + noise), CAMERA, POSE)
    along = torch.einsum("k,khw->hw", torch.from_numpy(POSE[:3, 2]).float(), noise)
    assert torch.allclose(corrected.mean, seen_from(POSE, depth() + along).mean, atol=1e-5)


def test_points_behind_the_camera_are_dropped() -> None:
    z = depth()
    z[3, 4] = -1.0
    corrected = onto_rays(seen_from(POSE, z), CAMERA, POSE)
    assert not corrected.valid[3, 4]
    assert int(corrected.valid.sum()) == H * W - 1


def test_the_compiled_correction_agrees_with_torch() -> None:
    noise = 0.1 * torch.randn(3, H, W, generator=torch.Generator().manual_seed(6))
    belief = seen_from(POSE, depth())
    belief = replace(belief, mean=belief.mean + noise, valid=noise[0] > -0.1)
    compiled = onto_rays(belief, CAMERA, POSE)
    with torch_only():
        expected = onto_rays(belief, CAMERA, POSE)
    assert torch.allclose(compiled.mean, expected.mean, atol=1e-6)
    assert torch.equal(compiled.valid, expected.valid) and not compiled.valid.all()


def test_an_error_that_all_cells_share_is_not_averaged_away_but_corrected() -> None:
    """A head that puts everything 0.3 m aside: its poses are as wrong however long it is filtered."""
    wrong = POSE.copy()
    wrong[0, 3] += 0.3
    errors: dict[bool, float] = {}
    for learns in (False, True):
        recursion = SceneCoordinateFilter(SETTINGS)
        for k in range(6):
            coarse = solve_pnp(
                recursion.step(k * FRAME_NS, features(), seen_from(wrong, depth())).posterior, CAMERA, PnpSettings()
            )
            recursion.accept_pose(coarse)
            assert coarse.T_map_camera is not None
            if learns:
                recursion.correct_belief(k * FRAME_NS, CAMERA, POSE)
        errors[learns] = float(np.linalg.norm(coarse.T_map_camera[:3, 3] - POSE[:3, 3]))
    assert errors[False] == pytest.approx(0.3, abs=0.02)
    assert errors[True] < 0.15


def begun() -> SceneCoordinateFilter:
    """After one frame with a coarse pose."""
    recursion = SceneCoordinateFilter(SETTINGS)
    posterior = recursion.step(0, features(), seen_from(POSE, depth())).posterior
    recursion.accept_pose(solve_pnp(posterior, CAMERA, PnpSettings()))
    return recursion


def test_a_confirmed_belief_ends_if_no_refined_pose_follows() -> None:
    recursion = begun()
    recursion.correct_belief(0, CAMERA, POSE)
    last_ns = int(SETTINGS.max_gap_s * 1e9 // FRAME_NS) * FRAME_NS
    for stamp_ns in range(FRAME_NS, last_ns + 1, FRAME_NS):
        step = recursion.step(stamp_ns, features(), seen_from(POSE, depth()))
        assert step.report.confirmed and not step.report.reset_reason
    step = recursion.step(last_ns + FRAME_NS, features(), seen_from(POSE, depth()))
    assert "no refined pose for 0.5" in step.report.reset_reason
    assert not step.report.confirmed
    again = recursion.step(last_ns + 2 * FRAME_NS, features(), seen_from(POSE, depth()))
    assert not again.report.reset_reason and not again.report.confirmed


def test_a_refined_pose_may_come_two_frames_late_and_counts_once() -> None:
    """A head 0.3 m aside, a moving camera, answers of a refiner in another process: no worse than in time."""
    errors: dict[int, list[float]] = {0: [], 2: []}
    for late, seen in errors.items():
        recursion, poses = SceneCoordinateFilter(SETTINGS), []
        for k in range(16):
            here, wrong = POSE.copy(), POSE.copy()
            here[0, 3] += 0.01 * k
            wrong[0, 3] += 0.01 * k + 0.3
            poses.append(here)
            coarse = solve_pnp(
                recursion.step(k * FRAME_NS, features(), seen_from(wrong, depth())).posterior, CAMERA, PnpSettings()
            )
            recursion.accept_pose(coarse)
            assert coarse.T_map_camera is not None
            seen.append(float(coarse.T_map_camera[0, 3] - here[0, 3]))
            if k >= late:
                recursion.correct_belief((k - late) * FRAME_NS, CAMERA, poses[k - late])
    assert max(np.abs(errors[0][6:])) < 0.15
    assert max(np.abs(errors[2][6:])) < 0.2
    assert np.ptp(errors[2][6:]) < 0.05  # and it does not swing


def test_a_confirmed_belief_claims_less_variance_once_and_not_ever_less() -> None:
    variances: dict[bool, torch.Tensor] = {}
    for learns in (False, True):
        recursion = begun()
        for k in range(1, 8):
            if learns:
                recursion.correct_belief((k - 1) * FRAME_NS, CAMERA, POSE)
            step = recursion.step(k * FRAME_NS, features(), seen_from(POSE, depth()))
            recursion.accept_pose(solve_pnp(step.posterior, CAMERA, PnpSettings()))
        variances[learns] = step.posterior.variance
    assert torch.allclose(variances[True], SETTINGS.confirmed_variance_scale * variances[False], rtol=1e-3)


@pytest.mark.parametrize("learns", [True, False])
def test_what_refined_poses_confirm_outlives_bad_pictures(learns: bool) -> None:
    """A lens covered for five frames, whose cells are sure of nonsense."""
    recursion = begun()
    elsewhere = POSE.copy()
    elsewhere[0, 3] += 5.0
    nonsense = replace(seen_from(elsewhere, depth()), variance=torch.full((H, W), 0.01**2))
    for k in range(1, 6):
        step = recursion.step(k * FRAME_NS, features(), nonsense)
        recursion.accept_pose(solve_pnp(step.posterior, CAMERA, PnpSettings()))
        if learns:
            recursion.correct_belief(k * FRAME_NS, CAMERA, POSE)
    off_m = (step.posterior.mean - seen_from(POSE, depth()).mean).norm(dim=0).median()
    assert off_m < 0.05 if learns else off_m > 1.0


@pytest.mark.parametrize("stamp_ns", [1, FRAME_NS, -FRAME_NS])
def test_a_pose_of_an_unknown_frame_teaches_nothing(stamp_ns: int) -> None:
    recursion = begun()
    recursion.correct_belief(stamp_ns, CAMERA, POSE)
    assert not recursion.step(FRAME_NS, features(), seen_from(POSE, depth())).report.confirmed


def test_what_was_found_before_a_reset_teaches_nothing() -> None:
    recursion = begun()
    recursion.reset("asked for")
    recursion.correct_belief(0, CAMERA, POSE)
    assert recursion.step(FRAME_NS, features(), seen_from(POSE, depth())).report.reset_reason == "asked for"
    recursion.correct_belief(0, CAMERA, POSE)
    assert not recursion.step(2 * FRAME_NS, features(), seen_from(POSE, depth())).report.confirmed


def test_a_pose_found_elsewhere_drops_the_belief() -> None:
    recursion = begun()
    elsewhere = POSE.copy()
    elsewhere[0, 3] += 2.0
    recursion.correct_belief(0, CAMERA, elsewhere)
    step = recursion.step(FRAME_NS, features(), seen_from(elsewhere, depth()))
    assert "at another place" in step.report.reset_reason
    assert torch.equal(step.posterior.mean, seen_from(elsewhere, depth()).mean)
