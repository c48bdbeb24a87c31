# SPDX-License-Identifier: Apache-2.0
"""Base of batched geometric objects made of one tensor, and rigid transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Self
from typing import NamedTuple

from numpy.typing import ArrayLike

from kfloc_ros.geometry.lie import quaternion_to_matrix


def so3_exp_torch(v: torch.Tensor) -> torch.Tensor:
    """Return rotation matrices (..., 3, 3) of rotation vectors (..., 3); differentiable, also at zero."""
    angle_sq = (v * v).sum(-1)[..., None, None]
    small = angle_sq < 1e-12
    safe = torch.where(small, torch.ones_like(angle_sq), angle_sq)
    angle = safe.sqrt()
    a = torch.where(small, 1.0 - angle_sq / 6.0, angle.sin() / angle)
    b = torch.where(small, 0.5 - angle_sq / 24.0, (1.0 - angle.cos()) / safe)
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    K = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*v.shape[:-1], 3, 3)
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    return eye + a * K + b * (K @ K)


class TensorObject:
    """Batch of objects in one tensor ``data`` (..., values of one object), indexed, stacked and moved like it.

    Operations that take another object or points broadcast the leading dimensions.
    """

    data: torch.Tensor

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def _with(self, data: torch.Tensor) -> Self:
        """Return an object of the same kind with other data; all other attributes are kept."""
        return type(self)(data)

    def _map(self, function: Any) -> Self:
        return self._with(function(self.data))

    @property
    def shape(self) -> torch.Size:
        """Shape of the batch."""
        return self.data.shape[:-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Self:
        """Index the batch as a tensor; the values of an object stay together."""
        index = index if isinstance(index, tuple) else (index,)
        tail = () if Ellipsis in [i for i in index if i is Ellipsis] else (Ellipsis,)
        return self._map(lambda data: data[(*index, *tail, slice(None))])

    @classmethod
    def stack(cls, objects: Sequence[Self], dim: int = 0) -> Self:
        """Return a batch of objects along a new leading dimension."""
        dim = dim if dim >= 0 else dim - 1
        return objects[0]._with(torch.stack([o.data for o in objects], dim))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make ``torch.stack`` of such objects their :meth:`stack`; torch calls this."""
        if function is torch.stack:
            return cls.stack(*args, **(kwargs or {}))
        return NotImplemented

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the object on another device or in another type, as ``torch.Tensor.to``."""
        return self._map(lambda data: data.to(*args, **kwargs))

    def cpu(self) -> Self:
        return self.to("cpu")

    def cuda(self) -> Self:
        return self.to("cuda")

    def half(self) -> Self:
        return self.to(torch.float16)

    def float(self) -> Self:
        return self.to(torch.float32)

    def double(self) -> Self:
        return self.to(torch.float64)

    def detach(self) -> Self:
        return self._map(lambda data: data.detach())

    def pin_memory(self) -> Self:
        return self._map(lambda data: data.pin_memory())

    def requires_grad_(self) -> Self:
        """Enable gradients for the values of this object."""
        self.data.requires_grad_()
        return self

    def numpy(self) -> NDArray[np.floating[Any]]:
        """Return the values as an array on the CPU."""
        return np.asarray(self.data.detach().cpu().numpy())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"


class Magnitude(NamedTuple):
    """Rotation angle and distance of a transform."""

    angle_deg: torch.Tensor
    distance_m: torch.Tensor


class Pose(TensorObject):
    """Rigid transforms p' = R p + t; ``data`` is (..., 12): R row by row, then t.

    A pose named ``T_a_b`` maps points of b to a.
    """

    def __init__(self, data: torch.Tensor) -> None:
        if data.shape[-1:] != (12,):
            raise ValueError(f"A Pose holds 12 numbers, got a tensor of shape {tuple(data.shape)}.")
        super().__init__(data)

    @classmethod
    def from_Rt(cls, R: ArrayLike | torch.Tensor, t: ArrayLike | torch.Tensor) -> Pose:
        """Return poses of rotations (..., 3, 3) and translations (..., 3)."""
        R, t = as_tensor(R), as_tensor(t)
        if R.shape[-2:] != (3, 3) or t.shape[-1:] != (3,):
            raise ValueError(f"A Pose takes R (..., 3, 3) and t (..., 3), got {tuple(R.shape)} and {tuple(t.shape)}.")
        rows = R.reshape(*R.shape[:-2], 9)
        batch = (rows[..., 0] + t[..., 0]).shape
        return cls(torch.cat([rows.expand(*batch, 9), t.expand(*batch, 3)], dim=-1))

    @classmethod
    def from_aa(cls, rotation_vector: ArrayLike | torch.Tensor, t: ArrayLike | torch.Tensor) -> Pose:
        """Return poses of rotation vectors (..., 3), radians, and translations (..., 3); not the map of SE(3)."""
        return cls.from_Rt(so3_exp_torch(as_tensor(rotation_vector)), t)

    @classmethod
    def from_4x4mat(cls, T: ArrayLike | torch.Tensor) -> Pose:
        """Return poses of matrices (..., 4, 4)."""
        T = as_tensor(T)
        return cls.from_Rt(T[..., :3, :3], T[..., :3, 3])

    @classmethod
    def from_colmap(cls, qvec: ArrayLike, tvec: ArrayLike) -> Pose:
        """Return the pose of COLMAP's quaternion (w, x, y, z) and translation, which map the world to the camera."""
        w, x, y, z = np.asarray(qvec, dtype=np.float64)
        return cls.from_Rt(quaternion_to_matrix([x, y, z, w]), np.asarray(tvec, dtype=np.float64))

    @classmethod
    def identity(cls, *batch: int, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Pose:
        """Return identity transforms."""
        eye = torch.eye(3, dtype=dtype, device=device)
        return cls.from_Rt(eye.expand(*batch, 3, 3), eye.new_zeros(*batch, 3))

    @property
    def R(self) -> torch.Tensor:
        """Rotations (..., 3, 3)."""
        return self.data[..., :9].reshape(*self.shape, 3, 3)

    @property
    def t(self) -> torch.Tensor:
        """Translations (..., 3)."""
        return self.data[..., 9:]

    def inv(self) -> Pose:
        """Return the inverse transforms."""
        Rt = self.R.mT
        return Pose.from_Rt(Rt, -(Rt @ self.t[..., None])[..., 0])

    def compose(self, other: Pose) -> Pose:
        """Return the product: ``T_a_b.compose(T_b_c)`` is ``T_a_c``; of two types, the more precise one."""
        dtype = torch.promote_types(self.dtype, other.dtype)
        self, other = self.to(dtype), other.to(dtype)
        return Pose.from_Rt(self.R @ other.R, self.t + (self.R @ other.t[..., None])[..., 0])

    def __matmul__(self, other: Pose) -> Pose:
        return self.compose(other)

    def transform(self, points: ArrayLike | torch.Tensor) -> torch.Tensor:
        """Map points (..., N, 3) from every pose's source frame to its target frame.

        The result has the more precise type of the two.
        """
        points = as_tensor(points, like=self.data)
        dtype = torch.promote_types(points.dtype, self.dtype)
        return points.to(dtype) @ self.R.mT.to(dtype) + self.t[..., None, :]

    def __mul__(self, points: ArrayLike | torch.Tensor) -> torch.Tensor:
        return self.transform(points)

    def J_transform(self, transformed: torch.Tensor) -> torch.Tensor:
        """Return the derivative (..., N, 3, 6) of transformed points by a left perturbation (dt, dw).

        p'' = Exp(dw) p' + dt, so the derivative is [I | -[p']_x].
        """
        x, y, z = transformed.unbind(-1)
        zero = torch.zeros_like(x)
        minus_skew = torch.stack([zero, z, -y, -z, zero, x, y, -x, zero], dim=-1).reshape(*x.shape, 3, 3)
        eye = torch.eye(3, dtype=transformed.dtype, device=transformed.device).expand_as(minus_skew)
        return torch.cat([eye, minus_skew], dim=-1)

    def retract(self, delta: torch.Tensor) -> Pose:
        """Return the left update by (..., 6) = (dt, dw): p' = Exp(dw) (R p + t) + dt."""
        return Pose.from_aa(delta[..., 3:], delta[..., :3]) @ self

    def magnitude(self) -> Magnitude:
        """Return angle and distance; accurate near zero also in single precision."""
        R = self.R
        axis = torch.stack(
            [R[..., 2, 1] - R[..., 1, 2], R[..., 0, 2] - R[..., 2, 0], R[..., 1, 0] - R[..., 0, 1]], dim=-1
        )
        trace = R.diagonal(dim1=-2, dim2=-1).sum(-1)
        return Magnitude(torch.atan2(axis.norm(dim=-1), trace - 1).rad2deg(), self.t.norm(dim=-1))

    def matrix(self) -> torch.Tensor:
        """Return the matrices (..., 4, 4)."""
        last = self.data.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*self.shape, 1, 4)
        return torch.cat([torch.cat([self.R, self.t[..., None]], dim=-1), last], dim=-2)

    def matrix_numpy(self) -> NDArray[np.float64]:
        """Return the matrices (..., 4, 4) as float64 on the CPU."""
        return np.asarray(self.matrix().detach().cpu().double().numpy())


def as_tensor(values: ArrayLike | torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return tensors unchanged; convert anything else in its own floating type, or in that of ``like``."""
    if isinstance(values, torch.Tensor):
        return values
    array: NDArray[Any] = np.asarray(values)
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float64)
    tensor = torch.from_numpy(array)
    return tensor if like is None else tensor.to(like)
