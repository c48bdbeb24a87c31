# SPDX-License-Identifier: Apache-2.0
"""Training PixLoc's network: the published loss, samples that are right and repeatable, resume to the bit, guards."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError, WeightsError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference import unet
from kfloc_ros.pixloc.reference.cost import FeatureMap
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel, load_model
from kfloc_ros.pixloc.reference.two_view import TwoViewLevel, TwoViewResult
from kfloc_ros.training.loop import take_step, train, validate
from kfloc_ros.training.losses import gnnet_loss, two_view_loss
from kfloc_ros.training.pixloc_samples import PairRule, PairSamples, initial_pose, together
from kfloc_ros.training.pixloc_stages import GnNetStage, PixLocTrainConfig, TwoViewStage
from kfloc_ros.training.stage import BEST_FILE, Best, hold_out, mean_figures

WEIGHTS_FILE = "pixloc.safetensors"


@pytest.fixture(autouse=True)
def thin_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of VGG's channels: the same layers in a hundredth of the time."""
    monkeypatch.setattr(unet, "BLOCK_CHANNELS", (8, 16, 32, 32, 32))


CAMERA = CameraTensor.from_camera(Camera(400, 300, 100.0, 100.0, 199.5, 149.5))[None]
WALL = torch.tensor([[x, y, 1.0] for x in np.linspace(-1, 0.4, 6) for y in np.linspace(-1, 1, 4)])[None].double()
STRIDES = (1, 4, 16)


def pose(shift_px: float) -> Pose:
    """All points of the wall move by so many pixels."""
    return Pose.from_Rt(torch.eye(3).double(), torch.tensor([shift_px / 100, 0.0, 0.0]).double())[None]


def loss_of(*shifts_px: float, points: torch.Tensor = WALL) -> tuple[float, list[float], torch.Tensor]:
    """Loss where the levels, coarse to fine, end so many pixels beside the truth."""
    levels = [
        TwoViewLevel(2 - k, pose(0), pose(shift), torch.zeros(1, dtype=torch.bool), 1)
        for k, shift in enumerate(shifts_px)
    ]
    found = two_view_loss(TwoViewResult(tuple(levels)), pose(5), pose(0), CAMERA, points, STRIDES)
    return float(found.total), [float(e) for e in found.errors_px], found.usable


def test_the_loss_is_the_published_one() -> None:
    for squared, robust in ((1, 0.236), (4, 0.828), (100, 8.20), (2500, 48.0)):
        total, errors, usable = loss_of(np.sqrt(squared), 0.0, 0.0)
        assert errors[0] == pytest.approx(robust, rel=2e-3)
        assert bool(usable)
    assert total == pytest.approx(48.04 / 3, rel=1e-3)


def test_levels_count_only_after_the_one_before() -> None:
    good = loss_of(0.0, 10.0, 10.0)[0]
    assert good == pytest.approx(2 * 8.198 / 3, rel=1e-3)  # 8.2 px is less than 3 cells of 4
    assert loss_of(0.0, 30.0, 1.0)[0] == pytest.approx(28.07 / 3, rel=1e-3)  # 28 px is not
    assert loss_of(300.0, 0.0, 0.0)[0] == pytest.approx(50.0 / 3)  # clamped, and more than 3 cells of 16


def test_an_element_with_few_common_points_says_nothing() -> None:
    total, _, usable = loss_of(3.0, 3.0, 3.0, points=WALL[:, :9])
    assert total == 0.0 and not bool(usable)


def test_starts_lie_on_the_way_to_the_truth() -> None:
    T = make_pose(so3_exp([0.0, 0.3, 0.0]), [0.4, 0.0, 0.1])
    points, rng = WALL[0].numpy() * 3, np.random.default_rng(0)
    for _ in range(5):
        start = initial_pose(T, PairRule(), rng, CAMERA[0], points)
        share = rotation_angle_deg(start[:3, :3]) / rotation_angle_deg(T[:3, :3])
        assert 0.75 <= share <= 1.0
        assert np.allclose(start[:3, 3], share * T[:3, 3])
    assert np.allclose(initial_pose(T, PairRule(init="identity"), rng, CAMERA[0], points), np.eye(4))
    far = make_pose(so3_exp([0.0, 0.9, 0.0]), [0.4, 0.0, 0.1])
    start = initial_pose(far, PairRule(init="max_error"), rng, CAMERA[0], points)
    assert 0.0 < rotation_angle_deg(start[:3, :3]) < rotation_angle_deg(far[:3, :3])


RULE = PairRule(resize=160, crop=96, points=64, min_overlap=0.2)


