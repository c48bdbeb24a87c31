# SPDX-License-Identifier: Apache-2.0
"""Training samples of KFNet: groups of consecutive frames with true coordinates, augmented alike.

Every sample is a function of its number and the seed alone, so training that is resumed sees what it would have seen.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.kfnet.reference.scoordnet import STRIDE, NetworkFrame
from kfloc_ros.mapping.views import View

Affine = NDArray[np.float64]
"""(2, 3) from pixels of the augmented image to pixels of the original."""

MAX_ROTATION_DEG = 30.0
TRANSFORM_FRAMES = 60
"""Frames from which the network's frame is made."""


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive frames of one sequence."""

    images: torch.Tensor
    """(n, 3, H, W) RGB, about 0..255."""
    points: torch.Tensor
    """(n, 3, h, w) true map points of the pixels (8 c, 8 r), metres."""
    mask: torch.Tensor
    """(n, h, w) bool"""

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        return Group(self.images.to(device, non_blocking=True), self.points.to(device), self.mask.to(device))

    @property
    def small_images(self) -> torch.Tensor:
        """(n, 3, h, w) every eighth pixel, as the losses take them."""
        return self.images[:, :, ::STRIDE, ::STRIDE]


def identity() -> Affine:
    """No geometric change."""
    return np.eye(2, 3)


def rotation(camera: Camera, angle_rad: float) -> Affine:
    """About the image's centre."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    R, centre = np.array([[c, -s], [s, c]]), np.array([camera.width - 1, camera.height - 1]) / 2
    return np.concatenate([R, (centre - R @ centre)[:, None]], axis=1)


def random_rotation(camera: Camera, rng: np.random.Generator) -> Affine:
    """Four times in five a rotation by up to 30 degrees (stages 2 and 3)."""
    if rng.random() >= 0.8:
        return identity()
    return rotation(camera, np.radians(rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG)))


def random_placement(camera: Camera, rng: np.random.Generator) -> Affine:
    """Nine times in ten a rotation with an enlarged part, or with a shrunk whole (stage 1)."""
    choice = rng.random()
    if choice < 0.1:
        return identity()
    turned = rotation(camera, np.radians(rng.uniform(-MAX_ROTATION_DEG, MAX_ROTATION_DEG)))
    size = np.array([camera.width - 1.0, camera.height - 1.0])
    if choice < 0.55:
        corner = rng.uniform(0.0, 0.2, 2)
        zoom = rng.uniform(0.8, 1.0 - corner.max())
        shift = corner * size
    else:
        zoom = 1.0 / rng.uniform(0.8, 1.0)
        shift = (1.0 - zoom) * size / 2
    return np.concatenate([turned[:, :2] * zoom, (turned[:, :2] @ shift + turned[:, 2])[:, None]], axis=1)


def network_camera(camera: Camera, image_width: int = 0, image_height: int = 0) -> Camera:
    """A source's camera as the networks see it.

    Args:
        camera: of the source.
        image_width: of the networks' images; 0 keeps it.
        image_height: the same; 0: what keeps the images' shape, to a multiple of 8, or as it is if the width is kept.
    """
    width = image_width or camera.width
    shaped = max(STRIDE, round(camera.height * width / camera.width / STRIDE) * STRIDE)
    return camera.pinhole().scaled_to(width, image_height or (shaped if image_width else camera.height))


def consecutive(source: FrameSource, length: int, max_step: int = 1, spacing: int = 1) -> list[range]:
    """Positions of all groups of ``length`` frames, ``spacing`` apart, of one recording and without a gap.

    Args:
        source: whose recordings and frame indices count.
        length: of a group.
        max_step: largest step of the index from one frame to the next.
        spacing: frames from one of a group to the next.
    """
    indices, sequences = source.indices(), source.sequences()
    follows = [
        0 < j - i <= max_step and a == b
        for (i, j), (a, b) in zip(itertools.pairwise(indices), itertools.pairwise(sequences), strict=True)
    ]
    span = (length - 1) * spacing
    return [range(i, i + span + 1, spacing) for i in range(len(indices) - span) if all(follows[i : i + span])]


