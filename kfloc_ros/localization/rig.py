# SPDX-License-Identifier: Apache-2.0
"""Localizer of a rig: several cameras on one body, one pose of the body from all images that are near in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kfloc_ros.geometry.covariance import CHI2_6_999, UncertainPose, pose_tangent_error
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.kfnet.pnp import choose_part
from kfloc_ros.localization.config import LocalizerConfig, pnp_settings
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import Localization
from kfloc_ros.localization.tracking import ConstantVelocity
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.poses import BodyPose
from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState

try:
    import poselib
except ImportError:  # no wheel for Linux on ARM
    poselib = None

MOUNT_SIGMA_M, MOUNT_SIGMA_RAD = 0.005, 0.004
"""Standard deviations of the cameras' mounts, which every pose of a camera shares."""
OBJECTION_M, OBJECTION_DEG = 0.05, 3.0
"""A camera objects to the rig's pose if its image fits the map further away than either, beyond its covariance."""
_WEIGHT = {TrackingState.TRACKING: 1.0, TrackingState.DEGRADED: 0.2}


@dataclass(frozen=True, eq=False)
class RigView:
    """Image of one camera of the rig."""

    camera: int
    """Number of the camera."""
    frame: Frame
    T_base_camera: Matrix
    """(4, 4) mount."""


@dataclass(frozen=True, eq=False)
class RigLocalization:
    """Result of the images of one time."""

    localization: Localization
    """Of the reference view, whose estimate has the rig's pose as that of its camera, at its own time."""
    reference: int
    """Position of the reference view."""
    T_map_base: Matrix | None
    """(4, 4) at the time of the reference view; None without a pose."""
    used: tuple[int, ...]
    """Positions of the views whose images are in the pose."""
    views: tuple[Localization, ...] = field(default=())
    """What each camera found alone."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Pose of the base from one view, at the time of the reference view."""

    position: int
    body: BodyPose
    state: TrackingState
    support: float


