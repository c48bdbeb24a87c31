# SPDX-License-Identifier: Apache-2.0
"""Merging of two maps: the heads of both, and the reference views of both where they extend the coverage. Cropping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kfloc_ros.errors import MapError
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.kfnet.scoordnet import (
    MAX_HEADS,
    RoughnessScale,
    SCoordNet,
    ensemble_of,
    heads_of,
    transformed_head,
    with_variance_scale,
)
from kfloc_ros.mapping.views import ReferenceCollector
from kfloc_ros.maps.scene_map import Calibration, SceneMap, transformed
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

MAX_FOCAL_RATIO = 1.25
"""Largest ratio of focal lengths: heads and features tolerate as much zoom as they are trained with."""
LARGER = (
    "process_scale", "process_floor_m2", "coarse_covariance_scale", "refined_covariance_scale", "max_alignment_cost",
    "min_inlier_ratio", "own_error_m", "own_error_rad", "camera_fit_scale", "own_error_growth", "usual_shift_chi2",
    "patch_covariance_scale",
)  # fmt: skip
SMALLER = ("confidence_odds", "covariance_doubling_m")
"""Values of two calibrations of which the larger, or the smaller, is the more cautious one."""
Corner = tuple[float, float, float]


def merge_maps(
    older: SceneMap,
    newer: SceneMap,
    T_older_newer: Matrix,
    *,
    spacing_m: float,
    max_points: int,
    name: str = "",
    look_different: Collection[int] = (),
) -> SceneMap:
    """Merge two maps, in the frame and for the camera of the older one.

    The heads are stored side by side, each with its own calibration. Reference views of the newer map come first, and
    those of the older one join where no newer view is near, or where the place looked different, such as in another
    light. Every view keeps its session.

    Args:
        older: map that keeps its frame.
        newer: map to add.
        T_older_newer: (4, 4) rigid motion from the newer map's frame.
        spacing_m: see ``MapBuildConfig.reference_spacing_m``.
        max_points: limit on reference points.
        name: name of the result; by default the older map's.
        look_different: ids of the older map's views that stay beside newer ones.

    Raises:
        MapError: cameras or heads do not match, or there are too many heads.
    """
    _check_cameras(older, newer)
    check_families(older, newer)
    heads = [*_own_heads(older), *(transformed_head(head, T_older_newer) for head in _own_heads(newer))]
    if len({(head.width, head.blocks) for head in heads}) > 1:
        raise MapError("The maps' heads differ in size (`kfloc map info` shows it); build one of the maps again.")
    if len(heads) > MAX_HEADS:
        raise MapError(
            f"The result would have {len(heads)} heads, more than the limit of {MAX_HEADS}. Build one map of all "
            "recordings."
        )
    moved = transformed(newer.references, T_older_newer)
    references = _join(older.references, moved, spacing_m, max_points, look_different)
    return SceneMap(
        name=name or older.name,
        frame_id=older.frame_id,
        camera=older.camera,
        head=ensemble_of(heads),
        references=references,
        calibration=_calibration(older.calibration, newer.calibration),
        bounds_m=_bounds(older.bounds_m, newer.bounds_m, T_older_newer),
        provenance={**older.provenance, "references": len(references.ids), **_session(older, newer)},
    )


def _own_heads(scene_map: SceneMap) -> list[SCoordNet]:
    """Return the heads with the map's variance scale applied."""
    scale = scene_map.calibration.measurement_variance_scale
    return [with_variance_scale(head, scale) for head in heads_of(scene_map.head)]


def _join(
    older: ReferenceViews, newer: ReferenceViews, spacing_m: float, max_points: int, look_different: Collection[int]
) -> ReferenceViews:
    collector = ReferenceCollector(spacing_m, max_points)
    offset = max(older.ids, default=-1) + 1
    later = max(older.sessions, default=0) + 1
    sessions = {ident: older.session_of(k) for k, ident in enumerate(older.ids)}
    sessions |= {ident + offset: newer.session_of(k) + later for k, ident in enumerate(newer.ids)}
    for ident, T, view in zip(newer.ids, newer.T_map_camera, newer.views, strict=True):
        collector.add(ident + offset, T, view)
    for ident, T, view in zip(older.ids, older.T_map_camera, older.views, strict=True):
        if ident in look_different or collector.extends_coverage(T):
            collector.add(ident, T, view)
    joined = collector.views()
    return replace(joined, sessions=tuple(sessions[ident] for ident in joined.ids))


