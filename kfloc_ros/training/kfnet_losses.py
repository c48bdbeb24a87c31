# SPDX-License-Identifier: Apache-2.0
"""KFNet's losses: likelihood with truncation, smoothness of coordinates, photometric agreement.

All are sums over valid cells divided by their number plus one, as published.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kfloc_ros.kfnet.reference.scoordnet import MIN_SIGMA
from kfloc_ros.training.distributed import mean_count, world_size

SMOOTHNESS_WEIGHT = 50.0
PHOTOMETRIC_WEIGHT = 2.0
EDGE_FALLOFF = 0.625
"""Per grey level of the image's gradient: across edges, coordinates may jump."""
SSIM_SHARE = 0.85
SSIM_C1, SSIM_C2 = 1e-4, 9e-4


def masked_mean(values: torch.Tensor, mask: torch.Tensor, whole_batch: bool = False) -> torch.Tensor:
    """Sum over valid entries divided by their number plus one: here, or in the whole batch of all processes."""
    count = mask.sum() + 1
    if whole_batch and world_size() > 1:
        count = (mean_count(mask.sum()) + 1 / world_size()).to(values.dtype)
    return torch.where(mask, values, torch.zeros_like(values)).sum() / count


def likelihood(
    coordinates: torch.Tensor,
    sigma: torch.Tensor,
    truth: torch.Tensor,
    mask: torch.Tensor,
    truncation: float | None = None,
    *,
    whole_batch: bool = False,
) -> torch.Tensor:
    """Mean of 3 ln sigma + |e|^2 / (2 sigma^2), the negative log-likelihood up to a constant.

    Args:
        coordinates: (B, 3, h, w).
        sigma: (B, h, w), in the same unit.
        truth: (B, 3, h, w).
        mask: (B, h, w) bool.
        truncation: cells with a larger loss count with this one and have no gradient.
        whole_batch: the mean is over the batch of all processes, of which this is a part.
    """
    return masked_mean(cell_likelihood(coordinates, sigma, truth, truncation), mask, whole_batch)


def cell_likelihood(
    coordinates: torch.Tensor, sigma: torch.Tensor, truth: torch.Tensor, truncation: float | None = None
) -> torch.Tensor:
    """(B, h, w) of :func:`likelihood`."""
    sigma = sigma.clamp(min=MIN_SIGMA)
    loss = 3.0 * sigma.log() + (coordinates - truth).square().sum(1) / (2.0 * sigma.square())
    return loss if truncation is None else loss.clamp(max=truncation)


def smoothness(coordinates: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared differences of neighbouring coordinates, except across edges of the image.

    Args:
        coordinates: (B, 3, h, w).
        images: (B, 3, h, w), 0..255, every eighth pixel.
        mask: (B, h, w) bool; a difference counts where its left or upper cell does.
    """
    total = coordinates.new_zeros(())
    for dim in (2, 3):
        n = coordinates.shape[dim] - 1
        change = coordinates.diff(dim=dim).square().mean(1)
        edge = images.diff(dim=dim).abs().mean(1)
        total = total + masked_mean(change * (-EDGE_FALLOFF * edge).exp(), mask.narrow(dim - 1, 0, n))
    return total


def photometric(warped: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Structural dissimilarity and absolute difference of images (B, 3, h, w) in 0..255, summed over channels."""
    a, b = warped / 127.5 - 1.0, images / 127.5 - 1.0
    dissimilarity = ((1.0 - ssim(a, b)) / 2.0).clamp(0.0, 1.0)
    return masked_mean((SSIM_SHARE * dissimilarity + (1 - SSIM_SHARE) * (a - b).abs()).sum(1), mask)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of images (B, C, h, w) over 3x3 windows; border windows are smaller."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a * mu_a, mean(b * b) - mu_b * mu_b
    covariance = mean(a * b) - mu_a * mu_b
    top = (2 * mu_a * mu_b + SSIM_C1) * (2 * covariance + SSIM_C2)
    return top / ((mu_a * mu_a + mu_b * mu_b + SSIM_C1) * (var_a + var_b + SSIM_C2))


def window_mask(mask: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(h, w) cells that are valid and whose whole search window, -4..+3 cells, is valid in the other frame."""
    padded = F.pad(other.float()[None, None], (4, 3, 4, 3))
    return mask & (-F.max_pool2d(-padded, 8, stride=1)[0, 0] > 0.5)
