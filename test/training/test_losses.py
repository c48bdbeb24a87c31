# SPDX-License-Identifier: Apache-2.0
"""KFNet's losses: published values, closed forms, and where gradients vanish."""

from __future__ import annotations

import math

import pytest
import torch

from kfloc_ros.training import losses


def cell(error_m: float, sigma_m: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    truth = torch.zeros(1, 3, 1, 1)
    coordinates = torch.tensor([error_m, 0.0, 0.0]).reshape(1, 3, 1, 1).requires_grad_()
    return coordinates, torch.full((1, 1, 1), sigma_m), truth


def test_published_value() -> None:
    """Spec 3.1: sigma .05, error .1 gives -6.98720."""
    coordinates, sigma, truth = cell(0.1, 0.05)
    assert float(losses.cell_likelihood(coordinates, sigma, truth).detach()) == pytest.approx(-6.98720, abs=1e-5)


@pytest.mark.parametrize(
    ("error_m", "sigma_m", "truncation", "has_gradient"),
    [
        (0.0505, 0.01, -1.0, True),  # stage 2: none above 5.06 cm at 1 cm
        (0.0507, 0.01, -1.0, False),
        (0.0001, 0.72, -1.0, False),  # and none at all above 0.717 m
        (0.0485, 0.01, -2.0, True),  # stage 3: 4.86 sigma
        (0.0487, 0.01, -2.0, False),
        (0.5, 0.01, None, True),
    ],
)
def test_truncation_takes_the_gradient(
    error_m: float, sigma_m: float, truncation: float | None, has_gradient: bool
) -> None:
    coordinates, sigma, truth = cell(error_m, sigma_m)
    losses.likelihood(coordinates, sigma, truth, torch.ones(1, 1, 1).bool(), truncation).backward()
    assert coordinates.grad is not None
    assert bool(coordinates.grad.abs().sum() > 0) == has_gradient


def test_likelihood_is_least_at_the_true_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    error = 0.07 * torch.randn(1, 3, 100, 100, generator=generator)
    mask = torch.ones(1, 100, 100).bool()
    values = {
        s: float(losses.likelihood(error, torch.full((1, 100, 100), s), torch.zeros_like(error), mask))
        for s in (0.05, 0.06, 0.07, 0.08, 0.1)
    }
    assert min(values, key=lambda s: values[s]) == 0.07


def test_the_mean_is_over_the_mask_plus_one() -> None:
    values, mask = torch.full((2, 2, 2), 3.0), torch.zeros(2, 2, 2).bool()
    mask[0, 0] = True
    values[1] = math.nan  # what is masked out does not matter
    assert float(losses.masked_mean(values, mask)) == pytest.approx(6.0 / 3.0)


def test_smoothness_forgives_jumps_across_edges_of_the_image() -> None:
    coordinates = torch.zeros(1, 3, 4, 6)
    coordinates[..., 3:] = 1.0
    mask = torch.ones(1, 4, 6).bool()
    flat, edge = torch.full((1, 3, 4, 6), 100.0), torch.full((1, 3, 4, 6), 100.0)
    edge[..., 3:] = 120.0
    assert float(losses.smoothness(coordinates, flat, mask)) == pytest.approx(4 / 21)  # 4 jumps of 20 differences
    assert float(losses.smoothness(coordinates, edge, mask)) < 1e-5


def test_photometric_loss_is_zero_for_the_same_image_only() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 12, 16, generator=generator) * 255
    mask = torch.ones(1, 12, 16).bool()
    assert float(losses.photometric(image, image, mask)) == pytest.approx(0.0, abs=1e-6)
    assert float(losses.photometric(image.roll(1, 3), image, mask)) > 0.5


def test_window_mask_needs_all_64_cells() -> None:
    own, other = torch.ones(20, 24).bool(), torch.ones(20, 24).bool()
    other[10, 12] = False
    mask = losses.window_mask(own, other)
    for r in range(20):
        for c in range(24):
            inside = 4 <= r <= 16 and 4 <= c <= 20
            near = r - 4 <= 10 <= r + 3 and c - 4 <= 12 <= c + 3
            assert bool(mask[r, c]) == (inside and not near)
