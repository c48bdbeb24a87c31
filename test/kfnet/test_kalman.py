# SPDX-License-Identifier: Apache-2.0
"""The Kalman equations: published values, closed form, and what must hold for any input."""

from __future__ import annotations

import pytest
import torch

from kfloc_ros.kfnet.fusion import MIN_VARIANCE_M2, kalman_predict, kalman_update


def test_published_unit_values() -> None:
    """KFNet's worked example: sigma_last .05, sigma_w .03, sigma_z .04, one axis differs by 0.1."""
    P = kalman_predict(torch.tensor(0.05**2), torch.tensor(0.03**2))
    assert float(P) == pytest.approx(0.0034)
    prior = torch.tensor([1.0, 0.0, 0.0])
    fused = kalman_update(prior, P, torch.tensor([1.1, 0.0, 0.0]), torch.tensor(0.04**2))
    assert fused.mean.tolist() == pytest.approx([1.068, 0.0, 0.0])
    assert float(fused.variance) == pytest.approx(0.001088)
    assert float(fused.variance.sqrt()) == pytest.approx(0.032985, abs=1e-6)
    assert float(fused.nis) == pytest.approx(2.0)


def test_update_equals_the_information_form() -> None:
    generator = torch.Generator().manual_seed(0)
    P, R = (torch.rand(500, generator=generator, dtype=torch.float64) + 1e-4 for _ in range(2))
    x, z = (torch.randn(3, 500, generator=generator, dtype=torch.float64) for _ in range(2))
    fused = kalman_update(x, P, z, R)
    information = 1 / P + 1 / R
    assert torch.allclose(fused.variance, 1 / information)
    assert torch.allclose(fused.mean, (x / P + z / R) / information)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_is_positive_and_never_grows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    exponents = torch.rand(2, 10_000, generator=generator) * 30 - 24
    P, R = (10.0**exponents).to(dtype)
    x = torch.zeros(3, 10_000, dtype=dtype)
    fused = kalman_update(x, P, x + 1.0, R)
    floor = MIN_VARIANCE_M2
    assert (fused.variance >= 0).all()
    assert torch.isfinite(fused.mean).all()
    assert torch.isfinite(fused.nis).all()
    assert (fused.variance <= torch.minimum(P.clamp(min=floor), R.clamp(min=floor)) * (1 + 1e-5)).all()


def test_order_of_fusion_does_not_matter() -> None:
    z1, z2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 1.0, 3.5])
    a = kalman_update(z1, torch.tensor(0.2), z2, torch.tensor(0.5))
    b = kalman_update(z2, torch.tensor(0.5), z1, torch.tensor(0.2))
    assert torch.allclose(a.mean, b.mean)
    assert torch.allclose(a.variance, b.variance)
    assert torch.allclose(a.nis, b.nis)


def test_correlated_errors_are_fused_optimally() -> None:
    """Closed form against a fine search over the gain, and the claim against sampled errors."""
    P, R, correlation = 0.04, 0.09, 0.4
    z = torch.tensor([1.0, 0.0, 0.0])
    fused = kalman_update(torch.zeros(3), torch.tensor(P), z, torch.tensor(R), correlation)
    C = correlation * (P * R) ** 0.5
    gains = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    claims = (1 - gains) ** 2 * P + gains**2 * R + 2 * gains * (1 - gains) * C
    assert float(fused.variance) == pytest.approx(float(claims.min()), rel=1e-5)
    assert float(fused.mean[0]) == pytest.approx(float(gains[claims.argmin()]), abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    errors = torch.linalg.cholesky(torch.tensor([[P, C], [C, R]])) @ torch.randn(2, 200_000, generator=generator)
    after = kalman_update(errors[:1], torch.tensor(P), errors[1:], torch.tensor(R), correlation)
    assert float(after.mean.var()) == pytest.approx(float(fused.variance), rel=0.02)


def test_correlation_bounds_how_sure_a_static_view_gets() -> None:
    x, P, R = torch.zeros(3), torch.tensor(0.04), torch.tensor(0.04)
    for _ in range(200):
        fused = kalman_update(x, P, torch.zeros(3), R, 0.5)
        P = fused.variance
    assert 0.25 * float(R) < float(P) < 0.27 * float(R)
