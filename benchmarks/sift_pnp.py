# SPDX-License-Identifier: Apache-2.0
"""Classic matcher for comparison: SIFT with Lowe's ratio test, the mapped views' depth, and PnP."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from disk_lightglue import lift, solve
from numpy.typing import NDArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.relocalization.retrieval import ReferenceIndex

RATIO = 0.8


@dataclass(frozen=True, eq=False)
class MappedView:
    """Keypoints of a reference view with depth."""

    descriptors: NDArray[np.float32]
    """(N, 128)"""
    points: NDArray[np.float64]
    """(N, 3) metres, map frame."""


class SiftPnp:
    """Localizer of single images by SIFT matches with the reference views that the map's index retrieves.

    Args:
        scene_map: map, whose reference views are retrieved by the localizer's own search.
        mapped: source of the map, with depth, since a map holds no images.
        views: number of views retrieved for each image.
        keypoints: largest number of keypoints of each image.
    """

    def __init__(self, scene_map: SceneMap, mapped: FrameSource, *, views: int, keypoints: int) -> None:
        self._map, self._mapped, self._views = scene_map, mapped, views
        self._index = ReferenceIndex(scene_map.references)
        self._place = {index: position for position, index in enumerate(mapped.indices())}
        self._adapter = ImageAdapter(mapped.camera, scene_map.camera)
        self._sift = cv2.SIFT_create(keypoints, contrastThreshold=0.02)
        self._matcher = cv2.BFMatcher()
        self._seen: dict[int, MappedView] = {}

    def locate(self, image: NDArray[np.uint8], features: BackboneFeatures) -> Matrix | None:
        """Return ``T_map_camera`` of an image (H, W, 3) of the map's camera, or None."""
        at, descriptors = self._extract(image)
        pixels, points = [np.zeros((0, 2))], [np.zeros((0, 3))]
        for item in self._index.search(features, self._views):
            view = self._view(item.position)
            if len(view.descriptors) and len(descriptors) > 1:
                pairs = self._matcher.knnMatch(view.descriptors, descriptors, k=2)
                kept = [p[0] for p in pairs if len(p) == 2 and p[0].distance < RATIO * p[1].distance]
                pixels.append(at[[m.trainIdx for m in kept]].reshape(-1, 2))
                points.append(view.points[[m.queryIdx for m in kept]].reshape(-1, 3))
        return solve(np.concatenate(pixels), np.concatenate(points), self._map.camera)

    def _view(self, position: int) -> MappedView:
        if position not in self._seen:
            frame = self._mapped[self._place[self._map.references.ids[position]]]
            assert frame.depth_m is not None
            at, descriptors = self._extract(self._adapter(frame.image))
            points = lift(at, self._adapter.nearest(frame.depth_m), self._map.camera)
            known = np.isfinite(points[:, 0])
            T = self._map.references.T_map_camera[position]
            self._seen[position] = MappedView(descriptors[known], points[known] @ T[:3, :3].T + T[:3, 3])
        return self._seen[position]

    def _extract(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Return pixels (N, 2) and descriptors (N, 128)."""
        keypoints, descriptors = self._sift.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
        if descriptors is None:
            return np.zeros((0, 2)), np.zeros((0, 128), dtype=np.float32)
        return np.array([k.pt for k in keypoints]), descriptors
