# SPDX-License-Identifier: Apache-2.0
"""``localizer``: camera, filter and refiner in one node, and the pose output that ``refiner_node`` shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from rclpy.node import Node

from kfloc_ros.device import choose_device
from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.localization.place_localizer import AnyLocalizer, localizer_for, preparer
from kfloc_ros.localization.results import Ahead, Localization
from kfloc_ros.localization.rig import RigLocalizer, RigView
from kfloc_ros.maps.place import AnyMap, MapInfo, single_map
from kfloc_ros.messages.transforms import TransformUnknownError
from kfloc_ros.nodes.camera import ImageReceiver
from kfloc_ros.nodes.diagnostics import NO_IMAGES, OFF, DiagnosticsPublisher, Report, StatusPublisher
from kfloc_ros.nodes.handover import CameraFrame, CoarseFrame, CoarsePublisher
from kfloc_ros.nodes.health import WARN, Health
from kfloc_ros.nodes.initial_pose import InitialPoseInput
from kfloc_ros.nodes.managed_node import RESET, tell_runtime, warm_up
from kfloc_ros.nodes.parameter_server import ParameterServer
from kfloc_ros.nodes.pose_file import PosePersistence
from kfloc_ros.nodes.pose_publisher import PosePublisher
from kfloc_ros.nodes.transforms import TransformListener
from kfloc_ros.nodes.views import Collecting, Localized, MapPublisher, cell_publisher, overlay_publisher
from kfloc_ros.nodes.worker import WENT_BACKWARDS, EnableSwitch, LatestQueue, LatestWorker, TimeWatch, reported_error
from kfloc_ros.types import Matrix, PoseEstimate, TrackingState
from kfloc_ros.visualization.overlay import OverlayPainter


@dataclass(frozen=True, eq=False)
class Starts:
    """Start poses ``T_map_camera`` (4, 4) of a frame."""

    hints: list[Matrix]
    """From ``initialpose`` or the saved pose."""
    predicted: Matrix | None
    """By odometry from the last pose; None if it is not known."""


class PoseOutput:
    """Publisher of localizations on ``pose``, ``/tf``, ``path``, ``status``, ``overlay`` and ``/diagnostics``.

    It also holds the start poses for a frame: ``initialpose`` and the saved pose.
    """

    def __init__(
        self,
        node: Node,
        parameters: ParameterServer,
        scene_map: MapInfo,
        localizer: AnyLocalizer,
        health: Health,
        switch: EnableSwitch,
        reset: Callable[[str], None] | None = None,
    ) -> None:
        self._localizer, self._health, self._switch = localizer, health, switch
        self._reset = reset or localizer.reset
        map_frame = parameters.node.map_frame or scene_map.frame_id
        listener = TransformListener(node, health.warn, reliability=parameters.node.tf_reliability)
        self.poses = PosePublisher(node, parameters, map_frame, listener, health, switch)
        self._persistence = PosePersistence(node, parameters, scene_map, health) if parameters.node.pose_file else None
        self._initial = InitialPoseInput(
            node, parameters, map_frame, scene_map.references.T_map_camera, listener, health
        )
        self._status = StatusPublisher(node, scene_map.name, health)
        self._watch = TimeWatch(node)
        self._map = MapPublisher(node, scene_map, map_frame, switch)
        options = parameters.localizer
        painter = OverlayPainter(
            lambda: localizer.references,
            scene_map.camera,
            count=options.num_references,
            device=choose_device(options.device),
        )
        self._overlay = overlay_publisher(node, painter, health.warn)
        self._diagnostics = DiagnosticsPublisher(node, health, switch, scene_map.name, self._report)

    def begin(self, camera_frame: CameraFrame) -> Starts:
        """Reset if time or a service demands it, and return the start poses of the frame; once per frame."""
        stamp_ns = camera_frame.frame.stamp_ns
        reason = self._watch.reset_reason(stamp_ns)
        if reason:
            self.reset(reason)
        hints: list[Matrix] = []
        if self._initial.waiting is not None:
            hints = self._initial.take(camera_frame.frame_id, stamp_ns, self.poses.last)
            self.poses.allow_jump()
        if not hints and self._persistence is not None:
            hints = self._persistence.take()
        return Starts(hints, self.poses.predict(camera_frame.frame_id, stamp_ns))

    def publish(self, camera_frame: CameraFrame, localization: Localization) -> PoseEstimate:
        """Publish the result of a frame; in the thread that calls :meth:`begin`.

        Returns:
            The estimate as published; DEGRADED if the odometry contradicts it.
        """
        estimate = localization.estimate
        if self._initial.tried is not None:
            self._initial.judge(estimate.T_map_camera is not None)
        start = time.perf_counter()
        outcome = self.poses.publish(estimate, camera_frame.frame_id)
        publish_ms = 1e3 * (time.perf_counter() - start)
        if outcome.suspect:
            estimate = replace(estimate, state=TrackingState.DEGRADED, reason=outcome.suspect)
        if self._persistence is not None:
            self._persistence.offer(estimate)
        if self._localizer.camera_note:
            self._health.warn(f"The camera does not fit: {self._localizer.camera_note}.")
        latency_ms = camera_frame.latency_ms()
        self._health.count_processed(latency_ms)
        self._status.publish(camera_frame, estimate, outcome, publish_ms, latency_ms)
        self._overlay.offer(Localized(camera_frame, estimate, localization.features))
        return estimate

    def _report(self) -> Report:
        """Return the report for ``/diagnostics``, which also tells of a second localizer; once a second."""
        report, rival = self._status.report, self.poses.rival()
        if not self._switch.is_on:
            self._status.send_state(OFF)
        elif not self._health.receives:
            self._status.send_state(NO_IMAGES)
        if not rival:
            return report
        self._health.warn(rival)
        return replace(report, level=max(report.level, WARN), message=rival)

    def request_reset(self, reason: str) -> None:
        """Request that the next frame starts without a prior. Thread-safe."""
        self._watch.request_reset(reason)
        self.poses.allow_jump()
        if reason == RESET:  # at once: there may never be another frame
            self.poses.reset_pose()
            if self._persistence is not None:
                self._persistence.delete()

    def reset(self, reason: str) -> None:
        """Discard the state carried over from earlier frames; in the thread that calls :meth:`begin`."""
        self._reset(reason)
        if reason in (RESET, WENT_BACKWARDS):
            self.poses.reset()

    def pause(self) -> None:
        """Wait until the current overlay is published; after the last frame."""
        self._overlay.pause()

    def stop(self) -> None:
        """Save the last pose and end the threads; after the last frame."""
        self._overlay.stop()
        if self._persistence is not None:
            self._persistence.stop()


@dataclass(frozen=True, eq=False)
class Prepared:
    """Frame with what another thread computed of it, beside the frame before."""

    camera_frame: CameraFrame
    ahead: Ahead | None

    def help(self) -> None:
        """Compute a share of the frame's measurement."""
        if self.ahead is not None:
            self.ahead.help()


