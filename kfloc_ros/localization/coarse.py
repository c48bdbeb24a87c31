# SPDX-License-Identifier: Apache-2.0
"""Coarse half of the localizer, from an image to a coarse pose: KFNet's steps, one method each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from kfloc_ros.device import choose_device, prefers_int8
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone, BackboneFeatures
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.jobs import HELPERS
from kfloc_ros.kfnet.filter import SETTLED_S, FlowFunction, SceneCoordinateFilter
from kfloc_ros.kfnet.flow_network import flow_of
from kfloc_ros.kfnet.fusion import NO_PRIOR, Filtered, FilterSettings
from kfloc_ros.kfnet.pnp import solve_pnp
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
from kfloc_ros.kfnet.scoordnet import CellRegression, packed, quantized
from kfloc_ros.localization.config import LocalizerConfig, pnp_settings, recursion_of
from kfloc_ros.localization.depth import of_coarse
from kfloc_ros.localization.results import WHOLE, Ahead, CellPart, Measuring, StageTimes, WholeMeasurement
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import CoarsePose, FilterReport, Frame, Matrix, SceneCoordinates, check_frame


class CoarseStage:
    """Backbone, the networks of the map's family, Kalman filter, RANSAC-PnP.

    :class:`~kfloc_ros.localization.localizer.Localizer` calls the steps in order.

    Args:
        scene_map: map of the scene.
        config: options of the localizer.
        backbone: shared with other stages; None: a new one.
    """

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig, backbone: Backbone | None = None) -> None:
        device = choose_device(config.device)
        calibration = scene_map.calibration
        self.camera = scene_map.camera
        """Pinhole camera that every frame must have."""
        self.backbone = backbone or Backbone(device=device, runtime=config.runtime)
        self._networks = networks_of(scene_map, device, exact=config.runtime == "torch")
        self._use_filter, self._uses_depth = config.filter, config.use_depth
        self._corrects = config.filter and config.pose_feedback and recursion_of(scene_map, config) == "robust"
        self._alternates = config.filter and config.alternate_cells and recursion_of(scene_map, config) == "robust"
        self._part = WHOLE
        """Cells that were measured of the last frame."""
        self._turn, self._settled_until_ns = 0, 0
        self._measuring: Measuring | None = None
        """Measurement of the last frame."""
        self._without_pose: CoarsePose | None = None
        """Coarse pose of the last frame, if it failed."""
        self._skipped: tuple[Frame, BackboneFeatures] | None = None
        self._filter = SceneCoordinateFilter(filter_settings(scene_map, config, self._networks), self._networks.flow)
        self._pnp = pnp_settings(config, self._networks.stride, calibration.coarse_covariance_scale)

    @property
    def on_cpu(self) -> bool:
        """True if the networks run on the processor."""
        return self.backbone.device.type == "cpu"

    @property
    def runtime_note(self) -> str:
        """Run-time of the backbone with the reason for it; empty on a GPU."""
        return self.backbone.runtime_note

    def extract(self, frame: Frame, times: StageTimes) -> BackboneFeatures:
        """Run the backbone on a frame; see :func:`extract_features`."""
        return extract_features(frame, self.camera, self.backbone, times)

    def prepare(self, frame: Frame, *, measures: bool = True) -> Ahead:
        """Run the backbone, and begin to measure the cells that :meth:`measure` is likely to need if ``measures``.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        features = self.extract(frame, times := StageTimes())
        if not measures:
            return Ahead(times, features)
        if self._measuring is not None:  # of the frame before: what its turn is must be known
            self._measuring.help()
        expects_part = self._filter.is_confirmed or self._without_pose is not None
        part = self._next_part(frame.stamp_ns) if self._alternates and expects_part else WHOLE
        return Ahead(times, features, self._networks.begin(frame, features, self._cells(features, part)))

    def sharing(self, ahead: Ahead) -> AbstractContextManager[None]:
        """Return a context in which threads share the work on a frame; one that works ahead shares the measurement."""
        if not self._networks.is_divisible:
            return nullcontext()
        return HELPERS.sharing() if ahead.measuring is None else HELPERS.lending()

    def measure(
        self, frame: Frame, features: BackboneFeatures, times: StageTimes, ahead: Ahead | None = None
    ) -> SceneCoordinates:
        """Regress a scene coordinate and its variance for every cell (KFNet's measurement system).

        Where a belief that refined poses confirm covers the frame, a part of the cells is measured, and the belief
        carries the others: half of them, and a quarter once the poses of several frames in a row confirmed it. The
        parts take turns. After a frame without a coarse pose, a quarter comes first, and the others if it has one.
        """
        with times.stage("measure"):
            part, probes = WHOLE, self._without_pose is not None
            if self._alternates and (self._filter.covers(frame.stamp_ns) or probes):
                part = self._next_part(frame.stamp_ns)
                self._turn = part.turn
            self._part, until_ns = part, frame.stamp_ns + round(SETTLED_S * 1e9)
            self._settled_until_ns = until_ns if self._filter.is_settled_at(frame.stamp_ns) else 0
            cells = self._cells(features, part)
            measuring = ahead.measuring if ahead is not None else None
            self._measuring = measuring or self._networks.begin(frame, features, cells)
            times.add("measure", self._measuring.helped_s)  # before this frame's turn
        if self._networks.is_divisible and (measuring is not None or HELPERS.at_hand):
            with times.stage("filter"):
                flow = self._filter.begin_flow(frame.stamp_ns, self._networks.flow_features(frame, features))
                if measuring is None:
                    HELPERS.enlist(flow, self._measuring.help)
                else:  # the thread that prepared the frame measures meanwhile
                    flow()
        with times.stage("measure"):
            measured = self._measuring.coordinates(cells)
        if not probes:
            return measured
        with times.stage("pnp"):
            most, least = self._pnp.max_cells // 4, self._pnp.min_inliers // 4
            pose = solve_pnp(measured, self.camera, replace(self._pnp, max_cells=most, min_inliers=least))
        if not pose.success:
            self._without_pose, self._measuring = pose, None  # nothing is to be completed
            return measured
        self._without_pose, self._part = None, WHOLE
        with times.stage("measure"):
            return self._measuring.coordinates()

    def _next_part(self, stamp_ns: int) -> CellPart:
        """Return the cells to measure where the belief covers the frame."""
        # Allowed when the frame before was measured: prepare() runs beside the rest of that frame, and must agree.
        is_settled = stamp_ns <= self._settled_until_ns and self._filter.is_settled
        return CellPart(4 if is_settled or self._without_pose is not None else 2, (self._turn + 1) % 4)

    @staticmethod
    def _cells(features: BackboneFeatures, part: CellPart) -> torch.Tensor | None:
        """Return (h, w) bool, the cells of a part; None: all."""
        h, w = features.coarse.shape[2:]
        return part.mask(h, w, features.coarse.device)

    def fuse(
        self, frame: Frame, features: BackboneFeatures, measurement: SceneCoordinates, times: StageTimes
    ) -> Filtered:
        """Propagate the belief from the previous frame and fuse it with the measurement (KFNet's process system).

        A measurement of a part of the cells is completed if the belief proves wrong.

        A frame skipped just before is filtered first: a bad image, at which tracking ends, must meet a recent belief.
        """
        if not self._use_filter:
            self._skipped = None
            return Filtered(measurement, FilterReport("the filter is off", 0.0, NO_PRIOR, 0.0))
        with times.stage("filter"), torch.inference_mode():
            if self._skipped is not None:
                begun = self._networks.begin(*self._skipped)
                HELPERS.enlist(begun.help)
                self._step(*self._skipped, begun.coordinates())
                self._skipped = None
            filtered = self._step(frame, features, measurement)
            reason = filtered.report.reset_reason
            if not reason or self._part == WHOLE or self._measuring is None:
                return filtered
            self._filter.reset(reason)  # no belief stands for the cells that were left out
            return self._step(frame, features, self._measuring.coordinates())

    def solve(self, frame: Frame, filtered: Filtered, times: StageTimes) -> CoarsePose:
        """Solve RANSAC-PnP on the filtered scene coordinates; the filter takes note of the pose."""
        pose = self._without_pose
        if pose is None:
            with times.stage("pnp"):
                expected = self._filter.last_pose if self._use_filter else None
                pose = solve_pnp(filtered.posterior, self.camera, self._pnp, expected)
                if self._uses_depth and frame.depth_m is not None:
                    pose = of_coarse(frame.depth_m, filtered.posterior, pose, self.camera, self._pnp)
            self._without_pose = pose if self._alternates and not pose.success else None
        self._filter.accept_pose(pose)
        return pose

    def skip(self, frame: Frame, features: BackboneFeatures) -> None:
        """Remember a frame that needs no coarse pose, and reset the belief.

        The coarse pose that later checks the track must be independent of the tracked poses.
        """
        self._skipped, self._without_pose = (frame, features), None
        self._filter.reset("frames before were only tracked")

    def correct_belief(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Correct the belief by an accepted refined pose of one of the last frames.

        Args:
            stamp_ns: stamp of the frame.
            T_map_camera: refined pose of the frame, (4, 4).
        """
        if self._corrects:
            self._filter.correct_belief(stamp_ns, self.camera, T_map_camera)

    def warm_up(self, frame: Frame) -> None:
        """Run the steps of two frames before a wall, 2 m away, and reset.

        A frame of noise has no pose, and what follows a pose would be compiled when the first image arrives.
        """
        times, self._without_pose = StageTimes(), None  # as noise may have come before
        with HELPERS.lending():
            features = self.extract(frame, times)
        for stamp_ns in (frame.stamp_ns, frame.stamp_ns + 1):
            frame = replace(frame, stamp_ns=stamp_ns)
            measured = self.measure(frame, features, times)
            (_, h, w), offset = measured.mean.shape, measured.pixel_offset
            u = torch.arange(w) * measured.stride + offset - self.camera.cx
            v = torch.arange(h) * measured.stride + offset - self.camera.cy
            wall = torch.stack([*torch.meshgrid(2.0 * u / self.camera.fx, 2.0 * v / self.camera.fy, indexing="xy"),
                                torch.full((h, w), 2.0)])  # fmt: skip
            known = replace(
                measured, mean=wall.to(measured.mean), variance=torch.full_like(measured.variance, 1e-4),
                valid=torch.ones_like(measured.valid),
            )  # fmt: skip
            self.solve(frame, self.fuse(frame, features, known, times), times)
            self.correct_belief(stamp_ns, np.eye(4))
        self.reset("warm-up")

    def reset(self, reason: str) -> None:
        """Reset the belief and all that was carried over from earlier frames."""
        self._filter.reset(reason)
        self._skipped, self._measuring, self._turn, self._settled_until_ns = None, None, 0, 0
        self._without_pose = None

    def _step(self, frame: Frame, features: BackboneFeatures, measurement: SceneCoordinates) -> Filtered:
        return self._filter.step(frame.stamp_ns, self._networks.flow_features(frame, features), measurement)


def extract_features(frame: Frame, camera: Camera, backbone: Backbone, times: StageTimes) -> BackboneFeatures:
    """Run the backbone on a frame of the map's camera.

    Raises:
        FrameError: the image does not have the size of the map's camera.
    """
    check_frame(frame, camera)
    with times.stage("backbone"):
        return backbone.extract(frame.image)


class CoarseNetworks(Protocol):
    """Networks of a family, as the coarse stage uses them."""

    flow: FlowFunction
    """Backward flow between two results of :meth:`flow_features`."""
    process_scale: float
    process_floor_m2: float
    stride: int
    """Pixels of the map's camera per cell."""
    is_divisible: bool
    """True if threads can share a frame's measurement and flow, so that torch needs no threads of its own."""

    def begin(self, frame: Frame, features: BackboneFeatures, cells: torch.Tensor | None = None) -> Measuring:
        """Begin to measure a frame's scene coordinates; cells are in pixels of the map's camera.

        ``cells`` (h, w) bool are needed; None: all. A network that takes the image as a whole measures all.
        """
        ...

    def flow_features(self, frame: Frame, features: BackboneFeatures) -> torch.Tensor:
        """Return features (C, h, w) for the flow between two frames."""
        ...


def networks_of(scene_map: SceneMap, device: torch.device, *, exact: bool = False) -> CoarseNetworks:
    """Return the networks that a map was trained with.

    Args:
        scene_map: map of the scene.
        device: device of the networks.
        exact: never compute in int8.
    """
    if scene_map.kfnet is None:
        return FastNetworks(scene_map, device, exact=exact)
    return ReferencePair(scene_map, scene_map.kfnet, device)


def filter_settings(scene_map: SceneMap, config: LocalizerConfig, networks: CoarseNetworks) -> FilterSettings:
    """Return the settings of the filter for a map and its networks."""
    recursion = recursion_of(scene_map, config)
    calibrated = scene_map.calibration.flow_temperature, networks.process_scale, networks.process_floor_m2
    if recursion == "robust":
        return FilterSettings(*calibrated, nis_threshold=config.nis_threshold, max_gap_s=config.max_gap_s)
    return FilterSettings.published(
        *calibrated,
        nis_test=recursion == "published_nis",
        nis_threshold=config.nis_threshold,
        max_gap_s=config.max_gap_s,
    )


class FastNetworks:
    """Networks of the fast family: the map's head, and optical flow on the backbone's features."""

    stride = COARSE_STRIDE

    def __init__(self, scene_map: SceneMap, device: torch.device, *, exact: bool = False) -> None:
        self.is_divisible = device.type == "cpu"
        head = scene_map.head.to(device)
        self._head = quantized(head) if prefers_int8(device) and not exact else packed(head)
        self._calibration = scene_map.calibration
        chosen = flow_of(scene_map.calibration, device)
        self.flow = chosen.flow
        self.process_scale, self.process_floor_m2 = chosen.process_scale, chosen.process_floor_m2

    def begin(self, frame: Frame, features: BackboneFeatures, cells: torch.Tensor | None = None) -> Measuring:
        return CellRegression(self._head, features, self._calibration, cells)

    def flow_features(self, frame: Frame, features: BackboneFeatures) -> torch.Tensor:
        return features.coarse[0]


class ReferencePair:
    """Networks of the reference family: KFNet's own SCoordNet and OFlowNet, on the image itself."""

    is_divisible = False

    def __init__(self, scene_map: SceneMap, networks: ReferenceNetworks, device: torch.device) -> None:
        self._networks = networks.to(device)
        self._device = device
        self._adapter = ImageAdapter(scene_map.camera, networks.camera(scene_map.camera))
        self._times = scene_map.camera.width // self._adapter.target.width
        calibration = scene_map.calibration
        self._variance_scale = calibration.measurement_variance_scale
        self.stride = networks.stride(scene_map.camera)
        self.flow: FlowFunction = networks.oflownet.flow
        self.process_scale, self.process_floor_m2 = calibration.process_scale, calibration.process_floor_m2

    def begin(self, frame: Frame, features: BackboneFeatures, cells: torch.Tensor | None = None) -> Measuring:
        return WholeMeasurement(lambda: self._measured(frame))

    def _measured(self, frame: Frame) -> SceneCoordinates:
        measured = self._networks.scoordnet.measure(self._adapter(frame.image), self._variance_scale)
        first = (measured.pixel_offset + 0.5) * self._times - 0.5  # pixel centres have whole numbers
        return replace(measured, stride=self.stride, first_pixel=first)

    def flow_features(self, frame: Frame, features: BackboneFeatures) -> torch.Tensor:
        image = torch.from_numpy(self._adapter(frame.image)).to(self._device)
        own: torch.Tensor = self._networks.oflownet.features(image.permute(2, 0, 1)[None].float())
        return own[0]
