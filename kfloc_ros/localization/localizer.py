# SPDX-License-Identifier: Apache-2.0
"""The method: a frame goes through the backbone once, and two stages make a pose of it.

The coarse stage measures a scene coordinate for every cell of the image (SCoordNet), fuses the measurements with what
earlier frames said about the same surfaces (OFlowNet, Kalman filter), and solves for the camera's pose (RANSAC-PnP).
The refine stage aligns that pose with the map's reference views (PixLoc), searches the map where that fails, and says
what the result is worth; the filter learns from it what its cells cannot tell each other. While a track holds, the
refine stage starts from the predicted pose, and the coarse stage rests.
"""

from __future__ import annotations

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.localization.coarse import CoarseStage
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.refine import RefineStage
from kfloc_ros.localization.stages import CoarseSteps, RefineSteps
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, PoseEstimate


class Pipeline:
    """Both stages, one after the other: frames to poses."""

    coarse: CoarseSteps
    refine: RefineSteps

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have."""
        return self.coarse.camera

    def process(self, frame: Frame) -> PoseEstimate:
        """Localize one frame.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        observation = self.coarse.observe(frame)
        tracked = self.refine.track(frame, observation)
        if tracked is not None:
            self.coarse.pass_by(frame.stamp_ns, observation)
            return tracked
        estimate = self.refine.process(frame, self.coarse.process(frame, observation))
        if estimate.refined_pose is not None:
            self.coarse.learn(frame.stamp_ns, estimate.refined_pose)
        return estimate

    def reset(self, reason: str) -> None:
        """Forget all earlier frames."""
        self.coarse.reset(reason)
        self.refine.reset(reason)


class Localizer(Pipeline):
    """Both stages for one map.

    Args:
        scene_map: of the place.
        config: options; the defaults are meant to be right.
    """

    coarse: CoarseStage
    refine: RefineStage

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig | None = None) -> None:
        config = config or LocalizerConfig()
        self.coarse = CoarseStage(scene_map, config)
        self.refine = RefineStage(scene_map, config)
