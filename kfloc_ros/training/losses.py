# SPDX-License-Identifier: Apache-2.0
"""Losses of KFNet, of PixLoc's two-view training (Sarlin et al., CVPR 2021) and of GN-Net (von Stumberg, RA-L 2020).

KFNet's are a likelihood with truncation, smoothness of coordinates and photometric agreement. All three are sums over
valid cells divided by their number plus one, as published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.kfnet.reference.scoordnet import MIN_SIGMA
from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.two_view import TwoViewResult
from kfloc_ros.training.distributed import draw, mean_count, world_size

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


MIN_COMMON_POINTS = 10
"""An element with fewer points that are seen from both its true and its initial pose says nothing."""

REPROJECTION = RobustLoss("barron", 1.0, 2.0)

POSITIVE_MARGIN, NEGATIVE_MARGIN = 0.2, 1.0
HARDEST = 200
"""A negative is drawn among so many most similar cells."""
MAX_CELLS = 16_384
"""Of a larger map, so many random cells are looked at: all of them with all points would not fit into memory."""
WINDOW_SHARE = 0.1
"""Of the longer side: nearer cells than this are no negatives."""
GAUSS_NEWTON_WEIGHT, CONTRASTIVE_WEIGHT = 0.1, 1.0


@dataclass(frozen=True, eq=False)
class TwoViewLoss:
    """Loss of a batch of pairs."""

    total: torch.Tensor
    """(B,); zero for an element that says nothing."""
    errors_px: tuple[torch.Tensor, ...]
    """(B,) robust mean reprojection error after each level, coarse to fine, not differentiable."""
    initial_px: torch.Tensor
    """(B,) the same at the initial pose."""
    usable: torch.Tensor
    """(B,) bool"""


def two_view_loss(
    result: TwoViewResult,
    T_init: Pose,
    T_true: Pose,
    camera_query: CameraTensor,
    points_reference: torch.Tensor,
    strides: tuple[int, ...],
    *,
    success_px: float = 3.0,
    clamp_px: float = 50.0,
) -> TwoViewLoss:
    """Robust reprojection errors after every level.

    A level counts only where the coarser one before it ended within ``success_px`` of its own pixels. An error above
    ``clamp_px`` has no gradient. An error that is not a number counts as that of an element that says nothing.

    Args:
        result: of the alignment, differentiable.
        T_init, T_true: (B,) T_query_reference.
        camera_query: (B,) of the whole query image.
        points_reference: (B, N, 3) in the reference camera.
        strides: of the levels, 0 being the finest.
        success_px: in cells of the level before.
        clamp_px: in image pixels.
    """
    points, camera = points_reference.double(), camera_query.double()
    true_uv, true_seen = camera.world2image(T_true.double().transform(points))
    _, init_seen = camera.world2image(T_init.double().transform(points))
    common = true_seen & init_seen
    usable = common.sum(-1) >= MIN_COMMON_POINTS

    def error_of(T: Pose) -> torch.Tensor:
        uv, _ = camera.world2image(T.double().transform(points))
        squared = torch.where(common, ((uv - true_uv) ** 2).sum(-1), torch.zeros_like(uv[..., 0]))
        robust = REPROJECTION.value(squared) / 4
        return (robust * common).sum(-1) / common.sum(-1).clamp(min=1)

    total = torch.zeros_like(usable, dtype=torch.float64)
    counts = torch.ones_like(usable)
    errors = []
    for level in result.levels:
        error = error_of(level.T_opt).clamp(max=clamp_px)
        usable = usable & error.detach().isfinite()
        total = total + torch.where(counts, error, torch.zeros_like(error)) / len(result.levels)
        counts = counts & (error.detach() < success_px * strides[level.level])
        errors.append(error.detach())
    total = torch.where(usable, total, torch.zeros_like(total))
    return TwoViewLoss(total, tuple(errors), error_of(T_init).detach(), usable)


@dataclass(frozen=True, eq=False)
class GnNetLoss:
    """Loss of one level, averaged over points."""

    gauss_newton: torch.Tensor
    contrastive: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return GAUSS_NEWTON_WEIGHT * self.gauss_newton + CONTRASTIVE_WEIGHT * self.contrastive


def gnnet_loss(
    target: FeatureMap,
    features: torch.Tensor,
    uv_true: torch.Tensor,
    mask: torch.Tensor,
    generator: torch.Generator,
) -> GnNetLoss:
    """One direction of GN-Net at one level.

    Args:
        target: features of the image that points are sought in, (B, H, W, C).
        features: (B, N, C) of the points in the other image.
        uv_true: (B, N, 2) cells where they are in the target.
        mask: (B, N) bool: points that take part.
        generator: of the noise and the choice of negatives, on the CPU.
    """
    noise = (draw(torch.rand, uv_true.shape, generator) * 2 - 1).to(uv_true)
    count = mean_count(mask.sum()).clamp(min=1)
    gauss_newton = (_gauss_newton(target, features, uv_true, uv_true + noise) * mask).sum() / count
    positive = (_length(target.sample(uv_true).values - features) - POSITIVE_MARGIN).clamp(min=0) ** 2
    negative = (NEGATIVE_MARGIN - _length(_negatives(target, features, uv_true, generator) - features)).clamp(min=0)
    contrastive = ((positive + negative**2) * mask).sum() / count
    return GnNetLoss(gauss_newton, contrastive)


def _gauss_newton(
    target: FeatureMap, features: torch.Tensor, uv_true: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """(B, N) negative log-likelihood of the true place under the normal distribution that one step predicts."""
    at = target.sample_with_gradient(start)
    J = torch.stack([at.du, at.dv], dim=-1)
    residual = at.values - features
    H = J.mT @ J + 1e-6 * torch.eye(2, dtype=J.dtype, device=J.device)
    g = (J.mT @ residual[..., None])[..., 0]
    determinant = H[..., 0, 0] * H[..., 1, 1] - H[..., 0, 1] * H[..., 1, 0]
    adjugate = torch.stack([H[..., 1, 1], -H[..., 0, 1], -H[..., 1, 0], H[..., 0, 0]], dim=-1).reshape(H.shape)
    step = -(adjugate @ g[..., None])[..., 0] / determinant[..., None]
    error = uv_true - (start + step)
    mahalanobis = (error[..., None, :] @ H @ error[..., None])[..., 0, 0]
    return mahalanobis / 2 + math.log(2 * math.pi) - determinant.log() / 2


def _negatives(
    target: FeatureMap, features: torch.Tensor, uv_true: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """(B, N, C) features of the target that look like a point's and lie elsewhere."""
    B, N, C = features.shape
    table = target.table.reshape(B, target.height * target.width, C)
    index = torch.arange(target.height * target.width, device=features.device)
    if len(index) > MAX_CELLS:
        index = torch.randint(len(index), (MAX_CELLS,), generator=generator).to(features.device)
        table = table[:, index]
    cells = torch.stack([index % target.width, index // target.width], dim=-1).to(uv_true)
    with torch.no_grad():
        distance = torch.cdist(features, table)
        near = torch.cdist(uv_true, cells.expand(B, -1, -1), p=math.inf) < WINDOW_SHARE * max(
            target.height, target.width
        )
        distance = distance.masked_fill(near, math.inf)
        hardest = distance.topk(min(HARDEST, distance.shape[-1]), dim=-1, largest=False)
        # where the window leaves fewer cells than that, only those count
        allowed = hardest.values.isfinite().sum(-1).clamp(min=1)
        drawn = (draw(torch.rand, (B, N), generator).to(uv_true.device) * allowed).long()
        chosen = hardest.indices.gather(-1, drawn[..., None])
    return table.gather(1, chosen.expand(-1, -1, C))


def _length(difference: torch.Tensor) -> torch.Tensor:
    """Length with a gradient at zero."""
    return (difference.square().sum(-1) + 1e-12).sqrt()
