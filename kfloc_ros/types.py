# SPDX-License-Identifier: Apache-2.0
"""Types that cross module borders.

Conventions: metres, radians, nanoseconds; ``T_a_b`` (4x4, float64) maps points of frame b into frame a; camera frames
are optical (x right, y down, z forward); pixel (0, 0) is the centre of the top-left pixel. A pose covariance is 6x6 in
the order of ``geometry_msgs/PoseWithCovariance``: translation x, y, z of the body origin in the map frame, then a
rotation vector about the fixed map axes, so that ``t_true = t + dt`` and ``R_true = Exp(dr) R``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import FrameError
from kfloc_ros.geometry.camera import Camera

if TYPE_CHECKING:
    import torch  # half a second, which commands such as `kfloc bag info` do not need

Matrix = NDArray[np.float64]


class TrackingState(Enum):
    """Trust in a pose; see ``docs/architecture.md``."""

    INITIALIZING = "INITIALIZING"
    TRACKING = "TRACKING"
    DEGRADED = "DEGRADED"
    LOST = "LOST"


@dataclass(frozen=True, eq=False)
class Frame:
    """Camera image with its known properties."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    camera: Camera
    stamp_ns: int
    index: int = 0
    """Position in its source, counted before any selection of frames."""
    name: str = ""
    depth_m: NDArray[np.float32] | None = None
    """(H, W) depth along the optical axis, registered to the image; 0 where unknown."""
    T_map_camera: Matrix | None = None
    """Ground truth or mapping pose, (4, 4)."""
    source_camera: Camera | None = None
    """Camera of the image before conversion to the map's, as given by camera_info or the source."""


def check_frame(frame: Frame, camera: Camera) -> None:
    """Refuse an image, or a depth image, that does not belong to the map's camera.

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
    if frame.depth_m is not None and frame.depth_m.shape != image.shape[:2]:
        raise FrameError(
            f"The depth image is {frame.depth_m.shape[::-1]} pixels large, and its image {image.shape[1::-1]}: depth "
            "must be registered to the image."
        )


@dataclass(frozen=True, eq=False)
class SceneCoordinates:
    """Gaussian belief, cell by cell, over the map point that each image cell sees."""

    mean: torch.Tensor
    """(3, h, w) metres, map frame."""
    variance: torch.Tensor
    """(h, w) square metres, the same for x, y and z."""
    valid: torch.Tensor
    """(h, w) bool."""
    stride: int
    """Image pixels per cell."""
    first_pixel: float | None = None
    """Pixel of cell 0 in x and y; None: the centre of the cell, ``(stride - 1) / 2``. See :meth:`pixel_offset`."""

    @property
    def pixel_offset(self) -> float:
        """Offset of the pixel (u, v) = ``stride * (c, r) + pixel_offset`` that cell (r, c) stands for."""
        return (self.stride - 1) / 2 if self.first_pixel is None else self.first_pixel


@dataclass(frozen=True, eq=False)
class CoarsePose:
    """Result of RANSAC-PnP on a scene-coordinate map."""

    success: bool
    reason: str
    T_map_camera: Matrix | None
    covariance: Matrix | None
    inlier_count: int
    inlier_ratio: float


@dataclass(frozen=True)
class FilterReport:
    """Report of the Kalman filter on one frame."""

    reset_reason: str
    """Reason for a reset; empty if the prior was used."""
    prior_ratio: float
    """Share of cells that had a valid prior."""
    nis_mean: float
    """Mean normalised innovation squared over cells with a prior (3 degrees of freedom); NaN without prior."""
    rejected_ratio: float
    """Share of cells with a prior that failed the NIS test."""
    confirmed: bool = False
    """True if a refined pose corrected the belief that the prior came from; see ``kfnet/filter.py``."""


@dataclass(frozen=True, eq=False)
class AlignmentStep:
    """Pose between the start of an alignment and its end."""

    T_map_camera: Matrix
    cost: float
    """Cost at the level of this step, of the points that agree; costs of different levels are not comparable."""
    stride: int
    """Image pixels per cell of the level."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """Result of the direct feature-metric pose alignment."""

    success: bool
    reason: str
    T_map_camera: Matrix | None
    covariance: Matrix | None
    initial_cost: float
    final_cost: float
    valid_ratio: float
    iterations: int
    reference_ids: tuple[int, ...]
    support: float = 0.0
    """Support by the reference points' own matches: standard deviations of the number of agreeing points above that of
    a wrong place."""
    map_support: float = 0.0
    """The same, by the map's points alone, where points of this session's images were aligned, too."""
    carried: bool = False
    """True if the map does not confirm the pose, and points of this session's own images gave it."""
    by_patches: bool = False
    """True if grey patches have aligned the pose at the image's full resolution, after the features."""
    patch_noise: NDArray[np.float64] = field(default_factory=lambda: np.zeros((6, 6)))
    """(6, 6) part of the covariance: noise of these patches."""
    steps: tuple[AlignmentStep, ...] = ()
    """Start and accepted poses of every level, in order."""
    distance_m: float = 0.0
    """Distance from the nearest of the reference views, a radian counted as half a metre; 0 if there are none."""
    disagreement: NDArray[np.float64] = field(default_factory=lambda: np.zeros((6, 6)))
    """(6, 6) part of the covariance: what the reference views disagree by on the pose."""


@dataclass(frozen=True, eq=False)
class PoseEstimate:
    """Result of the localizer for one frame."""

    stamp_ns: int
    state: TrackingState
    reason: str
    """Reason why the state is not TRACKING; empty if it is."""
    T_map_camera: Matrix | None = None
    """Pose (4, 4); None if it is unknown."""
    covariance: Matrix | None = None
    coarse: CoarsePose | None = None
    filter: FilterReport | None = None
    alignment: Alignment | None = None
    tracked: bool = False
    """True if the frame was aligned from the predicted pose alone; it then has no coarse pose."""
    tentative: bool = False
    """True for a first pose that waits for others which agree, and a jump that the image denies: ``map -> odom`` must
    not follow it yet."""
    bridged: bool = False
    """True if neither the map nor this session's points confirm the pose: optical flow or the motion carried it on.
    It is DEGRADED, and no measurement: ``map -> odom`` must not follow it."""
    held: bool = False
    """True if this session's points stand in for the map's support, a moment after poses that the map confirmed. Such a
    pose does not correct the belief, which would confirm it in turn."""
    confidence: float | None = None
    """Probability that the errors are below 10 cm and 5 deg; None without a pose, or if refinement is off."""
    evidence: Mapping[str, float] = field(default_factory=dict)
    """Values that the confidence depends on; see ``localization/judgement.py``."""
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    """Milliseconds per stage, in the order run: backbone, measure, filter, pnp, refine, and their sum, total."""

    @property
    def refined_pose(self) -> Matrix | None:
        """Pose (4, 4), if it is refined, the state is TRACKING, and the map itself confirms it; else None."""
        is_refined = self.state is TrackingState.TRACKING and self.alignment is not None and not self.held
        return self.T_map_camera if is_refined else None
