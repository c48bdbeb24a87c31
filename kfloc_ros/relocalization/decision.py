# SPDX-License-Identifier: Apache-2.0
"""Which of several alignments is where an image was taken, if any: when a place counts as found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import Matrix, is_farther
from kfloc_ros.pixloc.refiner import failed_alignment
from kfloc_ros.types import Alignment

UNRELATED_COST = 0.26
"""Alignment cost above which no pose is believed, however lax the limit that a map was calibrated with.

The features are the same in every map, and so is the cost of unrelated images: in an office (hololens_office) and in a
mirrored kitchen (RedKitchen) wrong places cost 0.26 and more, right ones at most 0.25. The search believes up to here,
however strict the map's own limit: it is calibrated on views from near the mapped ones, and right poses from further
away cost more; and matched points have said independently of the cost where to align from.
"""


@dataclass(frozen=True)
class RelocalizationSettings:
    """How far the search goes and when a place counts as found."""

    retrieved: int = 20
    """Reference views whose points are matched one by one."""
    matched: int = 6
    """Of these, views whose points are matched in context where matches one by one do not settle it."""
    near: int = 3
    """Views at the last known pose that are looked at besides."""
    min_matched_inliers: int = 10
    """Of matches in context, which are few and mostly right."""
    groups: int = 10
    """Groups of views that are solved for a pose at most."""
    group_radius_m: float = 1.0
    """Views from nearer than this to the best of a group join it: they see one place."""
    places: int = 3
    """Starting poses aligned at most, those that most cells agree with."""
    same_start_m: float = 0.3
    same_start_deg: float = 10.0
    """Starts nearer to each other than both would be aligned to the same pose."""
    min_similarity: float = 0.7
    """Cosine of two features below which they do not match."""
    max_error_px: float = 8.0
    min_inliers: int = 20
    max_cost: float = UNRELATED_COST
    sure_agreement: float = 0.4
    """Share of matches one by one that agree with a pose from which it is right without being matched in context."""
    min_agreement: float = 0.31
    """Mean of the shares of matches one by one and in context that have to agree with a pose."""
    near_m: float = 0.3
    near_deg: float = 15.0
    """A pose no further than both from where the camera was expected has the frames before to speak for it."""
    plausible_m: float = 0.15
    plausible_deg: float = 6.0
    """A step from the predicted pose further than either is checked."""
    near_agreement: float = 0.2
    near_max_cost: float = 0.28
    far_agreement: float = 0.35
    """Where the camera was expected elsewhere."""
    distinct_m: float = 0.5
    distinct_deg: float = 20.0
    """Two poses further apart than either of these are different places."""
    clear_margin: float = 1.15
    """The second place's alignment must cost more than the best one's by this factor, or nothing is claimed."""
    clear_sigmas: float = 2.0
    """Standard deviations of chance by which more matches have to speak for one place for another to be dropped."""


def choose(
    results: Sequence[Alignment],
    settings: RelocalizationSettings,
    place: Callable[[Alignment], str] | None = None,
    expected: Matrix | None = None,
) -> Alignment:
    """The one of several alignments that is where the image was taken; failed, with the reason, if that is not clear.

    Args:
        results: of alignments from different starts.
        settings: when a place counts as found.
        place: says in words where an alignment is.
        expected: where the camera should be, if anything is known.
    """
    place = place or _place
    if not results:
        return failed_alignment("no reference view shows what the image shows")
    near = [r for r in results if expected is not None and is_near(r, expected, settings)]
    good = sorted((r for r in results if r.success and r.final_cost <= settings.max_cost), key=cost_of)
    good_near = sorted((r for r in near if r.success and r.final_cost <= settings.near_max_cost), key=cost_of)
    if good_near and (not good or settings.clear_margin * good[0].final_cost > good_near[0].final_cost):
        return good_near[0]
    if not good:
        best = min(results, key=cost_of)
        reason = best.reason or f"the image hardly looks like the map at {place(best)} (cost {best.final_cost:.2f})"
        return replace(best, success=False, reason=reason)
    rival = next((r for r in good[1:] if distinct(good[0], r, settings)), None)
    if rival is None or rival.final_cost > settings.clear_margin * good[0].final_cost:
        return good[0]
    return replace(good[0], success=False, reason=f"two places look alike: {place(good[0])} and {place(rival)}")


def repeated(align: Callable[[Sequence[Matrix]], Alignment], first: Alignment) -> Alignment:
    """The alignment repeated from where it ended, where other views may see more; the better of the two."""
    if not first.success or first.T_map_camera is None:
        return first
    second = align([first.T_map_camera])
    return second if second.success and second.final_cost < first.final_cost else first


def is_near(alignment: Alignment, expected: Matrix, settings: RelocalizationSettings) -> bool:
    """Whether an alignment is where the camera was expected."""
    T = alignment.T_map_camera
    return T is not None and not is_farther(T, expected, settings.near_m, settings.near_deg)


def distinct(a: Alignment, b: Alignment, settings: RelocalizationSettings) -> bool:
    """Whether two alignments, which have poses, are of different places."""
    assert a.T_map_camera is not None and b.T_map_camera is not None
    return is_farther(a.T_map_camera, b.T_map_camera, settings.distinct_m, settings.distinct_deg)


def more_speak_for(other: NDArray[np.bool_], own: NDArray[np.bool_], settings: RelocalizationSettings) -> bool:
    """Whether clearly more of an image's matches speak for another pose than for one's own.

    More by the margin, and by more than chance: of the matches that speak for one of the two alone, either could have
    had each (McNemar's test).

    Args:
        other: (N,) which matches speak for the other pose.
        own: (N,) the same for one's own.
        settings: the margins.
    """
    for_other, for_own = int((other & ~own).sum()), int((own & ~other).sum())
    by_chance = settings.clear_sigmas * (for_other + for_own) ** 0.5
    return bool(settings.clear_margin * own.sum() < other.sum() and for_other - for_own > by_chance)


def cost_of(alignment: Alignment) -> float:
    return alignment.final_cost


def _place(alignment: Alignment) -> str:
    assert alignment.T_map_camera is not None
    x, y, z = alignment.T_map_camera[:3, 3]
    return f"({x:.1f}, {y:.1f}, {z:.1f}) m"
