# SPDX-License-Identifier: Apache-2.0
"""What to replay, where to, and how. Needs no ROS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfloc_ros.bags.stream import BagStream, ReplayRange
from kfloc_ros.device import choose_device


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
