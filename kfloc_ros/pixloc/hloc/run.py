# SPDX-License-Identifier: Apache-2.0
"""Run over the queries of a scene: plans, cached reference features, poses, and a log."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from kfloc_ros.pixloc.reference.refiner import ImagePyramids, ReferenceRefiner, Refinement
from kfloc_ros.pixloc.reference.two_view import LevelObserver
from kfloc_ros.pixloc.reference.unet import FeaturePyramid
from kfloc_ros.pixloc.reference.views import (
    ReferenceScene,
    ViewSettings,
    ViewStore,
    extract_views,
    fingerprint_of,
    fingerprint_of_scene,
)

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


def view_settings(options: RunOptions, device: torch.device) -> ViewSettings:
    """Return the settings of the reference features for a run on a device."""
    settings = options.settings()
    return ViewSettings(
        options.image_size(), settings.multiscale, settings.pad, settings.legacy, options.half(device), settings.cubic
    )


SAVE_PERIOD_S = 60.0
"""Time after which new features are added to the cache, while others are still extracted."""
BATCH_PIXELS = 4_000_000
"""Pixels of the images that pass a GPU's network together; a CPU gains nothing by more than one image."""


def default_cache(scene: ReferenceScene, model: PixLocModel, settings: ViewSettings) -> Path:
    """Return the usual file for cached features of a scene by a model: below ``XDG_CACHE_HOME``, or ``~/.cache``.

    A damaged file is removed, since it can be made again.
    """
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    text = f"{fingerprint_of_scene(scene)} {fingerprint_of(model)} {settings}"
    path = Path(root) / "kfloc_ros" / "pixloc" / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.safetensors"
    if path.is_file():
        try:
            ViewStore.load(path)
        except MapError:
            path.unlink()
    return path


def gather_views(
    model: PixLocModel,
    scene: ReferenceScene,
    positions: Sequence[int],
    images: Path,
    settings: ViewSettings,
    *,
    scales: Sequence[int] | None = None,
    cache: Path | None = None,
    known: ViewStore | None = None,
    on_progress: Progress = lambda done, total, what: None,
) -> ViewStore:
    """Return the features of the images that a run needs; new ones are extracted and added to the cache.

    The cache is also written once a minute and where the extraction is interrupted, so that no work is lost.

    Args:
        model: in evaluation mode, on the device to use.
        scene: points and images.
        positions: images needed.
        images: folder of the images.
        settings: settings of the features.
        scales: image scales needed (default: all of the settings).
        cache: file of features, read if it is there, and written if there are new ones.
        known: features at hand, instead of the cache's.
        on_progress: called with the number of images done and their total.

    Raises:
        SourceError: an image cannot be read.
        MapError: the cache is damaged, or of another model, scene or other settings.
    """
    store = known or _cached(cache, model, scene, settings)
    views = dict(store.views)
    missing = [(k, scale) for k in sorted(set(positions)) for scale in scales or settings.image_scales]
    missing = [item for item in missing if item not in views]
    done, saved_s = 0, time.monotonic()
    try:
        for chunk in _chunks(scene, missing, settings, next(model.parameters()).device):
            on_progress(done, len(missing), "reference images")
            read = [read_image(inside(images, scene.images[k].name), scene.images[k].camera) for k in chunk.positions]
            found = extract_views(model, scene, chunk.positions, read, settings, chunk.scale)
            views |= {(k, chunk.scale): view.to("cpu") for k, view in zip(chunk.positions, found, strict=True)}
            done += len(found)
            if cache is not None and time.monotonic() - saved_s > SAVE_PERIOD_S:
                replace(store, views=views).save(cache)
                saved_s = time.monotonic()
    finally:
        store = replace(store, views=views)
        if cache is not None and done:
            store.save(cache)
    on_progress(len(missing), len(missing), "reference images")
    return store


def _cached(cache: Path | None, model: PixLocModel, scene: ReferenceScene, settings: ViewSettings) -> ViewStore:
    """Return the features in a cache, or none."""
    fingerprint, of_scene = fingerprint_of(model), fingerprint_of_scene(scene)
    if cache is None or not cache.is_file():
        return ViewStore({}, settings, fingerprint, of_scene)
    stored = ViewStore.load(cache)
    if stored.fingerprint != fingerprint or stored.settings != settings or stored.scene not in ("", of_scene):
        raise MapError(f"The cache '{cache}' was made with another model, scene or other options; name another file.")
    return stored


@dataclass(frozen=True)
class _Chunk:
    positions: list[int]
    scale: int


