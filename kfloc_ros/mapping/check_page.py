# SPDX-License-Identifier: Apache-2.0
"""HTML page of a source check: findings, figures, and pairs of images with epipolar lines as given and as mended."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.evaluation.page import document, embedded, escape, table
from kfloc_ros.mapping.check_geometry import Model, Observations
from kfloc_ros.mapping.source_check import SourceCheck

SHOWN_PAIRS = 4
SHOWN_POINTS = 12
WIDTH_PX = 420
AS_GIVEN, MENDED = (230, 80, 60), (40, 190, 90)


def write_page(check: SourceCheck, path: Path) -> None:
    """Write the page; it needs nothing beside it."""
    rows = [(f.severity, f.text, f.words) for f in check.findings] or [("", "No mistake was found.", "")]
    parts = [f"<h1>Check of {escape(check.name)}</h1>", table(rows, ("", "finding", "option"))]
    if check.words:
        parts.append(f"<p>With all of them: <code>SOURCE{escape(check.words)}</code></p>")
    parts += [f"<p>{escape(note)}</p>" for note in check.notes]
    parts += ["<h2>Figures</h2>", table([(name, f"{value:g}") for name, value in check.figures.items()])]
    if check.observed is not None:
        parts.append("<h2>Pairs</h2><p>Points of the left image and their epipolar lines in the right one, by the "
                     "source as it is given (red), and as the findings say (green, if there are any). A line passes "
                     "through its point if poses and calibration are right.</p>")  # fmt: skip
        count = len(check.observed.pairs)
        for k in np.unique(np.linspace(0, count - 1, min(SHOWN_PAIRS, count)).astype(int)).tolist():
            pair = check.observed.pairs[k]
            picture = embedded(_jpeg(_drawn(check.observed, k, check.model)), "jpeg")
            caption = f"frames {pair.first.frame.index} and {pair.second.frame.index}"
            parts.append(f'<figure><img src="{picture}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    path.write_text(document(f"Check of {check.name}", parts), encoding="utf-8")


def _drawn(observed: Observations, k: int, model: Model) -> NDArray[np.uint8]:
    """Both images of a pair side by side, RGB."""
    pair = observed.pairs[k]
    height, width = pair.first.grey.shape
    scale = WIDTH_PX / width
    size = (WIDTH_PX, max(round(height * scale), 1))
    images = [cv2.cvtColor(cv2.resize(v.grey, size), cv2.COLOR_GRAY2RGB) for v in (pair.first, pair.second)]
    scale = WIDTH_PX / pair.first.frame.camera.width
    rows = np.flatnonzero(observed.pair_of == k)
    some = np.unique(np.linspace(0, len(rows) - 1, min(SHOWN_POINTS, len(rows))).astype(int))
    readings = [(Model(), AS_GIVEN)] + ([(model, MENDED)] if observed.differs(model) else [])
    for reading, colour in readings:
        for i in some:
            line = observed.epipolar_line(reading, k, int(rows[i])) * scale
            cv2.polylines(images[1], [np.rint(line).astype(np.int32)], False, colour, 1, cv2.LINE_AA)
    for image, pixels in zip(images, pair.pixels, strict=True):
        for i in some:
            x, y = (round(float(v)) for v in pixels[i] * scale)
            cv2.circle(image, (x, y), 4, (255, 210, 0), 1, cv2.LINE_AA)
    return np.concatenate(images, axis=1)


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
    return bytes(data)
