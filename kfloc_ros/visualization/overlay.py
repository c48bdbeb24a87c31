# SPDX-License-Identifier: Apache-2.0
"""Overlay: the map's points drawn over the image by the estimated pose, coloured by residual."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.features.backbone import FINE_STRIDE, Backbone, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.mapping.grid_alignment import OccupancyGrid
from kfloc_ros.pixloc.cost import FeatureImage, project
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews
from kfloc_ros.types import PoseEstimate, TrackingState
from kfloc_ros.visualization.cells import Scale

RESIDUAL = Scale("residual of the features", 0.0, 1.0, "turbo", ticks=(0, 0.25, 0.5, 0.75, 1))
"""Scale of residuals: unrelated features differ by more than the last tick."""
REFERENCE_WIDTH_PX = 640
"""Width of the image for which the sizes below are defined."""
_STATE_COLOURS = {
    TrackingState.TRACKING: (90, 220, 90),
    TrackingState.DEGRADED: (255, 200, 60),
    TrackingState.LOST: (255, 90, 80),
    TrackingState.INITIALIZING: (190, 190, 190),
}


@dataclass(frozen=True, eq=False)
class Reprojection:
    """Reference points in view, in no particular order."""

    pixels: NDArray[np.float32]
    """(N, 2) projected positions."""
    residuals: NDArray[np.float32]
    """(N,) length of the difference between a point's unit feature and the image's: 0 for equal, 1 and more for
    unlike."""
    confidences: NDArray[np.float32]
    """(N,) weight of the points in the alignment: the reference's reliability times the image's."""


def reproject(
    features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera
) -> Reprojection:
    """Project reference points into an image and compare features at the fine level, the last one of the alignment.

    Args:
        features: backbone features of the image.
        points: points of one or several reference views, on the features' device.
        T_map_camera: pose of the image, (4, 4).
        camera: pinhole camera of the image.
    """
    comparison = _compare(features, points, T_map_camera, camera)
    in_view = comparison.in_view
    parts = (comparison.pixels, comparison.residuals, comparison.confidences)
    return Reprojection(*(values[in_view].cpu().numpy() for values in parts))


def reproject_all(
    features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return residuals (N,) and (N,) bool, in view, of all points in their order; see :func:`reproject`."""
    comparison = _compare(features, points, T_map_camera, camera)
    return comparison.residuals, comparison.in_view


@dataclass(frozen=True, eq=False)
class _Comparison:
    pixels: torch.Tensor
    residuals: torch.Tensor
    confidences: torch.Tensor
    in_view: torch.Tensor


def _compare(features: BackboneFeatures, points: ReferencePoints, T_map_camera: Matrix, camera: Camera) -> _Comparison:
    confidence = F.interpolate(features.reliability[:1][None].float(), features.fine.shape[-2:], mode="bilinear")[0, 0]
    image = FeatureImage.from_maps(features.fine[0].float(), confidence, FINE_STRIDE)
    # coordinates relative to the camera: float32 is not exact enough far from the map's origin
    origin = torch.from_numpy(T_map_camera[:3, 3].copy()).to(points.points)
    T_camera_local = torch.from_numpy(make_pose(T_map_camera[:3, :3].T, np.zeros(3))).to(points.points)
    cells, _, in_front = project(points.points - origin, T_camera_local, camera, FINE_STRIDE)
    rows, inside = image.sample(cells)
    return _Comparison(
        pixels=(cells + 0.5) * FINE_STRIDE - 0.5,
        residuals=(rows[:, : image.channels] - points.fine).norm(dim=1),
        confidences=points.confidence * rows[:, -1],
        in_view=inside & in_front,
    )


def draw_overlay(image: NDArray[np.uint8], estimate: PoseEstimate, points: Reprojection | None) -> NDArray[np.uint8]:
    """Return the image (H, W, 3), paler, with points in the colours of their residuals (blue: match, red: no match).

    The text shows the state, the median residual and the number of points in view; without points, the reason.
    """
    picture = np.ascontiguousarray((0.65 * image + 0.35 * 128).astype(np.uint8))
    scale = max(image.shape[1] / REFERENCE_WIDTH_PX, 0.5)
    caption = estimate.reason
    if points is not None and len(points.pixels):
        _draw_points(picture, points, max(round(3 * scale), 1))
        caption = f"median residual {np.median(points.residuals):.2f} of {len(points.residuals)} points"
        caption = f"{caption}; {estimate.reason}" if estimate.reason else caption
    _draw_caption(picture, estimate.state, caption, scale)
    return picture


def _draw_points(picture: NDArray[np.uint8], points: Reprojection, radius_px: int) -> None:
    colours = RESIDUAL.rgb(points.residuals)
    worst_last = np.argsort(points.residuals)
    draw_points(picture, points.pixels[worst_last], colours[worst_last], radius_px)


