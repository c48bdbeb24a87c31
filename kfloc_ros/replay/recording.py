# SPDX-License-Identifier: Apache-2.0
"""What to replay and how, what the agent saw of it, and its JSON form. Needs no ROS."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.bags.stream import BagStream, ReplayRange
from kfloc_ros.device import choose_device
from kfloc_ros.geometry.lie import make_pose, quaternion_to_matrix
from kfloc_ros.types import Matrix


@dataclass(frozen=True)
class ReplayConfig:
    """What to play, where to, and how."""

    bag: Path
    map: str
    out: Path
    rate: float = 1.0
    separate: bool = False
    """Three processes (camera, filter, refiner) instead of one."""
    start_s: float = 0.0
    duration_s: float | None = None
    loops: int = 1
    """How often the part is played; each time the clock jumps back, as `ros2 bag play --loop` has it."""
    every_frame: bool = False
    """Play the next image only when the last one is answered, so that none is dropped."""
    image_topic: str | None = None
    """Which images to play where the bag has several."""
    info_topic: str | None = None
    """Which camera_info, where that does not follow from the images."""
    tf: str | None = None
    """Namespace of the transforms, such as ``/robot1``, where the bag has those of several robots."""
    rectified: bool | None = None
    """The images are rectified; None: as the name of their topic says."""
    device: str = "auto"
    filter: bool = True
    refine: bool = True
    patience_s: float = 90.0
    """How long the nodes may take to come up."""
    domain_id: int | None = None
    base_frame: str = ""
    """The frame whose pose the nodes publish; the bag's TF is played and leads from it to the camera.
    Empty: the camera's own, and no TF."""
    truth: str | None = None
    """See :func:`kfloc_ros.bags.truth.read_truth`."""
    truth_of: str | None = None
    """The frame that the truth is of, where it is not the camera's."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes to start; see ``kfloc_ros.nodes.executables``."""
        return ("camera_node", "filter_node", "refiner_node") if self.separate else ("localizer",)

    @property
    def part(self) -> ReplayRange:
        """The part of the bag that is played."""
        return ReplayRange(self.start_s, self.duration_s)

    def open(self) -> BagStream:
        """The bag, with the topics that are chosen. Raises SourceError."""
        return BagStream(self.bag, image_topic=self.image_topic, info_topic=self.info_topic, tf=self.tf)

    def played(self, stream: BagStream) -> dict[str, Any]:
        """What of the bag is played and how it is worked on, for the summary's ``options``."""
        return {
            "image_topic": stream.image.name,
            "camera_info_topic": stream.info.name,
            "rectified": self.is_rectified(stream),
            "start_s": self.start_s,
            "played_s": self.duration_s,
            "loops": self.loops,
            "device": str(choose_device(self.device)),
            "filter": self.filter,
            "refine": self.refine,
        }

    def is_rectified(self, stream: BagStream) -> bool:
        """Whether the images are rectified already."""
        return stream.rectified if self.rectified is None else self.rectified


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
