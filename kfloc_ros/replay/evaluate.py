# SPDX-License-Identifier: Apache-2.0
"""From a recording and the truth to the records and counters of an evaluation. Needs no ROS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kfloc_ros.bags.truth import BagTransforms
from kfloc_ros.evaluation.metrics import Accuracy, accuracy, pose_errors
from kfloc_ros.evaluation.offline import STATISTICS, FrameRecord
from kfloc_ros.messages.poses import BodyPose
from kfloc_ros.replay.recording import Played, PoseSeen, Recording, StatusSeen
from kfloc_ros.types import Matrix, TrackingState

PAUSE_S = 0.5
"""Longer pauses between images do not count as time that the nodes had work."""

SeenT = TypeVar("SeenT", PoseSeen, StatusSeen)


@dataclass(frozen=True)
class ReplayCounts:
    """What became of the images that were played: played = received + lost, received = processed + dropped."""

    played: int
    received: int
    """Images that reached the nodes, by their own counter."""
    processed: int
    """Images that were answered with a status."""
    dropped: int
    """Images that the nodes received and left out: too old, overtaken by a newer one, or refused."""
    lost: int
    """Images that did not reach the nodes."""
    tf: int
    """Transforms on /tf."""


def replay_records(
    recording: Recording,
    truth: Mapping[int, Matrix],
    positions: Mapping[int, int],
    transforms: BagTransforms | None = None,
) -> list[FrameRecord]:
    """One record for every image played, in order; unanswered ones have ``processed`` False.

    Args:
        truth: ``T_map_camera`` by stamp.
        positions: number of the image in its bag by stamp.
        transforms: where the camera is on the base frame, if poses are of that; None: they are of the camera.
    """
    sent: dict[int, list[tuple[int, int]]] = {}
    for number, played in enumerate(recording.played):
        sent.setdefault(played.stamp_ns, []).append((played.sent_ns, number))
    poses, coarse = _by_image(recording.poses, sent), _by_image(recording.coarse, sent)
    status = _by_image(recording.status, sent)
    return [
        _record(
            played,
            index=positions.get(played.stamp_ns, number),
            truth=truth.get(played.stamp_ns),
            pose=_camera_pose(poses.get(number), transforms),
            coarse=coarse.get(number),
            status=status.get(number),
        )
        for number, played in enumerate(recording.played)
    ]


def transform_accuracy(recording: Recording, truth: Mapping[int, Matrix], transforms: BagTransforms) -> Accuracy:
    """How right TF was about the camera at the time of every image played, once the transforms around it had come.

    With ``map_to_odom`` it is the correction of a moment ago, carried on by the odometry.
    """
    store = transforms.tree()
    for seen in recording.map_transforms:
        store.set(transforms.map_frame, seen.child, seen.stamp_ns, seen.T_map_child)
    records: list[FrameRecord] = []
    for played in recording.played:
        T = store.find(transforms.map_frame, transforms.camera_frame, played.stamp_ns)
        records.append(FrameRecord(len(records), played.stamp_ns, truth.get(played.stamp_ns), estimate=T))
    return accuracy(pose_errors(records))


def replay_counts(recording: Recording, records: Sequence[FrameRecord]) -> ReplayCounts:
    """Counters of a replay. The nodes' own ``received`` is taken from the last status or diagnostics."""
    played, processed = len(records), sum(record.processed for record in records)
    reports = [seen.values for seen in recording.status[-1:]] + list(recording.diagnostics.values())
    counted = [int(value) for report in reports if (value := _number(report.get("received"))) is not None]
    received = min(played, max(processed, *counted)) if counted else played
    return ReplayCounts(
        played=played,
        received=received,
        processed=processed,
        dropped=received - processed,
        lost=played - received,
        tf=sum(recording.transforms.values()),
    )


def active_seconds(recording: Recording, rate: float) -> float:
    """Wall time in which images came, pauses of the recording left out, and the answer to the last one."""
    stamps = [played.stamp_ns for played in recording.played]
    gaps = [(later - sooner) * 1e-9 for sooner, later in itertools.pairwise(stamps)]
    playing_s = sum(gap for gap in gaps if 0 < gap <= PAUSE_S) / rate
    tail_s = 0.0
    if recording.status and recording.played:
        tail_s = max((recording.status[-1].received_ns - recording.played[-1].sent_ns) * 1e-9, 0.0)
    return playing_s + tail_s


def wall_seconds(recording: Recording) -> float:
    """Wall time from the first image to the answer to the last."""
    if not (recording.played and recording.status):
        return 0.0
    return max((recording.status[-1].received_ns - recording.played[0].sent_ns) * 1e-9, 0.0)


def _by_image(answers: Sequence[SeenT], sent: Mapping[int, Sequence[tuple[int, int]]]) -> dict[int, SeenT]:
    """Answers by the number of their image; of images with one stamp, as a bag that loops has, the last before it."""
    found: dict[int, SeenT] = {}
    for answer in answers:
        before = [number for sent_ns, number in sent.get(answer.stamp_ns, ()) if sent_ns <= answer.received_ns]
        if before:
            found[before[-1]] = answer
    return found


@dataclass(frozen=True, eq=False)
class _CameraPose:
    """A pose that arrived, of the camera."""

    pose: BodyPose
    received_ns: int


def _camera_pose(seen: PoseSeen | None, transforms: BagTransforms | None) -> _CameraPose | None:
    if seen is None:
        return None
    pose = BodyPose(seen.T_map_body, seen.covariance_matrix)
    if transforms is not None:
        T_base_camera = transforms.T_base_camera(seen.stamp_ns)
        if T_base_camera is None:
            return None
        pose = pose.moved(T_base_camera)
    return _CameraPose(pose, seen.received_ns)


def _record(
    played: Played,
    *,
    index: int,
    truth: Matrix | None,
    pose: _CameraPose | None,
    coarse: PoseSeen | None,
    status: StatusSeen | None,
) -> FrameRecord:
    values = {} if status is None else dict(status.values)
    arrival_ns = pose.received_ns if pose is not None else None if status is None else status.received_ns
    numbers = {key: number for key, text in values.items() if (number := _number(text)) is not None}
    stages = {key: value for key, value in numbers.items() if key.endswith("_ms") and not key.startswith("latency")}
    return FrameRecord(
        index=index,
        stamp_ns=played.stamp_ns,
        truth=truth,
        estimate=None if pose is None else pose.pose.T_map_body,
        coarse=None if coarse is None else coarse.T_map_body,
        state=values.get("state", TrackingState.LOST.value if pose is None else TrackingState.TRACKING.value),
        reason=values.get("reason", "") if status is not None or pose is not None else "no answer from the nodes",
        covariance=None if pose is None else pose.pose.covariance,
        stats={name: numbers[key] for name, key in STATISTICS.items() if key in numbers},
        timings_ms={key.removesuffix("_ms"): value for key, value in stages.items()},
        latency_ms=None if arrival_ns is None else (arrival_ns - played.sent_ns) * 1e-6,
        tracked=values.get("tracked") == "true",
        processed=status is not None or pose is not None,
    )


def _number(text: str | None) -> float | None:
    """A finite number, or None for any other text."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
