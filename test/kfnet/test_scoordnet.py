# SPDX-License-Identifier: Apache-2.0
"""Tests of the scene-coordinate head's error density."""

from __future__ import annotations

import pytest
import torch

from kfloc_ros.kfnet.scoordnet import laplace_nll, laplace_variance


@pytest.mark.parametrize("axes", [2, 3])
def test_variance_and_likelihood_are_those_of_the_density(axes: int) -> None:
    """Samples of p(e) ~ exp(-|e| / b) in n dimensions: the length is gamma distributed with shape n."""
    torch.manual_seed(0)
    b = 0.3
    direction = torch.nn.functional.normalize(torch.randn(200_000, axes), dim=1)
    length = torch.distributions.Gamma(float(axes), 1.0 / b).sample((200_000,))
    log_scale = torch.tensor(b).log()
    variance = laplace_variance(log_scale, axes)
    assert (length * direction[:, 0]).var() == pytest.approx(float(variance), rel=0.02)
    # the likelihood of the samples is highest at their own scale
    candidates = log_scale + torch.linspace(-0.5, 0.5, 101)
    nll = torch.stack([laplace_nll(length, value.expand(len(length)), axes).mean() for value in candidates])
    assert candidates[nll.argmin()].exp() == pytest.approx(b, rel=0.02)
