# SPDX-License-Identifier: Apache-2.0
"""The original PixLoc's training configuration, put into this package's options.

Every key of its ``--conf`` files and command line (``data.*``, ``model.*``, ``train.*``) sets an option here, or may
only have the value that is built in, or makes no difference; :data:`ORIGINAL_KEYS` says which, and why.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kfloc_ros.errors import ConfigError
from kfloc_ros.training.pixloc_stages import NOT_CLIPPED

SECTIONS = ("data", "model", "train")
MODEL_NAMES = {"pixloc": "two_view_refiner", "gnnet": "gnnet"}
"""What the original calls the two trainings."""
PREPROCESSED = ("cmu", "megadepth")
"""Kinds of SOURCE that the original knows, too."""


@dataclass(frozen=True)
class _Sets:
    """A key that sets options."""

    options: Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class _Fixed:
    """A key that may only have the values that are built in."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class _Idle:
    """A key that makes no difference here."""

    reason: str


def _sets(name: str) -> _Sets:
    return _Sets(lambda value: {name: value})


def _init(value: Any) -> Mapping[str, Any]:
    if value is None or isinstance(value, str):
        return {"init": value or "identity"}
    if isinstance(value, list) and len(value) == 2:
        return {"init": "interpolate", "init_low": value[0], "init_high": value[1]}
    raise ConfigError(f"data.init_pose is identity, max_error or two shares such as [0.75, 1.0], got {value!r}.")


def _damping(value: Any) -> Mapping[str, Any]:
    if isinstance(value, list) and len(value) == 1 and len(value[0]) == 2 and value[0][1] == ["dampingnet.const"]:
        return {"damping_rate": value[0][0]}
    raise ConfigError(
        f"train.lr_scaling scales the damping's rate alone here, as [[100, ['dampingnet.const']]], got {value!r}."
    )


def _resized(value: Any) -> Mapping[str, Any]:
    sides = {"min": "shorter", "max": "longer"}
    if value not in sides:
        raise ConfigError(f"data.resize_by is min or max, got {value!r}.")
    return {"resize_by": sides[value]}


def _slices(name: str) -> _Sets:
    return _Sets(lambda value: {name: [f"slice{k}" for k in value]})


_STOP = _Idle("trainings make all iterations of a level")
_CONSTANT = "it is a constant of GN-Net here"
_LAYOUT = "the layout under SOURCE's DIR is fixed: see `kfloc pixloc preprocess --help`"
_ANEW = _Idle("pairs are drawn anew for every step, every scene as likely as any other; validation_pairs limits both")

