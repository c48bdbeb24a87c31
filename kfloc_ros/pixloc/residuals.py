# SPDX-License-Identifier: Apache-2.0
"""How well the map's points fit an image at a pose: what the alignment has left over, point by point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.features.backbone import FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.pixloc.cost import FeatureImage, project
from kfloc_ros.pixloc.references import ReferencePoints


@dataclass(frozen=True, eq=False)
class Reprojection:
    """The points that are in view, in no order."""

    pixels: NDArray[np.float32]
    """(N, 2) where they are seen."""
    residuals: NDArray[np.float32]
    """(N,) length of the difference between a point's unit feature and the image's: 0 alike, 1 and more unlike."""
    confidences: NDArray[np.float32]
    """(N,) weight of the points in the alignment: the reference's reliability times the image's."""


def reproject(
    features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera
) -> Reprojection:
    """Project reference points into an image and compare features at the fine level, the last one of the alignment.

    Args:
        features: of the image.
        points: of one or several reference views, on the features' device.
        T_map_camera: pose of the image.
        camera: of the image.
    """
    everything = _compare(features, points, T_map_camera, camera)
    seen = everything.in_view
    parts = (everything.pixels, everything.residuals, everything.confidences)
    return Reprojection(*(values[seen].cpu().numpy() for values in parts))


def reproject_all(
    features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`reproject`, but in the points' order: residuals (N,), and which of them are in view, (N,) bool."""
    everything = _compare(features, points, T_map_camera, camera)
    return everything.residuals, everything.in_view


@dataclass(frozen=True, eq=False)
class _Comparison:
    pixels: torch.Tensor
    residuals: torch.Tensor
    confidences: torch.Tensor
    in_view: torch.Tensor


def _compare(features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera) -> _Comparison:
    confidence = F.interpolate(features.reliability[:1][None].float(), features.fine.shape[-2:], mode="bilinear")[0, 0]
    image = FeatureImage.from_maps(features.fine[0].float(), confidence, FINE_STRIDE)
    # float32 is exact enough only near the origin, and a map may be far from its own
    origin = torch.from_numpy(T_map_camera[:3, 3].copy()).to(points.points)
    T_camera_local = torch.from_numpy(make_pose(T_map_camera[:3, :3].T, np.zeros(3))).to(points.points)
    cells, _, in_front = project(points.points - origin, T_camera_local, camera, FINE_STRIDE)
    rows, inside = image.sample(cells)
    return _Comparison(
        pixels=(cells + 0.5) * FINE_STRIDE - 0.5,
        residuals=(rows[:, : image.channels] - points.fine).norm(dim=1),
        confidences=points.confidence * rows[:, -1],
        in_view=inside & in_front,
    )
