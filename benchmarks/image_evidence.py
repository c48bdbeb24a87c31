# SPDX-License-Identifier: Apache-2.0
"""What the images of a recording tell of its poses, whatever the localizer does: a bundle adjustment as the best case.

For every frame, its pose and those of the frames before it (--window) are adjusted to SIFT matches: with each other and
with the mapped images on epipolar lines, and with the mapped images' depth as reprojection errors. The mapped images'
poses stay. The adjustment begins at the true poses and sees every image at its full resolution. A frame whose pose is
wrong in its result is one that no localizer can be expected to claim rightly, or whose truth does not fit the images.

    python benchmarks/image_evidence.py transforms:VISIT --mapped transforms:MAPPED --json FILE
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from disk_lightglue import lift
from numpy.typing import NDArray
from tqdm import tqdm

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, rotation_angle_deg, skew, so3_exp

RATIO = 0.85
"""Largest ratio of the distances to the nearest and the second nearest descriptor."""
MATCH_PX = 0.7
"""Scale of the Cauchy loss of an epipolar distance."""
REPROJECTION_PX, DEPTH_ERROR = 1.0, 0.02
"""Scale of the loss of a reprojection error, and relative error of a depth, which adds to it by the parallax."""
MAX_TRUE_PX = 8.0
"""Largest median epipolar distance of a pair of images at the true poses; others are wrong matches."""
MIN_MATCHES, KEYPOINTS = 15, 3500
NEAR_M, NEAR_DEG = 2.5, 50.0
MAPPED_VIEWS, EARLIER_FRAMES = 16, 8
"""Nearest images that a frame is matched with, within the two limits above."""
SHARED = 6.0
"""Number of pairs of images that a keypoint is in, roughly: their errors are not independent."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Matches of a frame with an earlier frame, or with a mapped image."""

    frame: int
    other: int
    mapped: bool
    at: NDArray[np.float64]
    """(N, 2) pixels in the frame."""
    other_at: NDArray[np.float64]
    """(N, 2) pixels in the other image."""
    points: NDArray[np.float64]
    """(N, 3) metres, map frame, of a mapped image's pixels; NaN without depth."""


@dataclass(frozen=True)
class Result:
    """Pose of one frame by the images up to it, compared with its truth."""

    frame: int
    away_m: float
    away_deg: float
    pairs: int


class Images:
    """SIFT keypoints of a source's images as a camera sees them, extracted when needed."""

    def __init__(self, source: FrameSource, camera: Camera) -> None:
        self._source, self._adapter, self.camera = source, ImageAdapter(source.camera, camera), camera
        poses = [source.pose(k) for k in range(len(source))]
        self.frames = [k for k, T in enumerate(poses) if T is not None]
        """Positions of the frames with a true pose."""
        self.poses = [T for T in poses if T is not None]
        self._sift = cv2.SIFT_create(KEYPOINTS, contrastThreshold=0.01)
        self._seen: dict[int, tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float64]]] = {}

    def keypoints(self, k: int) -> tuple[NDArray[np.float64], NDArray[np.float32], NDArray[np.float64]]:
        """Return pixels (N, 2), descriptors (N, 128) and points in the map (N, 3; NaN without depth) of an image."""
        if k not in self._seen:
            frame = self._source[self.frames[k]]
            grey = cv2.cvtColor(self._adapter(frame.image), cv2.COLOR_RGB2GRAY)
            keypoints, rows = self._sift.detectAndCompute(grey, None)
            at = np.array([p.pt for p in keypoints]).reshape(-1, 2)
            descriptors = np.zeros((0, 128), np.float32) if rows is None else rows
            descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(axis=1, keepdims=True), 1e-9))
            points = np.full((len(at), 3), np.nan)
            if frame.depth_m is not None and len(at):
                T = self.poses[k]
                points = lift(at, self._adapter.nearest(frame.depth_m), self.camera) @ T[:3, :3].T + T[:3, 3]
            self._seen[k] = at, descriptors.astype(np.float32), points
        return self._seen[k]


def nearest(T: Matrix, poses: Sequence[Matrix], among: Sequence[int], count: int) -> list[int]:
    """Return the numbers of the poses (4, 4) nearest to a pose, within ``NEAR_M`` and ``NEAR_DEG``."""
    away = {}
    for k in among:
        distance_m = float(np.linalg.norm(poses[k][:3, 3] - T[:3, 3]))
        angle_deg = rotation_angle_deg(poses[k][:3, :3].T @ T[:3, :3])
        if distance_m < NEAR_M and angle_deg < NEAR_DEG:
            away[k] = distance_m + angle_deg / 30.0
    return sorted(away, key=away.__getitem__)[:count]


