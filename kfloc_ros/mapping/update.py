# SPDX-License-Identifier: Apache-2.0
"""A recording added to a map that is there: mapped by itself, placed in the map by localizing its views, merged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kfloc_ros.errors import MapError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.lie import Matrix, inverse_pose, rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.build import BuildProgress, MapBuildConfig, Report, make_map
from kfloc_ros.mapping.merge import check_families, merge_maps
from kfloc_ros.mapping.registration import average_pose
from kfloc_ros.mapping.views import View
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, TrackingState

MAX_LOCALIZED = 40
AGREE_M, AGREE_DEG = 0.10, 3.0
"""Two views agree on where the recording lies if what they say differs by less."""
MIN_AGREEING = 3
SAME_FRAME_M, SAME_FRAME_DEG = 0.03, 1.0
"""A recording that lies this near to where its poses say is in the map's frame; the rest is error of the finding."""


@dataclass(frozen=True, eq=False)
class Placement:
    """Where a recording's own frame lies in a map."""

    T_map_session: Matrix
    agreeing: int
    """Views that say so."""
    tried: int

    @property
    def moved(self) -> bool:
        """Whether the recording was in another frame than the map's."""
        return bool((self.T_map_session != np.eye(4)).any())


@dataclass(frozen=True, eq=False)
class Updated:
    """A map with a recording added, and how that was placed."""

    scene_map: SceneMap
    placement: Placement | None
    """None when the caller said that the frames are the same."""


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
    """Add a recording to a map; the map's own knowledge stays as it is.

    Args:
        scene_map: the map to add to.
        source: views with depth and poses, in the map's frame or in one of their own.
        config: as for :func:`kfloc_ros.mapping.build.build_map`.
        same_frame: take the poses as they are, for a recording that sees nothing of what the map holds.
        provenance: more to note.
        started: when the budget began, see :func:`kfloc_ros.mapping.build.make_map`.
        on_progress: told where it stands.

    Raises:
        SourceError: too few views with depth and pose.
        MapError: the recording was not found in the map, or does not fit it.
    """
    check_families(scene_map)  # before minutes of work
    config = config or MapBuildConfig()
    started = time.monotonic() if started is None else started
    made = make_map(source, config, camera=scene_map.camera, started=started, on_progress=on_progress)
    on_progress(BuildProgress("place", 0.0))
    placement = None if same_frame else place_views(scene_map, made.held_out, config.device)
    merged = merge_maps(
        scene_map,
        made.scene_map,
        np.eye(4) if placement is None else placement.T_map_session,
        spacing_m=config.reference_spacing_m,
        max_points=config.max_points,
    )
    return Updated(replace(merged, provenance={**merged.provenance, **(provenance or {})}), placement)


def place_views(scene_map: SceneMap, views: Sequence[View], device: str) -> Placement:
    """Find the frame of views in a map by localizing some of them, each by itself.

    Raises:
        MapError: too few were found, or they do not agree.
    """
    chosen = np.unique(np.linspace(0, len(views) - 1, min(MAX_LOCALIZED, len(views))).round().astype(int))
    localizer = Localizer(scene_map, LocalizerConfig(device=device, camera_check="off"))
    told = []
    for k in chosen:
        localizer.reset("the views are judged one by one")
        view = views[k]
        estimate = localizer.process(Frame(view.image, view.camera, 0, view.index)).estimate
        if estimate.state is TrackingState.TRACKING and estimate.T_map_camera is not None:
            told.append(estimate.T_map_camera @ inverse_pose(view.T_map_camera))
    scene_map.head.to("cpu")
    centre = np.mean([view.T_map_camera[:3, 3] for view in views], axis=0)
    groups = [[T for T in told if _agree(T, centre_of, centre)] for centre_of in told]
    best = max(groups, key=len, default=[])
    if len(best) < MIN_AGREEING:
        raise MapError(
            f"Of {len(chosen)} views of the recording {len(told)} were found in the map, and {len(best)} of them agree "
            f"on where it lies; {MIN_AGREEING} are needed. If its poses are in the map's frame, pass --same-frame."
        )
    T = average_pose(best, centre)
    return Placement(np.eye(4) if _is_same(T, centre) else T, len(best), len(chosen))


def _agree(a: Matrix, b: Matrix, centre: Matrix) -> bool:
    """Whether two motions do nearly the same to what lies around a point."""
    apart_m = np.linalg.norm((a[:3, :3] - b[:3, :3]) @ centre + a[:3, 3] - b[:3, 3])
    return bool(apart_m < AGREE_M and rotation_angle_deg(a[:3, :3].T @ b[:3, :3]) < AGREE_DEG)


def _is_same(T: Matrix, centre: Matrix) -> bool:
    away_m = np.linalg.norm(T[:3, :3] @ centre + T[:3, 3] - centre)
    return bool(away_m < SAME_FRAME_M and rotation_angle_deg(T[:3, :3]) < SAME_FRAME_DEG)
