# SPDX-License-Identifier: Apache-2.0
"""COLMAP's features, matching and mapping of a source's images, by pycolmap."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.datasets.pictures import GUESSED_FOCAL
from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.colmap import camera_to_colmap
from kfloc_ros.mapping.views import map_camera
from kfloc_ros.relocalization.retrieval import QueryCells, Vocabulary, reliable_cells

EXHAUSTIVE_IMAGES = 120
"""Number of images up to which every pair is matched; of longer sequences, each image is matched with those ``STEPS``
later and with similar ones."""
STEPS = (1, 2, 3, 5, 8, 13, 21, 34, 55)
SIMILAR_IMAGES, APART = 4, (4, 56)
"""Number of similar images that each image is matched with in addition, at least so far from it in the sequence: near
ones for photos in any order, and as many far ones, which close loops."""
KEY_IMAGES = 240
"""Where not all images are placed at once, this many evenly spaced ones are placed one after the other, and the others
are registered to them."""
ENOUGH_AT_ONCE, MAX_MEAN_ERROR_PX = 0.95, 2.0
"""Share of the images that are enough if placed at once, and largest mean reprojection error then. RedKitchen: all
images, 0.6 px."""
LAST_ITERATIONS = 30
"""Iterations of the final adjustment of all images: two to three seconds each for 650 images."""
MIN_REGISTERED = 8
MIN_SHARED = 30
"""Fewest points that an image shares with another one of its model. Fewer may be similar things in two places: 7 and 11
join the parts of a wrong model of an office, and at least 53 those of four right models."""
POINTS_AT_ONCE = 4096
MATCHED_AT_ONCE = 400
"""Number of pairs that are matched before progress is told."""
RANDOM_SEED = 0
"""Of COLMAP's random samples, so that the same images give the same model."""
LOG_ERRORS = 2
"""COLMAP's log level (glog's ERROR): lower levels would flood the progress bars."""


def solve(source: FrameSource, folder: Path, names: Sequence[str], on_progress: Callable[[str, float], None]) -> Any:
    """Return COLMAP's largest model of the images in ``folder/images``; its other files are removed.

    Raises:
        SourceError: no two images could be registered.
        RuntimeError, ValueError: from COLMAP.
    """
    import pycolmap

    pycolmap.logging.minloglevel = max(pycolmap.logging.minloglevel, LOG_ERRORS)
    images, database, models = folder / "images", folder / "database.db", folder / "models"
    on_progress("finding features", 0.0)
    for camera, own in _by_camera(source, images, names).items():
        reader = pycolmap.ImageReaderOptions()
        if source.camera_is_guess:
            focal = (camera.fx + camera.fy) / 2
            reader.camera_model = "SIMPLE_RADIAL"
            if focal != GUESSED_FOCAL * max(camera.width, camera.height):
                # From EXIF. COLMAP takes a focal length that is given for nearly right; a mere guess must not be given.
                reader.camera_params = f"{focal},{camera.cx + 0.5},{camera.cy + 0.5},0"
        else:
            reader.camera_model, parameters = camera_to_colmap(camera)
            reader.camera_params = ",".join(map(str, parameters))
        pycolmap.extract_features(
            database, images, image_names=own, camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reader
        )
    on_progress("matching", 0.0)
    _match(database, images, names, source.camera.pinhole(), on_progress)
    model = _largest_model(database, images, models, names, source, on_progress)
    shutil.rmtree(models, ignore_errors=True)
    database.unlink()
    return model


def _by_camera(source: FrameSource, images: Path, names: Sequence[str]) -> dict[Camera, list[str]]:
    """Return the names of the written images by their cameras."""
    found: dict[Camera, list[str]] = {}
    for position, name in enumerate(names):
        if (images / name).is_file():
            camera = source.own_camera(position) if source.camera_is_guess else source.camera.pinhole()
            found.setdefault(camera, []).append(name)
    return found


def _match(
    database: Path, images: Path, names: Sequence[str], camera: Camera, on_progress: Callable[[str, float], None]
) -> None:
    import pycolmap

    names = [name for name in names if (images / name).is_file()]
    if len(names) <= EXHAUSTIVE_IMAGES:
        pairs = list(combinations(range(len(names)), 2))
    else:
        read = (_fitted(_read_image(images / name), camera) for name in names)
        backbone = Backbone(runtime="auto")
        similar = similar_pairs(read, camera, backbone, partners=SIMILAR_IMAGES, min_apart=APART)
        near = [(i, i + step) for step in STEPS for i in range(len(names) - step)]
        pairs = sorted({*near, *similar})
    listed, pairing = database.with_name("pairs.txt"), pycolmap.ImportedPairingOptions()
    pairing.match_list_path = listed
    for start in range(0, len(pairs), MATCHED_AT_ONCE):
        part = pairs[start : start + MATCHED_AT_ONCE]
        listed.write_text("".join(f"{names[i]} {names[j]}\n" for i, j in part))
        pycolmap.match_image_pairs(database, pairing_options=pairing, verification_options=_verification())
        on_progress("matching", (start + len(part)) / len(pairs))
    listed.unlink()


