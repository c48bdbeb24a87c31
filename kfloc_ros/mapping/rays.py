# SPDX-License-Identifier: Apache-2.0
"""Cells of mapping views whose depth is not known, gathered for training by reprojection error."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.trunk import COARSE_STRIDE, TrunkFeatures
from kfloc_ros.kfnet.scoordnet import head_input
from kfloc_ros.mapping.views import View, cell_coordinates
from kfloc_ros.training.reprojection import RayCells


class RayCollector:
    """Gathers, of every view, cells without depth.

    Args:
        limit: most cells of a view.
        seed: of the choice among too many.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit, self._rng = limit, np.random.default_rng((seed, 1))
        self._inputs: list[torch.Tensor] = []
        self._rays: list[NDArray[np.float64]] = []
        self._poses: list[NDArray[np.float64]] = []
        self._depths_m: list[float] = []

    def add(self, view: View, features: TrunkFeatures, similarity: NDArray[np.float64]) -> None:
        """Take cells of an (augmented) view; ``similarity`` maps its pixels to those of the original."""
        inputs = head_input(features)[0]
        h, w = inputs.shape[:2]
        _, known = cell_coordinates(view, (h, w), similarity)
        pixels = cell_pixels(h, w) @ similarity.T
        u, v = pixels.T
        inside = (u >= 0) & (u < view.camera.width) & (v >= 0) & (v < view.camera.height)
        index = np.flatnonzero(inside & ~known)
        if len(index) > self._limit:
            index = self._rng.choice(index, self._limit, replace=False)
        camera = view.camera
        rays = np.column_stack([(u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy])[index]
        self._inputs.append(inputs.reshape(h * w, -1).cpu()[torch.from_numpy(index)].half())
        self._rays.append(rays)
        self._poses.append(view.T_map_camera)
        self._depths_m.append(float(np.median(view.depth_m[view.depth_m > 0])) if view.depth_m.any() else np.nan)

    def cells(self) -> RayCells | None:
        """All that were gathered, or None if there are hardly any or no depth is known at all."""
        if sum(map(len, self._inputs)) < 1000 or np.isnan(self._depths_m).all():
            return None
        row = np.repeat(np.arange(len(self._inputs)), [len(part) for part in self._inputs])
        return RayCells(
            inputs=torch.cat(self._inputs),
            rays=torch.from_numpy(np.concatenate(self._rays)).float(),
            view=torch.from_numpy(row),
            T_map_camera=torch.from_numpy(np.stack(self._poses)).float(),
            usual_depth_m=float(np.nanmedian(self._depths_m)),
        )


def cell_pixels(h: int, w: int) -> NDArray[np.float64]:
    """(h w, 3) homogeneous pixels of the cells' centres."""
    centre = (COARSE_STRIDE - 1) / 2
    cols, rows = np.meshgrid(np.arange(w) * COARSE_STRIDE + centre, np.arange(h) * COARSE_STRIDE + centre)
    return np.stack([cols.ravel(), rows.ravel(), np.ones(h * w)], axis=1)
