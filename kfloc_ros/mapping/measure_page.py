# SPDX-License-Identifier: Apache-2.0
"""HTML page on which the ends of an object are clicked in images; it yields the words of ``--scale-object``."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.page import document, embedded, escape
from kfloc_ros.frames import FrameSource

PAGE_IMAGES = 16
WIDTH_PX = 1600
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
        picture = embedded(_jpeg(frame.image), "jpeg")
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


def _jpeg(image: NDArray[np.uint8]) -> bytes:
    height, width = image.shape[:2]
    if width > WIDTH_PX:
        image = np.asarray(cv2.resize(image, (WIDTH_PX, max(round(height * WIDTH_PX / width), 1))), dtype=np.uint8)
    _, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])
    return bytes(data)
