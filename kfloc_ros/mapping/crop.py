# SPDX-License-Identifier: Apache-2.0
"""A part of a map: the reference points inside a box, and the views that still have enough of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kfloc_ros.errors import MapError
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

MIN_POINTS = 60
"""A view with fewer points inside says too little about a pose: an alignment needs as many."""


class NothingInside(MapError):
    """Nothing of a map lies in the box that it is to be cropped to."""


def crop_map(scene_map: SceneMap, low_m: Sequence[float], high_m: Sequence[float]) -> SceneMap:
    """The map within a box; the head and the calibration stay as they are.

    Args:
        scene_map: the whole.
        low_m: smallest corner (3,), map frame.
        high_m: largest corner (3,).

    Raises:
        MapError: the box is inside out.
        NothingInside: no view has enough points in it.
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
            views.append(
                ReferencePoints(view.points[inside], view.coarse[inside], view.fine[inside], view.confidence[inside])
            )
    if not kept:
        extent = " to ".join(str(tuple(round(v, 2) for v in corner)) for corner in scene_map.bounds_m)
        raise NothingInside(f"No reference view has {MIN_POINTS} points in the box; the map reaches from {extent} m.")
    a, b = scene_map.bounds_m
    ids = tuple(scene_map.references.ids[k] for k in kept)
    box = " ".join(f"{v:g}" for v in (*low_m, *high_m))
    return replace(
        scene_map,
        references=ReferenceViews(ids, scene_map.references.T_map_camera[kept], tuple(views)),
        bounds_m=(
            (max(a[0], low_m[0]), max(a[1], low_m[1]), max(a[2], low_m[2])),
            (min(b[0], high_m[0]), min(b[1], high_m[1]), min(b[2], high_m[2])),
        ),
        provenance={**scene_map.provenance, "cropped_to_m": box, "references": len(ids)},
        path=None,
    )
