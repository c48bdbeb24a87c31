# SPDX-License-Identifier: Apache-2.0
"""Alignment of a map with an occupancy grid: how a floor plan of map_server or slam_toolbox lies to a map."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.files import MAX_IMAGE_PIXELS, read_bytes, read_yaml
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, so3_exp
from kfloc_ros.mapping.picture import floor_axes, up_axis
from kfloc_ros.mapping.registration import level, reference_points
from kfloc_ros.maps.scene_map import SceneMap

Array = NDArray[np.float64]
MAX_GRID_BYTES = 300_000_000
MAX_SIDE = 20_000
_NEAR_M = 0.10
"""A map point this near to an occupied cell counts as on a wall."""
_SHARP_M = 0.03
"""Width of the walls in the last refinement, after which furniture that the grid does not have pulls no more."""
_FIELD_M = 0.5
"""Distances to occupied cells are cut off here."""
_COARSE_M, _COARSE_DEG = 0.10, 2.0
_MAX_POINTS = 4000
MIN_SHARE = 0.35
"""Smallest share of the map's wall points on occupied cells in an alignment that is believed."""
RIVAL = 0.93
"""An alignment elsewhere with this share of the best one's score makes it ambiguous."""
_APART_M, _APART_DEG = 0.5, 10.0
MAX_STRETCH = 0.05
"""Largest relative difference of two distances, in the map and in the grid, between the points given by hand."""


@dataclass(frozen=True, eq=False)
class OccupancyGrid:
    """Occupancy grid as map_server reads it."""

    occupied: NDArray[np.bool_]
    """(H, W); row 0 is at the bottom, column 0 on the left."""
    free: NDArray[np.bool_]
    resolution_m: float
    T_map_grid: Matrix
    """(4, 4) pose of the corner of cell (0, 0) in nav2's map frame: the yaml's ``origin``."""
    name: str = ""


@dataclass(frozen=True, eq=False)
class GridAlignment:
    """Way in which a map lies to a grid."""

    T_grid_map: Matrix
    """(4, 4) from the map's frame to nav2's map frame; the floor becomes z = 0."""
    share: float
    """Share of the map's wall points within 10 cm of an occupied cell."""
    free_share: float
    """Share of the mapping views that were taken above free cells."""
    fault: str = ""
    """Reason not to believe it; empty if there is none."""
    wall_points: Array = field(default_factory=lambda: np.zeros((0, 3)))
    """(N, 3) points that were compared, in the map's frame."""


