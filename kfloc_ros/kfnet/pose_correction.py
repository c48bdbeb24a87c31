# SPDX-License-Identifier: Apache-2.0
"""A refined pose as a measurement of all scene coordinates at once.

The errors of a view's cells are alike: most of what is wrong away from the mapped views is common to all of them, and
no number of cells averages it away, nor does a filter that takes each cell for itself (the independence that KFNet
assumes, section 7 of its specification). A pose that was aligned with the map knows better: it says on which ray each
point lies, two of three coordinates to a pixel or so, and leaves only how far away it is to the belief.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.types import Matrix, SceneCoordinates

MIN_DEPTH_M = 0.1
"""A point nearer than this, or behind the camera, was not what the cell showed."""


def onto_rays(belief: SceneCoordinates, camera: Camera, T_map_camera: Matrix) -> SceneCoordinates:
    """Every point of a belief at its depth, but where the image shows it from a pose.

    Points that are not in front of the camera become invalid. Variances stay: a cell's depth, which makes up most of
    what is left, is no better known than before.

    Args:
        belief: over the scene coordinates of an image, map frame.
        camera: pinhole, of the image.
        T_map_camera: where the image was taken from.
    """
    _, h, w = belief.mean.shape
    device = belief.mean.device
    pose = torch.from_numpy(T_map_camera).to(device)
    back = torch.from_numpy(inverse_pose(T_map_camera)).to(device)
    depth_m = torch.einsum("k,khw->hw", back[2, :3], belief.mean.double()) + back[2, 3]
    u = torch.arange(w, device=device, dtype=torch.float64) * belief.stride + belief.pixel_offset
    v = torch.arange(h, device=device, dtype=torch.float64) * belief.stride + belief.pixel_offset
    x = ((u - camera.cx) / camera.fx).expand(h, w)
    y = ((v - camera.cy) / camera.fy)[:, None].expand(h, w)
    points = torch.stack([x * depth_m, y * depth_m, depth_m])
    mean = torch.einsum("ik,khw->ihw", pose[:3, :3], points) + pose[:3, 3, None, None]
    return replace(belief, mean=mean.to(belief.mean.dtype), valid=belief.valid & (depth_m > MIN_DEPTH_M))