class Samples:
    """Groups of a source's frames.

    Args:
        source: with depth and poses.
        length: frames in a group.
        both_directions: every group also backwards, as a sample of its own.
        image_width: images are scaled to this; 0 keeps them.
        image_height: the same; 0: what keeps their shape, to a multiple of 8.
        augment: ``none``, ``rotate`` (brightness, contrast, rotation) or ``full`` (also zoom and shift); all frames of
            a group alike.
        seed: of order and augmentation.
        max_step: largest step of the frame index from one of the source's frames to the next.
        spacing: a group takes every so many of the source's frames: where images are small, neighbouring frames hardly
            move by a cell, and there is no flow to learn.
        remembered_bytes: of frames at the networks' size that stay in memory, so that each is read once: reading one
            takes longer than a step of small networks. The first that fit stay; the others are read every time.

    Raises:
        SourceError: there is no group of so many consecutive frames.
    """

    def __init__(
        self,
        source: FrameSource,
        length: int,
        *,
        both_directions: bool = False,
        image_width: int = 0,
        image_height: int = 0,
        augment: str = "none",
        seed: int = 0,
        max_step: int = 1,
        spacing: int = 1,
        remembered_bytes: int = 0,
    ) -> None:
        self._source, self._augment, self._seed = source, augment, seed
        self._groups: list[Sequence[int]] = list(consecutive(source, length, max_step, spacing))
        if both_directions:
            self._groups += [group[::-1] for group in self._groups]
        if not self._groups:
            raise SourceError(f"'{source.name}' has no {length} consecutive frames; check --frames and --split.")
        self._adapter = ImageAdapter(source.camera, network_camera(source.camera, image_width, image_height))
        self.camera = self._adapter.target
        self._remembered: dict[int, View] = {}
        self._room_bytes = remembered_bytes
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> Group:
        """Sample of a number that only grows: its epoch's order and its augmentation come from the number.

        Raises:
            SourceError: a frame has no depth or pose.
        """
        epoch, position = divmod(number, len(self._groups))
        order = np.random.default_rng((self._seed, 1, epoch)).permutation(len(self._groups))
        views = [self._view(p) for p in self._groups[order[position]]]
        rng = np.random.default_rng((self._seed, 2, number))
        affine = identity()
        delta, factor = 0.0, 1.0
        if self._augment != "none":
            delta, factor = rng.uniform(-20, 20), rng.uniform(0.8, 1.2)
            affine = (random_placement if self._augment == "full" else random_rotation)(self.camera, rng)
        parts = [self._prepare(view, affine, delta, factor) for view in views]
        images, points, masks = (torch.from_numpy(np.stack(column)) for column in zip(*parts, strict=True))
        return Group(images, points, masks)

    def _view(self, position: int) -> View:
        if (known := self._remembered.get(position)) is not None:
            return known
        frame = self._source[position]
        if frame.depth_m is None or frame.T_map_camera is None:
            raise SourceError(
                f"Frame {frame.index} of '{self._source.name}' has no depth or no pose to train from. "
                "`kfloc labels` finds depth once and for all; then train from kfnet:OUT."
            )
        image, depth_m = self._adapter(frame.image), self._adapter.nearest(frame.depth_m)
        view = View(image, depth_m, self.camera, frame.T_map_camera, frame.index)
        with self._lock:
            taken = image.nbytes + depth_m.nbytes
            if position not in self._remembered and taken <= self._room_bytes:
                self._remembered[position] = view
                self._room_bytes -= taken
        return view

    def _prepare(
        self, view: View, affine: Affine, delta: float, factor: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        image = view.image.astype(np.float32)
        size = (self.camera.width, self.camera.height)
        if not np.array_equal(affine, identity()):
            image = cv2.warpAffine(image, affine, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
        image += delta
        mean = image.mean(axis=(0, 1), keepdims=True)
        image = (image - mean) * factor + mean
        points, mask = cell_points(view.depth_m, self.camera, view.T_map_camera, affine)
        return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32), points, mask

    def network_frame(self, scale: float = 1.0) -> NetworkFrame:
        """The frame along the principal axes of the scene's points.

        Raises:
            SourceError: no frame has usable depth.
        """
        positions = np.unique(np.linspace(0, len(self._source) - 1, TRANSFORM_FRAMES).astype(int))
        sample = []
        for p in positions:
            _, points, mask = self._prepare(self._view(int(p)), identity(), 0.0, 1.0)
            sample.append(points[:, mask].T)
        points = np.concatenate(sample)
        if len(points) < 100:
            raise SourceError(f"'{self._source.name}' has hardly any depth.")
        return NetworkFrame.of_points(points, scale)


def cell_points(
    depth_m: NDArray[np.float32], camera: Camera, T_map_camera: NDArray[np.float64], affine: Affine
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Points (3, h, w) seen at the pixels (8 c, 8 r) of an augmented image, and where they are known, (h, w).

    The depth is taken at the nearest original pixel: coordinates are never blended across edges.
    """
    cols, rows = np.meshgrid(np.arange(0, camera.width, STRIDE), np.arange(0, camera.height, STRIDE))
    pixels = np.stack([cols, rows, np.ones_like(cols)], axis=-1) @ affine.T
    u, v = np.round(pixels[..., 0]).astype(int), np.round(pixels[..., 1]).astype(int)
    inside = (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    z = np.where(inside, depth_m[np.clip(v, 0, camera.height - 1), np.clip(u, 0, camera.width - 1)], 0.0)
    rays = np.stack([(pixels[..., 0] - camera.cx) / camera.fx, (pixels[..., 1] - camera.cy) / camera.fy], axis=-1)
    local = np.concatenate([rays * z[..., None], z[..., None]], axis=-1)
    points = local @ T_map_camera[:3, :3].T + T_map_camera[:3, 3]
    return np.ascontiguousarray(points.transpose(2, 0, 1), dtype=np.float32), z > 0
