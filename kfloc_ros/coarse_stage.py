# SPDX-License-Identifier: Apache-2.0
"""The first stage, image to coarse pose: what KFNet does."""

from __future__ import annotations

import torch

from kfloc_ros.coarse_networks import networks_of
from kfloc_ros.device import choose_device
from kfloc_ros.features.trunk import Trunk
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.filter import SceneCoordinateFilter
from kfloc_ros.kfnet.fusion import NO_PRIOR, Filtered, FilterSettings, NisMode
from kfloc_ros.localizer_config import LocalizerConfig
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.solvers.pnp import solve_pnp
from kfloc_ros.stages import CoarseResult, Observation, observe, pnp_settings, timed
from kfloc_ros.types import FilterReport, Frame, Matrix, SceneCoordinates


class CoarseStage:
    """Trunk, the networks of the map's family, Kalman filter, RANSAC-PnP.

    Args:
        scene_map: of the place.
        config: options.
        trunk: to share with other stages; made here by default.
    """

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig, trunk: Trunk | None = None) -> None:
        device = choose_device(config.device)
        calibration = scene_map.calibration
        self._trunk = trunk or Trunk(device=device)
        self._networks = networks_of(scene_map, config.oflownet, device)
        self._camera = scene_map.camera
        self._use_filter = config.filter
        self._learns = config.filter and config.pose_feedback
        self._passed_by: tuple[int, Observation] | None = None
        self.note = self._networks.note if config.filter else ""
        """What of the configuration could not be had, in a sentence; empty if all could."""
        self._filter = SceneCoordinateFilter(
            FilterSettings(
                flow_temperature=calibration.flow_temperature,
                process_scale=self._networks.process_scale,
                process_floor_m2=self._networks.process_floor_m2,
                nis_threshold=config.nis_threshold,
                nis_mode=NisMode(config.nis_mode),
                max_gap_s=config.max_gap_s,
            ),
            self._networks.flow,
        )
        self._pnp = pnp_settings(config, self._networks.stride, calibration.coarse_covariance_scale)

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have (``ImageAdapter`` brings images to it)."""
        return self._camera

    def observe(self, frame: Frame) -> Observation:
        """Run the trunk.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        return observe(frame, self._camera, self._trunk)

    def process(self, frame: Frame, observation: Observation | None = None) -> CoarseResult:
        """Measure, filter, and solve for the coarse pose.

        A frame that was passed by just before is filtered first, so that the belief is one frame old and a bad picture,
        for which alone a track mostly ends, does not meet an older one or none.

        Args:
            frame: to localize.
            observation: of the frame, if the trunk has run.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        observation = observation or self.observe(frame)
        features, timings = observation.features, observation.timings_ms
        if self._passed_by is not None and self._use_filter:
            with timed(timings, "filter"), torch.inference_mode():
                stamp_ns, before = self._passed_by
                self._filtered(stamp_ns, before, self._networks.measure(before))
        self._passed_by = None
        with timed(timings, "measure"):
            measurement = self._networks.measure(observation)
        with timed(timings, "filter"), torch.inference_mode():
            filtered = self._filtered(frame.stamp_ns, observation, measurement)
        with timed(timings, "pnp"):
            pose = solve_pnp(filtered.posterior, self._camera, self._pnp)
        self._filter.judge(pose)
        return CoarseResult(
            frame.stamp_ns, pose, filtered.report, timings, features, filtered.posterior, measurement, filtered
        )

    def pass_by(self, stamp_ns: int, observation: Observation) -> None:
        """Take note of a frame that needs no coarse pose.

        The belief ends: the coarse pose that checks a track must know nothing of the poses before.
        """
        self._passed_by = (stamp_ns, observation)
        self._filter.reset("frames before were only tracked")

    def learn(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Take the refined pose of one of the last frames into account; it must be beyond doubt."""
        if self._learns:
            self._filter.learn(stamp_ns, self._camera, T_map_camera)

    def _filtered(self, stamp_ns: int, observation: Observation, measurement: SceneCoordinates) -> Filtered:
        if not self._use_filter:
            return Filtered(measurement, FilterReport("the filter is off", 0.0, NO_PRIOR, 0.0))
        return self._filter.step(stamp_ns, self._networks.flow_features(observation), measurement)

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        self._filter.reset(reason)
        self._passed_by = None
