# SPDX-License-Identifier: Apache-2.0
"""Pairs of simulated views to train alignment heads on: other light, other places, pictures made worse.

The room's furniture is that of the demo; its pictures, prints and textures are those of other seeds than the demo's.
The backbone's features are extracted once, when the views are made: training sees nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, so3_exp
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.references import ReferencePoints, extract_reference_points
from kfloc_ros.simulation.render import Illumination, Renderer
from kfloc_ros.simulation.scene import TEXELS_PER_M, build_room
from kfloc_ros.simulation.sensor import Sensor
from kfloc_ros.simulation.source import CAMERA
from kfloc_ros.simulation.trajectory import look_at
from kfloc_ros.training.start_errors import StartErrors

FREE_HALF_M = np.array([1.45, 1.0])
"""Half the space of the room in which nothing stands."""
HEIGHTS_M = 1.15, 1.7
MIN_COMMON = 40
TRIES = 50


@dataclass(frozen=True)
class ViewRule:
    """Which views there are."""

    rooms: int = 8
    places: int = 12
    """In each room."""
    views: int = 6
    """Around each place, each in a light of its own."""
    points: int = 300
    """Of a reference, as in a map."""
    spread_m: float = 0.22
    spread_deg: float = 9.0
    camera: Camera = CAMERA
    texels_per_m: float = TEXELS_PER_M


@dataclass(frozen=True, eq=False)
class HeadPairs:
    """A batch of references' points and queries' feature maps."""

    coarse: torch.Tensor
    """(B, 64, h, w) of the queries."""
    fine: torch.Tensor
    """(B, 24, H, W)"""
    reliability: torch.Tensor
    """(B, h, w)"""
    camera: CameraTensor
    """(B,)"""
    points: torch.Tensor
    """(B, N, 3) float64 in the reference camera."""
    point_coarse: torch.Tensor
    """(B, N, 64)"""
    point_fine: torch.Tensor
    """(B, N, 24)"""
    point_confidence: torch.Tensor
    """(B, N)"""
    T_true: Pose
    """(B,) T_query_reference"""
    T_init: Pose

    def to(self, device: torch.device) -> HeadPairs:
        """The same on another device."""
        return HeadPairs(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @classmethod
    def together(cls, parts: Sequence[HeadPairs]) -> HeadPairs:
        """Batches of one as one."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            column = [getattr(part, field.name) for part in parts]
            stack = torch.stack if isinstance(column[0], torch.Tensor) else type(column[0]).stack
            columns[field.name] = stack([value[0] for value in column])
        return cls(**columns)


@dataclass(frozen=True, eq=False)
class _View:
    coarse: torch.Tensor
    fine: torch.Tensor
    reliability: torch.Tensor
    points: ReferencePoints
    """In the camera's own frame."""
    T_map_camera: Matrix


