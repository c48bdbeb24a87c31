# SPDX-License-Identifier: Apache-2.0
"""Structure from motion: poses from images alone by COLMAP, scaled to metres, with z upwards."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.colmap import MIN_TRACK_LENGTH, camera_of
from kfloc_ros.datasets.posed_images import CALIBRATION_FILE, write_calibration
from kfloc_ros.errors import SourceError
from kfloc_ros.files import read_text, replacing
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.mapping.measured_scale import PosedViews, Scale, upright
from kfloc_ros.mapping.structure_scale import UNSCALED, FromSource, ReconstructedSource, ScaleMethod
from kfloc_ros.mapping.structure_solver import MIN_REGISTERED, adjustment_options, solve

MIN_SHARE = 0.5
"""Smallest share of registered images: below it, the model covers only a part of the recording."""
MODEL, NOTES = "sparse", "model.json"
MAX_NOTES_BYTES = 10_000
USUAL_DEPTH = 2.0
"""Median depth of the points in a model without a scale: thresholds in metres then are of a sensible size."""
CAMERA_SIGMA_FACTOR = 10.0
"""Factor on the formal standard deviations of a camera that images tell: principal points were off by 6 to 14 of them
with four cameras, since one radial term is not the whole lens, and shutters roll."""
MIDDLE_CHI2 = 5.99
"""Squared Mahalanobis distance of a principal point from the middle that contradicts the middle (95 %)."""
CAMERA_IMAGES, CAMERA_ITERATIONS = 160, 8
"""Number of images that tell their cameras, and iterations of the adjustment of all images after that."""
Array = NDArray[np.float64]


def reconstruct(
    source: FrameSource,
    folder: Path,
    *,
    method: ScaleMethod | None = None,
    on_progress: Callable[[str, float], None] = lambda stage, share: None,
) -> ReconstructedSource:
    """Compute the poses of a source's images; its own poses, if any, are used only for the scale.

    A model of the same images that is already in the folder is used again, so nothing is lost if a scale fails.

    Args:
        source: images in order; guessed cameras are estimated too.
        folder: folder for the images, the model, its scale, and the camera if it was estimated.
        method: origin of the scale; None: that of a model in the folder, or else the source's depth or poses.
        on_progress: called with the stage and its completed share.

    Raises:
        SourceError: the folder has something else, the images do not overlap enough, or the scale is unknown. In the
            last two cases the model is kept.
    """
    import pycolmap

    kept = _kept_model(folder, source) if folder.exists() else None
    if method is None and (kept is None or kept.scale is None or kept.scale.origin == UNSCALED):
        method = FromSource()
    if method is not None:
        method.check(source)
    if kept is None:
        _make_model(source, folder, on_progress)
        kept = _kept_model(folder, source)
    model = pycolmap.Reconstruction(folder / MODEL)
    numbers = {image.name: int(Path(image.name).stem) for image in model.images.values() if image.has_pose}
    poses, points, cameras = _read(model, numbers)
    if len(poses) < max(MIN_REGISTERED, MIN_SHARE * len(source)):
        raise SourceError(
            f"Only {len(poses)} of {len(source)} images of '{source.name}' could be registered. Record more slowly, "
            "with more overlap and light, and move sideways rather than turn on the spot. The model of these images is "
            f"kept: the source colmap:{folder}."
        )
    estimated = cameras if source.camera_is_guess else {}
    scale = kept.scale
    if method is not None:
        try:
            scale = method.measure(PosedViews(source, poses, points, estimated))
        except SourceError as error:
            raise SourceError(
                f"{error} The model is kept in '{folder}': repeat the command with another option of the scale, and "
                "it goes on from there."
            ) from error
        _rescale(model, folder, replace(kept, scale=scale))
        poses, points, _ = _read(model, numbers)
    return ReconstructedSource(source, poses, points, estimated, scale, kept.focal_sigma)


@dataclass(frozen=True)
class ModelNotes:
    """Content of ``model.json``: images of a model, and the scale that was applied to it."""

    source: str
    images: int
    scale: Scale | None
    focal_sigma: float | None = None
    """Standard deviation of the focal length that the images tell, as a share of it; None: not known."""


def read_notes(folder: Path) -> ModelNotes | None:
    """Return the notes beside a model that this package made; None if there are none.

    Raises:
        SourceError: they are damaged.
    """
    path = folder / NOTES
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path, MAX_NOTES_BYTES))
        scale = content["scale"]
        told = None if scale is None else Scale(float(scale["metres_per_unit"]), str(scale["origin"]))
        sigma = content.get("focal_sigma")
        return ModelNotes(str(content["source"]), int(content["images"]), told, None if sigma is None else float(sigma))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SourceError(f"'{path}' is damaged: {error}. Delete the folder and build again.") from error


def _kept_model(folder: Path, source: FrameSource) -> ModelNotes:
    notes = read_notes(folder)
    if notes is None or (notes.source, notes.images) != (source.name, len(source)):
        raise SourceError(
            f"'{folder}' exists and is not a model of these images; give another folder for the reconstruction, or "
            f"read it: colmap:{folder}."
        )
    return notes


def _make_model(source: FrameSource, folder: Path, on_progress: Callable[[str, float], None]) -> None:
    """Write the model, upright and in a unit in which the usual depth is ``USUAL_DEPTH``; the folder appears whole."""
    import pycolmap

    temporary: Path | None = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        (temporary / "images").mkdir()
        names = _write_images(source, temporary / "images", on_progress)
        try:
            model = solve(source, temporary, names, on_progress)
        except (RuntimeError, ValueError) as error:
            raise SourceError(f"The images of '{source.name}' could not be registered: {error}") from error
        focal_sigma: float | None = None
        if source.camera_is_guess:
            on_progress("adjusting the camera", 0.0)
            adjusted = with_principal_point(model)
            model, focal_sigma = adjusted.model, adjusted.focal_sigma
            on_progress("adjusting the camera", 1.0)
        poses, points, cameras = _read(model, {name: k for k, name in enumerate(names)})
        depths = [((points[k] - T[:3, 3]) @ T[:3, 2]) for k, T in poses.items()]
        usual = float(np.median(np.concatenate(depths))) if any(map(len, depths)) else USUAL_DEPTH
        size = USUAL_DEPTH / usual if usual > 0 else 1.0
        model.transform(pycolmap.Sim3d(np.concatenate([size * upright(poses)[:3, :3], np.zeros((3, 1))], axis=1)))
        (temporary / MODEL).mkdir()
        model.write(temporary / MODEL)
        if source.camera_is_guess:
            write_calibration(temporary / CALIBRATION_FILE, Counter(cameras.values()).most_common(1)[0][0])
        _write_notes(temporary, ModelNotes(source.name, len(source), None, focal_sigma))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise SourceError(f"The reconstruction cannot be written to '{folder}': {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class AdjustedModel:
    """A model that is adjusted with its camera."""

    model: Any
    """COLMAP's model."""
    focal_sigma: float | None
    """Standard deviation of the camera's focal length, as a share of it; None if the images do not tell it."""


