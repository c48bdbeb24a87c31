# SPDX-License-Identifier: Apache-2.0
"""One picture in a COLMAP model, with nothing known about where it was taken: look, start at several places, judge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.features.unet import FeaturePyramid
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.pixloc.reference_refiner import ReferenceRefiner, Refinement
from kfloc_ros.pixloc.view_features import ViewStore

MIN_COMMON_POINTS = 10
"""Images that share fewer points with the one started from do not see the same place."""


@torch.inference_mode()
def rank_views(store: ViewStore, image_scale: int, pyramid: FeaturePyramid) -> list[int]:
    """Positions of the stored images, the one most like a picture first.

    An image is described by the mean of its unit features at the coarsest level, weighted by confidence; what all
    images have in common is taken away.
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
    """An image and those of the others that share points with it, the most first."""
    candidates = [k for k in others if k != start]
    if not candidates:
        return [start]
    common = refiner.scene.covisibility([start, *candidates])[0, 1:]
    order = np.argsort(-common, kind="stable")
    return [start, *(candidates[int(k)] for k in order if common[k] >= MIN_COMMON_POINTS)]


def localize_picture(
    refiner: ReferenceRefiner, image: NDArray[np.uint8], camera: Camera, *, tries: int = 3
) -> Iterator[Refinement]:
    """Align the picture from the images most like it, one result a try; the best is that of the highest score."""
    scale = max(refiner.settings.multiscale)
    prepared = refiner.store.settings.size.prepare(image, scale)
    with torch.inference_mode():
        pyramid: FeaturePyramid = refiner.model.extractor(prepared.pixels.to(refiner.device))
    ranked = rank_views(refiner.store, scale, pyramid)
    for start in ranked[:tries]:
        T = inverse_pose(refiner.scene.images[start].T_camera_map)
        yield refiner.refine(image, camera, T, together_with(refiner, start, ranked))