def draw_points(
    picture: NDArray[np.uint8], pixels: NDArray[np.floating], colours: NDArray[np.uint8], radius_px: int
) -> None:
    """Draw discs at pixels (N, 2) in RGB colours (N, 3) into a picture, later ones over earlier ones."""
    places = np.rint(pixels).astype(int).tolist()
    for place, colour in zip(places, colours.tolist(), strict=True):
        cv2.circle(picture, place, radius_px, colour, cv2.FILLED, cv2.LINE_AA)


def _draw_caption(picture: NDArray[np.uint8], state: TrackingState, caption: str, scale: float) -> None:
    height = round(22 * scale)
    picture[:height] //= 3
    size, thickness = 0.5 * scale, max(round(scale), 1)
    baseline = round(15 * scale)
    # OpenCV's own font has only ASCII
    words = [(state.value, _STATE_COLOURS[state]), (caption.encode("ascii", "replace").decode(), (235, 235, 235))]
    x = round(6 * scale)
    for text, colour in words:
        cv2.putText(picture, text, (x, baseline), cv2.FONT_HERSHEY_SIMPLEX, size, colour, thickness, cv2.LINE_AA)
        (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, thickness)
        x += width + round(10 * scale)


class OverlayPainter:
    """Painter of overlays for one map.

    Args:
        references: references of the map, or a function that returns them. Those of the alignment are drawn; without
            an alignment, the nearest ones.
        camera: camera of the map.
        count: number of reference views to draw if there was no alignment.
        device: device of the backbone, for images without features.
    """

    def __init__(
        self,
        references: ReferenceViews | Callable[[], ReferenceViews],
        camera: Camera,
        *,
        count: int = 3,
        device: str | torch.device = "cpu",
    ) -> None:
        self._references: Callable[[], ReferenceViews] = references if callable(references) else lambda: references
        self._camera, self._count, self._device = camera, count, device
        self._backbone: Backbone | None = None

    def paint(
        self, image: NDArray[np.uint8], estimate: PoseEstimate, features: BackboneFeatures | None = None
    ) -> NDArray[np.uint8]:
        """Return the overlay (H, W, 3) of an image (H, W, 3); missing features are computed."""
        T = estimate.T_map_camera
        if T is None:
            return draw_overlay(image, estimate, None)
        references = self._references()
        positions = {ident: position for position, ident in enumerate(references.ids)}
        used = estimate.alignment.reference_ids if estimate.alignment is not None else ()
        chosen = [positions[ident] for ident in used if ident in positions]
        chosen = chosen or references.nearest(T, self._count)
        points = ReferencePoints.concatenate([references.views[k] for k in chosen])
        features = features or self._extract(image)
        return draw_overlay(image, estimate, reproject(features, points.to(features.fine.device), T, self._camera))

    def _extract(self, image: NDArray[np.uint8]) -> BackboneFeatures:
        if self._backbone is None:
            self._backbone = Backbone(device=self._device)
        return self._backbone.extract(image)


def picture_on_grid(grid: OccupancyGrid, walls: NDArray[np.float64], views: NDArray[np.float64], title: str) -> bytes:
    """Return a PNG of a grid with a map's wall points and the places of its views, in nav2's map frame.

    Args:
        grid: the grid.
        walls: (N, 3) points in nav2's map frame, metres.
        views: (M, 3) positions of cameras.
        title: of the picture.
    """
    from matplotlib.figure import Figure
    from matplotlib.transforms import Affine2D

    height, width = grid.occupied.shape
    shades = np.where(grid.occupied, 0.0, np.where(grid.free, 1.0, 0.75))
    figure = Figure(figsize=(9.0, max(4.0, min(14.0, 9.0 * height / width))), layout="constrained")
    axes = figure.add_subplot()
    extent = (0.0, width * grid.resolution_m, 0.0, height * grid.resolution_m)
    placed = Affine2D(grid.T_map_grid[np.ix_([0, 1, 3], [0, 1, 3])]) + axes.transData
    axes.imshow(shades, cmap="gray", origin="lower", extent=extent, transform=placed, vmin=0, vmax=1)
    axes.scatter(walls[:, 0], walls[:, 1], s=1.5, c="#d84315", linewidths=0, label="points of the map")
    axes.scatter(views[:, 0], views[:, 1], s=6, c="#1565c0", linewidths=0, label="its views")
    corners = np.array([[x, y, 0.0, 1.0] for x in extent[:2] for y in extent[2:]]) @ grid.T_map_grid.T
    shown = np.concatenate([corners[:, :2], walls[:, :2], views[:, :2]])
    axes.set_xlim(shown[:, 0].min(), shown[:, 0].max())
    axes.set_ylim(shown[:, 1].min(), shown[:, 1].max())
    axes.set_aspect("equal")
    axes.set_xlabel("x [m]")
    axes.set_ylabel("y [m]")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
