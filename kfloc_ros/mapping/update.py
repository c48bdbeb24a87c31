# SPDX-License-Identifier: Apache-2.0
"""Update of a map: maps a recording, registers it by localizing its views, finds what has changed, and merges it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfloc_ros.device import choose_device
from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.lie import Matrix, inverse_pose, rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.build import BuildProgress, MapBuildConfig, Report, make_map
from kfloc_ros.mapping.changes import Changes, find_changes
from kfloc_ros.mapping.merge import check_families, merge_maps
from kfloc_ros.mapping.motion_depth import MotionDepth
from kfloc_ros.mapping.registration import average_pose
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, TrackingState

MAX_LOCALIZED = 40
AGREE_M, AGREE_DEG = 0.10, 3.0
"""Largest difference between two views' estimates of the recording's frame that agree."""
MIN_AGREEING = 3
SAME_FRAME_M, SAME_FRAME_DEG = 0.03, 1.0
"""Largest distance from the map's frame at which a recording is considered to be in that frame already."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Registration of a recording's frame in a map."""

    T_map_session: Matrix
    agreeing: int
    """Number of views that agree."""
    tried: int

    @property
    def moved(self) -> bool:
        """True if the recording was in another frame than the map's."""
        return bool((self.T_map_session != np.eye(4)).any())


@dataclass(frozen=True, eq=False)
class Updated:
    """Map with a recording added, the registration of the recording, and what it shows to have changed."""

    scene_map: SceneMap
    placement: Placement | None
    """None if the caller declared the frames to be the same."""
    changes: Changes
    """Points and views of the older map that the recording contradicts; they are not in the new map."""

    @property
    def text(self) -> str:
        """Sentences on the registration and the changes."""
        placed, lines = self.placement, [self.changes.summary()]
        if placed is not None:
            where = "by its own poses, moved into the map's frame" if placed.moved else "by its own poses, unchanged"
            lines.insert(0, f"Registered by {placed.agreeing} of {placed.tried} views that agree, {where}.")
        return "\n".join(lines)


def update_map(
    scene_map: SceneMap,
    source: FrameSource,
    config: MapBuildConfig | None = None,
    *,
    same_frame: bool = False,
    provenance: dict[str, Any] | None = None,
    started: float | None = None,
    on_progress: Report = lambda progress: None,
) -> Updated:
    """Add a recording to a map, and retire the reference points that it contradicts; the map's heads are unchanged.

    Args:
        scene_map: map to add to.
        source: views with depth and poses, in the map's frame or in a frame of their own.
        config: see :func:`kfloc_ros.mapping.build.build_map`.
        same_frame: use the poses as they are, for a recording that does not overlap with the map.
        provenance: additional entries for the map's description of its origin.
        started: start of the time budget, see :func:`kfloc_ros.mapping.build.make_map`.
        on_progress: called with the progress of the build.

    Raises:
        SourceError: too few views with depth and pose.
        MapError: the recording does not localize in the map, or does not match it.
    """
    check_families(scene_map)  # before minutes of work
    config = config or MapBuildConfig()
    started = time.monotonic() if started is None else started
    made = make_map(source, config, camera=scene_map.camera, started=started, on_progress=on_progress)
    on_progress(BuildProgress("place", 0.0))
    placement = None if same_frame else place_views(scene_map, made.held_out, config.device)
    T_map_session = np.eye(4) if placement is None else placement.T_map_session
    on_progress(BuildProgress("compare", 0.0))
    changes = find_changes(
        scene_map.references,
        scene_map.camera,
        source.images if isinstance(source, MotionDepth) else source,
        T_map_session,
        Backbone(device=choose_device(config.device)),
        lambda share: on_progress(BuildProgress("compare", share)),
    )
    merged = merge_maps(
        replace(scene_map, references=changes.references),
        made.scene_map,
        T_map_session,
        spacing_m=config.reference_spacing_m,
        max_points=config.max_points,
        look_different=changes.look_different(),
    )
    return Updated(replace(merged, provenance={**merged.provenance, **(provenance or {})}), placement, changes)


def place_views(scene_map: SceneMap, views: Sequence[View], device: str) -> Placement:
    """Register views in a map by localizing some of them, each independently.

    Raises:
        MapError: too few views localize, or they do not agree.
    """
    chosen = np.unique(np.linspace(0, len(views) - 1, min(MAX_LOCALIZED, len(views))).round().astype(int))
    localizer = Localizer(scene_map, LocalizerConfig(device=device, camera_check="off"))
    motions = []
    for k in chosen:
        localizer.reset("the views are judged independently")
        view = views[k]
        estimate = localizer.process(Frame(view.image, view.camera, 0, view.index)).estimate
        if estimate.state is TrackingState.TRACKING and estimate.T_map_camera is not None:
            motions.append(estimate.T_map_camera @ inverse_pose(view.T_map_camera))
    scene_map.head.to("cpu")
    centre = np.mean([view.T_map_camera[:3, 3] for view in views], axis=0)
    groups = [[T for T in motions if _agree(T, centre_of, centre)] for centre_of in motions]
    best = max(groups, key=len, default=[])
    if len(best) < MIN_AGREEING:
        raise MapError(
            f"Of {len(chosen)} views of the recording, {len(motions)} were localized in the map, and {len(best)} "
            f"of them agree on its frame; {MIN_AGREEING} are needed. If its poses are in the map's frame, pass "
            "--same-frame."
        )
    T = average_pose(best, centre)
    return Placement(np.eye(4) if _is_same(T, centre) else T, len(best), len(chosen))


def _agree(a: Matrix, b: Matrix, centre: Matrix) -> bool:
    """Return True if two motions have nearly the same effect around a point."""
    apart_m = np.linalg.norm((a[:3, :3] - b[:3, :3]) @ centre + a[:3, 3] - b[:3, 3])
    return bool(apart_m < AGREE_M and rotation_angle_deg(a[:3, :3].T @ b[:3, :3]) < AGREE_DEG)


def _is_same(T: Matrix, centre: Matrix) -> bool:
    away_m = np.linalg.norm(T[:3, :3] @ centre + T[:3, 3] - centre)
    return bool(away_m < SAME_FRAME_M and rotation_angle_deg(T[:3, :3]) < SAME_FRAME_DEG)
