# SPDX-License-Identifier: Apache-2.0
"""Options of a run over a data set: the original's names, and its defaults for each data set and mode.

Every key of the original's configuration (``features.*``, ``optimizer.*``, ``refinement.*``) sets an option, or may
only have the value that is built in, or makes no difference; :data:`ORIGINAL_KEYS` says which, and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kfloc_ros.config import (
    Fixed,
    Idle,
    Rule,
    Sets,
    Translated,
    build_config,
    option,
    options_of,
    parse_overrides,
    read_word,
    translate_keys,
)
from kfloc_ros.device import computes_bfloat16
from kfloc_ros.errors import ConfigError
from kfloc_ros.pixloc.reference.refiner import ReferenceRefinerSettings
from kfloc_ros.pixloc.reference.solver import Method
from kfloc_ros.pixloc.reference.unet import RESIZE_BY, ImageSize

SECTIONS = ("features", "optimizer", "refinement")
"""Sections of the original's options; ``refinement.num_dbs`` and ``num_dbs`` are the same here."""

LARGEST_SIDE_PX = 8192
PRECISIONS = ("float32", "half", "auto")
FROM_MODEL = ("model", "true", "false")
PUBLISHED = {
    "aachen": "pixloc_megadepth",
    "7scenes": "pixloc_megadepth",
    "cambridge": "pixloc_megadepth",
} | dict.fromkeys(("cmu", "robotcar"), "pixloc_cmu")
"""Experiment that the original runs on each data set."""

POINT_SELECTIONS = ("all", "inliers", "matched")


@dataclass(frozen=True)
class RunOptions:
    """Options of one run; the defaults are those of the original's 7-Scenes run from retrieval."""

    resize: int = option(1024, "Longer side that images are resized to, in pixels.", low=16, high=LARGEST_SIDE_PX)
    resize_by: str = option("max", "max: only make images smaller; max_force: also larger.", choices=RESIZE_BY)
    num_iters: int = option(100, "Largest number of LM iterations a level.", low=1, high=10_000)
    pad: int = option(2, "Unused cells at the border of a feature map.", low=1, high=16)
    method: str = option("fixed", "Damping; fixed: learned; classic: adaptive.", choices=("fixed", "classic"))
    stop_period: int = option(10, "Iterations between two stop tests; 0: never stop early.", low=0, high=1000)
    num_dbs: int = option(5, "Largest number of reference images.", low=1, high=100)
    multiscale: str = option("4,1", "Image scales in turn, such as 4,1 or [4,1].")
    layer_indices: str = option("", "Levels used, 0 being the finest, such as 0,1; empty: all.")
    average_observations: bool = option(False, "One residual a point instead of one per point and image.")
    point_selection: str = option(
        "all", "Points to use; inliers and matched need a log of hloc.", choices=POINT_SELECTIONS
    )
    do_inlier_ranking: bool = option(False, "Rank reference images by PnP inliers; needs a log of hloc.")
    do_pose_approximation: bool = option(False, "Start at a mean of reference poses; needs descriptors.")
    filter_covisibility: bool = option(False, "Keep only the largest group of images that share points.")
    min_track_length: int = option(3, "Smallest number of images that observe a point.", low=1, high=1000)
    min_matches_db: int = option(10, "Inliers that an image ranked by them must exceed.", low=0, high=100_000)
    min_matches_total: int = option(10, "From poses: smallest number of PnP inliers.", low=0, high=100_000)
    min_points_opt: int = option(10, "Smallest number of points of an alignment.", low=1, high=1_000_000)
    loss_fn: str = option("model", "Robust loss, such as huber or scaled_barron(0, 0.1); model: that of the training.")
    jacobi_scaling: str = option("model", "Scale the columns of the Jacobian; model: as trained.", choices=FROM_MODEL)
    normalize_descriptors: str = option("model", "Features of unit length; model: as trained.", choices=FROM_MODEL)
    compute_uncertainty: bool = option(True, "Weigh residuals by the network's confidences.")
    interpolation: str = option("linear", "Of feature maps; cubic: Keys' convolution.", choices=("linear", "cubic"))
    dt_stop_criteria: float = option(5e-3, "Step at which a level stops, in metres.", low=0.0, high=1e3)
    dR_stop_criteria: float = option(5e-2, "And its angle, in degrees.", low=0.0, high=180.0)
    grad_stop_criteria: float = option(1e-4, "Norm of the gradient at which a level stops.", low=0.0, high=1e6)
    precision: str = option(
        "float32", "Of the network; half: takes less than half the time; auto: half where fast.", choices=PRECISIONS
    )
    legacy: bool = option(False, "Reproduce the original's numbers, also where they can be improved.")

    def image_size(self) -> ImageSize:
        """Return the rule for resizing images."""
        return ImageSize(self.resize, self.resize_by)

    def half(self, device: torch.device) -> bool:
        """Return True if the network computes in half precision on a device."""
        fast = device.type == "cuda" or computes_bfloat16(device)
        return self.precision == "half" or (self.precision == "auto" and fast)

    def settings(self) -> ReferenceRefinerSettings:
        """Return the settings of the refiner."""
        return ReferenceRefinerSettings(
            num_dbs=self.num_dbs,
            num_iters=self.num_iters,
            pad=self.pad,
            multiscale=_integers("multiscale", self.multiscale) or (1,),
            layer_indices=_integers("layer_indices", self.layer_indices),
            average_observations=self.average_observations,
            min_track_length=self.min_track_length,
            min_points_opt=self.min_points_opt,
            method=Method(self.method),
            stop_period=self.stop_period,
            legacy=self.legacy,
            loss="" if self.loss_fn == "model" else self.loss_fn,
            jacobi_scaling=_of_model(self.jacobi_scaling),
            normalize_features=_of_model(self.normalize_descriptors),
            cubic=self.interpolation == "cubic",
            use_confidences=self.compute_uncertainty,
            stop_step_m=self.dt_stop_criteria,
            stop_step_deg=self.dR_stop_criteria,
            stop_gradient=self.grad_stop_criteria,
        )


