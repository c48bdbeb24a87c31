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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.device import computes_bfloat16
from kfloc_ros.features.backbone import COARSE_CHANNELS, COARSE_STRIDE, CONTEXT_CHANNELS, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix
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
        h = F.relu(self.input((inputs - self.input_mean) * self.input_scale))
        for first, second in zip(self.first, self.second, strict=True):
            h = F.relu(h + second(F.relu(first(h))))
        # the last layer stays in float32: bfloat16 would round a coordinate at 3 m to a centimetre
        with torch.autocast(h.device.type, enabled=False):
            out = self.output(h.float())
        return out[..., :3] + self.centre, out[..., 3].clamp(math.log(MIN_SCALE_M), math.log(MAX_SCALE_M))

    @torch.inference_mode()
    def measure(
        self, features: BackboneFeatures, variance_scale: float = 1.0, cells: torch.Tensor | None = None
    ) -> SceneCoordinates:
        """Return scene coordinates of the first image of a batch.

        Args:
            features: backbone features of one image.
            variance_scale: from the map's calibration on views that the head was not trained on.
            cells: (h, w) bool, the cells to measure; the others are invalid. None: all.
        """
        inputs = head_input(features)[0]
        with quick_matmul(inputs.device):
            mean, log_scale = self(inputs if cells is None else inputs[cells])
        variance = variance_scale * laplace_variance(log_scale)
        valid = torch.isfinite(mean).all(-1) & torch.isfinite(variance)
        return _on_grid(mean, variance, valid, cells)


def _on_grid(
    mean: torch.Tensor, variance: torch.Tensor, valid: torch.Tensor, cells: torch.Tensor | None
) -> SceneCoordinates:
    """Return scene coordinates of all cells (h, w), or of the cells (h, w) that are true and were measured in order."""
    if cells is not None:
        points = mean.new_zeros(*cells.shape, 3)
        spread = variance.new_full(cells.shape, 4.0 * MAX_SCALE_M**2)
        points[cells], spread[cells] = mean, variance
        measured = torch.zeros_like(cells)
        measured[cells] = valid
        mean, variance, valid = points, spread, measured
    return SceneCoordinates(mean.permute(2, 0, 1).contiguous(), variance, valid, COARSE_STRIDE)


def laplace_variance(log_scale: torch.Tensor) -> torch.Tensor:
    """Return the variance per axis, m^2, of the isotropic Laplace density in 3-D: E|e|^2 = 12 b^2."""
    return 4.0 * (2.0 * log_scale).exp()


def laplace_nll(error_m: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood, up to a constant, of error lengths |e| (N,) at log b (N,)."""
    return 3.0 * log_scale + error_m * (-log_scale).exp()


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

    @torch.inference_mode()
    def measure(
        self, features: BackboneFeatures, variance_scale: float = 1.0, cells: torch.Tensor | None = None
    ) -> SceneCoordinates:
        """Return scene coordinates of the first image of a batch, by each cell's most certain head.

        The arguments are those of :meth:`SCoordNet.measure`.
        """
        inputs = head_input(features)[0]
        with quick_matmul(inputs.device):
            outputs = [head(inputs if cells is None else inputs[cells]) for head in self.heads]
        mean = torch.stack([m for m, _ in outputs])
        variance = variance_scale * laplace_variance(torch.stack([log_scale for _, log_scale in outputs]))
        usable = torch.isfinite(mean).all(-1) & torch.isfinite(variance)
        most_certain = torch.where(usable, variance, torch.inf).argmin(dim=0, keepdim=True)
        best = mean.gather(0, most_certain[..., None].expand(1, *mean.shape[1:]))[0]
        return _on_grid(best, variance.gather(0, most_certain)[0], usable.gather(0, most_certain)[0], cells)


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


def quantized(head: Head) -> Head:
    """Return a copy whose residual blocks compute in int8: weights by channel, activations by image.

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


def measure(
    head: Head,
    features: BackboneFeatures,
    calibration: MeasurementCalibration,
    cells: torch.Tensor | None = None,
) -> SceneCoordinates:
    """Return scene coordinates of the first image of a batch, with calibrated variances; see :meth:`SCoordNet.measure`.

    Cells of one colour of a chessboard are enough for the roughness.
    """
    measured = head.measure(features, calibration.measurement_variance_scale, cells)
    return measured if calibration.roughness is None else calibration.roughness.applied(measured)


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


def quick_matmul(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which layers compute in bfloat16 if the processor does so natively, else as usual.

    It is three times as fast on a CPU with native bfloat16. The error is about 4 mm in a scene coordinate, whose own
    error is 2 cm or more.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if computes_bfloat16(device) else nullcontext()
