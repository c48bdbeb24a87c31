# SPDX-License-Identifier: Apache-2.0
"""Comparison block by block, on random features: what matches, what is displaced, and what is not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.pixloc import check_kernels
from kfloc_ros.pixloc.check_kernels import COLUMNS, ROWS
from kfloc_ros.pixloc.cost import FeatureImage
from kfloc_ros.pixloc.image_check import USUAL_GAIN, BlockMatch, TwoParts, match_blocks, two_parts
from kfloc_ros.pixloc.point_matching import PointMatches
from kfloc_ros.pixloc.references import ReferencePoints

CAMERA = Camera(640, 480, 500.0, 500.0, 319.5, 239.5)
DEPTH_M = 2.0


def features(seed: int = 0) -> torch.Tensor:
    """(16, 60, 80) smooth unit features."""
    noise = torch.randn(1, 16, 60, 80, generator=torch.Generator().manual_seed(seed))
    return F.normalize(F.avg_pool2d(noise, 3, stride=1, padding=1)[0], dim=0)


def image_of(shown: torch.Tensor) -> FeatureImage:
    return FeatureImage.from_maps(shown, torch.ones(shown.shape[1:]), 8)


def matched(shown: torch.Tensor, known: torch.Tensor) -> BlockMatch | None:
    """Reference points at the centres of cells, with the features of ``known``, in an image with those of ``shown``."""
    row, column = (i.reshape(-1) for i in torch.meshgrid(torch.arange(1, 59, 2), torch.arange(1, 79, 2), indexing="ij"))
    u, v = 8 * column + 3.5, 8 * row + 3.5
    points = torch.stack([(u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, torch.ones_like(u)], 1) * DEPTH_M
    wanted = known[:, row, column].T
    references = ReferencePoints(points, wanted, wanted[:, :8], torch.ones(len(points)))
    return match_blocks(image_of(shown), points, references, np.eye(4), CAMERA)


def test_the_same_image_matches_everywhere() -> None:
    result = matched(features(), features())
    assert result is not None and result.blocks == ROWS * COLUMNS
    assert result.matching_share == 1.0 and result.moved == 0
    assert result.shift_px < 2.0 and result.shifted == 0


def test_a_part_that_moved_a_little_shifts_its_blocks() -> None:
    shown, known = features(), features()
    shown[:, 10:50, 23:63] = known[:, 10:50, 20:60]  # by 3 cells
    result = matched(shown, known)
    assert result is not None and 12 <= result.shifted <= 30
    assert 10.0 < result.shift_px < 24.0 and result.shift_chi2 > 5.0


def test_a_displaced_part_is_found_with_its_displacement() -> None:
    shown, known = features(), features()
    shown[:, 10:50, 25:65] = known[:, 7:47, 20:60]  # moved by 5 cells to the right and 3 down
    result = matched(shown, known)
    assert result is not None and result.moved >= 8
    assert np.abs(np.subtract(result.moved_px, (40.0, 24.0))).max() <= 8.0
    assert result.moved_depth_m == DEPTH_M
    assert 0.4 < result.matching_share < 0.8


def test_a_pose_is_that_of_a_moved_part_as_likely_as_the_part_is_large() -> None:
    """A part of the image seldom decides the pose; the covariance holds that it may have."""
    small, large = (BlockMatch(48, 48 - moved, moved, (50.0, 0.0), 2.0) for moved in (6, 30))
    turn_rad = 50.0 / CAMERA.fx
    for match, share in ((small, 6 / 48), (large, 30 / 48)):
        expected = share / 3 * np.repeat([(2.0 * turn_rad) ** 2, turn_rad**2], 3)
        np.testing.assert_allclose(match.variances(CAMERA, 2.0), expected)


def test_displacements_a_little_beyond_noise_widen_the_covariance_little() -> None:
    noise, little, much = (
        BlockMatch(48, 48, 0, (0.0, 0.0), 0.0, shift_px=5.0, shift_chi2=chi2, depth_m=2.0) for chi2 in (1.5, 2.5, 20.0)
    )
    assert not noise.variances(CAMERA, 2.0).any() and not little.variances(CAMERA, 3.0).any()
    of_little, of_much = (match.variances(CAMERA, 2.0)[3] for match in (little, much))
    assert 0.0 < of_little < 0.25 * of_much < 0.25 * (5.0 / CAMERA.fx) ** 2


def test_what_is_covered_is_missing_but_not_displaced() -> None:
    shown, known = features(), features()
    shown[:, :, 30:60] = features(1)[:, :, 30:60]
    result = matched(shown, known)
    assert result is not None and result.moved <= 1 and 0.4 < result.matching_share < 0.8


def test_too_few_points_in_view_are_not_compared() -> None:
    known = features()
    behind = torch.tensor([[0.0, 0.0, -1.0]]).repeat(100, 1)
    wanted = known[:, 0, :1].T.repeat(100, 1)
    references = ReferencePoints(behind, wanted, wanted[:, :8], torch.ones(100))
    assert match_blocks(image_of(known), behind, references, np.eye(4), CAMERA) is None


def test_compiled_loops_agree_with_torch_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cells, wanted = torch.randn(20, 30, 8), torch.randn(50, 8)
    column, row = torch.from_numpy(rng.integers(0, 30, 50)), torch.from_numpy(rng.integers(0, 20, 50))
    values, block = rng.normal(size=(50, 2)).astype(np.float32), rng.integers(0, 9, 50)
    near, (count, median) = (
        check_kernels.similarities_around(cells, wanted, column, row),
        check_kernels.block_medians(values, block),
    )
    mean, at = (
        check_kernels.BlockMean(torch.from_numpy(block), torch.rand(50)),
        (column, row),
    )  # windows leave the image
    around = mean.around(cells, wanted, at)
    here, known = np.linspace(0.5, 1.0, 9, dtype=np.float32), np.arange(9) % 4 > 0
    similar = torch.rand(9, 25, 25, generator=torch.Generator().manual_seed(0))
    votes = check_kernels.votes_of_blocks(similar, here, known)
    monkeypatch.setattr(check_kernels, "has_numba", lambda: False)
    monkeypatch.setattr(check_kernels, "runs_compiled", lambda *tensors: False)
    assert torch.allclose(near, check_kernels.similarities_around(cells, wanted, column, row), atol=1e-5)
    assert torch.allclose(around, mean.around(cells, wanted, at), atol=1e-5) and float(around.abs().max()) > 0.1
    expected = check_kernels.block_medians(values, block)
    assert (count == expected[0]).all() and np.allclose(median, expected[1], atol=1e-6)
    expected = check_kernels.votes_of_blocks(similar, here, known)
    assert (votes == expected).all() and 0.02 < votes[known].mean() < 0.9 and not votes[~known].any()


def matched_parts(shift_px: float, moved: slice, *, T_camera_local: np.ndarray | None = None) -> TwoParts | None:
    """Points found where a camera at the identity has them, with noise, but those of some columns of blocks elsewhere.

    They were searched at another pose, by default at the right one.
    """
    rng = np.random.default_rng(0)
    u, v, z = rng.uniform(10, 630, 800), rng.uniform(10, 470, 800), rng.uniform(1.5, 4.0, 800)
    points = np.stack([(u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, np.ones_like(u)], axis=1) * z[:, None]
    pixels = np.stack([u, v], axis=1) + rng.normal(0.0, 1.5, (800, 2))
    column = (u * COLUMNS / CAMERA.width).astype(int)
    pixels[np.isin(column, np.arange(COLUMNS)[moved]), 0] += shift_px
    found = PointMatches(torch.from_numpy(pixels).float(), torch.ones(800))
    at = np.eye(4) if T_camera_local is None else T_camera_local
    return two_parts(found, torch.from_numpy(points).float(), at, CAMERA)


def test_without_a_moved_part_a_pose_has_no_second_explanation() -> None:
    """A pose that is off displaces the whole image; that is no part."""
    off = make_pose(so3_exp(np.array([0.0, 0.01, 0.0])), np.array([0.03, 0.0, 0.0]))
    for result in (matched_parts(0.0, slice(0)), matched_parts(0.0, slice(0), T_camera_local=off)):
        assert result is not None and result.gain < USUAL_GAIN and not result.moments.any()


def test_a_part_that_moved_tells_by_how_much_the_pose_between_both_is_off() -> None:
    """The middle moved to the right, and the alignment went with it half the way: the camera turned to the left."""
    off = make_pose(so3_exp(np.array([0.0, 0.02, 0.0])), np.array([0.0, 0.0, 0.0]))
    result = matched_parts(20.0, slice(2, 5), T_camera_local=off)
    assert result is not None and result.gain > 5.0 * USUAL_GAIN
    assert result.share == pytest.approx(3 / 8) and np.abs(np.subtract(result.shift_px, (20.0, 0.0))).max() < 2.0
    error = pose_tangent_error(inverse_pose(off), np.eye(4))
    assert np.abs(result.errors[0] - error)[3:].max() < 0.003 and np.abs(result.errors[0] - error)[:3].max() < 0.02
    other = np.abs(result.errors[1] - error)  # if the sides moved, the pose is another
    assert other[4] > 0.005 and other[0] > 0.02
    assert 0.4 * error[4] ** 2 < result.moments[4, 4] < 1.5 * error[4] ** 2
    assert np.linalg.eigvalsh(result.moments).min() > -1e-12


def test_a_pose_that_a_moved_part_does_not_change_stays_as_sure() -> None:
    result = matched_parts(20.0, slice(2, 5))
    assert result is not None and result.gain > 5.0 * USUAL_GAIN
    right = np.sqrt(np.diag((1.0 - result.share) * np.outer(result.errors[0], result.errors[0])))
    assert right[:3].max() < 0.02 and right[3:].max() < 0.003


def test_few_matches_tell_nothing_of_parts() -> None:
    found = PointMatches(torch.rand(20, 2) * 400, torch.ones(20))
    assert two_parts(found, torch.tensor([[0.0, 0.0, 2.0]]).repeat(20, 1), np.eye(4), CAMERA) is None
    assert two_parts(PointMatches(torch.zeros(9, 2), torch.zeros(9)), torch.ones(9, 3), np.eye(4), CAMERA) is None