ORIGINAL_KEYS: Mapping[str, _Sets | _Fixed | _Idle] = {
    "data.batch_size": _sets("batch"),
    "data.train_batch_size": _sets("batch"),
    "data.val_batch_size": _Idle("it is that of training"),
    "data.test_batch_size": _Idle("nothing is tested in a training"),
    "data.num_workers": _sets("workers"),
    "data.num_threads": _Idle("OMP_NUM_THREADS says how many threads a process has"),
    "data.shuffle_training": _Fixed((True,), "pairs are drawn at random"),
    "data.seed": _Idle("train.seed draws everything"),
    "data.dataset_dir": _Fixed(("CMU/", "megadepth/"), _LAYOUT),
    "data.info_dir": _Fixed(("cmu_pixloc_training/", "megadepth_pixloc_training/"), _LAYOUT),
    "data.image_subpath": _Fixed(("Undistorted_SfM/{}/images/",), _LAYOUT),
    "data.depth_subpath": _Idle("depth is of preprocessing: `kfloc pixloc preprocess --depth`"),
    "data.train_split": _Fixed(("train_scenes.txt",), "the list lies beside the scenes; or name train_scenes"),
    "data.val_split": _Fixed(("valid_scenes.txt",), "the list lies beside the scenes; or name validation_scenes"),
    "data.train_slices": _slices("train_scenes"),
    "data.val_slices": _slices("validation_scenes"),
    "data.train_num_per_scene": _ANEW,
    "data.val_num_per_scene": _ANEW,
    "data.train_num_per_slice": _ANEW,
    "data.val_num_per_slice": _ANEW,
    "data.two_view": _Fixed((True,), "a single view has nothing to align with"),
    "data.min_overlap": _sets("min_overlap"),
    "data.max_overlap": _sets("max_overlap"),
    "data.min_baseline": _Sets(lambda value: {"min_baseline_m": value or 0.0}),
    "data.max_baseline": _Sets(lambda value: {"max_baseline_m": 1e6 if value is None else value}),
    "data.sort_by_overlap": _Fixed((False,), "pairs are drawn at random"),
    "data.init_pose": _Sets(_init),
    "data.init_pose_max_error": _Fixed((63,), "it is a constant of init=max_error here"),
    "data.init_pose_num_samples": _Fixed((20,), "it is a constant of init=max_error here"),
    "data.read_depth": _Fixed((False,), "points come from the scene's file"),
    "data.grayscale": _Fixed((False,), "the network takes colour images"),
    "data.resize": _sets("resize"),
    "data.resize_by": _Sets(_resized),
    "data.crop": _sets("crop"),
    "data.pad": _Fixed((None,), "images are cropped, not padded"),
    "data.optimal_crop": _Fixed((False,), "crops are drawn at random, as in the published trainings"),
    "data.max_num_points3D": _sets("points"),
    "data.force_num_points3D": _Idle("so many points are drawn of those that are seen, with replacement"),
    "model.trainable": _Fixed((True,), "a network that is not trained needs no training"),
    "model.normalize_features": _sets("normalize_features"),
    "model.normalize_dt": _Idle("it is of a figure in the log alone, which is told in metres"),
    "model.success_thresh": _sets("success_px"),
    "model.clamp_error": _sets("clamp_px"),
    "model.duplicate_optimizer_per_scale": _Fixed((True,), "every level has a damping of its own"),
    "model.freeze_batch_normalization": _Fixed((False,), "batch normalization is trained"),
    "model.extractor.name": _Fixed(("unet",), "no other network is here"),
    "model.extractor.trainable": _Fixed((True,), "a network that is not trained needs no training"),
    "model.extractor.encoder": _sets("encoder"),
    "model.extractor.decoder": _sets("decoder"),
    "model.extractor.decoder_norm": _Fixed(("nn.BatchNorm2d",), "no other normalization is here"),
    "model.extractor.output_scales": _sets("output_scales"),
    "model.extractor.output_dim": _sets("output_dim"),
    "model.extractor.freeze_batch_normalization": _Fixed((False,), "batch normalization is trained"),
    "model.extractor.do_average_pooling": _sets("average_pooling"),
    "model.extractor.compute_uncertainty": _Idle("the network has confidences; GN-Net's losses do not touch them"),
    "model.extractor.checkpointed": _Idle("it changes what memory is used, not what is learned"),
    "model.optimizer.name": _Fixed(("learned_optimizer",), "its damping is what is learned"),
    "model.optimizer.trainable": _Fixed((True,), "damping_rate=0 leaves the damping as it is"),
    "model.optimizer.freeze_batch_normalization": _Idle("it has none"),
    "model.optimizer.num_iters": _sets("iterations"),
    "model.optimizer.pad": _sets("pad"),
    "model.optimizer.interpolation.mode": _Fixed(("linear",), "no other interpolation is here"),
    "model.optimizer.interpolation.pad": _sets("pad"),
    "model.optimizer.lambda_": _Idle("the damping is learned"),
    "model.optimizer.verbose": _Idle("the log says what is told"),
    "model.optimizer.loss_fn": _sets("loss"),
    "model.optimizer.jacobi_scaling": _sets("jacobi_scaling"),
    "model.optimizer.normalize_features": _Fixed((False,), "features are normalized before they are interpolated"),
    "model.optimizer.learned_damping": _Fixed((True,), "the damping is what is learned"),
    "model.optimizer.damping.type": _Fixed(("constant",), "no other damping is here"),
    "model.optimizer.damping.log_range": _Fixed(([-6, 5],), "it is the range of the published networks"),
    "model.optimizer.grad_stop_criteria": _STOP,
    "model.optimizer.dt_stop_criteria": _STOP,
    "model.optimizer.dR_stop_criteria": _STOP,
    "model.optimizer.sqrt_diag_damping": _Fixed((False,), "the damping is that of the published networks"),
    "model.optimizer.bound_confidence": _Idle("it is deprecated in the original, too"),
    "model.optimizer.no_conditions": _Idle("it is deprecated in the original, too"),
    "model.loss.margin_positive": _Fixed((0.2,), _CONSTANT),
    "model.loss.margin_negative": _Fixed((1,), _CONSTANT),
    "model.loss.num_top_negative_sampling": _Fixed((200,), _CONSTANT),
    "model.loss.gauss_newton_magnitude": _Fixed((1,), _CONSTANT),
    "model.loss.gauss_newton_weight": _Fixed((0.1,), _CONSTANT),
    "model.loss.contrastive_weight": _Fixed((1,), _CONSTANT),
    "train.seed": _sets("seed"),
    "train.epochs": _Idle("there are no epochs: steps says how long"),
    "train.optimizer": _Fixed(("adam",), "no other optimizer is here"),
    "train.opt_regexp": _Fixed((None,), "all parameters are trained"),
    "train.optimizer_options": _Fixed(({},), "Adam has its usual ones"),
    "train.lr": _sets("learning_rate"),
    "train.lr_schedule.type": _Fixed((None,), "the rate is constant, as published"),
    "train.lr_schedule.start": _Idle("the rate is constant"),
    "train.lr_schedule.exp_div_10": _Idle("the rate is constant"),
    "train.lr_scaling": _Sets(_damping),
    "train.eval_every_iter": _sets("validate_every"),
    "train.log_every_iter": _sets("log_every"),
    "train.keep_last_checkpoints": _Idle("the newest checkpoint is kept, and the best weights"),
    "train.load_experiment": _Fixed((None,), "name the file: --weights outputs/training/NAME/pixloc.safetensors"),
    "train.median_metrics": _Idle("figures are means"),
    "train.best_key": _Fixed(("loss/total",), "the best weights are those of the lowest loss"),
    "train.dataset_callback_fn": _Idle("pairs are drawn anew for every step"),
    "train.clip_grad": _Sets(lambda value: {"clip": NOT_CLIPPED if value is None else value}),
}


