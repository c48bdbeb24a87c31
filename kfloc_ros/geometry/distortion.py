# SPDX-License-Identifier: Apache-2.0
"""Lens distortion of normalised image points, its Jacobian, and the radius up to which it is valid.

The definitions are OpenCV's, which COLMAP and ROS share. Coefficients are (..., K) tensors in this order:

    RADIAL       k1 k2
    OPENCV       k1 k2 p1 p2
    FULL_OPENCV  k1 k2 p1 p2 k3 k4 k5 k6
    FISHEYE      k1 k2 k3 k4, of the angle to the axis

A distortion is valid as long as the distorted radius grows with the true one. Beyond that, two directions share a
pixel, and points far outside of the image would appear inside.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Distortion(Enum):
    """Kind of distortion; the value is the number of coefficients and a name."""

    NONE = (0, "none")
    RADIAL = (2, "radial")
    OPENCV = (4, "opencv")
    FULL_OPENCV = (8, "full_opencv")
    FISHEYE = (4, "fisheye")

    @property
    def count(self) -> int:
        """Number of coefficients."""
        return self.value[0]


class Distorted(NamedTuple):
    """Distorted points, and a mask of those where the distortion is one to one."""

    points: torch.Tensor
    """(..., N, 2)"""
    valid: torch.Tensor
    """(..., N) bool"""


SMALL_R2 = 1e-8
"""Squared radius below which the fisheye model uses its series."""


def distort(
    xy: torch.Tensor, coefficients: torch.Tensor, kind: Distortion, limit: torch.Tensor, *, legacy: bool = False
) -> Distorted:
    """Distort normalised points (..., N, 2).

    Args:
        xy: x / z and y / z.
        coefficients: (..., K).
        kind: meaning of the coefficients.
        limit: (...,) of :func:`validity_limit`.
        legacy: use the validity limit of the original PixLoc, in which the signs of the coefficients are wrong, for
            equal numbers; it exists only for k1, k2.
    """
    if kind is Distortion.NONE:
        return Distorted(xy, torch.ones(xy.shape[:-1], dtype=torch.bool, device=xy.device))
    r2 = (xy * xy).sum(-1)
    if kind is Distortion.FISHEYE:
        scale, _ = _fisheye_scale(r2, coefficients)
        return Distorted(xy * scale[..., None], r2.sqrt().atan().square() < limit[..., None])
    radial, _ = _radial(r2, coefficients)
    points = xy * radial[..., None]
    if coefficients.shape[-1] > 2:
        points = points + _tangential(xy, r2, coefficients)
    if legacy and kind is not Distortion.FULL_OPENCV:
        return Distorted(points, _legacy_valid(r2, coefficients))
    return Distorted(points, r2 < limit[..., None])


def distort_jacobian(xy: torch.Tensor, coefficients: torch.Tensor, kind: Distortion) -> torch.Tensor:
    """Return the derivative (..., N, 2, 2) of the distorted points by the normalised points (..., N, 2)."""
    eye = torch.eye(2, dtype=xy.dtype, device=xy.device)
    if kind is Distortion.NONE:
        return eye.expand(*xy.shape[:-1], 2, 2)
    x, y = xy.unbind(-1)
    r2 = x * x + y * y
    scale, slope = (_fisheye_scale if kind is Distortion.FISHEYE else _radial)(r2, coefficients)
    # d(scale xy) = scale I + 2 scale' xy xy^T, the prime being by r2.
    J = scale[..., None, None] * eye + 2 * slope[..., None, None] * xy[..., :, None] * xy[..., None, :]
    if kind is Distortion.FISHEYE or coefficients.shape[-1] <= 2:
        return J
    p1, p2 = coefficients[..., None, 2], coefficients[..., None, 3]
    cross = 2 * (p1 * x + p2 * y)
    rows = torch.stack([2 * p1 * y + 6 * p2 * x, cross, cross, 6 * p1 * y + 2 * p2 * x], dim=-1)
    return J + rows.reshape(*rows.shape[:-1], 2, 2)


def validity_limit(coefficients: torch.Tensor, kind: Distortion) -> torch.Tensor:
    """Return the (...,) squared radius (FISHEYE: angle) from which the distorted radius no longer grows, or inf.

    These are the first positive roots of polynomials a0 + a1 x + ... with a0 = 1. In 1 / x they are monic, whatever
    coefficients are zero, so the companion matrix is always defined, and a lost degree is a root at infinity.
    """
    c = coefficients.detach().to("cpu", torch.float64)
    one = torch.ones_like(c[..., :1])
    if kind is Distortion.NONE:
        limit = torch.full(c.shape[:-1], torch.inf, dtype=torch.float64)
    elif kind is Distortion.FISHEYE:
        limit = _first_root(torch.cat([one, c * c.new_tensor([3.0, 5.0, 7.0, 9.0])], dim=-1))
    elif kind is Distortion.FULL_OPENCV:
        N = torch.cat([one, c[..., [0, 1, 4]]], dim=-1)
        D = torch.cat([one, c[..., 5:8]], dim=-1)
        power = torch.arange(4, dtype=c.dtype)
        # r N(r^2) / D(r^2) grows while (N + 2 x N') D - 2 x N D' > 0, and has a pole at D = 0.
        growth = _product(N * (1 + 2 * power), D) - _product(N, D * 2 * power)
        limit = torch.minimum(_first_root(growth), _first_root(D))
    else:
        limit = _first_root(torch.cat([one, c[..., :2] * c.new_tensor([3.0, 5.0])], dim=-1))
    return limit.to(coefficients)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the coefficients of the product of two polynomials, lowest degree first."""
    terms = [F.pad(a[..., i : i + 1] * b, (i, a.shape[-1] - 1 - i)) for i in range(a.shape[-1])]
    return torch.stack(terms).sum(0)


