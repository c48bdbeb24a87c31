# SPDX-License-Identifier: Apache-2.0
"""Walks through the doors of the simulated building, frame by frame, for `places.py`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kfloc_ros.cli.tables import format_table
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import PlaceLocalizer
from kfloc_ros.maps.place import Place
from kfloc_ros.simulation.building import PITCH_X_M, PITCH_Y_M, RATE_HZ, ROOMS, ROOMS_IN_A_ROW, WalkSource
from kfloc_ros.types import Frame, Matrix, PoseEstimate

NEAR_M, NEAR_DEG = 0.5, 20.0
DOOR_ROOMS, DOOR_EVERY = 3, 2
AT_DOOR_M, THRESHOLD_M = 1.0, 0.3
COVERED_S = 1.5


@dataclass(frozen=True)
class DoorRow:
    """Result of a walk through doors, frame by frame."""

    walk: str
    covered_s: float
    """Time for which the lens was covered around each door."""
    frames: int
    without_pose: int
    wrong: int
    wrong_room: int
    median_cm: float
    p95_cm: float
    worst_cm: float
    at_doors: int
    at_doors_without_pose: int
    at_doors_median_cm: float
    at_doors_worst_cm: float
    back_s: list[float]
    """Times from the end of each cover to the first pose; infinite without a pose."""
    changes: list[str]
    """Submap before and after, and the camera's distance behind the plane between the rooms, in its direction."""
    frame_ms: float
    """Median processor time of a frame."""
    slowest_ms: float
    waits: int
    """Frames that waited for a submap, the first included."""


def timed(
    localizer: PlaceLocalizer, frame: Frame, adapter: ImageAdapter, hints: Sequence[Matrix] = ()
) -> tuple[PoseEstimate, float]:
    """Return the estimate of a frame and its processor time, which other processes hardly change."""
    adapted = replace(frame, image=adapter(frame.image), camera=adapter.target)
    start = time.process_time()
    estimate = localizer.process(adapted, hints).estimate
    return estimate, 1e3 * (time.process_time() - start)


def judged(estimate: PoseEstimate, frame: Frame) -> tuple[str, float]:
    """Return the outcome of a cold start, and the error of its pose."""
    T, truth = estimate.T_map_camera, frame.T_map_camera
    if T is None or truth is None:
        return ("alike" if "look alike" in estimate.reason else "none"), float("nan")
    away_m = float(np.linalg.norm(T[:3, 3] - truth[:3, 3]))
    near = away_m < NEAR_M and rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]) < NEAR_DEG
    return ("right" if near else "wrong"), away_m


def through_doors(folder: Path, loaded_submaps: int) -> list[DoorRow]:
    """Return the results of the walks there and back, in the place of these rooms."""
    place = Place.load(folder)
    walks = [WalkSource(1, DOOR_ROOMS), WalkSource(DOOR_ROOMS, 1)]
    return [walked(place, walk, loaded_submaps, cover_s) for cover_s in (0.0, COVERED_S) for walk in walks]


