# SPDX-License-Identifier: Apache-2.0
"""Robust losses: published values, derivatives that are the derivatives, text that is parsed and never evaluated."""

from __future__ import annotations

import pytest
import torch

from kfloc_ros.errors import ConfigError
from kfloc_ros.pixloc.reference.losses import RobustLoss

LOSSES = [
    "squared", "huber", "scaled_huber(0.3)", "barron(2)", "barron(1)", "barron(0)", "barron(-2)", "barron(0.5)",
    "scaled_barron(0, 0.1)", "scaled_barron(1, 2)", "scaled_squared(0.5)",
]  # fmt: skip


def test_the_released_loss_has_its_published_values() -> None:
    loss = RobustLoss.parse("scaled_barron(0, 0.1)")
    x = torch.tensor([0.0, 0.01, 0.1, 1.0], dtype=torch.float64)
    assert torch.allclose(loss.weight(x), torch.tensor([1, 0.6667, 0.1667, 0.0196]).double(), atol=1e-4)
    assert torch.allclose(loss.value(x), torch.tensor([0, 0.0081, 0.0358, 0.0786]).double(), atol=1e-4)


@pytest.mark.parametrize("text", LOSSES)
def test_weight_and_curvature_are_the_derivatives(text: str) -> None:
    loss = RobustLoss.parse(text)
    x = torch.linspace(0.003, 6, 40, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(loss.value(x).sum(), x, create_graph=True)
    assert torch.allclose(loss.weight(x), first, atol=1e-12)
    if first.requires_grad:
        (second,) = torch.autograd.grad(loss.weight(x).sum(), x)
        assert torch.allclose(loss.curvature(x), second, atol=1e-10)
    else:
        assert (loss.curvature(x) == 0).all()


@pytest.mark.parametrize("text", LOSSES)
def test_starts_like_the_square(text: str) -> None:
    loss, zero = RobustLoss.parse(text), torch.zeros(1, dtype=torch.float64)
    assert float(loss.value(zero)) == 0.0
    assert float(loss.weight(zero)) == pytest.approx(1.0)


@pytest.mark.parametrize("text", LOSSES)
def test_text_and_back(text: str) -> None:
    loss = RobustLoss.parse(text)
    assert RobustLoss.parse(str(loss)) == loss


def test_the_originals_names_are_known() -> None:
    assert RobustLoss.parse("squared_loss") == RobustLoss()
    assert RobustLoss.parse("huber_loss").name == "huber"


@pytest.mark.parametrize(
    "text",
    ["", "__import__('os').system('true')", "barron", "barron(x)", "barron(1, 2)", "squared(1)", "cauchy(1)",
     "scaled_barron(0, 0)", "scaled_barron(0, -1)", "barron(nan)", "barron(1)(2)"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        RobustLoss.parse(text)
