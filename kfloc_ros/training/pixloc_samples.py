# SPDX-License-Identifier: Apache-2.0
"""Pairs of views of a SOURCE with poses and depth (or points), to train PixLoc; the k-th sample is always the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, so3_exp, so3_log
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.unet import ImageSize
from kfloc_ros.pixloc.references import smooth_depth_mask, view_distances
from kfloc_ros.types import Frame

GRID_PX = 4
TRIES = 30
"""Pairs looked at for one sample, before the source is said to have none."""
MIN_COMMON = 30
"""Points that both views of a pair must see."""
INIT_STEPS = 20
INIT_ERROR_PX = 63.0


@dataclass(frozen=True)
class PairRule:
    """Which pairs are used, and how they are shown."""

    max_distance_m: float = 2.0
    """Between the two views; a radian counts as 1.2 m."""
    min_overlap: float = 0.3
    """Share of the reference's points that the query sees."""
    resize: int = 640
    resize_by: str = "longer"
    """Side that is brought to ``resize``: ``longer``, which only makes smaller, or ``shorter``."""
    crop: int = 512
    points: int = 512
    init: str = "interpolate"
    """``identity``; ``interpolate``: 75 to 100 % of the way to the truth; ``max_error``: as far from it as the
    median reprojection error stays below 63 px."""
    init_low: float = 0.75
    init_high: float = 1.0
    max_overlap: float = 1.0
    """Of preprocessed data, as are the baselines."""
    min_baseline_m: float = 0.0
    max_baseline_m: float = 7.0
    """Between a query and a reference of CMU, as published."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """A batch."""

    reference: torch.Tensor
    """(B, 3, h, w) in [0, 1]"""
    query: torch.Tensor
    camera_reference: CameraTensor
    camera_query: CameraTensor
    points: torch.Tensor
    """(B, N, 3) float64 in the reference camera."""
    T_true: Pose
    """(B,) T_query_reference"""
    T_init: Pose

    def to(self, device: torch.device) -> Pairs:
        """The same on another device."""
        return Pairs(
            self.reference.to(device), self.query.to(device), self.camera_reference.to(device),
            self.camera_query.to(device), self.points.to(device), self.T_true.to(device), self.T_init.to(device),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Shown:
    """One view as it is shown."""

    pixels: torch.Tensor
    camera: CameraTensor


def together(parts: Sequence[Pairs]) -> Pairs:
    """Return batches of one as one batch; the images of all are of one size."""
    return Pairs(
        torch.cat([p.reference for p in parts]),
        torch.cat([p.query for p in parts]),
        CameraTensor.stack([p.camera_reference[0] for p in parts]),
        CameraTensor.stack([p.camera_query[0] for p in parts]),
        torch.cat([p.points for p in parts]),
        Pose.stack([p.T_true[0] for p in parts]),
        Pose.stack([p.T_init[0] for p in parts]),
    )


class PairSamples:
    """Draws pairs.

    Args:
        source: with poses, and depth or points that its images see.
        rule: for pairs.
        seed: of everything that is drawn.

    Raises:
        SourceError: fewer than two frames have poses.
    """

    def __init__(self, source: FrameSource, rule: PairRule, seed: int = 0) -> None:
        self._source, self._rule, self._seed = source, rule, seed
        poses = [(k, T) for k in range(len(source)) if (T := source.pose(k)) is not None]
        if len(poses) < 2:
            raise SourceError(
                f"Training on pairs needs at least two frames with poses, '{source.name}' has {len(poses)}."
            )
        self._positions = [k for k, _ in poses]
        self._T_map_camera = np.stack([T for _, T in poses])

    def __getitem__(self, number: int) -> Pairs:
        """One pair, as a batch of one.

        Raises:
            SourceError: no two views overlap enough, or there is neither depth nor points.
        """
        rng = np.random.default_rng((self._seed, number))
        for _ in range(TRIES):
            a = int(rng.integers(len(self._positions)))
            near = view_distances(self._T_map_camera, self._T_map_camera[a]) <= self._rule.max_distance_m
            near[a] = False
            if not near.any():
                continue
            b = int(rng.choice(np.flatnonzero(near)))
            found = self._pair(a, b, rng)
            if found is not None:
                return found
        raise SourceError(
            f"'{self._source.name}' has hardly a pair of views that see the same: none of {TRIES} within "
            f"{self._rule.max_distance_m:g} m shares {self._rule.min_overlap:.0%} of its points."
        )

    def _pair(self, a: int, b: int, rng: np.random.Generator) -> Pairs | None:
        frame_a, frame_b = (self._source[self._positions[k]] for k in (a, b))
        points = self._points(frame_a, self._positions[a], self._T_map_camera[a])
        T_true = inverse_pose(self._T_map_camera[b]) @ self._T_map_camera[a]
        shown_a, shown_b = (
            show(frame.image, CameraTensor.from_camera(frame.camera), self._rule, rng) for frame in (frame_a, frame_b)
        )
        return make_pair(shown_a, shown_b, points, T_true, self._rule, rng)

    def _points(self, frame: Frame, position: int, T_map_camera: Matrix) -> NDArray[np.float64]:
        """(N, 3) in the camera: of the depth image, or the reconstruction's."""
        if frame.depth_m is None:
            points = self._source.visible_points(position)
            if points is None:
                raise SourceError(
                    f"Training needs depth or points; '{self._source.name}' has neither for '{frame.name}'."
                )
            return np.asarray((points - T_map_camera[:3, 3]) @ T_map_camera[:3, :3], dtype=np.float64)
        usable = np.zeros(frame.depth_m.shape, dtype=bool)
        usable[::GRID_PX, ::GRID_PX] = True
        v, u = np.nonzero(usable & smooth_depth_mask(frame.depth_m))
        pixels = torch.from_numpy(np.stack([u, v], axis=1).astype(np.float64))
        rays = CameraTensor.from_camera(frame.camera).image2world(pixels).numpy()
        return np.asarray(rays * frame.depth_m[v, u, None].astype(np.float64))


