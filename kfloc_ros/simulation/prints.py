# SPDX-License-Identifier: Apache-2.0
"""Procedural pictures: posters, pages, book spines, packages, screens, the view from a window."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

from kfloc_ros.simulation.textures import Color, Painter, Picture, fractal_noise, mix, tint

_FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_COMPLEX_SMALL, cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
)  # fmt: skip
_SYLLABLES = ("ka", "lo", "mi", "ser", "ton", "vel", "ra", "do", "pes", "tri", "un", "gal", "or", "fi", "zen", "ba")


def word(rng: np.random.Generator, low: int = 2, high: int = 4) -> str:
    """Return a made-up word."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(int(rng.integers(low, high))))


def vivid(rng: np.random.Generator, saturation: tuple[float, float] = (0.3, 0.85)) -> Color:
    """Return a random colour as of paper and cloth: rather warm or blue than green or purple."""
    hue = rng.choice([rng.uniform(0.0, 0.14), rng.uniform(0.52, 0.66), rng.random()], p=[0.5, 0.32, 0.18])
    r, g, b = colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(0.25, 0.9))
    return int(255 * r), int(255 * g), int(255 * b)


def write(
    picture: Picture, text: str, left_bottom: tuple[int, int], height_px: float, color: Color, rng: np.random.Generator
) -> None:
    """Put text of a given height into a picture, in a random font; smaller if the picture is too narrow."""
    font, scale = int(rng.choice(_FONTS)), height_px / 22.0
    (width, _), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = min(scale, 0.95 * (picture.shape[1] - left_bottom[0]) / max(width, 1))
    if scale * 22.0 < 3:
        return
    cv2.putText(picture, text, left_bottom, font, scale, color, max(1, round(1.6 * scale)), cv2.LINE_AA)


def _paper(rng: np.random.Generator, picture: Picture, strength: float = 4.0) -> Picture:
    """Add the unevenness of print, since no real surface has one uniform colour."""
    height, width = picture.shape[:2]
    noise = fractal_noise(rng, width, height, (width / 2 + 1, width / 2 + 1), 8, 0.85)
    return np.clip(picture + strength * noise[..., None], 0, 255).astype(np.uint8)


