# SPDX-License-Identifier: Apache-2.0
"""What the stages of the pipeline hand to each other, and what they can do."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone, BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.fusion import Filtered
from kfloc_ros.kfnet.pnp import PnpSettings
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.pixloc.references import ReferenceViews
from kfloc_ros.types import CoarsePose, FilterReport, Frame, Matrix, PoseEstimate, SceneCoordinates


@dataclass(frozen=True, eq=False)
class Observation:
    """A frame after its one pass through the backbone: what all stages look at."""

    features: BackboneFeatures
    image: NDArray[np.uint8]
    """(H, W, 3) RGB, for networks that do not take the backbone's features."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Spent on the frame so far, by stage."""


@dataclass(frozen=True, eq=False)
class CoarseResult:
    """What the measure and filter stages hand to the refiner."""

    stamp_ns: int
    pose: CoarsePose
    filter: FilterReport
    timings_ms: Mapping[str, float]
    features: BackboneFeatures
    scene_coordinates: SceneCoordinates | None = None
    measurement: SceneCoordinates | None = None
    """What this frame alone says, before the filter."""
    filtered: Filtered | None = None
    """What the filter did, cell by cell; ``scene_coordinates`` is its posterior."""


class CoarseSteps(Protocol):
    """What finds coarse poses: :class:`CoarseStage`, or that of the submap a camera is in."""

    @property
    def note(self) -> str:
        """What of the configuration could not be had, in a sentence; empty if all could."""
        ...

    @property
    def camera(self) -> Camera:
        """The pinhole camera that every frame must have."""
        ...

    def observe(self, frame: Frame) -> Observation:
        """Run the backbone. Raises FrameError."""
        ...

    def process(self, frame: Frame, observation: Observation | None = None) -> CoarseResult:
        """Find the coarse pose. Raises FrameError."""
        ...

    def pass_by(self, stamp_ns: int, observation: Observation) -> None:
        """Take note of a frame that needs no coarse pose."""
        ...

    def learn(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Take the refined pose of one of the last frames into account; it must be beyond doubt."""
        ...

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        ...


class RefineSteps(Protocol):
    """What refines coarse poses: :class:`RefineStage`, or that of the submap a camera is in."""

    @property
    def references(self) -> ReferenceViews:
        """What poses are aligned with."""
        ...

    def suggest(self, starts: Sequence[Matrix]) -> None:
        """Have the next frame try further poses ``T_map_camera`` to start from; any thread."""
        ...

    def track(self, frame: Frame, observation: Observation) -> PoseEstimate | None:
        """Align from the predicted pose alone, while a track holds; None if the frame needs a coarse pose."""
        ...

    def process(self, frame: Frame, coarse: CoarseResult) -> PoseEstimate:
        """Refine a coarse pose. Raises FrameError."""
        ...

    def reset(self, reason: str) -> None:
        """Forget what was carried over from earlier frames."""
        ...


def pnp_settings(config: LocalizerConfig, stride: int, covariance_scale: float = 1.0) -> PnpSettings:
    """How the coarse pose is found from cells of so many pixels: what a cell tells of a place goes with its size."""
    larger = stride / COARSE_STRIDE
    return PnpSettings(
        max_error_px=larger * config.pnp_max_error_px,
        pixel_sigma_px=larger * PnpSettings().pixel_sigma_px,
        min_inliers=config.pnp_min_inliers,
        covariance_scale=covariance_scale,
    )


def observe(frame: Frame, camera: Camera, backbone: Backbone) -> Observation:
    """Run the backbone on a frame.

    Raises:
        FrameError: the image does not have the size of the map's camera.
    """
    check_frame(frame, camera)
    timings: dict[str, float] = {}
    with timed(timings, "backbone"):
        features = backbone.extract(frame.image)
    return Observation(features, frame.image, timings)


def check_frame(frame: Frame, camera: Camera) -> None:
    """Refuse an image that does not belong to the map's camera.

    Raises:
        FrameError: wrong size, type or channels.
    """
    image = frame.image
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise FrameError(f"A frame's image must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}.")
    if image.shape[:2] != (camera.height, camera.width):
        raise FrameError(
            f"The image is {image.shape[1]}x{image.shape[0]}, but the map's camera is {camera.width}x{camera.height}; "
            "bring it there with an ImageAdapter."
        )


@contextmanager
def timed(timings: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[stage] = timings.get(stage, 0.0) + (time.perf_counter() - start) * 1e3