_POSES: Mapping[str, Any] = {
    "multiscale": "1",
    "point_selection": "inliers",
    "min_points_opt": 100,
    "average_observations": True,
    "layer_indices": "0,1",
}
_CARS: Mapping[str, Any] = {"num_dbs": 2, "multiscale": "1"}

_DEFAULTS: Mapping[tuple[str, bool], Mapping[str, Any]] = {
    ("7scenes", False): {},
    ("7scenes", True): _POSES,
    ("cambridge", False): {"average_observations": True},
    ("cambridge", True): _POSES,
    ("aachen", False): {"num_iters": 150, "pad": 1, "num_dbs": 3, "do_pose_approximation": True},
    ("aachen", True): {**_POSES, "num_iters": 50, "pad": 1, "resize": 1600},
    ("cmu", False): _CARS,
    ("cmu", True): {**_POSES, "average_observations": False},
    ("robotcar", False): _CARS,
    ("robotcar", True): {**_POSES, "average_observations": False},
}


def _method(value: Any) -> Mapping[str, Any]:
    methods = {"learned_optimizer": "fixed", "classic_optimizer": "classic"}
    if value not in methods:
        raise ConfigError(f"optimizer.name is one of {', '.join(methods)}, got {value!r}.")
    return {"method": methods[value]}


_NETWORK = "the network is as it was trained"
_EMPTY = Fixed(({}, None), "it is a section: give a key below it")

