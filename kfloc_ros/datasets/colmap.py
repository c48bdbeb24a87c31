# SPDX-License-Identifier: Apache-2.0
"""A COLMAP model as a source: images, cameras with their distortion, poses, and the sparse points each image sees."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.derived import stamps_with_gaps
from kfloc_ros.datasets.posed_images import PosedImage, PosedImages, natural_key, usable_pose
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import inside
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_colmap, pixels_from_colmap, read_model
from kfloc_ros.geometry.lie import inverse_pose, make_pose

MODEL_FOLDERS = ("", "sparse/0", "sparse", "colmap/sparse/0", "model")
IMAGE_FOLDERS = ("images", "image", "rgb")
MAX_REPROJECTION_PX = 4.0
"""Observations whose point lies farther from them are left out, in pixels of the original image."""
MIN_TRACK_LENGTH = 3
"""Points seen by two images only have no check on their depth."""


class ColmapModel(PosedImages):
    """The registered images of a model, by name; ``Frame.index`` counts them.

    The map frame is the model's own, in its own scale. Several cameras are brought to the one that most images have.

    Args:
        root: folder with the model in it or in ``sparse/0``, and the images in ``images`` beside it.

    Raises:
        SourceError: no model or several, no images, or a camera model that has no equal here.
    """

    def __init__(self, root: Path) -> None:
        folder = find_model(root)
        model = read_model(folder)
        images_folder = _images_folder(root, folder)
        images = sorted((i for i in model.images.values() if i.has_pose), key=lambda image: natural_key(image.name))
        if images and not any(os.path.isfile(os.path.join(images_folder, image.name)) for image in images):
            raise SourceError(
                f"None of the {len(images)} images of the model '{folder}' is in '{images_folder}'; the first would be "
                f"'{images[0].name}'."
            )
        cameras = {key: camera_of(camera) for key, camera in model.cameras.items()}
        stamps = stamps_with_gaps([Path(image.name).parent for image in images])
        super().__init__(
            root.resolve().name,
            [
                PosedImage(
                    inside(images_folder, image.name), image.name, stamp, cameras[image.camera_id],
                    usable_pose(_pose(image.cam_from_world())),
                )
                for image, stamp in zip(images, stamps, strict=True)
            ],
        )  # fmt: skip
        self._seen = [_visible_points(image, model, cameras[image.camera_id]) for image in images]

    def visible_points(self, position: int) -> NDArray[np.float64]:
        return self._seen[position]


def find_model(root: Path) -> Path:
    """The one folder under ``root`` that holds a model.

    Raises:
        SourceError: none, or several.
    """
    if not root.is_dir():
        raise SourceError(f"There is no folder '{root}'.")
    for name in MODEL_FOLDERS:
        if is_model(root / name):
            others = [p.name for p in sorted((root / name).parent.iterdir()) if is_model(p)] if name else []
            if len(others) > 1:
                raise SourceError(
                    f"'{root}' holds several models ({', '.join(others)} in '{(root / name).parent}'). "
                    "Name the folder of one."
                )
            return root / name
    below = [p for p in sorted(root.iterdir()) if p.is_dir() and any(is_model(p / name) for name in MODEL_FOLDERS)]
    if len(below) == 1:
        return find_model(below[0])
    if below:
        raise SourceError(f"'{root}' holds several models: {', '.join(p.name for p in below)}. Name one.")
    raise SourceError(f"'{root}' holds no COLMAP model: no cameras, images and points3D (.bin or .txt) were found.")


def is_model(folder: Path) -> bool:
    """Whether a folder holds the three files of a model."""
    return any(
        all((folder / f"{name}{end}").is_file() for name in ("cameras", "images", "points3D"))
        for end in (".bin", ".txt")
    )


def camera_of(camera: Any) -> Camera:
    """The camera of a ``pycolmap.Camera``.

    Raises:
        SourceError: its lens model has no equal here, or its values are no camera's.
    """
    try:
        return camera_from_colmap(camera)
    except FrameError as error:
        raise SourceError(str(error)) from error


def _pose(cam_from_world: Any) -> NDArray[np.float64]:
    matrix = np.asarray(cam_from_world.matrix(), dtype=np.float64)
    return inverse_pose(make_pose(matrix[:3, :3], matrix[:3, 3]))


def _visible_points(image: Any, model: Any, camera: Camera) -> NDArray[np.float64]:
    """(N, 3) points of long tracks that the image sees where they project to."""
    seen = [p for p in image.points2D if p.has_point3D()]
    tracks = [model.points3D[p.point3D_id] for p in seen]
    keep = [i for i, point in enumerate(tracks) if point.track.length() >= MIN_TRACK_LENGTH]
    pixels = pixels_from_colmap([seen[i].xy for i in keep]).reshape(-1, 2)
    points = np.array([tracks[i].xyz for i in keep], dtype=np.float64).reshape(-1, 3)
    matrix = np.asarray(image.cam_from_world().matrix(), dtype=np.float64)
    local = points @ matrix[:, :3].T + matrix[:, 3]
    front = local[:, 2] > 1e-6
    pixels, points, local = pixels[front], points[front], local[front]
    if not len(points):
        return points
    near = np.linalg.norm(camera.distort(local[:, :2] / local[:, 2:]) - pixels, axis=1) < MAX_REPROJECTION_PX
    return np.asarray(points[near], dtype=np.float64)


def _images_folder(root: Path, model: Path) -> Path:
    for base in (root, model, *list(model.parents)[:3]):
        for name in IMAGE_FOLDERS:
            if (base / name).is_dir():
                return base / name
    raise SourceError(f"The images of the model '{model}' were not found: no folder 'images' in it or above it.")
