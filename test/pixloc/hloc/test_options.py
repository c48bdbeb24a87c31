# SPDX-License-Identifier: Apache-2.0
"""Options of PixLoc's runs: the original's keys are taken, or refused with a reason; files and words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kfloc_ros.config import Sets
from kfloc_ros.errors import ConfigError
from kfloc_ros.pixloc.hloc.options import ORIGINAL_KEYS, RunOptions, run_options, translate
from kfloc_ros.pixloc.reference.solver import Method

EXAMPLES = Path(__file__).parents[3] / "config" / "run"


def options(*words: str, conf: dict[str, Any] | None = None) -> RunOptions:
    return run_options("7scenes", from_poses=False, words=words, conf=conf)


@pytest.mark.parametrize(
    ("name", "data_set"), [("pixloc_megadepth", "7scenes"), ("pixloc_cmu", "cmu"), ("pixloc_cmu", "robotcar")]
)
def test_the_examples_are_the_published_runs(name: str, data_set: str) -> None:
    example = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert example.pop("experiment") == name
    usual = run_options(data_set, from_poses=False, words=["normalize_descriptors=true"])
    given = run_options(data_set, from_poses=False, words=(), conf=example)
    assert given.settings() == usual.settings() and given.image_size() == usual.image_size()


def test_words_override_the_file_and_both_take_either_program_s_names() -> None:
    conf = {"optimizer": {"num_iters": 20, "interpolation": {"pad": 3}}, "num_dbs": 4, "refinement.layer_indices": [0]}
    found = options("refinement.num_dbs=2", "resize=320", conf=conf)
    assert (found.num_iters, found.pad, found.num_dbs, found.resize) == (20, 3, 2, 320)
    assert found.settings().layer_indices == (0,)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optimizer.loss_fn=huber", {"loss": "huber"}),
        ("optimizer.jacobi_scaling=true", {"jacobi_scaling": True}),
        ("optimizer.interpolation.mode=cubic", {"cubic": True}),
        ("optimizer.name=classic_optimizer", {"method": Method.CLASSIC}),
        ("optimizer.dt_stop_criteria=0.001", {"stop_step_m": 0.001}),
        ("optimizer.dR_stop_criteria=0.01", {"stop_step_deg": 0.01}),
        ("optimizer.grad_stop_criteria=1e-6", {"stop_gradient": 1e-6}),
        ("refinement.normalize_descriptors=false", {"normalize_features": False}),
        ("refinement.compute_uncertainty=false", {"use_confidences": False}),
        ("refinement.multiscale=null", {"multiscale": (1,)}),
        ("refinement.layer_indices=null", {"layer_indices": ()}),
    ],
)
def test_the_originals_words_reach_the_refiner(word: str, expected: dict[str, Any]) -> None:
    settings = options(word).settings()
    assert {key: getattr(settings, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("features.conf.encoder=vgg16", "as it was trained"),
        ("features.name=s2dnet", "no other network"),
        ("optimizer.damping.log_range=[-3, 3]", "learned within this range"),
        ("optimizer.sqrt_diag_damping=true", "the original refuses it"),
        ("optimizer.name=other", "learned_optimizer, classic_optimizer"),
        ("optimizer.loss_fn=__import__('os')", "loss"),
        ("refinement.num_db=3", "did you mean 'refinement.num_dbs'"),
        ("features.preprocessing.resize_by=min", "max_force"),
    ],
)
def test_what_cannot_be_otherwise_is_refused_with_the_reason(word: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        options(word)


def test_every_key_says_what_becomes_of_it() -> None:
    """Keys without effect are noted; those that set options name options that there are."""
    notes = translate({"optimizer": {"lambda_": 0.1}}, ["optimizer.verbose=true"]).notes
    assert notes[0].startswith("optimizer.lambda_: the damping is learned") and len(notes) == 2
    samples = {"optimizer.name": "learned_optimizer", "features.preprocessing.resize": None}
    for key, rule in ORIGINAL_KEYS.items():
        if isinstance(rule, Sets):
            names = rule.options(samples.get(key, 1))
            assert set(names) <= set(RunOptions.__dataclass_fields__), key