def _calibration(a: Calibration, b: Calibration) -> Calibration:
    """Return the calibration of both maps: the larger of each uncertainty. Head variances are already scaled."""
    learned = (a.learned_process_scale, b.learned_process_scale)
    return replace(
        a,
        measurement_variance_scale=1.0,
        sideways=math.sqrt(a.sideways * b.sideways),
        learned_process_scale=None if None in learned else max(scale for scale in learned if scale is not None),
        roughness=_roughness(a.roughness, b.roughness),
        **{name: max(getattr(a, name), getattr(b, name)) for name in LARGER},
        **{name: min(getattr(a, name), getattr(b, name)) for name in SMALLER},
    )


def _roughness(a: RoughnessScale | None, b: RoughnessScale | None) -> RoughnessScale | None:
    """Return the roughness scale of both maps: the larger usual roughness, and beyond it the larger uncertainty."""
    if a is None or b is None:
        return None
    return RoughnessScale(max(a.usual_m, b.usual_m), max(a.power, b.power))


def _bounds(a: tuple[Corner, Corner], b: tuple[Corner, Corner], T: Matrix) -> tuple[Corner, Corner]:
    """Return the box around one box and the transformed corners of the other."""
    corners = np.array(list(itertools.product(*zip(*b, strict=True)))) @ T[:3, :3].T + T[:3, 3]
    low, high = np.minimum(a[0], corners.min(axis=0)), np.maximum(a[1], corners.max(axis=0))
    return (float(low[0]), float(low[1]), float(low[2])), (float(high[0]), float(high[1]), float(high[2]))


def _session(older: SceneMap, newer: SceneMap) -> dict[str, Any]:
    number = len(heads_of(older.head)) + 1
    p = newer.provenance
    views = p.get("views", len(newer.references.ids))
    return {f"session_{number}": f"{p.get('source', newer.name)}, {views} views, built {p.get('built', 'earlier')}"}


def check_families(*maps: SceneMap) -> None:
    """Refuse maps that contain KFNet's own networks.

    Raises:
        MapError: a map contains them.
    """
    for scene_map in maps:
        if scene_map.kfnet is not None:
            raise MapError(
                f"'{scene_map.name}' contains KFNet's own networks, which are trained on one session only. Join the "
                "maps that they were put into, train the networks on both sessions, and put them in with `kfloc map "
                "kfnet`."
            )


def _check_cameras(older: SceneMap, newer: SceneMap) -> None:
    for which in ("fx", "fy"):
        ratio = getattr(newer.camera, which) / getattr(older.camera, which)
        if not 1 / MAX_FOCAL_RATIO < ratio < MAX_FOCAL_RATIO:
            raise MapError(
                f"The maps are for cameras of different focal length ({which} {older.camera.fx:.0f} and "
                f"{newer.camera.fx:.0f} pixels). Build the second with `kfloc map update`, which uses the first map's "
                "camera."
            )


MIN_POINTS = 60
"""Fewest points of a view inside the box: an alignment needs as many."""


class NothingInside(MapError):
    """Error: no part of a map is inside the box."""


def crop_map(scene_map: SceneMap, low_m: Sequence[float], high_m: Sequence[float]) -> SceneMap:
    """Return the part of a map inside a box; the head and the calibration are unchanged.

    Args:
        scene_map: map to crop.
        low_m: smallest corner (3,), map frame.
        high_m: largest corner (3,).

    Raises:
        MapError: the corners are in the wrong order.
        NothingInside: no view has enough points in the box.
    """
    if any(not a < b for a, b in zip(low_m, high_m, strict=True)):
        raise MapError(f"The box must have its smallest corner first, got {tuple(low_m)} and {tuple(high_m)}.")
    low, high = torch.tensor(low_m), torch.tensor(high_m)
    kept: list[int] = []
    views: list[ReferencePoints] = []
    for position, view in enumerate(scene_map.references.views):
        inside = ((view.points >= low) & (view.points <= high)).all(dim=1)
        if int(inside.sum()) >= MIN_POINTS:
            kept.append(position)
            views.append(view.selected(inside))
    if not kept:
        extent = " to ".join(str(tuple(round(v, 2) for v in corner)) for corner in scene_map.bounds_m)
        raise NothingInside(f"No reference view has {MIN_POINTS} points in the box; the map reaches from {extent} m.")
    a, b = scene_map.bounds_m
    references = replace(scene_map.references.selected(kept), views=tuple(views))
    box = " ".join(f"{v:g}" for v in (*low_m, *high_m))
    return replace(
        scene_map,
        references=references,
        bounds_m=(
            (max(a[0], low_m[0]), max(a[1], low_m[1]), max(a[2], low_m[2])),
            (min(b[0], high_m[0]), min(b[1], high_m[1]), min(b[2], high_m[2])),
        ),
        provenance={**scene_map.provenance, "cropped_to_m": box, "references": len(references.ids)},
        path=None,
    )