class LocalizerStage:
    """Localizer on every frame, in a thread of its own; the camera's thread decodes the next one meanwhile.

    On a processor with a second core, that thread also runs the networks on it. The results are the same.
    """

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch) -> None:
        health = Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._localizer = localizer_for(scene_map, parameters.localizer)
        self._prepare_ahead = preparer(self._localizer)
        tell_runtime(health, self._localizer.runtime_note)
        map_frame = parameters.node.map_frame or scene_map.frame_id
        self._publish_coarse = CoarsePublisher(node, map_frame, lambda: health.counters, for_refiner=False)
        self._output = PoseOutput(node, parameters, scene_map, self._localizer, health, switch)
        self._cells = cell_publisher(node, map_frame, health.warn)
        self._collecting = Collecting(parameters.node, scene_map, health.warn)
        self._queue = LatestQueue("localizer", health, switch, parameters, self._process, self._localizer.reset)
        self._jumps = TimeWatch(node, on_jump=self._queue.discard)
        # The camera comes last: once its subscriptions are visible, everything else is ready.
        self._camera = ImageReceiver(node, parameters, self._localizer.camera, health, switch, self._prepare)

    def pause(self) -> None:
        self._camera.pause()
        self._queue.pause()
        self._cells.pause()
        self._output.pause()

    def stop(self) -> None:
        self._camera.stop()
        self._queue.stop()
        self._cells.stop()
        self._output.stop()
        self._collecting.stop()

    def request_reset(self, reason: str) -> None:
        self._camera.reset()
        self._output.request_reset(reason)

    def _prepare(self, camera_frame: CameraFrame) -> None:
        with self._queue.helpers():
            ahead = None if self._prepare_ahead is None else self._prepare_ahead(camera_frame.frame)
        self._queue.hand_over(prepared := Prepared(camera_frame, ahead), prepared.help)

    def _process(self, prepared: Prepared) -> None:
        camera_frame = prepared.camera_frame
        starts = self._output.begin(camera_frame)
        localization = self._localizer.process(
            camera_frame.frame, starts.hints, predicted=starts.predicted, ahead=prepared.ahead, correct=False
        )
        estimate = self._output.publish(camera_frame, localization)  # the pose first
        self._localizer.correct_belief(estimate.stamp_ns, estimate.refined_pose)
        self._collecting.offer(camera_frame.frame, estimate, starts.predicted)
        if localization.coarse is not None:
            coarse = CoarseFrame(camera_frame, localization.coarse)
            self._publish_coarse(coarse)
            self._cells.offer(coarse)


@dataclass(frozen=True, eq=False)
class _RigFrame:
    camera_frame: CameraFrame
    view: RigView


