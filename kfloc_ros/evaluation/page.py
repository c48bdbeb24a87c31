# SPDX-License-Identifier: Apache-2.0
"""Report of one run, or of two side by side, as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.evaluation.metrics import pose_error
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.report import (
    CAPTIONS,
    accuracy_rows,
    consistency_rows,
    has_truth,
    reliability_rows,
    streaming_rows,
    timing_rows,
    truth_text,
    verdict_lines,
)
from kfloc_ros.evaluation.summary import Summary

ImagesOf = Callable[[Sequence[FrameRecord]], Mapping[int, NDArray[np.uint8]]]
"""Function that returns the RGB images (H, W, 3) of some records by stamp, as far as they are available."""

_WORST = 6
_WIDTH_PX = 360
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
tr { border-bottom: 1px solid #dde3ea; } th { font-weight: 600; }
td + td { font-variant-numeric: tabular-nums; }
code { background: #f1f4f7; padding: .1rem .3rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #5a6b7b; font-size: .85rem; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; }
.verdict { list-style: none; padding: .6rem 1rem; background: #f1f4f7; font-size: 1.05rem; }
.bad { color: #b3261e; } .good { color: #1b6e3c; }
"""


def page_text(
    summary: Summary,
    records: Sequence[FrameRecord],
    folder: Path,
    pictures: Sequence[str],
    images_of: ImagesOf | None = None,
) -> str:
    """Return the HTML of ``report.html``.

    Args:
        summary: figures of the run.
        records: records of the run.
        folder: folder with the ``pictures``.
        pictures: names of PNG files that are embedded in the page.
        images_of: returns the images of the worst frames; None: no images.
    """
    run = summary.run
    kind = "Replay through the live nodes" if run.kind == "replay" else "Localization"
    facts = [("command", f"<code>{escape(run.command)}</code>"), ("map", escape(run.map))]
    facts += [("truth", escape(truth_text(summary)))]
    facts += [("options", escape(", ".join(f"{key} {value}" for key, value in run.options.items()) or "defaults"))]
    facts += [("hardware", escape(", ".join(f"{k} {v}" for k, v in run.hardware.items() if v is not None)))]
    parts = [f"<h1>{kind}: {escape(run.source)}</h1>"]
    verdict = "".join(f'<li class="{css}">{escape(text)}</li>' for css, text in verdict_lines(summary))
    parts.append(f'<ul class="verdict">{verdict}</ul>')
    heading = "Accuracy" if has_truth(summary) else "Poses"
    parts += [
        table(facts, raw=True),
        f"<h2>{heading}</h2>",
        table(accuracy_rows(summary), ("", "final pose", "coarse")),
    ]
    parts += ["<h2>As a stream</h2>", table(streaming_rows(summary))]
    parts += ["<h2>Time</h2>", table(timing_rows(summary))]
    rows = consistency_rows(summary)
    if rows:
        parts += ["<h2>Covariance</h2>", table(rows, ("", "measured", "right"))]
    trust = reliability_rows(summary)
    if trust:
        parts += ["<h2>Confidence</h2>", table(trust)]
    parts += ["<h2>Pictures</h2>", *(_figure(folder / name, CAPTIONS[name]) for name in pictures)]
    parts += _worst_frames(records, images_of)
    return document(f"{kind}: {run.source}", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a whole HTML document."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'
    )


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), *, raw: bool = False) -> str:
    """Return a table; ``raw`` takes the cells as HTML."""
    show = str if raw else escape
    head = "<tr>" + "".join(f"<th>{show(cell)}</th>" for cell in header) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{show(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table>{head}\n{body}</table>"


def escape(text: str) -> str:
    """Return text escaped for HTML."""
    return html.escape(str(text))


def embedded(data: bytes, kind: str) -> str:
    """Return an image as a data URL."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _figure(path: Path, caption: str) -> str:
    source = embedded(path.read_bytes(), "png")
    return f'<figure><img src="{source}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _worst_frames(records: Sequence[FrameRecord], images_of: ImagesOf | None) -> list[str]:
    known = [(pose_error(r.estimate, r.truth), r) for r in records if r.truth is not None and r.processed]
    worst = sorted(known, key=lambda item: item[0].translation_m, reverse=True)[:_WORST]
    if not worst:
        return []
    images = images_of([record for _, record in worst]) if images_of is not None else {}
    cells = []
    for error, record in worst:
        what = (
            "no pose"
            if record.estimate is None
            else f"{100 * error.translation_m:.1f} cm, {error.rotation_deg:.2f} deg"
        )
        image = images.get(record.stamp_ns)
        picture = ""
        if image is not None:
            small = embedded(jpeg(image, _WIDTH_PX / image.shape[1], 80), "jpeg")
            picture = f'<img src="{small}" alt="frame {record.index}">'
        text = f"frame {record.index}: {what}; {record.state}" + (f": {record.reason}" if record.reason else "")
        cells.append(f"<figure>{picture}<figcaption>{escape(text)}</figcaption></figure>")
    return ["<h2>Worst frames</h2>", f'<div class="frames">{"".join(cells)}</div>']


def jpeg(image: NDArray[np.uint8], scale: float = 1.0, quality: int = 82) -> bytes:
    """Return an RGB image (H, W, 3), scaled, as JPEG."""
    if scale != 1.0:
        size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(data)