def pairs_of(frame: int, visit: Images, mapped: Images, window: int) -> list[Pair]:
    """Return the matches of a frame with the nearest mapped images, and with the nearest frames before it."""
    T, matcher, found = visit.poses[frame], cv2.BFMatcher(), []
    earlier = range(max(0, frame - window), frame)
    chosen = [(mapped, k) for k in nearest(T, mapped.poses, range(len(mapped.poses)), MAPPED_VIEWS)]
    chosen += [(visit, k) for k in nearest(T, visit.poses, earlier, EARLIER_FRAMES)]
    at, descriptors, _ = visit.keypoints(frame)
    for images, k in chosen:
        other_at, others, points = images.keypoints(k)
        if min(len(at), len(other_at)) < MIN_MATCHES:
            continue
        back = {m.queryIdx: m.trainIdx for m in matcher.match(others, descriptors)}
        near = (p for p in matcher.knnMatch(descriptors, others, k=2) if len(p) == 2)
        kept = [a for a, b in near if a.distance < RATIO * b.distance and back[a.trainIdx] == a.queryIdx]
        rows, columns = [m.queryIdx for m in kept], [m.trainIdx for m in kept]
        if len(kept) < MIN_MATCHES:
            continue
        _, inliers = cv2.findFundamentalMat(at[rows], other_at[columns], cv2.USAC_MAGSAC, 1.5, 0.999, 5000)
        keep = np.zeros(0, bool) if inliers is None else inliers.ravel() > 0
        if keep.sum() < MIN_MATCHES:
            continue
        pair = Pair(frame, k, images is mapped, at[rows][keep], other_at[columns][keep], points[columns][keep])
        true_px = np.median(np.abs(epipolar_px(pair, T, images.poses[k], visit.camera)))
        if true_px < MAX_TRUE_PX:
            found.append(pair)
    return found


def epipolar_px(pair: Pair, T: Matrix, T_other: Matrix, camera: Camera) -> NDArray[np.float64]:
    """Return the Sampson distances (N,) of matches to their epipolar lines at two poses (4, 4), pixels."""
    K = np.linalg.inv([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]])
    relative = inverse_pose(T_other) @ T
    F = K.T @ skew(relative[:3, 3]) @ relative[:3, :3] @ K
    one = np.ones((len(pair.at), 1))
    a, b = np.hstack([pair.at, one]), np.hstack([pair.other_at, one])
    Fa, Fb = a @ F.T, b @ F
    gradient = np.sqrt((Fa[:, :2] ** 2).sum(axis=1) + (Fb[:, :2] ** 2).sum(axis=1) + 1e-12)
    return np.asarray((b * Fa).sum(axis=1) / gradient)


def residuals(pair: Pair, T: Matrix, T_other: Matrix, camera: Camera) -> NDArray[np.float64]:
    """Return the residuals of a pair of images at two poses (4, 4), in units of their scales."""
    lines = epipolar_px(pair, T, T_other, camera) / MATCH_PX
    known = np.isfinite(pair.points[:, 0])
    if not pair.mapped or not known.any():
        return lines
    points = pair.points[known]
    local = (points - T[:3, 3]) @ T[:3, :3]
    z = np.maximum(local[:, 2:], 0.1)
    away = local[:, :2] / z * (camera.fx, camera.fy) + (camera.cx, camera.cy) - pair.at[known]
    baseline_m = np.linalg.norm(T[:3, 3] - T_other[:3, 3])
    parallax_px = camera.fx * baseline_m / np.linalg.norm(points - T_other[:3, 3], axis=1)
    return np.concatenate([lines, (away / np.hypot(REPROJECTION_PX, DEPTH_ERROR * parallax_px)[:, None]).ravel()])


def moved(T: Matrix, step: NDArray[np.float64]) -> Matrix:
    """Return a pose (4, 4) after a step (6,) of (dt, dw) in its own frame."""
    return T @ make_pose(so3_exp(step[3:]), step[:3])


