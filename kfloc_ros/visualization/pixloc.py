# SPDX-License-Identifier: Apache-2.0
"""Pictures of the published PixLoc: its confidences, and an alignment as pictures, animation and page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import DrawingError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.messages.clouds import Cloud
from kfloc_ros.pixloc.reference.cost import UNRELATED
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.two_view import AlignmentTrace, TraceStep
from kfloc_ros.pixloc.reference.views import ReferenceScene
from kfloc_ros.visualization.alignment import END_COLOUR, START_COLOUR, offset_between, project_points
from kfloc_ros.visualization.cells import Scale, palette
from kfloc_ros.visualization.filter import faded
from kfloc_ros.visualization.page import (
    RESIDUAL_STEPS,
    UNSEEN,
    bytes_text,
    jpeg_text,
    packed,
    packed_points,
    pose_rows,
    step_entry,
    write_page,
)
from kfloc_ros.visualization.sheet import Panel

CONFIDENCE = Scale("confidence", 0.0, 1.0, "turbo", ticks=(0, 0.25, 0.5, 0.75, 1))
HEIGHT_PX, CURVE_PX, TEXT_PX = 360, 120, 22
STEP_SHARE, STEP_DEG = 0.005, 0.1
"""Motion of the points, as a share of the image's shorter side, and of the camera, after which a step is drawn."""
POINTS_SHOWN = 400
HELD_PICTURES = 8
"""Pictures of the end, so that a video rests there."""
STAGE_COLOURS = ((53, 167, 255), (239, 156, 60), (102, 187, 106), (186, 104, 200), (255, 238, 88), (239, 83, 80))


