# SPDX-License-Identifier: Apache-2.0
"""Depth from motion: depth images for views with poses but without depth, so that they can be mapped like RGB-D.

Depth is computed by :mod:`kfloc_ros.mapping.plane_sweep`. If the source has points of a reconstruction (see
``FrameSource.visible_points``), they set the search range and replace the plane sweep's depth at their pixels. If it
has none, matches of a few pairs of images, triangulated with the poses, set the range: places differ in size, and a
reconstruction without a scale may have any unit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.device import choose_device
from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone
from kfloc_ros.frames import DerivedSource, FrameSource, Selection
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.mapping.check_depth import triangulated_depths
from kfloc_ros.mapping.check_geometry import Model, Observations
from kfloc_ros.mapping.check_pairs import PairFinder, Poses
from kfloc_ros.mapping.plane_sweep import AGREE_RATIO, PlaneSweepSettings, PlaneSweepView, plane_sweep_depth
from kfloc_ros.mapping.views import map_camera
from kfloc_ros.types import Frame, Matrix

NEIGHBOURS = 6
MIN_BASELINE, MAX_BASELINE, BEST_BASELINE = 0.04, 0.3, 0.12
"""Baselines in units of the usual depth: short ones give no depth, long ones look different."""
MAX_TURN_DEG = 35.0
MAX_EPIPOLAR = 1.5e-3
"""Median distance of matches from their epipolar lines, by the focal length, beyond which poses are too inaccurate.
With 0.0008 (RedKitchen, SfM poses), four fifths of the depths are within 5 %; with 0.0029 (``d435_office``), one fifth
is within 10 %."""
RANGE_PAIRS = 12
"""Number of pairs of images whose matches set the search range."""
MIN_RANGE_POINTS = 100
RANGE_QUANTILES = (0.01, 0.5, 0.99)
NEARER, FARTHER = 0.6, 2.0
"""Factors from the nearest and the farthest point to the search range."""
PROBES = 10
"""Number of frames read to find out whether a source has depth."""
CACHED_VIEWS = 300
"""Limit on cached features (0.6 MB a view); views come in order, so the neighbours are mostly cached."""


@dataclass(frozen=True)
class MotionDepthSettings:
    """Range of depth and acceptance limits; the range counts where the views' points do not tell one."""

    near_m: float = 0.3
    far_m: float = 12.0
    usual_m: float = 2.0
    """Depth for which baselines are chosen, in metres."""
    min_score: float = 0.7
    min_margin: float = 0.03
    max_views: int = 250
    """Limit on views. Of a longer source, every second (third, ...) view is used: neighbouring frames are redundant."""


