# SPDX-License-Identifier: Apache-2.0
"""Procedural materials: plaster, wood, tiles, cloth, cardboard.

A painter makes the picture of one surface: ``painter(rng, width, height, texels_per_m)`` returns (height, width, 3)
uint8 RGB reflectance, sRGB-encoded. Every painter has structure from centimetres down to single texels, as real
surfaces have, so that features exist near and far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Picture: TypeAlias = NDArray[np.uint8]
Field: TypeAlias = NDArray[np.float32]
Color: TypeAlias = tuple[int, int, int]
Painter: TypeAlias = Callable[[np.random.Generator, int, int, float], Picture]


def fractal_noise(
    rng: np.random.Generator, width: int, height: int, cell_px: tuple[float, float], octaves: int, gain: float = 0.55
) -> Field:
    """Return (height, width) noise of unit standard deviation and zero mean.

    ``cell_px`` is the size (across, down) of the coarsest blobs; every octave halves it and scales it by ``gain``.
    """
    total = np.zeros((height, width), np.float32)
    across, down = cell_px
    amplitude = 1.0
    for _ in range(octaves):
        columns, rows = max(2, round(width / across) + 1), max(2, round(height / down) + 1)
        grid = rng.standard_normal((min(rows, height), min(columns, width)), dtype=np.float32)
        total += amplitude * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        across, down, amplitude = max(1.0, across / 2), max(1.0, down / 2), amplitude * gain
    deviation = float(total.std())
    return np.asarray((total - total.mean()) / max(deviation, 1e-6), dtype=np.float32)


def tint(color: Color, brightness: Field) -> Picture:
    """Return a colour modulated by ``brightness`` (height, width), in shares of full white; 0 is unchanged."""
    values = np.asarray(color, np.float32) + 255.0 * brightness[..., None]
    return np.clip(values, 0, 255).astype(np.uint8)


def mix(first: Color, second: Color, share: Field) -> Picture:
    """Return a blend of two colours; ``share`` of the second, (height, width), is clipped to 0..1."""
    share = np.clip(share, 0, 1)[..., None]
    return (np.asarray(first, np.float32) * (1 - share) + np.asarray(second, np.float32) * share).astype(np.uint8)


def plain(color: Color, contrast: float = 0.004) -> Painter:
    """Painter of a painted surface with almost no structure, such as a blank wall."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        cell = 0.6 * texels_per_m
        return tint(color, contrast * fractal_noise(rng, width, height, (cell, cell), 6, 0.8))

    return paint


def plaster(color: Color) -> Painter:
    """Painter of a rough wall with stains, scratches and roller marks."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        cell = 0.5 * texels_per_m
        grain = 0.022 * fractal_noise(rng, width, height, (cell, cell), 8, 0.8)
        picture = tint(color, grain)
        for _ in range(int(3 * width * height / texels_per_m**2)):
            start = np.array([rng.integers(width), rng.integers(height)])
            end = start + rng.normal(0, 0.12 * texels_per_m, 2).astype(int)
            dark = int(rng.integers(12, 45))
            shade = tuple(int(c) - dark for c in color)
            cv2.line(picture, start.tolist(), end.tolist(), shade, int(rng.integers(1, 3)), cv2.LINE_AA)
        return picture

    return paint


def wood(color: Color, *, plank_m: float = 0.0, upright: bool = False) -> Painter:
    """Painter of wood with grain along the picture's width (or height), rays, knots and optional planks."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        if upright:
            return np.ascontiguousarray(_wood(rng, height, width, texels_per_m, color, plank_m).transpose(1, 0, 2))
        return _wood(rng, width, height, texels_per_m, color, plank_m)

    return paint


def _wood(
    rng: np.random.Generator, width: int, height: int, texels_per_m: float, color: Color, plank_m: float
) -> Picture:
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    warp = fractal_noise(rng, width, height, (0.5 * texels_per_m, 0.05 * texels_per_m), 3)
    for _ in range(int(2 + 5 * width * height / texels_per_m**2)):
        cx, cy, size = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.01, 0.03) * texels_per_m
        warp += 3.0 * np.exp(-(((x - cx) / (3 * size)) ** 2) - ((y - cy) / size) ** 2)
    rings = np.sin(2 * np.pi * (y / (0.022 * texels_per_m) + 0.8 * warp))
    fibres = fractal_noise(rng, width, height, (0.12 * texels_per_m, max(1.0, 0.004 * texels_per_m)), 3, 0.8)
    brightness = 0.05 * rings + 0.035 * fibres
    if plank_m > 0:
        brightness = brightness + _planks(rng, width, height, texels_per_m, plank_m)
    return tint(color, brightness)


def _planks(rng: np.random.Generator, width: int, height: int, texels_per_m: float, plank_m: float) -> Field:
    brightness = np.zeros((height, width), np.float32)
    plank, joint = plank_m * texels_per_m, max(1, round(0.003 * texels_per_m))
    for row in range(int(np.ceil(height / plank))):
        top, bottom = int(row * plank), min(height, int((row + 1) * plank))
        ends = np.cumsum(rng.uniform(0.6, 1.4, 12) * texels_per_m) - 0.5 * texels_per_m
        for left, right in zip([0.0, *ends], [*ends, float(width)], strict=True):
            if right > left:
                brightness[top:bottom, max(0, int(left)) : int(right)] += rng.normal(0, 0.05)
                brightness[top:bottom, max(0, int(right) - joint) : max(0, int(right))] = -0.35
        brightness[top : top + joint] = -0.35
    return brightness


