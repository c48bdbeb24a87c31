# SPDX-License-Identifier: Apache-2.0
"""Patches of reference points: they bring a pose that features left a few millimetres off to the right one."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kfloc_ros.device import torch_only
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose, so3_exp
from kfloc_ros.pixloc import patches as module
from kfloc_ros.pixloc.patch_kernels import PATCH_SIDE
from kfloc_ros.pixloc.patches import PatchAligner, with_patches
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews
from kfloc_ros.types import Alignment

CAMERA = Camera(320, 256, 260.0, 260.0, 159.5, 127.5)
WALL_M = 2.0
Image = NDArray[np.uint8]


def picture() -> Image:
    """Return a smooth random wall of 8 m x 8 m, 5 mm a pixel."""
    noise = np.random.default_rng(0).normal(size=(1600, 1600)).astype(np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), 4.0)
    return np.clip(128 + 40 * blurred / blurred.std(), 0, 255).astype(np.uint8)


WALL = picture()


def seen_from(T: Matrix) -> Image:
    """Return the RGB image of the wall z = 2 m from a pose."""
    v, u = np.mgrid[: CAMERA.height, : CAMERA.width]
    rays = np.stack([(u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, np.ones_like(u)], axis=-1) @ T[:3, :3].T
    at = T[:3, 3] + rays * ((WALL_M - T[2, 3]) / rays[..., 2])[..., None]
    pixels = (at[..., :2] / 0.005 + 800).astype(np.float32)
    grey = cv2.remap(WALL, pixels[..., 0], pixels[..., 1], cv2.INTER_CUBIC)
    return np.repeat(grey[..., None], 3, axis=2)


def references() -> ReferenceViews:
    """Return two views of the wall with points on a grid of pixels."""
    poses = np.stack([np.eye(4), make_pose(so3_exp(np.array([0.0, 0.05, 0.1])), np.array([0.1, 0.0, -0.1]))])
    v, u = (a.reshape(-1) for a in np.mgrid[24:240:12, 24:300:12])
    views = []
    for T in poses:
        rays = (
            np.stack([(u - CAMERA.cx) / CAMERA.fx, (v - CAMERA.cy) / CAMERA.fy, np.ones(len(u))], axis=1) @ T[:3, :3].T
        )
        points = torch.from_numpy(T[:3, 3] + rays * ((WALL_M - T[2, 3]) / rays[:, 2])[:, None]).float()
        n = len(points)
        bare = ReferencePoints(points, torch.zeros(n, 64), torch.zeros(n, 24), torch.ones(n))
        views.append(with_patches(bare, seen_from(T), CAMERA, T))
    return ReferenceViews((3, 7), poses, tuple(views))


TRUE = make_pose(so3_exp(np.array([0.02, -0.03, 0.06])), np.array([0.05, 0.03, -0.06]))


def aligned(T: Matrix) -> Alignment:
    """Return a successful alignment at a pose."""
    return Alignment(True, "", T, np.eye(6), 0.3, 0.1, 1.0, 3, (3, 7))


def away_m(T: Matrix | None) -> float:
    assert T is not None
    return float(np.linalg.norm(T[:3, 3] - TRUE[:3, 3]))


def test_a_pose_that_is_millimetres_off_becomes_right() -> None:
    off = TRUE @ make_pose(so3_exp(np.array([0.002, -0.003, 0.001])), np.array([0.006, -0.004, 0.005]))
    better = PatchAligner(references(), CAMERA, 0.25).improved(seen_from(TRUE), aligned(off))
    assert better.by_patches
    assert away_m(off) > 0.008
    assert away_m(better.T_map_camera) < 0.001
    assert better.covariance is not None
    assert np.allclose(better.covariance, 0.25 * np.eye(6) + better.patch_noise)
    assert better.final_cost == 0.1


def test_another_brightness_changes_nothing() -> None:
    off = TRUE @ make_pose(np.eye(3), np.array([0.004, 0.0, 0.003]))
    darker = (0.5 * seen_from(TRUE) + 10).astype(np.uint8)
    assert away_m(PatchAligner(references(), CAMERA).improved(darker, aligned(off)).T_map_camera) < 0.001


def test_a_blurred_image_has_more_noise() -> None:
    noises = []
    for sigma in (0.3, 1.5):
        blurred = np.asarray(cv2.GaussianBlur(seen_from(TRUE), (0, 0), sigma), dtype=np.uint8)
        alignment = PatchAligner(references(), CAMERA).improved(
            blurred, aligned(TRUE @ make_pose(np.eye(3), np.full(3, 1e-3)))
        )
        assert alignment.by_patches
        noises.append(np.trace(alignment.patch_noise[:3, :3]))
    assert noises[1] > 4 * noises[0]


def test_an_image_of_something_else_leaves_the_pose_as_it_is() -> None:
    other = np.random.default_rng(1).integers(0, 255, (CAMERA.height, CAMERA.width, 3), dtype=np.uint8)
    alignment = aligned(TRUE)
    assert PatchAligner(references(), CAMERA).improved(other, alignment) is alignment


@pytest.mark.parametrize("change", [{"success": False}, {"carried": True}, {"reference_ids": (99,)}])
def test_poses_that_the_map_does_not_confirm_are_left_as_they_are(change: dict[str, object]) -> None:
    alignment = replace(aligned(TRUE), **change)  # type: ignore[arg-type]
    assert PatchAligner(references(), CAMERA).improved(seen_from(TRUE), alignment) is alignment


def test_views_without_patches_are_left_out() -> None:
    views = references()
    bare = replace(views, views=tuple(replace(view, patches=None) for view in views.views))
    alignment = aligned(TRUE)
    assert PatchAligner(bare, CAMERA).improved(seen_from(TRUE), alignment) is alignment
    half = replace(views, views=(views.views[0], replace(views.views[1], patches=None)))
    assert PatchAligner(half, CAMERA).improved(seen_from(TRUE), alignment).by_patches


def test_a_grey_wall_gives_no_pose_that_is_not_a_number() -> None:
    views = references()
    empty = torch.full((len(views.views[0]), PATCH_SIDE**2), 90, dtype=torch.uint8)
    flat = replace(views, views=tuple(replace(view, patches=empty) for view in views.views))
    alignment = aligned(TRUE)
    assert PatchAligner(flat, CAMERA).improved(np.full_like(seen_from(TRUE), 90), alignment) is alignment


def test_the_compiled_loop_and_the_other_one_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    off = TRUE @ make_pose(np.eye(3), np.array([0.004, 0.002, 0.003]))
    aligner = PatchAligner(references(), CAMERA)
    compiled = aligner.improved(seen_from(TRUE), aligned(off)).T_map_camera
    calls: list[int] = []
    slow = module.patch_equations
    monkeypatch.setattr(module, "patch_equations", lambda *args: (calls.append(1), slow(*args))[1])
    with torch_only():
        other = aligner.improved(seen_from(TRUE), aligned(off)).T_map_camera
    assert calls
    assert compiled is not None
    assert other is not None
    assert np.abs(compiled - other).max() < 2e-5


def test_the_features_pose_counts_more_where_patches_fit_badly() -> None:
    start = TRUE @ make_pose(np.eye(3), np.array([0.004, 0.0, 0.0]))
    features = replace(aligned(start), covariance=np.diag(np.repeat([0.002, 0.001], 3) ** 2))
    clear = seen_from(TRUE)
    grain = np.random.default_rng(2).normal(0, 40, clear.shape[:2])[..., None]
    bad = np.clip(clear + grain, 0, 255).astype(np.uint8)
    aligner = PatchAligner(references(), CAMERA)
    of_clear, of_bad = (aligner.improved(image, features) for image in (clear, bad))
    assert of_clear.by_patches and of_bad.by_patches
    assert away_m(of_clear.T_map_camera) < 0.0005
    assert 0.002 < away_m(of_bad.T_map_camera) < 0.0045


def test_near_views_that_the_features_did_not_use_are_aligned_too() -> None:
    start = TRUE @ make_pose(np.eye(3), np.array([0.004, 0.0, 0.0]))
    features, both = replace(aligned(start), reference_ids=(3,)), references()
    bare = replace(both, views=(replace(both.views[0], patches=None), both.views[1]))
    assert away_m(PatchAligner(bare, CAMERA).improved(seen_from(TRUE), features).T_map_camera) < 0.001
    other_day = replace(bare, sessions=(0, 1))
    far = replace(bare, T_map_camera=np.stack([both.T_map_camera[0], make_pose(np.eye(3), np.array([0.9, 0, 0]))]))
    for views in (other_day, far):
        assert not PatchAligner(views, CAMERA).improved(seen_from(TRUE), features).by_patches
