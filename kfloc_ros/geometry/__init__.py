# SPDX-License-Identifier: Apache-2.0
"""Cameras, poses and the Lie maps; ``Pose`` and ``Camera`` are the batched ones, on tensors.

The camera of a frame or a map, a value object without torch, is ``kfloc_ros.geometry.camera.Camera``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfloc_ros.geometry.camera_tensor import CameraTensor as Camera
    from kfloc_ros.geometry.tensors import Pose

__all__ = ["Camera", "Pose"]


def __getattr__(name: str) -> Any:
    """Import the batched objects when they are asked for, since they need torch."""
    if name == "Pose":
        from kfloc_ros.geometry.tensors import Pose

        return Pose
    if name == "Camera":
        from kfloc_ros.geometry.camera_tensor import CameraTensor

        return CameraTensor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