def read_grid(path: Path) -> OccupancyGrid:
    """Read a grid of map_server: a yaml file, and the image that it names.

    Raises:
        SourceError: a file is missing, too large or damaged, or a value is invalid.
    """
    try:
        given = read_yaml(path)
        if not isinstance(given, dict):
            raise ValueError("it is no mapping of names to values")
        resolution_m = float(given["resolution"])
        x, y, turn = (float(value) for value in given["origin"])
        occupied_above, free_below = (float(given[f"{name}_thresh"]) for name in ("occupied", "free"))
        negate, image = bool(int(given.get("negate", 0))), str(given["image"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = f"it has no '{error.args[0]}'" if isinstance(error, KeyError) else str(error)
        raise SourceError(f"'{path}' is no occupancy grid of map_server: {what}.") from error
    numbers = [resolution_m, x, y, turn, occupied_above, free_below]
    if not (np.isfinite(numbers).all() and 1e-3 <= resolution_m <= 10.0 and np.abs(numbers).max() < 1e7):
        raise SourceError(f"'{path}' has a resolution (0.001 to 10 m), an origin or a threshold out of range.")
    picture = path.parent / image
    try:
        data = read_bytes(picture, MAX_GRID_BYTES)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    except (OSError, cv2.error) as error:
        raise SourceError(f"The image of the grid, '{picture}', cannot be read: {error}.") from error
    if pixels is None or pixels.size > MAX_IMAGE_PIXELS or max(pixels.shape) > MAX_SIDE:
        raise SourceError(f"The image of the grid, '{picture}', is no image of at most {MAX_SIDE} pixels a side.")
    share = pixels[::-1].astype(np.float64) / 255.0
    probability = share if negate else 1.0 - share
    occupied, free = probability > occupied_above, probability < free_below
    if occupied.sum() < 20:
        raise SourceError(f"The grid '{path}' has {int(occupied.sum())} occupied cells, which are no walls.")
    return OccupancyGrid(occupied, free, resolution_m, make_pose(so3_exp([0, 0, turn]), [x, y, 0.0]), path.name)


def align_with_grid(scene_map: SceneMap, grid: OccupancyGrid, low_m: float = 0.1, high_m: float = 2.0) -> GridAlignment:
    """Find how a map lies to a grid, by the map's points on walls and by where its views were taken.

    Every rotation is tried, each with all translations at once (correlation of the points with the likelihood of the
    walls). The best ones are refined. A view over an occupied or unknown cell counts against an alignment.

    Args:
        scene_map: map in metres.
        grid: the grid.
        low_m: lowest height above the floor of the points that are compared.
        high_m: highest one; a lidar's grid shows what is at its height, and walls at all heights.

    Raises:
        SourceError: too few points are at these heights.
    """
    T_level = level(scene_map)
    leveled = _moved(reference_points(scene_map), T_level)
    leveled = leveled[(leveled[:, 2] >= low_m) & (leveled[:, 2] <= high_m)]
    if len(leveled) < 50:
        raise SourceError(
            f"The map has {len(leveled)} points from {low_m:g} to {high_m:g} m above the floor; 50 are needed. Give "
            "other heights, or two points by hand."
        )
    walls = _upright(leveled)
    views = _moved(scene_map.references.T_map_camera[:, :3, 3], T_level)[:, :2]
    fitter = _Fitter(grid, walls, views)
    ranked = fitter.search()
    (score, pose), rest = ranked[0], ranked[1:]
    pose = fitter.refined(pose, sharp=True)
    share, free_share = fitter.shares(pose)
    fault = ""
    if share < MIN_SHARE:
        fault = f"only {100 * share:.0f} % of the map's points at these heights are on occupied cells of the grid"
    rivals = [(other, at) for other, at in rest if other >= RIVAL * score]
    if not fault and rivals:
        turn = math.degrees(_wrapped(rivals[0][1][2] - pose[2]))
        fault = (
            f"the grid fits as well elsewhere, {math.dist(rivals[0][1][:2], pose[:2]):.1f} m and {abs(turn):.0f} deg "
            "away"
        )
    T = grid.T_map_grid @ _planar(pose) @ T_level
    return GridAlignment(T, share, free_share, fault, _moved(_raised(walls), inverse_pose(T_level)))


def align_by_hand(
    scene_map: SceneMap, grid: OccupancyGrid, pairs: list[tuple[float, float, float, float]]
) -> GridAlignment:
    """Return the alignment by two or more points given in both.

    Args:
        scene_map: map in metres.
        grid: the grid.
        pairs: two coordinates in the map as `kfloc map view` shows them (x and y, if z points up), and x, y in nav2's
            map frame, metres.

    Raises:
        SourceError: there are fewer than two points, or their distances in map and grid differ.
    """
    if not np.isfinite(pairs).all():
        raise SourceError("The points must be finite numbers.")
    if len(pairs) < 2:
        raise SourceError("Two points are needed; give --pair twice.")
    T_level = level(scene_map)
    given = np.array(pairs)
    placed = np.zeros((len(given), 3))
    placed[:, list(floor_axes(*up_axis(scene_map)))] = given[:, :2]
    ours, theirs = _moved(placed, T_level)[:, :2], given[:, 2:]
    a, b = ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)
    ours_m, theirs_m = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if min(ours_m, theirs_m) < 0.1:
        raise SourceError("The two points are the same; give two that are far from each other.")
    if abs(ours_m / theirs_m - 1.0) > MAX_STRETCH:
        raise SourceError(
            f"The points are {ours_m / theirs_m:.3f} times as far apart in the map as in the grid. Correct the points, "
            "or the map's scale (`kfloc map scale`)."
        )
    turn = math.atan2(float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum()), float((a * b).sum()))
    R = so3_exp([0.0, 0.0, turn])
    shift = theirs.mean(axis=0) - (R[:2, :2] @ ours.mean(axis=0))
    T = make_pose(R, [*shift, 0.0]) @ T_level
    leveled = _moved(reference_points(scene_map), T_level)
    leveled = leveled[(leveled[:, 2] >= 0.1) & (leveled[:, 2] <= 2.0)]
    walls = _upright(leveled) if len(leveled) else leveled[:, :2]
    views = _moved(scene_map.references.T_map_camera[:, :3, 3], T_level)[:, :2]
    pose = _pose_of(inverse_pose(grid.T_map_grid) @ T @ inverse_pose(T_level))
    share, free_share = _Fitter(grid, walls, views).shares(pose) if len(walls) else (0.0, 0.0)
    return GridAlignment(T, share, free_share, "", _moved(_raised(walls), inverse_pose(T_level)))


