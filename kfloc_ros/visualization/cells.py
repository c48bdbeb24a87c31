# SPDX-License-Identifier: Apache-2.0
"""Pictures of an image's cells for live viewers: scene coordinates, noise, NIS and flow, without axes, cells as
blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.fusion import NIS_THRESHOLD_95
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.types import SceneCoordinates

FLOW_CELL_PX = 8
NOISE_CELL_PX = 5
_CAPTION_PX = 22


def flow_view(result: CoarseResult) -> NDArray[np.uint8] | None:
    """Return the backward flow in colours, with the key in the corner; None after a reset."""
    picture = flow_picture(result.filtered.flow) if result.filtered is not None else None
    if picture is None:
        return None
    image = _blocks(picture, FLOW_CELL_PX)
    wheel = flow_wheel(max(min(image.shape[:2]) // 6, 16))
    image[-len(wheel) :, -len(wheel) :] = wheel
    return image


def noise_view(result: CoarseResult) -> NDArray[np.uint8] | None:
    """Return the standard deviations of measurement, process and posterior side by side, with equal colours; grey: no
    value.
    """
    filtered, measurement = result.filtered, result.measurement
    if filtered is None or measurement is None:
        return None
    prior = filtered.prior
    panels: list[tuple[str, torch.Tensor | None, torch.Tensor | None]] = [
        ("measurement", measurement.variance, measurement.valid),
        ("process", None if prior is None else prior.process_variance, None if prior is None else prior.valid),
        ("posterior", filtered.posterior.variance, filtered.posterior.valid),
    ]
    return np.concatenate([_panel(*panel, measurement.variance.shape) for panel in panels], axis=1)


def _panel(
    title: str, variance: torch.Tensor | None, valid: torch.Tensor | None, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    picture = sigma_picture(title, variance, valid)
    if picture is None:
        picture = CellPicture(title, np.full((*shape, 3), NO_VALUE, np.uint8))
        caption = f"{title}: none"
    else:
        assert variance is not None
        typical = 100 * float(variance.detach().float().clamp(min=0).sqrt().median())
        caption = f"{title}: median {typical:.1f} cm"
    image = _blocks(picture, NOISE_CELL_PX)
    strip = np.zeros((_CAPTION_PX, image.shape[1], 3), np.uint8)
    cv2.putText(strip, caption, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
    scale = SIGMA.rgb(np.geomspace(SIGMA.low, SIGMA.high, image.shape[1]))
    strip[-3:] = scale
    return np.concatenate([strip, image])


def _blocks(picture: CellPicture, cell_px: int) -> NDArray[np.uint8]:
    height, width = picture.rgb.shape[:2]
    return picture.enlarged(cell_px * width, cell_px * height)


NO_VALUE = (90, 90, 90)
"""Grey of a cell with no value or an unreliable one."""
MAX_FLOW_CELLS = 3.0
"""Length of flow, in cells, that has the full colour."""
MAX_FLOW_SIGMA_CELLS = 0.9
"""Standard deviation of flow, in cells, above which it is suppressed."""


@dataclass(frozen=True)
class Scale:
    """Mapping of numbers to colours, linear or logarithmic."""

    label: str
    low: float
    high: float
    palette: str = "viridis"
    """``viridis``, ``turbo``, ``grey`` or ``balance`` (blue, white in the middle, red)."""
    logarithmic: bool = False
    ticks: tuple[float, ...] = ()
    """Numbers to write beside the colours; empty: chosen by the drawing function."""

    def share(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return the position on the scale, 0 at ``low`` to 1 at ``high``; NaN stays NaN."""
        numbers, low, high = np.asarray(values, dtype=np.float64), self.low, self.high
        if self.logarithmic:
            with np.errstate(divide="ignore", invalid="ignore"):
                numbers, low, high = np.log(numbers), np.log(low), np.log(high)
        return np.asarray(np.clip((numbers - low) / (high - low), 0.0, 1.0))

    def rgb(self, values: ArrayLike) -> NDArray[np.uint8]:
        """Return the colours (..., 3) of numbers (...); grey for NaN."""
        share = self.share(values)
        known = np.isfinite(share)
        colours = palette(self.palette)[np.rint(255 * np.where(known, share, 0.0)).astype(np.intp)]
        colours[~known] = NO_VALUE
        return np.asarray(colours, dtype=np.uint8)