class RigStage:
    """Several cameras on one body: one pose from all images that are near in time, in a thread of its own."""

    def __init__(self, node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch) -> None:
        scene_map, names = single_map(scene_map), parameters.node.camera_names
        self._parameters, self._names, self._health = parameters, names, Health(node.get_logger())
        warm_up(scene_map, parameters.localizer)
        self._rig = RigLocalizer(scene_map, parameters.localizer, len(names))
        tell_runtime(self._health, self._rig.localizers[0].runtime_note)
        first = self._rig.localizers[0]
        self._output = PoseOutput(node, parameters, scene_map, first, self._health, switch, reset=self._rig.reset)
        self._lock, self._waiting = threading.Condition(), dict[int, CameraFrame]()
        self._worker: LatestWorker[bool] = LatestWorker("rig", lambda _: self._process(), self._on_error)
        self._cameras = [
            ImageReceiver(
                node, parameters, first.camera, self._health, switch, partial(self._arrive, number),
                on_failure=self._rig.reset, name=name,
            )
            for number, name in enumerate(names)
        ]  # fmt: skip

    def pause(self) -> None:
        for camera in self._cameras:
            camera.pause()
        self._worker.pause()
        self._output.pause()

    def stop(self) -> None:
        for camera in self._cameras:
            camera.stop()
        self._worker.stop()
        self._output.stop()

    def request_reset(self, reason: str) -> None:
        for camera in self._cameras:
            camera.reset()
        self._output.request_reset(reason)

    def _arrive(self, number: int, camera_frame: CameraFrame) -> None:
        with self._lock:
            if number in self._waiting:
                self._health.count("dropped")
            self._waiting[number] = camera_frame
            self._lock.notify_all()
        self._worker.submit(True)

    def _take(self) -> dict[int, CameraFrame]:
        """Return the newest images that are near in time, after a short wait for cameras that lack one."""
        window_s = self._parameters.node.rig_window_s
        with self._lock:
            self._lock.wait_for(lambda: len(self._waiting) == len(self._names), window_s)
            taken, self._waiting = self._waiting, {}
        newest_ns = max((item.frame.stamp_ns for item in taken.values()), default=0)
        near = {k: item for k, item in taken.items() if newest_ns - item.frame.stamp_ns <= window_s * 1e9}
        for _ in range(len(taken) - len(near)):
            self._health.count("dropped")
        return near

    def _process(self) -> None:
        views = [view for k, item in self._take().items() if (view := self._view(k, item)) is not None]
        if not views:
            return
        newest = max(views, key=lambda view: view.camera_frame.frame.stamp_ns)
        stamp_ns = newest.camera_frame.frame.stamp_ns
        starts = self._output.begin(newest.camera_frame)
        to_base = inverse_pose(newest.view.T_base_camera)
        result = self._rig.process(
            [item.view for item in views],
            [T @ to_base for T in starts.hints],
            None if starts.predicted is None else starts.predicted @ to_base,
            [self._output.poses.motion(item.camera_frame.frame.stamp_ns, stamp_ns) for item in views],
        )
        totals = {
            f"camera_{self._names[item.view.camera]}": found.estimate.timings_ms.get("total", 0.0)
            for item, found in zip(views, result.views, strict=True)
        }
        estimate = result.localization.estimate
        timings = {**estimate.timings_ms, **totals, "total": sum(totals.values())}
        localization = replace(result.localization, estimate=replace(estimate, timings_ms=timings))
        published = self._output.publish(newest.camera_frame, localization)
        for _ in range(len(views) - 1):
            self._health.count("processed")
        if published.state is TrackingState.TRACKING:
            self._rig.correct_belief([item.view for item in views], result)

    def _view(self, number: int, camera_frame: CameraFrame) -> _RigFrame | None:
        """Return the image with its mount, or None where TF does not know it."""
        try:
            mount = self._output.poses.mount(camera_frame.frame_id, camera_frame.frame.stamp_ns)
        except TransformUnknownError as error:
            self._health.warn(f"The images of camera '{self._names[number]}' are not used. {error}")
            self._health.count("refused")
            return None
        return _RigFrame(camera_frame, RigView(number, camera_frame.frame, mount))

    def _on_error(self, error: Exception) -> None:
        self._health.fault(reported_error(error, self._parameters))
        if not isinstance(error, FrameError):
            self._rig.reset("an internal error")


def localizer_stage(
    node: Node, parameters: ParameterServer, scene_map: AnyMap, switch: EnableSwitch
) -> LocalizerStage | RigStage:
    """Return the stage of ``localizer``: of a rig if ``cameras`` names one, else of a single camera."""
    stage = RigStage if parameters.node.camera_names else LocalizerStage
    return stage(node, parameters, scene_map, switch)


localizer_stage.IS_WHOLE = True  # type: ignore[attr-defined]
"""The node needs no other node."""