def show(image: NDArray[np.uint8], camera: CameraTensor, rule: PairRule, rng: np.random.Generator) -> Shown:
    """Resized and cropped at random, independently of the other view."""
    if rule.resize_by == "shorter":
        height, width = image.shape[:2]
        longer = round(rule.resize * max(height, width) / min(height, width))
        prepared = ImageSize(longer, "max_force").prepare(image)
    else:
        prepared = ImageSize(rule.resize).prepare(image)
    height, width = prepared.pixels.shape[-2:]
    h, w = min(height, rule.crop), min(width, rule.crop)
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return Shown(
        prepared.pixels[..., y : y + h, x : x + w].contiguous(), camera.scale(prepared.scale).crop((x, y), (w, h))
    )


def make_pair(
    reference: Shown,
    query: Shown,
    points: NDArray[np.float64],
    T_true: Matrix,
    rule: PairRule,
    rng: np.random.Generator,
) -> Pairs | None:
    """A batch of one, or None if the views, as they are shown, have too little in common.

    Args:
        reference, query: the two views.
        points: (N, 3) in the reference camera that it may see.
        T_true: ``T_query_reference``.
        rule: for pairs.
        rng: chooses points and the start.
    """
    moved = points @ T_true[:3, :3].T + T_true[:3, 3]
    in_reference = reference.camera.world2image(torch.from_numpy(points)).valid.numpy()
    in_query = query.camera.world2image(torch.from_numpy(moved)).valid.numpy()
    common = in_reference & in_query
    if common.sum() < MIN_COMMON or common.sum() < rule.min_overlap * in_reference.sum():
        return None
    chosen = points[rng.choice(np.flatnonzero(in_reference), rule.points)]
    T_init = initial_pose(T_true, rule, rng, query.camera, points[common])
    return Pairs(
        reference.pixels, query.pixels, reference.camera[None], query.camera[None],
        torch.from_numpy(chosen)[None], Pose.from_4x4mat(T_true)[None], Pose.from_4x4mat(T_init)[None],
    )  # fmt: skip


def initial_pose(
    T_true: Matrix, rule: PairRule, rng: np.random.Generator, camera: CameraTensor, points: NDArray[np.float64]
) -> Matrix:
    """Where the alignment of a pair starts, on the way from the reference's pose to the truth."""
    if rule.init == "interpolate":
        return _part_of(T_true, float(rng.uniform(rule.init_low, rule.init_high)))
    if rule.init == "max_error":
        true_uv = camera.world2image(_in_view(T_true, points)).points
        for share in np.linspace(0.0, 1.0, INIT_STEPS):
            T = _part_of(T_true, float(share))
            away = (camera.world2image(_in_view(T, points)).points - true_uv).norm(dim=-1)
            if float(away.median()) < INIT_ERROR_PX:
                return T
    return _part_of(T_true, 0.0)


def _in_view(T: Matrix, points: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(points @ T[:3, :3].T + T[:3, 3])


def _part_of(T: Matrix, share: float) -> Matrix:
    return make_pose(so3_exp(share * so3_log(T[:3, :3])), share * T[:3, 3])
