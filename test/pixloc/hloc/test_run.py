# SPDX-License-Identifier: Apache-2.0
"""Reference features of a COLMAP model: extracted as needed, in half precision, and cached."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose
from kfloc_ros.pixloc.hloc import run
from kfloc_ros.pixloc.hloc.options import run_options
from kfloc_ros.pixloc.hloc.run import PictureLocalizer, default_cache, gather_views, view_settings
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel, extract
from kfloc_ros.pixloc.reference.views import ReferenceImage, ReferenceScene, ViewStore

CAMERA = Camera(160, 128, 113.0, 113.0, 79.5, 63.5)


@pytest.fixture(scope="module")
def model() -> PixLocModel:
    torch.manual_seed(0)
    return PixLocModel(PixLocConfig()).eval()


@pytest.fixture(scope="module")
def scene() -> ReferenceScene:
    """Five images beside each other of a wall; each sees points of its neighbours."""
    rng = np.random.default_rng(0)
    points = np.c_[rng.uniform([-3, -1], [3, 1], (300, 2)), np.full(300, 3.0)]
    images = []
    for k in range(5):
        x = -1.6 + 0.8 * k
        rows = np.flatnonzero(np.abs(points[:, 0] - x) < 1.6)
        images.append(ReferenceImage(f"{k}.png", CAMERA, inverse_pose(make_pose(np.eye(3), [x, 0, 0])), rows))
    tracks = np.full(300, 3, dtype=np.int64)
    return ReferenceScene(points, np.arange(300), tracks, tuple(images))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for k in range(5):
        picture = cv2.resize(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8), (160, 128))
        cv2.imwrite(str(folder / f"{k}.png"), picture)
    return folder


def test_only_the_images_of_an_alignment_are_extracted_at_full_size(
    model: PixLocModel, scene: ReferenceScene, images: Path, tmp_path: Path
) -> None:
    options = run_options("7scenes", from_poses=False, words=["multiscale=2,1", "num_dbs=2", "num_iters=2", "pad=1"])
    told: list[tuple[int, int, str]] = []
    cache = tmp_path / "cache.safetensors"
    localizer = PictureLocalizer(
        model,
        scene,
        images,
        options,
        cache=cache,
        on_progress=lambda done, total, what: told.append((done, total, what)),
    )
    picture = np.asarray(cv2.imread(str(images / "1.png"))[..., ::-1])
    results = list(localizer.localize(picture, CAMERA, tries=1))
    assert len(results) == 1
    kept = ViewStore.load(cache).views
    assert {k for k, scale in kept if scale == 2} == set(range(5))
    assert {k for k, scale in kept if scale == 1} == set(results[0].views) and len(results[0].views) == 2
    assert (5, 5, "reference images") in told and told[-1] == (1, 1, "alignments")


def test_an_interrupted_extraction_keeps_what_it_has(
    model: PixLocModel, scene: ReferenceScene, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = run_options("7scenes", from_poses=False, words=["multiscale=1", "pad=1"])
    settings, cache = view_settings(options, torch.device("cpu")), tmp_path / "cache.safetensors"
    seen: list[int] = []
    whole = run.extract_views

    def extract_two(*args: object, **words: object) -> object:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(*args, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "extract_views", extract_two)
    with pytest.raises(KeyboardInterrupt):
        gather_views(model, scene, range(5), images, settings, cache=cache)
    assert len(ViewStore.load(cache).views) == 2
    store = gather_views(model, scene, range(5), images, settings, cache=cache)
    assert len(store.views) == 5 and len(seen) == 6  # three more were extracted
    moved = ReferenceScene(scene.points + 1, scene.point_ids, scene.track_lengths, scene.images)
    with pytest.raises(MapError, match="another model, scene"):
        gather_views(model, moved, [0], images, settings, cache=cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    usual = default_cache(scene, model, settings)
    assert usual != default_cache(moved, model, settings) and usual.is_relative_to(tmp_path)
    usual.parent.mkdir(parents=True)
    usual.write_bytes(cache.read_bytes())
    assert default_cache(scene, model, settings).is_file()
    usual.write_bytes(cache.read_bytes()[:200])
    assert not default_cache(scene, model, settings).is_file()  # damaged: it is made again


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1] * 10), ("cuda", [5, 5])])
def test_a_gpu_gets_images_of_one_size_together(scene: ReferenceScene, device: str, sizes: list[int]) -> None:
    settings = view_settings(run_options("7scenes", from_poses=False, words=["multiscale=2,1"]), torch.device("cpu"))
    items = [(k, scale) for k in range(5) for scale in (2, 1)]
    chunks = list(run._chunks(scene, items, settings, torch.device(device)))
    assert [len(chunk.positions) for chunk in chunks] == sizes
    assert sorted((k, chunk.scale) for chunk in chunks for k in chunk.positions) == sorted(items)


def test_half_precision_changes_features_little(model: PixLocModel) -> None:
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    whole, half = extract(model, pixels), extract(model, pixels, half=True)
    for a, b, c, d in zip(whole.features, half.features, whole.confidences, half.confidences, strict=True):
        assert b.dtype == torch.float32
        assert float(torch.cosine_similarity(a, b, dim=1).min()) > 0.99
        assert float((c - d).abs().max()) < 0.03


def test_images_of_a_batch_have_the_features_they_have_alone(
    model: PixLocModel, scene: ReferenceScene, images: Path
) -> None:
    settings = view_settings(run_options("7scenes", from_poses=False, words=["multiscale=1"]), torch.device("cpu"))
    pictures = [np.asarray(cv2.imread(str(images / f"{k}.png"))[..., ::-1]) for k in range(3)]
    together = run.extract_views(model, scene, [0, 1, 2], pictures, settings)
    for k, picture in enumerate(pictures):
        (alone,) = run.extract_views(model, scene, [k], [picture], settings)
        assert torch.equal(alone.rows, together[k].rows)
        assert torch.allclose(alone.features[0].float(), together[k].features[0].float(), atol=2e-3, rtol=2e-3)
