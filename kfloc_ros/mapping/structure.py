# SPDX-License-Identifier: Apache-2.0
"""Structure from motion: poses from images alone by COLMAP, scaled to metres, with z upwards."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.colmap import MIN_TRACK_LENGTH, camera_of
from kfloc_ros.datasets.posed_images import CALIBRATION_FILE, write_calibration
from kfloc_ros.errors import SourceError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.colmap import camera_to_colmap
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.mapping.structure_scale import KnownLength, ReconstructedSource, metres_per_unit, similar_pairs

EXHAUSTIVE_IMAGES = 120
"""Number of images up to which every pair is matched; longer sequences match neighbours, near and in doubling steps."""
OVERLAP = 10
SIMILAR_IMAGES = 10
"""Number of similar, distant images that each image of a longer sequence is matched with in addition."""
KEY_IMAGES = 240
"""Number of evenly spaced images that are adjusted together in a longer sequence; the others are registered to them."""
LAST_ITERATIONS = 30
"""Iterations of the final adjustment of all images: two to three seconds each for 650 images."""
MIN_REGISTERED = 8
MIN_SHARE = 0.5
"""Smallest share of registered images: below it, the model covers only a part of the recording."""
LOG_ERRORS = 2
"""COLMAP's log level (glog's ERROR): lower levels would flood the progress bars."""
Array = NDArray[np.float64]


def reconstruct(
    source: FrameSource,
    folder: Path,
    *,
    length: KnownLength | None = None,
    on_progress: Callable[[str, float], None] = lambda stage, share: None,
) -> ReconstructedSource:
    """Compute the poses of a source's images; its own poses, if any, are used only for the scale.

    Args:
        source: images in order, of one camera; a guessed camera is estimated too.
        folder: new folder for the images, COLMAP's database, the model, and the camera if it was estimated.
        length: known length for the scale; else the source's depth is used, or else its poses.
        on_progress: called with the stage and its completed share.

    Raises:
        SourceError: the images do not overlap enough, or the scale is unknown.
    """
    if folder.exists():
        raise SourceError(
            f"'{folder}' exists; give another folder for the reconstruction, or read it: colmap:{folder}."
        )
    temporary: Path | None = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        found = _reconstruct(source, temporary, length, on_progress)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise SourceError(f"The reconstruction cannot be written to '{folder}': {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return found


def _reconstruct(
    source: FrameSource, folder: Path, length: KnownLength | None, on_progress: Callable[[str, float], None]
) -> ReconstructedSource:
    import pycolmap

    images = folder / "images"
    images.mkdir()
    names = _write_images(source, images, on_progress)
    try:
        model = _solve(source, folder, images, names, on_progress)
    except (RuntimeError, ValueError) as error:
        raise SourceError(f"The images of '{source.name}' could not be registered: {error}") from error
    poses, points = _read(model, names)
    if len(poses) < max(MIN_REGISTERED, MIN_SHARE * len(names)):
        raise SourceError(
            f"Only {len(poses)} of {len(names)} images of '{source.name}' could be registered. Record more slowly, "
            "with more overlap and light, and move sideways rather than turn on the spot."
        )
    scale = metres_per_unit(source, poses, points, length)
    T_map_model = _upright(poses)
    model.transform(pycolmap.Sim3d(np.concatenate([scale * T_map_model[:3, :3], np.zeros((3, 1))], axis=1)))
    (folder / "sparse").mkdir()
    model.write(folder / "sparse")
    poses, points = _read(model, names)
    camera = camera_of(next(iter(model.cameras.values()))) if source.camera_is_guess else None
    if camera is not None:
        write_calibration(folder / CALIBRATION_FILE, camera)
    return ReconstructedSource(source, poses, points, camera)


def _solve(
    source: FrameSource,
    folder: Path,
    images: Path,
    names: Sequence[str],
    on_progress: Callable[[str, float], None],
) -> Any:
    """Return COLMAP's largest model of the images; its other files are removed."""
    import pycolmap

    pycolmap.logging.minloglevel = max(pycolmap.logging.minloglevel, LOG_ERRORS)
    database, models = folder / "database.db", folder / "models"
    reader = pycolmap.ImageReaderOptions()
    if source.camera_is_guess:
        reader.camera_model = "SIMPLE_RADIAL"
    else:
        reader.camera_model, parameters = camera_to_colmap(source.camera.pinhole())
        reader.camera_params = ",".join(map(str, parameters))
    on_progress("finding features", 0.0)
    pycolmap.extract_features(database, images, camera_mode=pycolmap.CameraMode.SINGLE, reader_options=reader)
    on_progress("matching", 0.0)
    _match(database, images, names, source.camera.pinhole(), on_progress)
    model = _largest_model(database, images, models, names, source, on_progress)
    shutil.rmtree(models, ignore_errors=True)
    database.unlink()
    return model


