# SPDX-License-Identifier: Apache-2.0
"""Adjustment of a recording's poses to its images: a pose graph over matches between its views.

Poses of a tracking camera or of wheel odometry are smooth, but they drift by a degree or two until a place is seen
again. A map of such poses contradicts itself: the same corner has two places, and a localized pose depends on which
views it was aligned with. Matches between views, with the depth of one of them, measure relative poses; the graph's
solution is the set of poses that contradicts these least, held near the given poses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg, so3_exp, so3_log
from kfloc_ros.pixloc.optimizer import match_equations
from kfloc_ros.pixloc.point_matching import PointMatches, fit_pose, search_points
from kfloc_ros.pixloc.references import ReferencePoints, extract_reference_points, view_distances
from kfloc_ros.pixloc.refiner import query_levels
from kfloc_ros.types import Frame

MAX_VIEWS = 300
"""Largest number of views in the graph; the others follow the corrections of their neighbours in time."""
POINTS_PER_VIEW = 400
NEXT_VIEWS = 3
"""Views after each one that it is paired with."""
REVISITS = 8
"""Nearest views, from other parts of the recording, that each one is paired with."""
REVISIT_GAP = 12
"""Smallest number of views in between for another part of the recording."""
FARTHEST_M = 0.8
"""Largest distance of paired views; a radian counts as ``METRES_PER_RADIAN``."""
MIN_SUPPORT = 4.0
"""Support of an accepted relative pose, see ``MatchedPose.support``."""
MIN_AGREEING = 60
SIGMA_PX = 1.5
"""Noise of a match of two views of one recording, including that of depth."""
MATCHES_PER_INDEPENDENT_ONE = 20.0
"""Number of matches that count as one independent observation."""
GIVEN_SIGMA_M, GIVEN_SIGMA_RAD = 0.05, 0.03
"""Uncertainty of the given poses; it only fixes what the images leave free."""
ROBUST_CHI2 = 30.0
"""Scale of the redescending loss of a pair, on its squared Mahalanobis error with 6 degrees of freedom."""
STEPS = 12


@dataclass(frozen=True, eq=False)
class RelativePose:
    """Measured pose of view ``a`` in the frame of view ``b``."""

    a: int
    b: int
    T_b_a: Matrix
    information: Matrix
    """(6, 6) of a right perturbation (dt, dw) of ``T_b_a``."""


@dataclass(frozen=True, eq=False)
class Adjustment:
    """Adjusted poses of all frames, and the disagreement of pairs of views before and after."""

    T_map_camera: NDArray[np.float64]
    """(N, 4, 4)"""
    pairs: int
    """Number of pairs of views from different parts of the recording."""
    before: tuple[float, float]
    """Median disagreement of these pairs with the given poses, metres and degrees."""
    after: tuple[float, float]
    """The same with the adjusted poses."""

    @property
    def text(self) -> str:
        """Sentence for the log and the map's description."""
        (m0, deg0), (m1, deg1) = self.before, self.after
        return (
            f"{self.pairs} pairs of views disagreed by {100 * m0:.1f} cm, {deg0:.2f} deg in the median; "
            f"adjusted: {100 * m1:.1f} cm, {deg1:.2f} deg"
        )


class AdjustedPoses(DerivedSource):
    """Source with adjusted poses.

    Args:
        source: to change.
        T_map_camera: (N, 4, 4) pose of every frame.
    """

    passes_images_on = True

    def __init__(self, source: FrameSource, T_map_camera: NDArray[np.float64]) -> None:
        super().__init__(source)
        self._T_map_camera = T_map_camera

    def changed(self, frame: Frame, position: int) -> Frame:
        return replace(frame, T_map_camera=self.pose(position)) if frame.T_map_camera is not None else frame

    def pose(self, position: int) -> Matrix | None:
        return self._T_map_camera[position] if self._source.pose(position) is not None else None


@dataclass(frozen=True, eq=False)
class _View:
    position: int
    features: BackboneFeatures
    points: ReferencePoints