def _first_root(a: torch.Tensor) -> torch.Tensor:
    """Return the smallest positive root of a0 + a1 x + ..., where a0 = 1; inf if there is none."""
    degree = a.shape[-1] - 1
    companion = torch.zeros(*a.shape[:-1], degree, degree, dtype=a.dtype)
    companion[..., 0, :] = -a[..., 1:]
    companion[..., torch.arange(1, degree), torch.arange(degree - 1)] = 1.0
    roots = torch.linalg.eigvals(companion)  # of 1 / x
    real = (roots.imag.abs() < 1e-6 * roots.abs()) & (roots.real > 1e-9)
    largest = torch.where(real, roots.real, torch.zeros_like(roots.real)).amax(-1)
    return torch.where(largest > 0, 1 / largest, torch.full_like(largest, torch.inf))


def _radial(r2: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the radial factor and its derivative by r2."""
    k = [c[..., None, i] for i in range(c.shape[-1])]
    if len(k) < 8:
        return 1 + r2 * (k[0] + r2 * k[1]), k[0] + 2 * k[1] * r2
    N = 1 + r2 * (k[0] + r2 * (k[1] + r2 * k[4]))
    D = 1 + r2 * (k[5] + r2 * (k[6] + r2 * k[7]))
    dN = k[0] + r2 * (2 * k[1] + 3 * r2 * k[4])
    dD = k[5] + r2 * (2 * k[6] + 3 * r2 * k[7])
    return N / D, (dN * D - N * dD) / (D * D)


def _tangential(xy: torch.Tensor, r2: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    x, y = xy.unbind(-1)
    p1, p2 = c[..., None, 2], c[..., None, 3]
    xy2 = 2 * x * y
    return torch.stack([p1 * xy2 + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + p2 * xy2], dim=-1)


def _fisheye_scale(r2: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return theta_d / r with theta = atan(r), and its derivative by r2."""
    k = [c[..., None, i] for i in range(4)]
    small = r2 < SMALL_R2
    safe = torch.where(small, torch.ones_like(r2), r2)
    r = safe.sqrt()
    theta = r.atan()
    t2 = theta * theta
    bent = theta * (1 + t2 * (k[0] + t2 * (k[1] + t2 * (k[2] + t2 * k[3]))))
    growth = 1 + t2 * (3 * k[0] + t2 * (5 * k[1] + t2 * (7 * k[2] + t2 * 9 * k[3])))
    slope = (growth * r / (1 + safe) - bent) / (2 * r * safe)
    series_slope = k[0] - 1 / 3
    return (
        torch.where(small, 1 + series_slope * r2, bent / r),
        torch.where(small, series_slope.expand_as(r2), slope),
    )


def _legacy_valid(r2: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    k1, k2 = c[..., None, 0], c[..., None, 1]
    discriminant = 9 * k1 * k1 - 20 * k2
    limited = ((k2 > 0) & (discriminant > 0)) | ((k2 <= 0) & (k1 > 0))
    limit = torch.where(k2 > 0, (discriminant.clamp(min=0).sqrt() - 3 * k1) / (10 * k2), 1 / (3 * k1)).abs()
    return ~limited | (r2 < limit)
