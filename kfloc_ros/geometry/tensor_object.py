# SPDX-License-Identifier: Apache-2.0
"""What batched geometric objects share: they are made of one tensor and are indexed, stacked and moved like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Self


class TensorObject:
    """An object per leading index of ``data`` (..., values of one object).

    Operations that take another object or points follow broadcasting of the leading dimensions.
    """

    data: torch.Tensor

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def _with(self, data: torch.Tensor) -> Self:
        """The same kind of object around other data; what else an object knows is carried along."""
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
        """Index the batch, as a tensor is indexed; the values of an object stay together."""
        index = index if isinstance(index, tuple) else (index,)
        tail = () if Ellipsis in [i for i in index if i is Ellipsis] else (Ellipsis,)
        return self._map(lambda data: data[(*index, *tail, slice(None))])

    @classmethod
    def stack(cls, objects: Sequence[Self], dim: int = 0) -> Self:
        """A batch of objects, along a new leading dimension."""
        dim = dim if dim >= 0 else dim - 1
        return objects[0]._with(torch.stack([o.data for o in objects], dim))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Another device or type, as ``torch.Tensor.to``."""
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
        """Let gradients reach the values of this object."""
        self.data.requires_grad_()
        return self

    def numpy(self) -> NDArray[np.floating[Any]]:
        """The values as an array on the CPU."""
        return np.asarray(self.data.detach().cpu().numpy())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype}, {self.device})"
