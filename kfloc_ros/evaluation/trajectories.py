# SPDX-License-Identifier: Apache-2.0
"""Trajectory files of public benchmarks: read, written, and judged by this package's metrics.

A trajectory is a set of camera-to-map poses by the names of their images, or by stamps in nanoseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.capture import pose_of_words, rows_of
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.evaluation.metrics import Accuracy, PoseError, accuracy, pose_error, recall
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.files import check_count, number, read_text
from kfloc_ros.geometry.lie import inverse_pose, matrix_to_quaternion
from kfloc_ros.kfnet.reference.files import read_pose
from kfloc_ros.messages.poses import read_tum, tum_text
from kfloc_ros.messages.transforms import PoseTrack, nearest_stamp
from kfloc_ros.types import Matrix

Key = str | int
"""Name of an image, or stamp in nanoseconds."""

FORMS = {
    "tum": "`t tx ty tz qx qy qz qw` a line, t in seconds, camera to map",
    "rio10": "`seq02_02/frame-000000 qw qx qy qz tx ty tz` a line, camera to map",
    "lamar": "`timestamp, device_id, qw, qx, qy, qz, tx, ty, tz` a line, camera to map, microseconds",
    "mapfree": "`name qw qx qy qz tx ty tz confidence` a line, map to camera; the confidence may be missing",
    "7scenes": "a folder with `*.pose.txt` files of 4x4 matrices, camera to map",
}
THRESHOLDS = {"10cm_1deg": (0.1, 1.0), "50cm_5deg": (0.5, 5.0), "1m_5deg": (1.0, 5.0)}
"""Recall figures of these benchmarks besides those of :data:`kfloc_ros.evaluation.metrics.RECALL_THRESHOLDS`."""
CATASTROPHIC = (0.5, 10.0)
"""Metres and degrees; an estimate beyond one of them leads a robot astray."""
_RIO10_NAME = re.compile(r"seq\d+_\d+/frame-\d+")


@dataclass(frozen=True)
class Trajectory:
    """Poses ``T_map_camera`` by key, as one file has them."""

    form: str
    poses: Mapping[Key, Matrix]
    confidence: Mapping[Key, float] = field(default_factory=dict)
    """Of the poses that have one; larger is surer."""


class NamedPose(NamedTuple):
    """Pose of one image."""

    name: str
    stamp_ns: int
    T_map_camera: Matrix
    confidence: float


def read_trajectory(path: Path, form: str = "") -> Trajectory:
    """Read a trajectory.

    Args:
        path: file, or folder of pose files or of results (``trajectory.tum``).
        form: key of :data:`FORMS`; empty: found out.

    Raises:
        SourceError: it cannot be read, its form is not clear, or it has no pose.
    """
    if (found := _read(path / "trajectory.tum" if (path / "trajectory.tum").is_file() else path, form)).poses:
        return found
    raise SourceError(f"The trajectory '{path}' has no pose: none of its lines has a rotation and finite numbers.")


def _read(path: Path, form: str) -> Trajectory:
    if path.is_dir():
        if form not in ("", "7scenes"):
            raise SourceError(f"'{path}' is a folder, and the form '{form}' is that of a file.")
        return Trajectory("7scenes", _pose_files(path))
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip() and not line.lstrip().startswith("#")]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"The trajectory '{path}' cannot be read: {error}.") from error
    check_count(len(lines) // 10, path)
    form = form or _form_of(lines, path)
    if form == "tum":
        return Trajectory(form, dict(read_tum(path).items()))
    if form == "lamar":
        posed = ((f"{row[0]}/{row[1]}", pose_of_words(row[2:], path)) for row in rows_of(path, 9))
        return Trajectory(form, {name: T for name, T in posed if T is not None})
    return _named(path, lines, form)


def _form_of(lines: list[str], path: Path) -> str:
    words = lines[0].split() if lines else []
    if lines and lines[0].count(",") >= 8:
        return "lamar"
    if len(words) == 8 and _RIO10_NAME.fullmatch(words[0]):
        return "rio10"
    if len(words) == 9:
        return "mapfree"
    if len(words) == 8 and re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d+)?", words[0], re.IGNORECASE):
        return "tum"
    known = "; ".join(f"{name}: {text}" for name, text in FORMS.items())
    raise SourceError(f"The form of the trajectory '{path}' is not clear; name it ({known}).")


def _named(path: Path, lines: Iterable[str], form: str) -> Trajectory:
    poses: dict[Key, Matrix] = {}
    confidence: dict[Key, float] = {}
    for line in lines:
        name, *words = line.split()
        T = pose_of_words(words, path)
        if T is None:
            continue
        poses[name] = inverse_pose(T) if form == "mapfree" else T
        if len(words) > 7:
            try:
                confidence[name] = number(words[7])
            except ValueError as error:
                raise SourceError(f"'{path}' has a confidence that is no number: {words[7][:40]!r}.") from error
    return Trajectory(form, poses, confidence)


def _pose_files(folder: Path) -> dict[Key, Matrix]:
    paths = [*sorted(folder.glob("*.pose.txt")), *sorted(folder.glob("*/*.pose.txt"))]
    check_count(len(paths), folder)
    found: dict[Key, Matrix] = {}
    for path in paths:
        try:
            T = read_pose(path)
        except FrameError as error:
            raise SourceError(str(error)) from error
        if T is not None:
            found[path.relative_to(folder).as_posix().removesuffix(".pose.txt")] = T
    if not found:
        raise SourceError(f"'{folder}' has no *.pose.txt with a pose.")
    return found


def submission(records: Iterable[FrameRecord], form: str) -> str:
    """Return the result file of a run. The confidence of a pose is the inverse of its standard deviation in metres.

    Raises:
        SourceError: see :func:`trajectory_text`.
    """
    poses = []
    for record in records:
        if record.estimate is None or not np.isfinite(record.estimate).all():
            continue
        variance = math.nan if record.covariance is None else float(np.trace(record.covariance[:3, :3]))
        confidence = 1 / math.sqrt(variance) if variance > 0 else 0.0
        poses.append(NamedPose(record.name, record.stamp_ns, record.estimate, confidence))
    return trajectory_text(poses, form)


def trajectory_text(poses: Iterable[NamedPose], form: str) -> str:
    """Return the lines of a result file.

    Raises:
        SourceError: the form is not that of a file, or a name does not fit it.
    """
    if form == "tum":
        return tum_text((pose.stamp_ns, pose.T_map_camera) for pose in poses)
    if form not in ("rio10", "lamar", "mapfree"):
        raise SourceError(f"'{form}' is not a form of result files; known: tum, rio10, lamar, mapfree.")
    head = "# timestamp, device_id, qw, qx, qy, qz, tx, ty, tz\n" if form == "lamar" else ""
    return head + "".join(_line(pose, form) for pose in poses)


def _line(pose: NamedPose, form: str) -> str:
    T = inverse_pose(pose.T_map_camera) if form == "mapfree" else pose.T_map_camera
    x, y, z, w = matrix_to_quaternion(T[:3, :3])
    numbers = [f"{value:.9g}" for value in (w, x, y, z, *T[:3, 3])]
    if form == "lamar":
        stamp, _, device = pose.name.partition("/")
        if not stamp.isdigit() or not device:
            raise SourceError(f"LaMAR's results are by stamp and device, and an image is named '{pose.name}'.")
        return ", ".join([stamp, device, *numbers]) + "\n"
    if not pose.name or " " in pose.name:
        raise SourceError(f"A result needs a name without blanks, and an image is named '{pose.name}'.")
    return " ".join([pose.name, *numbers, *([f"{pose.confidence:.6g}"] if form == "mapfree" else [])]) + "\n"


@dataclass(frozen=True)
class Pair:
    """Image with its truth and, if there is one, its estimate."""

    key: Key
    truth: Matrix
    estimate: Matrix | None
    confidence: float


def paired(estimate: Trajectory, truth: Trajectory, *, max_dt_s: float = 0.02, count: str = "") -> list[Pair]:
    """Return the images to judge, in the order of the truth (or of the estimates).

    Names are compared whole or, if none agree, by their last part. Stamps are compared within ``max_dt_s``.

    Args:
        estimate: estimated poses.
        truth: true poses.
        max_dt_s: largest distance of stamps.
        count: ``truth``: every image of the truth counts, one without an estimate as a failure; ``estimates``: every
            estimate that has a truth, which is interpolated between stamps. Empty: ``truth`` for names, ``estimates``
            for stamps, since a motion capture system has more poses than there are images.

    Raises:
        SourceError: one has names and the other stamps, or nothing agrees.
    """
    if (estimate.form == "tum") != (truth.form == "tum"):
        raise SourceError(
            f"The estimates are of the form '{estimate.form}' and the truth of '{truth.form}': one has stamps and the "
            "other names."
        )
    if truth.form == "tum":
        pairs = _paired_by_stamp(estimate, truth, max_dt_s, count or "estimates")
    else:
        pairs = _paired_by_name(estimate, truth, count or "truth")
    if not any(pair.estimate is not None for pair in pairs):
        raise SourceError("No estimate belongs to an image of the truth; are both of the same recording?")
    return pairs


def _paired_by_name(estimate: Trajectory, truth: Trajectory, count: str) -> list[Pair]:
    name_of: Callable[[Key], str] = str
    if not estimate.poses.keys() & truth.poses.keys():
        name_of = _last_part
        for trajectory in (estimate, truth):
            if len({name_of(key) for key in trajectory.poses}) < len(trajectory.poses):
                raise SourceError("The names of estimates and truth differ, and their last parts are not unique.")
    own = {name_of(key): key for key in estimate.poses}
    pairs = []
    for key, T in truth.poses.items():
        found = own.get(name_of(key))
        if found is not None or count == "truth":
            confidence = estimate.confidence.get(found, math.nan) if found is not None else math.nan
            pairs.append(Pair(key, T, None if found is None else estimate.poses[found], confidence))
    return pairs


def _last_part(key: Key) -> str:
    return str(key).rsplit("/", 1)[-1]


def _paired_by_stamp(estimate: Trajectory, truth: Trajectory, max_dt_s: float, count: str) -> list[Pair]:
    limit_ns = int(max_dt_s * 1e9)
    if count == "truth":
        stamps = sorted(int(key) for key in estimate.poses)
        pairs = []
        for key, T in sorted(truth.poses.items()):
            match = nearest_stamp(stamps, int(key), limit_ns)
            pairs.append(Pair(key, T, None if match is None else estimate.poses[stamps[match]], math.nan))
        return pairs
    order = sorted(int(key) for key in truth.poses)
    track = PoseTrack(order, [truth.poses[key] for key in order], near_s=max_dt_s)
    return [
        Pair(key, T_truth, T, math.nan)
        for key, T in sorted(estimate.poses.items())
        if (T_truth := track.at(int(key))) is not None
    ]


@dataclass(frozen=True)
class Judgement:
    """Figures of a trajectory against its truth."""

    accuracy: Accuracy
    recall: Mapping[str, float]
    """Share of the images strictly within each entry of :data:`THRESHOLDS`."""
    catastrophic: float
    """Share of the images with an estimate that is 0.5 m or 10 degrees off, or more."""
    confidence_auc: float
    """Area under precision (25 cm, 5 deg) over the share of images answered, surest first; NaN without confidences."""

    def figures(self) -> dict[str, float | None]:
        """Return all numbers by name; None for what is not finite."""
        found = {
            "frames": self.accuracy.frames,
            "localized": self.accuracy.localized,
            "median_translation_m": self.accuracy.median_translation_m,
            "median_rotation_deg": self.accuracy.median_rotation_deg,
            **{f"recall.{name}": value for name, value in {**self.accuracy.recall, **self.recall}.items()},
            "catastrophic": self.catastrophic,
            "confidence_auc": self.confidence_auc,
        }  # fmt: skip
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


def judged(pairs: list[Pair]) -> tuple[Judgement, list[PoseError]]:
    """Return the figures of pairs, and the error of each."""
    errors = [pose_error(pair.estimate, pair.truth) for pair in pairs]
    far = [e.translation_m >= CATASTROPHIC[0] or e.rotation_deg >= CATASTROPHIC[1] for e in errors]
    wrong = sum(pair.estimate is not None and is_far for pair, is_far in zip(pairs, far, strict=True))
    return (
        Judgement(
            accuracy(errors),
            {name: recall(errors, *limits) for name, limits in THRESHOLDS.items()},
            wrong / len(pairs) if pairs else math.nan,
            _confidence_auc(pairs, errors),
        ),
        errors,
    )


def _confidence_auc(pairs: list[Pair], errors: list[PoseError]) -> float:
    """Return the area under the curve of precision over the share of images answered, as Map-free defines it."""
    known = [
        (pair.confidence, error.translation_m < 0.25 and error.rotation_deg < 5.0)
        for pair, error in zip(pairs, errors, strict=True)
        if pair.estimate is not None and math.isfinite(pair.confidence)
    ]
    if not known:
        return math.nan
    good = np.array([is_good for _, is_good in sorted(known, key=lambda item: -item[0])], dtype=np.float64)
    precision = np.cumsum(good) / np.arange(1, len(good) + 1)
    return float(precision.sum() / len(pairs))


def dcre(T_truth: Matrix, T_estimate: Matrix, depth_m: NDArray[np.float32], intrinsics: tuple[float, ...]) -> float:
    """Return the dense correspondence reprojection error of RIO10, 0 to 1; NaN without depth.

    Each pixel's point is moved from the true to the estimated camera. Its way in the image, over the image's diagonal
    and at most 1, is averaged over all pixels.

    Args:
        T_truth: true pose, camera to map.
        T_estimate: estimated pose.
        depth_m: depth (H, W) seen from the true pose; 0 where unknown.
        intrinsics: fx, fy, cx, cy in pixels of the depth image.
    """
    fx, fy, cx, cy = intrinsics
    rows, columns = np.nonzero(depth_m > 0)
    if not len(rows):
        return math.nan
    z = depth_m[rows, columns].astype(np.float64)
    points = np.stack([(columns - cx) / fx * z, (rows - cy) / fy * z, z])
    T = inverse_pose(T_estimate) @ T_truth
    moved = T[:3, :3] @ points + T[:3, 3:]
    with np.errstate(divide="ignore", invalid="ignore"):
        du = moved[0] / moved[2] * fx + cx - columns
        dv = moved[1] / moved[2] * fy + cy - rows
        share = np.hypot(du, dv) / math.hypot(*depth_m.shape)
    return float(np.fmin(share, 1.0).mean())