def adjust_poses(
    source: FrameSource, camera: Camera, backbone: Backbone, on_progress: Callable[[float], None] = lambda share: None
) -> Adjustment | None:
    """Adjust the poses of a recording with depth to its images.

    Args:
        source: frames with depth and poses.
        camera: pinhole camera of the map, to which images are adapted.
        backbone: feature network.
        on_progress: called with the share that is done.

    Returns:
        None if no part of the recording is seen twice.
    """
    given = [source.pose(position) for position in range(len(source))]
    views = _views(source, camera, backbone, given, lambda share: on_progress(0.7 * share))
    poses = np.array([given[view.position] for view in views]).reshape(-1, 4, 4)
    pairs: list[RelativePose] = []
    wanted = _pairs(poses, source, views)
    for done, (a, b) in enumerate(wanted):
        pair = _measure(views, poses, a, b, camera)
        if pair is not None:
            pairs.append(pair)
        on_progress(0.7 + 0.25 * done / len(wanted))
    revisits = [pair for pair in pairs if abs(pair.a - pair.b) > REVISIT_GAP]
    if not revisits:
        return None
    adjusted = solve_graph(poses, pairs)
    on_progress(1.0)
    corrections = [inverse_pose(T) @ new for T, new in zip(poses, adjusted, strict=True)]
    everywhere = _spread(corrections, [view.position for view in views], given)
    return Adjustment(everywhere, len(revisits), _disagreement(poses, revisits), _disagreement(adjusted, revisits))


def solve_graph(T_map_camera: NDArray[np.float64], pairs: Sequence[RelativePose]) -> NDArray[np.float64]:
    """Return the poses (N, 4, 4) that agree best with relative poses, near the given ones (N, 4, 4).

    Gauss-Newton over right perturbations; a pair that contradicts the others loses its weight (Geman and McClure).
    """
    count, poses = len(T_map_camera), [T.copy() for T in T_map_camera]
    prior = np.diag([GIVEN_SIGMA_M**-2] * 3 + [GIVEN_SIGMA_RAD**-2] * 3)
    for _ in range(STEPS):
        H, g = np.zeros((count, 6, count, 6)), np.zeros((count, 6))
        for pair in pairs:
            error, J_a, J_b = _error(poses, pair)
            weight = (1 + float(error @ pair.information @ error) / ROBUST_CHI2) ** -2
            W = weight * pair.information
            for i, J_i in ((pair.a, J_a), (pair.b, J_b)):
                g[i] += J_i.T @ W @ error
                for j, J_j in ((pair.a, J_a), (pair.b, J_b)):
                    H[i, :, j, :] += J_i.T @ W @ J_j
        for i, (T, T_given) in enumerate(zip(poses, T_map_camera, strict=True)):
            away = inverse_pose(T_given) @ T
            H[i, :, i, :] += prior
            g[i] += prior @ np.concatenate([away[:3, 3], so3_log(away[:3, :3])])
        step = -np.linalg.solve(H.reshape(6 * count, 6 * count), g.reshape(-1)).reshape(count, 6)
        poses = [T @ make_pose(so3_exp(d[3:]), d[:3]) for T, d in zip(poses, step, strict=True)]
        if np.abs(step).max() < 1e-5:
            break
    return np.array(poses)