class _Fitter:
    """Scores of planar poses (x, y, turn) of leveled points in a grid whose corner is the origin."""

    def __init__(self, grid: OccupancyGrid, walls: Array, views: Array) -> None:
        self._grid, self._walls, self._views = grid, walls, views
        self._pad = math.ceil(_FIELD_M / grid.resolution_m)
        padded = np.pad(grid.occupied, self._pad)
        away = cv2.distanceTransform((~padded).astype(np.uint8), cv2.DIST_L2, 5) * grid.resolution_m
        self._away_m = np.minimum(away, _FIELD_M)
        self._likelihood = np.exp(-0.5 * (self._away_m / _NEAR_M) ** 2)
        self._sharp = np.exp(-0.5 * (self._away_m / max(_SHARP_M, grid.resolution_m)) ** 2)
        self._free = np.pad(grid.free, self._pad)

    def shares(self, pose: Array) -> tuple[float, float]:
        """Return the share of points near occupied cells, and of views over free ones."""
        on_walls = self._lookup(self._away_m, _placed(self._walls, pose), _FIELD_M) <= _NEAR_M
        over_free = self._lookup(self._free, _placed(self._views, pose), 0.0)
        return float(on_walls.mean()), float(over_free.mean())

    def score(self, pose: Array, *, sharp: bool = False) -> float:
        """Return the mean likelihood of the points, times the share of views over free cells."""
        likelihood = self._sharp if sharp else self._likelihood
        return float(self._lookup(likelihood, _placed(self._walls, pose), 0.0).mean()) * (
            0.2 + 0.8 * float(self._lookup(self._free, _placed(self._views, pose), 0.0).mean())
        )

    def search(self) -> list[tuple[float, Array]]:
        """Return refined poses that are apart from each other, with their scores, best first."""
        found = sorted(
            ((self.score(pose), pose) for pose in self._candidates()), key=lambda item: item[0], reverse=True
        )
        refined: list[tuple[float, Array]] = []
        for _, start in found[:24]:
            pose = self.refined(start)
            if all(_apart(pose, other) for _, other in refined):
                refined.append((self.score(pose), pose))
        return sorted(refined, key=lambda item: item[0], reverse=True)

    def _candidates(self) -> list[Array]:
        """Return the translations with the best correlation, for every rotation."""
        shrink = max(round(_COARSE_M / self._grid.resolution_m), 1)
        cell_m = shrink * self._grid.resolution_m
        likelihood = self._likelihood[: self._likelihood.shape[0] // shrink * shrink]
        likelihood = likelihood[:, : likelihood.shape[1] // shrink * shrink]
        rows, columns = likelihood.shape[0] // shrink, likelihood.shape[1] // shrink
        coarse = likelihood.reshape(rows, shrink, columns, shrink).max(axis=(1, 3))
        reach = math.ceil(2 * float(np.abs(self._walls).max()) / cell_m) + 2
        shape = (coarse.shape[0] + reach, coarse.shape[1] + reach)
        spectrum = np.fft.rfft2(coarse, shape)
        border_m = self._pad * self._grid.resolution_m
        poses = []
        for turn in np.radians(np.arange(0.0, 360.0, _COARSE_DEG)):
            turned = _placed(self._walls, np.array([0.0, 0.0, turn]))
            low = turned.min(axis=0)
            cells = ((turned - low) / cell_m).astype(int)
            image = np.zeros(shape)
            np.add.at(image, (cells[:, 1] % shape[0], cells[:, 0] % shape[1]), 1.0)
            overlap = np.fft.irfft2(spectrum * np.conj(np.fft.rfft2(image)), shape)
            for _ in range(3):
                row, column = np.unravel_index(int(overlap.argmax()), shape)
                overlap[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4] = -1.0
                # Beyond the middle of the padding, the correlation wraps to negative shifts.
                shift = np.array([_unwrapped(int(column), shape[1], coarse.shape[1]),
                                  _unwrapped(int(row), shape[0], coarse.shape[0])])  # fmt: skip
                poses.append(np.array([*(shift * cell_m - low - border_m), turn]))
        return poses

    def refined(self, pose: Array, *, sharp: bool = False) -> Array:
        """Return the best pose near another, by ever smaller steps."""
        best, score = pose, self.score(pose, sharp=sharp)
        step = np.array([_COARSE_M, _COARSE_M, math.radians(_COARSE_DEG)])
        while step[0] > 0.002:
            moves = [np.array(m) * step for m in np.ndindex(3, 3, 3)]
            tried = [best + move - step for move in moves]
            scores = [self.score(candidate, sharp=sharp) for candidate in tried]
            k = int(np.argmax(scores))
            if scores[k] > score + 1e-9:
                best, score = tried[k], scores[k]
            else:
                step = step / 2
        return best

    def _lookup(self, field_: NDArray[Any], points: Array, outside: float) -> Array:
        cells = np.floor(points / self._grid.resolution_m).astype(int) + self._pad
        inside = ((cells >= 0) & (cells < [field_.shape[1], field_.shape[0]])).all(axis=1)
        values = np.full(len(points), outside, dtype=np.float64)
        values[inside] = field_[cells[inside, 1], cells[inside, 0]]
        return values


def _raised(walls: Array) -> Array:
    """Return planar points (N, 2) as points at a height of one metre (N, 3)."""
    return np.column_stack([walls, np.ones(len(walls))])


def _moved(points: Array, T: Matrix) -> Array:
    return np.asarray(points @ T[:3, :3].T + T[:3, 3])


def _upright(points: Array) -> Array:
    """Return the places (N, 2) of points in columns of 10 cm that have points at several heights: upright surfaces.

    Points on tables and the floor's clutter have only one height. If hardly any column has several, all points count.
    """
    cells = np.floor(points[:, :2] / _COARSE_M).astype(int)
    _, column = np.unique(cells, axis=0, return_inverse=True)
    column = column.reshape(-1)
    low, high = np.full(column.max() + 1, np.inf), np.full(column.max() + 1, -np.inf)
    np.minimum.at(low, column, points[:, 2])
    np.maximum.at(high, column, points[:, 2])
    upright = points[(high - low)[column] > 0.3]
    chosen = upright if len(upright) >= 100 else points
    if len(chosen) > _MAX_POINTS:
        chosen = chosen[np.random.default_rng(0).choice(len(chosen), _MAX_POINTS, replace=False)]
    return np.asarray(chosen[:, :2])


def _planar(pose: Array) -> Matrix:
    return make_pose(so3_exp([0.0, 0.0, pose[2]]), [pose[0], pose[1], 0.0])


def _pose_of(T: Matrix) -> Array:
    return np.array([T[0, 3], T[1, 3], math.atan2(T[1, 0], T[0, 0])])


def _placed(points: Array, pose: Array) -> Array:
    c, s = math.cos(pose[2]), math.sin(pose[2])
    return np.asarray(points @ np.array([[c, s], [-s, c]]) + pose[:2])


def _apart(a: Array, b: Array) -> bool:
    return math.dist(a[:2], b[:2]) > _APART_M or abs(_wrapped(a[2] - b[2])) > math.radians(_APART_DEG)


def _wrapped(angle: float) -> float:
    return math.atan2(math.sin(angle), math.cos(angle))


def _unwrapped(index: int, length: int, size: int) -> int:
    return index if index < size else index - length
