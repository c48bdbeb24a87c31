# SPDX-License-Identifier: Apache-2.0
"""Training of the reference networks: samples agree with geometry, every stage learns, resuming is exact."""

from __future__ import annotations

import gc
import itertools
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from poster import Poster

from kfloc_ros.cli import main as cli
from kfloc_ros.config import build_config, parse_overrides
from kfloc_ros.datasets.kfnet import write_kfnet_folder
from kfloc_ros.datasets.scenes import find_scene
from kfloc_ros.errors import ConfigError, SourceError, WeightsError
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import load_oflownet, load_scoordnet
from kfloc_ros.training.kfnet_config import TrainConfig, scene_options
from kfloc_ros.training.kfnet_samples import Group, Samples, consecutive
from kfloc_ros.training.kfnet_stages import (
    FlowStage,
    JointStage,
    KfnetStage,
    MeasurementStage,
    StartWeights,
    samples_of,
)
from kfloc_ros.training.kfnet_stages import stage_of as stage_of_start
from kfloc_ros.training.loop import TrainProgress, train
from kfloc_ros.types import Frame

CPU = torch.device("cpu")


@pytest.mark.parametrize("augment", ["none", "rotate", "full"])
def test_points_stay_on_the_surface_and_agree_with_the_picture(augment: str) -> None:
    """The picture's colour at every true point is the image's, whatever was done to the image."""
    source = Poster()
    samples = Samples(source, 2, augment=augment, seed=3)
    for number in range(4):
        group = samples[number]
        assert group.images.shape == (2, 3, 96, 128) and group.points.shape == (2, 3, 12, 16)
        x, y, z = group.points[0][:, group.mask[0]].numpy()
        assert np.allclose(z, 2.0, atol=1e-4)
        colours = cv2.remap(
            source._picture, (x * 100 + 250).astype(np.float32), (y * 100 + 200).astype(np.float32), cv2.INTER_LINEAR
        ).reshape(-1, 3)
        seen = group.small_images[0][:, group.mask[0]].numpy().T
        correlation = np.corrcoef(colours.astype(float).ravel(), seen.ravel())[0, 1]
        assert correlation > 0.97


def test_order_covers_every_group_and_depends_on_the_number_alone() -> None:
    samples = Samples(Poster(), 2, both_directions=True, augment="full", seed=1)
    assert len(samples) == 12  # 3 pairs in each of two runs, in both directions: none across the jump
    first = {tuple(samples._groups[i]) for i in np.random.default_rng((1, 1, 0)).permutation(12)}
    assert first == set(map(tuple, samples._groups))
    again = Samples(Poster(), 2, both_directions=True, augment="full", seed=1)
    assert torch.equal(samples[17].images, again[17].images)
    assert not torch.equal(samples[17].images, samples[18].images)
    with pytest.raises(SourceError, match="5 consecutive"):
        Samples(Poster(), 5)


def test_groups_take_every_so_many_frames_and_cross_no_gap() -> None:
    poster = Poster()  # indices 0 to 3 and 50 to 53
    assert consecutive(poster, 2, spacing=2) == [range(0, 3, 2), range(1, 4, 2), range(4, 7, 2), range(5, 8, 2)]
    assert consecutive(poster, 2, spacing=3) == [range(0, 4, 3), range(4, 8, 3)]
    assert consecutive(poster, 3, spacing=2) == []
    assert len(consecutive(poster, 2, max_step=47)) == 7
    assert len(Samples(Poster(), 2, both_directions=True, spacing=3)) == 4


class Counted(Poster):
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, position: int) -> Frame:
        self.reads += 1
        return super().__getitem__(position)


def test_frames_are_read_once_as_far_as_memory_is_given() -> None:
    """What is remembered does not change the samples; three frames of 128x96 with depth fit into 260 kB."""
    plain, all_kept, few_kept = Counted(), Counted(), Counted()
    kept = Samples(all_kept, 2, augment="full", remembered_bytes=10_000_000)
    few = Samples(few_kept, 2, augment="full", remembered_bytes=260_000)
    none = Samples(plain, 2, augment="full")
    for number in range(12):
        a, b, c = kept[number], few[number], none[number]
        assert torch.equal(a.images, c.images) and torch.equal(a.points, c.points) and torch.equal(b.images, c.images)
    assert all_kept.reads == 8 and plain.reads == 24
    assert 8 < few_kept.reads < 24


