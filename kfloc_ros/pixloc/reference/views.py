# SPDX-License-Identifier: Apache-2.0
"""Features of the map's points in its images, extracted once and stored in half precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from kfloc_ros.errors import MapError, SourceError
from kfloc_ros.files import save_tensors
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.colmap import camera_from_colmap, read_model
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.model import PixLocModel, extract
from kfloc_ros.pixloc.reference.unet import FeaturePyramid, ImageSize

FORMAT, FORMAT_VERSION = "kfloc_pixloc_views", 1
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class ViewFeatures:
    """Features of one reference image at one image scale, at the points that it shows at every level."""

    rows: torch.Tensor
    """(N,) int64 rows of the scene's points."""
    features: tuple[torch.Tensor, ...]
    """(N, C) half precision per level, fine to coarse, not normalised."""
    confidences: tuple[torch.Tensor, ...]
    """(N,) half precision per level."""

    def to(self, device: torch.device | str) -> ViewFeatures:
        """Return the features on another device."""
        return ViewFeatures(
            self.rows.to(device),
            tuple(f.to(device) for f in self.features),
            tuple(c.to(device) for c in self.confidences),
        )


@dataclass(frozen=True)
class ViewSettings:
    """Settings that cached features depend on, besides the model and the scene."""

    size: ImageSize
    image_scales: tuple[int, ...] = (1,)
    pad: int = 2
    legacy: bool = False
    """See :func:`kfloc_ros.geometry.distortion.distort`."""
    half: bool = False
    """The network computes in half precision."""
    cubic: bool = False
    """Feature maps are interpolated by cubic convolution."""


