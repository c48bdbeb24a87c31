# SPDX-License-Identifier: Apache-2.0
"""Pairs of frames with their true flow, from depth and poses: what the fast family's OFlowNet is trained on.

Every pair is a function of its number and the seed alone, so training that is resumed sees what it would have seen.
Both frames of a pair are turned and zoomed alike; light, blur, noise and covers are each frame's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from kfloc_ros.datasets.derived import Remembered
from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.flow import cost_window
from kfloc_ros.kfnet.flow_network import FlowNetwork, save_flow_network
from kfloc_ros.kfnet.scoordnet import laplace_nll, laplace_variance
from kfloc_ros.mapping.views import IDENTITY, Mask, View, map_camera, true_flow, warp_image
from kfloc_ros.training.distributed import mean_count, world_size
from kfloc_ros.training.kfnet_samples import random_placement
from kfloc_ros.training.stage import Stage, StepLoss

REMEMBERED_FRAMES = 400
"""Frames kept in memory, 2 MB each: a rendered one takes longer to make than to train on."""
PLACED_SHARE, LIGHT_SHARE, BLUR_SHARE, COVER_SHARE = 0.6, 0.7, 0.25, 0.1
"""How often a pair is turned and zoomed, and a frame has other light, blur or a cover."""


@dataclass(frozen=True, eq=False)
class FlowPair:
    """Two frames and the backward flow from the first to the second."""

    images: torch.Tensor
    """(2, 1, H, W) grey, 0..1: this frame, and the one before."""
    flow: torch.Tensor
    """(2, h, w) cells of the backbone's coarse level, x then y; 0 where unknown."""
    known: torch.Tensor
    """(h, w) bool: where the depth, and so the flow, is known."""
    seen: torch.Tensor
    """(h, w) bool: where, besides, the point is in the second image, and nothing in front of it."""

    def to(self, device: torch.device) -> FlowPair:
        """The same on a device."""
        return FlowPair(*(part.to(device) for part in (self.images, self.flow, self.known, self.seen)))


class FlowPairs:
    """Pairs of sources' frames.

    Args:
        sources: with depth and poses.
        max_step: largest step of the frame index from one frame to the other; both directions occur.
        augment: turn, zoom, light, blur, noise and cover as described; else frames stay as they are.
        seed: of the choice and of what is done to the frames.

    Raises:
        SourceError: a source has no two frames that near to each other.
    """

    def __init__(
        self, sources: Sequence[FrameSource], *, max_step: int = 4, augment: bool = True, seed: int = 0
    ) -> None:
        self._sources = [Remembered(source, REMEMBERED_FRAMES // len(sources)) for source in sources]
        self._adapters = [ImageAdapter(source.camera, map_camera(source.camera)) for source in sources]
        self._augment, self._seed = augment, seed
        self._pairs: list[list[tuple[int, int]]] = []
        for source in sources:
            indices, sequences = source.indices(), source.sequences()
            pairs = [
                (a, b)
                for a in range(len(indices))
                for b in range(max(0, a - max_step), min(len(indices), a + max_step + 1))
                if 0 < abs(indices[b] - indices[a]) <= max_step and sequences[a] == sequences[b]
            ]
            if not pairs:
                raise SourceError(f"'{source.name}' has no two frames within {max_step} of each other.")
            self._pairs.append(pairs)

    def __getitem__(self, number: int) -> FlowPair:
        """The pair of a number that only grows.

        Raises:
            SourceError: a frame has no depth or pose.
        """
        rng = np.random.default_rng((self._seed, 3, number))
        which = int(rng.integers(len(self._sources)))
        pairs = self._pairs[which]
        now, before = (self._view(which, p) for p in pairs[int(rng.integers(len(pairs)))])
        placement = IDENTITY
        if self._augment and rng.random() < PLACED_SHARE:
            placement = random_placement(now.camera, rng)
        flow, known, seen = true_flow(now, before, placement)
        images = []
        for k, view in enumerate((now, before)):
            image = view.image if placement is IDENTITY else warp_image(view.image, placement)
            if self._augment:
                image, covered = disturbed(image, rng)
                seen &= ~(_at_cells(covered, flow) if k else _at_cells(covered, np.zeros_like(flow)))
            images.append(image.mean(axis=2, dtype=np.float32) / 255.0)
        return FlowPair(
            torch.from_numpy(np.stack(images))[:, None],
            torch.from_numpy(flow),
            torch.from_numpy(known),
            torch.from_numpy(seen),
        )

    def _view(self, which: int, position: int) -> View:
        frame, adapter = self._sources[which][position], self._adapters[which]
        if frame.depth_m is None or frame.T_map_camera is None:
            raise SourceError(
                f"Frame {frame.index} of '{self._sources[which].name}' has no depth or no pose to train from."
            )
        return View(
            adapter(frame.image), adapter.nearest(frame.depth_m), adapter.target, frame.T_map_camera, frame.index
        )


def disturbed(image: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], Mask]:
    """An image (H, W, 3) in other light, blurred, noisy, or partly covered, and where it is covered, (H, W)."""
    h, w = image.shape[:2]
    values = image
    if rng.random() < BLUR_SHARE:
        values = motion_blur(values, float(rng.uniform(3, 25)), float(rng.uniform(0, np.pi)))
    bright = values.astype(np.float32)
    if rng.random() < LIGHT_SHARE:
        field = rng.uniform(0.6, 1.3) * rng.uniform(0.7, 1.3, (3, 4)).astype(np.float32)
        lit = cv2.resize(field.astype(np.float32), (w, h), interpolation=cv2.INTER_CUBIC)
        bright = 255.0 * (bright / 255.0) ** np.float32(rng.uniform(0.7, 1.5)) * lit[..., None]
    bright += np.float32(rng.uniform(0, 6)) * rng.standard_normal(bright.shape, dtype=np.float32)
    covered = np.zeros((h, w), dtype=np.bool_)
    if rng.random() < COVER_SHARE:
        height, width = int(h * rng.uniform(0.2, 0.8)), int(w * rng.uniform(0.2, 0.8))
        top, left = int(rng.integers(h - height)), int(rng.integers(w - width))
        covered[top : top + height, left : left + width] = True
        bright[covered] = rng.uniform(20, 200) + rng.normal(0.0, 3.0, (int(covered.sum()), 3))
    return np.clip(bright, 0, 255).astype(np.uint8), covered


def motion_blur(image: NDArray[np.uint8], length_px: float, angle_rad: float) -> NDArray[np.uint8]:
    """The mean of an image (H, W, 3) moved along a straight line, as when the camera turns during the exposure."""
    size = 2 * int(np.ceil(length_px / 2)) + 1
    kernel = np.zeros((size, size), dtype=np.float32)
    for s in np.linspace(-length_px / 2, length_px / 2, 4 * size):
        x, y = size // 2 + s * np.cos(angle_rad), size // 2 + s * np.sin(angle_rad)
        kernel[round(float(y)), round(float(x))] += 1
    kernel /= kernel.sum()
    return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101), dtype=np.uint8)


