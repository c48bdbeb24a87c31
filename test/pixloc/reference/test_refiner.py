# SPDX-License-Identifier: Apache-2.0
"""The reference family localizes with cached features; its covariance is that of repeated trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from poster import wall

from kfloc_ros.errors import ConfigError, MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.covariance import map_frame_covariance, pose_tangent_error
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureCost, FeatureMap, pose_covariance, score_of
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.model import PixLocModel
from kfloc_ros.pixloc.reference.refiner import ReferenceRefiner, ReferenceRefinerSettings
from kfloc_ros.pixloc.reference.solver import Method, SolverSettings, minimize
from kfloc_ros.pixloc.reference.unet import ImageSize
from kfloc_ros.pixloc.reference.views import (
    ReferenceImage,
    ReferenceScene,
    ViewSettings,
    ViewStore,
    extract_view,
    fingerprint_of,
)
from kfloc_ros.types import Matrix
from studies.parity import formula_model

pytestmark = pytest.mark.thorough

CAMERA = Camera(240, 192, 170.0, 170.0, 119.5, 95.5, "plumb_bob", (-0.05, 0.01, 0.0, 0.0))
FAR_M = np.array([4.5e5, 5.1e6, 300.0])
"""The map's origin is as far away as that of a UTM zone."""


def render(T_map_camera: Matrix) -> np.ndarray:
    """A textured wall at z = 2.5 m beyond FAR_M, seen through the camera's lens."""
    return wall(CAMERA, make_pose(T_map_camera[:3, :3], T_map_camera[:3, 3] - FAR_M))


def scene() -> ReferenceScene:
    rng = np.random.default_rng(1)
    points = np.c_[rng.uniform(-1.6, 1.6, 500), rng.uniform(-1.2, 1.2, 500), np.full(500, 2.5)] + FAR_M
    images = []
    for k, (x, yaw) in enumerate([(-0.15, 0.04), (0.15, -0.05), (0.0, 0.0)]):
        T = make_pose(so3_exp([0.0, yaw, 0.01 * k]), [FAR_M[0] + x, FAR_M[1] + 0.02 * k, FAR_M[2]])
        local = (points - T[:3, 3]) @ T[:3, :3]
        _, valid = CameraTensor.from_camera(CAMERA).world2image(torch.from_numpy(local))
        images.append(ReferenceImage(f"{k}.png", CAMERA, inverse_pose(T), np.flatnonzero(valid.numpy())))
    tracks = np.full(500, 3)
    tracks[:20] = 2
    return ReferenceScene(points, np.arange(500) * 10, tracks, tuple(images))


@pytest.fixture(scope="module")
def model() -> PixLocModel:
    """Random but not arbitrary weights; no trained ones come with the project."""
    return formula_model("vgg16", 0)


@pytest.fixture(scope="module")
def store(model: PixLocModel) -> ViewStore:
    settings = ViewSettings(ImageSize(240), image_scales=(1, 2), pad=1)
    views = {}
    for position, image in enumerate(scene().images):
        pixels = render(inverse_pose(image.T_camera_map))
        for scale in settings.image_scales:
            views[position, scale] = extract_view(model, scene(), position, pixels, settings, scale)
    return ViewStore(views, settings, fingerprint_of(model))


TRUTH = make_pose(so3_exp([0.02, -0.03, 0.02]), FAR_M + np.array([0.03, -0.02, 0.08]))
START = TRUTH @ make_pose(so3_exp([0.01, 0.015, -0.01]), [0.04, 0.01, -0.05])
QUICK = ReferenceRefinerSettings(num_iters=40, method=Method.CLASSIC, stop_period=1, min_points_opt=30, pad=1)


def errors(T: Matrix | None) -> tuple[float, float]:
    assert T is not None
    return float(np.linalg.norm(T[:3, 3] - TRUTH[:3, 3])), rotation_angle_deg(T[:3, :3].T @ TRUTH[:3, :3])


@pytest.mark.parametrize(
    "change",
    [{}, {"average_observations": True}, {"multiscale": (2, 1), "num_dbs": 2}, {"layer_indices": (0, 1)},
     {"method": Method.FIXED, "num_iters": 60}, {"cubic": True}],
    ids=["plain", "averaged", "multiscale", "two levels", "learned damping", "cubic"],
)  # fmt: skip
def test_refines_far_from_the_origin(model: PixLocModel, store: ViewStore, change: dict[str, object]) -> None:
    refiner = ReferenceRefiner(model, scene(), store, replace(QUICK, **change))  # type: ignore[arg-type]
    found = refiner.refine(render(TRUTH), CAMERA, START, [2, 0, 1])
    assert found.success, found.reason
    before, after = errors(START), errors(found.T_map_camera)
    assert after[0] < 0.25 * before[0]
    assert after[1] < 0.25 * before[1]
    assert len(found.iterations) == len(refiner.levels) * len(refiner.settings.multiscale)
    assert found.views == ((2, 0) if "num_dbs" in change else (2, 0, 1))
    assert found.covariance is not None
    assert np.linalg.eigvalsh(found.covariance)[0] > 0


