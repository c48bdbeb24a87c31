# SPDX-License-Identifier: Apache-2.0
"""SCoordNet of the fast family: a residual per-cell head on the backbone, one per map.

Its likelihood is an isotropic Laplace density in space, p(e) ~ exp(-|e| / b) / b^3, which tolerates cells that look
alike; its variance per axis is 4 b^2.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn

from kfloc_ros.device import quick_matmul, with_packed_layers
from kfloc_ros.features.backbone import COARSE_CHANNELS, COARSE_STRIDE, CONTEXT_CHANNELS, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.jobs import HELPERS, SharedWork
from kfloc_ros.types import SceneCoordinates

INPUT_CHANNELS = COARSE_CHANNELS + CONTEXT_CHANNELS
MIN_SCALE_M = 2e-3
"""Smallest Laplace scale b of the head's output."""
MAX_SCALE_M = 20.0


def head_input(features: BackboneFeatures) -> torch.Tensor:
    """Return the head's input (B, h, w, 192): features of each cell and of its surroundings."""
    return torch.cat([features.coarse, features.context], dim=1).permute(0, 2, 3, 1)


class SCoordNet(nn.Module):
    """Per-cell regression of a scene coordinate and the scale of its error.

    Args:
        width: hidden channels.
        blocks: residual blocks of two layers each.
    """

    def __init__(self, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        self.input = nn.Linear(INPUT_CHANNELS, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.output = nn.Linear(width, 4)
        self.register_buffer("input_mean", torch.zeros(INPUT_CHANNELS))
        self.register_buffer("input_scale", torch.ones(INPUT_CHANNELS))
        self.register_buffer("centre", torch.zeros(3))

    input_mean: torch.Tensor
    input_scale: torch.Tensor
    centre: torch.Tensor

    def normalize_with(self, inputs: torch.Tensor, coordinates: torch.Tensor) -> None:
        """Fit the input whitening and the map's centre to samples (N, 192) and (N, 3)."""
        self.input_mean.copy_(inputs.mean(0))
        self.input_scale.copy_(1.0 / (inputs.std(0) + 1e-3))
        self.centre.copy_(coordinates.mean(0))

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scene coordinates (..., 3) in metres, map frame, and log b (...), of cells (..., 192)."""
        h = self.input((inputs - self.input_mean) * self.input_scale).relu_()
        for first, second in zip(self.first, self.second, strict=True):
            h = (h + second(first(h).relu_())).relu_()
        # the last layer stays in float32: bfloat16 would round a coordinate at 3 m to a centimetre
        with torch.autocast(h.device.type, enabled=False):
            out = self.output(h.float())
        return out[..., :3] + self.centre, out[..., 3].clamp(math.log(MIN_SCALE_M), math.log(MAX_SCALE_M))

    def regress(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what :meth:`forward` returns of cells (n, 192), in the precision that the processor is fast in."""
        with quick_matmul(inputs.device):
            points, log_scale = self(inputs)
        return points, log_scale


def laplace_variance(log_scale: torch.Tensor, axes: int = 3) -> torch.Tensor:
    """Return the variance per axis, in units of b^2, of the isotropic Laplace density: E|e|^2 = n (n + 1) b^2."""
    return (axes + 1.0) * (2.0 * log_scale).exp()


def laplace_nll(error: torch.Tensor, log_scale: torch.Tensor, axes: int = 3) -> torch.Tensor:
    """Return the negative log-likelihood, up to a constant, of error lengths |e| (N,) at log b (N,)."""
    return axes * log_scale + error * (-log_scale).exp()


MAX_HEADS = 8
"""Largest number of heads; each costs a pass over the cells of every frame."""


class SCoordNetEnsemble(nn.Module):
    """Ensemble of heads of the same size for one map.

    Args:
        heads: two or more, of the same width and number of blocks.

    Raises:
        ValueError: the heads have different sizes.
    """

    def __init__(self, heads: Sequence[SCoordNet]) -> None:
        super().__init__()
        self.width, self.blocks = heads[0].width, heads[0].blocks
        if any((head.width, head.blocks) != (self.width, self.blocks) for head in heads):
            raise ValueError("the heads of one map must have the same size")
        self.heads = nn.ModuleList(heads)

    def regress(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scene coordinates (n, 3) and log b (n,) of cells (n, 192), by each cell's most certain head."""
        found = [head.regress(inputs) for head in heads_of(self)]
        mean, log_scale = (torch.stack(items) for items in zip(*found, strict=True))
        usable = torch.isfinite(mean).all(-1) & torch.isfinite(log_scale)
        best = torch.where(usable, log_scale, torch.inf).argmin(dim=0, keepdim=True)
        return mean.gather(0, best[..., None].expand(1, *mean.shape[1:]))[0], log_scale.gather(0, best)[0]


Head = SCoordNet | SCoordNetEnsemble
"""Head of a map: a single one, or an ensemble."""


def heads_of(head: Head) -> tuple[SCoordNet, ...]:
    """Return the single heads."""
    if isinstance(head, SCoordNet):
        return (head,)
    return tuple(item for item in head.heads if isinstance(item, SCoordNet))


def ensemble_of(heads: Sequence[SCoordNet]) -> Head:
    """Return the heads as one; a single head is returned unchanged."""
    return heads[0] if len(heads) == 1 else SCoordNetEnsemble(heads)


def with_variance_scale(head: SCoordNet, scale: float) -> SCoordNet:
    """Return a copy whose variance is larger by a factor, so that heads of different calibration are comparable."""
    scaled = copy.deepcopy(head)
    with torch.no_grad():
        scaled.output.bias[3] += 0.5 * math.log(scale)
    return scaled


def transformed_head(head: SCoordNet, T: Matrix) -> SCoordNet:
    """Return a copy that regresses in another frame: each point p becomes T p, T (4, 4)."""
    R, t = (torch.from_numpy(part.copy()) for part in (T[:3, :3], T[:3, 3]))
    result = copy.deepcopy(head)
    with torch.no_grad():
        result.output.weight[:3] = (R @ head.output.weight[:3].double()).float()
        result.output.bias[:3] = (R @ head.output.bias[:3].double()).float()
        result.centre.copy_((R @ head.centre.double() + t).float())
    return result


def packed(head: Head) -> Head:
    """Return a copy whose hidden layers are packed for products in bfloat16; the head itself without bfloat16."""
    return with_packed_layers(head, {name for name, _ in head.named_modules() if not name.endswith("output")})


def quantized(head: Head) -> Head:
    """Return a copy whose residual blocks compute in int8: weights by channel, activations by piece of the image.

    It takes half the time of float32 where the processor has instructions for it (VNNI). The error is about 5 mm in a
    scene coordinate, whose own error is 2 cm or more. The first layer stays in float32, since its inputs differ much in
    scale: with it in int8 the error is three times as large.
    """
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    names = {name for name, _ in head.named_modules() if set(name.split(".")[:-1]) & {"first", "second"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a successor in another package, which no installation of torch brings
        convert: Callable[..., Head] = quantize_dynamic
        result = convert(copy.deepcopy(head).eval(), dict.fromkeys(names, per_channel_dynamic_qconfig), torch.qint8)
    return result


REACH_CELLS = 2
"""Distance from a cell to the two that it is compared with. Neighbours closer than that are regressed from mostly the
same pixels, so their errors are similar."""
STEPS = ((0, REACH_CELLS), (REACH_CELLS, 0), (REACH_CELLS, REACH_CELLS), (REACH_CELLS, -REACH_CELLS))


@dataclass(frozen=True)
class RoughnessScale:
    """Calibration of roughness for one map, on views that its head was not trained on, as they are and turned."""

    usual_m: float
    """Roughness of views among the mapped ones; smoother views are not taken to be better."""
    power: float
    """Exponent with which variances grow with the roughness of a view."""

    def __post_init__(self) -> None:
        for name in ("usual_m", "power"):
            value = getattr(self, name)
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"the roughness's '{name}' must be a positive number, not {value!r}")

    def factor(self, roughness_m: torch.Tensor) -> torch.Tensor:
        """Return the factor on the variances of a view of this roughness; 1 where the roughness is unknown."""
        return torch.nan_to_num((roughness_m / self.usual_m).clamp(min=1.0) ** self.power, nan=1.0)

    def applied(self, measured: SceneCoordinates) -> SceneCoordinates:
        """Return the coordinates with the variances of all cells scaled by one factor."""
        return replace(measured, variance=measured.variance * self.factor(roughness_m(measured)))


class MeasurementCalibration(Protocol):
    """Calibration values of a map for its head's variances."""

    @property
    def measurement_variance_scale(self) -> float: ...

    @property
    def roughness(self) -> RoughnessScale | None: ...


@dataclass(frozen=True)
class _Uncalibrated:
    measurement_variance_scale: float = 1.0
    roughness: RoughnessScale | None = None


UNCALIBRATED = _Uncalibrated()
"""Calibration that leaves the head's variances as they are."""

PIECE_CELLS = 600
"""Largest number of cells that are regressed at a time; a thread's cache holds their products."""


class CellRegression:
    """Regression of scene coordinates of the first image of a batch, in pieces that several threads share.

    On a processor a piece never reaches across the four quarters of the cells (every other cell of every other row), so
    that it is the same whatever else is measured: products in bfloat16 depend on the number of rows.

    Args:
        head: head of the map.
        features: backbone features of one image.
        calibration: of the map, on views that the head was not trained on.
        cells: (h, w) bool, cells to begin with; None: all.
    """

    def __init__(
        self,
        head: Head,
        features: BackboneFeatures,
        calibration: MeasurementCalibration,
        cells: torch.Tensor | None = None,
    ) -> None:
        self._head, self._calibration = head, calibration
        self._grids = [grid[0].permute(1, 2, 0).flatten(0, 1) for grid in (features.coarse, features.context)]
        count, (h, w) = len(self._grids[0]), features.coarse.shape[2:]
        self._mean, self._log_scale = self._grids[0].new_zeros(count, 3), self._grids[0].new_zeros(count)
        self._begun = torch.zeros(h, w, dtype=torch.bool, device=self._mean.device)
        self._begin(torch.ones_like(self._begun) if cells is None else cells)

    def help(self) -> None:
        """Regress pieces until none is left to take; in another thread than :meth:`coordinates`."""
        self._work.help()

    @property
    def helped_s(self) -> float:
        """Time that :meth:`help` spent on the last pieces, in seconds."""
        return self._work.helped_s

    @torch.inference_mode()
    def coordinates(self, cells: torch.Tensor | None = None) -> SceneCoordinates:
        """Return scene coordinates of cells (h, w); those that were not begun are regressed now. None: all cells.

        The other cells are invalid.
        """
        self._work.finish()
        missing = ~self._begun if cells is None else cells & ~self._begun
        if bool(missing.any()):
            self._begin(missing)
            HELPERS.enlist(self._work.help)
            self._work.finish()
        h, w = self._begun.shape
        mean = self._mean.clone().reshape(h, w, 3)
        variance = self._calibration.measurement_variance_scale * laplace_variance(self._log_scale).reshape(h, w)
        valid = torch.isfinite(mean).all(-1) & torch.isfinite(variance)
        if cells is not None:
            others = ~cells
            mean.masked_fill_(others[..., None], 0.0)
            variance.masked_fill_(others, 4.0 * MAX_SCALE_M**2)
            valid &= cells
        measured = SceneCoordinates(mean.permute(2, 0, 1).contiguous(), variance, valid, COARSE_STRIDE)
        roughness = self._calibration.roughness
        return measured if roughness is None else roughness.applied(measured)

    def _begin(self, cells: torch.Tensor) -> None:
        """Make pieces of cells (h, w) that were not begun before."""
        self._begun |= cells
        groups, largest = [cells], len(self._mean)
        if cells.device.type == "cpu":
            row, column = (torch.arange(size) % 2 for size in cells.shape)
            quarter = 2 * row[:, None] + column
            groups, largest = [cells & (quarter == number) for number in range(4)], PIECE_CELLS
        indices = [group.flatten().nonzero()[:, 0] for group in groups]
        pieces = [
            partial(self._regress, piece)
            for index in indices
            if len(index)
            for piece in index.tensor_split(-(-len(index) // largest))
        ]
        self._work = SharedWork(pieces)

    @torch.inference_mode()
    def _regress(self, index: torch.Tensor) -> None:
        inputs = torch.cat([grid[index] for grid in self._grids], dim=1)
        self._mean[index], self._log_scale[index] = self._head.regress(inputs)


def measure(
    head: Head,
    features: BackboneFeatures,
    calibration: MeasurementCalibration = UNCALIBRATED,
    cells: torch.Tensor | None = None,
) -> SceneCoordinates:
    """Return scene coordinates of the first image of a batch, with calibrated variances; see :class:`CellRegression`.

    Cells of one colour of a chessboard are enough for the roughness.
    """
    return CellRegression(head, features, calibration, cells).coordinates(cells)


def roughness_m(measured: SceneCoordinates) -> torch.Tensor:
    """Return the roughness of scene coordinates, a scalar in metres; NaN if no cell can be compared.

    It is the median over cells of the distance to the middle between two other cells, in four directions. It is
    expressed as the standard deviation, per axis, of independent cell errors that would make a flat surface equally
    rough (a second difference has six times their variance).
    """
    r = REACH_CELLS
    _, h, w = measured.mean.shape
    if min(h, w) <= 2 * r:
        return measured.mean.new_tensor(math.nan)
    centre = 2.0 * measured.mean[:, r : h - r, r : w - r]
    squared = torch.zeros_like(centre)
    for dy, dx in STEPS:
        after = measured.mean[:, r + dy : h - r + dy, r + dx : w - r + dx]
        before = measured.mean[:, r - dy : h - r - dy, r - dx : w - r - dx]
        squared += (after + before - centre).square()
    rough = squared.sum(0) / (3 * len(STEPS) * 6)
    usable = measured.valid[r : h - r, r : w - r] & rough.isfinite()
    return rough[usable].sqrt().median() if bool(usable.any()) else rough.new_tensor(math.nan)
