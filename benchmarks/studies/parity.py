# SPDX-License-Identifier: Apache-2.0
"""Agreement with numbers of the original PixLoc, for weights that a formula gives.

A file holds one pair of images, a camera, points and a starting pose, and the original's results: samples of its
features and confidences, and the pose after every iteration. This module computes the same and compares.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import ConfigError, SourceError
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.distortion import Distortion
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel
from kfloc_ros.pixloc.reference.solver import Iteration
from kfloc_ros.pixloc.reference.two_view import align_two_views, solver_settings
from kfloc_ros.pixloc.reference.unet import FeaturePyramid, UNetConfig

TOLERANCE = 1e-5
PAD, LOSS = 2, "scaled_barron(0, 0.1)"
_SAMPLED = re.compile(r"(ref|query)_(features|confidence)(\d+)_every(\d+)")
_NEEDED = (
    "encoder", "salt", "num_iters", "image_ref", "image_query", "camera", "points3D_ref", "iter_level", "iter_index",
    "iter_T", "iter_valid",
)  # fmt: skip


@dataclass(frozen=True)
class ParityReport:
    """Differences from the original's numbers."""

    encoder: str
    max_feature_difference: float
    """Maximum over features and confidences of both images and all levels."""
    max_pose_difference: float
    """Maximum over the twelve numbers of every iteration's pose; infinite if no iteration has a counterpart."""
    max_confidence_difference: float
    max_cost_difference: float
    """Maximum over the mean robust costs of all iterations; NaN if the file has none."""
    same_iterations: bool
    """True for the same levels, in the same order, with the same numbers of iterations."""
    same_valid: bool
    """True for the same number of valid points at every iteration."""
    iterations: int

    @property
    def agrees(self) -> bool:
        """True if all differences are within the tolerance, and iterations and valid points are equal."""
        return (
            self.max_feature_difference <= TOLERANCE
            and self.max_pose_difference <= TOLERANCE
            and self.same_iterations
            and self.same_valid
        )


def formula_weights(entries: Mapping[str, torch.Tensor], salt: int) -> dict[str, torch.Tensor]:
    """Return values for entries of these names and shapes, from a random stream seeded by each name."""
    return {name: _formula(name, entry, salt) for name, entry in entries.items()}


def _formula(name: str, entry: torch.Tensor, salt: int) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(entry)
    stream = np.random.RandomState((zlib.crc32(name.encode()) + salt) % 2**32)
    n: NDArray[Any] = stream.standard_normal(tuple(entry.shape)).astype(np.float32)
    if name.endswith("dampingnet.const"):
        n = 0.3 * n - 0.6
    elif name.endswith("running_mean"):
        n = 0.1 * n
    elif name.endswith("running_var"):
        n = 0.5 * np.abs(n) + 0.5
    elif n.ndim == 4:
        n = n * np.float32(math.sqrt(2 / math.prod(n.shape[1:])))
    elif "layers.1.weight" in name:
        n = 1 + 0.1 * n
    else:
        n = 0.05 * n
    return torch.from_numpy(n)


def formula_model(encoder: str, salt: int) -> PixLocModel:
    """Return PixLoc with the formula's weights, in evaluation mode.

    Raises:
        ConfigError: an unknown encoder.
    """
    model = PixLocModel(PixLocConfig(UNetConfig(encoder), loss=LOSS, pad=PAD))
    model.load_state_dict(formula_weights(model.state_dict(), salt))
    return model.eval()


def compare(path: Path) -> ParityReport:
    """Compute the numbers of a file, on the CPU, and compare.

    Raises:
        SourceError: the file is missing, damaged, or incomplete.
    """
    numbers = _read(path)
    try:
        model = formula_model(str(numbers["encoder"]), int(numbers["salt"]))
    except ConfigError as error:
        raise SourceError(f"'{path}' cannot be compared with: {error}") from error
    camera = _camera(numbers["camera"])
    with torch.inference_mode():
        pyramids = {
            view: model.extractor(torch.from_numpy(numbers[f"image_{view}"]).float()[None]) for view in ("ref", "query")
        }
        iterations: list[tuple[int, Iteration]] = []
        align_two_views(
            model,
            pyramids["ref"],
            pyramids["query"],
            camera,
            camera,
            torch.from_numpy(numbers["points3D_ref"]).double()[None],
            Pose.identity(1, dtype=torch.float64),
            settings=solver_settings(model.config, num_iters=int(numbers["num_iters"]), legacy=True),
            observer=lambda level, iteration: iterations.append((level, iteration)),
        )
    features = dict(_sampled_differences(numbers, pyramids))
    confidences = [value for key, value in features.items() if "confidence" in key]
    expected = list(zip(numbers["iter_level"].tolist(), numbers["iter_index"].tolist(), strict=True))
    rows = {key: row for row, key in enumerate(expected)}
    # Only common iterations, so that a different number of iterations does not hide the pose difference.
    pairs = [(rows[level, it.index], it) for level, it in iterations if (level, it.index) in rows]
    return ParityReport(
        encoder=str(numbers["encoder"]),
        max_feature_difference=max(features.values(), default=math.inf),
        max_pose_difference=max((_pose_difference(numbers, row, it) for row, it in pairs), default=math.inf),
        max_confidence_difference=max(confidences, default=math.inf),
        max_cost_difference=max((_cost_difference(numbers, row, it) for row, it in pairs), default=math.inf),
        same_iterations=[(level, it.index) for level, it in iterations] == expected,
        same_valid=len(pairs) == len(expected)
        and all(int(it.at.valid_count) == int(numbers["iter_valid"][row]) for row, it in pairs),
        iterations=len(iterations),
    )


def _read(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise SourceError(f"There is no file '{path}' with numbers of the original.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            numbers = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise SourceError(f"'{path}' is not an archive of arrays: {error}") from error
    if missing := [name for name in _NEEDED if name not in numbers]:
        raise SourceError(f"'{path}' does not hold numbers to compare with: it lacks {', '.join(missing)}.")
    return numbers


def _camera(values: NDArray[Any]) -> CameraTensor:
    data = torch.from_numpy(np.asarray(values, dtype=np.float64))[None]
    kinds = {6: Distortion.NONE, 8: Distortion.RADIAL, 10: Distortion.OPENCV}
    if len(values) not in kinds:
        raise SourceError(f"A camera has 6, 8 or 10 numbers, got {len(values)}.")
    return CameraTensor(data, kinds[len(values)])


def _sampled_differences(
    numbers: Mapping[str, NDArray[Any]], pyramids: Mapping[str, FeaturePyramid]
) -> Iterator[tuple[str, float]]:
    for name, expected in numbers.items():
        if match := _SAMPLED.fullmatch(name):
            view, what, level, step = match[1], match[2], int(match[3]), int(match[4])
            maps = pyramids[view].features if what == "features" else pyramids[view].confidences
            found = maps[level][0, :, ::step, ::step].numpy()
            same = found.shape == expected.shape
            yield name, float(np.abs(found - expected).max()) if same else math.inf


def _pose_difference(numbers: Mapping[str, NDArray[Any]], row: int, iteration: Iteration) -> float:
    return float(np.abs(iteration.T.numpy()[0] - numbers["iter_T"][row]).max())


def _cost_difference(numbers: Mapping[str, NDArray[Any]], row: int, iteration: Iteration) -> float:
    if "iter_cost" not in numbers:
        return math.nan
    return abs(float(iteration.at.plain_mean_cost) - float(numbers["iter_cost"][row]))
