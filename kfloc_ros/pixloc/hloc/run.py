# SPDX-License-Identifier: Apache-2.0
"""Run over the queries of a scene: plans, cached reference features, poses, and a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.datasets.images import read_image as read_stored
from kfloc_ros.errors import KflocError, MapError
from kfloc_ros.files import inside
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, inverse_pose, rotation_angle_deg
from kfloc_ros.pixloc.hloc.options import RunOptions
from kfloc_ros.pixloc.hloc.plan import Plan
from kfloc_ros.pixloc.reference.model import PixLocModel
from kfloc_ros.pixloc.reference.refiner import ReferenceRefiner, Refinement
from kfloc_ros.pixloc.reference.unet import FeaturePyramid
from kfloc_ros.pixloc.reference.views import ReferenceScene, ViewSettings, ViewStore, extract_view, fingerprint_of

Progress = Callable[[int, int, str], None]
"""Callback with the number done, the total, and the kind of item."""


@dataclass(frozen=True, eq=False)
class QueryResult:
    """Result of one query."""

    name: str
    T_map_camera: Matrix | None
    """Refined pose; the start if the refinement failed; None without a start."""
    success: bool
    reason: str
    plan: Plan
    refinement: Refinement | None = None


def read_image(path: Path, camera: Camera | None = None) -> NDArray[np.uint8]:
    """Read an RGB image (H, W, 3), as stored: no rotation by its metadata, as in COLMAP.

    Raises:
        FrameError: it cannot be read, or does not have the camera's size.
    """
    return read_stored(path, None if camera is None else (camera.width, camera.height))


def view_settings(options: RunOptions) -> ViewSettings:
    """Return the settings of the reference features for a run."""
    settings = options.settings()
    return ViewSettings(options.image_size(), settings.multiscale, settings.pad, settings.legacy)


def gather_views(
    model: PixLocModel,
    scene: ReferenceScene,
    positions: Sequence[int],
    images: Path,
    settings: ViewSettings,
    *,
    cache: Path | None = None,
    on_progress: Progress = lambda done, total, what: None,
) -> ViewStore:
    """Return the features of the images that a run needs; new ones are extracted and added to the cache.

    Raises:
        SourceError: an image cannot be read.
        MapError: the cache is damaged, or of another model or other settings.
    """
    views = {}
    if cache is not None and cache.is_file():
        stored = ViewStore.load(cache)
        if stored.fingerprint != fingerprint_of(model) or stored.settings != settings:
            raise MapError(f"The cache '{cache}' was made with another model or other options; name another file.")
        views = dict(stored.views)
    missing = [(k, scale) for k in sorted(set(positions)) for scale in settings.image_scales if (k, scale) not in views]
    pixels, at = np.zeros((0, 0, 3), dtype=np.uint8), -1
    for done, (position, scale) in enumerate(missing):
        on_progress(done, len(missing), "reference images")
        if position != at:
            image = scene.images[position]
            pixels, at = read_image(inside(images, image.name), image.camera), position
        views[position, scale] = extract_view(model, scene, position, pixels, settings, scale).to("cpu")
    on_progress(len(missing), len(missing), "reference images")
    store = ViewStore(views, settings, fingerprint_of(model))
    if cache is not None and missing:
        store.save(cache)
    return store


def run_queries(
    refiner: ReferenceRefiner, queries: Mapping[str, Camera], plans: Mapping[str, Plan], images: Path
) -> Iterator[QueryResult]:
    """Align query after query; an error of one query is its reason and does not end the run."""
    for name, plan in plans.items():
        T = plan.T_map_camera
        if plan.reason or T is None:
            yield QueryResult(name, T, False, plan.reason or "there is no pose to start from", plan)
            continue
        try:
            image = read_image(inside(images, name), queries[name])
            found = refiner.refine(image, queries[name], T, plan.views, only_rows=plan.rows_of)
        except KflocError as error:
            yield QueryResult(name, T, False, str(error), plan)
            continue
        best = found.T_map_camera if found.success else T
        yield QueryResult(name, best, found.success, found.reason, plan, found)


def log_entry(result: QueryResult, scene: ReferenceScene) -> dict[str, Any]:
    """Return a query's entry in the run's log, for JSON."""
    entry: dict[str, Any] = {
        "success": result.success,
        "reason": result.reason,
        "references": [scene.images[k].name for k in result.plan.views],
        "T_map_camera_init": None if result.plan.T_map_camera is None else result.plan.T_map_camera.tolist(),
    }
    found = result.refinement
    if found is None:
        return entry
    entry |= {
        "points": found.point_count,
        "iterations": list(found.iterations),
        "score": found.score.value,
        "valid_ratio": found.score.valid_ratio,
    }
    if found.T_map_camera is not None:
        # Difference of camera centres: that of world-to-camera translations depends on the map's origin.
        moved = found.T_map_camera[:3, 3] - found.T_map_camera_init[:3, 3]
        turned = found.T_map_camera_init[:3, :3].T @ found.T_map_camera[:3, :3]
        entry |= {
            "T_map_camera": found.T_map_camera.tolist(),
            "moved_m": float(np.linalg.norm(moved)),
            "turned_deg": rotation_angle_deg(turned),
            "covariance": None if found.covariance is None else found.covariance.tolist(),
        }
    return entry


MIN_COMMON_POINTS = 10
"""Smallest number of points that images share with the starting one, to see the same place."""


@torch.inference_mode()
def rank_views(store: ViewStore, image_scale: int, pyramid: FeaturePyramid) -> list[int]:
    """Return positions of the stored images, most similar to an image first.

    An image is described by the mean of its unit features at the coarsest level, weighted by confidence, minus the mean
    of all images.
    """
    positions = [position for position, scale in store.views if scale == image_scale]
    if not positions:
        return []
    views = [store.views[position, image_scale] for position in positions]
    rows = torch.stack([_mean(view.features[-1].float(), view.confidences[-1].float()) for view in views])
    features, confidence = pyramid.features[-1][0].float(), pyramid.confidences[-1][0, 0].float()
    own = _mean(features.reshape(len(features), -1).t(), confidence.reshape(-1)).to(rows)
    centre = rows.mean(dim=0) if len(rows) > 2 else torch.zeros_like(own)
    similarity = F.normalize(rows - centre, dim=1) @ F.normalize(own - centre, dim=0)
    return [positions[k] for k in similarity.argsort(descending=True).tolist()]


def _mean(features: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    weight = confidence / confidence.sum().clamp(min=1e-9)
    return (F.normalize(features, dim=1) * weight[:, None]).sum(0)


def together_with(refiner: ReferenceRefiner, start: int, others: Sequence[int]) -> list[int]:
    """Return an image and those of the others that share points with it, most first."""
    candidates = [k for k in others if k != start]
    if not candidates:
        return [start]
    common = refiner.scene.covisibility([start, *candidates])[0, 1:]
    order = np.argsort(-common, kind="stable")
    return [start, *(candidates[int(k)] for k in order if common[k] >= MIN_COMMON_POINTS)]


def localize_picture(
    refiner: ReferenceRefiner, image: NDArray[np.uint8], camera: Camera, *, tries: int = 3
) -> Iterator[Refinement]:
    """Align an image from the images most similar to it, one result a try; the highest score is the best."""
    scale = max(refiner.settings.multiscale)
    prepared = refiner.store.settings.size.prepare(image, scale)
    with torch.inference_mode():
        pyramid: FeaturePyramid = refiner.model.extractor(prepared.pixels.to(refiner.device))
    ranked = rank_views(refiner.store, scale, pyramid)
    for start in ranked[:tries]:
        T = inverse_pose(refiner.scene.images[start].T_camera_map)
        yield refiner.refine(image, camera, T, together_with(refiner, start, ranked))