def _chunks(
    scene: ReferenceScene, items: Sequence[tuple[int, int]], settings: ViewSettings, device: torch.device
) -> Iterator[_Chunk]:
    """Yield images of equal size and image scale, as many as pass the network together; on a CPU, one."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for position, scale in items:
        camera = scene.images[position].camera
        groups.setdefault((scale, camera.width, camera.height), []).append(position)
    for (scale, width, height), positions in groups.items():
        shrink = min(1.0, settings.size.resize / scale / max(width, height))
        count = 1 if device.type == "cpu" else max(int(BATCH_PIXELS / (width * height * shrink**2)), 1)
        for first in range(0, len(positions), count):
            yield _Chunk(positions[first : first + count], scale)


def run_queries(
    refiner: ReferenceRefiner,
    queries: Mapping[str, Camera],
    plans: Mapping[str, Plan],
    images: Path,
    observer: Callable[[str], LevelObserver] | None = None,
) -> Iterator[QueryResult]:
    """Align query after query; an error of one query is its reason and does not end the run.

    Args:
        refiner: of the references.
        queries: cameras by name.
        plans: plans by name, in the order of the run.
        images: folder of the queries.
        observer: returns the observer of a query by its name.
    """
    for name, plan in plans.items():
        T = plan.T_map_camera
        if plan.reason or T is None:
            yield QueryResult(name, T, False, plan.reason or "there is no pose to start from", plan)
            continue
        try:
            image = read_image(inside(images, name), queries[name])
            watcher = None if observer is None else observer(name)
            found = refiner.refine(image, queries[name], T, plan.views, only_rows=plan.rows_of, observer=watcher)
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


def together_with(scene: ReferenceScene, start: int, others: Sequence[int]) -> list[int]:
    """Return an image and those of the others that share points with it, most first."""
    candidates = [k for k in others if k != start]
    if not candidates:
        return [start]
    common = scene.covisibility([start, *candidates])[0, 1:]
    order = np.argsort(-common, kind="stable")
    return [start, *(candidates[int(k)] for k in order if common[k] >= MIN_COMMON_POINTS)]


class PictureLocalizer:
    """Localizer of single images in a COLMAP model, from the images most similar to them.

    Similarity needs the references' features at the smallest image scale only; the others are extracted for the images
    that an alignment uses. All are kept in memory and in the cache.

    Args:
        model: in evaluation mode, on the device to use.
        scene: points and images.
        images: folder of the images.
        options: options of the alignment.
        cache: file of features; None: no cache.
        on_progress: called with the number of images done, their total, and what is done.
    """

    def __init__(
        self,
        model: PixLocModel,
        scene: ReferenceScene,
        images: Path,
        options: RunOptions,
        *,
        cache: Path | None = None,
        on_progress: Progress = lambda done, total, what: None,
    ) -> None:
        self.model, self.scene, self._images = model, scene, images
        self.settings = options.settings()
        self._views = view_settings(options, next(model.parameters()).device)
        self._cache, self._on_progress = cache, on_progress
        self._ranking_scale = max(self.settings.multiscale)
        self._store = self._gather(range(len(scene.images)), [self._ranking_scale])

    def _gather(
        self, positions: Sequence[int], scales: Sequence[int] | None = None, known: ViewStore | None = None
    ) -> ViewStore:
        return gather_views(
            self.model, self.scene, positions, self._images, self._views,
            scales=scales, cache=self._cache, known=known, on_progress=self._on_progress,
        )  # fmt: skip

    def localize(
        self,
        image: NDArray[np.uint8],
        camera: Camera,
        *,
        tries: int = 3,
        observer: Callable[[int], LevelObserver] | None = None,
    ) -> Iterator[Refinement]:
        """Align an image from the images most similar to it, one result a try; the highest score is the best.

        Args:
            image: (H, W, 3) RGB.
            camera: its camera, any model.
            tries: number of images to start from.
            observer: returns the observer of a try by its number.
        """
        described = ImagePyramids(self.model, self._views, image)
        ranked = rank_views(self._store, self._ranking_scale, described.at(self._ranking_scale)[0])
        plans = [together_with(self.scene, start, ranked)[: self.settings.num_dbs] for start in ranked[:tries]]
        self._store = self._gather([k for plan in plans for k in plan], known=self._store)
        refiner = ReferenceRefiner(self.model, self.scene, self._store, self.settings)
        for number, (start, plan) in enumerate(zip(ranked, plans, strict=False)):
            self._on_progress(number, len(plans), "alignments")
            T = inverse_pose(self.scene.images[start].T_camera_map)
            yield refiner.refine(described, camera, T, plan, observer=observer(number) if observer else None)
        self._on_progress(len(plans), len(plans), "alignments")
