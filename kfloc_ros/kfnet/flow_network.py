# SPDX-License-Identifier: Apache-2.0
"""OFlowNet of the fast family: a small network that reads flow and its uncertainty from the cost volume.

The first half works on every cell alone: its 25 scores become a match distribution with a mean and a certainty. The
second half works on every cell with the 24 around it: their flows, relative to its own, become the weights of a mean
over all 25, a correction, the scale of the error, and whether the point is visible in the previous image. The inputs
are differences of flows, so the result does not depend on the camera's speed, and cosines, so it does not depend on the
place. One set of weights serves every map.

The likelihood of a flow error e is an isotropic Laplace density in the plane, p(e) ~ exp(-|e| / b) / b^2, whose
variance per axis is 3 b^2; a map's calibration scales it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from kfloc_ros.device import runs_compiled, with_packed_layers
from kfloc_ros.errors import WeightsError
from kfloc_ros.files import save_tensors
from kfloc_ros.kfnet.filter import FlowFunction
from kfloc_ros.kfnet.flow import WINDOW_CELLS, CostWindow, Flow, backward_flow, cost_window, ends_inside, window_offsets
from kfloc_ros.kfnet.scoordnet import laplace_variance

FORMAT, FORMAT_VERSION = "kfloc_flow", "1"
WEIGHTS_FILE = Path(__file__).parent / "weights" / "oflownet_fast.safetensors"
NEIGHBOURS = 5
"""Side of the square of cells that the second half reads."""
MAX_FLOW_DIFFERENCE = 3.0
"""Largest difference between the flows of neighbours that the second half sees, in cells; larger ones are clipped."""
MIN_SCALE, MAX_SCALE = 5e-3, 8.0
"""Limits of the Laplace scale b, in cells."""
TEMPERATURE = 0.03
"""Initial temperature of the match distribution."""
_STATES = 4


@dataclass(frozen=True, eq=False)
class FlowReading:
    """Output of the network for a batch of frame pairs."""

    offset: torch.Tensor
    """(B, 2, h, w) cells, x then y."""
    log_scale: torch.Tensor
    """(B, h, w) log b, b in cells."""
    visible: torch.Tensor
    """(B, h, w) logit of the point being visible in the previous image."""


class FlowNetwork(nn.Module):
    """Network from cost windows to flow; 15 thousand parameters.

    Args:
        width: hidden channels of both halves.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.width = width
        self.cell = nn.Sequential(nn.Linear(2 * WINDOW_CELLS + 2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.cell_out = nn.Linear(width, WINDOW_CELLS + _STATES)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        around = NEIGHBOURS * NEIGHBOURS
        self.join = nn.Sequential(
            nn.Linear(around * (2 + _STATES), width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.join_out = nn.Linear(width, around + 4)
        with torch.no_grad():
            for layer in (self.cell_out, self.join_out):
                layer.weight.mul_(0.1)
                layer.bias.zero_()
            self.join_out.bias[around // 2] = 2.0  # initially a cell's own flow has the largest weight
            self.join_out.bias[around + 2] = math.log(0.2)

    def forward(self, windows: list[CostWindow]) -> FlowReading:
        """Return flow, log scale and visibility of windows with equal grids."""
        h, w = windows[0].grid
        scores = torch.cat([window.scores for window in windows])
        inside = torch.cat([window.inside for window in windows])
        base = torch.stack([window.base for window in windows]).to(scores.dtype)
        flow, state = self._cells(scores, inside)
        flow = flow.reshape(len(windows), h, w, 2).permute(0, 3, 1, 2) + base
        return self._joined(flow, state.reshape(len(windows), h, w, _STATES).permute(0, 3, 1, 2))

    def _cells(self, scores: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the flow (n, 2) relative to the window's centre, and the state (n, _STATES) of each cell."""
        known = torch.where(inside, scores, torch.full_like(scores, -1.0))
        best = known.amax(1, keepdim=True)
        mean = known.mean(1, keepdim=True)
        relative = (4.0 * (known - best)).clamp(min=-4.0)
        out = self.cell_out(self.cell(torch.cat([relative, inside.to(scores.dtype), best, mean], dim=1)).float())
        logits = (known - best) * (-self.log_temperature).exp() + out[:, :WINDOW_CELLS]
        probability = logits.masked_fill(~inside, -1e4).softmax(dim=1)
        return probability @ window_offsets(scores.device).to(scores.dtype), out[:, WINDOW_CELLS:]

    def _joined(self, flow: torch.Tensor, state: torch.Tensor) -> FlowReading:
        B, _, h, w = flow.shape
        n = NEIGHBOURS * NEIGHBOURS
        around = _neighbours(torch.cat([flow, state], dim=1))  # (B, h w, n, 2 + states)
        flows = around[..., :2]
        own = flow.permute(0, 2, 3, 1).reshape(B, h * w, 1, 2)
        apart = flows - own
        clipped = apart.clamp(-MAX_FLOW_DIFFERENCE, MAX_FLOW_DIFFERENCE)
        out = self.join_out(self.join(torch.cat([clipped, around[..., 2:]], dim=-1).flatten(2)).float())
        weights = out[..., :n].softmax(dim=-1)
        offset = own[:, :, 0] + (weights[..., None] * apart).sum(2) + 0.5 * out[..., n : n + 2]
        log_scale = out[..., n + 2].clamp(math.log(MIN_SCALE), math.log(MAX_SCALE))
        return FlowReading(
            offset.transpose(1, 2).reshape(B, 2, h, w), log_scale.reshape(B, h, w), out[..., n + 3].reshape(B, h, w)
        )

    def _read(self, window: CostWindow) -> FlowReading:
        """Return what :meth:`forward` returns of one window, by compiled loops around the layers."""
        from kfloc_ros.kfnet import kernels

        (h, w), n = window.grid, NEIGHBOURS * NEIGHBOURS
        inputs, relative = torch.empty(h * w, 2 * WINDOW_CELLS + 2), torch.empty(h * w, WINDOW_CELLS)
        kernels.cell_inputs(window.scores.numpy(), window.inside.numpy(), inputs.numpy(), relative.numpy())
        out = self.cell_out(self.cell(inputs).float())
        logits = torch.add(out[:, :WINDOW_CELLS], relative, alpha=math.exp(-float(self.log_temperature)))
        probability = logits.masked_fill_(~window.inside, -1e4).softmax(dim=1)
        flow = (probability @ window_offsets().float()).reshape(h, w, 2) + window.base.permute(1, 2, 0)
        state = out[:, WINDOW_CELLS:].reshape(h, w, _STATES).contiguous()
        around = torch.empty(h * w, n * (2 + _STATES))
        kernels.neighbour_inputs(flow.numpy(), state.numpy(), NEIGHBOURS, MAX_FLOW_DIFFERENCE, around.numpy())
        out = self.join_out(self.join(around).float())
        offset = torch.empty(1, 2, h, w)
        weights, correction = out[:, :n].softmax(dim=1), out[:, n : n + 2].contiguous()
        kernels.neighbour_mean(flow.numpy(), weights.numpy(), correction.numpy(), NEIGHBOURS, offset[0].numpy())
        log_scale = out[:, n + 2].clamp(math.log(MIN_SCALE), math.log(MAX_SCALE))
        return FlowReading(offset, log_scale.reshape(1, h, w), out[:, n + 3].reshape(1, h, w))

    @torch.inference_mode()
    def flow(self, current: torch.Tensor, previous: torch.Tensor) -> Flow:
        """Return the flow from L2-normalised backbone features (C, h, w) of two frames."""
        window = cost_window(current, previous)
        read = self._read(window) if runs_compiled(window.scores) else self([window])
        offset = read.offset[0]
        valid = (read.visible[0] > 0) & ends_inside(offset) & ~window.at_edge
        return Flow(offset, laplace_variance(read.log_scale[0], axes=2), valid, window.at_edge)


def _neighbours(values: torch.Tensor) -> torch.Tensor:
    """Return (B, h w, n, C) of values (B, C, h, w): each cell's square of neighbours; the border repeats."""
    B, C, h, w = values.shape
    r = NEIGHBOURS // 2
    padded = F.pad(values, (r, r, r, r), mode="replicate")
    shifted = [padded[:, :, dy : dy + h, dx : dx + w] for dy in range(NEIGHBOURS) for dx in range(NEIGHBOURS)]
    return torch.stack(shifted, dim=1).reshape(B, len(shifted), C, h * w).permute(0, 3, 1, 2)


def save_flow_network(path: Path, network: FlowNetwork) -> None:
    """Write the weights as safetensors."""
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, "width": str(network.width)}
    save_tensors(network.state_dict(), path, metadata)


def load_flow_network(path: Path = WEIGHTS_FILE) -> FlowNetwork:
    """Read weights, by default those of this package, in evaluation mode on the CPU.

    Raises:
        WeightsError: the file is missing, damaged, or not one of flow weights.
    """
    if not path.is_file():
        raise WeightsError(f"There is no file '{path}' with the weights of the fast family's OFlowNet.")
    try:
        with safe_open(path, "pt") as stream:
            metadata: dict[str, str] = stream.metadata() or {}
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, FORMAT_VERSION):
            raise WeightsError(f"'{path}' holds no weights of the fast family's OFlowNet that this version reads.")
        network = FlowNetwork(min(int(metadata["width"]), 1024))
        network.load_state_dict(load_file(path))
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise WeightsError(f"'{path}' is damaged: {error}.") from error
    return network.eval()


@cache
def shipped_flow_network(device: torch.device) -> FlowNetwork:
    """Return the network of this package on a device, its hidden layers in bfloat16 where the processor computes that.

    All callers share it. The precision moves a flow by 1e-4 cells in the median, by up to 6e-3, and scales by 0.3 %.
    """
    network = load_flow_network().to(device).requires_grad_(False)
    # the last layers stay in float32, as the scene-coordinate head's does
    return with_packed_layers(network, {"cell.0", "cell.2", "join.0", "join.2"})


LEARNED_FLOOR_M2 = 0.002**2
"""Floor of the process noise of the network's flow, m^2. The network's own noise says where flow is worse; the
centimetre of floor that the cost volume needs would hide that."""


STEP_CORRELATION_FACTOR = 3.0
"""Factor on the noise that one step of the network's flow adds. Errors of successive steps are correlated (the same
edge, the same texture), so they add up faster than independent ones. A correlation of r between neighbours makes the
variance of a long sum (1 + r) / (1 - r) times as large, and r is about a half."""


class FlowCalibration(Protocol):
    """Calibration values of a map for both flows."""

    @property
    def flow_temperature(self) -> float: ...

    @property
    def process_scale(self) -> float: ...

    @property
    def process_floor_m2(self) -> float: ...

    @property
    def learned_process_scale(self) -> float | None: ...


@dataclass(frozen=True)
class MapFlow:
    """Flow function of one map, and its process noise."""

    flow: FlowFunction
    process_scale: float
    process_floor_m2: float
    """Process variance that is always added, m^2."""


def flow_of(calibration: FlowCalibration, device: torch.device) -> MapFlow:
    """Return the network's flow, or the cost volume's if the map has no process noise for the network's."""
    scale = calibration.learned_process_scale
    if scale is not None:
        flow = shipped_flow_network(device).flow
        return MapFlow(flow, STEP_CORRELATION_FACTOR * scale, STEP_CORRELATION_FACTOR * LEARNED_FLOOR_M2)
    return cost_volume_flow(calibration)


def cost_volume_flow(calibration: FlowCalibration) -> MapFlow:
    """Return the flow that a soft-argmax reads from the cost volume, without trained weights."""
    flow = partial(backward_flow, temperature=calibration.flow_temperature)
    return MapFlow(flow, calibration.process_scale, calibration.process_floor_m2)
