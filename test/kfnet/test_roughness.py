# SPDX-License-Identifier: Apache-2.0
"""Roughness is nothing on surfaces, the noise where cells err by themselves, and widens variances as calibrated."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.kfnet.scoordnet import RoughnessScale, SCoordNet, measure, roughness_m
from kfloc_ros.maps.scene_map import Calibration
from kfloc_ros.types import SceneCoordinates

H, W = 60, 80


def surface(noise_m: float = 0.0, jumps: bool = False) -> SceneCoordinates:
    """A wall seen at a slant, optionally with a step in depth every ten columns."""
    rows, cols = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")
    depth = 2.0 + 0.01 * cols + 0.005 * rows + (0.5 * (cols // 10 % 2) if jumps else 0.0)
    mean = torch.stack([0.03 * cols, 0.03 * rows, depth])
    mean = mean + noise_m * torch.randn(3, H, W, generator=torch.Generator().manual_seed(0))
    return SceneCoordinates(mean, torch.full((H, W), 1e-4), torch.ones(H, W, dtype=torch.bool), 8)


def test_a_surface_is_smooth_and_independent_errors_are_told_as_large_as_they_are() -> None:
    assert float(roughness_m(surface())) < 1e-5
    for noise_m in (0.01, 0.5):
        assert float(roughness_m(surface(noise_m))) == pytest.approx(noise_m, rel=0.12)


def test_steps_in_depth_do_not_make_a_view_rough() -> None:
    assert float(roughness_m(surface(0.01, jumps=True))) < 0.02


def test_cells_without_a_coordinate_do_not_count() -> None:
    seen = surface(0.02)
    seen.mean[:, :, ::7] = math.nan
    holes = replace(seen, valid=seen.mean.isfinite().all(0))
    assert float(roughness_m(holes)) == pytest.approx(0.02, rel=0.12)
    nothing = replace(seen, valid=torch.zeros(H, W, dtype=torch.bool))
    small = replace(seen, mean=seen.mean[:, :4], variance=seen.variance[:4], valid=seen.valid[:4])
    scale = RoughnessScale(0.02, 1.0)
    for unknown in (nothing, small):
        assert math.isnan(float(roughness_m(unknown)))
        torch.testing.assert_close(scale.applied(unknown).variance, unknown.variance)


def test_rough_views_are_widened_by_the_power_and_smooth_ones_are_left() -> None:
    scale = RoughnessScale(usual_m=0.02, power=1.5)
    smooth, rough = surface(0.01), surface(0.08)
    torch.testing.assert_close(scale.applied(smooth).variance, smooth.variance)
    widened = scale.applied(rough)
    torch.testing.assert_close(widened.variance, rough.variance * 4.0**1.5, rtol=0.2, atol=0.0)
    assert widened.mean is rough.mean and len(widened.variance.unique()) == 1


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.02, -1.0), (math.nan, 1.0), (0.02, math.inf), (1, 1.0)])
def test_a_scale_without_sense_is_refused(values: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be a positive number"):
        RoughnessScale(*values)


def test_a_measurement_has_the_calibrated_variance() -> None:
    torch.manual_seed(0)
    head = SCoordNet(width=16, blocks=1).eval()
    features = BackboneFeatures(
        torch.randn(1, 64, 12, 16), torch.randn(1, 24, 24, 32), torch.randn(1, 128, 12, 16), torch.rand(1, 12, 16)
    )
    stated = measure(head, features)
    plain = measure(head, features, Calibration(measurement_variance_scale=2.0))
    torch.testing.assert_close(plain.variance, 2.0 * stated.variance)
    scale = RoughnessScale(usual_m=float(roughness_m(stated)) / 3.0, power=1.0)
    told = measure(head, features, Calibration(measurement_variance_scale=2.0, roughness=scale))
    torch.testing.assert_close(told.variance, 6.0 * stated.variance)
    torch.testing.assert_close(told.mean, stated.mean)


def test_it_is_quick() -> None:
    seen = surface(0.02)
    scale = RoughnessScale(0.01, 1.0)
    spent = []
    for _ in range(20):
        start = time.process_time()
        scale.applied(seen)
        spent.append(time.process_time() - start)
    assert min(spent) < 0.005
