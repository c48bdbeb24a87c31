# SPDX-License-Identifier: Apache-2.0
"""The recursion: it helps when it should, and lets go when it must."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.filter import SceneCoordinateFilter, onto_rays
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.fusion import FilterSettings, NisMode, Prior, fuse, warp
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.types import CoarsePose, SceneCoordinates

H, W = 16, 24
SETTINGS = FilterSettings(flow_temperature=0.02, process_scale=1.0, process_floor_m2=1e-6)
FRAME_NS = 33_000_000


def plane(noise_m: float, seed: int, sigma_m: float = 0.1, shift_m: float = 0.0) -> SceneCoordinates:
    """A wall seen head-on, 2 cm a cell, with measurement noise."""
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    mean = torch.stack([0.02 * x, 0.02 * y, torch.full_like(x, 2.0, dtype=torch.float32)]) + shift_m
    generator = torch.Generator().manual_seed(seed)
    noisy = mean + noise_m * torch.randn(3, H, W, generator=generator)
    return SceneCoordinates(noisy, torch.full((H, W), sigma_m**2), torch.ones(H, W, dtype=torch.bool), 8)


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(64, H, W, generator=generator), dim=0)


def test_static_view_is_averaged() -> None:
    recursion = SceneCoordinateFilter(replace(SETTINGS, error_correlation=0.0, nis_mode=NisMode.LOWER_VARIANCE))
    truth = plane(0.0, 0).mean
    for k in range(8):
        last = recursion.step(k * FRAME_NS, features(), plane(0.1, k))
    before = (plane(0.1, 7).mean - truth).pow(2).mean().sqrt()
    after = (last.posterior.mean - truth).pow(2).mean().sqrt()
    assert after < 0.65 * before  # above the ideal 0.35: the 5 % of cells that fail the NIS test start anew
    assert last.report.prior_ratio > 0.9
    assert last.report.nis_mean == pytest.approx(3.0, abs=1.0)
    assert (last.posterior.variance <= 0.1**2).all()


def test_a_flow_that_was_begun_before_the_measurement_is_taken_for_its_frame_alone() -> None:
    plain, early = SceneCoordinateFilter(SETTINGS), SceneCoordinateFilter(SETTINGS)
    assert early.begin_flow(0, features())() is None  # nothing to begin with
    for k in range(4):
        early.begin_flow((k + (k == 3)) * FRAME_NS, features())()
        a, b = (recursion.step(k * FRAME_NS, features(), plane(0.1, k)) for recursion in (plain, early))
        assert torch.equal(a.posterior.mean, b.posterior.mean) and a.report == b.report


def still(process_m2: float, *, at_edge: bool = False) -> Flow:
    """No motion anywhere, with a process variance of its own."""
    everywhere = torch.ones(H, W, dtype=torch.bool)
    variance = torch.full((H, W), process_m2)
    return Flow(torch.zeros(2, H, W), torch.ones(H, W), everywhere, everywhere & at_edge, variance)


def wall(x_m: float, sigma_m: float) -> SceneCoordinates:
    mean = torch.zeros(3, H, W)
    mean[0] = x_m
    return SceneCoordinates(mean, torch.full((H, W), sigma_m**2), torch.ones(H, W, dtype=torch.bool), 8)


@pytest.mark.parametrize(("nis_test", "emitted"), [(False, 1.68), (True, 2.0)])
def test_the_published_recursion_is_the_papers_equations(nis_test: bool, emitted: float) -> None:
    """Closed forms; neither contradiction, nor the window's border, nor a missing pose makes it start anew."""
    settings = FilterSettings.published(nis_test=nis_test)
    recursion = SceneCoordinateFilter(settings, lambda now, before: still(0.03**2, at_edge=True))
    recursion.step(0, features(), wall(1.0, 0.05))
    recursion.accept_pose(CoarsePose(False, None, None, 0, 0.0, "no cells"))
    agreeing = SceneCoordinateFilter(settings, lambda now, before: still(0.03**2))
    agreeing.step(0, features(), wall(1.0, 0.05))
    step = agreeing.step(FRAME_NS, features(), wall(1.1, 0.04))
    assert step.posterior.mean[0].mean().item() == pytest.approx(1.068, abs=1e-6)
    assert step.posterior.variance.mean().item() == pytest.approx(0.001088, abs=1e-8)
    step = recursion.step(FRAME_NS, features(), wall(2.0, 0.04))  # the NIS is 200
    assert step.report.reset_reason == "" and step.report.rejected_ratio == 1.0
    assert step.posterior.mean[0].mean().item() == pytest.approx(emitted, abs=1e-5)
    assert step.posterior.variance.mean().item() == pytest.approx(0.001088, abs=1e-8)
    # the belief stays fused, whatever the output: P = 0.001088 + 0.0009, K = 0.554069
    step = recursion.step(2 * FRAME_NS, features(), wall(1.70, 0.04))
    assert step.posterior.mean[0].mean().item() == pytest.approx(1.68 + 0.554069 * 0.02, abs=1e-5)
    again = recursion.step(2 * FRAME_NS + 600_000_000, features(), wall(1.0, 0.04))
    assert "no frame for" in again.report.reset_reason


