# SPDX-License-Identifier: Apache-2.0
"""Losses of PixLoc's two-view training (Sarlin et al., CVPR 2021) and of GN-Net (von Stumberg et al., RA-L 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.two_view import TwoViewResult
from kfloc_ros.training.distributed import draw, mean_count

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