class SimulatedPairs:
    """Pairs of views of one place; the k-th one is always the same.

    Args:
        rule: which views there are.
        first_room: seed of the first room; 0 is the demo's own and must not be trained on.
        seed: of pairs and starts.
        on_progress: told the share of the views that are made.

    Raises:
        SourceError: the ray caster is not installed.
        WeightsError: the backbone's weights are missing.
    """

    def __init__(
        self,
        rule: ViewRule,
        first_room: int,
        seed: int = 0,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._rule, self._seed = rule, seed
        self._starts = StartErrors(seed)
        self._camera = CameraTensor.from_camera(rule.camera)
        backbone = Backbone()
        self._places: list[list[_View]] = []
        for room in range(first_room, first_room + rule.rooms):
            renderer = Renderer(build_room(room, rule.texels_per_m), rule.camera)
            for place in range(rule.places):
                rng = np.random.default_rng((room, place))
                poses = _poses_around(rng, rule)
                self._places.append([_view(renderer, backbone, T, rule, rng) for T in poses])
                on_progress(len(self._places) / (rule.rooms * rule.places))

    def __getitem__(self, number: int) -> HeadPairs:
        """The pair of a number, as a batch of one."""
        query, reference, T_true, T_init = self._pair(number)
        points = reference.points
        return HeadPairs(
            coarse=query.coarse[None].float(),
            fine=query.fine[None].float(),
            reliability=query.reliability[None].float(),
            camera=self._camera[None],
            points=points.points[None].float().double(),
            point_coarse=points.coarse[None].float(),
            point_fine=points.fine[None].float(),
            point_confidence=points.confidence[None].float(),
            T_true=Pose.from_4x4mat(T_true)[None],
            T_init=Pose.from_4x4mat(T_init)[None],
        )

    def _pair(self, number: int) -> tuple[_View, _View, Matrix, Matrix]:
        """Query, reference, the true pose and where to start."""
        rng = np.random.default_rng((self._seed, number))
        for _ in range(TRIES):
            views = self._places[int(rng.integers(len(self._places)))]
            a, b = rng.choice(len(views), 2, replace=False)
            query, reference = views[int(a)], views[int(b)]
            T_true = inverse_pose(query.T_map_camera) @ reference.T_map_camera
            T_init = self._starts.draw(rng) @ T_true
            seen = [self._sees(T, reference.points.points) for T in (T_true, T_init)]
            if int((seen[0] & seen[1]).sum()) >= MIN_COMMON:
                break
        return query, reference, T_true, T_init

    def _sees(self, T: Matrix, points: torch.Tensor) -> torch.Tensor:
        return self._camera.world2image(
            points.double() @ torch.from_numpy(T[:3, :3].T) + torch.from_numpy(T[:3, 3])
        ).valid


def random_light(rng: np.random.Generator) -> Illumination:
    """Lamps and the window bright, dim or off, each with a tint; never dark."""

    def source(brightest: float, off: float) -> tuple[float, float, float]:
        strength = 0.0 if rng.random() < off else float(rng.uniform(0.08, brightest))
        red, blue = rng.uniform(0.85, 1.15, 2)
        return (strength * float(red), strength, strength * float(blue))

    ambient = float(rng.uniform(0.1, 0.5))
    return Illumination(source(0.8, 0.35), source(0.8, 0.35), source(0.6, 0.3), (ambient, ambient, ambient))


def weathered(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of a worse camera: another tone curve, uneven light, out of focus, noisy; each only sometimes."""
    values = image.astype(np.float32) / 255
    if rng.random() < 0.7:
        values = values ** np.float32(rng.uniform(0.6, 1.6)) * np.float32(rng.uniform(0.6, 1.2))
    if rng.random() < 0.5:
        field = cv2.resize(
            rng.uniform(0.5, 1.3, (3, 4)).astype(np.float32), image.shape[1::-1], interpolation=cv2.INTER_CUBIC
        )
        values = values * field[..., None]
    if rng.random() < 0.35:
        values = cv2.GaussianBlur(values, (0, 0), float(rng.uniform(0.5, 1.8)))
    if rng.random() < 0.5:
        values = values + rng.normal(0, rng.uniform(0.005, 0.03), values.shape).astype(np.float32)
    return np.asarray(np.clip(values * 255, 0, 255), dtype=np.uint8)


def _poses_around(rng: np.random.Generator, rule: ViewRule) -> list[Matrix]:
    """Views of one place, near each other; hands and robots both tilt a little."""
    middle = np.array([*(rng.uniform(-1, 1, 2) * FREE_HALF_M), rng.uniform(*HEIGHTS_M)])
    heading = rng.uniform(0, 2 * np.pi)
    aim = middle + np.array([2 * np.cos(heading), 2 * np.sin(heading), rng.uniform(-0.7, 0.3)])
    T = look_at(middle, aim)
    poses = []
    for _ in range(rule.views):
        shift = rng.normal(0, rule.spread_m, 3) * np.array([1, 0.6, 1])
        turn = np.radians(rng.normal(0, rule.spread_deg, 3) * np.array([0.7, 1.0, 0.5]))
        pose = T @ make_pose(so3_exp(turn), shift)
        pose[:2, 3] = np.clip(pose[:2, 3], -FREE_HALF_M - 0.1, FREE_HALF_M + 0.1)
        pose[2, 3] = np.clip(pose[2, 3], HEIGHTS_M[0], HEIGHTS_M[1] + 0.15)
        poses.append(pose)
    return poses


def _view(renderer: Renderer, backbone: Backbone, T: Matrix, rule: ViewRule, rng: np.random.Generator) -> _View:
    rendering = renderer.render(T, random_light(rng))
    sensor = Sensor(rule.camera)
    half = make_pose(so3_exp(rng.normal(0, np.radians(0.08), 3)), rng.normal(0, 8e-4, 3))
    image = weathered(sensor.expose(rendering, T @ inverse_pose(half), T, T @ half, rng), rng)
    features: BackboneFeatures = backbone.extract(image)
    found = extract_reference_points(features, rendering.depth_m, rule.camera, np.eye(4), rule.points)
    # where a view has fewer points than asked for, some count twice
    index = torch.arange(rule.points) % len(found)
    points = ReferencePoints(
        found.points[index], found.coarse[index].half(), found.fine[index].half(), found.confidence[index]
    )
    return _View(
        features.coarse[0].half().clone(), features.fine[0].half().clone(), features.reliability[0].half().clone(),
        points, T,
    )  # fmt: skip