def test_a_right_pose_scores_higher_than_a_wrong_picture(model: PixLocModel, store: ViewStore) -> None:
    refiner = ReferenceRefiner(model, scene(), store, QUICK)
    right = refiner.refine(render(TRUTH), CAMERA, START, [0, 1, 2])
    elsewhere = np.roll(render(TRUTH)[::-1], 60, axis=1).copy()
    wrong = refiner.refine(elsewhere, CAMERA, START, [0, 1, 2])
    assert right.score.value > 1.5 * wrong.score.value
    strict = ReferenceRefiner(model, scene(), store, replace(QUICK, min_score=0.99))
    refused = strict.refine(render(TRUTH), CAMERA, START, [0, 1, 2])
    assert not refused.success and "scores" in refused.reason and refused.T_map_camera is not None


def test_a_query_that_cannot_be_aligned_is_a_result_with_a_reason(model: PixLocModel, store: ViewStore) -> None:
    refiner, image = ReferenceRefiner(model, scene(), store, QUICK), render(TRUTH)
    cases = {
        "can be used": refiner.refine(image, CAMERA, START, []),
        "points of the 1": refiner.refine(image, CAMERA, START, [99]),
        "only 5 points": refiner.refine(image, CAMERA, START, [2], only_rows=scene().images[2].point_rows[50:55]),
        "stayed in view": refiner.refine(image, CAMERA, START @ make_pose(so3_exp([0, 2.5, 0]), [0, 0, 0]), [0, 1]),
    }
    for words, found in cases.items():
        assert not found.success
        assert words in found.reason
        assert found.T_map_camera is None


def test_short_tracks_are_left_out(model: PixLocModel, store: ViewStore) -> None:
    all_of_them = ReferenceRefiner(model, scene(), store, replace(QUICK, min_track_length=2, num_iters=1))
    long_ones = ReferenceRefiner(model, scene(), store, replace(QUICK, num_iters=1))
    image = render(TRUTH)
    more, fewer = (r.refine(image, CAMERA, START, [2]).point_count for r in (all_of_them, long_ones))
    assert 0 < more - fewer <= 20


def test_features_are_kept_in_a_file(store: ViewStore, tmp_path: Path, model: PixLocModel) -> None:
    path = tmp_path / "views.safetensors"
    store.save(path)
    loaded = ViewStore.load(path)
    assert loaded.settings == store.settings
    assert loaded.views.keys() == store.views.keys()
    for key, view in store.views.items():
        assert torch.equal(loaded.views[key].rows, view.rows)
        assert all(torch.equal(a, b) for a, b in zip(loaded.views[key].features, view.features, strict=True))
    ReferenceRefiner(model, scene(), loaded, QUICK)
    path.write_bytes(b"nothing")
    with pytest.raises(MapError, match="cannot be read"):
        ViewStore.load(path)


def test_what_does_not_fit_is_refused(store: ViewStore, model: PixLocModel) -> None:
    with pytest.raises(MapError, match="another model"):
        ReferenceRefiner(model, scene(), replace(store, fingerprint="other"), QUICK)
    with pytest.raises(MapError, match=r"image scales \[8\]"):
        ReferenceRefiner(model, scene(), store, replace(QUICK, multiscale=(8, 1)))
    with pytest.raises(ConfigError, match="levels 0 to 2"):
        ReferenceRefiner(model, scene(), store, replace(QUICK, layer_indices=(0, 3)))
    with pytest.raises(ConfigError):
        replace(QUICK, num_dbs=0)


def test_images_are_resized_as_the_original_does() -> None:
    image = np.zeros((235, 310, 3), dtype=np.uint8)
    small = ImageSize(200).prepare(image)
    assert small.pixels.shape == (1, 3, 152, 200)
    assert small.scale == 200 / 310  # and not 152 / 235
    assert ImageSize(1024).prepare(image).scale == 1.0
    assert ImageSize(1024).prepare(image, image_scale=4).pixels.shape[-1] == 256
    assert ImageSize(620, "max_force").prepare(image).pixels.shape == (1, 3, 470, 620)
    with pytest.raises(ConfigError):
        ImageSize(200, "min")


