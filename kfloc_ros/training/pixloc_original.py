# SPDX-License-Identifier: Apache-2.0
"""The original PixLoc's training configuration, put into this package's options.

Every key of its ``--conf`` files and command line (``data.*``, ``model.*``, ``train.*``) sets an option here, or may
only have the value that is built in, or makes no difference; :data:`ORIGINAL_KEYS` says which, and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfloc_ros.config import Fixed, Idle, Rule, Sets, Translated, read_word, translate_keys
from kfloc_ros.errors import ConfigError
from kfloc_ros.training.pixloc_stages import NOT_CLIPPED

SECTIONS = ("data", "model", "train")
MODEL_NAMES = {"pixloc": "two_view_refiner", "gnnet": "gnnet"}
"""What the original calls the two trainings."""
PREPROCESSED = ("cmu", "megadepth")
"""Kinds of SOURCE that the original knows, too."""


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


def _slices(name: str) -> Sets:
    return Sets(lambda value: {name: [f"slice{k}" for k in value]})


_STOP = Idle("trainings make all iterations of a level")
_CONSTANT = "it is a constant of GN-Net here"
_LAYOUT = "the layout under SOURCE's DIR is fixed: see `kfloc pixloc preprocess --help`"
_ANEW = Idle("pairs are drawn anew for every step, every scene as likely as any other; validation_pairs limits both")

ORIGINAL_KEYS: Mapping[str, Rule] = {
    "data.batch_size": Sets.one("batch"),
    "data.train_batch_size": Sets.one("batch"),
    "data.val_batch_size": Idle("it is that of training"),
    "data.test_batch_size": Idle("nothing is tested in a training"),
    "data.num_workers": Sets.one("workers"),
    "data.num_threads": Idle("OMP_NUM_THREADS says how many threads a process has"),
    "data.shuffle_training": Fixed((True,), "pairs are drawn at random"),
    "data.seed": Idle("train.seed draws everything"),
    "data.dataset_dir": Fixed(("CMU/", "megadepth/"), _LAYOUT),
    "data.info_dir": Fixed(("cmu_pixloc_training/", "megadepth_pixloc_training/"), _LAYOUT),
    "data.image_subpath": Fixed(("Undistorted_SfM/{}/images/",), _LAYOUT),
    "data.depth_subpath": Idle("depth is of preprocessing: `kfloc pixloc preprocess --depth`"),
    "data.train_split": Fixed(("train_scenes.txt",), "the list lies beside the scenes; or name train_scenes"),
    "data.val_split": Fixed(("valid_scenes.txt",), "the list lies beside the scenes; or name validation_scenes"),
    "data.train_slices": _slices("train_scenes"),
    "data.val_slices": _slices("validation_scenes"),
    "data.train_num_per_scene": _ANEW,
    "data.val_num_per_scene": _ANEW,
    "data.train_num_per_slice": _ANEW,
    "data.val_num_per_slice": _ANEW,
    "data.two_view": Fixed((True,), "a single view has nothing to align with"),
    "data.min_overlap": Sets.one("min_overlap"),
    "data.max_overlap": Sets.one("max_overlap"),
    "data.min_baseline": Sets(lambda value: {"min_baseline_m": value or 0.0}),
    "data.max_baseline": Sets(lambda value: {"max_baseline_m": 1e6 if value is None else value}),
    "data.sort_by_overlap": Fixed((False,), "pairs are drawn at random"),
    "data.init_pose": Sets(_init),
    "data.init_pose_max_error": Fixed((63,), "it is a constant of init=max_error here"),
    "data.init_pose_num_samples": Fixed((20,), "it is a constant of init=max_error here"),
    "data.read_depth": Fixed((False,), "points come from the scene's file"),
    "data.grayscale": Fixed((False,), "the network takes colour images"),
    "data.resize": Sets.one("resize"),
    "data.resize_by": Sets(_resized),
    "data.crop": Sets.one("crop"),
    "data.pad": Fixed((None,), "images are cropped, not padded"),
    "data.optimal_crop": Fixed((False,), "crops are drawn at random, as in the published trainings"),
    "data.max_num_points3D": Sets.one("points"),
    "data.force_num_points3D": Idle("so many points are drawn of those that are seen, with replacement"),
    "model.trainable": Fixed((True,), "a network that is not trained needs no training"),
    "model.normalize_features": Sets.one("normalize_features"),
    "model.normalize_dt": Idle("it is of a figure in the log alone, which is told in metres"),
    "model.success_thresh": Sets.one("success_px"),
    "model.clamp_error": Sets.one("clamp_px"),
    "model.duplicate_optimizer_per_scale": Fixed((True,), "every level has a damping of its own"),
    "model.freeze_batch_normalization": Fixed((False,), "batch normalization is trained"),
    "model.extractor.name": Fixed(("unet",), "no other network is here"),
    "model.extractor.trainable": Fixed((True,), "a network that is not trained needs no training"),
    "model.extractor.encoder": Sets.one("encoder"),
    "model.extractor.decoder": Sets.one("decoder"),
    "model.extractor.decoder_norm": Fixed(("nn.BatchNorm2d",), "no other normalization is here"),
    "model.extractor.output_scales": Sets.one("output_scales"),
    "model.extractor.output_dim": Sets.one("output_dim"),
    "model.extractor.freeze_batch_normalization": Fixed((False,), "batch normalization is trained"),
    "model.extractor.do_average_pooling": Sets.one("average_pooling"),
    "model.extractor.compute_uncertainty": Idle("the network has confidences; GN-Net's losses do not touch them"),
    "model.extractor.checkpointed": Idle("it changes what memory is used, not what is learned"),
    "model.optimizer.name": Fixed(("learned_optimizer",), "its damping is what is learned"),
    "model.optimizer.trainable": Fixed((True,), "damping_rate=0 leaves the damping as it is"),
    "model.optimizer.freeze_batch_normalization": Idle("it has none"),
    "model.optimizer.num_iters": Sets.one("iterations"),
    "model.optimizer.pad": Sets.one("pad"),
    "model.optimizer.interpolation.mode": Fixed(
        ("linear",), "the original trains with no other; runs can (interpolation=cubic)"
    ),
    "model.optimizer.interpolation.pad": Sets.one("pad"),
    "model.optimizer.lambda_": Idle("the damping is learned"),
    "model.optimizer.verbose": Idle("the log says what is told"),
    "model.optimizer.loss_fn": Sets.one("loss"),
    "model.optimizer.jacobi_scaling": Sets.one("jacobi_scaling"),
    "model.optimizer.normalize_features": Fixed((False,), "features are normalized before they are interpolated"),
    "model.optimizer.learned_damping": Fixed((True,), "the damping is what is learned"),
    "model.optimizer.damping.type": Fixed(("constant",), "no other damping is here"),
    "model.optimizer.damping.log_range": Fixed(([-6, 5],), "it is the range of the published networks"),
    "model.optimizer.grad_stop_criteria": _STOP,
    "model.optimizer.dt_stop_criteria": _STOP,
    "model.optimizer.dR_stop_criteria": _STOP,
    "model.optimizer.sqrt_diag_damping": Fixed((False,), "the damping is that of the published networks"),
    "model.optimizer.bound_confidence": Idle("it is deprecated in the original, too"),
    "model.optimizer.no_conditions": Idle("it is deprecated in the original, too"),
    "model.loss.margin_positive": Fixed((0.2,), _CONSTANT),
    "model.loss.margin_negative": Fixed((1,), _CONSTANT),
    "model.loss.num_top_negative_sampling": Fixed((200,), _CONSTANT),
    "model.loss.gauss_newton_magnitude": Fixed((1,), _CONSTANT),
    "model.loss.gauss_newton_weight": Fixed((0.1,), _CONSTANT),
    "model.loss.contrastive_weight": Fixed((1,), _CONSTANT),
    "train.seed": Sets.one("seed"),
    "train.epochs": Idle("there are no epochs: steps says how long"),
    "train.optimizer": Fixed(("adam",), "no other optimizer is here"),
    "train.opt_regexp": Fixed((None,), "all parameters are trained"),
    "train.optimizer_options": Fixed(({},), "Adam has its usual ones"),
    "train.lr": Sets.one("learning_rate"),
    "train.lr_schedule.type": Fixed((None,), "the rate is constant, as published"),
    "train.lr_schedule.start": Idle("the rate is constant"),
    "train.lr_schedule.exp_div_10": Idle("the rate is constant"),
    "train.lr_scaling": Sets(_damping),
    "train.eval_every_iter": Sets.one("validate_every"),
    "train.log_every_iter": Sets.one("log_every"),
    "train.keep_last_checkpoints": Idle("the newest checkpoint is kept, and the best weights"),
    "train.load_experiment": Fixed((None,), "name the file: --weights outputs/training/NAME/pixloc.safetensors"),
    "train.median_metrics": Idle("figures are means"),
    "train.best_key": Fixed(("loss/total",), "the best weights are those of the lowest loss"),
    "train.dataset_callback_fn": Idle("pairs are drawn anew for every step"),
    "train.clip_grad": Sets(lambda value: {"clip": NOT_CLIPPED if value is None else value}),
}


def translate(content: Mapping[str, Any], stage: str, source_kind: str) -> Translated:
    """Return a configuration of the original's, of this package's, or of both, as words.

    Args:
        content: as YAML has it; nested below ``data``, ``model`` and ``train``, or dotted keys.
        stage: ``pixloc`` or ``gnnet``.
        source_kind: of the SOURCE, such as ``cmu``.

    Raises:
        ConfigError: a key is unknown, or may not have its value; the reason is said.
    """
    name: Rule = Fixed((MODEL_NAMES[stage],), f"`kfloc train {stage}` trains {MODEL_NAMES[stage]}")
    data: Rule = Idle("SOURCE says what is trained on")
    if source_kind in PREPROCESSED:
        data = Fixed((source_kind,), f"SOURCE is of the kind {source_kind}")
    return translate_keys(content, SECTIONS, {**ORIGINAL_KEYS, "model.name": name, "data.name": data})


def translate_word(word: str) -> Mapping[str, Any]:
    """Return a word of the command, such as ``train.lr=1e-5`` or ``batch=2``, as a configuration.

    Raises:
        ConfigError: it has no '=', or its value cannot be read.
    """
    return read_word(word, SECTIONS)
