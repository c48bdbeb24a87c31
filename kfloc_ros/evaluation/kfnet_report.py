# SPDX-License-Identifier: Apache-2.0
"""Comparison as in KFNet's paper, from result folders: one-shot against filtered, per scene and as means.

Rows with different ground truth (pose files, SfM poses, labels) are never mixed: each row and each mean names its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.compare import read_summary
from kfloc_ros.files import read_json

METHODS = ("one-shot", "filtered")
TRUTHS = {"file": "pose files", "sfm": "SfM poses"}
PARTS = ("train", "test", "training", "testing")
"""Names of folders that are parts of a scene, not scenes."""
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class Poses:
    """Errors of a run's poses; NaN without one."""

    median_cm: float
    median_deg: float
    within_5: float
    """Share within 5 cm and 5 degrees."""


@dataclass(frozen=True)
class Coordinates:
    """Errors of scene coordinates: over frames, of each frame's median."""

    median_cm: float
    mean_cm: float
    std_cm: float
    near: float
    """Mean share of cells below 2 cm."""


@dataclass(frozen=True)
class Result:
    """Figures of one result folder and one method."""

    scene: str
    truth: str
    method: str
    frames: int
    coarse: Poses | None = None
    """By RANSAC-PnP, as KFNet's own."""
    final: Poses | None = None
    """After the alignment."""
    coordinates: Coordinates | None = None


def read_results(folder: Path, method: str | None = None) -> list[Result]:
    """Return the results of a folder of ``kfloc localize``, ``replay``, ``pnp`` or ``kfnet eval``.

    Args:
        folder: result folder.
        method: its method, if the folder does not say it.

    Raises:
        SourceError: it is no result folder, is damaged, or does not say its method.
    """
    try:
        if (folder / "evaluation.json").is_file():
            return _of_evaluation(read_json(folder / "evaluation.json", MAX_JSON_BYTES))
        if (folder / "poses.json").is_file():
            return [_of_pnp(folder, read_json(folder / "poses.json", MAX_JSON_BYTES), method)]
        return [_of_run(read_summary(folder), method)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"The result folder '{folder}' is damaged: {error}") from error


def _of_run(summary: Mapping[str, Any], method: str | None) -> Result:
    options = summary.get("options") or {}
    method = method or METHODS[bool(options.get("filter", True))]
    truth = str(summary.get("poses") or "file")
    refined = bool(options.get("refine", True))
    return Result(
        _scene(str(summary["source"])), TRUTHS.get(truth, truth), method, int(summary["frames"]),
        coarse=_poses(summary["coarse"]), final=_poses(summary) if refined else None,
    )  # fmt: skip


def _of_pnp(folder: Path, content: Mapping[str, Any], method: str | None) -> Result:
    maps = Path(str(content["poses"][0]["map"])).parent
    scene = folder.name
    if (maps / "evaluation.json").is_file():
        evaluation = read_json(maps / "evaluation.json", MAX_JSON_BYTES)
        method = method or METHODS[evaluation["stage"] == "kfnet"]
        scene = _scene(str(evaluation["input"]))
    if method is None:
        raise SourceError(
            f"'{folder}' does not say whether its coordinate maps were filtered; write one-shot:{folder} or "
            f"filtered:{folder}."
        )
    if "recall" not in content:
        raise SourceError(f"'{folder}' has no errors; run `kfloc pnp` with --gt.")
    return Result(scene, "poses of --gt", method, int(content["maps"]), coarse=_poses(content))


def _of_evaluation(content: Mapping[str, Any]) -> list[Result]:
    scene = _scene(str(content["input"]))
    found = []
    for name, method in (("d_m", METHODS[0]), ("d_kf", METHODS[1])):
        if name in content:
            row = content[name]
            values = Coordinates(*(float(row[key]) for key in ("median_cm", "mean_cm", "std_cm", "near")))
            found.append(Result(scene, "labels", method, int(row["frames"]), coordinates=values))
    if not found:
        raise ValueError("it has neither d_m nor d_kf, as `kfloc kfnet eval scoordnet` or `kfnet` writes them")
    return found


def _poses(content: Mapping[str, Any]) -> Poses:
    metres, degrees = content["median_translation_m"], content["median_rotation_deg"]
    return Poses(
        math.nan if metres is None else 100 * float(metres),
        math.nan if degrees is None else float(degrees),
        float(content["recall"]["5cm_5deg"]),
    )


