# SPDX-License-Identifier: Apache-2.0
"""Residuals of the map's points in an image at a pose, point by point, after an alignment."""

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
    """Reference points in view, in no particular order."""

    pixels: NDArray[np.float32]
    """(N, 2) projected positions."""
    residuals: NDArray[np.float32]
    """(N,) length of the difference between a point's unit feature and the image's: 0 for equal, 1 and more for
    unlike."""
    confidences: NDArray[np.float32]
    """(N,) weight of the points in the alignment: the reference's reliability times the image's."""


def reproject(
    features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera
) -> Reprojection:
    """Project reference points into an image and compare features at the fine level, the last one of the alignment.

    Args:
        features: backbone features of the image.
        points: points of one or several reference views, on the features' device.
        T_map_camera: pose of the image, (4, 4).
        camera: pinhole camera of the image.
    """
    comparison = _compare(features, points, T_map_camera, camera)
    in_view = comparison.in_view
    parts = (comparison.pixels, comparison.residuals, comparison.confidences)
    return Reprojection(*(values[in_view].cpu().numpy() for values in parts))


def reproject_all(
    features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residuals (N,) and (N,) bool, in view, of all points in their order; see :func:`reproject`."""
    comparison = _compare(features, points, T_map_camera, camera)
    return comparison.residuals, comparison.in_view


@dataclass(frozen=True, eq=False)
class _Comparison:
    pixels: torch.Tensor
    residuals: torch.Tensor
    confidences: torch.Tensor
    in_view: torch.Tensor


def _compare(features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera) -> _Comparison:
    confidence = F.interpolate(features.reliability[:1][None].float(), features.fine.shape[-2:], mode="bilinear")[0, 0]
    image = FeatureImage.from_maps(features.fine[0].float(), confidence, FINE_STRIDE)
    # coordinates relative to the camera: float32 is not exact enough far from the map's origin
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