def tiles(color: Color, joint: Color, size_m: float, *, accent: Color | None = None, wear: float = 0.02) -> Painter:
    """Painter of square tiles, equal except for a little wear; ``accent`` puts the same ornament on each of them."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        size = max(4, round(size_m * texels_per_m))
        one = tint(color, 0.015 * fractal_noise(rng, size, size, (size / 2, size / 2), 5, 0.8))
        if accent is not None:
            middle, across = (size // 2, size // 2), max(1, size // 40)
            cv2.circle(one, middle, int(0.34 * size), accent, across, cv2.LINE_AA)
            cv2.ellipse(one, middle, (int(0.42 * size), int(0.13 * size)), 45, 0, 360, accent, across, cv2.LINE_AA)
            cv2.ellipse(one, middle, (int(0.42 * size), int(0.13 * size)), 135, 0, 360, accent, across, cv2.LINE_AA)
            cv2.circle(one, middle, int(0.08 * size), accent, -1, cv2.LINE_AA)
        cv2.rectangle(one, (0, 0), (size - 1, size - 1), joint, max(1, round(0.004 * texels_per_m)))
        rows, columns = -(-height // size), -(-width // size)
        shades = rng.normal(0, wear, (rows, columns)).astype(np.float32)
        shade = np.kron(shades, np.ones((size, size), np.float32))[:height, :width]
        dirt = wear * fractal_noise(rng, width, height, (0.4 * texels_per_m, 0.4 * texels_per_m), 6, 0.7)
        whole = np.tile(one, (rows, columns, 1))[:height, :width]
        brightness = np.asarray(shade + dirt, dtype=np.float32)
        return np.asarray(np.clip(whole + 255 * brightness[..., None], 0, 255), dtype=np.uint8)

    return paint


def cloth(color: Color, *, fold_m: float = 0.0) -> Painter:
    """Painter of woven cloth; ``fold_m`` gives it upright folds, as of a curtain."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        weave = fractal_noise(rng, width, height, (3, 1), 1) + fractal_noise(rng, width, height, (1, 3), 1)
        brightness = 0.02 * weave + 0.03 * fractal_noise(rng, width, height, (0.2 * texels_per_m,) * 2, 5, 0.7)
        if fold_m > 0:
            drift = fractal_noise(rng, width, height, (0.3 * texels_per_m, 2.0 * texels_per_m), 2)
            x = np.arange(width, dtype=np.float32)[None] / (fold_m * texels_per_m)
            brightness = brightness + 0.12 * np.sin(2 * np.pi * (x + 0.25 * drift))
        return tint(color, brightness)

    return paint


def rug(first: Color, second: Color, third: Color) -> Painter:
    """Painter of a rug with borders and a field of diamonds."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = np.full((height, width, 3), first, np.uint8)
        for share, color in ((0.06, second), (0.09, third), (0.14, first)):
            inset = int(share * min(width, height))
            cv2.rectangle(picture, (inset, inset), (width - inset, height - inset), color, -1)
        step = max(8, int(0.16 * texels_per_m))
        margin = int(0.2 * min(width, height))
        for cy in range(margin, height - margin + 1, step):
            for cx in range(margin, width - margin + 1, step):
                corners = np.array(
                    [[cx, cy - step // 2], [cx + step // 3, cy], [cx, cy + step // 2], [cx - step // 3, cy]]
                )
                odd = (cx // step + cy // step) % 2 == 1
                cv2.fillPoly(picture, [corners], second if odd else third, cv2.LINE_AA)
                cv2.circle(picture, (cx, cy), max(1, step // 9), first, -1, cv2.LINE_AA)
        fibres = fractal_noise(rng, width, height, (2, 4), 2) + fractal_noise(rng, width, height, (60, 60), 4)
        return np.clip(picture + 9.0 * fibres[..., None], 0, 255).astype(np.uint8)

    return paint


def cardboard(label: str) -> Painter:
    """Painter of a moving box: corrugation, tape, a printed label."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        stripes = fractal_noise(rng, width, height, (max(1.0, 0.006 * texels_per_m), 0.5 * texels_per_m), 1)
        stains = fractal_noise(rng, width, height, (0.15 * texels_per_m,) * 2, 7, 0.75)
        picture = tint((172, 128, 84), 0.018 * stripes + 0.035 * stains)
        tape = int(rng.uniform(0.4, 0.6) * height)
        picture[tape : tape + max(1, int(0.05 * texels_per_m))] = (198, 172, 120)
        scale = 0.3 * width / max(len(label), 1) / 10
        origin = (int(rng.uniform(0.04, 0.2) * width), int(rng.uniform(0.25, 0.38) * height))
        thickness = max(1, round(2.2 * scale))
        cv2.putText(picture, label, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, (30, 25, 25), thickness, cv2.LINE_AA)
        left, top = int(rng.uniform(0.5, 0.6) * width), int(rng.uniform(0.62, 0.7) * height)
        cv2.rectangle(picture, (left, top), (left + int(0.3 * width), top + int(0.22 * height)), (235, 235, 228), -1)
        for bar in range(left + width // 60, left + int(0.28 * width), max(2, width // 80)):
            if rng.random() < 0.6:
                cv2.line(picture, (bar, top + height // 40), (bar, top + int(0.18 * height)), (20, 20, 20), 1)
        return picture

    return paint


def glow(color: Color) -> Painter:
    """Painter of a lamp's diffuser."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = np.full((height, width, 3), color, np.uint8)
        step = max(4, int(0.05 * texels_per_m))
        picture[::step] = tuple(int(0.88 * c) for c in color)
        picture[:, ::step] = tuple(int(0.88 * c) for c in color)
        return picture

    return paint
