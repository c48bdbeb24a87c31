# SPDX-License-Identifier: Apache-2.0
"""Kalman filter over scene coordinates: per-cell equations without state.

A cell's belief is an isotropic Gaussian: a mean (3,) in metres and one variance in square metres for x, y and z. The
process model is the identity along the image flow (KFNet, section 3.1).
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
    """(...) normalised innovation squared; chi-square with 3 degrees of freedom if the variances are right."""


def predict(variance: torch.Tensor, process_variance: torch.Tensor) -> torch.Tensor:
    """Return the prior variance: that of the warped belief plus the process noise, both floored."""
    return variance.clamp(min=MIN_VARIANCE_M2) + process_variance.clamp(min=MIN_VARIANCE_M2)


def update(
    prior_mean: torch.Tensor,
    prior_variance: torch.Tensor,
    measurement: torch.Tensor,
    measurement_variance: torch.Tensor,
    correlation: float = 0.0,
) -> Update:
    """Fuse a prior (3, ...) with a measurement (3, ...).

    With independent errors:  K = P / (P + R);  x' = x + K (z - x);  P' = (1 - K) P, computed as P R / (P + R), which
    does not cancel. With correlated errors, C = correlation * sqrt(P R) (Bar-Shalom and Campo, 1986): K = (P - C) / (P
    + R - 2 C), kept in [0, 1];  P' = (1 - K)^2 P + K^2 R + 2 K (1 - K) C. A network's errors in neighbouring frames are
    similar, so fusing them as if independent gives too small variances; with the correlation, the variance of a belief
    converges to correlation^2 R.

    Args:
        prior_mean: metres.
        prior_variance: (...) square metres.
        measurement: metres.
        measurement_variance: (...) square metres.
        correlation: of the prior's and the measurement's errors, 0 to less than 1.
    """
    P = prior_variance.clamp(min=MIN_VARIANCE_M2)
    R = measurement_variance.clamp(min=MIN_VARIANCE_M2)
    innovation = measurement - prior_mean
    if correlation == 0.0:
        S = P + R
        gain = P / S
        variance = gain * R
    else:
        C = correlation * (P * R).sqrt()
        S = P + R - 2.0 * C
        gain = ((P - C) / S).clamp(0.0, 1.0)
        rest = 1.0 - gain
        variance = rest.square() * P + gain.square() * R + 2.0 * gain * rest * C
    return Update(
        mean=prior_mean + gain * innovation,
        variance=variance,
        nis=(innovation * innovation).sum(0) / S,
    )
