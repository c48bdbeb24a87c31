# SPDX-License-Identifier: Apache-2.0
"""Batched cameras on tensors: projection, distortion, and their Jacobians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_colmap
from kfloc_ros.geometry.distortion import Distorted, Distortion, distort, distort_jacobian, validity_limit
from kfloc_ros.geometry.tensors import TensorObject, as_tensor

NEAR = 1e-3
"""Smallest depth of a valid point; divisions use at least this depth."""

UNDISTORT_STEPS = 12


class Projection(NamedTuple):
    """Projected points."""

    points: torch.Tensor
    """(..., N, 2)"""
    valid: torch.Tensor
    """(..., N) bool: in front of the camera, within the validity of its distortion, and inside the image."""


class ProjectionJacobian(NamedTuple):
    """Derivatives of projected points."""

    J: torch.Tensor
    """(..., N, 2, 3) of pixels by camera points."""
    valid: torch.Tensor
    """(..., N) bool: in front of the camera; the image's border does not matter."""


class CameraTensor(TensorObject):
    """Cameras of one distortion kind; ``data`` is (..., 6 + K): w, h, fx, fy, cx, cy, then the coefficients.

    Pixel (0, 0) is the centre of the top-left pixel. Sizes may be fractional: a feature map is a scaled image.
    """

    def __init__(
        self, data: torch.Tensor, kind: Distortion = Distortion.NONE, limit: torch.Tensor | None = None
    ) -> None:
        if data.shape[-1] != 6 + kind.count:
            raise ValueError(f"A {kind.name} camera holds {6 + kind.count} numbers, got shape {tuple(data.shape)}.")
        super().__init__(data)
        self.kind = kind
        self.limit = validity_limit(data[..., 6:], kind) if limit is None else limit
        """(...,) validity limit; see :func:`kfloc_ros.geometry.distortion.validity_limit`."""

    @classmethod
    def from_camera(cls, camera: Camera, dtype: torch.dtype = torch.float64) -> CameraTensor:
        """Return the camera of a value object, with the smallest distortion kind that is equivalent."""
        d = camera.distortion
        kind, coefficients = Distortion.NONE, d[:0]
        if camera.distortion_model == "equidistant":
            kind, coefficients = Distortion.FISHEYE, d
        elif any(d[4:]):
            kind, coefficients = Distortion.FULL_OPENCV, (*d, 0.0, 0.0, 0.0)[:8]
        elif any(d[2:4]):
            kind, coefficients = Distortion.OPENCV, d[:4]
        elif any(d[:2]):
            kind, coefficients = Distortion.RADIAL, d[:2]
        values = (camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy, *coefficients)
        return cls(torch.tensor(values, dtype=dtype), kind)

    @classmethod
    def from_colmap(cls, camera: Any, dtype: torch.dtype = torch.float64) -> CameraTensor:
        """Return the camera of a mapping, named tuple or ``pycolmap.Camera`` with model, width, height and params.

        Raises:
            FrameError: an unknown model, a wrong number of parameters, or invalid intrinsics.
        """
        return cls.from_camera(camera_from_colmap(camera), dtype)

    def _with(self, data: torch.Tensor) -> CameraTensor:
        return CameraTensor(data, self.kind, self.limit.to(data))

    def _map(self, function: Any) -> CameraTensor:
        return CameraTensor(function(self.data), self.kind, function(self.limit[..., None])[..., 0])

    def as_kind(self, kind: Distortion) -> CameraTensor:
        """Return the same cameras in a kind with more coefficients; the additional ones are zero.

        Raises:
            FrameError: the kind has no equivalent camera.
        """
        if kind is self.kind:
            return self
        if kind.count < self.kind.count or Distortion.FISHEYE in (kind, self.kind):
            raise FrameError(f"A camera with {self.kind.name} distortion cannot be written as {kind.name}.")
        return CameraTensor(F.pad(self.data, (0, kind.count - self.kind.count)), kind, self.limit)

    @classmethod
    def stack(cls, objects: Sequence[CameraTensor], dim: int = 0) -> CameraTensor:
        """Return a batch of cameras; those with fewer coefficients are padded with zeros.

        Raises:
            FrameError: fisheye cameras are mixed with others.
        """
        kind = max((camera.kind for camera in objects), key=lambda k: k.count)
        if any(camera.kind is Distortion.FISHEYE for camera in objects):
            kind = Distortion.FISHEYE
        converted = [camera.as_kind(kind) for camera in objects]
        dim = dim if dim >= 0 else dim - 1
        data = torch.stack([camera.data for camera in converted], dim)
        return CameraTensor(
            data, kind, torch.stack([camera.limit for camera in converted], dim if dim >= 0 else dim + 1)
        )

    @property
    def size(self) -> torch.Tensor:
        """(..., 2) width and height."""
        return self.data[..., :2]

    @property
    def f(self) -> torch.Tensor:
        """(..., 2) focal lengths in pixels."""
        return self.data[..., 2:4]

    @property
    def c(self) -> torch.Tensor:
        """(..., 2) principal point."""
        return self.data[..., 4:6]

    @property
    def dist(self) -> torch.Tensor:
        """(..., K) distortion coefficients."""
        return self.data[..., 6:]

    def scale(self, scales: float | tuple[float, float]) -> CameraTensor:
        """Return the cameras of images (or feature maps) resized by one factor, or by one for x and one for y."""
        s = self.data.new_tensor(scales if isinstance(scales, tuple) else (scales, scales))
        size, c = self.size * s, (self.c + 0.5) * s - 0.5
        return CameraTensor(torch.cat([size, self.f * s, c, self.dist], dim=-1), self.kind, self.limit)

    def crop(self, left_top: tuple[float, float], size: tuple[float, float]) -> CameraTensor:
        """Return the cameras of images cut to ``size`` = (width, height) from ``left_top`` = (x, y)."""
        c = self.c - self.data.new_tensor(left_top)
        new = self.data.new_tensor(size).expand_as(c)
        return CameraTensor(torch.cat([new, self.f, c, self.dist], dim=-1), self.kind, self.limit)

    def in_image(self, p2D: torch.Tensor) -> torch.Tensor:
        """Return (..., N) bool: points (..., N, 2) lie between the centres of the outermost pixels."""
        return ((p2D >= 0) & (p2D <= self.size[..., None, :] - 1)).all(-1)

    def project(self, p3D: torch.Tensor) -> Projection:
        """Return normalised points (..., N, 2), x / z and y / z, of camera points (..., N, 3); valid if in front."""
        z = p3D[..., 2:]
        return Projection(p3D[..., :2] / z.clamp(min=NEAR), z[..., 0] > NEAR)

    def J_project(self, p3D: torch.Tensor) -> torch.Tensor:
        """Return the derivative (..., N, 2, 3) of :meth:`project`, with the same limit of depth."""
        x, y, z = p3D.unbind(-1)
        z = z.clamp(min=NEAR)
        zero = torch.zeros_like(z)
        return torch.stack([1 / z, zero, -x / z**2, zero, 1 / z, -y / z**2], dim=-1).reshape(*z.shape, 2, 3)

    def distort(self, p2D: torch.Tensor, *, legacy: bool = False) -> Distorted:
        """Distort normalised points (..., N, 2); see :func:`kfloc_ros.geometry.distortion.distort`."""
        return distort(p2D, self.dist, self.kind, self.limit, legacy=legacy)

    def J_distort(self, p2D: torch.Tensor) -> torch.Tensor:
        """Return the derivative (..., N, 2, 2) of :meth:`distort`."""
        return distort_jacobian(p2D, self.dist, self.kind)

    def undistort(self, p2D: torch.Tensor) -> torch.Tensor:
        """Return normalised points (..., N, 2) that :meth:`distort` maps to ``p2D``, by Newton's method."""
        if self.kind is Distortion.NONE:
            return p2D
        xy = p2D
        for _ in range(UNDISTORT_STEPS):
            xy = xy - torch.linalg.solve(self.J_distort(xy), self.distort(xy).points - p2D)
        return xy

    def denormalize(self, p2D: torch.Tensor) -> torch.Tensor:
        """Return pixels of distorted normalised points."""
        return p2D * self.f[..., None, :] + self.c[..., None, :]

    def normalize(self, p2D: torch.Tensor) -> torch.Tensor:
        """Return distorted normalised points of pixels."""
        return (p2D - self.c[..., None, :]) / self.f[..., None, :]

    def J_denormalize(self) -> torch.Tensor:
        """Return the derivative (..., 1, 2, 2) of :meth:`denormalize`, the same for all points."""
        return torch.diag_embed(self.f)[..., None, :, :]

    def world2image(self, p3D: ArrayLike | torch.Tensor, *, legacy: bool = False) -> Projection:
        """Return pixels (..., N, 2) of camera points (..., N, 3) and their validity."""
        p2D, in_front = self.project(as_tensor(p3D, like=self.data))
        p2D, defined = self.distort(p2D, legacy=legacy)
        p2D = self.denormalize(p2D)
        return Projection(p2D, in_front & defined & self.in_image(p2D))

    def J_world2image(self, p3D: ArrayLike | torch.Tensor) -> ProjectionJacobian:
        """Return the derivative (..., N, 2, 3) of :meth:`world2image`, and the points for which it is defined."""
        p3D = as_tensor(p3D, like=self.data)
        p3D = p3D.to(torch.promote_types(p3D.dtype, self.dtype))
        p2D, in_front = self.project(p3D)
        J = self.f[..., None, :, None] * (self.J_distort(p2D) @ self.J_project(p3D))
        return ProjectionJacobian(J, in_front)

    def image2world(self, p2D: torch.Tensor) -> torch.Tensor:
        """Return rays (..., N, 3) with z = 1 through pixels (..., N, 2)."""
        xy = self.undistort(self.normalize(p2D))
        return torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)