@dataclass(frozen=True)
class Translated:
    """A configuration in this package's words."""

    words: tuple[str, ...]
    """``key=value``"""
    notes: tuple[str, ...]
    """Keys that make no difference here, and why."""


def translate(content: Mapping[str, Any], stage: str, source_kind: str) -> Translated:
    """Return a configuration of the original's, of this package's, or of both, as words.

    Args:
        content: as YAML has it; nested below ``data``, ``model`` and ``train``, or dotted keys.
        stage: ``pixloc`` or ``gnnet``.
        source_kind: of the SOURCE, such as ``cmu``.

    Raises:
        ConfigError: a key is unknown, or may not have its value; the reason is said.
    """
    words, notes = list[str](), list[str]()
    for key, value in _flat(content):
        if key.partition(".")[0] not in SECTIONS:
            words += _words({key: value})
            continue
        rule = _rule(key, stage, source_kind)
        if isinstance(rule, _Sets):
            words += _words(rule.options(value))
        elif isinstance(rule, _Idle):
            notes.append(f"{key}: {rule.reason}")
        elif value not in rule.values:
            raise ConfigError(f"{key}={value} is not taken: {rule.reason}.")
    return Translated(tuple(words), tuple(notes))


def _rule(key: str, stage: str, source_kind: str) -> _Sets | _Fixed | _Idle:
    if key == "model.name":
        return _Fixed((MODEL_NAMES[stage],), f"`kfloc train {stage}` trains {MODEL_NAMES[stage]}")
    if key == "data.name":
        if source_kind not in PREPROCESSED:
            return _Idle("SOURCE says what is trained on")
        return _Fixed((source_kind,), f"SOURCE is of the kind {source_kind}")
    if key not in ORIGINAL_KEYS:
        near = difflib.get_close_matches(key, ORIGINAL_KEYS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise ConfigError(f"The configuration has an unknown key '{key}'{hint}")
    return ORIGINAL_KEYS[key]


def translate_word(word: str) -> Mapping[str, Any]:
    """Return a word of the command, such as ``train.lr=1e-5`` or ``batch=2``, as a configuration.

    Raises:
        ConfigError: it has no '=', or its value cannot be read.
    """
    key, separator, text = word.partition("=")
    if not separator:
        raise ConfigError(f"Options are written key=value, got '{word}'.")
    if key.partition(".")[0] not in SECTIONS:
        return {key: text}
    try:
        return {key: yaml.safe_load(text)}
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of '{word}' cannot be read: {error}") from error


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{name}.")
        else:
            found.append((name, value))
    return found


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