def _error(poses: Sequence[Matrix], pair: RelativePose) -> tuple[NDArray[np.float64], Matrix, Matrix]:
    """Return the error (6,) of a pair and its derivatives (6, 6) by right perturbations of both poses."""
    T_b_a = inverse_pose(poses[pair.b]) @ poses[pair.a]
    E = inverse_pose(pair.T_b_a) @ T_b_a
    R, t = T_b_a[:3, :3], T_b_a[:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    J_a, J_b = np.zeros((6, 6)), np.zeros((6, 6))
    J_a[:3, :3], J_a[3:, 3:] = E[:3, :3], np.eye(3)
    J_b[:3, :3], J_b[:3, 3:], J_b[3:, 3:] = -E[:3, :3] @ R.T, E[:3, :3] @ R.T @ cross, -R.T
    return np.concatenate([E[:3, 3], so3_log(E[:3, :3])]), J_a, J_b


def _views(
    source: FrameSource,
    camera: Camera,
    backbone: Backbone,
    given: Sequence[Matrix | None],
    on_progress: Callable[[float], None],
) -> list[_View]:
    adapter = ImageAdapter(source.camera, camera)
    usable = [p for p, T in enumerate(given) if T is not None and np.isfinite(T).all()]
    chosen = usable[:: max(1, -(-len(usable) // MAX_VIEWS))]
    views = []
    for done, position in enumerate(chosen):
        frame = source.read(position)
        on_progress(done / len(chosen))
        if frame is None or frame.depth_m is None:
            continue
        features = backbone.extract(adapter(frame.image))
        depth_m = adapter.nearest(frame.depth_m)
        points = extract_reference_points(features, depth_m, camera, np.eye(4), POINTS_PER_VIEW)
        if len(points) >= MIN_AGREEING:
            views.append(_View(position, features, points))
    return views


def _pairs(poses: NDArray[np.float64], source: FrameSource, views: Sequence[_View]) -> list[tuple[int, int]]:
    """Return pairs (a, b) of views: neighbours in time, and views of other parts of the recording that are near."""
    recordings = source.sequences()
    recording = [recordings[view.position] for view in views]
    pairs = []
    for a in range(len(views)):
        pairs += [(a, b) for b in range(a + 1, min(a + 1 + NEXT_VIEWS, len(views))) if recording[a] == recording[b]]
        away = view_distances(poses, poses[a])
        others = [b for b in np.argsort(away, kind="stable") if abs(int(b) - a) > REVISIT_GAP and away[b] < FARTHEST_M]
        pairs += [(a, int(b)) for b in others[:REVISITS]]
    return pairs


def _measure(views: Sequence[_View], poses: NDArray[np.float64], a: int, b: int, camera: Camera) -> RelativePose | None:
    """Return the pose of view ``a`` relative to ``b``, by matches of the points of ``b`` in the image of ``a``."""
    points, images = views[b].points, query_levels(views[a].features)
    T_a_b = inverse_pose(poses[a]) @ poses[b]
    features = (points.coarse, points.fine)
    fitted, matches = None, None
    for _ in range(2):  # again from the end: the window then lies around the right places
        matches = search_points(images, points.points, features, points.confidence, T_a_b, camera)
        fitted = fit_pose(matches, points.points, T_a_b, camera)
        if fitted is None:
            return None
        T_a_b = fitted.T_camera_local
    assert fitted is not None and matches is not None
    if fitted.support < MIN_SUPPORT or fitted.agreeing_count < MIN_AGREEING:
        return None
    return RelativePose(a, b, inverse_pose(T_a_b), _information(matches, points, T_a_b, camera))


def _information(matches: PointMatches, points: ReferencePoints, T_a_b: Matrix, camera: Camera) -> Matrix:
    """Return the information of a right perturbation of ``T_b_a``, from matches."""
    used = matches.weights > 0
    pixels, X = matches.pixels[used].double().numpy(), points.points[used].double().numpy()
    H, _ = match_equations(pixels, X, np.ones(len(X)), T_a_b, camera, 3.0, np.zeros(len(X)))
    # T_a_b' = D(dt, dw) T_a_b; T_b_a' = T_b_a D^-1: a right perturbation of the opposite sign
    return np.asarray(H / (MATCHES_PER_INDEPENDENT_ONE * SIGMA_PX**2))


def _spread(
    corrections: Sequence[Matrix], positions: Sequence[int], given: Sequence[Matrix | None]
) -> NDArray[np.float64]:
    """Return the corrected poses (N, 4, 4) of all frames; between views of the graph the correction is interpolated."""
    tangents = np.array([np.concatenate([C[:3, 3], so3_log(C[:3, :3])]) for C in corrections])
    poses = np.tile(np.eye(4), (len(given), 1, 1))
    for position, T in enumerate(given):
        if T is not None:
            d = np.array([np.interp(position, positions, tangents[:, k]) for k in range(6)])
            poses[position] = T @ make_pose(so3_exp(d[3:]), d[:3])
    return poses


def _disagreement(poses: NDArray[np.float64], pairs: Sequence[RelativePose]) -> tuple[float, float]:
    """Return the median disagreement of pairs with poses, metres and degrees."""
    errors = [inverse_pose(pair.T_b_a) @ inverse_pose(poses[pair.b]) @ poses[pair.a] for pair in pairs]
    metres = float(np.median([np.linalg.norm(E[:3, 3]) for E in errors]))
    return metres, float(np.median([rotation_angle_deg(E[:3, :3]) for E in errors]))
