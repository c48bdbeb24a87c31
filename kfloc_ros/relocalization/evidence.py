# SPDX-License-Identifier: Apache-2.0
"""What one image's matches say about alignments: whether they are right, and where exactly they should end."""

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
from kfloc_ros.relocalization.decision import RelocalizationSettings, cost_of, repeated
from kfloc_ros.relocalization.matching import ImageMatches, Matches
from kfloc_ros.types import Alignment

Align = Callable[[Sequence[Matrix]], Alignment]
"""Refines starting poses of one image and judges the result."""

JUDGING_VIEWS = 3
"""Reference views whose matches a found pose is judged by."""
DRAWING_VIEWS = 6
"""Reference views whose matches a pose is drawn by."""

SURE_M = 0.05
"""Standard deviation in the worst direction below which an alignment is fixed well."""


class Evidence:
    """The matches of one image, asked about alignments of it.

    Args:
        references: of the map.
        camera: of the image.
        settings: when a place counts as found.
        matches: of the image.
        align: aligns the image.
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
        """From a pose that the matches gave, repeated from where it ends and from where they then say."""
        first = repeated(self._align, self._align([start]))
        return self.improved(first) if first.success else first

    def improved(self, alignment: Alignment) -> Alignment:
        """The alignment, or one from the pose near it that most matches agree with, if that costs less.

        An alignment sees a few pixels around each point and stops in the nearest valley; the matches see the whole
        image.
        """
        if alignment.T_map_camera is None:
            return alignment
        drawing = self._drawing(alignment.T_map_camera)
        start = pose_by_matches(drawing.pixels, drawing.points, self._camera, alignment.T_map_camera)
        if start is None:
            return alignment
        other = self._align([start])
        better = other.success and (not alignment.success or other.final_cost < alignment.final_cost)
        return other if better else alignment

    def improvements(self, alignments: Sequence[Alignment]) -> list[Alignment]:
        """Those better than one of the alignments; they do not replace it, since they may be elsewhere."""
        better = ((r, self.improved(r)) for r in alignments)
        return [new for old, new in better if new is not old]

    def fixed(self, alignment: Alignment) -> Alignment:
        """The alignment with the matches' say in directions that it leaves open."""
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        drawing = self._drawing(alignment.T_map_camera)
        return with_matches(alignment, drawing.pixels, drawing.points, self._camera)

    def agreement(self, alignment: Alignment) -> float:
        """Share of the matches one by one that agree with it."""
        assert alignment.T_map_camera is not None
        return self._matches.agreement(alignment.T_map_camera, self._judging(alignment))

    def verified(self, alignment: Alignment, min_agreement: float, *, in_context: bool) -> Alignment:
        """The alignment, failed if the matches contradict it."""
        if not alignment.success or alignment.T_map_camera is None:
            return alignment
        agreement = self.agreement(alignment)
        if in_context:
            other = self._matches.agreement_in_context(alignment.T_map_camera, self._judging(alignment))
            agreement = (agreement + other) / 2
        if agreement >= min_agreement:
            return alignment
        return replace(alignment, success=False, reason=f"only {100 * agreement:.0f} % of the matches agree with it")

    def is_sure(self, alignments: Sequence[Alignment]) -> bool:
        """Whether the likeliest place is beyond doubt: many matches agree, and they fix it in every direction."""
        best = min((r for r in alignments if r.success), key=cost_of, default=None)
        if best is None or best.final_cost > self._settings.max_cost or best.covariance is None:
            return False
        largest_m2 = float(np.linalg.eigvalsh(best.covariance[:3, :3])[-1])
        return largest_m2 < SURE_M**2 and self.agreement(best) >= self._settings.sure_agreement

    def _judging(self, alignment: Alignment) -> list[int]:
        """Views that a pose is judged by: the best of those that it was aligned with."""
        assert alignment.T_map_camera is not None
        return self._references.best_overlapping(alignment.T_map_camera, self._camera, JUDGING_VIEWS)

    def _drawing(self, T_map_camera: Matrix) -> Matches:
        views = self._references.best_overlapping(T_map_camera, self._camera, DRAWING_VIEWS)
        return self._matches.with_views(views, self._settings.min_similarity)


MATCH_SIGMA_PX = 3.0
"""Noise of a right match, on either axis: the image's features lie in cells of eight pixels."""

MATCHES_PER_WITNESS = 40.0
"""Matches that say as much as one with noise of its own, since views overlap and their points err together.

From the poses that matches alone fix: on hololens_office the square of their errors, by their covariance, has a median
of 38 times what independent noise gives.
"""

MIN_MATCHES = 8
MAX_STEPS = 30
LONGEST_STEP_M = 0.2
CONVERGED = 1e-5


def pose_by_matches(
    pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera, T_map_camera: Matrix
) -> Matrix | None:
    """The pose nearest to another at which most matches agree, or None if they are too few.

    A redescending loss (Geman and McClure's): matches off by much more than their noise have no say, and most of those
    made one by one are wrong, so that the start decides which agree.

    Args:
        pixels: (N, 2) of the image.
        points: (N, 3) metres, map frame.
        camera: of the image.
        T_map_camera: to start from.
    """
    T_camera_map = _descend(pixels, points, camera, inverse_pose(T_map_camera), None)
    return None if T_camera_map is None else inverse_pose(T_camera_map)


def with_matches(
    alignment: Alignment, pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera
) -> Alignment:
    """An alignment with its pose and covariance as they are with matches besides; cost and steps are still its own.

    The pose of both least squares together, each with its information: where the alignment fixes the pose well, nothing
    moves.
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
    both = map_frame_covariance(information + H / MATCHES_PER_WITNESS, moved)
    return replace(alignment, T_map_camera=inverse_pose(moved), covariance=covariance if both is None else both)


def _descend(
    pixels: NDArray[np.float64],
    points: NDArray[np.float64],
    camera: Camera,
    start: Matrix,
    information: Matrix | None,
) -> Matrix | None:
    """``T_camera_map`` by Gauss-Newton, held at the start with an information of (dt, dw) if any."""
    T = start
    held = np.zeros((6, 6)) if information is None else information * MATCHES_PER_WITNESS
    if len(pixels) < MIN_MATCHES:
        return None
    for _ in range(MAX_STEPS):
        H, g = _normal_equations(pixels, points, camera, T)
        since_start = T @ inverse_pose(start)
        H, g = H + held, g + held @ np.concatenate([since_start[:3, 3], so3_log(since_start[:3, :3])])
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
    """(6, 6) and (6,) of the left perturbation (dt, dw)."""
    at, P, in_front = project(torch.from_numpy(points), torch.from_numpy(T_camera_map), camera, 1.0)
    J = projection_jacobian(P, camera, 1.0).numpy()
    error_px = at.numpy() - pixels
    squared = (error_px**2).sum(axis=1) / MATCH_SIGMA_PX**2
    weight = in_front.numpy() / (1 + squared / 4) ** 2 / MATCH_SIGMA_PX**2
    JW = (J * weight[:, None, None]).reshape(-1, 6)
    return JW.T @ J.reshape(-1, 6), JW.T @ error_px.reshape(-1)
