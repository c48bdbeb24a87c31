# SPDX-License-Identifier: Apache-2.0
"""HTML page of a localization in a single file: points, cameras and alignment steps in 3-D, with images. Needs no
network.

The page is ``web/viewer.html`` with ``web/viewer.js``, ``web/three.min.js`` and the data inserted. Points are stored as
16-bit integers over their extent (0.1 mm in a room), residuals as bytes, images as JPEG.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import DrawingError
from kfloc_ros.evaluation.page import jpeg
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.clouds import Cloud
from kfloc_ros.pixloc.reference.two_view import TraceStep
from kfloc_ros.types import AlignmentStep
from kfloc_ros.visualization.alignment import offset_between, reference_points
from kfloc_ros.visualization.clouds import cell_cloud, map_cloud, merged, precise_points
from kfloc_ros.visualization.overlay import reproject_all
from kfloc_ros.visualization.stream import View

MAX_MAP_POINTS, MAX_SCENE_POINTS = 60_000, 60_000
MAX_SIGMA_M, VOXEL_M = 0.08, 0.02
RESIDUAL_STEPS = 200
"""Byte value of a residual of 1; values above 255 are clipped."""
UNSEEN = 255
JPEG_QUALITY = 78


class LocalizationPage:
    """Collector of frames that writes the page.

    Args:
        scene_map: map of the place.
        source: name of the localized source.
        image_width: width of the images in the page, in pixels.
    """

    def __init__(self, scene_map: SceneMap, source: str, image_width: int = 480) -> None:
        self._map, self._source = scene_map, source
        self._scale = min(image_width / scene_map.camera.width, 1.0)
        self._cloud = merged([], VOXEL_M)
        self._frames: list[dict[str, Any]] = []

    @property
    def count(self) -> int:
        return len(self._frames)

    def add(self, view: View) -> None:
        """Add a frame with its coarse pose, the steps of its alignment, and its image."""
        frame, estimate = view.frame, view.estimate
        if view.coarse.scene_coordinates is not None:
            cells = precise_points(cell_cloud(view.coarse.scene_coordinates, frame.image), MAX_SIGMA_M)
            self._cloud = merged([self._cloud, cells], VOXEL_M)
        alignment = estimate.alignment
        steps = alignment.steps if alignment is not None else ()
        ids = alignment.reference_ids if steps and alignment is not None else ()
        entry = {
            "index": frame.index,
            "state": estimate.state.value,
            "reason": estimate.reason,
            "image": jpeg_text(frame.image, self._scale),
            "coarse": pose_rows(view.coarse.pose.T_map_camera),
            "pose": pose_rows(estimate.T_map_camera),
            "truth": pose_rows(frame.T_map_camera),
            "references": [self._map.references.ids.index(ident) for ident in ids],
            "steps": [step_entry(step, steps[-1].T_map_camera, frame.T_map_camera) for step in steps],
            "residuals": self._residuals(view.coarse.features, steps, ids),
        }
        self._frames.append(entry)

    def write(self, path: Path) -> Path:
        """Write the page.

        Raises:
            DrawingError: there are no frames, or the file cannot be written.
        """
        if not self._frames:
            raise DrawingError("There is no frame to show.")
        cloud = map_cloud(self._map, MAX_MAP_POINTS)
        scene = self._cloud
        thinned = slice(None, None, -(-max(len(scene.points), 1) // MAX_SCENE_POINTS))
        axis, sign = up_axis(self._map)
        views = self._map.references
        camera = self._map.camera
        data = {
            "title": f"{self._source} in {self._map.name}",
            "up": [sign if k == axis else 0 for k in range(3)],
            "camera": [camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy],
            "map": packed(cloud),
            "scene": packed(Cloud(scene.points[thinned], scene.colours[thinned])),
            "references": [pose_rows(T) for T in views.T_map_camera],
            "reference_ids": list(views.ids),
            "points": [packed_points(view.points.cpu().numpy()) for view in views.views],
            "residual_steps": RESIDUAL_STEPS,
            "frames": self._frames,
        }
        return write_page(path, data)

    def _residuals(self, features: BackboneFeatures, steps: Sequence[AlignmentStep], ids: Sequence[int]) -> list[str]:
        """Return one byte for every reference point at every step; 255 if it is out of view."""
        if not steps:
            return []
        points = reference_points(self._map, ids).to(features.fine.device)
        rows = []
        for step in steps:
            residuals, in_view = reproject_all(features, points, step.T_map_camera, self._map.camera)
            values = torch.where(in_view, (residuals * RESIDUAL_STEPS).round().clamp(0, UNSEEN - 1), UNSEEN)
            rows.append(bytes_text(values.to(torch.uint8).cpu().numpy()))
        return rows


def write_page(path: Path, data: dict[str, Any]) -> Path:
    """Write the page of some data.

    Raises:
        DrawingError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page_text(data), encoding="utf-8")
    except OSError as error:
        raise DrawingError(f"The page '{path}' cannot be written: {error.strerror}.") from error
    return path