def test_first_frame_is_the_measurement() -> None:
    measurement = plane(0.1, 0)
    first = SceneCoordinateFilter(SETTINGS).step(0, features(), measurement)
    assert first.posterior is measurement
    assert first.report.reset_reason == "first frame"
    assert math.isnan(first.report.nis_mean)


@pytest.mark.parametrize(
    ("stamp_ns", "reason"), [(-1, "backwards"), (0, "backwards"), (2_000_000_000, "no frame for 2.00 s")]
)
def test_time_gaps_and_backward_time_reset(stamp_ns: int, reason: str) -> None:
    recursion = SceneCoordinateFilter(SETTINGS)
    recursion.step(0, features(), plane(0.1, 0))
    measurement = plane(0.1, 1)
    again = recursion.step(stamp_ns, features(), measurement)
    assert reason in again.report.reset_reason
    assert again.posterior is measurement


def test_a_contradicting_measurement_resets_the_recursion() -> None:
    """Kidnapping: the same picture, but the head says another place."""
    recursion = SceneCoordinateFilter(SETTINGS)
    recursion.step(0, features(), plane(0.02, 0))
    elsewhere = plane(0.02, 1, shift_m=5.0)
    step = recursion.step(FRAME_NS, features(), elsewhere)
    assert step.report.rejected_ratio == 1.0
    step = recursion.step(2 * FRAME_NS, features(), elsewhere)
    assert "contradicts" in step.report.reset_reason
    assert step.posterior is elsewhere


def test_one_contradicting_picture_is_outlived() -> None:
    """A blurred frame whose cells are far off, even with certainty, does not cost the belief."""
    recursion = SceneCoordinateFilter(SETTINGS)
    recursion.step(0, features(), plane(0.02, 0))
    blurred = recursion.step(FRAME_NS, features(), plane(0.02, 1, sigma_m=0.02, shift_m=5.0))
    assert blurred.report.reset_reason == ""
    truth = plane(0.0, 0).mean
    inner = (..., slice(2, -2), slice(2, -2))
    assert (blurred.posterior.mean - truth)[inner].abs().mean() < 0.05
    good = recursion.step(2 * FRAME_NS, features(), plane(0.02, 2))
    assert good.report.rejected_ratio < 0.1
    assert (good.posterior.mean - truth)[inner].abs().mean() < 0.05


def test_single_bad_cells_are_dropped_not_blended() -> None:
    recursion = SceneCoordinateFilter(SETTINGS)
    recursion.step(0, features(), plane(0.02, 0))
    measurement = plane(0.02, 1)
    measurement.mean[:, 5, 5] += 3.0
    step = recursion.step(FRAME_NS, features(), measurement)
    assert torch.equal(step.posterior.mean[:, 5, 5], measurement.mean[:, 5, 5])
    assert step.report.rejected_ratio < 0.2