SIGMA = Scale("standard deviation per axis [cm]", 0.5, 100.0, logarithmic=True, ticks=(0.5, 1, 2, 5, 10, 20, 50, 100))
CERTAINTY = Scale("1 / standard deviation [1/m]", 1.0, 200.0, "grey", True, ticks=(1, 2, 5, 10, 20, 50, 100, 200))
"""Noise as KFNet draws it: bright where sure."""
RELIABILITY = Scale("reliability", 0.0, 1.0, "viridis", ticks=(0, 0.25, 0.5, 0.75, 1))


@dataclass(frozen=True, eq=False)
class CellPicture:
    """Picture of an image's cells."""

    title: str
    rgb: NDArray[np.uint8]
    """(h, w, 3), one pixel per cell."""
    scale: Scale | None = None
    """Scale of the colours, if they show one number."""

    def enlarged(self, width: int, height: int) -> NDArray[np.uint8]:
        """Return the picture (height, width, 3), cells as blocks."""
        return np.asarray(cv2.resize(self.rgb, (width, height), interpolation=cv2.INTER_NEAREST), dtype=np.uint8)


def sigma_picture(
    title: str, variance: torch.Tensor | None, valid: torch.Tensor | None = None, scale: Scale = SIGMA
) -> CellPicture | None:
    """Return the picture of standard deviations from variances (h, w) in square metres; None if there are none.

    Args:
        title: title of the picture.
        variance: (h, w) square metres.
        valid: (h, w) bool; other cells are grey.
        scale: :data:`SIGMA` (cm), or :data:`CERTAINTY` for their inverse.
    """
    if variance is None:
        return None
    sigma_m = np.sqrt(_numbers(variance, valid))
    values = 1.0 / np.maximum(sigma_m, 1e-6) if scale is CERTAINTY else 100.0 * sigma_m
    return CellPicture(title, scale.rgb(values), scale)


def nis_scale(threshold: float = NIS_THRESHOLD_95) -> Scale:
    """Return the colour scale of NIS. Blue: prior and measurement agree; white: at the threshold; red: they contradict
    each other.
    """
    ticks = tuple(round(threshold * factor, 3) for factor in (1 / 16, 1 / 4, 1, 4, 16))
    return Scale("normalized innovation squared", threshold / 16, threshold * 16, "balance", True, ticks)


def nis_picture(
    nis: torch.Tensor | None, valid: torch.Tensor | None = None, threshold: float = NIS_THRESHOLD_95
) -> CellPicture | None:
    """Return the picture of the normalized innovation squared (h, w) around its threshold; None if there was no
    prior.
    """
    if nis is None:
        return None
    scale = nis_scale(threshold)
    # a NIS of zero is below any logarithmic scale
    return CellPicture(
        "NIS: consistency of measurement and prior", scale.rgb(_numbers(nis, valid).clip(min=1e-6)), scale
    )


def reliability_picture(reliability: torch.Tensor) -> CellPicture:
    """Return the picture of the cells' reliability (h, w): the probability of a right match."""
    return CellPicture("reliability of the features", RELIABILITY.rgb(_numbers(reliability)), RELIABILITY)


def flow_picture(
    flow: Flow | None, max_sigma_cells: float = MAX_FLOW_SIGMA_CELLS, max_cells: float = MAX_FLOW_CELLS
) -> CellPicture | None:
    """Return the picture of the backward flow: hue is its direction, strength its length; grey if uncertain."""
    if flow is None:
        return None
    offset = flow.offset.detach().cpu().float().numpy()
    colours = flow_colours(offset, max_cells)
    colours[~trusted_flow(flow, max_sigma_cells)] = NO_VALUE
    return CellPicture("backward flow (grey: uncertain)", colours)


