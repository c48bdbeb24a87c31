# SPDX-License-Identifier: Apache-2.0
"""``transforms.json`` of nerfstudio and instant-ngp as a source: one file with cameras, poses and image names.

Its poses are of cameras with OpenGL's axes (x right, y up, z backward); its pixel centres are at .5, like COLMAP's.
The map frame is the file's own world, after whatever rotation and scale the program applied that wrote it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from kfloc_ros.datasets.derived import stamps_with_gaps
from kfloc_ros.datasets.images import image_size, usual_size
from kfloc_ros.datasets.posed_images import DepthFiles, PosedImage, PosedImages, check_centre, natural_key, usable_pose
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import check_count, inside, read_text
from kfloc_ros.geometry.camera import DISTORTION_LENGTHS, Camera
from kfloc_ros.geometry.colmap import pixels_from_colmap
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.types import Matrix

FILE_NAME = "transforms.json"
OPENCV_FROM_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
IMAGE_ENDINGS = ("", ".png", ".jpg", ".jpeg", ".JPG", ".PNG")
DEFAULT_DEPTH_UNIT_M = 1e-3
LENSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "SIMPLE_PINHOLE": ("none", ()),
    "PINHOLE": ("none", ()),
    "SIMPLE_RADIAL": ("plumb_bob", ("k1",)),
    "RADIAL": ("plumb_bob", ("k1", "k2")),
    "OPENCV": ("plumb_bob", ("k1", "k2", "p1", "p2", "k3")),
    "FULL_OPENCV": ("rational_polynomial", ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6")),
    "SIMPLE_RADIAL_FISHEYE": ("equidistant", ("k1",)),
    "RADIAL_FISHEYE": ("equidistant", ("k1", "k2")),
    "OPENCV_FISHEYE": ("equidistant", ("k1", "k2", "k3", "k4")),
}
"""Names of ``camera_model``, and the distortion model and the keys of its coefficients that each stands for."""
FOCAL = frozenset({"fl_x", "camera_angle_x"})
PATH_KEYS = ("file_path", "depth_file_path", "depth_path")
LENS_KEY = re.compile(r"(k|p|s|b)\d|ftheta_\w+|latlong|ortho\w*|equirect\w*|skew")
"""Keys that say something about a lens; those that a model does not have may only be zero or false."""


LOG = logging.getLogger(__name__)


class TransformsFile(PosedImages):
    """The frames of a ``transforms.json``, in the order of their file names.

    Args:
        path: the file, or the folder with it.
        depth: read the depth images that frames name in ``depth_file_path`` (nerfstudio) or ``depth_path``
            (instant-ngp).

    Raises:
        SourceError: the file is missing or damaged, or an image that it names is.
    """

    def __init__(self, path: Path, *, depth: bool = True) -> None:
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = json.loads(read_text(path))
        except OSError as error:
            raise SourceError(f"'{path}' cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise SourceError(f"'{path}' is not JSON: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("frames"), list):
            raise SourceError(f"'{path}' has no list 'frames': it is not a transforms.json.")
        faults: list[str] = []
        try:
            check_count(len(content["frames"]), path)
            frames = sorted(content["frames"], key=lambda frame: natural_key(str(frame["file_path"])))
            frames = _from_here(path.parent, frames)
            stamps = stamps_with_gaps([Path(frame["file_path"]).parent for frame in frames])
            unit_m = _depth_unit_m(content)
            size = (
                usual_size([_file(path.parent, frame) for frame in frames])
                if not {"w", "h"} <= content.keys()
                else (0, 0)
            )
            images = [
                _image(path.parent, content, frame, stamp, size, faults)
                for frame, stamp in zip(frames, stamps, strict=True)
            ]
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, FrameError) as error:
            raise SourceError(
                f"'{path}' has a frame that cannot be used: {type(error).__name__} ({error}); every frame needs "
                "'file_path' and a 4x4 'transform_matrix'."
            ) from error
        if faults and all(image.T_map_camera is None for image in images):
            raise SourceError(faults[0])
        if faults:
            LOG.warning("%d of %d frames of '%s' have no pose. %s", len(faults), len(images), path, faults[0])
        super().__init__(path.resolve().parent.name, images, depth=DepthFiles(unit_m) if depth else None)


def _depth_unit_m(content: dict[str, Any]) -> float:
    """Lengths of the file's world per count: nerfstudio's ``depth_unit_scale_factor`` or instant-ngp's scale.

    Raises:
        SourceError: it is not given where instant-ngp's depth images need it, or is no positive number.
    """
    if "integer_depth_scale" in content:
        unit_m = float(content["integer_depth_scale"])
    elif any(isinstance(frame, dict) and frame.get("depth_path") for frame in content["frames"]):
        raise SourceError("A transforms.json with 'depth_path' needs 'integer_depth_scale', the length of one count.")
    else:
        unit_m = float(content.get("depth_unit_scale_factor", DEFAULT_DEPTH_UNIT_M))
    if not (math.isfinite(unit_m) and unit_m > 0):
        raise SourceError(f"The length of one count of depth in a transforms.json must be positive, got {unit_m}.")
    return unit_m


def _from_here(folder: Path, frames: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Frames whose paths begin in ``folder``.

    Programs such as ``colmap2nerf.py`` write paths as seen from where they were started. Leading folders that all
    images share are left out where the first image is found only without them. Paths that lead out of the folder stay.
    """
    names = [PurePosixPath(str(frame["file_path"])) for frame in frames]
    if not names or any(name.is_absolute() or ".." in name.parts for name in names):
        return frames
    parts, shared = names[0].parts, PurePosixPath(os.path.commonpath([name.parent for name in names])).parts
    tails = ({**frames[0], "file_path": str(PurePosixPath(*parts[count:]))} for count in range(len(shared) + 1))
    count = next((count for count, tail in enumerate(tails) if _file(folder, tail).is_file()), 0)
    if count == 0:
        return frames
    prefix = PurePosixPath(*shared[:count])
    LOG.warning("The images of '%s' are read from there, without the '%s' before their names.", folder, prefix)
    return [
        {**frame, **{key: _without(prefix, frame[key]) for key in PATH_KEYS if isinstance(frame.get(key), str)}}
        for frame in frames
    ]