def test_warp_follows_the_flow_and_masks_what_came_from_outside() -> None:
    belief = plane(0.0, 0, sigma_m=0.05)
    flow = Flow(torch.zeros(2, H, W), torch.full((H, W), 0.02), torch.ones(H, W, dtype=torch.bool))
    flow.offset[0] += 1.5
    prior = warp(belief, flow, process_scale=1.0, process_floor_m2=0.0)
    assert torch.allclose(prior.mean[0, :, :-2], belief.mean[0, :, :-2] + 0.03, atol=1e-5)
    assert (prior.variance >= 0.05**2).all()
    hole = SceneCoordinates(belief.mean, belief.variance, belief.valid.clone(), 8)
    hole.valid[4, 4] = False
    masked = warp(hole, flow, process_scale=1.0, process_floor_m2=0.0).valid
    assert not masked[4, 3]
    assert not masked[4, 2]
    assert masked[4, 5]


def test_a_depth_edge_adds_process_noise() -> None:
    belief = plane(0.0, 0, sigma_m=0.01)
    belief.mean[2, :, W // 2 :] += 1.0
    flow = Flow(torch.zeros(2, H, W), torch.full((H, W), 0.02), torch.ones(H, W, dtype=torch.bool))
    flow.offset[0] += 0.5
    prior = warp(belief, flow, process_scale=1.0, process_floor_m2=0.0)
    assert prior.variance[:, W // 2 - 1].min() > 50 * prior.variance[:, 2].max()


def edge_flow(share: float) -> Flow:
    """No motion; a share of the cells, from the left, at the border of the search window."""
    at_edge = torch.zeros(H, W, dtype=torch.bool)
    at_edge[:, : round(share * W)] = True
    return Flow(torch.zeros(2, H, W), torch.full((H, W), 0.02), ~at_edge, at_edge)


@pytest.mark.parametrize(("share", "is_reset"), [(0.25, False), (0.75, True)])
def test_flow_at_the_border_of_its_window_resets(share: float, is_reset: bool) -> None:
    recursion = SceneCoordinateFilter(SETTINGS, lambda now, before: edge_flow(share))
    recursion.step(0, features(), plane(0.02, 0))
    step = recursion.step(FRAME_NS, features(), plane(0.02, 1))
    assert ("search window" in step.report.reset_reason) == is_reset
    assert (step.report.prior_ratio == 0) == is_reset


@pytest.mark.parametrize(
    ("success", "ratio", "reason"), [(False, 0.0, "nothing there"), (True, 0.1, "10%"), (True, 0.6, "")]
)
def test_a_belief_that_gives_no_good_pose_is_dropped(success: bool, ratio: float, reason: str) -> None:
    recursion = SceneCoordinateFilter(replace(SETTINGS, min_inlier_ratio=0.25))
    recursion.step(0, features(), plane(0.02, 0))
    recursion.accept_pose(CoarsePose(success, "" if success else "nothing there", None, None, 0, ratio))
    step = recursion.step(FRAME_NS, features(), plane(0.02, 1))
    assert reason in step.report.reset_reason
    assert bool(reason) == bool(step.report.reset_reason)


def two_steps(mode: NisMode) -> tuple[SceneCoordinates, SceneCoordinates, SceneCoordinates]:
    """The second measurement, with one bad cell; what is given out for it; and the frame after, far less certain."""
    recursion = SceneCoordinateFilter(replace(SETTINGS, nis_mode=mode, error_correlation=0.0))
    recursion.step(0, features(), plane(0.0, 0))
    bad = plane(0.0, 1)
    bad.mean[:, 5, 5] += 3.0
    second = recursion.step(FRAME_NS, features(), bad).posterior
    third = recursion.step(2 * FRAME_NS, features(), plane(0.0, 2, sigma_m=10.0)).posterior
    return bad, second, third


def test_nis_modes_differ_in_what_is_given_out_and_in_what_is_kept() -> None:
    truth = plane(0.0, 0).mean[:, 5, 5]
    bad, off, _ = two_steps(NisMode.OFF)
    assert torch.allclose(off.mean[:, 5, 5], truth + 1.5, atol=0.05)  # the mean of the two, whatever the NIS says
    _, emitted, after = two_steps(NisMode.OUTPUT_ONLY)
    assert torch.equal(emitted.mean[:, 5, 5], bad.mean[:, 5, 5])
    assert emitted.variance[5, 5] == off.variance[5, 5]
    assert torch.allclose(after.mean[:, 5, 5], truth + 1.5, atol=0.1)  # the rejected fusion is carried on


def test_the_less_uncertain_of_two_that_disagree_is_kept() -> None:
    shape = (H, W)
    prior = Prior(torch.zeros(3, *shape), torch.full(shape, 0.05**2), torch.ones(shape).bool())
    variance = torch.full(shape, 0.1**2)
    variance[:, : W // 2] = 0.02**2
    measurement = SceneCoordinates(torch.zeros(3, *shape), variance, prior.valid, 8)
    measurement.mean[0, ::2] += 1.0  # half of the cells, so that the picture as a whole is not in doubt
    out = fuse(prior, measurement, SETTINGS).posterior
    assert (out.mean[0, ::2, : W // 2] == 1.0).all()
    assert (out.mean[0, ::2, W // 2 :] == 0.0).all()
    assert torch.equal(out.variance[0, W // 2 :], prior.variance[0, W // 2 :])


def test_the_floor_bounds_the_posterior() -> None:
    recursion = SceneCoordinateFilter(replace(SETTINGS, posterior_floor_m2=0.05**2, error_correlation=0.0))
    for k in range(12):
        last = recursion.step(k * FRAME_NS, features(), plane(0.1, k))
    assert float(last.posterior.variance.min()) == pytest.approx(0.05**2)


def test_published_unit_values_through_warp_and_fusion() -> None:
    """Spec 3.1, with a flow that brings its own process noise: sigma_last .05, sigma_w .03, sigma_z .04."""
    shape = (H, W)
    belief = SceneCoordinates(torch.ones(3, *shape), torch.full(shape, 0.05**2), torch.ones(shape).bool(), 8)
    noise = torch.full(shape, 0.03**2)
    flow = Flow(torch.full((2, *shape), 0.25), torch.zeros(shape), torch.ones(shape).bool(), None, noise)
    prior = warp(belief, flow, 1.0, 0.0, blend_sigma=True)
    assert prior.variance[3, 3].item() == pytest.approx(0.0034)
    measurement = SceneCoordinates(belief.mean.clone(), torch.full(shape, 0.04**2), belief.valid, 8)
    measurement.mean[0] += 0.1
    step = fuse(prior, measurement, replace(SETTINGS, error_correlation=0.0))
    assert step.posterior.mean[:, 3, 3].tolist() == pytest.approx([1.068, 1.0, 1.0])
    assert step.posterior.variance[3, 3].item() == pytest.approx(0.001088)
    assert step.posterior.variance[3, 3].sqrt().item() == pytest.approx(0.032985, abs=1e-6)
    assert step.report.nis_mean == pytest.approx(2.0, rel=1e-3)


def test_reference_network_drives_the_same_filter() -> None:
    torch.manual_seed(0)
    net = ReferenceOFlowNet().eval()
    seen = F.normalize(torch.randn(32, H, W), dim=0)
    recursion = SceneCoordinateFilter(SETTINGS, net.flow)
    with torch.inference_mode():
        recursion.step(0, seen, plane(0.02, 0))
        step = recursion.step(FRAME_NS, seen, plane(0.02, 1))
    assert torch.isfinite(step.posterior.mean).all()
    assert step.report.prior_ratio > 0.5


def test_cells_without_a_measurement_keep_the_prior_and_cells_without_a_prior_the_measurement() -> None:
    board = (torch.arange(H)[:, None] + torch.arange(W)) % 2 == 0
    left = torch.arange(W).expand(H, W) < W // 2
    prior = Prior(wall(1.0, 0.1).mean, torch.full((H, W), 0.1**2), left)
    posterior = fuse(prior, replace(wall(1.01, 0.1), valid=board), SETTINGS).posterior
    assert torch.equal(posterior.valid, board | left)
    assert (posterior.mean[0][left & ~board] == 1.0).all() and (posterior.mean[0][~left & board] == 1.01).all()
    fused = posterior.mean[0][left & board]
    assert ((fused > 1.0) & (fused < 1.01)).all()
    assert (posterior.variance[left & ~board] == prior.variance[0, 0]).all()


def test_a_belief_covers_a_frame_while_refined_poses_confirm_it() -> None:
    camera = Camera(8 * W, 8 * H, 400.0, 400.0, 4.0 * W, 4.0 * H)
    recursion = SceneCoordinateFilter(SETTINGS)
    assert not recursion.covers(0)
    recursion.step(0, features(), plane(0.0, 0))
    recursion.accept_pose(CoarsePose(True, "", torch.eye(4).double().numpy(), None, 100, 1.0))
    assert not recursion.covers(FRAME_NS)
    recursion.correct_belief(0, camera, torch.eye(4).double().numpy())
    assert recursion.covers(FRAME_NS)
    assert not recursion.covers(40 * FRAME_NS)  # a gap


CAMERA = Camera(8 * W, 8 * H, 400.0, 400.0, 4.0 * W, 4.0 * H)
HERE = torch.eye(4).double().numpy()


def wall_ahead(depth_m: float) -> SceneCoordinates:
    """A wall seen head-on by ``CAMERA`` at ``HERE``: every point is on the ray of its cell."""
    mean = torch.zeros(3, H, W)
    mean[2] = depth_m
    measured = SceneCoordinates(mean, torch.full((H, W), 0.01), torch.ones(H, W, dtype=torch.bool), 8)
    return onto_rays(measured, CAMERA, HERE)


def test_refined_poses_of_several_frames_in_a_row_settle_a_belief_until_a_frame_contradicts_it() -> None:
    recursion = SceneCoordinateFilter(SETTINGS)

    def confirm(k: int, depth_m: float = 2.0) -> bool:
        recursion.step(k * FRAME_NS, features(), wall_ahead(depth_m))
        recursion.accept_pose(CoarsePose(True, "", HERE, None, 100, 1.0))
        recursion.correct_belief(k * FRAME_NS, CAMERA, HERE)
        return recursion.is_settled_at((k + 1) * FRAME_NS)

    assert [confirm(k) for k in range(6)] == [False] * 4 + [True] * 2
    assert not recursion.is_settled_at(14 * FRAME_NS)  # the last pose is too old
    assert not confirm(6, depth_m=7.0)
    assert not confirm(7)
    recursion.reset("a test")
    assert not confirm(8)


def test_a_contradicted_belief_covers_nothing_until_a_refined_pose_confirms_it() -> None:
    recursion = SceneCoordinateFilter(SETTINGS)
    for k, depth_m in enumerate((2.0, 2.0, 7.0)):
        recursion.step(k * FRAME_NS, features(), wall_ahead(depth_m))
        recursion.accept_pose(CoarsePose(True, "", HERE, None, 100, 1.0))
        if depth_m == 2.0:
            recursion.correct_belief(k * FRAME_NS, CAMERA, HERE)
            assert recursion.covers((k + 1) * FRAME_NS)
    assert not recursion.covers(3 * FRAME_NS)
    recursion.correct_belief(2 * FRAME_NS, CAMERA, HERE)
    assert recursion.covers(3 * FRAME_NS)