def trials(noise: float, count: int) -> tuple[FeatureCost, Pose, Pose]:
    """The same small problem ``count`` times, with features that differ by noise; start at the truth."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 4, 12, 15, generator=generator, dtype=torch.float64)
    maps = F.interpolate(maps, (60, 80), mode="bicubic")
    camera = CameraTensor.from_camera(Camera(80, 60, 70.0, 70.0, 39.5, 29.5))
    points = (torch.rand(120, 3, generator=generator, dtype=torch.float64) - 0.5) * torch.tensor([2.2, 1.6, 1.5])
    points[:, 2] += 2.5
    truth = Pose.from_aa(torch.tensor([0.3, -0.4, 0.2]).double(), torch.tensor([0.5, -0.2, 0.4]).double())
    points = truth.inv().transform(points)
    uv = camera.world2image(truth.transform(points)).points
    features = FeatureMap.from_maps(maps).sample(uv[None]).values
    features = features + noise * torch.randn(count, 120, 4, generator=generator, dtype=torch.float64)
    query = FeatureMap.with_confidence(maps, torch.ones(1, 1, 60, 80).double())
    cost = FeatureCost(
        FeatureMap(query.table.repeat(count, 1), count, 60, 80), CameraTensor.stack([camera] * count),
        points.expand(count, -1, -1), features, torch.ones(count, 120).double(),
    )  # fmt: skip
    return cost, Pose.stack([truth] * count), truth


@pytest.mark.parametrize("loss", ["squared", "scaled_barron(0, 0.1)"])
def test_the_covariance_is_that_of_repeated_trials(loss: str) -> None:
    cost, start, truth = trials(noise=0.05, count=250)
    settings = SolverSettings(
        num_iters=15, loss=RobustLoss.parse(loss), stop_period=1, stop_step_m=1e-6, stop_step_deg=1e-5
    )
    found = minimize(cost, start, settings).T
    T_true = truth.inv().matrix_numpy()
    T_found = found.inv().matrix_numpy()
    samples = np.array([pose_tangent_error(T, T_true) for T in T_found])
    at = cost.linearize(found, settings.loss)
    predicted = np.mean(
        [pose_covariance(_element(at, k), found[k : k + 1]) for k in range(40)],  # type: ignore[misc]
        axis=0,
    )
    # The normalised error of a covariance that is right has mean 6 in 6 dimensions; 250 trials give it to 0.2.
    nees = np.einsum("ni,ij,nj->n", samples, np.linalg.inv(predicted), samples).mean()
    assert 4.5 < nees < 8.0
    assert np.allclose(np.sqrt(np.diag(predicted)), samples.std(axis=0), rtol=0.25)


def _element(at: object, k: int) -> object:
    return type(at)(**{n: None if v is None else v[k : k + 1] for n, v in vars(at).items()})


def test_the_covariance_is_turned_to_the_map_frame_as_finite_differences_say() -> None:
    truth = Pose.from_aa(torch.tensor([0.3, -0.4, 0.2]).double(), torch.tensor([0.5, -0.2, 0.4]).double())
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6)) * 0.01
    step = 1e-6

    def moved(delta: np.ndarray) -> Matrix:
        return truth.retract(torch.from_numpy(delta)).inv().matrix_numpy()

    A = np.stack(
        [pose_tangent_error(moved(-step * e), moved(step * e)) / (2 * step) for e in np.eye(6)],
        axis=1,
    )
    found = map_frame_covariance(np.linalg.inv(root @ root.T), truth.matrix_numpy())
    assert found is not None
    assert np.allclose(found, A @ root @ root.T @ A.T, rtol=1e-5, atol=1e-10)


def test_a_free_direction_gives_no_covariance_and_a_low_score() -> None:
    cost, start, _ = trials(noise=0.05, count=1)
    flat = FeatureMap(cost.query.table.reshape(60, 80, -1)[:, :1].expand(-1, 80, -1).reshape(4800, -1), 1, 60, 80)
    loss = RobustLoss()
    at = replace(cost, query=flat).linearize(start, loss)  # stripes: nothing fixes a move along them
    whole = cost.linearize(start, loss)
    assert score_of(at, loss, 120).conditioning < 0.01 < score_of(whole, loss, 120).conditioning
    assert pose_covariance(at, start) is None
    assert pose_covariance(whole, start) is not None


def observed(model: PixLocModel, store: ViewStore, tell: Callable[..., None]) -> None:
    ReferenceRefiner(model, scene(), store, QUICK).refine(render(TRUTH), CAMERA, START, [2], observer=tell)


def test_an_observer_sees_poses_from_the_map_frame(model: PixLocModel, store: ViewStore) -> None:
    seen: list[tuple[int, Matrix]] = []
    observed(model, store, lambda level, it: seen.append((level, it.T.inv().matrix_numpy()[0])))
    assert [level for level, _ in seen] == sorted((level for level, _ in seen), reverse=True)
    assert errors(seen[-1][1])[0] < errors(START)[0]
