# SPDX-License-Identifier: Apache-2.0
"""Poses by points of this session's own images, where the map alone does not settle the pose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, jumped
from kfloc_ros.pixloc.references import ReferencePoints
from kfloc_ros.pixloc.refiner import Refiner, query_levels
from kfloc_ros.pixloc.session_points import SessionPoints
from kfloc_ros.types import Alignment, PoseEstimate


@dataclass(frozen=True)
class CarrySettings:
    """Conditions under which points of this session's images give a pose."""

    max_cost: float = 0.28
    """Largest accepted cost; that of unrelated images is 0.29 and more."""
    min_map_support: float = 1.0
    """Support by the map's points from which a joint alignment is a pose in the map, and not one that is carried on.
    On d435_office no such pose was off by more than 8 cm, and of those with less none by more than 10 cm."""
    session_weight: float = 0.1
    """Weight of this session's points beside the map's. They share the errors of the poses that they come from, so they
    choose between minima of the map's points, but hardly move them."""
    learn_period_s: float = 0.1
    """Time between two images whose points are learned."""
    rest_period_s: float = 0.3
    """The same, while the map alone settles the poses."""
    drift_m_s: float = 0.01
    drift_deg_s: float = 0.5
    """Growth of the standard deviation of a pose that is carried on."""


class Carrier:
    """Points of the last images of one camera, and alignments with them.

    Args:
        refiner: aligner, with the map's reference views.
        camera: pinhole camera of the images.
        longest_s: longest time without a pose that the map confirms; 0: session points are not used.
        settings: conditions; None: the defaults.
    """

    def __init__(
        self, refiner: Refiner, camera: Camera, longest_s: float, settings: CarrySettings | None = None
    ) -> None:
        self._refiner, self._camera, self._longest_ns = refiner, camera, int(longest_s * 1e9)
        self._settings = settings or CarrySettings()
        self._points = SessionPoints(camera)
        self._confirmed: tuple[int, Matrix] | None = None
        """Stamp of the last pose that the map confirms, and covariance of the last one that the map alone gave."""
        self._learned: tuple[int, Matrix] | None = None
        """Stamp and pose of the last image whose points were learned."""

    def reset(self) -> None:
        """Drop all points."""
        self._points.reset()
        self._confirmed = self._learned = None

    def is_settled(self, alignment: Alignment) -> bool:
        """Return true if the map alone settles the pose, so that points of this session's images add nothing."""
        settled = self._refiner.settings.settled_support
        return alignment.success and not alignment.carried and alignment.support >= settled

    def align(
        self,
        features: BackboneFeatures,
        stamp_ns: int,
        predicted: Matrix | None,
        alignment: Alignment,
        is_supported: Callable[[Alignment], bool],
    ) -> Alignment | None:
        """Align with the map's points and this session's together, or with this session's alone.

        A joint alignment that neither the map's points nor other evidence supports counts as carried on. So does one
        with the session's points alone; it is tried only where the map's points do not support the pose.

        Args:
            features: backbone features of the image.
            stamp_ns: stamp of the image.
            predicted: predicted pose, (4, 4), if any.
            alignment: alignment with the map alone.
            is_supported: returns true if evidence beside the points supports an alignment.

        Returns:
            The alignment; None if points of this session do not settle the pose.
        """
        points = self._points_in_view(stamp_ns, predicted)
        if predicted is None or points is None:
            return None
        s, align = self._settings, self._refiner.align
        starts = [T for T in (predicted, alignment.T_map_camera) if T is not None]
        light = replace(points, confidence=s.session_weight * points.confidence)
        found = align(features, starts, max_cost=s.max_cost, further=light)
        if self._refiner.is_certain(found):
            joint = self._widened(found, stamp_ns)
            if joint.map_support >= s.min_map_support or (alignment.success and is_supported(joint)):
                return joint
            return replace(joint, carried=True, reason=alignment.reason)
        if alignment.success and alignment.support >= s.min_map_support:
            return None
        starts = [predicted] if self._learned is None else [predicted, self._learned[1]]  # or it has not moved on
        found = align(features, starts, max_cost=s.max_cost, further=points, with_map=False)
        if not self._refiner.is_certain(found):
            return None
        return replace(self._widened(found, stamp_ns), carried=True, reason=alignment.reason)

    def keep_session_view(self, features: BackboneFeatures, estimate: PoseEstimate, count: int) -> None:
        """Keep points of an image with an accepted alignment, and measure the depths of the others in it.

        A tentative first pose teaches nothing: those that have to agree with it must be independent of it.

        Args:
            features: backbone features of the image.
            estimate: its pose.
            count: number of reference views whose points lend their depths.
        """
        s = self._settings
        alignment, T, stamp_ns = estimate.alignment, estimate.T_map_camera, estimate.stamp_ns
        if not self._longest_ns or T is None or alignment is None or not alignment.success or estimate.tentative:
            return
        if alignment.covariance is not None and not alignment.carried:
            is_joint = alignment.map_support != alignment.support
            last = alignment.covariance if self._confirmed is None or not is_joint else self._confirmed[1]
            self._confirmed = stamp_ns, last
        if self._learned is not None:
            before_ns, before = self._learned
            if jumped(before, T) or stamp_ns <= before_ns:
                self._points.reset()
            elif stamp_ns - before_ns < 1e9 * (s.rest_period_s if self.is_settled(alignment) else s.learn_period_s):
                return
        self._learned = stamp_ns, T
        mapped = self._refiner.references.points_near(T, self._camera, count)
        self._points.observe(query_levels(features), T, mapped)

    def _points_in_view(self, stamp_ns: int, predicted: Matrix | None) -> ReferencePoints | None:
        """Return the points in view from a predicted pose (4, 4); None if there are none, or the time is over."""
        if predicted is None or self._confirmed is None or not 0 < stamp_ns - self._confirmed[0] <= self._longest_ns:
            return None
        return self._points.usable(predicted)

    def _widened(self, alignment: Alignment, stamp_ns: int) -> Alignment:
        """Return an alignment with what is not known of its points: the errors of the poses that they come from."""
        s = self._settings
        if alignment.covariance is None or self._confirmed is None:
            return alignment
        confirmed_ns, covariance = self._confirmed
        passed_s = 1e-9 * (stamp_ns - confirmed_ns)
        drift = np.repeat([s.drift_m_s * passed_s, np.radians(s.drift_deg_s) * passed_s], 3) ** 2
        return replace(alignment, covariance=alignment.covariance + covariance + np.diag(drift))