def _scene(source: str) -> str:
    """Return the scene's name in ``7scenes:DIR/fire@test`` or ``fire/test``."""
    parts = PurePosixPath(source.partition("@")[0]).parts or (source,)
    name = next((part for part in reversed(parts) if part not in PARTS), source)
    return name.rpartition(":")[2] or name


def report_text(results: Sequence[Result]) -> str:
    """Return the comparison in Markdown: a table of poses, one of final poses, and one of scene coordinates."""
    coarse = [result for result in results if result.coarse is not None]
    final = [result for result in results if result.final is not None]
    cells = [result for result in results if result.coordinates is not None]
    parts = []
    if coarse:
        parts.append(_pose_table("Poses by RANSAC-PnP (KFNet's own)", [(r, r.coarse) for r in coarse]))
    if final:
        parts.append(_pose_table("Poses after the alignment", [(r, r.final) for r in final]))
    if cells:
        parts.append(_coordinate_table(cells))
    return "\n\n".join(parts) + "\n"


def _pose_table(title: str, rows: Iterable[tuple[Result, Poses | None]]) -> str:
    by_scene = _by_scene((result, poses) for result, poses in rows if poses is not None)
    lines = [
        f"## {title}",
        "",
        "| scene | ground truth | frames | one-shot, cm | deg | within 5 cm, 5 deg "
        "| filtered, cm | deg | within 5 cm, 5 deg |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scene, truth, frames, found in _with_means(by_scene, Poses):
        values = [text for method in METHODS for text in _pose_texts(found.get(method))]
        lines.append(f"| {scene} | {truth} | {frames} | {' | '.join(values)} |")
    return "\n".join(lines)


def _coordinate_table(results: Sequence[Result]) -> str:
    by_scene = _by_scene((result, result.coordinates) for result in results)
    lines = [
        "## Scene coordinates: of each frame's median error, over frames",
        "",
        "| scene | ground truth | frames | one-shot: median, cm | mean | std | cells below 2 cm "
        "| filtered: median, cm | mean | std | cells below 2 cm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scene, truth, frames, found in _with_means(by_scene, Coordinates):
        values = [text for method in METHODS for text in _coordinate_texts(found.get(method))]
        lines.append(f"| {scene} | {truth} | {frames} | {' | '.join(values)} |")
    return "\n".join(lines)


def _pose_texts(poses: Poses | None) -> list[str]:
    if poses is None:
        return ["-"] * 3
    return [_number(poses.median_cm, ".2f"), _number(poses.median_deg, ".2f"), f"{100 * poses.within_5:.1f} %"]


def _coordinate_texts(values: Coordinates | None) -> list[str]:
    if values is None:
        return ["-"] * 4
    return [*(f"{v:.2f}" for v in (values.median_cm, values.mean_cm, values.std_cm)), f"{100 * values.near:.1f} %"]


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


_Groups = dict[tuple[str, str], tuple[int, dict[str, Any]]]


def _by_scene(rows: Iterable[tuple[Result, Any]]) -> _Groups:
    """Return frames and values by method, by scene and ground truth.

    Raises:
        SourceError: two results are of one scene, ground truth and method, or of different frames.
    """
    found: _Groups = {}
    for result, values in rows:
        frames, methods = found.setdefault((result.scene, result.truth), (result.frames, {}))
        if result.method in methods:
            raise SourceError(f"Two results are {result.method} of '{result.scene}' ({result.truth}); leave one out.")
        if frames != result.frames:
            raise SourceError(
                f"The results of '{result.scene}' ({result.truth}) are of {frames} and {result.frames} frames, so they "
                "cannot be compared."
            )
        methods[result.method] = values
    return dict(sorted(found.items(), key=lambda item: (item[0][1], item[0][0])))


def _with_means(groups: _Groups, kind: type) -> Iterable[tuple[str, str, int, dict[str, Any]]]:
    """Yield the rows of every ground truth, followed by the mean over the scenes that have both methods."""
    for truth in dict.fromkeys(truth for _, truth in groups):
        rows = [(scene, frames, found) for (scene, t), (frames, found) in groups.items() if t == truth]
        for scene, frames, found in rows:
            yield scene, truth, frames, found
        both = [(frames, found) for _, frames, found in rows if len(found) == len(METHODS)]
        if len(both) > 1:
            means = {method: _mean([found[method] for _, found in both], kind) for method in METHODS}
            yield f"mean of {len(both)} scenes", truth, sum(frames for frames, _ in both), means


def _mean(values: Sequence[Any], kind: type) -> Any:
    return kind(*(sum(column) / len(values) for column in zip(*(vars(v).values() for v in values), strict=True)))