def _verification() -> Any:
    """Return COLMAP's options of the geometry of a pair."""
    import pycolmap

    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.random_seed = RANDOM_SEED
    return options


def _fitted(image: NDArray[np.uint8], camera: Camera) -> NDArray[np.uint8]:
    """Return an image in the size of a camera, cropped around its middle; likeness is all that it is needed for."""
    height, width = image.shape[:2]
    size = max(camera.width / width, camera.height / height)
    if size == 1 and (width, height) == (camera.width, camera.height):
        return image
    large = cv2.resize(image, (max(round(width * size), camera.width), max(round(height * size), camera.height)))
    left, top = (large.shape[1] - camera.width) // 2, (large.shape[0] - camera.height) // 2
    return np.asarray(large[top : top + camera.height, left : left + camera.width], dtype=np.uint8)


def _read_image(path: Path) -> NDArray[np.uint8]:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise SourceError(f"'{path}' cannot be read.")
    return np.ascontiguousarray(bgr[..., ::-1])


def _largest_model(
    database: Path,
    images: Path,
    out: Path,
    names: Sequence[str],
    source: FrameSource,
    on_progress: Callable[[str, float], None],
) -> Any:
    """Return the model with the most registered images.

    All are placed at once. Where that fails, they are placed one after the other: of many, every n-th image first. The
    images in between are then registered to that model, and all are adjusted once. Repeated adjustment of all images
    takes hours.
    """
    there = sum((images / name).is_file() for name in names)
    on_progress("placing images at once", 0.0)
    at_once = _global(database, images, out / "global", source.camera_is_guess)
    on_progress("placing images at once", 1.0)
    if at_once is not None and int(at_once.num_reg_images()) >= ENOUGH_AT_ONCE * there:
        return at_once
    placed = 2

    def next_image() -> None:
        nonlocal placed
        placed += 1
        on_progress("placing images", min(1.0, placed / len(names)))

    key_names = list(names[:: math.ceil(len(names) / KEY_IMAGES)])
    model = _incremental(database, images, out / "key", key_names, source.camera_is_guess, None, next_image)
    if len(key_names) < len(names) and model is not None:
        standing = out / "standing"
        standing.mkdir()
        model.write(standing)
        placed = int(model.num_reg_images())
        model = _incremental(database, images, out / "all", list(names), False, standing, next_image) or model
        on_progress("adjusting all", 0.0)
        _adjust(model, refine_camera=source.camera_is_guess)
        on_progress("adjusting all", 1.0)
    found = _largest([model, at_once])
    if found is None or found.num_reg_images() < 2:
        raise SourceError(
            "No two of the images could be registered: they overlap too little, or the camera stood still or "
            "only turned on the spot. Record while moving sideways."
        )
    return found


def _joined(model: Any) -> Any:
    """Return a model without the images that too few points join to its largest part, see ``MIN_SHARED``."""
    images = [image for image in model.images.values() if image.has_pose]
    column = {image.image_id: k for k, image in enumerate(images)}
    tracks = [[column[e.image_id] for e in point.track.elements] for point in model.points3D.values()]
    shared = np.zeros((len(images), len(images)), np.float32)
    for start in range(0, len(tracks), POINTS_AT_ONCE):
        part = tracks[start : start + POINTS_AT_ONCE]
        seen = np.zeros((len(part), len(images)), np.float32)
        seen[np.repeat(np.arange(len(part)), [len(track) for track in part]), np.concatenate(part)] = 1.0
        shared += seen.T @ seen
    left, largest = set(range(len(images))), set[int]()
    while len(left) > len(largest):
        found, reached = set[int](), {min(left)}
        while reached:
            found |= reached
            near = (shared[sorted(reached)] >= MIN_SHARED).any(axis=0)
            reached = set(np.flatnonzero(near).tolist()) - found
        left, largest = left - found, max(largest, found, key=len)
    for frame in {image.frame_id for k, image in enumerate(images) if k not in largest}:
        model.deregister_frame(frame)
    return model


def _largest(models: Iterable[Any]) -> Any:
    """Return the model with the most registered images, or None."""
    there = (model for model in models if model is not None)
    return max(there, key=lambda model: int(model.num_reg_images()), default=None)