def test_pairs_are_right_and_repeatable(room) -> None:
    samples = PairSamples(room, RULE, seed=3)
    one, again = samples[5], samples[5]
    assert torch.equal(one.reference, again.reference) and torch.equal(one.points, again.points)
    assert not torch.equal(one.points, samples[6].points)
    batch = together([samples[5], samples[6]])
    assert torch.equal(batch.query[:1], one.query) and batch.points.shape == (2, 64, 3)
    assert batch.reference.shape == (2, 3, 96, 96)
    # the same point has the same colour in both views
    uv_r = batch.camera_reference.world2image(batch.points)
    uv_q = batch.camera_query.world2image(batch.T_true.transform(batch.points))
    both = uv_r.valid & uv_q.valid
    assert bool(uv_r.valid.all()) and both.double().mean() > 0.2
    colours = [
        FeatureMap.from_maps(image.double()).sample(uv.points).values[both]
        for image, uv in ((batch.reference, uv_r), (batch.query, uv_q))
    ]
    assert float((colours[0] - colours[1]).abs().median()) < 0.05
    assert float((colours[0] - colours[1].roll(7, 0)).abs().median()) > 0.08


def test_a_source_without_overlap_is_named(room) -> None:
    with pytest.raises(SourceError, match="hardly a pair"):
        PairSamples(room, replace(RULE, max_distance_m=1e-6))[0]


def config(**changes: object) -> PixLocTrainConfig:
    small = {"steps": 4, "batch": 1, "resize": 160, "crop": 96, "points": 64, "log_every": 1,
             "snapshot_every": 2, "learning_rate": 1e-3, "min_overlap": 0.2, "workers": 1,
             "validation_share": 0.0}  # fmt: skip
    return PixLocTrainConfig(**{**small, **changes})  # type: ignore[arg-type]


def stage_of(kind: type, seed: int = 0) -> TwoViewStage | GnNetStage:
    torch.manual_seed(seed)
    found: TwoViewStage | GnNetStage = kind(PixLocModel(PixLocConfig(num_iters=3, pad=1)))
    return found


def run(kind: type, room: object, out: Path, **changes: object) -> PixLocModel:
    stage, c = stage_of(kind), config(**changes)
    split = hold_out(room, c.validation_share)  # type: ignore[arg-type]
    held_out = None if split.held_out is None else PairSamples(split.held_out, c.rule(), c.seed)
    samples = PairSamples(split.training, c.rule(), c.seed)
    train(stage, samples, c, out, torch.device("cpu"), validation=held_out)
    return stage.model


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [TwoViewStage, GnNetStage])
def test_a_training_that_was_stopped_arrives_at_the_same_weights(room, tmp_path: Path, kind: type) -> None:
    whole = run(kind, room, tmp_path / "whole", steps=3)
    run(kind, room, tmp_path / "parts", steps=2)
    parts = run(kind, room, tmp_path / "parts", steps=3)
    start = stage_of(kind).model.state_dict()
    moved = 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        moved += not torch.equal(value, start[name])
    assert moved > 40
    assert torch.equal(load_model(tmp_path / "whole" / WEIGHTS_FILE).state_dict()["extractor.encoder.0.0.bias"],
                       whole.state_dict()["extractor.encoder.0.0.bias"])  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["loss"]) for line in lines)
    if kind is TwoViewStage:
        name = "optimizer.2.dampingnet.const"
        change = (whole.state_dict()[name] - start[name]).abs().max()
        assert 0.05 < float(change) < 0.5  # three steps of 100 times the learning rate
        assert {"reprojection_px/init", "reprojection_px/0", "reprojection_px/2", "usable"} <= lines[0].keys()
        with pytest.raises(WeightsError, match="batch"):
            run(kind, room, tmp_path / "parts", batch=2)


@pytest.mark.thorough
def test_the_held_out_part_is_looked_at_and_the_best_is_kept(room, tmp_path: Path) -> None:
    room = type(room)(12)  # frames are rendered when asked for their pose
    split = hold_out(room, 0.34)
    assert split.held_out is not None
    assert set(room.indices()) == {*split.training.indices(), *split.held_out.indices()}
    assert max(split.training.indices()) < min(split.held_out.indices())
    assert hold_out(room, 0.0).held_out is None
    words = {"validation_share": 0.34, "validation_pairs": 2, "validate_every": 2}
    run(TwoViewStage, room, tmp_path / "whole", steps=3, **words)
    run(TwoViewStage, room, tmp_path / "parts", steps=2, **words)
    model = run(TwoViewStage, room, tmp_path / "parts", steps=3, **words)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]  # what was looked at in between changed nothing
    looks = [line for line in map(json.loads, logs[0].splitlines()) if "validation/loss" in line]
    assert [line["step"] for line in looks] == [0, 2, 3]
    assert {"validation/reprojection_px/0", "validation/usable"} <= looks[0].keys()
    best = min(looks, key=lambda line: line["validation/loss"])
    assert json.loads((tmp_path / "parts" / BEST_FILE).read_text())["step"] == best["step"]
    kept = load_model(tmp_path / "parts" / "pixloc_best.safetensors")
    stage = TwoViewStage(kept)
    samples = PairSamples(split.held_out, config().rule(), 0)
    schedule = config(validation_pairs=2).schedule(stage)
    with ThreadPoolExecutor(1) as workers:
        again = validate(stage, samples, schedule, torch.device("cpu"), workers)
    assert again["validation/loss"] == pytest.approx(best["validation/loss"])
    assert model.training  # looking at the held-out part leaves the network as it was


