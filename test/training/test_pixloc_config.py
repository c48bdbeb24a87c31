# SPDX-License-Identifier: Apache-2.0
"""Configurations of PixLoc's trainings: the original's keys are taken, or refused with a reason; files and words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from poster import Poster

from kfloc_ros.cli.main import main
from kfloc_ros.config import build_config, parse_overrides
from kfloc_ros.datasets.kfnet import write_kfnet_folder
from kfloc_ros.errors import ConfigError
from kfloc_ros.pixloc.reference import unet
from kfloc_ros.pixloc.reference.model import load_model
from kfloc_ros.training.pixloc_original import ORIGINAL_KEYS, translate, translate_word
from kfloc_ros.training.pixloc_stages import PixLocTrainConfig

EXAMPLES = Path(__file__).parents[2] / "config" / "train"


def taken(content: dict[str, Any], stage: str = "pixloc", kind: str = "cmu") -> PixLocTrainConfig:
    return build_config(PixLocTrainConfig, parse_overrides(PixLocTrainConfig, translate(content, stage, kind).words))


def original(name: str, **changes: Any) -> dict[str, Any]:
    """The published trainings as their papers and code describe them, nested as the original has it."""
    data = {"name": name, "min_overlap": 0.3, "max_overlap": 1.0, "max_num_points3D": 512, "force_num_points3D": True,
            "resize": 720, "resize_by": "min", "crop": 720, "optimal_crop": False, "batch_size": 3, "seed": 1,
            "init_pose": None}  # fmt: skip
    extractor = {"name": "unet", "encoder": "vgg16", "decoder": [64, 64, 64, 32], "output_scales": [0, 2, 4],
                 "output_dim": [32, 128, 128], "checkpointed": True, "do_average_pooling": False}  # fmt: skip
    optimizer = {"name": "learned_optimizer", "num_iters": 15, "pad": 3, "loss_fn": "scaled_barron(0, 0.1)",
                 "learned_damping": True, "damping": {"type": "constant"}}  # fmt: skip
    model = {"name": "two_view_refiner", "success_thresh": 3, "extractor": extractor, "optimizer": optimizer}
    train = {"seed": 0, "epochs": 200, "lr": 1e-5, "lr_scaling": [[100, ["dampingnet.const"]]], "clip_grad": 1.0,
             "log_every_iter": 50, "eval_every_iter": 500}  # fmt: skip
    content: dict[str, Any] = {"data": data, "model": model, "train": train}
    for dotted, value in changes.items():
        *path, last = dotted.split("__")
        part = content
        for key in path:
            part = part[key]
        part[last] = value
    return content


def test_the_examples_are_the_originals_configurations() -> None:
    megadepth = original(
        "megadepth", data__min_overlap=0.4, data__resize=512, data__crop=512, data__batch_size=6,
        data__init_pose=[0.75, 1.0], model__extractor__encoder="vgg19", model__optimizer__pad=2, train__lr=5e-6,
    )  # fmt: skip
    gnnet = original("cmu", data__resize=512, data__crop=512, data__batch_size=4, model__name="gnnet", train__lr=1e-6)
    for name, content, stage, kind in (
        ("pixloc_cmu", original("cmu"), "pixloc", "cmu"),
        ("pixloc_megadepth", megadepth, "pixloc", "megadepth"),
        ("gnnet_cmu", gnnet, "gnnet", "cmu"),
    ):
        example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
        assert taken({**content, "steps": 40_000}, stage, kind) == taken(example, stage, kind), name


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.resize_by=max", {"resize_by": "longer"}),
        ("data.init_pose=max_error", {"init": "max_error"}),
        ("data.init_pose=[0.5, 0.9]", {"init": "interpolate", "init_low": 0.5, "init_high": 0.9}),
        ("data.max_baseline=null", {"max_baseline_m": 1e6}),
        ("data.train_slices=[8, 9]", {"train_scenes": "slice8,slice9"}),
        ("model.extractor.output_dim=[16, 64, 64]", {"output_dim": "16,64,64"}),
        ("model.optimizer.interpolation.pad=4", {"pad": 4}),
        ("model.optimizer.loss_fn=huber", {"loss": "huber"}),
        ("train.lr=1e-4", {"learning_rate": 1e-4}),
        ("train.clip_grad=null", {"clip": 1e9}),
        ("train.lr_scaling=[[10, ['dampingnet.const']]]", {"damping_rate": 10.0}),
        ("train_scenes=a, b", {"train_scenes": "a, b"}),
    ],
)
def test_the_originals_words_set_options(word: str, expected: dict[str, Any]) -> None:
    config = taken(dict(translate_word(word)))
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("model.optimizer.name=classic_optimizer", "what is learned"),
        ("model.extractor.name=s2dnet", "no other network"),
        ("data.read_depth=true", "points come from"),
        ("train.load_experiment=pixloc_cmu", "--weights outputs/training/NAME"),
        ("train.lr_schedule.type=exp", "the rate is constant"),
        ("train.lr_scaling=[[10, ['encoder']]]", "damping's rate alone"),
        ("model.loss.margin_positive=0.5", "constant of GN-Net"),
        ("model.name=gnnet", "trains two_view_refiner"),
        ("data.name=megadepth", "of the kind cmu"),
        ("data.resize_by=longer", "min or max"),
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("train.lr=[", "cannot be read"),
        ("no words", "key=value"),
    ],
)
def test_what_cannot_be_otherwise_is_refused_with_the_reason(word: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason.replace("(", r"\(")):
        taken(dict(translate_word(word)))


def test_every_key_says_what_becomes_of_it() -> None:
    """What makes no difference is noted with a reason; what sets an option names one that there is."""
    noted = translate(
        {"train": {"epochs": 3, "median_metrics": ["R_error"]}, "data": {"num_threads": 1}}, "gnnet", "cmu"
    )
    assert noted.words == () and len(noted.notes) == 3 and "steps says how long" in noted.notes[0]
    samples = {"data.resize_by": "min", "train.lr_scaling": [[1, ["dampingnet.const"]]], "data.train_slices": [8],
               "data.val_slices": [6], "model.optimizer.loss_fn": "huber"}  # fmt: skip
    for key in ORIGINAL_KEYS:
        for word in translate({key: samples.get(key, 1)}, "pixloc", "cmu").words if is_set(key) else ():
            assert hasattr(PixLocTrainConfig(), word.partition("=")[0]), key


def is_set(key: str) -> bool:
    return hasattr(ORIGINAL_KEYS[key], "options") and key != "data.init_pose"


def test_trainings_are_experiments_with_files_and_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unet, "BLOCK_CHANNELS", (8, 16, 32, 32, 32))
    list(write_kfnet_folder(Poster(), Path("poster")))
    conf = Path("conf.yaml")
    conf.write_text(
        "steps: 1\nresize: 96\ncrop: 96\npoints: 32\nvalidation_share: 0\nworkers: 1\n"
        "model: {optimizer: {num_iters: 4, pad: 1}, extractor: {output_dim: [16, 16, 16]}}\ntrain: {epochs: 7}\n"
    )
    base = ["train", "gnnet", "kfnet:poster", "--conf", str(conf), "--device", "cpu"]
    assert main([*base, "experiment=small", "batch=1", "model.optimizer.num_iters=2"]) == 0
    assert "no effect here: train.epochs" in capsys.readouterr().out
    folder = Path("outputs/training/small")
    described = json.loads((folder / "state.json").read_text())["config"]
    assert (described["batch"], described["iterations"], described["pad"], described["resize"]) == (1, 2, 1, 96)
    assert load_model(folder / "pixloc.safetensors").config.extractor.output_dim == (16, 16, 16)
    for wrong in (["experiment=../x"], ["experiment=small", "--out", "y"], []):
        assert main([*base, *wrong]) == 2
    conf.write_text("steps: 1\nwidth: 0.0625\nbatch: 1\ntruncation: false\n")
    base = ["train", "scoordnet", "kfnet:poster", "--conf", str(conf), "--device", "cpu"]
    assert main([*base, "experiment=kfnet", "width=0.125"]) == 0
    described = json.loads(Path("outputs/training/kfnet/state.json").read_text())["config"]
    assert (described["width"], described["truncation"]) == (0.125, False)
    for text in ("steps: [1]", "just words", "steps: {a"):
        conf.write_text(text)
        assert main([*base, "experiment=other"]) == 2
    assert not Path("outputs/training/other").exists()
    assert np.isfinite(json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"])
