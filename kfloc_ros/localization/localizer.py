# SPDX-License-Identifier: Apache-2.0
"""Localizer: KFNet's filtered scene coordinates, then PixLoc's alignment, in the one place that sequences them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.localization.coarse import CoarseStage
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.refine import RefineStage
from kfloc_ros.localization.results import Ahead, CoarseResult, Localization, StageTimes
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.pixloc.refiner import Refiner
from kfloc_ros.types import Frame, Matrix


class Localizer:
    """Localizer of a camera in one map. One sequence, used by everything that localizes, shows, replays or calibrates.

    The sequence has two halves for nodes in separate processes: ``filter_node`` runs :meth:`coarse_half`,
    ``refiner_node`` runs :meth:`refine_half`. :meth:`process` joins them.

    Args:
        scene_map: map of the scene.
        config: options; None: the defaults.
        backbone: shared with other localizers; None: a new one.
    """

    def __init__(
        self, scene_map: SceneMap, config: LocalizerConfig | None = None, backbone: Backbone | None = None
    ) -> None:
        config = config or LocalizerConfig()
        self._coarse = CoarseStage(scene_map, config, backbone)
        self._refine = RefineStage(scene_map, config)

    @property
    def camera(self) -> Camera:
        """Pinhole camera that every frame must have; an ``ImageAdapter`` converts images to it."""
        return self._coarse.camera

    @property
    def references(self) -> ReferenceViews:
        """Reference views that poses are aligned with."""
        return self._refine.references

    @property
    def refiner(self) -> Refiner:
        """Aligner of poses; it has no state."""
        return self._refine.refiner

    @property
    def on_cpu(self) -> bool:
        """True if the networks run on the processor."""
        return self._coarse.on_cpu

    @property
    def runtime_note(self) -> str:
        """Run-time of the backbone with the reason for it; empty on a GPU."""
        return self._coarse.runtime_note

    @property
    def backbone(self) -> Backbone:
        """Backbone, for other localizers to share."""
        return self._coarse.backbone

    @property
    def camera_note(self) -> str:
        """Sentence on a camera that does not fit the images; empty if it fits."""
        return self._refine.camera_note

    def prepare(self, frame: Frame) -> Ahead | None:
        """Compute the features of a later frame for :meth:`process`, in another thread, while this one is processed.

        ``Ahead.help`` then computes a share of its scene coordinates; what it has not begun by then is left to
        :meth:`process`, so that both threads work.

        Returns:
            Features, and scene coordinates to compute; None if the image may be corrected first, which depends on
            earlier frames.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        if self._refine.corrects_camera:
            return None
        return self._coarse.prepare(frame, measures=not self._refine.tracks)

    def process(
        self,
        frame: Frame,
        hints: Sequence[Matrix] = (),
        *,
        predicted: Matrix | None = None,
        ahead: Ahead | None = None,
        correct: bool = True,
    ) -> Localization:
        """Localize one frame.

        Args:
            frame: image of the map's camera.
            hints: further starting poses ``T_map_camera`` (4, 4), such as an operator's guess. The start at which the
                image looks most like the map is refined.
            predicted: pose (4, 4) predicted by odometry; None: constant velocity predicts it.
            ahead: what :meth:`prepare` returned for the frame; the result is the same without.
            correct: correct the belief by an accepted pose at once. A place and a node pass False: they first check the
                pose against motion and odometry, then call :meth:`correct_belief`.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        # 1. Features, once a frame
        if ahead is None:
            frame, times = self._refine.corrected(frame), StageTimes()
            ahead = Ahead(times, self._coarse.extract(frame, times))
        times, features = ahead.times, ahead.features

        # 2. Track: align from the predicted pose alone, while that holds
        with self._coarse.sharing(ahead):
            tracked = None if hints else self._refine.track(frame, features, times, predicted)
            if tracked is not None:
                self._coarse.skip(frame, features)
                tracked = self._refine.check(frame, features, tracked)
                return Localization(frame, features, self._refine.keep_session_view(frame, features, tracked))

        coarse = self.coarse_half(frame, ahead=ahead)  # steps 3 to 5
        with self._coarse.sharing(ahead):
            localization = self.refine_half(frame, coarse, hints, predicted)  # steps 6 to 8
        if correct:
            self.correct_belief(frame.stamp_ns, localization.estimate.refined_pose)
        return localization

    def coarse_half(self, frame: Frame, *, ahead: Ahead | None = None) -> CoarseResult:
        """Compute the coarse pose of a frame: steps 1 and 3 to 5.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        ahead = self._coarse.prepare(frame, measures=False) if ahead is None else ahead
        times, features = ahead.times, ahead.features

        with self._coarse.sharing(ahead):
            # 3. Measure scene coordinates and their variance (SCoordNet)
            measurement = self._coarse.measure(frame, features, times, ahead)

            # 4. Carry the belief over by optical flow and fuse (KFNet)
            filtered = self._coarse.fuse(frame, features, measurement, times)

            # 5. Coarse pose by RANSAC-PnP
            pose = self._coarse.solve(frame, filtered, times)
        return CoarseResult(
            frame.stamp_ns,
            pose,
            filtered.report,
            times.so_far(),
            features,
            filtered.posterior,
            measurement,
            filtered,
        )

    def refine_half(
        self, frame: Frame, coarse: CoarseResult, hints: Sequence[Matrix] = (), predicted: Matrix | None = None
    ) -> Localization:
        """Refine a coarse pose and judge the result: steps 6 to 8.

        Args:
            frame: image of the map's camera.
            coarse: result of the coarse half for the frame.
            hints: further starting poses ``T_map_camera`` (4, 4).
            predicted: pose (4, 4) predicted by odometry; None: constant velocity predicts it.

        Raises:
            FrameError: the image does not have the size of the map's camera.
        """
        times = StageTimes(coarse.timings_ms)
        # 6. Align features with the map's reference views (PixLoc), and with this session's images where these fail
        alignment = self._refine.align(frame, coarse, hints, times, predicted)

        # 7. Relocalize in the whole map if that failed
        alignment = self._refine.relocalize(frame, coarse, alignment, times, predicted)

        # 8. Judge pose and camera; an accepted pose then corrects the belief (correct_belief)
        estimate = self._refine.judge(frame, coarse, alignment, times, predicted)
        estimate = self._refine.check(frame, coarse.features, estimate)
        estimate = self._refine.keep_session_view(frame, coarse.features, estimate)
        return Localization(frame, coarse.features, estimate, coarse)

    def correct_belief(self, stamp_ns: int, T_map_camera: Matrix | None) -> None:
        """Correct the belief over scene coordinates by the refined pose of one of the last frames.

        Args:
            stamp_ns: stamp of the frame.
            T_map_camera: ``PoseEstimate.refined_pose`` of the frame; None changes nothing.
        """
        if T_map_camera is not None:
            self._coarse.correct_belief(stamp_ns, T_map_camera)

    def warm_up(self) -> None:
        """Run everything once, on noise, and reset, so that no image waits for it.

        The first pass of a network selects its kernels, and the first call of a compiled loop compiles it or reads it
        from the disk; both take several times as long as a frame.
        """
        frame = noise(self.camera)
        self.process(frame, list(self.references.T_map_camera[:1]))  # a pose to align from, which noise does not give
        self._coarse.warm_up(frame)
        self._refine.warm_up()
        self.reset("warm-up")

    def reset(self, reason: str) -> None:
        """Reset the filter, the motion model and the track.

        Args:
            reason: reset reason in the filter's report of the next frame.
        """
        self._coarse.reset(reason)
        self._refine.reset()


def noise(camera: Camera) -> Frame:
    """Return a frame of noise."""
    image = np.random.default_rng(0).integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
    return Frame(image=image, camera=camera, stamp_ns=1)