ORIGINAL_KEYS: Mapping[str, Rule] = {
    "features": _EMPTY,
    "features.name": Fixed(("unet",), "no other network is here"),
    "features.conf": _EMPTY,
    "features.conf.checkpointed": Idle("it is of training"),
    **{
        f"features.conf.{key}": Fixed((), _NETWORK)
        for key in ("encoder", "decoder", "decoder_norm", "output_scales", "output_dim", "do_average_pooling")
    },
    "features.conf.trainable": Idle("it is of training"),
    "features.conf.freeze_batch_normalization": Idle("it is of training"),
    "features.conf.compute_uncertainty": Sets.one("compute_uncertainty"),
    "features.preprocessing": _EMPTY,
    "features.preprocessing.resize": Sets(lambda value: {"resize": LARGEST_SIDE_PX if value is None else value}),
    "features.preprocessing.resize_by": Sets.one("resize_by"),
    "optimizer": _EMPTY,
    "optimizer.name": Sets(_method),
    "optimizer.num_iters": Sets.one("num_iters"),
    "optimizer.pad": Sets.one("pad"),
    "optimizer.interpolation.mode": Sets.one("interpolation"),
    "optimizer.interpolation.pad": Sets.one("pad"),
    "optimizer.loss_fn": Sets.one("loss_fn"),
    "optimizer.jacobi_scaling": Sets.one("jacobi_scaling"),
    "optimizer.normalize_features": Fixed((False,), "features are normalized before they are interpolated"),
    "optimizer.lambda_": Idle("the damping is learned; method=classic adapts it"),
    "optimizer.learned_damping": Fixed((True,), "the damping is the model's; method=classic adapts one"),
    "optimizer.damping.type": Fixed(("constant",), "no other damping is here"),
    "optimizer.damping.log_range": Fixed(([-6, 5],), "the factors were learned within this range"),
    "optimizer.grad_stop_criteria": Sets.one("grad_stop_criteria"),
    "optimizer.dt_stop_criteria": Sets.one("dt_stop_criteria"),
    "optimizer.dR_stop_criteria": Sets.one("dR_stop_criteria"),
    "optimizer.trainable": Idle("it is of training"),
    "optimizer.freeze_batch_normalization": Idle("it is of training"),
    "optimizer.feature_dim": Idle("the original does not use it either"),
    "optimizer.sqrt_diag_damping": Fixed((False,), "the original refuses it, too"),
    "optimizer.bound_confidence": Fixed((True,), "the original refuses it, too"),
    "optimizer.no_conditions": Fixed((True,), "the original refuses it, too"),
    "optimizer.verbose": Idle("--verbose prints every query"),
    "refinement": _EMPTY,
    "refinement.layer_indices": Sets.one("layer_indices"),
    "refinement.multiscale": Sets(lambda value: {"multiscale": 1 if value is None else value}),
    **{
        f"refinement.{key}": Sets.one(key)
        for key in (
            "num_dbs", "average_observations", "point_selection", "do_inlier_ranking", "do_pose_approximation",
            "filter_covisibility", "min_track_length", "min_matches_db", "min_matches_total", "min_points_opt",
            "normalize_descriptors", "compute_uncertainty",
        )
    },
}  # fmt: skip


def run_options(
    data_set: str,
    *,
    from_poses: bool,
    words: Sequence[str],
    inlier_ranking: bool = False,
    conf: Mapping[str, Any] | None = None,
) -> RunOptions:
    """Return the data set's defaults, overridden by a configuration file, and that by ``key=value`` words.

    Raises:
        ConfigError: an unknown data set or key, or a value that does not fit.
    """
    if (data_set, from_poses) not in _DEFAULTS:
        raise ConfigError(f"Unknown data set '{data_set}'; known: {', '.join(sorted({d for d, _ in _DEFAULTS}))}.")
    values = dict(_DEFAULTS[data_set, from_poses])
    if inlier_ranking:
        values["do_inlier_ranking"] = True
    values |= parse_overrides(RunOptions, translate(conf or {}, words).words)
    options = build_config(RunOptions, values)
    options.settings()  # checks the values
    return options


def translate(conf: Mapping[str, Any], words: Sequence[str]) -> Translated:
    """Return a configuration and the words that override it as this package's words, and what has no effect.

    Raises:
        ConfigError: a key is unknown, or may not have its value; the reason is said.
    """
    own = {f"{part}.{item.name}": Sets.one(item.name) for part in SECTIONS for item in options_of(RunOptions)}
    rules = own | dict(ORIGINAL_KEYS)
    parts = [translate_keys(content, SECTIONS, rules) for content in (conf, *(read_word(w, SECTIONS) for w in words))]
    return Translated(
        tuple(word for part in parts for word in part.words), tuple(note for part in parts for note in part.notes)
    )


def _of_model(text: str) -> bool | None:
    return None if text == "model" else text == "true"


def _integers(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers of '4,1', '[4, 1]' or nothing ('', 'null')."""
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    if inner in ("", "null", "None"):
        return ()
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", inner):
        raise ConfigError(f"'{name}' takes numbers such as 4,1, got '{text}'.")
    return tuple(int(word) for word in inner.split(","))