def poster() -> Painter:
    """Painter of a poster with large and small shapes, a picture and text."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        landscape = fractal_noise(rng, width, height, (width / 3, height / 3), 8, 0.62)
        picture = mix(vivid(rng, (0.2, 0.6)), vivid(rng), 0.5 + 0.35 * landscape)
        for _ in range(int(rng.integers(14, 30))):
            center = (int(rng.uniform(0, width)), int(rng.uniform(0, 0.75 * height)))
            size = float(rng.uniform(0.02, 0.2) * width)
            _shape(picture, center, size, vivid(rng), rng)
        top = int(0.74 * height)
        picture[top:] = vivid(rng, (0.0, 0.25))
        ink = (20, 20, 26) if picture[top].mean() > 110 else (240, 238, 230)
        write(picture, word(rng).upper(), (int(0.06 * width), int(0.84 * height)), 0.075 * height, ink, rng)
        for line in range(5):
            text = " ".join(word(rng) for _ in range(6))
            write(picture, text, (int(0.06 * width), int((0.88 + 0.024 * line) * height)), 0.013 * height, ink, rng)
        cv2.rectangle(picture, (0, 0), (width - 1, height - 1), ink, max(1, width // 60))
        return _paper(rng, picture)

    return paint


def _shape(picture: Picture, center: tuple[int, int], size: float, color: Color, rng: np.random.Generator) -> None:
    kind = int(rng.integers(4))
    line = -1 if rng.random() < 0.6 else max(1, int(size / 8))
    if kind == 0:
        cv2.circle(picture, center, int(size / 2) + 1, color, line, cv2.LINE_AA)
    elif kind == 1:
        axes = (int(size * 0.7) + 1, int(size * 0.3) + 1)
        cv2.ellipse(picture, center, axes, float(rng.uniform(0, 180)), 0, 360, color, line, cv2.LINE_AA)
    else:
        corners = int(rng.integers(3, 8))
        angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
        reach = rng.uniform(0.4, 1.0, corners) * size / 1.4
        points = np.stack([center[0] + reach * np.cos(angles), center[1] + reach * np.sin(angles)], 1).astype(np.int32)
        if line < 0:
            cv2.fillPoly(picture, [points], color, cv2.LINE_AA)
        else:
            cv2.polylines(picture, [points], True, color, line, cv2.LINE_AA)


def page() -> Painter:
    """Painter of a sheet with a heading, paragraphs and a figure."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = np.full((height, width, 3), (228, 226, 218), np.uint8)
        ink = (38, 36, 42)
        write(picture, word(rng).title() + " " + word(rng), (width // 12, height // 8), 0.08 * height, ink, rng)
        step = max(5.0, 0.05 * height)
        y = 0.18 * height
        while y < 0.95 * height:
            if rng.random() < 0.06 and y < 0.7 * height:
                box = (int(0.12 * width), int(y)), (int(0.88 * width), int(y + 0.2 * height))
                cv2.rectangle(picture, *box, vivid(rng, (0.1, 0.5)), -1)
                x = np.linspace(0.12 * width, 0.88 * width, 24)
                curve = y + 0.1 * height + 0.05 * height * np.cumsum(rng.normal(0, 0.4, 24)).clip(-1.6, 1.6)
                cv2.polylines(picture, [np.stack([x, curve], 1).astype(np.int32)], False, ink, 2, cv2.LINE_AA)
                y += 0.24 * height
            text = " ".join(word(rng) for _ in range(int(rng.integers(3, 6))))
            write(picture, text, (width // 12, int(y)), 0.7 * step, ink, rng)
            y += step
        return _paper(rng, picture, 2.5)

    return paint


def books() -> Painter:
    """Painter of a row of book spines, as high as the shelf allows, with the dark gap above them."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = np.full((height, width, 3), (26, 22, 20), np.uint8)
        x = 0
        while x < width:
            thick = max(3, int(rng.uniform(0.014, 0.05) * texels_per_m))
            if rng.random() < 0.04:
                x += thick
                continue
            tall = int(rng.uniform(0.68, 0.97) * height)
            spine = _spine(rng, tall, thick)
            right = min(width, x + thick)
            picture[height - tall :, x:right] = spine[:, : right - x]
            x += thick
        return _paper(rng, picture, 5.0)

    return paint


def _spine(rng: np.random.Generator, tall: int, thick: int) -> Picture:
    cover = vivid(rng, (0.15, 0.8))
    lying = np.full((thick, tall, 3), cover, np.uint8)  # drawn lying, then stood up
    ink = (235, 230, 215) if sum(cover) < 380 else (30, 25, 25)
    for at in rng.uniform(0.03, 0.97, int(rng.integers(1, 5))):
        cv2.line(lying, (int(at * tall), 0), (int(at * tall), thick), ink, max(1, int(0.008 * tall)))
    title = " ".join(word(rng).title() for _ in range(int(rng.integers(1, 4))))
    write(lying, title, (int(0.1 * tall), int(0.72 * thick)), min(0.55 * thick, 0.09 * tall), ink, rng)
    lying[0], lying[-1] = (lying[0] * 0.5).astype(np.uint8), (lying[-1] * 0.6).astype(np.uint8)
    return np.ascontiguousarray(lying.transpose(1, 0, 2)[::-1])


def package(name: str) -> Painter:
    """Painter of a food package: name in large letters, a picture, small print."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        share = np.linspace(0, 1, height, dtype=np.float32)[:, None] * np.ones((1, width), np.float32)
        picture = mix(vivid(rng), vivid(rng), share)
        ink = (250, 246, 235) if picture.mean() < 140 else (25, 20, 40)
        write(picture, name, (int(0.06 * width), int(0.24 * height)), 0.16 * height, ink, rng)
        for _ in range(12):
            center = (int(rng.uniform(0.15, 0.85) * width), int(rng.uniform(0.36, 0.72) * height))
            _shape(picture, center, float(rng.uniform(0.1, 0.3) * width), vivid(rng), rng)
        for line in range(5):
            text = " ".join(word(rng) for _ in range(5))
            write(picture, text, (int(0.06 * width), int((0.8 + 0.04 * line) * height)), 0.024 * height, ink, rng)
        return _paper(rng, picture)

    return paint


def front(color: Color, *, handle: bool = True, upright: bool = True) -> Painter:
    """Painter of a cupboard door or drawer with a frame, a handle and a little wear."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        cell = 0.25 * texels_per_m
        grain = (cell, max(1.0, cell / 12)) if not upright else (max(1.0, cell / 12), cell)
        picture = tint(color, 0.02 * fractal_noise(rng, width, height, grain, 5, 0.75))
        inset = int(0.05 * texels_per_m)
        dark = tuple(int(0.72 * c) for c in color)
        line = max(1, int(0.006 * texels_per_m))
        cv2.rectangle(picture, (0, 0), (width - 1, height - 1), tuple(int(0.4 * c) for c in color), line)
        cv2.rectangle(picture, (inset, inset), (width - inset, height - inset), dark, line)
        if handle:
            x, y, reach = int(0.86 * width), int(0.5 * height), int(0.06 * texels_per_m)
            cv2.line(
                picture, (x, y - reach), (x, y + reach), (70, 70, 74), max(1, int(0.014 * texels_per_m)), cv2.LINE_AA
            )
            shine = max(1, int(0.004 * texels_per_m))
            cv2.line(picture, (x, y - reach), (x, y + reach), (190, 190, 196), shine, cv2.LINE_AA)
        return picture

    return paint


def screen() -> Painter:
    """Painter of a monitor with windows, text and a plot."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = np.full((height, width, 3), (24, 30, 44), np.uint8)
        for box in ((0.04, 0.06, 0.55, 0.9), (0.6, 0.08, 0.95, 0.48), (0.58, 0.54, 0.96, 0.92)):
            left, top, right, bottom = (int(b * s) for b, s in zip(box, (width, height) * 2, strict=True))
            paper = vivid(rng, (0.0, 0.15))
            cv2.rectangle(picture, (left, top), (right, bottom), paper, -1)
            cv2.rectangle(picture, (left, top), (right, top + height // 28), vivid(rng), -1)
            for y in range(top + height // 12, bottom - 4, max(5, height // 28)):
                text = " ".join(word(rng) for _ in range(int(rng.integers(2, 6))))
                indent = left + width // 60 + int(rng.integers(0, 4)) * width // 40
                room = picture[:, indent : right - 2]
                write(room, text, (0, y), height / 48, vivid(rng, (0.5, 0.9)), rng)
        cv2.rectangle(picture, (0, 0), (width - 1, height - 1), (12, 12, 12), max(2, width // 40))
        return picture

    return paint


def view() -> Painter:
    """Painter of the view from a window: sky, hills, houses, and the window's bars."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        clouds = fractal_noise(rng, width, height, (width / 3, height / 5), 7, 0.6)
        picture = mix((150, 190, 232), (244, 246, 248), 0.45 + 0.4 * clouds)
        for layer, color in enumerate(((120, 140, 128), (88, 112, 84), (62, 84, 58))):
            ridge = fractal_noise(rng, width, 1, (width / 3, 1), 6)[0] * 0.04 * height + (0.5 + 0.1 * layer) * height
            below = np.arange(height)[:, None] > ridge[None]
            leaves = tint(color, 0.07 * fractal_noise(rng, width, height, (24, 18), 5, 0.8))
            picture[below] = leaves[below]
        for _ in range(9):
            left, top = int(rng.uniform(0, 0.95) * width), int(rng.uniform(0.5, 0.8) * height)
            wide, tall = int(rng.uniform(0.06, 0.14) * width), int(rng.uniform(0.08, 0.16) * height)
            cv2.rectangle(picture, (left, top), (left + wide, top + tall), vivid(rng, (0.1, 0.4)), -1)
            roof = np.array([[left - 4, top], [left + wide // 2, top - tall // 2], [left + wide + 4, top]])
            cv2.fillPoly(picture, [roof], (140, 62, 46), cv2.LINE_AA)
            for i in range(3):
                corner = (left + wide // 8 + i * wide // 3, top + tall // 3)
                cv2.rectangle(picture, corner, (corner[0] + wide // 7, corner[1] + tall // 4), (46, 52, 66), -1)
        bar = max(2, int(0.05 * texels_per_m))
        cv2.rectangle(picture, (0, 0), (width - 1, height - 1), (225, 222, 214), 2 * bar)
        cv2.line(picture, (width // 2, 0), (width // 2, height), (225, 222, 214), bar)
        cv2.line(picture, (0, height // 3), (width, height // 3), (225, 222, 214), bar)
        return picture

    return paint


def keyboard() -> Painter:
    """Painter of rows of keys with letters."""

    def paint(rng: np.random.Generator, width: int, height: int, texels_per_m: float) -> Picture:
        picture = np.full((height, width, 3), (30, 30, 33), np.uint8)
        rows, columns = 5, 15
        for row in range(rows):
            for column in range(columns):
                left, top = int((column + 0.1) * width / columns), int((row + 0.12) * height / rows)
                right, bottom = int((column + 0.9) * width / columns), int((row + 0.88) * height / rows)
                cv2.rectangle(picture, (left, top), (right, bottom), (62, 62, 68), -1)
                write(
                    picture, chr(65 + int(rng.integers(26))), (left + 3, bottom - 3), height / 14, (220, 220, 220), rng
                )
        return picture

    return paint