def test_only_a_lower_loss_is_the_best(tmp_path: Path) -> None:
    best, weights = Best.of(tmp_path), tmp_path / "w.safetensors"
    for loss, kept in ((2.0, True), (2.0, False), (float("nan"), False), (1.0, True), (1.5, False)):
        step = int(10 * loss) if loss == loss else 0
        assert best.offer(loss, step, {weights: "w"}, lambda path, name: path.write_text(name) and None) is kept
    assert weights.read_text() == "w"
    assert (Best.of(tmp_path).loss, Best.of(tmp_path).step) == (1.0, 10)
    (tmp_path / BEST_FILE).write_text("no JSON")
    with pytest.raises(WeightsError, match="damaged"):
        Best.of(tmp_path)
    means = mean_figures([{"a": 1.0, "b": float("nan")}, {"a": 3.0}])
    assert means["validation/a"] == 2.0 and np.isnan(means["validation/b"])


def test_a_step_is_clipped_before_it_is_taken_and_left_out_if_not_finite() -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    sgd = torch.optim.SGD([p], lr=1.0)
    assert take_step((p * torch.tensor([100.0, 0.5])).sum(), sgd, clip=1.0)
    assert torch.equal(p.detach(), torch.tensor([1.0, 2.5]))
    assert not take_step((p * torch.tensor([float("nan"), 1.0])).sum(), sgd, clip=1.0)
    zero = torch.nn.Parameter(torch.zeros(1))
    assert not take_step(zero.sqrt().sum() + 1, torch.optim.SGD([zero], lr=1.0), clip=1.0)  # its gradient is infinite
    assert float(zero.detach()) == 0.0
    assert torch.equal(p.detach(), torch.tensor([1.0, 2.5]))


def test_gn_net_prefers_features_that_tell_places_apart() -> None:
    v, u = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    telling = torch.stack([u / 10, v / 10, (u * v) / 400])[None]
    blurred = telling * 0.01
    uv = torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([30.0, 20.0]) + 5
    mask = torch.ones(1, 50, dtype=torch.bool)

    def loss(maps: torch.Tensor, shift: float = 0.0):
        found = FeatureMap.from_maps(maps)
        features = found.sample(uv + shift).values
        return gnnet_loss(found, features, uv, mask, torch.Generator().manual_seed(0))

    assert float(loss(telling).gauss_newton) < float(loss(blurred).gauss_newton)
    assert float(loss(telling).gauss_newton) < float(loss(telling, shift=8.0).gauss_newton)
    assert float(loss(telling).contrastive) < float(loss(blurred).contrastive)


@pytest.mark.thorough
def test_from_the_command_line(tmp_path: Path, room, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    frames = tmp_path / "seq-01"
    frames.mkdir()
    for k in range(3):  # 7-Scenes' own layout, but for its camera, which does not matter to two steps
        frame = room[4 * k]
        cv2.imwrite(str(frames / f"frame-{k:06d}.color.png"), cv2.resize(frame.image, (640, 480)))
        depth = (cv2.resize(frame.depth_m, (640, 480)) * 1000).astype(np.uint16)
        cv2.imwrite(str(frames / f"frame-{k:06d}.depth.png"), depth)
        np.savetxt(frames / f"frame-{k:06d}.pose.txt", frame.T_map_camera)
    words = ["steps=1", "batch=1", "resize=128", "crop=96", "points=32", "min_overlap=0.1"]
    base = ["train", "gnnet", f"7scenes:{frames}", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*base, *words]) == 0
    assert "step 1 of 1 (finished)" in capsys.readouterr().out
    weights = str(tmp_path / "out" / WEIGHTS_FILE)
    base = ["train", "pixloc", f"7scenes:{frames}", "--out", str(tmp_path / "tuned"), "--weights", weights]
    assert main([*base, "--device", "cpu", "iterations=2", *words]) == 0
    assert load_model(tmp_path / "tuned" / WEIGHTS_FILE).config.num_iters == 2
    assert "no validation" in capsys.readouterr().out
    looked = ["--validation", f"7scenes:{frames}", "validation_pairs=1"]
    base = ["train", "gnnet", f"7scenes:{frames}", "--out", str(tmp_path / "looked"), "--device", "cpu"]
    assert main([*base, *looked, *words]) == 0
    assert load_model(tmp_path / "looked" / "pixloc_best.safetensors")
    assert main([*base, "learning_rat=1"]) == 2
    assert "Did you mean 'learning_rate'" in capsys.readouterr().err
