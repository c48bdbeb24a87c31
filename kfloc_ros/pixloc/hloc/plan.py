# SPDX-License-Identifier: Apache-2.0
"""Plan of an alignment: reference images, points and start of a query, from retrieval or from a pose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import MapError, SourceError
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, matrix_to_quaternion, quaternion_to_matrix
from kfloc_ros.pixloc.hloc.files import HlocQuery, read_descriptors, read_hloc_log, read_pairs
from kfloc_ros.pixloc.hloc.layouts import Paths
from kfloc_ros.pixloc.hloc.options import RunOptions
from kfloc_ros.pixloc.reference.views import ReferenceScene

Descriptors = Mapping[str, NDArray[np.floating]]
"""Global descriptors by image name."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Plan of one query's alignment."""

    views: tuple[int, ...]
    """Positions of reference images, best first."""
    T_map_camera: Matrix | None
    """Starting pose (4, 4); None if there is none."""
    rows_of: Mapping[int, NDArray[np.int64]] | None = None
    """Rows of the scene's points to use in each image; None: all."""
    reason: str = ""
    """Reason why the query is not aligned; empty if it is."""


class Planner:
    """Planner of alignments.

    Args:
        scene: points and images of the map.
        options: options of the run.
        pairs: reference images of every query, best first; a query's log takes precedence.
        logs: logs of hloc, by query.
        descriptors: global descriptors of queries and references.

    Raises:
        SourceError: an option needs an input that is not given.
    """

    def __init__(
        self,
        scene: ReferenceScene,
        options: RunOptions,
        *,
        pairs: Mapping[str, Sequence[str]] | None = None,
        logs: Mapping[str, HlocQuery] | None = None,
        descriptors: Descriptors | None = None,
    ) -> None:
        self._scene, self._options = scene, options
        self._pairs, self._logs, self._descriptors = pairs or {}, logs or {}, descriptors
        self._position = {image.name: k for k, image in enumerate(scene.images)}
        self._position_of_id = {image.ident: k for k, image in enumerate(scene.images)}
        if logs is None:
            for name, wanted in (
                ("do_inlier_ranking", options.do_inlier_ranking),
                (f"point_selection={options.point_selection}", options.point_selection != "all"),
            ):
                if wanted:
                    raise SourceError(f"'{name}' needs a log of hloc; give one with --hloc-logs.")
        if options.do_pose_approximation and descriptors is None:
            raise SourceError(
                "'do_pose_approximation' needs global descriptors; give them with --global-descriptors, or turn it "
                "off with do_pose_approximation=false."
            )

    @classmethod
    def from_files(cls, scene: ReferenceScene, paths: Paths, options: RunOptions, *, needs_log: bool) -> Planner:
        """Return the planner of a run's files. Where hloc's log is needed and known, it replaces the pairs.

        Raises:
            SourceError: a file is damaged, or an option needs one that is not given.
        """
        needs_log = needs_log or options.do_inlier_ranking or options.point_selection != "all"
        logs = read_hloc_log(paths.hloc_logs) if paths.hloc_logs and needs_log else None
        pairs = read_pairs(paths.retrieval) if logs is None else None
        descriptors = None
        if options.do_pose_approximation and paths.global_descriptors:
            descriptors = read_descriptors(paths.global_descriptors)
        return cls(scene, options, pairs=pairs, logs=logs, descriptors=descriptors)

    def from_retrieval(self, query: str) -> Plan:
        """Start at the best retrieved image, or at a mean of several."""
        log, o = self._logs.get(query), self._options
        ranked = self._retrieved(query, log)
        if not ranked:
            return Plan((), None, reason="no reference image was retrieved for it")
        if o.do_inlier_ranking and log is not None and log.T_map_camera is not None:
            views = self._by_inliers(log)
            if not views:
                return Plan((), None, reason=f"no reference image has more than {o.min_matches_db} inliers")
        else:
            views = ranked[: o.num_dbs]
            if o.do_pose_approximation or o.filter_covisibility:
                views = largest_cluster(self._scene, views)
        return Plan(tuple(views), self._start(query, views), self._rows(log, views))

    def from_pose(self, query: str) -> Plan:
        """Start at hloc's PnP pose, with the images that have most of its inliers."""
        log, o = self._logs.get(query), self._options
        if log is None:
            return Plan((), None, reason="the log of hloc does not have it")
        if log.T_map_camera is None:
            return Plan((), None, reason="hloc found no pose for it")
        if log.num_inliers < o.min_matches_total:
            return Plan((), log.T_map_camera, reason=f"its pose has only {log.num_inliers} inliers")
        views = self._by_inliers(log)
        if not views:
            reason = f"no reference image has more than {o.min_matches_db} inliers"
            return Plan((), log.T_map_camera, reason=reason)
        return Plan(tuple(views), log.T_map_camera, self._rows(log, views))

    def _retrieved(self, query: str, log: HlocQuery | None) -> list[int]:
        if log is not None and log.database_ids:
            found = [self._position_of_id.get(ident) for ident in log.database_ids]
        else:
            found = [self._position.get(name) for name in self._pairs.get(query, ())]
        return [position for position in found if position is not None]

    def _by_inliers(self, log: HlocQuery) -> list[int]:
        counts = {
            self._position_of_id[ident]: count
            for ident, count in log.inlier_counts().items()
            if ident in self._position_of_id
        }
        return rank_by_inliers(counts, self._options.min_matches_db, self._options.num_dbs)

    def _start(self, query: str, views: Sequence[int]) -> Matrix:
        poses = [inverse_pose(self._scene.images[k].T_camera_map) for k in views]
        if not self._options.do_pose_approximation or self._descriptors is None:
            return poses[0]
        names = [query, *(self._scene.images[k].name for k in views)]
        if missing := next((name for name in names if name not in self._descriptors), None):
            raise SourceError(f"The global descriptors have no entry '{missing}'.")
        own, *others = (self._descriptors[name] for name in names)
        weights = similarity_weights(own, np.stack(others))
        return average_pose(poses, weights.tolist()) if weights.sum() > 0 else poses[0]

    def _rows(self, log: HlocQuery | None, views: Sequence[int]) -> dict[int, NDArray[np.int64]] | None:
        """Return, per image, the points that were matched with it (and are inliers)."""
        if self._options.point_selection == "all" or log is None:
            return None
        ids, rows_of = self._scene.point_ids, {}
        wanted = log.inliers if self._options.point_selection == "inliers" else np.ones(len(log.inliers), dtype=bool)
        for view in views:
            ident = self._scene.images[view].ident
            seen = np.array([any(log.database_ids[k] == ident for k in places) for places in log.seen_in], dtype=bool)
            points = log.point_ids[wanted & seen] if len(seen) == len(wanted) else log.point_ids[wanted]
            rows = np.minimum(np.searchsorted(ids, points), len(ids) - 1)
            rows_of[view] = np.unique(rows[ids[rows] == points]).astype(np.int64)
        return rows_of


