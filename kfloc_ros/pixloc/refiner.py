# SPDX-License-Identifier: Apache-2.0
"""Refiner: aligns a coarse pose with the map's nearest reference views, coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch

from kfloc_ros.features.backbone import COARSE_STRIDE, FINE_STRIDE, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import map_frame_covariance, stretched
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg
from kfloc_ros.pixloc.camera_fit import CameraScore, FittedCamera, fit_camera, score_camera
from kfloc_ros.pixloc.cost import FeatureImage, FitLevel, Linearization, RobustLoss, linearize, linearize_parts
from kfloc_ros.pixloc.image_check import BlockMatch, match_blocks, two_parts
from kfloc_ros.pixloc.optimizer import LevelResult, RefinerSettings, StopRule, descend, disagreement, information_of
from kfloc_ros.pixloc.point_matching import (
    SEARCH_CELLS,
    WIDE_SEARCH_CELLS,
    MatchedPose,
    PointMatches,
    fit_pose,
    search_points,
)
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, nearness_of, view_distances
from kfloc_ros.types import Alignment, AlignmentStep


@dataclass(frozen=True, eq=False)
class Inspection:
    """Comparison of a whole image with the map at an aligned pose."""

    blocks: BlockMatch | None
    """None if too few reference points are in view."""
    camera: CameraScore | None
    """Offsets of the camera that the residuals suggest; None if they do not determine them."""
    sensitivity: Matrix | None
    """(6, 5) change of the pose, in the order of its covariance, by the offsets of the camera."""


class Refiner:
    """Feature-metric pose refinement against cached reference features; none is recomputed per query.

    Args:
        references: reference views of the map.
        camera: pinhole camera of the query.
        settings: settings of the alignment, and conditions for accepting its result.
    """

    def __init__(self, references: ReferenceViews, camera: Camera, settings: RefinerSettings) -> None:
        self.references, self.camera, self.settings = references, camera, settings

    @torch.inference_mode()
    def align(
        self,
        features: BackboneFeatures,
        starts: Sequence[Matrix],
        *,
        max_cost: float | None = None,
        further: ReferencePoints | None = None,
        with_map: bool = True,
        only_certain: bool = False,
        wide: bool = True,
    ) -> Alignment:
        """Refine the most promising of several starting poses, and the next one if that fails.

        Args:
            features: backbone features of the query image.
            starts: starting poses ``T_map_camera`` (4, 4), such as the coarse pose and the predicted one. They are
                refined in order of their cost at the coarse level.
            max_cost: limit of the final cost; None: that of the settings.
            further: points beside those of the map, with positions in the map frame.
            with_map: False: align with the further points alone.
            only_certain: give up where the points' own matches do not make the pose certain.
            wide: search the wide window, too, where the narrow one fails.

        Returns:
            The alignment; a failed one has the reason.
        """
        if not starts:
            return failed_alignment("there is no pose to start from")
        images = query_levels(features)
        candidates = [self._prepare(images, start, further=further, with_map=with_map) for start in starts]
        fullest = max(candidates, key=lambda c: c.at.valid_count)
        if fullest.at.valid_count < self.settings.min_points:
            return failed_alignment(
                f"only {fullest.at.valid_count} reference points are in view", reference_ids=fullest.reference_ids
            )
        in_view = [c for c in candidates if c.at.valid_count >= self.settings.min_points]
        promising = sorted(in_view, key=lambda c: c.at.cost)[: self.settings.max_tries]
        limit = self.settings.max_cost if max_cost is None else max_cost
        windows = (SEARCH_CELLS, WIDE_SEARCH_CELLS) if wide else (SEARCH_CELLS,)
        least = self.settings.certain_support if only_certain else -math.inf
        results = (self._descend(c, limit, cells, least) for cells in windows for c in promising)
        first = next(results)
        return first if first.success else next((other for other in results if other.success), first)

    def is_certain(self, alignment: Alignment) -> bool:
        """Return true if an accepted alignment is certain by its points' own matches."""
        return alignment.success and alignment.support >= self.settings.certain_support

    @torch.inference_mode()
    def prepared(self, features: BackboneFeatures, T_map_camera: Matrix) -> Candidate:
        """Return a pose (4, 4) that was aligned with the map's camera, with the features of its image, to check it."""
        return self._prepare(query_levels(features), T_map_camera)

    @torch.inference_mode()
    def fit_camera(self, candidate: Candidate) -> FittedCamera | None:
        """Fit pose and camera together; None if too few points are in view, or they do not fix the pose."""
        T, points, loss = candidate.T_camera_local, candidate.points, RobustLoss(self.settings.loss_scale)
        matches = self._search(candidate, WIDE_SEARCH_CELLS)
        fit = fit_camera(candidate.levels, points, T, self.camera, loss, matches)
        covariance = None if fit is None else map_frame_covariance(fit.pose_information, fit.T_camera_local)
        if fit is None or covariance is None:
            return None
        s, distance_m, parts = self.settings, candidate.distance_m, two_parts(matches, points, T, self.camera)
        covariance = s.scale_at(distance_m) * covariance + s.own_covariance_at(distance_m)
        T_map_camera = candidate.in_map(fit.T_camera_local)
        return FittedCamera(fit, T_map_camera, stretched(covariance, T_map_camera, s.sideways), parts)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the compiled loop of :meth:`fit_camera` on a point: a frame of noise gives no pose to fit it to."""
        level = FitLevel(FeatureImage(torch.zeros(2, 2, 1), torch.zeros(2, 2), 1.0), torch.zeros(1, 1), torch.zeros(1))
        fit_camera((level,), torch.ones(1, 3), np.eye(4), self.camera, RobustLoss(self.settings.loss_scale))

    @torch.inference_mode()
    def inspect(self, candidate: Candidate) -> Inspection:
        """Compare the whole image with the map at a pose."""
        T = candidate.T_camera_local
        blocks = match_blocks(candidate.levels[0].image, candidate.points, candidate.references, T, self.camera)
        loss = RobustLoss(self.settings.loss_scale)
        score = score_camera(candidate.levels[-1], candidate.points, T, self.camera, loss)
        if score is None:
            return Inspection(blocks, None, None)
        turn = -np.kron(np.eye(2), T[:3, :3].T)  # as in map_frame_covariance
        return Inspection(blocks, score, turn @ score.sensitivity)

    def _prepare(
        self,
        images: tuple[FeatureImage, FeatureImage],
        T_map_camera: Matrix,
        *,
        further: ReferencePoints | None = None,
        with_map: bool = True,
    ) -> Candidate:
        count = self.settings.num_references
        chosen = self.references.alike(images[0], T_map_camera, self.camera, count) if with_map else []
        views = [self.references.views[k] for k in chosen]
        distances = view_distances(self.references.T_map_camera[chosen], T_map_camera)
        nearness = nearness_of(distances)
        if further is not None:
            views, nearness = [*views, further], [*nearness, 1.0]
        points = ReferencePoints.concatenate(views)
        confidence = torch.cat([view.confidence * w for view, w in zip(views, nearness, strict=True)])
        # coordinates relative to the start: float32 is not exact enough far from the map's origin
        origin = T_map_camera[:3, 3].copy()
        return Candidate(
            T_camera_local=make_pose(T_map_camera[:3, :3].T, np.zeros(3)),
            origin=origin,
            points=points.points - torch.from_numpy(origin).to(points.points),
            levels=self._levels(images, points, confidence),
            reference_ids=tuple(self.references.ids[k] for k in chosen),
            references=points,
            view_counts=tuple(len(view) for view in views[: len(chosen)]),
            distance_m=float(min(distances, default=0.0)),
            prepare=lambda T: self._prepare(images, T, further=further, with_map=with_map),
            linearize=self._linearize,
        )

    def _levels(
        self, images: tuple[FeatureImage, FeatureImage], points: ReferencePoints, confidence: torch.Tensor
    ) -> tuple[FitLevel, FitLevel]:
        return FitLevel(images[0], points.coarse, confidence), FitLevel(images[1], points.fine, confidence)

    def _linearize(self, candidate: Candidate, level: FitLevel, T_camera_local: Matrix) -> Linearization:
        loss = RobustLoss(self.settings.loss_scale)
        return linearize(
            level.image, candidate.points, level.features, level.confidence, T_camera_local, self.camera, loss
        )

    def _disagreement(self, candidate: Candidate, T_camera_local: Matrix) -> Matrix:
        """Return the covariance (6, 6) by which the reference views disagree on a pose, in the map frame."""
        fine, loss = candidate.levels[-1], RobustLoss(self.settings.loss_scale)
        of_points = candidate.points, fine.features, fine.confidence
        parts = linearize_parts(fine.image, *of_points, candidate.view_counts, T_camera_local, self.camera, loss)
        turn = np.kron(np.eye(2), T_camera_local[:3, :3].T)  # as in map_frame_covariance
        return np.asarray(turn @ disagreement(parts) @ turn.T)

    def _matched(self, start: Candidate, search_cells: int) -> tuple[Candidate, MatchedPose | None]:
        """Return the pose that the points' own matches agree with, and the candidate that it was found from.

        A window cuts off matches on one side if the start is off by much of it, and the fit stays near the start. If
        the map's points do not settle the pose, they search again from where they led, once in the narrow and once in
        the wide window, and the pose with the most support counts.
        """
        best: tuple[Candidate, MatchedPose | None] = start, self._match(start, search_cells)
        if self._is_settled(best[1]) or start.mapped_count < len(start.points):
            return best
        firsts = [best[1]] if search_cells == WIDE_SEARCH_CELLS else [best[1], self._match(start, WIDE_SEARCH_CELLS)]
        for first in firsts:
            if first is None:
                continue
            again = start.prepare(start.in_map(first.T_camera_local))
            matched = self._match(again, SEARCH_CELLS)
            if matched is not None and (best[1] is None or matched.support > best[1].support):
                best = again, matched
        return best

    def _is_settled(self, matched: MatchedPose | None) -> bool:
        return matched is not None and matched.support >= self.settings.settled_support

    def _match(self, candidate: Candidate, search_cells: int) -> MatchedPose | None:
        """Return the pose near the start that the points' own matches agree with."""
        matches = self._search(candidate, search_cells)
        return fit_pose(matches, candidate.points, candidate.T_camera_local, self.camera)

    def _search(self, candidate: Candidate, search_cells: int) -> PointMatches:
        points, (coarse, fine), start = candidate.points, candidate.levels, candidate.T_camera_local
        images, features = (coarse.image, fine.image), (coarse.features, fine.features)
        return search_points(images, points, features, coarse.confidence, start, self.camera, search_cells)

    def _descend(self, start: Candidate, max_cost: float, search_cells: int, least_support: float) -> Alignment:
        candidate, matched = self._matched(start, search_cells)
        if (0.0 if matched is None else matched.support) < least_support:
            return failed_alignment("too few points find themselves near the pose", candidate.reference_ids)
        T, iterations, results = candidate.T_camera_local, 0, list[LevelResult]()
        levels: tuple[FitLevel, ...] = candidate.levels
        if matched is not None:  # within a pixel or two: the fine level is enough, without the points that contradict
            fine = candidate.levels[-1]
            levels = (replace(fine, confidence=fine.confidence * matched.agreement),)
            results.append(LevelResult(T, candidate.at, candidate.at, 0, (T,), (candidate.at.cost,)))
            T = matched.T_camera_local
        loss, rule = RobustLoss(self.settings.loss_scale), StopRule(self.settings.max_iterations)
        for level in levels:
            of_points = candidate.points, level.features, level.confidence
            result = descend(level.image, *of_points, T, self.camera, loss, rule)
            T, iterations = result.T_camera_map, iterations + result.iterations
            results.append(result)
        if matched is not None:  # cost and information of all points, so that changed content counts against the pose
            results[-1] = replace(results[-1], end=self._linearize(candidate, candidate.levels[-1], T))
        return self._judge(start, candidate, results, iterations, max_cost, matched)

    def _judge(
        self,
        start: Candidate,
        candidate: Candidate,
        results: list[LevelResult],
        iterations: int,
        max_cost: float,
        matched: MatchedPose | None,
    ) -> Alignment:
        end, s, distance_m = results[-1], self.settings, candidate.distance_m
        support = 0.0 if matched is None else matched.support
        if support >= s.certain_support:
            max_cost = max(max_cost, s.max_supported_cost)
        T_map_camera, T_start = candidate.in_map(end.T_camera_map), start.in_map(start.T_camera_local)
        valid_ratio = end.end.valid_count / max(len(candidate.points), 1)
        correction_m = float(np.linalg.norm(T_map_camera[:3, 3] - T_start[:3, 3]))
        correction_deg = rotation_angle_deg(T_start[:3, :3].T @ T_map_camera[:3, :3])
        covariance = map_frame_covariance(information_of(end.end), end.T_camera_map)
        apart = self._disagreement(candidate, end.T_camera_map)
        if covariance is not None:
            covariance = s.scale_at(distance_m) * covariance + s.own_covariance_at(distance_m) + apart
            covariance = stretched(covariance, T_map_camera, s.sideways)
        cost, reason = end.end.cost, ""
        if end.end.valid_count < max(s.min_points, s.min_remaining * candidate.at.valid_count):
            reason = f"only {end.end.valid_count} of {candidate.at.valid_count} reference points stayed in view"
        elif cost > max_cost:
            reason = f"the image does not look like the map there (cost {cost:.3f} > {max_cost:.3f})"
        elif correction_m > s.max_correction_m or correction_deg > s.max_correction_deg:
            reason = f"the alignment diverged by {correction_m:.2f} m and {correction_deg:.1f} deg"
        elif covariance is None:
            reason = "the image does not constrain the pose in every direction"
        return Alignment(
            success=not reason,
            reason=reason,
            T_map_camera=T_map_camera,
            covariance=covariance,
            initial_cost=results[0].start.cost,
            final_cost=cost,
            valid_ratio=valid_ratio,
            iterations=iterations,
            reference_ids=candidate.reference_ids,
            distance_m=distance_m,
            disagreement=apart,
            support=support,
            map_support=0.0 if matched is None else matched.support_by(candidate.mapped_count),
            steps=tuple(
                AlignmentStep(candidate.in_map(pose), step_cost, round(level.image.stride))
                for level, result in zip(candidate.levels, results, strict=True)
                for pose, step_cost in zip(result.poses, result.costs, strict=True)
            ),
        )


