# SPDX-License-Identifier: Apache-2.0
"""Writer of the result folder: summary.json, frames.csv, TUM files, report.md, report.html, plots.

Every file is written under a temporary name and then renamed, summary.json last, so a folder with a summary is always
complete.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.errors import ConfigError
from kfloc_ros.evaluation.metrics import pose_error
from kfloc_ros.evaluation.offline import STAGES, STATISTICS, FrameRecord
from kfloc_ros.evaluation.page import ImagesOf, page_text
from kfloc_ros.evaluation.plots import PICTURES, write_plots
from kfloc_ros.evaluation.report import report_text
from kfloc_ros.evaluation.summary import RunInfo, Summary, finite, summarize
from kfloc_ros.files import replacing
from kfloc_ros.geometry.lie import matrix_to_quaternion
from kfloc_ros.messages.poses import tum_text
from kfloc_ros.types import Matrix

LOCK = ".running"


@contextlib.contextmanager
def result_folder(out: Path, *, force: bool) -> Iterator[None]:
    """Hold a folder for the results of one run, from its start to its end.

    Args:
        out: the folder, created if missing; removed again if the run leaves nothing in it.
        force: replace the results of another run.

    Raises:
        ConfigError: the folder has results and ``force`` is false, another run is writing there, or it is a file.
        OSError: the folder cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; give a folder for the results.")
    if not force and any((out / name).exists() for name in ("summary.json", "frames.csv")):
        raise ConfigError(f"'{out}' has the results of another run; give another folder, or --force to replace them.")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = out / LOCK
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"Another run is writing to '{out}'; give another folder, or wait for its end."
            ) from error
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):
                    out.rmdir()


def write_results(
    out: Path, records: Sequence[FrameRecord], run: RunInfo, *, plots: bool = True, images_of: ImagesOf | None = None
) -> Summary:
    """Evaluate the records and write the result folder, which is created if missing.

    Args:
        out: the folder.
        records: records of the run.
        run: description of the run.
        plots: draw the pictures.
        images_of: returns the images of the worst frames for ``report.html``; None: no images.

    Raises:
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    summary = summarize(records, run)
    _write(out / "frames.csv", frames_csv(records))
    _write(out / "trajectory.tum", tum_text((r.stamp_ns, r.estimate) for r in records if r.processed))
    _write(out / "groundtruth.tum", tum_text((r.stamp_ns, r.truth) for r in records))
    pictures = write_plots(out, records) if plots else []
    for name in PICTURES:
        if name not in pictures:  # of an older run
            (out / name).unlink(missing_ok=True)
    _write(out / "report.md", report_text(summary, records, pictures))
    _write(out / "report.html", page_text(summary, records, out, pictures, images_of))
    _write(out / "summary.json", json.dumps(summary.to_dict(), indent=2, allow_nan=False) + "\n")
    return summary


def frames_csv(records: Sequence[FrameRecord]) -> str:
    """Return one line a frame, with the same columns for every kind of run; empty where a frame has no value."""
    stats = list(dict.fromkeys((*STATISTICS, *(key for record in records for key in record.stats))))
    stages = list(dict.fromkeys((*STAGES, *(key for record in records for key in record.timings_ms))))
    rows = [_row(record) for record in records]
    buffer = io.StringIO()
    columns = [*_row(FrameRecord(0, 0, None)), *stats, *(f"{stage}_ms" for stage in stages)]
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for record, row in zip(records, rows, strict=True):
        row.update(record.stats)
        row.update({f"{stage}_ms": round(value, 3) for stage, value in record.timings_ms.items()})
        writer.writerow({key: "" if value is None else value for key, value in finite(row).items()})
    return buffer.getvalue()


def _row(record: FrameRecord) -> dict[str, Any]:
    error = None if record.truth is None else pose_error(record.estimate, record.truth)
    coarse = None if record.truth is None else pose_error(record.coarse, record.truth)
    pose = [None] * 7 if record.estimate is None else _vector(record.estimate)
    sigma = [None] * 6 if record.covariance is None else np.sqrt(np.abs(np.diag(record.covariance))).tolist()
    return {
        "index": record.index,
        "stamp_ns": record.stamp_ns,
        "name": record.name,
        "processed": int(record.processed),
        "state": record.state,
        "reason": record.reason,
        "translation_error_m": None if error is None else error.translation_m,
        "rotation_error_deg": None if error is None or record.estimate is None else error.rotation_deg,
        "coarse_translation_error_m": None if coarse is None else coarse.translation_m,
        "coarse_rotation_error_deg": None if coarse is None or record.coarse is None else coarse.rotation_deg,
        "latency_ms": record.latency_ms,
        **dict(zip(("tx_m", "ty_m", "tz_m", "qx", "qy", "qz", "qw"), pose, strict=True)),
        **dict(zip(("sigma_tx_m", "sigma_ty_m", "sigma_tz_m"), sigma[:3], strict=True)),
        **dict(zip(("sigma_rx_rad", "sigma_ry_rad", "sigma_rz_rad"), sigma[3:], strict=True)),
    }


def _vector(T_map_camera: Matrix) -> list[Any]:
    return [*T_map_camera[:3, 3].tolist(), *matrix_to_quaternion(T_map_camera[:3, :3]).tolist()]


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
