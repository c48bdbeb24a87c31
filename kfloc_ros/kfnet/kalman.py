# SPDX-License-Identifier: Apache-2.0
"""The Kalman filter over scene coordinates: pure per-cell equations, no state.

A cell's belief is an isotropic Gaussian: a mean (3,) in metres and one variance in square metres shared
by x, y and z. The process model is the identity carried along the image flow (KFNet, section 3.1 of the spec).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NIS_THRESHOLD_95 = 7.815
"""95 % point of the chi-square distribution with 3 degrees of freedom."""

MIN_VARIANCE_M2 = 1e-10


@dataclass(frozen=True, eq=False)
class Update:
    """Posterior of a Kalman update."""

    mean: torch.Tensor
    """(3, ...) metres."""
    variance: torch.Tensor
    """(...) square metres; at most the smaller of prior and measurement variance."""
    nis: torch.Tensor
    """(...) normalised innovation squared, chi-square with 3 degrees of freedom if all is consistent."""


def predict(variance: torch.Tensor, process_variance: torch.Tensor) -> torch.Tensor:
    """Prior variance: that of the warped belief plus the process noise, both floored."""
    return variance.clamp(min=MIN_VARIANCE_M2) + process_variance.clamp(min=MIN_VARIANCE_M2)


def update(
    prior_mean: torch.Tensor,
    prior_variance: torch.Tensor,
    measurement: torch.Tensor,
    measurement_variance: torch.Tensor,
) -> Update:
    """Fuse a prior (3, ...) with a measurement (3, ...).

    K = P / (P + R);  x' = x + K (z - x);  P' = (1 - K) P, computed as P R / (P + R), which does not cancel.
    """
    P = prior_variance.clamp(min=MIN_VARIANCE_M2)
    R = measurement_variance.clamp(min=MIN_VARIANCE_M2)
    S = P + R
    gain = P / S
    innovation = measurement - prior_mean
    return Update(
        mean=prior_mean + gain * innovation,
        variance=gain * R,
        nis=(innovation * innovation).sum(0) / S,
    )
