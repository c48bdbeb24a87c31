# SPDX-License-Identifier: Apache-2.0
"""Comparison block by block, on random features: what matches, what is displaced, and what is not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.pixloc import image_check
from kfloc_ros.pixloc.cost import FeatureImage
from kfloc_ros.pixloc.image_check import COLUMNS, ROWS, BlockMatch, match_blocks
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
    near, (count, median) = image_check._here(cells, wanted, column, row), image_check._block_medians(values, block)
    mean, at = image_check._BlockMean(torch.from_numpy(block), torch.rand(50)), (column, row)  # windows leave the image
    around = mean.around(cells, wanted, at)
    here, known = np.linspace(0.5, 1.0, 9, dtype=np.float32), np.arange(9) % 4 > 0
    similar = torch.rand(9, 25, 25, generator=torch.Generator().manual_seed(0))
    votes = image_check._displacement_votes(similar, here, known)
    monkeypatch.setattr(image_check, "has_numba", lambda: False)
    monkeypatch.setattr(image_check, "runs_compiled", lambda *tensors: False)
    assert torch.allclose(near, image_check._here(cells, wanted, column, row), atol=1e-5)
    assert torch.allclose(around, mean.around(cells, wanted, at), atol=1e-5) and float(around.abs().max()) > 0.1
    expected = image_check._block_medians(values, block)
    assert (count == expected[0]).all() and np.allclose(median, expected[1], atol=1e-6)
    expected = image_check._displacement_votes(similar, here, known)
    assert (votes == expected).all() and 0.02 < votes[known].mean() < 0.9 and not votes[~known].any()
