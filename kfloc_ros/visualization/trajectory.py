# SPDX-License-Identifier: Apache-2.0
"""Trajectory of a result folder as a video: truth and estimate in two colours, beside the images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.evaluation.compare import read_records, read_summary
from kfloc_ros.evaluation.metrics import pose_error
from kfloc_ros.files import read_text
from kfloc_ros.geometry.lie import inverse_pose
from kfloc_ros.kfnet.reference.files import read_list, read_pose
from kfloc_ros.pixloc.reference.views import read_scene
from kfloc_ros.types import Matrix

TRUTH_COLOUR, ESTIMATE_COLOUR = (46, 125, 50), (211, 47, 47)
HEIGHT_PX = 480
CAPTION_PX = 26
GAP_STEPS = 5
"""Usual distances between frames from which two are of different parts."""
ARROW_M = 0.12
"""Length of a camera's viewing direction, as a share of the plan's extent."""

ImageOf = Callable[[int], "NDArray[np.uint8] | None"]
"""Function that returns the image (H, W, 3) of a frame by its index, or None."""


@dataclass(frozen=True, eq=False)
class TrackFrame:
    """Frame of a result."""

    index: int
    truth: Matrix | None
    """T_map_camera"""
    estimate: Matrix | None
    state: str
    """Tracking state, or empty."""


@dataclass(frozen=True, eq=False)
class Track:
    """Poses of a result folder."""

    name: str
    frames: Sequence[TrackFrame]
    source: str = ""
    """SOURCE that was localized, if the folder names it."""
    poses: str = "file"
    """Ground truth that was chosen."""
    images: Sequence[Path] = ()
    """Images of the frames, if the result names them."""


def read_track(folder: Path, truth_list: Path | None = None) -> Track:
    """Read the poses of a result of ``kfloc localize``, ``replay``, ``pnp`` or ``pixloc run``.

    Args:
        folder: result folder, or the file of poses of ``kfloc pixloc run``.
        truth_list: for ``kfloc pnp``: list of true pose files, as its ``--gt``.

    Raises:
        SourceError: it is no result folder, or is damaged.
    """
    if folder.is_file():
        return _pixloc_track(folder)
    if (folder / "poses.json").is_file() and not (folder / "summary.json").is_file():
        return _pnp_track(folder, truth_list)
    summary = read_summary(folder)
    frames = [TrackFrame(r.index, r.truth, r.estimate, r.state) for r in read_records(folder) if r.processed]
    try:
        return Track(folder.name, frames, str(summary["source"]), str(summary.get("poses") or "file"))
    except KeyError as error:
        raise SourceError(f"The result folder '{folder}' is damaged: it names no {error}.") from error


def _pnp_track(folder: Path, truth_list: Path | None) -> Track:
    try:
        count = len(json.loads(read_text(folder / "poses.json"))["poses"])
        truths = [None] * count if truth_list is None else [read_pose(path) for path in read_list(truth_list)]
        if len(truths) != count:
            raise SourceError(f"'{truth_list}' lists {len(truths)} poses, and '{folder}' has {count}.")
        frames = [TrackFrame(i, truths[i], read_pose(folder / f"pose_{i}.txt"), "") for i in range(count)]
    except (OSError, KeyError, ValueError, TypeError, FrameError) as error:
        raise SourceError(f"The result folder '{folder}' is damaged: {error}") from error
    return Track(folder.name, frames)


def _pixloc_track(path: Path) -> Track:
    """Return the poses of PixLoc's queries, with truth and images where the log beside the file says they are."""
    log = path.with_name(f"{path.name}_logs.json")
    try:
        content = json.loads(read_text(log))
        queries, paths = content["localization"], content["paths"]
        frames = [
            TrackFrame(k, None, None if T is None else np.array(T, dtype=np.float64).reshape(4, 4), _state(entry))
            for k, entry in enumerate(queries.values())
            for T in (entry.get("T_map_camera") or entry["T_map_camera_init"],)
        ]
        truth = _truth_of(Path(str(paths.get("ground_truth", ""))))
        frames = [replace(frame, truth=truth.get(name)) for frame, name in zip(frames, queries, strict=True)]
        images = [Path(str(paths["query_images"])) / name for name in queries]
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise SourceError(f"'{path}' has no log of `kfloc pixloc run` beside it, or it is damaged: {error}") from error
    return Track(path.stem, frames, images=images)


def _state(entry: Mapping[str, Any]) -> str:
    return "aligned" if entry["success"] else f"not aligned: {entry['reason']}"


def _truth_of(model: Path) -> dict[str, Matrix]:
    if not model.name or not model.is_dir():
        return {}
    return {image.name: inverse_pose(image.T_camera_map) for image in read_scene(model).images}