@dataclass(eq=False)
class Candidate:
    """Starting pose with its reference points, in coordinates relative to the start."""

    T_camera_local: Matrix
    origin: np.ndarray
    points: torch.Tensor
    levels: tuple[FitLevel, FitLevel]
    reference_ids: tuple[int, ...]
    references: ReferencePoints
    view_counts: tuple[int, ...]
    """Number of points of each reference view; further ones that are not the map's follow."""
    distance_m: float
    """Distance of the start from the nearest of the reference views; 0 if there are none."""
    prepare: Callable[[Matrix], Candidate]
    """Returns the candidate of another pose, (4, 4)."""
    linearize: Callable[[Candidate, FitLevel, Matrix], Linearization]
    """Returns the cost of a level at a pose, (4, 4)."""

    @cached_property
    def at(self) -> Linearization:
        """Cost at the pose, at the coarse level."""
        return self.linearize(self, self.levels[0], self.T_camera_local)

    @property
    def mapped_count(self) -> int:
        """Number of points that are the map's."""
        return sum(self.view_counts)

    def in_map(self, T_camera_local: Matrix) -> Matrix:
        """Return ``T_map_camera`` of a pose in the relative coordinates."""
        T_map_camera = inverse_pose(T_camera_local)
        T_map_camera[:3, 3] += self.origin
        return T_map_camera


@lru_cache(1)
def query_levels(features: BackboneFeatures) -> tuple[FeatureImage, FeatureImage]:
    """Return the two levels of one image, coarse then fine, laid out for sampling; every step on the image asks."""
    return (
        FeatureImage.from_maps(features.coarse[0], features.reliability[0], COARSE_STRIDE),
        FeatureImage.from_maps(features.fine[0], features.fine_reliability[0], FINE_STRIDE),
    )


def failed_alignment(reason: str, reference_ids: tuple[int, ...] = ()) -> Alignment:
    """Return an alignment that could not be started."""
    inf = float("inf")
    return Alignment(False, reason, None, None, inf, inf, 0.0, 0, reference_ids)
