# SPDX-License-Identifier: Apache-2.0
"""Depth of one camera in another's image, with and without distortion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kfloc_ros.datasets import images
from kfloc_ros.datasets.images import register_depth
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.camera_tensor import CameraTensor

PINHOLE = Camera(160, 120, 90.0, 90.0, 79.5, 59.5)
BARREL = Camera(160, 120, 100.0, 100.0, 79.5, 59.5, "plumb_bob", (-0.3, 0.1, 0.0, 0.0, 0.0))
FISHEYE = Camera(160, 120, 100.0, 100.0, 79.5, 59.5, "equidistant", (0.0, 0.0, 0.0, 0.0))
EDGE = 0.55
"""x/z of the edge of a slab at 1 m before a wall at 2 m."""


def slab(camera: Camera) -> np.ndarray:
    """Depth (H, W) of the scene as a camera with that lens measures it."""
    v, u = np.mgrid[: camera.height, : camera.width]
    rays = CameraTensor.from_camera(camera).image2world(torch.from_numpy(np.stack([u, v], axis=-1).astype(float)))
    return np.where(rays[..., 0].numpy() > EDGE, 1.0, 2.0).astype(np.float32)


@pytest.mark.parametrize("target", [PINHOLE, BARREL, FISHEYE], ids=["pinhole", "barrel", "fisheye"])
@pytest.mark.parametrize("source", [PINHOLE, BARREL, FISHEYE], ids=["pinhole", "barrel", "fisheye"])
def test_an_edge_is_where_the_image_has_it(source: Camera, target: Camera) -> None:
    registered = register_depth(slab(source), source, target, np.eye(4))
    flat = ImageAdapter(target, target.pinhole()).nearest(registered)
    for row in (10, 60, 110):
        near = np.flatnonzero((flat[row] > 0) & (flat[row] < 1.5))
        assert abs(near.min() - (EDGE * target.fx + target.cx)) <= 2
    middle = registered[30:90, 40:120]
    assert (middle > 0).mean() > 0.95 and np.isin(middle[middle > 0], (1.0, 2.0)).all()


def test_rays_far_outside_of_the_lens_do_not_come_back_into_the_image() -> None:
    """A strong barrel folds over: beyond its edge the polynomial leads back to the middle."""
    lens = Camera(160, 120, 140.0, 140.0, 79.5, 59.5, "plumb_bob", (-0.4, 0.0, 0.0, 0.0, 0.0))
    wide = Camera(160, 120, 25.0, 25.0, 79.5, 59.5)
    v, u = np.mgrid[:120, :160]
    outer = np.hypot((u - wide.cx) / wide.fx, (v - wide.cy) / wide.fy) > 1.2
    assert not register_depth(np.where(outer, 1.0, 0.0).astype(np.float32), wide, lens, np.eye(4)).any()


def test_the_compiled_loop_gives_what_numpy_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    depth = np.where(rng.random((120, 160)) < 0.8, rng.uniform(0.3, 4.0, (120, 160)), 0.0).astype(np.float32)
    T = np.eye(4)
    T[:3, 3] = 0.05, -0.02, 0.01
    compiled = register_depth(depth, PINHOLE, BARREL, T)
    monkeypatch.setattr(images, "has_numba", lambda: False)
    np.testing.assert_array_equal(compiled, register_depth(depth, PINHOLE, BARREL, T))
