# SPDX-License-Identifier: Apache-2.0
"""Evidence of one image's matches about alignments: agreement with a pose, and better constrained poses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import map_frame_covariance
from kfloc_ros.geometry.lie import Matrix, inverse_pose, so3_log
from kfloc_ros.pixloc.cost import project, projection_jacobian
from kfloc_ros.pixloc.optimizer import left_update
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.relocalization.decision import RelocalizationSettings, cost_of, realigned
from kfloc_ros.relocalization.matching import ImageMatches, Matches
from kfloc_ros.types import Alignment

Align = Callable[[Sequence[Matrix]], Alignment]
"""Aligner of one image: refines the most promising of several starting poses and judges the result."""

VERIFYING_VIEWS = 3
"""Reference views whose matches verify a pose."""
POLISHING_VIEWS = 6
"""Reference views whose matches improve a pose."""

CERTAIN_M = 0.05
"""Standard deviation in the worst direction below which an alignment is well constrained."""


class Evidence:
    """Matches of one image as evidence about alignments of it.

    Args:
        references: reference views of the map.
        camera: pinhole camera of the image.
        settings: conditions for accepting a pose.
        matches: matches of the image.
        align: aligner of the image.
    """

    def __init__(
        self,
        references: ReferenceViews,
        camera: Camera,
        settings: RelocalizationSettings,
        matches: ImageMatches,
        align: Align,
    ) -> None:
        self._references, self._camera, self._settings = references, camera, settings
        self._matches, self._align = matches, align

    def aligned(self, start: Matrix) -> Alignment:
        """Align from a pose, repeat from the result, then from the pose that the matches near the result give."""
        first = realigned(self._align, self._align([start]))
        return self.improved(first) if first.success else first

    def improved(self, alignment: Alignment) -> Alignment:
        """Return the alignment from the pose that most matches nearby agree with, if that costs less; else itself.

        An alignment sees a few pixels around each point and stops in the nearest local minimum. The matches see the
        whole image.
        """
        if alignment.T_map_camera is None:
            return alignment
        near = self._matches_near(alignment.T_map_camera)
        start = pose_by_matches(near.pixels, near.points, self._camera, alignment.T_map_camera)
        if start is None:
            return alignment
        other = self._align([start])
        better = other.success and (not alignment.success or other.final_cost < alignment.final_cost)
        return other if better else alignment

    def improvements(self, alignments: Sequence[Alignment]) -> list[Alignment]:
        """Return the improved alignments. They do not replace the given ones, since they may be at another place."""
        better = ((r, self.improved(r)) for r in alignments)
        return [new for old, new in better if new is not old]

    def constrained(self, alignment: Alignment) -> Alignment:
        """Return the alignment, with the matches added in directions that it leaves uncertain."""
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        near = self._matches_near(alignment.T_map_camera)
        return with_matches(alignment, near.pixels, near.points, self._camera)

    def agreement(self, alignment: Alignment) -> float:
        """Return the share of mutual nearest neighbours that agree with an alignment."""
        assert alignment.T_map_camera is not None
        return self._matches.agreement(alignment.T_map_camera, self._verifying_views(alignment))

    def verified(self, alignment: Alignment, min_agreement: float, *, with_lightglue: bool) -> Alignment:
        """Return the alignment, failed if too few matches agree with it.

        Args:
            alignment: to verify.
            min_agreement: smallest accepted share of agreeing matches.
            with_lightglue: average the share with that of LightGlue matches. No more of these are made for an
                alignment that hardly any match supports so far, of either kind.
        """
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        agreement = self.agreement(alignment)
        if with_lightglue:
            T, other = alignment.T_map_camera, 0.0
            if self._is_worth_more_matches(T, agreement):
                other = self._matches.lightglue_agreement(T, self._verifying_views(alignment))
            agreement = (agreement + other) / 2
        if agreement >= min_agreement:
            return alignment
        return replace(alignment, success=False, reason=f"only {100 * agreement:.0f} % of the matches agree with it")

    def is_certain(self, alignments: Sequence[Alignment], *, with_lightglue: bool = False) -> bool:
        """Return true if the cheapest alignment is well constrained and enough matches agree with it.

        Args:
            alignments: of one image.
            with_lightglue: average the share that agrees with that of LightGlue matches of the views nearest to it.
        """
        best = min((r for r in alignments if r.success), key=cost_of, default=None)
        if best is None or best.final_cost > self._settings.max_cost or best.covariance is None:
            return False
        largest_m2 = float(np.linalg.eigvalsh(best.covariance[:3, :3])[-1])
        return (
            largest_m2 < CERTAIN_M**2
            and self.verified(best, self._settings.certain_agreement, with_lightglue=with_lightglue).success
        )

    def _is_worth_more_matches(self, T_map_camera: Matrix, agreement: float) -> bool:
        s = self._settings
        supporting = int(self._matches.supporting(T_map_camera).sum())
        return agreement >= s.certain_agreement / 2 or supporting >= s.min_matched_inliers

    def _verifying_views(self, alignment: Alignment) -> list[int]:
        """Return positions of the views that verify a pose: the best of those that it was aligned with."""
        assert alignment.T_map_camera is not None
        return self._references.best_overlapping(alignment.T_map_camera, self._camera, VERIFYING_VIEWS)

    def _matches_near(self, T_map_camera: Matrix) -> Matches:
        views = self._references.best_overlapping(T_map_camera, self._camera, POLISHING_VIEWS)
        return self._matches.with_views(views, self._settings.min_similarity)


MATCH_SIGMA_PX = 3.0
"""Noise of a right match on either axis; the image's features lie in cells of eight pixels."""