def adjusted(
    poses: Mapping[int, Matrix], pairs: Sequence[Pair], mapped: Sequence[Matrix], camera: Camera, iterations: int = 15
) -> dict[int, Matrix]:
    """Return the poses (4, 4) of frames at which their matches fit best, by Levenberg-Marquardt with a Cauchy loss.

    Args:
        poses: poses of the frames to begin with.
        pairs: their matches with each other and with mapped images.
        mapped: poses of the mapped images, which stay.
        camera: pinhole camera of all images.
        iterations: largest number of steps.
    """
    X, column, damping = dict(poses), {k: 6 * n for n, k in enumerate(poses)}, 1e-4
    size, small = 6 * len(column), 1e-5 * np.eye(6)

    def of_pair(pair: Pair, T: Matrix, T_other: Matrix) -> NDArray[np.float64]:
        return residuals(pair, T, T_other, camera)

    def others(pair: Pair, at: Mapping[int, Matrix]) -> Matrix:
        return mapped[pair.other] if pair.mapped else at[pair.other]

    def cost(at: Mapping[int, Matrix]) -> float:
        return sum(float(np.log1p(of_pair(p, at[p.frame], others(p, at)) ** 2).sum()) for p in pairs) / SHARED

    last = cost(X)
    for _ in range(iterations):
        H, g = np.zeros((size, size)), np.zeros(size)
        for pair in pairs:
            T, T_other = X[pair.frame], others(pair, X)
            r = of_pair(pair, T, T_other)
            weight = 1.0 / (1.0 + r**2) / SHARED
            blocks = [(column[pair.frame], [of_pair(pair, moved(T, e), T_other) for e in small])]
            if not pair.mapped:
                blocks.append((column[pair.other], [of_pair(pair, T, moved(T_other, e)) for e in small]))
            of_columns = [(c, (np.stack(ends, axis=1) - r[:, None]) / 1e-5) for c, ends in blocks]
            for c, J in of_columns:
                g[c : c + 6] += J.T @ (weight * r)
                for d, other in of_columns:
                    H[c : c + 6, d : d + 6] += J.T @ (weight[:, None] * other)
        for _ in range(6):
            step = -np.linalg.solve(H + np.diag(damping * np.diag(H) + 1e-6), g)
            tried = {k: moved(T, step[column[k] : column[k] + 6]) for k, T in X.items()}
            found = cost(tried)
            if found < last:
                break
            damping *= 10.0
        if found >= last:
            break
        gain, X, last, damping = last - found, tried, found, max(damping / 10.0, 1e-8)
        if gain < 1e-6 * last:
            break
    return X


def evaluate(visit: Images, mapped: Images, window: int) -> list[Result]:
    """Return, for every frame of a visit, how far the images up to it lead its pose from the truth."""
    results, pairs = [], list[Pair]()
    for n in tqdm(range(len(visit.poses)), desc="adjusting", unit="frame"):
        pairs = [*(p for p in pairs if p.frame >= n - window), *pairs_of(n, visit, mapped, window)]
        used = [p for p in pairs if p.mapped or p.other >= n - window]
        poses = {k: visit.poses[k] for k in range(max(0, n - window), n + 1)}
        T, truth = adjusted(poses, used, mapped.poses, visit.camera)[n], visit.poses[n]
        away_m, away_deg = (
            float(np.linalg.norm(T[:3, 3] - truth[:3, 3])),
            rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]),
        )
        results.append(Result(visit.frames[n], away_m, away_deg, sum(p.frame == n for p in used)))
    return results


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--mapped", required=True, metavar="SOURCE", help="recording of the map, with depth")
    parser.add_argument("--mapped-split", metavar="SPLIT", help="part of it that the map was made of")
    parser.add_argument("--window", type=int, default=25, metavar="N", help="earlier frames adjusted with each frame")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the frames as JSON")
    args = parser.parse_args()
    if args.window < 0:
        parser.error("--window is a number of frames, 0 or more")
    try:
        source = open_source_from(args, depth=False)
        mapped = open_source(args.mapped, poses=args.poses, split=args.mapped_split)
        if mapped[0].depth_m is None:
            raise SourceError(f"The adjustment needs depth, and '{args.mapped}' has none.")
        results = evaluate(Images(source, mapped.camera), Images(mapped, mapped.camera), args.window)
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = [r.frame for r in results if r.away_m > 0.1 or r.away_deg > 5.0]
    alone = [r.frame for r in results if not r.pairs]
    median_m, median_deg = (np.median([getattr(r, key) for r in results]) for key in ("away_m", "away_deg"))
    print(format_table(
        [[
            str(len(results)),
            f"{100 * median_m:.2f} cm, {median_deg:.2f} deg",
            f"{100 * np.mean([r.away_m < 0.05 and r.away_deg < 5.0 for r in results]):.1f} %",
            f"{100 * (1 - len(wrong) / len(results)):.1f} %",
        ]],
        header=["frames", "median", "5 cm/5 deg", "10 cm/5 deg"],
    ))  # fmt: skip
    print(f"Wrong by more than 10 cm or 5 deg: {', '.join(map(str, wrong)) or 'none'}")
    print(f"Without any match, so at their true poses: {', '.join(map(str, alone)) or 'none'}")
    if args.json is not None:
        args.json.write_text(json.dumps([vars(r) for r in results], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