def _write_images(source: FrameSource, images: Path, on_progress: Callable[[str, float], None]) -> list[str]:
    adapter = ImageAdapter(source.camera, source.camera.pinhole())
    names = []
    for position in range(len(source)):
        names.append(f"{position:06d}.png")
        frame = source.read(position)
        if frame is None:  # COLMAP uses only the images that exist
            continue
        bgr = cv2.cvtColor(adapter(frame.image), cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(images / names[-1]), bgr):
            raise SourceError(f"'{images / names[-1]}' cannot be written.")
        on_progress("writing images", (position + 1) / len(source))
    return names


def _match(
    database: Path, images: Path, names: Sequence[str], camera: Camera, on_progress: Callable[[str, float], None]
) -> None:
    import pycolmap

    if len(names) <= EXHAUSTIVE_IMAGES:
        pycolmap.match_exhaustive(database)
        return
    pairing = pycolmap.SequentialPairingOptions()
    pairing.overlap, pairing.quadratic_overlap = OVERLAP, True
    pycolmap.match_sequential(database, pairing_options=pairing)
    on_progress("matching again", 0.0)
    _match_similar(database, images, names, camera)


def _match_similar(database: Path, images: Path, names: Sequence[str], camera: Camera) -> None:
    """Match distant images that look similar, to close loops."""
    import pycolmap

    names = [name for name in names if (images / name).is_file()]
    read = (_read_image(images / name) for name in names)
    pairs = similar_pairs(read, camera, Backbone(), partners=SIMILAR_IMAGES, min_apart=OVERLAP + 1)
    listed = database.with_name("pairs.txt")
    listed.write_text("".join(f"{names[i]} {names[j]}\n" for i, j in pairs))
    pairing = pycolmap.ImportedPairingOptions()
    pairing.match_list_path = listed
    pycolmap.match_image_pairs(database, pairing_options=pairing)
    listed.unlink()


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

    Of a long recording, every n-th image is first registered and adjusted. The images in between are then registered to
    that model, and all are adjusted once. Repeated adjustment of all images takes hours.
    """
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
    if model is None:
        raise SourceError(
            "No two of the images could be registered: they overlap too little, or the camera only turned on the "
            "spot. Record while moving sideways."
        )
    return model


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
    options.image_names = names
    options.fix_existing_frames = standing is not None
    models = pycolmap.incremental_mapping(
        database, images, out, options, input_path=standing or "", next_image_callback=next_image
    )
    return max(models.values(), key=lambda model: int(model.num_reg_images()), default=None)


def _adjust(model: Any, *, refine_camera: bool) -> None:
    """Adjust all poses, points and, if it was estimated, the camera of a model together."""
    import pycolmap

    options = pycolmap.BundleAdjustmentOptions()
    options.refine_focal_length = options.refine_extra_params = refine_camera
    options.refine_principal_point = False
    options.print_summary = False
    options.ceres.solver_options.max_num_iterations = LAST_ITERATIONS
    pycolmap.bundle_adjustment(model, options)


def _read(model: Any, names: Sequence[str]) -> tuple[dict[int, Matrix], dict[int, Array]]:
    """Return poses, and the points observed by each image, by position."""
    number = {name: position for position, name in enumerate(names)}
    poses: dict[int, Matrix] = {}
    points: dict[int, Array] = {}
    for image in model.images.values():
        if not image.has_pose:
            continue
        matrix = np.asarray(image.cam_from_world().matrix(), dtype=np.float64)
        position = number[image.name]
        poses[position] = inverse_pose(make_pose(matrix[:, :3], matrix[:, 3]))
        seen = (model.points3D[p.point3D_id] for p in image.points2D if p.has_point3D())
        points[position] = np.array(
            [point.xyz for point in seen if point.track.length() >= MIN_TRACK_LENGTH], dtype=np.float64
        ).reshape(-1, 3)
    return dict(sorted(poses.items())), points


def _upright(poses: dict[int, Matrix]) -> Matrix:
    """Return the rotation to a frame with z upwards, assuming that the images are upright on average."""
    up = -np.mean([T[:3, 1] for T in poses.values()], axis=0)
    if np.linalg.norm(up) < 1e-3:  # images in all directions: no upward direction
        return np.eye(4)
    z = up / np.linalg.norm(up)
    ahead = np.mean([T[:3, 2] for T in poses.values()], axis=0)
    x = ahead - (ahead @ z) * z
    if np.linalg.norm(x) < 1e-3:
        x = np.cross(z, np.eye(3)[int(np.abs(z).argmin())])
    x /= np.linalg.norm(x)
    return make_pose(np.stack([x, np.cross(z, x), z]), np.zeros(3))