MATCHES_PER_INDEPENDENT_ONE = 40.0
"""Number of matches with the information of one independent match, since views overlap and their points share errors.

Measured on the poses that matches alone give: on hololens_office the median of their squared errors, normalised by
their covariance, is 38 times that of independent noise."""

MIN_MATCHES = 8
MAX_STEPS = 30
LONGEST_STEP_M = 0.2
CONVERGED = 1e-5


def pose_by_matches(
    pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera, T_map_camera: Matrix
) -> Matrix | None:
    """Return the pose nearest to a given one at which most matches agree, or None if there are too few.

    The loss is redescending (Geman and McClure): matches that are off by much more than their noise have no weight.
    Most mutual nearest neighbours are wrong, so the start decides which matches count.

    Args:
        pixels: (N, 2) pixels in the image.
        points: (N, 3) metres, map frame.
        camera: pinhole camera of the image.
        T_map_camera: pose to start from, (4, 4).
    """
    T_camera_map = _descend(pixels, points, camera, inverse_pose(T_map_camera), None)
    return None if T_camera_map is None else inverse_pose(T_camera_map)


def with_matches(
    alignment: Alignment, pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera
) -> Alignment:
    """Return an alignment with the pose and covariance of the joint least squares with matches.

    Both problems enter with their information: the pose does not move in directions that the alignment constrains well.
    Cost and steps stay those of the alignment.
    """
    T, covariance = alignment.T_map_camera, alignment.covariance
    if T is None or covariance is None:
        return alignment
    T_camera_map = inverse_pose(T)
    A = np.kron(np.eye(2), -T[:3, :3])  # as in map_frame_covariance
    information = A.T @ np.linalg.inv(covariance) @ A
    moved = _descend(pixels, points, camera, T_camera_map, information)
    if moved is None:
        return alignment
    H, _ = _normal_equations(pixels, points, camera, moved)
    both = map_frame_covariance(information + H / MATCHES_PER_INDEPENDENT_ONE, moved)
    if both is None:
        return replace(alignment, T_map_camera=inverse_pose(moved))
    return replace(alignment, T_map_camera=inverse_pose(moved), covariance=both, disagreement=np.zeros((6, 6)))


def _descend(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    camera: Camera,
    start: Matrix,
    information: Matrix | None,
) -> Matrix | None:
    """Return ``T_camera_map`` by Gauss-Newton, with an information of (dt, dw) as a prior at the start, if given."""
    T = start
    prior = np.zeros((6, 6)) if information is None else information * MATCHES_PER_INDEPENDENT_ONE
    if len(pixels) < MIN_MATCHES:
        return None
    for _ in range(MAX_STEPS):
        H, g = _normal_equations(pixels, points, camera, T)
        since_start = T @ inverse_pose(start)
        H, g = H + prior, g + prior @ np.concatenate([since_start[:3, 3], so3_log(since_start[:3, :3])])
        try:
            delta = -np.linalg.solve(H + 1e-6 * np.diag(np.diag(H)), g)
        except np.linalg.LinAlgError:
            return None  # no match is near
        delta *= min(1.0, LONGEST_STEP_M / max(float(np.linalg.norm(delta[:3])), 1e-12))
        T = left_update(T, delta)
        if np.abs(delta).max() < CONVERGED:
            break
    return T if np.isfinite(T).all() else None


def _normal_equations(
    pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera, T_camera_map: Matrix
) -> tuple[Matrix, NDArray[np.float64]]:
    """Return H (6, 6) and g (6,) over the left perturbation (dt, dw)."""
    at, P, in_front = project(torch.from_numpy(points), torch.from_numpy(T_camera_map), camera, 1.0)
    J = projection_jacobian(P, camera, 1.0).numpy()
    error_px = at.numpy() - pixels
    squared = (error_px**2).sum(axis=1) / MATCH_SIGMA_PX**2
    weight = in_front.numpy() / (1 + squared / 4) ** 2 / MATCH_SIGMA_PX**2
    JW = (J * weight[:, None, None]).reshape(-1, 6)
    return JW.T @ J.reshape(-1, 6), JW.T @ error_px.reshape(-1)