class RigLocalizer:
    """Localizer of several cameras on one body in one map.

    Every camera has a :class:`Localizer` of its own, which starts from what the rig knows. Their poses of the base are
    joined by their information: near the optimum, this sums the cameras' alignment costs. The largest group that agrees
    counts. A camera that found nothing is aligned again from the joint pose. If none has a pose, PoseLib's generalized
    absolute pose solves for all cameras together, and the alignments have to confirm it.

    Args:
        scene_map: map of the scene; all cameras' images are adapted to its camera.
        config: options.
        count: number of cameras.
    """

    def __init__(self, scene_map: SceneMap, config: LocalizerConfig, count: int) -> None:
        first = Localizer(scene_map, config)
        others = (Localizer(scene_map, config, first.backbone) for _ in range(count - 1))
        self.localizers = (first, *others)
        self._config, self._map_camera = config, scene_map.camera
        self._motion = ConstantVelocity(config.max_gap_s)
        self._had_pose = False

    def process(
        self,
        views: Sequence[RigView],
        hints: Sequence[Matrix] = (),
        predicted: Matrix | None = None,
        motions: Sequence[Matrix | None] = (),
    ) -> RigLocalization:
        """Localize the images of one time; at most one of each camera, at least one.

        Args:
            views: images. The newest one is the reference.
            hints: likely poses ``T_map_base`` (4, 4).
            predicted: pose ``T_map_base`` (4, 4) at the time of the reference, predicted by odometry; None: by constant
                velocity.
            motions: for each view ``T_then_reference`` (4, 4) of the base by odometry; None or missing: by constant
                velocity.

        Raises:
            FrameError: an image does not have the size of the map's camera.
        """
        reference = max(range(len(views)), key=lambda k: views[k].frame.stamp_ns)
        stamp_ns = views[reference].frame.stamp_ns
        moved = [self._moved(view, stamp_ns, motions[k] if k < len(motions) else None) for k, view in enumerate(views)]
        by_motion = self._motion.predict(stamp_ns) if predicted is None else predicted
        found: dict[int, Localization] = {}
        known: Matrix | None = None
        for k, view in enumerate(views):
            T_ref_camera = inverse_pose(moved[k]) @ view.T_base_camera
            starts = [T @ T_ref_camera for T in (*hints, *([known] if known is not None else []))]
            expected = None if by_motion is None else by_motion @ T_ref_camera
            found[k] = self.localizers[view.camera].process(view.frame, starts, predicted=expected, correct=False)
            T = found[k].estimate.T_map_camera
            if found[k].estimate.state is TrackingState.TRACKING and T is not None:
                known = T @ inverse_pose(T_ref_camera)
        candidates = [item for k in found if (item := self._candidate(k, views, moved, found[k].estimate)) is not None]
        if not candidates:
            together = self._solve_together(views, moved, found)
            candidates = [] if together is None else self._aligned(range(len(views)), views, moved, found, together)
        group = _largest_group(candidates)
        if group:
            joint = _joined(group)
            left = [k for k in found if all(k != item.position for item in candidates)]
            again = self._aligned(left, views, moved, found, joint.T_map_body)
            group = [*group, *(item for item in again if _agree(item.body, joint))]
        return self._result(views, found, candidates, group, reference, moved)

    def correct_belief(self, views: Sequence[RigView], result: RigLocalization) -> None:
        """Correct the beliefs of the cameras whose own pose is in the rig's."""
        for k in result.used:
            refined = result.views[k].estimate.refined_pose
            if refined is not None:
                self.localizers[views[k].camera].correct_belief(views[k].frame.stamp_ns, refined)

    def reset(self, reason: str) -> None:
        """Reset everything that was carried over from earlier images."""
        self._motion.reset()
        for localizer in self.localizers:
            localizer.reset(reason)

    def _moved(self, view: RigView, stamp_ns: int, by_odometry: Matrix | None) -> Matrix:
        """Return ``T_then_reference`` of the base from the view's time to the reference's."""
        if by_odometry is not None or view.frame.stamp_ns == stamp_ns:
            return np.eye(4) if by_odometry is None else by_odometry
        then, now = self._motion.predict(view.frame.stamp_ns), self._motion.predict(stamp_ns)
        return np.eye(4) if then is None or now is None else inverse_pose(then) @ now

    def _candidate(
        self, k: int, views: Sequence[RigView], moved: Sequence[Matrix], estimate: PoseEstimate
    ) -> _Candidate | None:
        if estimate.T_map_camera is None or estimate.covariance is None or estimate.bridged:
            return None
        mount = np.diag([MOUNT_SIGMA_M**2] * 3 + [MOUNT_SIGMA_RAD**2] * 3)
        camera = BodyPose(estimate.T_map_camera, estimate.covariance + mount)
        body = camera.moved(inverse_pose(views[k].T_base_camera) @ moved[k])
        inliers = 100 if estimate.coarse is None else max(estimate.coarse.inlier_count, 1)
        return _Candidate(k, body, estimate.state, _WEIGHT.get(estimate.state, 0.0) * inliers)

    def _aligned(
        self,
        positions: Sequence[int] | range,
        views: Sequence[RigView],
        moved: Sequence[Matrix],
        found: dict[int, Localization],
        T_map_base: Matrix,
    ) -> list[_Candidate]:
        """Return the candidates of views that are aligned from a pose of the base alone."""
        if not self._config.refine:
            return []
        aligned = []
        for k in positions:
            start = T_map_base @ inverse_pose(moved[k]) @ views[k].T_base_camera
            alignment = self.localizers[views[k].camera].refiner.align(found[k].features, [start])
            if alignment.success:
                estimate = replace(
                    found[k].estimate, state=TrackingState.TRACKING, reason="", bridged=False,
                    T_map_camera=alignment.T_map_camera, covariance=alignment.covariance, alignment=alignment,
                )  # fmt: skip
                candidate = self._candidate(k, views, moved, estimate)
                aligned += [] if candidate is None else [candidate]
        return aligned

    def _solve_together(
        self, views: Sequence[RigView], moved: Sequence[Matrix], found: dict[int, Localization]
    ) -> Matrix | None:
        """Return ``T_map_base`` that the scene coordinates of all cameras have in common, or None; by PoseLib alone."""
        if poselib is None:
            return None
        pixels, points, mounts, cameras = [], [], [], []
        settings = pnp_settings(self._config, 8)
        for k, localization in found.items():
            coordinates = localization.belief
            if coordinates is None:
                continue
            settings = pnp_settings(self._config, coordinates.stride)
            cells = choose_part(coordinates, settings)
            T = inverse_pose(views[k].T_base_camera) @ moved[k]  # T_camera_reference
            mount = poselib.CameraPose()
            mount.R, mount.t = T[:3, :3], T[:3, 3]
            c = self._map_camera
            pixels.append(cells.pixels)
            points.append(cells.points)
            mounts.append(mount)
            cameras.append(
                {"model": "PINHOLE", "width": c.width, "height": c.height, "params": [c.fx, c.fy, c.cx, c.cy]}
            )
        count = sum(len(item) for item in pixels)
        if count < settings.min_inliers:
            return None
        options = {"max_reproj_error": settings.max_error_px, "max_iterations": 2000, "min_iterations": 100, "seed": 0}
        pose, info = poselib.estimate_generalized_absolute_pose(pixels, points, mounts, cameras, options, {})
        inliers = sum(int(np.asarray(item, dtype=bool).sum()) for item in info["inliers"])
        if inliers < settings.min_inliers or inliers < settings.min_inlier_ratio * count:
            return None
        return inverse_pose(make_pose(pose.R, pose.t))

    def _objections(
        self, views: Sequence[RigView], found: dict[int, Localization], joint: BodyPose, moved: Sequence[Matrix]
    ) -> dict[int, BodyPose]:
        """Return the base's poses by cameras whose images fit the map elsewhere, of those with a doubtful pose alone.

        The covariance of such a pose includes its doubt, so that it never contradicts the others; that of its alignment
        does not. Two cameras beside each other so measure depth: a print of the place is at another distance.
        """
        objections = {}
        for k, localization in found.items():
            estimate, alignment = localization.estimate, localization.estimate.alignment
            if estimate.state is not TrackingState.DEGRADED or alignment is None or not alignment.success:
                continue
            if alignment.support < self.localizers[0].refiner.settings.certain_support:
                continue
            alone = replace(estimate, T_map_camera=alignment.T_map_camera, covariance=alignment.covariance)
            candidate = self._candidate(k, views, moved, alone)
            if candidate is None or _agree(candidate.body, joint):
                continue
            between = inverse_pose(joint.T_map_body) @ candidate.body.T_map_body
            apart_m = float(np.linalg.norm(between[:3, 3]))
            if apart_m > OBJECTION_M or rotation_angle_deg(between[:3, :3]) > OBJECTION_DEG:
                objections[k] = candidate.body
        return objections

    def _result(
        self,
        views: Sequence[RigView],
        found: dict[int, Localization],
        candidates: Sequence[_Candidate],
        group: Sequence[_Candidate],
        reference: int,
        moved: Sequence[Matrix],
    ) -> RigLocalization:
        every = tuple(found[k] for k in range(len(views)))
        own = every[reference]
        if not group:
            reasons = "; ".join(f"camera {view.camera}: {every[k].estimate.reason}" for k, view in enumerate(views))
            state = TrackingState.LOST if self._had_pose else TrackingState.INITIALIZING
            lost = replace(own.estimate, state=state, reason=reasons, T_map_camera=None, covariance=None, bridged=False)
            return RigLocalization(replace(own, estimate=lost), reference, None, (), every)
        joint = _joined(group)
        members = {item.position for item in group}
        outvoted = [item for item in candidates if item.position not in members]
        tracks = any(item.state is TrackingState.TRACKING for item in group)
        rivals = [item for item in outvoted if item.state is TrackingState.TRACKING]
        disputed = bool(rivals) and sum(item.support for item in rivals) > 0.5 * sum(item.support for item in group)
        reason = ""
        if disputed:
            reason = f"camera {views[rivals[0].position].camera} sees another place than the others"
        elif not tracks:
            reason = next(every[k].estimate.reason for k in members)
        covariance = joint.covariance
        objections = {} if disputed else self._objections(views, found, joint, moved)
        if objections and len(objections) >= sum(item.state is TrackingState.TRACKING for item in group):
            k, body = next(iter(objections.items()))
            error = pose_tangent_error(joint.T_map_body, body.T_map_body)
            disputed, covariance = True, joint.covariance + np.outer(error, error)
            reason = (
                f"the image of camera {views[k].camera} fits the map, but not from where its mount puts the camera: a "
                "print of the place, or the mount, the calibration or the scale of the map is wrong"
            )
        joint = BodyPose(joint.T_map_body, covariance)
        at_camera = joint.moved(views[reference].T_base_camera)
        state = TrackingState.TRACKING if tracks and not disputed else TrackingState.DEGRADED
        estimate = replace(
            own.estimate, state=state, reason=reason, T_map_camera=at_camera.T_map_body,
            covariance=at_camera.covariance, tentative=own.estimate.tentative and not tracks, bridged=False,
        )  # fmt: skip
        self._had_pose = True
        self._motion.observe(views[reference].frame.stamp_ns, joint.T_map_body)
        return RigLocalization(
            replace(own, estimate=estimate), reference, joint.T_map_body, tuple(sorted(members)), every
        )