@pytest.mark.parametrize(
    ("given_bytes", "least", "most"), [(0, 0, 30_000), (260_000, 230_000, 290_000), (10_000_000, 680_000, 740_000)]
)
def test_no_more_memory_is_taken_for_frames_than_is_given(given_bytes: int, least: int, most: int) -> None:
    """Eight frames of 86 kB."""
    samples = Samples(Poster(), 2, augment="full", remembered_bytes=given_bytes)
    Samples(Poster(), 2, augment="full")[0]  # what is loaded at first use
    tracemalloc.start()
    try:
        for number in range(12):
            samples[number]
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert least <= taken <= most


def stage_of(name: str) -> KfnetStage:
    torch.manual_seed(0)
    frame = Samples(Poster(), 1).network_frame()
    scoordnet, oflownet = ReferenceSCoordNet(width=1 / 16, frame=frame), ReferenceOFlowNet()
    if name == "scoordnet":
        return MeasurementStage(scoordnet)
    return FlowStage(oflownet) if name == "oflownet" else JointStage(scoordnet, oflownet)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "steps", "rate"), [("scoordnet", 25, 1e-3), ("oflownet", 12, 1e-3), ("kfnet", 6, 1e-3)]
)
def test_every_stage_learns(name: str, steps: int, rate: float, tmp_path: Path) -> None:
    stage = stage_of(name)
    samples = Samples(Poster(), stage.group_length, augment="none")
    config = TrainConfig(steps=steps, halving_steps=1000, learning_rate=rate, log_every=1, batch=1, workers=1)
    result = train(stage, samples, config, tmp_path, CPU)
    assert result.stopped_by == "finished"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == steps
    assert np.mean(losses[-3:]) < np.mean(losses[:2])
    assert all(p.grad is not None for m in stage.modules().values() for p in m.parameters())


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["scoordnet", "oflownet", "kfnet"])
def test_resuming_is_exact(name: str, tmp_path: Path) -> None:
    """Four steps at once, and two with a stop in between and fresh networks, give the same weights to the bit."""

    def run(out: Path, steps: int) -> None:
        stage = stage_of(name)
        samples = Samples(Poster(), stage.group_length, augment=stage.augment, seed=5)
        config = TrainConfig(steps=steps, halving_steps=10, learning_rate=1e-3, seed=5, batch=1, workers=2)
        train(stage, samples, config, out, CPU)

    run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    run(tmp_path / "parts", 4)
    loaders = {"scoordnet": load_scoordnet, "oflownet": load_oflownet}
    for network, load in loaders.items():
        if name in (network, "kfnet"):
            whole, parts = (load(tmp_path / d / f"{network}.safetensors") for d in ("whole", "parts"))
            assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert len(list((tmp_path / "parts").glob("checkpoint-*"))) == 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing is written any more."""


def test_what_was_killed_after_a_checkpoint_arrives_at_the_same_weights(tmp_path: Path) -> None:
    """Killed at step 3 with a checkpoint of step 2: step 3 is made again, and logged once."""

    def run(out: Path, killed_at: int) -> None:
        stage = stage_of("scoordnet")
        samples = Samples(Poster(), 1, augment="full", seed=5)
        config = TrainConfig(steps=4, halving_steps=10, learning_rate=1e-3, batch=1, snapshot_every=2, log_every=1)

        def watch(progress: TrainProgress) -> None:
            if progress.step == killed_at:
                raise Killed

        train(stage, samples, config, out, CPU, on_progress=watch)

    run(tmp_path / "whole", 0)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 3)
    log = tmp_path / "killed" / "log.jsonl"
    with log.open("a") as stream:
        stream.write('{"step": 4, "lo')  # the line that the kill cut short
    run(tmp_path / "killed", 0)
    whole, killed = (load_scoordnet(tmp_path / d / "scoordnet.safetensors") for d in ("whole", "killed"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), killed.parameters(), strict=True))
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_another_configuration_or_damage_is_refused(tmp_path: Path) -> None:
    samples = Samples(Poster(), 1)
    config = TrainConfig(steps=1, batch=1)
    train(stage_of("scoordnet"), samples, config, tmp_path, CPU)
    with pytest.raises(WeightsError, match="seed=0"):
        train(stage_of("scoordnet"), samples, TrainConfig(steps=2, batch=1, seed=1), tmp_path, CPU)
    state = json.loads((tmp_path / "state.json").read_text())
    del state["config"]["spacing"]  # as an installation from before there was that option left it
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert train(stage_of("scoordnet"), samples, TrainConfig(steps=2, batch=1), tmp_path, CPU).step == 2
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="damaged"):
        train(stage_of("scoordnet"), samples, config, tmp_path, CPU)


def test_time_budget_ends_with_a_checkpoint(tmp_path: Path) -> None:
    result = train(stage_of("scoordnet"), Samples(Poster(), 1), TrainConfig(batch=1), tmp_path, CPU, time_budget_s=0.0)
    assert result.stopped_by == "time budget"
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 0


def test_published_schedule() -> None:
    config = TrainConfig()
    schedules = [config.schedule(stage_of(name)) for name in ("scoordnet", "kfnet")]
    assert [(schedule.first, schedule.last) for schedule in schedules] == [(0, 500_000), (400_000, 500_000)]
    for step, rate in ((0, 1e-4), (400_000, 6.25e-6), (500_000, 3.125e-6)):
        assert schedules[0].rates(step) == pytest.approx((rate,))
    assert (config.spacing, config.max_step, config.truncation, config.augment) == (1, 1, True, "stage")
    assert (config.weight_decay, config.width, config.image_width, config.image_height) == (1e-4, 1.0, 0, 0)
    assert [(s.batch, s.group_length, s.augment) for s in (MeasurementStage, FlowStage, JointStage)] == [
        (4, 1, "full"),
        (1, 2, "rotate"),
        (1, 4, "rotate"),
    ]
    rates = [config.rates(step)[0] for step in range(0, 500_001, 1000)]
    assert all(b < a for a, b in itertools.pairwise(rates))


def test_overrides_are_typed_and_named() -> None:
    config = build_config(
        TrainConfig, parse_overrides(TrainConfig, ["halving_steps=30_000", "fix_flow=true", "width=0.25"])
    )
    assert (config.halving_steps, config.fix_flow, config.width) == (30_000, True, 0.25)
    for words, message in ((["steps"], "key=value"), (["steps=ten"], "int"), (["stepz=3"], "'steps'")):
        with pytest.raises(ConfigError, match=message):
            build_config(TrainConfig, parse_overrides(TrainConfig, words))


def test_commands_of_all_three_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list(write_kfnet_folder(Poster(), tmp_path / "poster"))
    source = f"kfnet:{tmp_path / 'poster'}"
    common = ["steps=1", "batch=1", "width=0.05"]
    for stage in ("scoordnet", "oflownet"):
        assert cli.main(["train", stage, source, common[0], "--out", str(tmp_path / stage), *common[1:]]) == 0
    weights = [str(tmp_path / name / f"{name}.safetensors") for name in ("scoordnet", "oflownet")]
    starts = ["--scoordnet", weights[0], "--oflownet", weights[1]]
    assert cli.main(["train", "kfnet", source, *common, *starts, "--out", str(tmp_path / "joint")]) == 0
    assert capsys.readouterr().out.count("step 1 of 1 (finished)") == 3
    again = ["train", "kfnet", source, *common, "image_width=64", *starts, "--out", str(tmp_path / "smaller")]
    assert cli.main(again) == 2
    assert "image_width=128 image_height=96" in capsys.readouterr().err
    trained = load_scoordnet(tmp_path / "joint" / "scoordnet.safetensors")
    assert trained.image_size == (128, 96)
    transform = np.loadtxt(tmp_path / "poster" / "transform.txt")
    assert np.allclose(trained.frame.T_network_map, transform)
    assert np.allclose(inverse_pose(transform)[:3, :3] @ transform[:3, :3], np.eye(3), atol=1e-6)


def test_a_scene_brings_its_schedule_its_scale_and_its_size() -> None:
    fire, shop = (TrainConfig(**scene_options(find_scene(name), "scoordnet")) for name in ("fire", "ShopFacade"))
    joint = stage_of("kfnet")
    assert [(s.first, s.last) for s in (fire.schedule(joint), shop.schedule(joint))] == [
        (120_000, 150_000),
        (400_000, 600_000),
    ]
    assert (shop.scale, shop.image_width, shop.image_height) == (0.1, 848, 480)
    flow = TrainConfig(**scene_options(find_scene("DeepLoc"), "oflownet"))  # one network for all scenes
    assert (flow.halving_steps, flow.halvings, flow.scale, flow.image_width) == (100_000, 5, 0.02, 864)
    whole = replace(fire, reset_step=True).schedule(joint)
    assert (whole.first, whole.last) == (0, 150_000)


class FarPoster(Poster):
    """The same pictures of a scene that is so many times as large."""

    def __init__(self, times: float) -> None:
        super().__init__()
        self._times = times

    def __getitem__(self, position: int) -> Frame:
        frame = super().__getitem__(position)
        assert frame.T_map_camera is not None and frame.depth_m is not None
        T = frame.T_map_camera.copy()
        T[:3, 3] *= self._times
        return replace(frame, depth_m=frame.depth_m * np.float32(self._times), T_map_camera=T)


@pytest.mark.parametrize("name", ["scoordnet", "oflownet", "kfnet"])
def test_a_large_scene_is_learned_as_a_small_one_at_its_scale(name: str, tmp_path: Path) -> None:
    """Fifty times the size at a scale of 1/50: the same losses, and errors fifty times as large, in metres."""
    figures = []
    for times in (1.0, 50.0):
        config = TrainConfig(scale=1 / times, width=1 / 16, seed=2, image_width=128)
        samples = samples_of(name, FarPoster(times), config)
        start = StartWeights()
        if name == "kfnet":
            start = StartWeights(*(tmp_path / f"{times}-{n}.safetensors" for n in ("scoordnet", "oflownet")))
            for n in ("scoordnet", "oflownet"):
                stage = stage_of_start(n, samples_of(n, FarPoster(times), config), config, StartWeights())
                stage.write(n, tmp_path / f"{times}-{n}.safetensors", "")
        stage = stage_of_start(name, samples, config, start)
        figures.append(stage.loss([samples[0]], torch.Generator().manual_seed(0)).figures)
    for key, value in figures[0].items():
        expected = value * (50 if key.endswith("error_m") else 1)
        if not key.endswith("within_5cm"):
            assert figures[1][key] == pytest.approx(expected, rel=2e-3, abs=1e-6), key


class StandingStill(torch.nn.Module):
    """Stands for an OFlowNet that says, and is sure, that nothing has moved."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def flow(self, now: torch.Tensor, before: torch.Tensor) -> Flow:
        cells = torch.zeros(12, 16)
        return Flow(torch.zeros(2, 12, 16), cells, torch.ones(12, 16, dtype=torch.bool), cells)


