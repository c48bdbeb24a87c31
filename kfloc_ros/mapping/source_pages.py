# SPDX-License-Identifier: Apache-2.0
"""HTML pages of a source: its check, and the one on which an object's ends are clicked for ``--scale-object``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.page import document, embedded, escape, jpeg, table
from kfloc_ros.frames import FrameSource
from kfloc_ros.mapping.check_geometry import Model, Observations
from kfloc_ros.mapping.source_check import SourceCheck

SHOWN_PAIRS = 4
SHOWN_POINTS = 12
PAIR_WIDTH_PX = 420
AS_GIVEN, MENDED = (230, 80, 60), (40, 190, 90)
MEANINGS = {
    "frames": "frames of the source",
    "pairs": "pairs of images that were compared",
    "dark": "share of dark images",
    "bright": "share of bright images",
    "blurred": "share of blurred images",
    "repeated": "share of images equal to the one before",
    "at_rest": "share of places at which nothing moves in the image",
    "rate_hz": "images a second",
    "features": "features an image, median",
    "depth_known": "share of pixels with depth, median",
    "usual_depth_m": "median depth of the images, metres",
    "seen_twice": "share of the path that is passed again later",
    "gaps": "pauses in the stamps",
    "longest_gap_s": "longest pause, seconds",
    "missing": "share of frames missing in pauses",
    "epipolar_px": "distance of matches from their epipolar lines, pixels, median",
    "epipolar_px_mended": "the same with the options that the findings name",
    "depth_by_poses": "depth over what images and poses say; 1 is right",
    "median_depth_m": "median depth, metres",
    "depth_disagreement": "relative difference of depth between images, median",
}
"""Meaning of each figure of a check."""


def write_page(check: SourceCheck, path: Path) -> None:
    """Write the page; it needs nothing beside it."""
    nothing = "No mistake was found in what could be checked." if check.notes else "No mistake was found."
    rows = [(f.severity, f.text, f.words) for f in check.findings] or [("", nothing, "")]
    parts = [f"<h1>Check of {escape(check.name)}</h1>", table(rows, ("", "finding", "option"))]
    if check.words:
        parts.append(f"<p>With all of them: <code>SOURCE{escape(check.words)}</code></p>")
    parts += [f"<p>{escape(note)}</p>" for note in check.notes]
    figures = [(name, f"{value:g}", MEANINGS.get(name, "")) for name, value in check.figures.items()]
    parts += ["<h2>Figures</h2>", table(figures)]
    if check.observed is not None:
        parts.append("<h2>Pairs</h2><p>Points of the left image and their epipolar lines in the right one, by the "
                     "source as it is given (red), and as the findings say (green, if there are any). A line passes "
                     "through its point if poses and calibration are right.</p>")  # fmt: skip
        count = len(check.observed.pairs)
        for k in np.unique(np.linspace(0, count - 1, min(SHOWN_PAIRS, count)).astype(int)).tolist():
            pair = check.observed.pairs[k]
            picture = embedded(jpeg(_drawn(check.observed, k, check.model)), "jpeg")
            caption = f"frames {pair.first.frame.index} and {pair.second.frame.index}"
            parts.append(f'<figure><img src="{picture}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
    path.write_text(document(f"Check of {check.name}", parts), encoding="utf-8")


def _drawn(observed: Observations, k: int, model: Model) -> NDArray[np.uint8]:
    """Both images of a pair side by side, RGB."""
    pair = observed.pairs[k]
    height, width = pair.first.grey.shape
    scale = PAIR_WIDTH_PX / width
    size = (PAIR_WIDTH_PX, max(round(height * scale), 1))
    images = [cv2.cvtColor(cv2.resize(v.grey, size), cv2.COLOR_GRAY2RGB) for v in (pair.first, pair.second)]
    scale = PAIR_WIDTH_PX / pair.first.frame.camera.width
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


PAGE_IMAGES = 16
PAGE_WIDTH_PX = 1600
"""Width of the images in the page; clicks are told in pixels of the full images."""

_STYLE = """<style>
.view { position: relative; cursor: crosshair; line-height: 0; }
.view img { width: 100%; }
.mark { position: absolute; width: 17px; height: 17px; margin: -9px 0 0 -9px; border-radius: 50%; pointer-events: none;
  border: 2px solid #fff; box-shadow: 0 0 0 2px var(--c), inset 0 0 0 1px var(--c); }
#words { position: sticky; top: 0; background: #fff; padding: .6rem 0; border-bottom: 1px solid #dde3ea; z-index: 2; }
#words input { font: inherit; width: 6rem; }
#glass { position: fixed; right: 1rem; bottom: 1rem; border: 1px solid #5a6b7b; background: #fff; display: none; }
.one { color: #d32f2f; } .two { color: #1565c0; }
</style>"""

_SCRIPT = """<script>
const picks = {}, colours = ['#d32f2f', '#1565c0'];
const glass = document.getElementById('glass'), lens = glass.getContext('2d');
lens.imageSmoothingEnabled = false;
function words() {
  const done = Object.keys(picks).filter(n => picks[n].length == 2);
  const metres = document.getElementById('metres').value.replace(',', '.');
  const code = document.getElementById('code'), hint = document.getElementById('hint');
  code.textContent = '--scale-object ' + (metres || 'METRES') + ' ' + done.map(
    n => n + ':' + picks[n].flat().map(v => v.toFixed(1)).join(',')).join(' ');
  hint.textContent = !(parseFloat(metres) > 0) ? 'Write the length in metres.'
    : done.length < 2 ? 'Mark both ends in ' + (2 - done.length) + ' more image(s).'
    : 'Add these words to the command:';
}
document.querySelectorAll('.view').forEach(view => {
  const img = view.querySelector('img'), w = +view.dataset.w, h = +view.dataset.h, n = view.dataset.n;
  const at = e => { const r = img.getBoundingClientRect();
    return [(e.clientX - r.left) / r.width, (e.clientY - r.top) / r.height]; };
  img.addEventListener('click', e => {
    const [x, y] = at(e), old = picks[n] && picks[n].length < 2 ? picks[n] : [];
    picks[n] = [...old, [x * w - 0.5, y * h - 0.5]];
    view.querySelectorAll('.mark').forEach(mark => mark.remove());
    picks[n].forEach(([px, py], k) => {
      const mark = document.createElement('div');
      mark.className = 'mark';
      mark.style.setProperty('--c', colours[k]);
      mark.style.left = 100 * (px + 0.5) / w + '%';
      mark.style.top = 100 * (py + 0.5) / h + '%';
      view.append(mark);
    });
    words();
  });
  img.addEventListener('mousemove', e => {
    const [x, y] = at(e), s = 15;
    glass.style.display = 'block';
    lens.clearRect(0, 0, 180, 180);
    lens.drawImage(img, x * img.naturalWidth - s, y * img.naturalHeight - s, 2 * s, 2 * s, 0, 0, 180, 180);
    lens.strokeRect(84, 84, 12, 12);
  });
  img.addEventListener('mouseleave', () => { glass.style.display = 'none'; });
});
document.getElementById('metres').addEventListener('input', words);
words();
</script>"""


def measure_page(source: FrameSource, indices: Sequence[int] | None = None) -> str:
    """Return the page, which needs nothing beside it.

    Args:
        source: source of the images.
        indices: ``Frame.index`` of the images to show; None: some, evenly chosen.

    Raises:
        SourceError: an image does not exist, or none can be read.
    """
    known = {index: position for position, index in enumerate(source.indices())}
    if indices is None:
        positions = np.unique(np.linspace(0, len(source) - 1, min(PAGE_IMAGES, len(source))).astype(int)).tolist()
    else:
        missing = [index for index in indices if index not in known]
        if missing:
            raise SourceError(f"'{source.name}' has no image {missing[0]}.")
        positions = [known[index] for index in indices]
    views = []
    for position in positions:
        frame = source.read_recorded(position)
        if frame is None:
            continue
        height, width = frame.image.shape[:2]
        picture = embedded(jpeg(_fitted(frame.image), quality=88), "jpeg")
        views.append(
            f'<figure><figcaption>image {frame.index} ({escape(frame.name)})</figcaption><div class="view" '
            f'data-n="{frame.index}" data-w="{width}" data-h="{height}"><img src="{picture}" '
            f'alt="image {frame.index}"></div></figure>'
        )
    if not views:
        raise SourceError(f"No image of '{source.name}' can be read.")
    intro = (
        "<p>Choose an object of known length whose both ends are seen in two or more images from different directions "
        "(taken some steps apart sideways). In each, click its <b class=one>first</b> and then its <b class=two>second"
        "</b> end, in the same order. A third click begins again.</p>"
    )
    words = (
        '<div id="words"><label>length in metres <input id="metres" inputmode="decimal"></label> <span id="hint">'
        '</span><br><code id="code"></code></div>'
    )
    glass = '<canvas id="glass" width="180" height="180"></canvas>'
    parts = [_STYLE, f"<h1>Scale of {escape(source.name)}</h1>", intro, words, *views, glass, _SCRIPT]
    return document(f"Scale of {source.name}", parts)


def _fitted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if width <= PAGE_WIDTH_PX:
        return image
    size = (PAGE_WIDTH_PX, max(round(height * PAGE_WIDTH_PX / width), 1))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
