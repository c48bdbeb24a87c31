# SPDX-License-Identifier: Apache-2.0
"""Training alignment heads: simulated pairs are right, new heads align as the plain refiner does, training helps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.cli.main import main
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.pixloc.heads import LEVELS, AlignmentHeads, load_heads
from kfloc_ros.training.heads_stage import HeadsStage, HeadsTrainConfig
from kfloc_ros.training.heads_views import HeadPairs, SimulatedPairs, ViewRule, random_light, weathered
from kfloc_ros.training.loop import train as train_stage
from kfloc_ros.training.start_errors import StartErrors

pytest.importorskip("embreex", reason="the simulator's ray caster is not installed")

SMALL = Camera(192, 160, 157.5, 157.5, 95.5, 79.5)
RULE = ViewRule(rooms=1, places=2, views=3, points=80, spread_m=0.08, spread_deg=4, camera=SMALL, texels_per_m=80.0)


@pytest.fixture(scope="module")
def pairs() -> SimulatedPairs:
    return SimulatedPairs(RULE, first_room=3, seed=1)


def test_pairs_are_right_and_repeatable(pairs: SimulatedPairs) -> None:
    batch, again = HeadPairs.together([pairs[k] for k in (4, 5, 6)]), pairs[5]
    assert batch.coarse.shape == (3, 64, 20, 24) and batch.fine.shape == (3, 24, 40, 48)
    assert torch.equal(batch.points[1], again.points[0]) and torch.equal(batch.T_init.data[1], again.T_init.data[0])
    # features of the same point are more alike in the two views than those of different points
    uv, seen = batch.camera.scale(1 / 8).world2image(batch.T_true.transform(batch.points))
    assert float(seen.double().mean()) > 0.4
    grid = 2 * (uv + 0.5) / torch.tensor([24.0, 20.0]).double() - 1
    found = torch.nn.functional.grid_sample(batch.coarse, grid[:, None].float(), align_corners=False)[:, :, 0].mT
    alike = (found * batch.point_coarse).sum(-1)[seen].mean()
    other = (found * batch.point_coarse.roll(7, 1)).sum(-1)[seen].mean()
    assert float(alike) > float(other) + 0.2


def test_starts_are_those_of_hands_robots_and_coarse_poses() -> None:
    starts, rng = StartErrors(), np.random.default_rng(0)
    E = np.stack([starts.draw(rng) for _ in range(300)])
    moved_m = np.linalg.norm(E[:, :3, 3], axis=1)
    turned_deg = np.array([rotation_angle_deg(T[:3, :3]) for T in E])
    assert 0.02 < np.median(moved_m) < 0.1 and moved_m.max() < 0.5
    assert 0.5 < np.median(turned_deg) < 5.0 and turned_deg.max() < 25.0
    robots = np.stack([starts._robot(rng) for _ in range(200)])
    assert np.abs(robots[:, 1, 3]).max() < 0.02 < np.abs(robots[:, 2, 3]).max()  # ahead, never up


def test_light_and_pictures_differ_but_are_never_black() -> None:
    rng = np.random.default_rng(2)
    lights = np.stack([random_light(rng).matrix() for _ in range(50)])
    assert (lights[..., 3] > 0.05).all() and (lights[..., 0] == 0).any() and lights[..., 0].max() > 0.5
    image = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    worse = [weathered(image, rng) for _ in range(10)]
    assert all(w.shape == image.shape and w.mean() > 20 for w in worse)
    assert len({w.tobytes() for w in worse}) > 5


def config(**changes: object) -> HeadsTrainConfig:
    small = {"steps": 3, "batch": 2, "iterations": 3, "validation_pairs": 2, "log_every": 1, "snapshot_every": 2}
    return HeadsTrainConfig(**{**small, **changes})  # type: ignore[arg-type]


def train(pairs: SimulatedPairs, out: Path, **changes: object) -> AlignmentHeads:
    c = config(**changes)
    torch.manual_seed(0)
    stage = HeadsStage(AlignmentHeads(), iterations=c.iterations)
    train_stage(stage, pairs, c, out, torch.device("cpu"), validation=pairs)
    return stage.model


def test_a_training_that_was_stopped_arrives_at_the_same_heads(pairs: SimulatedPairs, tmp_path: Path) -> None:
    whole = train(pairs, tmp_path / "whole")
    train(pairs, tmp_path / "parts", steps=2)
    parts = train(pairs, tmp_path / "parts")
    torch.manual_seed(0)
    start = AlignmentHeads().state_dict()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
        assert not torch.equal(value, start[name]), name
    found = load_heads(tmp_path / "whole" / "heads.safetensors").state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())
    assert load_heads(tmp_path / "whole" / "heads_best.safetensors").cost_ratio > 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert {"error_px/fine", "within_1cm", "log10_damping_coarse/ty"} <= lines[-1].keys() | lines[-2].keys()
    for level in LEVELS:
        assert lines[0][f"validation/log10_damping_{level}/tx"] == pytest.approx(-3.0, abs=1e-4)


def test_steps_lower_the_loss_of_their_own_pairs(pairs: SimulatedPairs) -> None:
    torch.manual_seed(0)
    stage, batch = HeadsStage(AlignmentHeads(), iterations=4), [pairs[k] for k in range(4)]
    groups = zip(stage.groups(), (3e-3, 3e-2), strict=True)
    optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups])
    losses = []
    for _ in range(8):
        total = stage.loss(batch, torch.Generator()).total
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(total.detach()))
    assert min(losses[-3:]) < 0.9 * losses[0]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rooms=1", "places=1", "views=2", "steps=1", "batch=1", "iterations=2", "validation_pairs=1"]
    assert main(["train", "heads", "--out", str(tmp_path / "out"), "--device", "cpu", *words]) == 0
    assert "step 1 of 1 (finished)" in capsys.readouterr().out
    assert load_heads(tmp_path / "out" / "heads_best.safetensors").fine is None
    again = ["train", "heads", "--heads", str(tmp_path / "out" / "heads.safetensors"), "--out", str(tmp_path / "more")]
    assert main([*again, "--device", "cpu", *words]) == 0