def _without(prefix: PurePosixPath, name: str) -> str:
    """A path without leading folders, if it begins with them."""
    path = PurePosixPath(name)
    return path.relative_to(prefix).as_posix() if path.is_relative_to(prefix) else name


def _file(folder: Path, frame: dict[str, Any]) -> Path:
    """The image that a frame names, with or without its ending; it may be missing."""
    name = str(frame["file_path"])
    path = inside(folder, name)
    if path.is_file() or path.suffix in IMAGE_ENDINGS[1:]:
        return path
    return next((found for ending in IMAGE_ENDINGS[1:] if (found := inside(folder, name + ending)).is_file()), path)


def _image(
    folder: Path,
    content: dict[str, Any],
    frame: dict[str, Any],
    stamp_ns: int,
    size: tuple[int, int],
    faults: list[str],
) -> PosedImage:
    """The image of a frame; a pose that is none is left out and told in ``faults``."""
    name, image = str(frame["file_path"]), _file(folder, frame)
    if FOCAL.intersection(frame):  # a camera of its own
        with suppress(FrameError):  # told by the source's fault()
            size = image_size(image)
    depth = frame.get("depth_file_path") or frame.get("depth_path")
    T_map_camera = None
    try:
        T_map_camera = _pose(frame.get("transform_matrix"), name)
    except SourceError as error:
        faults.append(str(error))
    return PosedImage(
        path=image,
        name=Path(name).as_posix().removeprefix("./"),
        stamp_ns=stamp_ns,
        camera=_camera({**content, **frame}, size),
        T_map_camera=T_map_camera,
        depth_path=inside(folder, str(depth)) if depth else None,
    )


def _camera(values: dict[str, Any], size: tuple[int, int]) -> Camera:
    """Intrinsics of a frame; what the frame does not say itself is the file's."""
    told = "w" in values and "h" in values
    width, height = (int(values["w"]), int(values["h"])) if told else size
    if "fl_x" in values:
        fx = float(values["fl_x"])
        fy = float(values.get("fl_y", fx))
    elif "camera_angle_x" in values:
        fx = 0.5 * width / math.tan(0.5 * float(values["camera_angle_x"]))
        fy = 0.5 * height / math.tan(0.5 * float(values["camera_angle_y"])) if "camera_angle_y" in values else fx
    else:
        raise SourceError("A transforms.json needs 'fl_x' or 'camera_angle_x'; without a focal length nothing fits.")
    cx, cy = pixels_from_colmap((float(values.get("cx", width / 2)), float(values.get("cy", height / 2)))).tolist()
    camera = Camera(width, height, fx, fy, cx, cy, *_lens(values))
    if not told:
        check_centre(camera, FILE_NAME)
    return camera


def _lens(values: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    """Distortion model and coefficients; without a model's name there is none but what the coefficients say."""
    fisheye = bool(values.get("is_fisheye"))
    name = str(values.get("camera_model") or ("OPENCV_FISHEYE" if fisheye else "OPENCV"))
    if name not in LENSES:
        raise SourceError(
            f"The camera_model '{name}' of a transforms.json is not supported; known: {', '.join(LENSES)}. Undistort "
            "the images to a pinhole camera first."
        )
    model, keys = LENSES[name]
    if fisheye and model != "equidistant":
        raise SourceError(f"A transforms.json says is_fisheye and the camera_model '{name}', which is no fisheye.")
    if unknown := sorted(key for key in values if LENS_KEY.fullmatch(key) and key not in keys and values[key]):
        raise SourceError(
            f"A transforms.json has {', '.join(unknown)}, which the camera_model '{name}' does not have; such a lens "
            "is not supported. Undistort the images to a pinhole camera first."
        )
    if fisheye and "fl_x" not in values:
        raise SourceError("A transforms.json with is_fisheye needs 'fl_x': an angle of view does not tell it.")
    distortion = [float(values.get(key, 0.0)) for key in keys]
    if model != "equidistant" and not any(distortion):
        return "none", ()
    shortest = min(DISTORTION_LENGTHS[model])
    return model, (*distortion, *[0.0] * (shortest - len(distortion)))


def _pose(rows: Any, name: str) -> Matrix | None:
    """T_map_camera (4, 4); None where a number is not finite (also ``null``)."""
    if rows is None:
        raise SourceError(f"The frame '{name}' has no transform_matrix.")
    T = np.asarray(rows, dtype=np.float64)
    if T.shape not in ((4, 4), (3, 4)):
        raise SourceError(f"The transform_matrix of '{name}' is not a 4x4 matrix.")
    if not np.isfinite(T).all():
        return None
    U, singular, Vt = np.linalg.svd(T[:3, :3])
    if np.abs(singular - 1).max() > 0.02 or np.linalg.det(T[:3, :3]) < 0:
        raise SourceError(f"The transform_matrix of '{name}' holds no rotation.")
    return usable_pose(np.asarray(make_pose(U @ Vt, T[:3, 3]) @ OPENCV_FROM_OPENGL, dtype=np.float64))