class Plan:
    """Plan of both paths from above, in metres: the whole truth pale, the way so far in full colours.

    Args:
        frames: frames of the result.
        size_px: height and width of the picture.

    Raises:
        SourceError: no frame has a pose.
    """

    def __init__(self, frames: Sequence[TrackFrame], size_px: int = HEIGHT_PX) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        poses = [T for frame in frames for T in (frame.truth, frame.estimate) if T is not None]
        if not poses:
            raise SourceError("No frame of the result has a pose, so there is no trajectory to draw.")
        down = int(np.argmax(np.abs(np.mean([T[:3, 1] for T in poses], axis=0))))
        self._plane = [axis for axis in range(3) if axis != down]
        steps = np.diff([frame.index for frame in frames])
        usual = max(float(np.median(steps)), 1.0) if len(steps) else 1.0
        self._gap = np.concatenate([[False], steps > GAP_STEPS * usual])
        self._truth = _path([frame.truth for frame in frames])
        self._estimate = _path([frame.estimate for frame in frames])
        shown = self._truth if np.isfinite(self._truth).any() else self._estimate
        low, high = (bound[self._plane] for bound in (np.nanmin(shown, axis=0), np.nanmax(shown, axis=0)))
        half = 0.6 * max(float(np.max(high - low)), 0.2)
        middle = (low + high) / 2
        self._arrow_m = ARROW_M * half * 2
        figure = Figure(figsize=(size_px / 100, size_px / 100), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xlim(middle[0] - half, middle[0] + half)
        axes.set_ylim(middle[1] - half, middle[1] + half)
        axes.set_aspect("equal")
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(f"{'xyz'[self._plane[0]]} [m]", fontsize=9)
        axes.set_ylabel(f"{'xyz'[self._plane[1]]} [m]", fontsize=9)
        for label, colour in (("truth", TRUTH_COLOUR), ("estimate", ESTIMATE_COLOUR)):
            axes.plot([], [], color=[c / 255 for c in colour], label=label, linewidth=2)
        axes.legend(fontsize=8, loc="upper right", framealpha=0.8)
        canvas.draw()
        self._blank = np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
        corners = axes.transData.transform([[0.0, 0.0], [1.0, 1.0]])
        self._scale = corners[1] - corners[0]
        self._origin = corners[0]
        self._line(self._blank, self._truth, _pale(TRUTH_COLOUR), 1)

    def draw(self, frames: Sequence[TrackFrame], position: int) -> NDArray[np.uint8]:
        """Return the plan (size, size, 3) at one of the frames."""
        picture = self._blank.copy()
        for path, colour, width in ((self._truth, TRUTH_COLOUR, 5), (self._estimate, ESTIMATE_COLOUR, 2)):
            self._line(picture, path[: position + 1], colour, width)
        for T, colour in ((frames[position].truth, TRUTH_COLOUR), (frames[position].estimate, ESTIMATE_COLOUR)):
            if T is not None:
                ends = self._pixels(np.stack([T[:3, 3], T[:3, 3] + self._arrow_m * T[:3, 2]]))
                start, end = (tuple(p.tolist()) for p in ends)
                cv2.arrowedLine(picture, start, end, colour, 2, cv2.LINE_AA, tipLength=0.3)
                cv2.circle(picture, start, 5, colour, cv2.FILLED, cv2.LINE_AA)
        return picture

    def _pixels(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        uv = self._origin + points[:, self._plane] * self._scale
        uv[:, 1] = len(self._blank) - uv[:, 1]
        return np.asarray(np.rint(uv).clip(-30_000, 30_000), dtype=np.int32)

    def _line(self, picture: NDArray[np.uint8], path: NDArray[np.float64], colour: tuple[int, ...], width: int) -> None:
        """Draw a path, broken where a pose is missing and between parts of a recording."""
        known = np.asarray(np.isfinite(path).all(axis=1), dtype=bool)
        breaks = np.flatnonzero(np.concatenate([[False], known[1:] != known[:-1]]) | self._gap[: len(path)])
        for run in np.split(np.arange(len(path)), breaks):
            if len(run) > 1 and known[run[0]]:
                cv2.polylines(picture, [self._pixels(path[run])], False, colour, width, cv2.LINE_AA)


def trajectory_pictures(track: Track, image_of: ImageOf, step: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield the index and the picture (506, W, 3) of every ``step``-th frame: the image, the plan, and the error."""
    plan = Plan(track.frames)
    width = HEIGHT_PX * 4 // 3
    for position in range(0, len(track.frames), step):
        frame = track.frames[position]
        image = image_of(frame.index)
        if image is not None:
            width = round(HEIGHT_PX * image.shape[1] / image.shape[0])
            left = np.asarray(cv2.resize(image, (width, HEIGHT_PX), interpolation=cv2.INTER_AREA), dtype=np.uint8)
        else:
            left = np.full((HEIGHT_PX, width, 3), 235, np.uint8)
            _write(left, "no image", (20, 30))
        picture = np.concatenate([left, plan.draw(track.frames, position)], axis=1)
        caption = np.full((CAPTION_PX, picture.shape[1], 3), 255, np.uint8)
        _write(caption, _text(track.name, frame), (8, 18))
        yield frame.index, np.concatenate([caption, picture])


def _text(name: str, frame: TrackFrame) -> str:
    parts = [f"{name}, frame {frame.index}", *([frame.state] if frame.state else [])]
    if frame.estimate is None:
        parts.append("no pose")
    elif frame.truth is not None:
        error = pose_error(frame.estimate, frame.truth)
        parts.append(f"error {100 * error.translation_m:.1f} cm, {error.rotation_deg:.2f} deg")
    return "   ".join(parts)


def _write(picture: NDArray[np.uint8], text: str, place: tuple[int, int]) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (40, 40, 40), 1, cv2.LINE_AA)


def _path(poses: Sequence[Matrix | None]) -> NDArray[np.float64]:
    return np.array([np.full(3, np.nan) if T is None else T[:3, 3] for T in poses]).reshape(-1, 3)


def _pale(colour: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(round(255 - 0.35 * (255 - c)) for c in colour)