def confidence_panels(
    image: NDArray[np.uint8], confidences: Sequence[torch.Tensor], strides: Sequence[int], image_scale: float
) -> list[Panel]:
    """Return the image, one panel for every confidence, fine to coarse, and one of their geometric mean.

    Args:
        image: (H, W, 3) RGB.
        confidences: (1, 1, h, w) each, of the network's image.
        strides: its pixels per cell.
        image_scale: scale of the network's image.
    """
    size, maps = image.shape[1::-1], []
    for confidence, stride in zip(confidences, strides, strict=True):
        # the grids are aligned at the upper left; a finer one may end before the image does
        factor = stride / image_scale
        matrix = np.array([[factor, 0, 0], [0, factor, 0]], dtype=np.float64)
        cells = confidence[0, 0].float().cpu().numpy()
        maps.append(cv2.warpAffine(cells, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    maps.append(np.exp(np.mean([np.log(np.maximum(m, 1e-6)) for m in maps], axis=0)))
    panels = [Panel("image", image)]
    for title, values in zip([*(f"{stride} px a cell" for stride in strides), "all levels"], maps, strict=True):
        mixed = 0.7 * CONFIDENCE.rgb(values) + 0.3 * image.mean(axis=2, keepdims=True)
        picture = np.clip(mixed, 0, 255).astype(np.uint8)
        panels.append(Panel(f"confidence, {title}: median {np.median(values):.2f}", picture, CONFIDENCE))
    return panels


class AlignmentPictures:
    """Pictures of one alignment: the query with its points, beside the first reference image, above the cost.

    Args:
        image: (H, W, 3) RGB of the query.
        camera: its camera.
        scene: points and images.
        trace: steps of the alignment.
        reference: image (H, W, 3) and position of the first reference.

    Raises:
        DrawingError: the alignment has no steps.
    """

    def __init__(
        self,
        image: NDArray[np.uint8],
        camera: Camera,
        scene: ReferenceScene,
        trace: AlignmentTrace,
        reference: tuple[NDArray[np.uint8], int],
    ) -> None:
        if not trace.steps:
            raise DrawingError("The alignment did not start, so there is nothing to draw.")
        self._image, self._camera, self._steps = image, camera, trace.steps
        picture, position = reference
        view = scene.images[position]
        rows = np.intersect1d(view.point_rows, trace.steps[-1].rows)
        rows = rows if len(rows) else np.unique(trace.steps[-1].rows)
        self._points = scene.points[rows[:: -(-len(rows) // POINTS_SHOWN)]]
        self._at = [project_points(camera, self._points, step.T_map_camera) for step in trace.steps]
        places = project_points(view.camera, self._points, inverse_pose(view.T_camera_map))
        self._reference = _titled(_with_points(picture, places, END_COLOUR), f"reference {view.name}")
        self._costs = [step.cost for step in trace.steps]

    def kept(self) -> list[int]:
        """Return the steps to draw: those after which the points or the camera have moved, the first and the last."""
        limit_px = STEP_SHARE * min(self._image.shape[:2])
        kept, moved_px, turned_deg = [0], 0.0, 0.0
        for k in range(1, len(self._steps)):
            both = np.isfinite(self._at[k][:, 0]) & np.isfinite(self._at[k - 1][:, 0])
            if both.any():
                moved_px += float(np.median(np.linalg.norm(self._at[k][both] - self._at[k - 1][both], axis=1)))
            turned_deg += offset_between(self._steps[k - 1].T_map_camera, self._steps[k].T_map_camera).degrees
            if moved_px >= limit_px or turned_deg >= STEP_DEG or k == len(self._steps) - 1:
                kept.append(k)
                moved_px = turned_deg = 0.0
        return kept

    def animation(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the pictures of the animation; all have the same size."""
        kept = self.kept()
        for k in kept + [kept[-1]] * HELD_PICTURES:
            yield self.step(k)

    def step(self, k: int) -> NDArray[np.uint8]:
        """Return the picture of step k: points from their start (red, with lines) to now (green)."""
        pale = faded(self._image)
        start, now = self._at[0], self._at[k]
        for a, b in zip(start, now, strict=True):
            if np.isfinite(a).all() and np.isfinite(b).all():
                cv2.line(pale, _pixel(a), _pixel(b), (255, 214, 64), 1, cv2.LINE_AA)
        picture = _with_points(_with_points(pale, start, START_COLOUR), now, END_COLOUR)
        away = offset_between(self._steps[k].T_map_camera, self._steps[-1].T_map_camera)
        step = self._steps[k]
        title = (
            f"step {k} of {len(self._steps) - 1}, {step.stride} px a cell: {away.metres:.3f} m, {away.degrees:.2f} deg"
        )
        return self._framed([_titled(picture, f"{title} from the end"), self._reference], k)

    def ends(self) -> NDArray[np.uint8]:
        """Return the picture of start and end, beside the reference image."""
        parts = []
        for k, name, colour in ((0, "start", START_COLOUR), (len(self._steps) - 1, "end", END_COLOUR)):
            parts.append(_titled(_with_points(faded(self._image), self._at[k], colour), name))
        return self._framed([*parts, self._reference], len(self._steps) - 1)

    def _framed(self, parts: Sequence[NDArray[np.uint8]], k: int) -> NDArray[np.uint8]:
        row = np.concatenate(parts, axis=1)
        return np.concatenate([row, self._curve(row.shape[1], k)])

    def _curve(self, width: int, k: int) -> NDArray[np.uint8]:
        """Return the cost by step, in the colours of the levels; steps to come are pale."""
        picture = np.full((CURVE_PX, width, 3), 255, np.uint8)
        known = [cost for cost in self._costs if np.isfinite(cost)]
        top = 1.1 * max(known, default=1.0) or 1.0
        left, bottom = 60, CURVE_PX - 24
        strides = list(dict.fromkeys(step.stride for step in self._steps))
        _write(picture, f"{top / 1.1:.3f}", (6, 20))
        _write(picture, "cost by step, px a cell:", (left, CURVE_PX - 8))
        for number, stride in enumerate(strides):
            colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
            _write(picture, str(stride), (left + 190 + 40 * number, CURVE_PX - 8), colour)
        for at, (step, cost) in enumerate(zip(self._steps, self._costs, strict=True)):
            if np.isfinite(cost):
                x = left + round((width - left - 12) * at / max(len(self._steps) - 1, 1))
                y = bottom - round((bottom - 8) * cost / top)
                colour = STAGE_COLOURS[strides.index(step.stride) % len(STAGE_COLOURS)]
                pale = tuple(round(255 - 0.3 * (255 - c)) for c in colour)
                cv2.circle(picture, (x, y), 5 if at == k else 2, colour if at <= k else pale, cv2.FILLED, cv2.LINE_AA)
        return picture


class PixLocPage:
    """Collector of alignments that writes them as one page, as ``kfloc show html`` does for maps.

    Args:
        title: title of the page.
        scene: points and images.
        loss: robust loss of the alignments.
        image_width: width of the images in the page, in pixels.
    """

    def __init__(self, title: str, scene: ReferenceScene, loss: RobustLoss, image_width: int = 480) -> None:
        self._title, self._scene, self._width = title, scene, image_width
        self._worst = float(loss.value(torch.tensor(UNRELATED, dtype=torch.float64)))
        self._frames: list[dict[str, Any]] = []
        self._used: dict[int, NDArray[np.uint8] | None] = {}

    def add(
        self,
        name: str,
        image: NDArray[np.uint8],
        camera: Camera,
        trace: AlignmentTrace,
        references: Mapping[int, NDArray[np.uint8] | None],
        *,
        kept: Sequence[int],
        reason: str = "",
        truth: Matrix | None = None,
    ) -> None:
        """Add the alignment of an image.

        Args:
            name: name of the image.
            image: (H, W, 3) RGB.
            camera: its camera.
            trace: steps of the alignment.
            references: images by position in the scene, or None for those not at hand.
            kept: steps to show.
            reason: reason of a failure.
            truth: true T_map_camera.
        """
        steps = [trace.steps[k] for k in kept]
        views = list(references)
        self._used |= references
        self._frames.append({
            "index": name,
            "state": "aligned" if not reason else "not aligned",
            "reason": reason,
            "image": jpeg_text(image, self._width / image.shape[1]),
            "camera": _camera_numbers(camera),
            "coarse": pose_rows(steps[0].T_map_camera),
            "pose": pose_rows(steps[-1].T_map_camera),
            "truth": pose_rows(truth),
            "references": views,
            "steps": [step_entry(step, steps[-1].T_map_camera, truth) for step in steps],
            "residuals": [self._residuals(step, views) for step in steps],
        })  # fmt: skip

    def write(self, path: Path) -> Path:
        """Write the page.

        Raises:
            DrawingError: there is no alignment, or the file cannot be written.
        """
        if not self._frames:
            raise DrawingError("There is no alignment to show.")
        scene = self._scene
        down = np.mean([image.T_camera_map[1, :3] for image in scene.images], axis=0)
        axis = int(np.argmax(np.abs(down)))
        data = {
            "title": self._title,
            "up": [-float(np.sign(down[axis])) if k == axis else 0 for k in range(3)],
            "camera": self._frames[0]["camera"],
            "map": packed(Cloud(_inner(scene.points).astype(np.float32), _heights(_inner(scene.points), axis))),
            "scene": packed(self._coloured()),
            "references": [pose_rows(inverse_pose(image.T_camera_map)) for image in scene.images],
            "reference_ids": [image.name for image in scene.images],
            "points": [
                packed_points(scene.points[image.point_rows] if k in self._used else np.zeros((0, 3)))
                for k, image in enumerate(scene.images)
            ],
            "residual_steps": RESIDUAL_STEPS,
            "residual_text": "cost of a point, 1: as features of other places",
            "frames": self._frames,
        }
        return write_page(path, data)

    def _residuals(self, step: TraceStep, views: Sequence[int]) -> str:
        """Return one byte for every point of the references, 255 if it is not used or out of view."""
        best = np.full(len(self._scene.points), np.inf)
        seen = np.isfinite(step.costs)
        np.minimum.at(best, step.rows[seen], step.costs[seen] / self._worst)
        rows = np.concatenate([self._scene.images[k].point_rows for k in views])
        values = np.where(np.isfinite(best[rows]), np.rint(best[rows] * RESIDUAL_STEPS).clip(0, UNSEEN - 1), UNSEEN)
        return bytes_text(values.astype(np.uint8))

    def _coloured(self) -> Cloud:
        """Return the points of the used references in the colours of their images."""
        points, colours = [np.zeros((0, 3))], [np.zeros((0, 3), np.uint8)]
        for position, picture in self._used.items():
            if picture is None:
                continue
            view = self._scene.images[position]
            inner = self._scene.points[view.point_rows]
            uv = project_points(view.camera, inner, inverse_pose(view.T_camera_map))
            keep = np.isfinite(uv).all(axis=1)
            u, v = np.rint(uv[keep]).astype(int).T
            points.append(inner[keep])
            colours.append(picture[v.clip(0, picture.shape[0] - 1), u.clip(0, picture.shape[1] - 1)])
        return Cloud(np.concatenate(points).astype(np.float32), np.concatenate(colours))


def _camera_numbers(camera: Camera) -> list[float]:
    lens = camera.distortion[:4] if camera.distortion_model == "plumb_bob" else ()
    return [camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy, *lens]


def _inner(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the points without the farthest hundredth to each side, which would make the rest small."""
    low, high = np.quantile(points, 0.01, axis=0), np.quantile(points, 0.99, axis=0)
    return points[((points >= low) & (points <= high)).all(axis=1)]


def _heights(points: NDArray[np.float64], axis: int) -> NDArray[np.uint8]:
    share = (points[:, axis] - points[:, axis].min()) / max(float(np.ptp(points[:, axis])), 1e-9)
    return np.asarray(palette("viridis")[np.rint(255 * share).astype(np.intp)], dtype=np.uint8)


def _with_points(image: NDArray[np.uint8], places: NDArray[np.float64], colour: Sequence[int]) -> NDArray[np.uint8]:
    picture = np.ascontiguousarray(image.copy())
    radius = max(round(2.5 * image.shape[0] / HEIGHT_PX), 1)
    for place in places[np.isfinite(places).all(axis=1)]:
        cv2.circle(picture, _pixel(place), radius, tuple(colour), cv2.FILLED, cv2.LINE_AA)
    return picture


def _pixel(place: NDArray[np.float64]) -> tuple[int, int]:
    x, y = np.rint(np.clip(place, -30_000, 30_000)).astype(int).tolist()
    return x, y


def _titled(image: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    """Return the image at the height of all, below its title."""
    width = max(round(image.shape[1] * HEIGHT_PX / image.shape[0]) // 2 * 2, 2)
    small = np.asarray(cv2.resize(image, (width, HEIGHT_PX), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    head = np.full((TEXT_PX, width, 3), 255, np.uint8)
    _write(head, title, (4, 16))
    return np.concatenate([head, small])


def _write(
    picture: NDArray[np.uint8], text: str, place: tuple[int, int], colour: tuple[int, int, int] = (40, 40, 40)
) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.43, colour, 1, cv2.LINE_AA)