class MotionDepth(DerivedSource):
    """Source with depth computed from the motion between its views, in the camera of its map.

    Args:
        source: views with poses; their own depth, if any, is ignored.
        settings: range of depth and acceptance limits.
        device: device of the backbone.
        on_progress: called with the completed share of the first pass (over the poses).

    Raises:
        SourceError: fewer than three views have poses.
    """

    def __init__(
        self,
        source: FrameSource,
        settings: MotionDepthSettings | None = None,
        *,
        device: torch.device | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        settings = settings or MotionDepthSettings()
        step = -(-len(source) // settings.max_views)
        super().__init__(source if step == 1 else Selection(source, range(0, len(source), step)))
        self._camera = map_camera(source.camera)
        self._adapter = ImageAdapter(source.camera, self._camera)
        self._backbone = Backbone(device=device or torch.device("cpu"))
        self._cache: OrderedDict[int, PlaneSweepView] = OrderedDict()
        self._poses: dict[int, Matrix] = {}
        for position in range(len(self._source)):
            pose = self._source.pose(position)
            if pose is not None and np.isfinite(pose).all():
                self._poses[position] = pose
            on_progress((position + 1) / len(self._source))
        if len(self._poses) < 3:
            raise SourceError(f"Depth from motion needs at least three views with poses; '{source.name}' has fewer.")
        self._settings = settings_by_matches(source, settings)

    @property
    def camera(self) -> Camera:
        return self._camera

    @property
    def images(self) -> FrameSource:
        """The views without this depth."""
        return self._source

    def pose(self, position: int) -> Matrix | None:
        return self._poses.get(position)

    def changed(self, frame: Frame, position: int) -> Frame:
        frame = replace(frame, image=self._adapter(frame.image), camera=self._camera, depth_m=None)
        pose = self._poses.get(position)
        if pose is None:
            return replace(frame, T_map_camera=None)
        points = self._local_points(position, pose)
        settings = self._range(points)
        ids = choose_neighbours(position, self._poses, settings.usual_m)
        depth_m = np.zeros((self._camera.height, self._camera.width), dtype=np.float32)
        if len(ids) >= 2:
            sweep = PlaneSweepSettings(
                settings.near_m, settings.far_m, min_score=settings.min_score, min_margin=settings.min_margin
            )
            neighbours = [view for i in ids if (view := self._view(i)) is not None]
            own = self._view(position, frame)
            if own is not None and len(neighbours) >= 2:
                swept = plane_sweep_depth(own, neighbours, self._camera, sweep)
                depth_m = spread_cells(swept.numpy(), (self._camera.height, self._camera.width))
        elif points is None:
            return frame
        if points is not None:
            draw_points(depth_m, points, self._camera)
        return replace(frame, depth_m=depth_m)

    def _view(self, position: int, frame: Frame | None = None) -> PlaneSweepView | None:
        """Return the features of a view, cached or computed; ``frame`` is already in the map's camera.

        None if ``frame`` is not given and cannot be read.
        """
        if position in self._cache:
            self._cache.move_to_end(position)
            return self._cache[position]
        if frame is None:
            raw = self._source.read(position)
            if raw is None:
                return None
            frame = replace(raw, image=self._adapter(raw.image))
        features = self._backbone.extract(frame.image)
        view = PlaneSweepView(features.coarse[0].cpu().half(), torch.from_numpy(self._poses[position]))
        self._cache[position] = view
        while len(self._cache) > CACHED_VIEWS:
            self._cache.popitem(last=False)
        return view

    def _local_points(self, position: int, T_map_camera: Matrix) -> NDArray[np.float64] | None:
        """Return points (N, 3) of the source's reconstruction in the camera's frame, or None if there are none."""
        points = self._source.visible_points(position)
        if points is None or len(points) < 10:
            return None
        return np.asarray((points - T_map_camera[:3, 3]) @ T_map_camera[:3, :3], dtype=np.float64)

    def _range(self, points: NDArray[np.float64] | None) -> MotionDepthSettings:
        """Return the settings with the depth range of a view's own points, which is right at any scale."""
        return self._settings if points is None else settings_by_depths(self._settings, points[:, 2])


def settings_by_depths(settings: MotionDepthSettings, depths_m: NDArray[np.float64]) -> MotionDepthSettings:
    """Return settings with the range of the depths (N,) of points, which is right at any scale."""
    near, usual, far = (float(depth) for depth in np.quantile(depths_m, RANGE_QUANTILES))
    return replace(settings, near_m=NEARER * near, usual_m=usual, far_m=FARTHER * far)


def settings_by_matches(source: FrameSource, settings: MotionDepthSettings) -> MotionDepthSettings:
    """Return settings with the range of matches between a source's images, triangulated with its poses.

    The settings stay as they are if too few matches have poses. Views with points of a reconstruction have ranges of
    their own.
    """
    poses = Poses(source)
    pairs = [
        pair
        for pair in PairFinder(source, RANGE_PAIRS).pairs()
        if all(poses.at(view.position) is not None for view in (pair.first, pair.second))
    ]
    if not pairs:
        return settings
    depths = triangulated_depths(Observations(pairs, poses, source.camera), Model())
    return settings if len(depths) < MIN_RANGE_POINTS else settings_by_depths(settings, depths)


def with_depth(
    source: FrameSource, *, hide: bool = False, device: str = "auto", settings: MotionDepthSettings | None = None
) -> FrameSource:
    """Return the source if it has depth, else :class:`MotionDepth` of it.

    Args:
        source: views with poses.
        hide: ignore existing depth.
        device: device of the backbone, see :func:`kfloc_ros.device.choose_device`.
        settings: settings of depth from motion.

    Raises:
        SourceError: see :class:`MotionDepth`.
    """
    looked_at = range(0, len(source), max(1, len(source) // PROBES))
    if not hide and any(
        (frame := source.read(position)) is not None and frame.depth_m is not None for position in looked_at
    ):
        return source
    return MotionDepth(source, settings, device=choose_device(device))


def poses_doubt(epipolar_px: float, camera: Camera) -> str:
    """Return a sentence if poses are too inaccurate for depth from motion, or an empty string.

    Args:
        epipolar_px: median distance of matches from their epipolar lines, pixels; see ``kfloc check``.
        camera: of the images.
    """
    allowed_px = MAX_EPIPOLAR * camera.fx
    if epipolar_px <= allowed_px:
        return ""
    return (
        f"The poses are too inaccurate for depth from motion: matched points lie {epipolar_px:.1f} pixels from their "
        f"epipolar lines in the median, and {allowed_px:.1f} are allowed. In this map, poses may be wrong by a "
        "decimetre and not look it. `--sfm DIR` computes poses from the images, and takes only the scale from the "
        "source."
    )


def choose_neighbours(position: int, poses: dict[int, Matrix], usual_m: float) -> list[int]:
    """Return overlapping views from other positions: suitable baseline, similar direction, on several sides."""
    own = poses[position]
    ids = np.array([i for i in poses if i != position], dtype=np.int64)
    if not len(ids):
        return []
    others = np.stack([poses[int(i)] for i in ids])
    baseline = np.linalg.norm(others[:, :3, 3] - own[:3, 3], axis=1) / usual_m
    cosine = (np.einsum("kij,ij->k", others[:, :3, :3], own[:3, :3]) - 1) / 2
    fit = (baseline > MIN_BASELINE) & (baseline < MAX_BASELINE) & (cosine > np.cos(np.radians(MAX_TURN_DEG)))
    ranked = np.flatnonzero(fit)[np.argsort(np.abs(np.log(baseline[fit] / BEST_BASELINE)), kind="stable")]
    chosen: list[int] = []
    for k in ranked:
        place = others[k, :3, 3]
        if all(np.linalg.norm(place - others[j, :3, 3]) > MIN_BASELINE * usual_m for j in chosen):
            chosen.append(int(k))
            if len(chosen) == NEIGHBOURS:
                break
    return [int(ids[k]) for k in chosen]


def spread_cells(cells: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a depth image (H, W) from the depths of cells (h, w), 0 where unknown.

    Inverse depth is interpolated between cells of one surface (it is linear in the image on a plane). At the border of
    a
    surface, a cell fills the three pixels around its centre.
    """
    known = cells > 0
    inverse = np.where(known, 1 / np.maximum(cells, 1e-6), 0).astype(np.float32)
    window = np.ones((2, 2), dtype=np.uint8)  # a pixel between four cells needs all of them
    anchor = (0, 0)
    high = cv2.dilate(np.where(known, cells, np.inf).astype(np.float32), window, anchor=anchor)
    low = cv2.erode(np.where(known, cells, 0).astype(np.float32), window, anchor=anchor)
    whole = np.isfinite(high) & (low > 0) & (high < AGREE_RATIO * np.maximum(low, 1e-6))
    h, w = cells.shape
    whole[-1:, :] = whole[:, -1:] = False
    H, W = size
    rows, cols = (np.arange(n) / COARSE_STRIDE - (COARSE_STRIDE - 1) / (2 * COARSE_STRIDE) for n in (H, W))
    r0, c0 = (np.clip(np.floor(x).astype(np.int64), 0, n - 1) for x, n in ((rows, h), (cols, w)))
    r1, c1 = np.minimum(r0 + 1, h - 1), np.minimum(c0 + 1, w - 1)
    a, b = np.clip(rows - r0, 0, 1)[:, None], np.clip(cols - c0, 0, 1)[None]
    top = inverse[r0][:, c0] * (1 - b) + inverse[r0][:, c1] * b
    bottom = inverse[r1][:, c0] * (1 - b) + inverse[r1][:, c1] * b
    blended = top * (1 - a) + bottom * a
    depth = np.where(whole[r0][:, c0] & (blended > 0), 1 / np.maximum(blended, 1e-6), 0).astype(np.float32)
    near_row, near_col = np.arange(H) // COARSE_STRIDE, np.arange(W) // COARSE_STRIDE
    nearest = cells[np.minimum(near_row, h - 1)][:, np.minimum(near_col, w - 1)]
    middle = (np.abs(np.arange(H) % COARSE_STRIDE - 3.5) < 3)[:, None] & (
        np.abs(np.arange(W) % COARSE_STRIDE - 3.5) < 3
    )
    return np.where((depth == 0) & middle, nearest, depth).astype(np.float32)


def draw_points(depth_m: NDArray[np.float32], points: NDArray[np.float64], camera: Camera) -> None:
    """Write the depth of points (N, 3) in the camera's frame around their pixels, the nearest point last."""
    for x, y, z in points[np.argsort(-points[:, 2])]:
        if z <= 0:
            continue
        u, v = round(camera.fx * x / z + camera.cx), round(camera.fy * y / z + camera.cy)
        if 0 <= u < camera.width and 0 <= v < camera.height:
            depth_m[max(v - 3, 0) : v + 4, max(u - 3, 0) : u + 4] = z