def _at_cells(mask: Mask, flow: NDArray[np.float32]) -> Mask:
    """(h, w) of a mask (H, W): its value at each cell's centre moved by a flow (2, h, w) in cells."""
    _, h, w = flow.shape
    rows, cols = np.mgrid[:h, :w]
    centre = (COARSE_STRIDE - 1) / 2
    u = np.clip(np.round((cols + flow[0]) * COARSE_STRIDE + centre).astype(np.int64), 0, mask.shape[1] - 1)
    v = np.clip(np.round((rows + flow[1]) * COARSE_STRIDE + centre).astype(np.int64), 0, mask.shape[0] - 1)
    return np.asarray(mask[v, u])


FLOW_DEFAULTS: Mapping[str, Any] = {
    "steps": 600,
    "halving_steps": 120,
    "learning_rate": 3e-3,
    "weight_decay": 0.0,
    "batch": 4,
    "max_step": 4,
    "snapshot_every": 100,
}
"""Defaults of ``kfloc train oflownet --family fast`` where they are not the published schedule's."""
FLOW_OPTIONS = frozenset(FLOW_DEFAULTS) | {"augment", "precision", "seed", "log_every", "workers"}
"""Options that mean something to it."""
SEEN_WEIGHT = 0.5
MAX_NLL = 12.0
"""A cell counts with at most this: a match in a wholly wrong place teaches nothing about flow."""


class FastFlowStage(Stage[FlowPair]):
    """The network learns; the backbone, whose features it compares, stays as it is.

    Args:
        network: to train.
        device: where the backbone runs.
    """

    name, batch = "oflownet", 4

    def __init__(self, network: FlowNetwork, device: torch.device | str = "cpu") -> None:
        self.network = network
        self._backbone = Backbone(device=device)

    def modules(self) -> dict[str, nn.Module]:
        return {"oflownet": self.network}

    def write(self, name: str, path: Path, origin: str) -> None:
        del name, origin
        save_flow_network(path, self.network)

    def loss(self, items: Sequence[FlowPair], generator: torch.Generator) -> StepLoss:
        del generator
        coarse = self._backbone(torch.cat([pair.images for pair in items])).coarse
        with torch.no_grad():
            windows = [cost_window(coarse[2 * k], coarse[2 * k + 1]) for k in range(len(items))]
        read = self.network(windows)
        truth = torch.stack([pair.flow for pair in items])
        known = torch.stack([pair.known for pair in items])
        seen = torch.stack([pair.seen for pair in items])
        within = seen & ~torch.stack([window.at_edge for window in windows])
        difference = read.offset - truth
        error = (difference.square().sum(1) + 1e-8).sqrt()
        nll = laplace_nll(error, read.log_scale, axes=2).clamp(max=MAX_NLL)[within].sum()
        nll = nll / (mean_count(within.sum()) + 1 / world_size()).float()
        visibility = F.binary_cross_entropy_with_logits(read.visible[known], seen[known].float())
        visibility = visibility * (known.sum() / mean_count(known.sum())).float()
        sigma = laplace_variance(read.log_scale.detach(), axes=2).sqrt()
        inside = (difference.detach().abs() < sigma[:, None]).float().mean(1)[within]
        figures = {
            "nll": float(nll.detach()),
            "seen_loss": float(visibility.detach()),
            "median_error_cells": float(error.detach()[within].median()),
            "inside_1sigma": float(inside.mean()),
        }
        return StepLoss(nll + SEEN_WEIGHT * visibility, figures)
