# SPDX-License-Identifier: Apache-2.0
"""Alignment heads: new ones change nothing, points and maps are treated alike, files are read with care."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kfloc_ros.errors import ConfigError, WeightsError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.refine import RefineStage
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.heads import LEVELS, PLAIN_DAMPING, AlignmentHeads, HeadsConfig, load_heads, save_heads
from kfloc_ros.pixloc.optimizer import LAMBDA_START
from kfloc_ros.pixloc.references import ReferenceViews, extract_reference_points
from kfloc_ros.pixloc.refiner import Refiner, RefinerSettings


def shaken(seed: int = 0) -> AlignmentHeads:
    """Heads that do change something."""
    torch.manual_seed(seed)
    heads = AlignmentHeads()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return heads.eval()


def refiner_of(room, heads: AlignmentHeads | None, **settings: float) -> Refiner:
    backbone, views = Backbone(), []
    for k in (0, 4, 8):
        frame = room[k]
        features = backbone.extract(frame.image)
        views.append(extract_reference_points(features, frame.depth_m, frame.camera, frame.T_map_camera, 200))
    poses = np.stack([room[k].T_map_camera for k in (0, 4, 8)])
    return Refiner(ReferenceViews((0, 4, 8), poses, tuple(views)), room.camera, RefinerSettings(**settings), heads)


def test_new_heads_align_as_the_plain_refiner_does(room) -> None:
    assert PLAIN_DAMPING == LAMBDA_START
    frame = room[2]
    features = Backbone().extract(frame.image)
    start = frame.T_map_camera @ make_pose(so3_exp([0.02, -0.02, 0.01]), [0.03, 0.02, -0.02])
    plain, same, other = (
        refiner_of(room, heads).align(features, [start]) for heads in (None, AlignmentHeads().eval(), shaken())
    )
    assert plain.success and same.success
    assert np.allclose(plain.T_map_camera, same.T_map_camera, atol=1e-5)
    assert plain.final_cost == pytest.approx(same.final_cost, rel=1e-3)
    assert other.final_cost != pytest.approx(plain.final_cost, rel=1e-2)
    assert np.linalg.norm((inverse_pose(frame.T_map_camera) @ same.T_map_camera)[:3, 3]) < 0.02


def test_the_limit_of_the_cost_follows_the_heads(room) -> None:
    heads, features = AlignmentHeads().eval(), Backbone().extract(room[2].image)
    cost = refiner_of(room, heads).align(features, [room[2].T_map_camera]).final_cost
    assert refiner_of(room, heads, max_cost=1.1 * cost).align(features, [room[2].T_map_camera]).success
    heads.cost_ratio.fill_(0.5)
    found = refiner_of(room, heads, max_cost=1.1 * cost).align(features, [room[2].T_map_camera])
    assert not found.success and "does not look like the map" in found.reason


def test_points_and_maps_are_treated_alike() -> None:
    heads = shaken()
    coarse = F.normalize(torch.randn(2, 64, 1, 1), dim=1).expand(2, 64, 4, 5)
    fine = F.normalize(torch.randn(2, 24, 8, 10), dim=1)
    with torch.no_grad():
        maps = heads.of_maps(coarse, fine)
        points = heads.of_points(coarse[:, :, 1, 2], fine[:, :, 3, 4])
    assert torch.allclose(maps[0].features[:, 1, 2], points[0].features, atol=1e-5)
    assert torch.allclose(maps[1].features[:, 3, 4], points[1].features, atol=1e-5)
    assert torch.allclose(maps[1].trust[:, 3, 4], points[1].trust, atol=1e-5)
    for level in (*maps, *points):
        assert torch.allclose(level.features.norm(dim=-1), torch.ones(()), atol=1e-5)
        assert bool(((level.trust > 0) & (level.trust < 2)).all())


def test_files_are_read_as_written_and_checked(tmp_path: Path) -> None:
    heads, path = shaken(), tmp_path / "heads.safetensors"
    save_heads(path, heads, origin="a test")
    assert path.stat().st_size < 4e6
    found = load_heads(path)
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in heads.state_dict().items())
    assert not found.training
    assert {level: heads.damping_of(level).shape for level in LEVELS} == {"coarse": (6,), "fine": (6,)}
    with pytest.raises(WeightsError, match="no alignment heads"):
        load_heads(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_heads(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other", {"format": "kfloc_pixloc"})
    with pytest.raises(WeightsError, match="does not hold alignment heads"):
        load_heads(tmp_path / "other")
    good = {"format": "kfloc_heads", "version": "1", "config": '{"damping_log10_range": [-6, 3]}'}
    for change, message in (
        ({"version": "9"}, "version 9"),
        ({"config": "{"}, "damaged"),
        ({"config": '{"damping_log10_range": [-6, 3], "depth": 3}'}, "damaged"),
        ({"config": '{"damping_log10_range": [-6, 3], "coarse_width": 1000000}'}, "damaged"),
    ):
        save_file(heads.state_dict(), tmp_path / "bad", {**good, **change})
        with pytest.raises(WeightsError, match=message):
            load_heads(tmp_path / "bad")
    broken = {**heads.state_dict(), "cost_ratio": torch.tensor(float("nan"))}
    save_file(broken, tmp_path / "bad", good)
    with pytest.raises(WeightsError, match="not finite"):
        load_heads(tmp_path / "bad")
    with pytest.raises(ConfigError):
        HeadsConfig(fine_width=-1)


def test_the_localizer_takes_heads_from_a_file(room_map: Path, tmp_path: Path) -> None:
    scene_map = SceneMap.load(room_map)
    save_heads(tmp_path / "heads.safetensors", shaken())
    with_heads = RefineStage(scene_map, LocalizerConfig(alignment_heads=str(tmp_path / "heads.safetensors")))
    assert with_heads.refiner.heads is not None
    assert RefineStage(scene_map, LocalizerConfig()).refiner.heads is None
    shipped = RefineStage(scene_map, LocalizerConfig(alignment_heads="shipped")).refiner.heads
    assert shipped is not None and shipped.fine is None  # so that what a map is calibrated with stays right
    with pytest.raises(WeightsError, match="no alignment heads"):
        RefineStage(scene_map, LocalizerConfig(alignment_heads=str(tmp_path / "none")))


def test_without_a_fine_head_the_fine_level_stays_as_it_is(tmp_path: Path) -> None:
    heads = AlignmentHeads(HeadsConfig(fine_width=0))
    coarse, fine = F.normalize(torch.randn(1, 64, 4, 5), dim=1), F.normalize(torch.randn(1, 24, 8, 10), dim=1)
    maps, points = heads.of_maps(coarse, fine), heads.of_points(coarse[:, :, 1, 2], fine[:, :, 3, 4])
    assert torch.equal(maps[1].features.permute(0, 3, 1, 2), fine) and bool((maps[1].trust == 1).all())
    assert torch.equal(points[1].features, fine[:, :, 3, 4]) and points[1].trust.shape == (1,)
    save_heads(tmp_path / "heads", heads)
    assert load_heads(tmp_path / "heads").fine is None
