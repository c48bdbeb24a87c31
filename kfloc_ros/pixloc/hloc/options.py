# SPDX-License-Identifier: Apache-2.0
"""Options of a run over a data set: the original's names, and its defaults for each data set and mode."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfloc_ros.config import build_config, option, parse_overrides
from kfloc_ros.errors import ConfigError
from kfloc_ros.pixloc.reference.refiner import ReferenceRefinerSettings
from kfloc_ros.pixloc.reference.solver import Method
from kfloc_ros.pixloc.reference.unet import RESIZE_BY, ImageSize

SECTIONS = ("features.preprocessing.", "features.", "optimizer.", "refinement.")
"""Sections of the original's options; ``refinement.num_dbs`` and ``num_dbs`` are the same here."""

POINT_SELECTIONS = ("all", "inliers", "matched")


@dataclass(frozen=True)
class RunOptions:
    """Options of one run; the defaults are those of the original's 7-Scenes run from retrieval."""

    resize: int = option(1024, "Longer side that images are resized to, in pixels.", low=16, high=8192)
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
    legacy: bool = option(False, "Reproduce the original's numbers, also where they can be improved.")

    def image_size(self) -> ImageSize:
        """Return the rule for resizing images."""
        return ImageSize(self.resize, self.resize_by)

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


def run_options(data_set: str, *, from_poses: bool, words: Sequence[str], inlier_ranking: bool = False) -> RunOptions:
    """Return the data set's defaults, overridden by ``key=value`` words.

    Raises:
        ConfigError: an unknown data set or key, or a value that does not fit.
    """
    if (data_set, from_poses) not in _DEFAULTS:
        raise ConfigError(f"Unknown data set '{data_set}'; known: {', '.join(sorted({d for d, _ in _DEFAULTS}))}.")
    values = dict(_DEFAULTS[data_set, from_poses])
    if inlier_ranking:
        values["do_inlier_ranking"] = True
    values |= parse_overrides(RunOptions, [_without_section(word) for word in words])
    options = build_config(RunOptions, values)
    options.settings()  # checks the values
    return options


def _without_section(word: str) -> str:
    section = next((s for s in SECTIONS if word.startswith(s)), "")
    return word.removeprefix(section)


def _integers(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers of '4,1', '[4, 1]' or nothing ('', 'null')."""
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    if inner in ("", "null", "None"):
        return ()
    if not re.fullmatch(r"\d+(\s*,\s*\d+)*", inner):
        raise ConfigError(f"'{name}' takes numbers such as 4,1, got '{text}'.")
    return tuple(int(word) for word in inner.split(","))
