# SPDX-License-Identifier: Apache-2.0
"""The pipeline, Frame -> PoseEstimate: measure, filter, refine. Skeleton of the interfaces; being written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kfloc_ros.config import option
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.types import CoarsePose, FilterReport, Frame, PoseEstimate, SceneCoordinates

if TYPE_CHECKING:
    from kfloc_ros.features.trunk import TrunkFeatures
    from kfloc_ros.mapping.scene_map import SceneMap


@dataclass(frozen=True)
class LocalizerConfig:
    """Options of the whole pipeline."""

    device: str = option("auto", "Where networks run: auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda"))
    filter: bool = option(True, "Carry the belief over scene coordinates from frame to frame.")
    refine: bool = option(True, "Align the coarse pose with the map's reference views.")


@dataclass(frozen=True, eq=False)
class CoarseResult:
    """What the measure and filter stages hand to the refiner."""

    stamp_ns: int
    pose: CoarsePose
    filter: FilterReport
    timings_ms: Mapping[str, float]
    features: TrunkFeatures | None = None
    """None when the coarse pose came from another process: the refiner then runs the trunk itself."""
    scene_coordinates: SceneCoordinates | None = None


class CoarseStage:
    """Trunk, SCoordNet head, Kalman filter, RANSAC-PnP."""

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig) -> None: ...

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have (use ``ImageAdapter``)."""
        raise NotImplementedError

    def process(self, frame: Frame) -> CoarseResult:
        """Raises FrameError for an unusable frame."""
        raise NotImplementedError

    def reset(self, reason: str) -> None: ...


class RefineStage:
    """Reference selection, feature-metric alignment, state and covariance."""

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig) -> None: ...

    def process(self, frame: Frame, coarse: CoarseResult) -> PoseEstimate:
        raise NotImplementedError

    def reset(self, reason: str) -> None: ...


class Localizer:
    """Both stages in one process."""

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig | None = None) -> None:
        config = config or LocalizerConfig()
        self.coarse = CoarseStage(scene_map, config)
        self.refine = RefineStage(scene_map, config)

    @property
    def camera(self) -> Camera:
        return self.coarse.camera

    def process(self, frame: Frame) -> PoseEstimate:
        return self.refine.process(frame, self.coarse.process(frame))

    def reset(self, reason: str) -> None:
        self.coarse.reset(reason)
        self.refine.reset(reason)