@dataclass(frozen=True, eq=False)
class ViewStore:
    """Features of all reference images at all image scales."""

    views: Mapping[tuple[int, int], ViewFeatures]
    """Features by position in the scene and image scale."""
    settings: ViewSettings
    fingerprint: str
    """Fingerprint of the model that extracted the features."""
    scene: str = ""
    """Fingerprint of the scene; empty: unknown."""

    def to(self, device: torch.device | str) -> ViewStore:
        """Return the store on another device."""
        return replace(self, views={k: v.to(device) for k, v in self.views.items()})

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for (position, scale), view in self.views.items():
            prefix = f"{position}.{scale}."
            tensors[f"{prefix}rows"] = view.rows
            for level, (f, c) in enumerate(zip(view.features, view.confidences, strict=True)):
                tensors[f"{prefix}features.{level}"] = f
                tensors[f"{prefix}confidence.{level}"] = c
        metadata = {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "settings": json.dumps(asdict(self.settings)),
            "fingerprint": self.fingerprint,
            "scene": self.scene,
        }
        save_tensors(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path) -> ViewStore:
        """Read the file of :meth:`save`.

        Raises:
            MapError: the file is missing, damaged, or of another kind.
        """
        try:
            with safe_open(path, "pt") as stream:
                metadata: dict[str, str] = stream.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(FORMAT_VERSION):
                raise MapError(f"'{path}' does not hold reference features of version {FORMAT_VERSION}.")
            values = json.loads(metadata["settings"])
            settings = ViewSettings(
                ImageSize(**values["size"]),
                tuple(values["image_scales"]),
                values["pad"],
                values["legacy"],
                bool(values.get("half", False)),
                bool(values.get("cubic", False)),
            )
            tensors = load_file(path)
            views = {}
            for key in [name.removesuffix(".rows") for name in tensors if name.endswith(".rows")]:
                position, scale = (int(word) for word in key.split("."))
                count = sum(name.startswith(f"{key}.features.") for name in tensors)
                views[position, scale] = ViewFeatures(
                    tensors[f"{key}.rows"],
                    tuple(tensors[f"{key}.features.{level}"] for level in range(count)),
                    tuple(tensors[f"{key}.confidence.{level}"] for level in range(count)),
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MapError(f"The reference features '{path}' cannot be read: {error}") from error
        return cls(views, settings, metadata.get("fingerprint", ""), metadata.get("scene", ""))


def fingerprint_of(model: PixLocModel) -> str:
    """Return a text that differs between models whose features must not be mixed."""
    digest = hashlib.sha256()  # of the values, since a sum depends on the order in which threads add
    for value in model.extractor.state_dict().values():
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return f"{model.config.extractor.encoder}:{digest.hexdigest()[:16]}"


def fingerprint_of_scene(scene: ReferenceScene) -> str:
    """Return a text that differs between scenes whose features must not be mixed."""
    digest = hashlib.sha256(np.ascontiguousarray(scene.points).tobytes())
    for image in scene.images:
        digest.update(image.name.encode())
        digest.update(np.ascontiguousarray(image.T_camera_map).tobytes())
        digest.update(np.ascontiguousarray(image.point_rows).tobytes())
        digest.update(repr(image.camera).encode())
    return digest.hexdigest()[:16]


def extract_view(
    model: PixLocModel,
    scene: ReferenceScene,
    position: int,
    image: NDArray[np.uint8],
    settings: ViewSettings,
    image_scale: int = 1,
) -> ViewFeatures:
    """Sample an image's features at the points that it observes; points outside at any level are dropped."""
    return extract_views(model, scene, [position], [image], settings, image_scale)[0]


@torch.inference_mode()
def extract_views(
    model: PixLocModel,
    scene: ReferenceScene,
    positions: Sequence[int],
    images: Sequence[NDArray[np.uint8]],
    settings: ViewSettings,
    image_scale: int = 1,
) -> list[ViewFeatures]:
    """Sample the features of images of one size in one pass of the network; see :func:`extract_view`."""
    prepared = [settings.size.prepare(image, image_scale) for image in images]
    pyramid = extract(model, torch.cat([p.pixels for p in prepared]), half=settings.half)
    return [
        _sampled(scene.images[position], scene.points, pyramid, k, prepared[k].scale, settings)
        for k, position in enumerate(positions)
    ]


def _sampled(
    view: ReferenceImage,
    scene_points: NDArray[np.float64],
    pyramid: FeaturePyramid,
    number: int,
    image_scale: float,
    settings: ViewSettings,
) -> ViewFeatures:
    """Return the features of one image of a batch at its points."""
    device = pyramid.features[0].device
    rows = torch.from_numpy(view.point_rows)
    camera = CameraTensor.from_camera(view.camera).scale(image_scale)
    points = Pose.from_4x4mat(view.T_camera_map).transform(scene_points[view.point_rows])
    valid = torch.ones(1, len(rows), dtype=torch.bool, device=device)
    sampled = []
    for features, confidence, stride in zip(pyramid.features, pyramid.confidences, pyramid.strides, strict=True):
        uv, seen = camera.scale(1 / stride).world2image(points, legacy=settings.legacy)
        maps = FeatureMap.with_confidence(
            features[number : number + 1], confidence[number : number + 1], cubic=settings.cubic
        )
        values, inside = maps.sample(uv[None].to(device, features.dtype), settings.pad)
        valid = valid & inside & seen.to(device)
        sampled.append(values[0])
    keep = valid[0]
    half = [values[keep].clamp(-_HALF_MAX, _HALF_MAX).half() for values in sampled]
    return ViewFeatures(rows.to(device)[keep], tuple(v[:, :-1] for v in half), tuple(v[:, -1] for v in half))


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """Reference image of the map."""

    name: str
    camera: Camera
    T_camera_map: Matrix
    point_rows: NDArray[np.int64]
    """(N,) rows of the scene's points that this image observes."""
    ident: int = -1
    """Id of the image in its COLMAP model."""


@dataclass(frozen=True, eq=False)
class ReferenceScene:
    """Points and images of a map; an image is referred to by its position in ``images``."""

    points: NDArray[np.float64]
    """(P, 3) metres, map frame."""
    point_ids: NDArray[np.int64]
    """(P,) ids in the model that the points come from."""
    track_lengths: NDArray[np.int64]
    """(P,) number of images that observe each point."""
    images: tuple[ReferenceImage, ...]

    def covisibility(self, positions: Sequence[int]) -> NDArray[np.int64]:
        """Return (K, K) numbers of points that images observe in common."""
        seen = np.zeros((len(positions), len(self.points)), dtype=np.float32)
        for row, position in enumerate(positions):
            seen[row, self.images[position].point_rows] = 1
        return np.asarray(np.rint(seen @ seen.T), dtype=np.int64)


def read_scene(folder: Path) -> ReferenceScene:
    """Read a COLMAP model (.bin or .txt).

    Raises:
        MapError: there is none, it is damaged, or it has no registered image.
        FrameError: a camera model is not supported.
    """
    try:
        model = read_model(folder)
    except SourceError as error:
        raise MapError(f"'{folder}' does not hold a COLMAP model that can be read. {error}") from error
    ids = np.array(sorted(model.points3D), dtype=np.int64)
    row_of = {int(ident): row for row, ident in enumerate(ids)}
    images = []
    for image in sorted((i for i in model.images.values() if i.has_pose), key=lambda i: str(i.name)):
        rows = sorted({row_of[p.point3D_id] for p in image.points2D if p.has_point3D()})
        matrix = np.asarray(image.cam_from_world().matrix(), dtype=np.float64)
        images.append(
            ReferenceImage(
                str(image.name),
                camera_from_colmap(model.cameras[image.camera_id]),
                make_pose(matrix[:3, :3], matrix[:3, 3]),
                np.array(rows, dtype=np.int64),
                int(image.image_id),
            )
        )
    if not images:
        raise MapError(f"The COLMAP model '{folder}' has no image with a pose.")
    points = [model.points3D[int(ident)] for ident in ids]
    return ReferenceScene(
        points=np.array([p.xyz for p in points], dtype=np.float64).reshape(-1, 3),
        point_ids=ids,
        track_lengths=np.array([p.track.length() for p in points], dtype=np.int64),
        images=tuple(images),
    )