def page_text(data: dict[str, Any]) -> str:
    """Return the page of some data; :class:`LocalizationPage` says what is in them."""
    folder = resources.files("kfloc_ros.visualization") / "web"
    text = (folder / "viewer.html").read_text(encoding="utf-8")
    # "</" would end the script element that contains the data
    content = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    parts = {
        "/*THREE*/": (folder / "three.min.js").read_text(encoding="utf-8").replace("</script", "<\\/script"),
        "/*VIEWER*/": (folder / "viewer.js").read_text(encoding="utf-8"),
        "/*LICENCE*/": (folder / "three.LICENSE").read_text(encoding="utf-8"),
        "/*DATA*/": content,
    }
    for mark, part in parts.items():
        before, _, after = text.partition(mark)
        text = before + part + after
    return text


def packed(cloud: Cloud) -> dict[str, Any]:
    """Return a cloud (N, 3) for the page."""
    return {**packed_points(cloud.points), "colours": bytes_text(np.ascontiguousarray(cloud.colours, dtype=np.uint8))}


def packed_points(points: NDArray[np.floating]) -> dict[str, Any]:
    """Return points (N, 3) as 16-bit integers between two corners."""
    points = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    if not len(points):
        return {"low": [0, 0, 0], "size": [1, 1, 1], "points": ""}
    low, high = points.min(axis=0), points.max(axis=0)
    size = np.maximum(high - low, 1e-6)
    steps = np.rint((points - low) / size * 65535).astype("<u2")
    return {"low": low.tolist(), "size": size.tolist(), "points": bytes_text(steps)}


def bytes_text(values: NDArray[Any]) -> str:
    """Return an array as base64."""
    return base64.b64encode(values.tobytes()).decode("ascii")


def pose_rows(T: Matrix | None) -> list[float] | None:
    """Return the upper three rows of a pose, or None."""
    return None if T is None else [round(float(v), 7) for v in T[:3].reshape(-1)]


def step_entry(step: AlignmentStep | TraceStep, end: Matrix, truth: Matrix | None) -> dict[str, Any]:
    """Return the page's entry of a pose on the way of an alignment to its end."""
    away = offset_between(step.T_map_camera, end)
    entry: dict[str, Any] = {
        "pose": pose_rows(step.T_map_camera),
        "cost": round(step.cost, 6) if np.isfinite(step.cost) else None,
        "stride": step.stride,
        "cm": round(100 * away.metres, 3),
        "deg": round(away.degrees, 4),
    }
    if truth is not None:
        error = offset_between(step.T_map_camera, truth)
        entry |= {"error_cm": round(100 * error.metres, 2), "error_deg": round(error.degrees, 3)}
    return entry


def jpeg_text(image: NDArray[np.uint8], scale: float) -> str:
    """Return an RGB image (H, W, 3), made smaller, as JPEG in base64."""
    return base64.b64encode(jpeg(image, min(scale, 1.0), JPEG_QUALITY)).decode("ascii")