def test_noise_on_what_is_warped_is_told_to_the_filter() -> None:
    """Between two equal frames the error is the noise, 5 to 10 mm an axis, and the likelihood knows its size."""
    still = replace_frames(Samples(Poster(), 2)[0])
    stage = FlowStage(StandingStill(), None, noise=True)  # type: ignore[arg-type]
    seen = [stage.loss([still], torch.Generator().manual_seed(k)).figures for k in (1, 1, 2, 3, 4)]
    assert seen[0] == seen[1] != seen[2]
    for figures in seen:
        sigma = figures["median_error_m"] / 1.538  # the median length of a normal vector
        assert 0.0045 < sigma < 0.0105
        assert figures["nll"] == pytest.approx(3 * np.log(sigma) + 1.5, abs=0.5)
    silent = FlowStage(StandingStill(), None)  # type: ignore[arg-type]
    assert silent.loss([still], torch.Generator()).figures["median_error_m"] < 1e-6


def replace_frames(group: Group) -> Group:
    """The first of the frames twice."""
    return Group(*(torch.stack([part[0], part[0]]) for part in (group.images, group.points, group.mask)))


def test_a_training_is_finetuned_with_its_steps_or_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list(write_kfnet_folder(Poster(), tmp_path / "poster"))
    base = ["train", "oflownet", f"kfnet:{tmp_path / 'poster'}", "batch=1", "--device", "cpu", "--out"]
    assert cli.main([*base, str(tmp_path / "first"), "steps=2"]) == 0
    first = load_oflownet(tmp_path / "first" / "oflownet.safetensors")
    finetune = ["--finetune", str(tmp_path / "first"), "--noise", "log_every=1"]
    assert cli.main([*base, str(tmp_path / "on"), *finetune, "steps=3"]) == 0
    assert cli.main([*base, str(tmp_path / "anew"), *finetune, "steps=1", "--reset-step"]) == 0
    for name, steps in (("on", [3]), ("anew", [1])):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == steps
        tuned = load_oflownet(tmp_path / name / "oflownet.safetensors")
        change = max(
            float((a - b).detach().abs().max()) for a, b in zip(first.parameters(), tuned.parameters(), strict=True)
        )
        assert 0 < change < 1e-3  # a step of 1e-4 from the first's weights
    assert json.loads((tmp_path / "on" / "state.json").read_text())["config"]["noise"] is True
    assert cli.main([*base, str(tmp_path / "other"), "--finetune", str(tmp_path / "none")]) == 2
    assert cli.main([*base, str(tmp_path / "other"), "--reset-step"]) == 2
    assert "--reset-step requires --finetune" in capsys.readouterr().err