def walked(place: Place, walk: WalkSource, loaded_submaps: int, covered_s: float = 0.0) -> DoorRow:
    """Localize one walk, as a node would, with the true pose of the first frame only."""
    covers = around_doors(walk, covered_s)
    back_s = [math.inf] * len(covers)
    localizer = PlaceLocalizer(place, LocalizerConfig(loaded_submaps=loaded_submaps))
    adapter = ImageAdapter(walk.camera, localizer.camera)
    hints = [walk.pose(0)]
    frames: list[tuple[float, bool, bool, bool]] = []  # error, at a door, wrong, in a wrong room
    changes, spent_ms, submap = [], [], ""
    for position in range(0, len(walk), DOOR_EVERY):
        frame = replace(walk[position], depth_m=None)
        covered = any(position in cover for cover in covers)
        if covered:
            frame = replace(frame, image=np.full_like(frame.image, 12))
        estimate, ms = timed(localizer, frame, adapter, hints)
        hints = []
        if covered and estimate.T_map_camera is None:
            continue
        spent_ms.append(ms)
        for number, cover in enumerate(covers):
            if position >= cover.stop and estimate.T_map_camera is not None:
                back_s[number] = min(back_s[number], (position - cover.stop) / RATE_HZ)
        outcome, error_m = judged(estimate, frame)
        truth = walk.pose(position)[:3, 3]
        frames.append(
            (error_m, door_distance_m(truth[0]) < AT_DOOR_M, outcome == "wrong", is_in_wrong_room(estimate, truth))
        )
        if localizer.submap != submap:
            if submap:
                ahead = 1.0 if walk.end > walk.start else -1.0
                behind_m = (truth[0] / PITCH_X_M - 0.5 - round(truth[0] / PITCH_X_M - 0.5)) * PITCH_X_M * ahead
                changes.append(f"{submap} -> {localizer.submap or 'none'} at {behind_m:+.2f} m")
            submap = localizer.submap
        print(f"{frame.name}: {outcome} {100 * error_m:.1f} cm {submap} {estimate.reason}", file=sys.stderr)
    errors = np.array([item[0] for item in frames])
    near = np.array([item[1] for item in frames])
    posed = np.isfinite(errors)
    cache = localizer.guide.cache
    cache.close()
    return DoorRow(
        walk=walk.name,
        covered_s=covered_s,
        frames=len(frames),
        without_pose=int((~posed).sum()),
        wrong=sum(item[2] for item in frames),
        wrong_room=sum(item[3] for item in frames),
        median_cm=float(100 * np.median(errors[posed])),
        p95_cm=float(100 * np.quantile(errors[posed], 0.95)),
        worst_cm=float(100 * errors[posed].max()),
        at_doors=int(near.sum()),
        at_doors_without_pose=int((near & ~posed).sum()),
        at_doors_median_cm=float(100 * np.median(errors[near & posed])),
        at_doors_worst_cm=float(100 * errors[near & posed].max()),
        back_s=back_s,
        changes=changes,
        frame_ms=float(np.median(spent_ms[1:])),
        slowest_ms=float(np.max(spent_ms[1:])),
        waits=cache.counts.waits,
    )


def around_doors(walk: WalkSource, seconds: float) -> list[range]:
    """Return the positions within a time around each crossing of a plane between two rooms."""
    rooms = [room_at(*walk.pose(position)[:2, 3]) for position in range(len(walk))]
    half = round(seconds * RATE_HZ / 2)
    return [range(k - half, k + half) for k in range(1, len(rooms)) if half and rooms[k] != rooms[k - 1]]


def is_in_wrong_room(estimate: PoseEstimate, truth: Matrix) -> bool:
    """Return true if a pose is in another room than the camera, and not near the door between them."""
    if estimate.T_map_camera is None:
        return False
    place = estimate.T_map_camera[:3, 3]
    return room_at(place[0], place[1]) != room_at(truth[0], truth[1]) and door_distance_m(place[0]) > THRESHOLD_M


def door_table(rows: Sequence[DoorRow]) -> str:
    """Return the figures and the changes of submap for a terminal."""
    header = ["walk", "covered", "back", "frames", "no pose", "wrong", "wrong room", "median", "95 %", "worst"]
    header += ["at doors", "no pose", "median", "worst", "frame", "slowest", "waits"]
    lines = []
    for row in rows:
        back = ", ".join(f"{v:.1f} s" for v in row.back_s) or "-"
        cells = [
            row.walk,
            f"{row.covered_s:.1f} s",
            back,
            *(str(v) for v in (row.frames, row.without_pose, row.wrong, row.wrong_room)),
        ]
        cells += [f"{v:.1f} cm" for v in (row.median_cm, row.p95_cm, row.worst_cm)]
        cells += [str(row.at_doors), str(row.at_doors_without_pose)]
        cells += [f"{v:.1f} cm" for v in (row.at_doors_median_cm, row.at_doors_worst_cm)]
        lines.append([*cells, f"{row.frame_ms:.0f} ms", f"{row.slowest_ms:.0f} ms", str(row.waits)])
    changes = [f"{row.walk}: {'; '.join(row.changes) or 'no change of submap'}" for row in rows]
    return "\n".join([format_table(lines, header=header), *changes])


def room_at(x_m: float, y_m: float) -> int:
    """Return the number of the room at a place in the building; half of a wall belongs to each of its rooms."""
    across = np.clip(round(x_m / PITCH_X_M), 0, ROOMS_IN_A_ROW - 1)
    along = np.clip(round(y_m / PITCH_Y_M), 0, ROOMS // ROOMS_IN_A_ROW - 1)
    return int(1 + across + ROOMS_IN_A_ROW * along)


def door_distance_m(x_m: float) -> float:
    """Return the distance along a row from a place to the nearest plane between two rooms."""
    return float(abs((x_m / PITCH_X_M - 0.5) - round(x_m / PITCH_X_M - 0.5)) * PITCH_X_M)