SIMILARITY_POWER = 8
"""Exponent of descriptor similarities as weights of poses (Pion et al., 3DV 2020)."""


def rank_by_inliers(inliers: Mapping[int, int], min_matches: int, num_dbs: int) -> list[int]:
    """Return the images with more than ``min_matches`` inliers, most first, at most ``num_dbs``."""
    enough = [(count, position) for position, count in inliers.items() if count > min_matches]
    return [position for _, position in sorted(enough, key=lambda row: -row[0])[:num_dbs]]


def largest_cluster(scene: ReferenceScene, positions: Sequence[int]) -> list[int]:
    """Return the largest group of ``positions`` linked by common points, in their order.

    Of equally large groups the one with the image named first wins.
    """
    linked = scene.covisibility(positions) > 0
    group = np.arange(len(positions))
    for i in range(len(positions)):
        for j in range(i):
            if linked[i, j]:
                group[group == max(group[i], group[j])] = min(group[i], group[j])
    best = max(dict.fromkeys(group.tolist()), key=lambda g: int((group == g).sum()), default=0)
    return [position for position, g in zip(positions, group, strict=True) if g == best]


def average_pose(T_map_camera: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Return the weighted mean of camera centres and of orientations (dominant eigenvector of the sum of w q q^T).

    Raises:
        MapError: there is no pose, or the weights are invalid.
    """
    w = np.asarray(weights, dtype=np.float64)
    if not len(w) or len(w) != len(T_map_camera) or not np.isfinite(w).all() or w.sum() <= 0 or (w < 0).any():
        raise MapError("Poses can be averaged only with as many weights, none negative and not all zero.")
    w = w / w.sum()
    centre = sum(weight * T[:3, 3] for weight, T in zip(w, T_map_camera, strict=True))
    quaternions = np.array([matrix_to_quaternion(T[:3, :3]) for T in T_map_camera])
    _, vectors = np.linalg.eigh(np.einsum("n,ni,nj->ij", w, quaternions, quaternions))
    return make_pose(quaternion_to_matrix(vectors[:, -1]), np.asarray(centre))


def similarity_weights(query: NDArray[np.floating], references: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return (K,) weights of images from descriptors (D,) and (K, D): their similarity to the eighth power."""
    a = np.asarray(query, dtype=np.float64)
    b = np.asarray(references, dtype=np.float64)
    similarity = b @ a / np.maximum(np.linalg.norm(b, axis=1) * np.linalg.norm(a), 1e-12)
    weights: NDArray[np.float64] = np.clip(similarity, 0, None) ** SIMILARITY_POWER
    return weights