def _global(database: Path, images: Path, out: Path, refine_camera: bool) -> Any:
    """Return COLMAP's model of all images by global mapping (GLOMAP), or None; also if points lie where none are seen.

    All rotations are averaged first, then positions and points are found together, and all are adjusted.
    """
    import pycolmap

    out.mkdir(parents=True)
    if refine_camera:
        database = Path(shutil.copy(database, out / "database.db"))  # what follows changes it
        pycolmap.calibrate_view_graph(database, pycolmap.ViewGraphCalibrationOptions(random_seed=RANDOM_SEED))
    options = pycolmap.GlobalPipelineOptions()
    options.random_seed = options.mapper.random_seed = RANDOM_SEED
    options.min_model_size, options.multiple_models = MIN_REGISTERED, False
    adjustment = options.mapper.bundle_adjustment
    adjustment.refine_focal_length = adjustment.refine_extra_params = refine_camera
    try:
        model = _largest(map(_joined, pycolmap.global_mapping(database, images, out, options).values()))
    except RuntimeError:
        return None
    return model if model is not None and model.compute_mean_reprojection_error() <= MAX_MEAN_ERROR_PX else None


def _incremental(
    database: Path,
    images: Path,
    out: Path,
    names: list[str],
    refine_camera: bool,
    standing: Path | None,
    next_image: Callable[[], None],
) -> Any:
    """Return COLMAP's largest model of some of the images, or None; a ``standing`` model is extended and kept fixed."""
    import pycolmap

    out.mkdir(parents=True)
    options = pycolmap.IncrementalPipelineOptions()
    options.ba_refine_focal_length = options.ba_refine_extra_params = refine_camera
    options.mapper.abs_pose_refine_focal_length = options.mapper.abs_pose_refine_extra_params = refine_camera
    options.ba_refine_principal_point = False
    options.min_model_size = MIN_REGISTERED
    options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = RANDOM_SEED
    options.image_names = names
    options.fix_existing_frames = standing is not None
    models = pycolmap.incremental_mapping(
        database, images, out, options, input_path=standing or "", next_image_callback=next_image
    )
    return _largest(map(_joined, models.values()))


def _adjust(model: Any, *, refine_camera: bool) -> None:
    """Adjust all poses, points and, if it was estimated, the camera of a model together."""
    import pycolmap

    pycolmap.bundle_adjustment(model, adjustment_options(refine_camera=refine_camera))


def adjustment_options(*, refine_camera: bool) -> Any:
    """Return COLMAP's options of the final adjustment; the principal point stays."""
    import pycolmap

    options = pycolmap.BundleAdjustmentOptions()
    options.refine_focal_length = options.refine_extra_params = refine_camera
    options.refine_principal_point = options.print_summary = False
    options.ceres.solver_options.max_num_iterations = LAST_ITERATIONS
    return options


BLOCK_ROWS = 512


def similar_pairs(
    images: Iterable[NDArray[np.uint8]], camera: Camera, backbone: Backbone, *, partners: int, min_apart: Sequence[int]
) -> list[tuple[int, int]]:
    """Return pairs of the most similar images that are at least ``min_apart[0]`` apart, ``min_apart[1]`` apart, ...

    Args:
        images: RGB (H, W, 3), in order, of a pinhole camera; read once.
        camera: camera of the images.
        backbone: network whose features describe the images.
        partners: largest number of partners per image, for each distance.
        min_apart: smallest distances in the sequence, in rising order.

    Returns:
        Sorted pairs (i, j), i < j, each once.
    """
    adapter = ImageAdapter(camera, map_camera(camera))
    cells = [_described(reliable_cells(backbone.extract(adapter(image)))) for image in images]
    if len(cells) <= min_apart[0]:
        return []
    vocabulary = Vocabulary.learn(torch.cat([c.features for c in cells]).float())
    rows = torch.stack([vocabulary.describe(c.features.float(), c.weight.float()) for c in cells])
    rows = F.normalize(rows - rows.mean(dim=0), dim=1)
    place = torch.arange(len(rows), device=rows.device)
    found: set[tuple[int, int]] = set()
    for start in range(0, len(rows), BLOCK_ROWS):
        block = place[start : start + BLOCK_ROWS]
        similarity = rows[block] @ rows.t()
        for apart in min_apart:
            similarity[(place[None] - block[:, None]).abs() < apart] = -torch.inf
            best = similarity.topk(min(partners, len(rows)), dim=1)
            for i, values, others in zip(block.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
                found.update((min(i, j), max(i, j)) for v, j in zip(values, others, strict=True) if v > 0)
    return sorted(found)


def _described(cells: QueryCells) -> QueryCells:
    """Return descriptors in half precision, since thousands of images are in memory at once."""
    return QueryCells(cells.features.half(), cells.weight.half())
