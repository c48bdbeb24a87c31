# SPDX-License-Identifier: Apache-2.0
"""What the agent saw of a replay, and its JSON form. Needs no ROS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix
from kfloc_ros.types import Matrix


@dataclass(frozen=True)
class Played:
    """One image that was published. Times of this machine are nanoseconds of the monotonic clock."""

    stamp_ns: int
    sent_ns: int


@dataclass(frozen=True)
class PoseSeen:
    """One PoseWithCovarianceStamped that arrived."""

    stamp_ns: int
    received_ns: int
    frame_id: str
    xyz: tuple[float, ...]
    xyzw: tuple[float, ...]
    covariance: tuple[float, ...]
    """Row by row, 36 numbers."""

    @property
    def T_map_body(self) -> Matrix:
        """(4, 4). Raises ValueError where the message held no rotation."""
        return make_pose(quaternion_to_matrix(self.xyzw), self.xyz)

    @property
    def covariance_matrix(self) -> Matrix:
        """(6, 6) in the order of :mod:`kfloc_ros.types`."""
        return np.array(self.covariance, dtype=np.float64).reshape(6, 6)


@dataclass(frozen=True)
class StatusSeen:
    """One per-frame status that arrived."""

    stamp_ns: int
    received_ns: int
    values: Mapping[str, str]


@dataclass(frozen=True)
class TransformSeen:
    """One transform from the map's frame that arrived on /tf."""

    child: str
    stamp_ns: int
    xyz: tuple[float, ...]
    xyzw: tuple[float, ...]

    @property
    def T_map_child(self) -> Matrix:
        """(4, 4). Raises ValueError where the message held no rotation."""
        return make_pose(quaternion_to_matrix(self.xyzw), self.xyz)


@dataclass
class Recording:
    """Everything that was published and received, in order of arrival."""

    played: list[Played] = field(default_factory=list)
    poses: list[PoseSeen] = field(default_factory=list)
    coarse: list[PoseSeen] = field(default_factory=list)
    status: list[StatusSeen] = field(default_factory=list)
    transforms: dict[str, int] = field(default_factory=dict)
    """Transforms received on /tf, counted by ``parent -> child``."""
    map_transforms: list[TransformSeen] = field(default_factory=list)
    """Those of them whose parent is the map."""
    diagnostics: dict[str, dict[str, str]] = field(default_factory=dict)
    """The last values of every name on /diagnostics."""

    def save(self, path: Path) -> None:
        """Write the JSON form."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Read the JSON form."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            played=[Played(**item) for item in data["played"]],
            poses=[PoseSeen(**_tuples(item)) for item in data["poses"]],
            coarse=[PoseSeen(**_tuples(item)) for item in data["coarse"]],
            status=[StatusSeen(**item) for item in data["status"]],
            transforms=data["transforms"],
            map_transforms=[TransformSeen(**_tuples(item)) for item in data["map_transforms"]],
            diagnostics=data["diagnostics"],
        )


def _tuples(item: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