def with_principal_point(model: Any) -> AdjustedModel:
    """Adjust a model with its camera's principal point, where the images contradict the middle; else it stays.

    Mapping keeps it in the middle: of few images, or such that never turn about the optical axis, it cannot be told
    from the rotations. ``CAMERA_IMAGES`` evenly spaced images tell it; all are adjusted after that. A model of several
    cameras, each with few images, stays.
    """
    import pycolmap

    if len(model.cameras) > 1:
        return AdjustedModel(model, None)

    posed = sorted((image for image in model.images.values() if image.has_pose), key=lambda image: str(image.name))
    chosen = posed[:: -(-len(posed) // CAMERA_IMAGES)]
    found, config = pycolmap.Reconstruction(model), pycolmap.BundleAdjustmentConfig()
    options = adjustment_options(refine_camera=True)
    options.refine_principal_point = True
    for image in chosen:
        config.add_image(image.image_id)
    config.fix_gauge(pycolmap.BundleAdjustmentGauge.TWO_CAMS_FROM_WORLD)
    adjuster = pycolmap.create_default_ceres_bundle_adjuster(options, config, found)
    if not adjuster.solve().is_solution_usable():
        return AdjustedModel(model, None)
    wanted = pycolmap.BACovarianceOptions(params=pycolmap.BACovarianceOptionsParams.ALL)
    covariance = pycolmap.estimate_ba_covariance(wanted, found, adjuster)
    (camera,), (given,) = found.cameras.values(), model.cameras.values()
    of_camera = None if covariance is None else covariance.get_other_params_cov(camera.params)
    if of_camera is None or len(of_camera) != len(camera.params) or not np.isfinite(of_camera).all():
        return AdjustedModel(model, None)
    centre, focal = camera.principal_point_idxs(), camera.focal_length_idxs()
    focal_sigma = float(np.sqrt(np.diag(of_camera)[focal].max())) / camera.mean_focal_length()
    moved = (np.array(camera.params) - given.params)[centre]
    of_centre = CAMERA_SIGMA_FACTOR**2 * of_camera[np.ix_(centre, centre)]
    if moved @ np.linalg.pinv(of_centre) @ moved <= MIDDLE_CHI2:
        return AdjustedModel(model, focal_sigma)
    if len(chosen) < len(posed):
        found = _with_camera(model, camera)
        options.ceres.solver_options.max_num_iterations = CAMERA_ITERATIONS
        pycolmap.bundle_adjustment(found, options)
    found.update_point_3d_errors()
    return AdjustedModel(found, focal_sigma)


def _with_camera(model: Any, camera: Any) -> Any:
    """Return a model with another camera; its images are turned so that the middle of each sees what it saw."""
    import pycolmap

    changed = pycolmap.Reconstruction(model)
    (old,) = changed.cameras.values()
    right, down = (np.array(camera.params) - old.params)[old.principal_point_idxs()] / camera.mean_focal_length()
    turn = pycolmap.Rigid3d(pycolmap.Rotation3d(np.array([down, -right, 0.0])), np.zeros(3))
    for image in changed.images.values():
        if image.has_pose:
            image.frame.set_cam_from_world(image.camera_id, turn * image.cam_from_world())
    old.params = camera.params
    return changed


def _write_images(source: FrameSource, images: Path, on_progress: Callable[[str, float], None]) -> list[str]:
    """Write the images for COLMAP: as recorded if their cameras are guesses, else without distortion.

    Returns:
        A name for every position, also of images that cannot be read.

    Raises:
        SourceError: an image cannot be written.
    """
    adapter = ImageAdapter(source.camera, source.camera.pinhole())
    names = []
    for position in range(len(source)):
        names.append(f"{position:06d}.png")
        frame = source.read_recorded(position) if source.camera_is_guess else source.read(position)
        if frame is None:  # COLMAP uses only the images that exist
            continue
        image = frame.image if source.camera_is_guess else adapter(frame.image)
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if not cv2.imwrite(str(images / names[-1]), bgr):
            raise SourceError(f"'{images / names[-1]}' cannot be written.")
        on_progress("writing images", (position + 1) / len(source))
    return names


def _write_notes(folder: Path, notes: ModelNotes) -> None:
    with replacing(folder / NOTES) as partial:
        partial.write_text(json.dumps(asdict(notes), indent=2) + "\n", encoding="utf-8")


def _rescale(model: Any, folder: Path, notes: ModelNotes) -> None:
    """Apply a scale to a model in its folder."""
    import pycolmap

    assert notes.scale is not None
    model.transform(pycolmap.Sim3d(np.concatenate([notes.scale.metres_per_unit * np.eye(3), np.zeros((3, 1))], axis=1)))
    try:
        changed = Path(tempfile.mkdtemp(prefix=".sparse.", dir=folder))
        model.write(changed)
        changed.chmod(0o755)
        old = changed.with_name(changed.name + ".old")
        (folder / MODEL).rename(old)
        changed.rename(folder / MODEL)
        shutil.rmtree(old, ignore_errors=True)
        _write_notes(folder, notes)
    except OSError as error:
        raise SourceError(f"The scale cannot be written to '{folder}': {error}.") from error


def _read(model: Any, numbers: Mapping[str, int]) -> tuple[dict[int, Matrix], dict[int, Array], dict[int, Camera]]:
    """Return poses, the points observed by each image, and cameras, by position."""
    poses: dict[int, Matrix] = {}
    points: dict[int, Array] = {}
    cameras: dict[int, Camera] = {}
    known = {key: camera_of(camera) for key, camera in model.cameras.items()}
    for image in model.images.values():
        if not image.has_pose:
            continue
        matrix = np.asarray(image.cam_from_world().matrix(), dtype=np.float64)
        position = numbers[image.name]
        poses[position] = inverse_pose(make_pose(matrix[:, :3], matrix[:, 3]))
        seen = (model.points3D[p.point3D_id] for p in image.points2D if p.has_point3D())
        points[position] = np.array(
            [point.xyz for point in seen if point.track.length() >= MIN_TRACK_LENGTH], dtype=np.float64
        ).reshape(-1, 3)
        cameras[position] = known[image.camera_id]
    return dict(sorted(poses.items())), points, cameras