def trusted_flow(flow: Flow, max_sigma_cells: float = MAX_FLOW_SIGMA_CELLS) -> NDArray[np.bool_]:
    """Return (h, w): True where the flow passes its own test and its standard deviation is small."""
    sure = flow.valid & (flow.variance <= max_sigma_cells**2)
    return np.asarray(sure.detach().cpu().numpy(), dtype=bool)


def flow_colours(offset: NDArray[np.floating], max_cells: float = MAX_FLOW_CELLS) -> NDArray[np.uint8]:
    """Return RGB (..., 3) of vectors (2, ...): right is red, then clockwise yellow, green, blue; zero is white."""
    x, y = np.asarray(offset[0], dtype=np.float64), np.asarray(offset[1], dtype=np.float64)
    shape = x.shape
    hue = np.degrees(np.arctan2(y, x)) % 360.0 / 2.0
    strength = np.clip(np.hypot(x, y) / max_cells, 0.0, 1.0)
    hsv = np.stack([hue, 255 * strength, 255 - 55 * strength], axis=-1).astype(np.uint8).reshape(-1, 1, 3)
    if not hsv.size:
        return np.zeros((*shape, 3), np.uint8)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8).reshape(*shape, 3)


def flow_wheel(side: int = 64) -> NDArray[np.uint8]:
    """Return the key to :func:`flow_colours`, (side, side, 3): the colour of the vector from the centre to each
    pixel.
    """
    span = np.linspace(-1.0, 1.0, side) * MAX_FLOW_CELLS
    x, y = np.meshgrid(span, span)
    colours = flow_colours(np.stack([x, y]))
    colours[np.hypot(x, y) > MAX_FLOW_CELLS] = 255
    return colours


def coordinates_picture(
    coordinates: SceneCoordinates, bounds_m: Sequence[ArrayLike], title: str = "scene coordinates"
) -> CellPicture:
    """Return the picture of x, y, z in the map frame as red, green, blue, from the smallest to the largest corner of
    the map.
    """
    low, high = (np.array(corner, dtype=np.float64) for corner in bounds_m)
    points = coordinates.mean.detach().cpu().double().permute(1, 2, 0).numpy()
    share = np.clip((points - low) / np.maximum(high - low, 1e-6), 0.0, 1.0)
    known = coordinates.valid.cpu().numpy() & np.isfinite(share).all(axis=2)
    colours = np.rint(40 + 215 * np.where(known[..., None], share, 0.0)).astype(np.uint8)
    colours[~known] = NO_VALUE
    return CellPicture(title, colours)


@cache
def palette(name: str) -> NDArray[np.uint8]:
    """Return a colour table (256, 3), RGB."""
    steps = np.arange(256, dtype=np.uint8)[:, None]
    known = {"viridis": cv2.COLORMAP_VIRIDIS, "turbo": cv2.COLORMAP_TURBO}
    if name in known:
        return np.ascontiguousarray(np.asarray(cv2.applyColorMap(steps, known[name])).reshape(256, 3)[:, ::-1])
    if name == "grey":
        return np.repeat(steps, 3, axis=1)
    stops = np.array(
        [[33, 70, 160], [120, 170, 220], [245, 245, 245], [235, 140, 105], [165, 20, 30]], dtype=np.float64
    )
    places = np.linspace(0, 255, len(stops))
    table = np.stack([np.interp(np.arange(256), places, stops[:, k]) for k in range(3)], axis=1)
    return np.asarray(np.rint(table), dtype=np.uint8)


def _numbers(values: torch.Tensor, valid: torch.Tensor | None = None) -> NDArray[np.float64]:
    """Return values as float64, NaN where invalid."""
    numbers = values.detach().cpu().double().numpy().copy()
    if valid is not None:
        numbers[~valid.cpu().numpy()] = np.nan
    return np.asarray(numbers, dtype=np.float64)