def _agree(a: BodyPose, b: BodyPose) -> bool:
    """Return True if two poses are as near as their covariances allow."""
    first, second = (UncertainPose(body.T_map_body, body.covariance) for body in (a, b))
    return first.chi2(second) <= CHI2_6_999


def _largest_group(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Return the candidates that agree with one of them, such that their support is the largest."""
    groups = [[item for item in candidates if item is seed or _agree(item.body, seed.body)] for seed in candidates]
    return max(groups, key=lambda group: sum(item.support for item in group), default=[])


def _joined(group: Sequence[_Candidate]) -> BodyPose:
    """Return the pose of largest likelihood of several candidates, to first order about the surest one."""
    seed = min(group, key=lambda item: float(np.trace(item.body.covariance))).body
    information, vector = np.zeros((6, 6)), np.zeros(6)
    for item in group:
        inverse = np.linalg.inv(item.body.covariance)
        information += inverse
        vector += inverse @ pose_tangent_error(seed.T_map_body, item.body.T_map_body)
    step = np.linalg.solve(information, vector)
    T = make_pose(so3_exp(step[3:]) @ seed.T_map_body[:3, :3], seed.T_map_body[:3, 3] + step[:3])
    covariance = np.linalg.inv(information)
    return BodyPose(T, 0.5 * (covariance + covariance.T))
