# SPDX-License-Identifier: Apache-2.0
"""Decisions: when and where an image is searched, and which of several alignments is its pose, or why none is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import Matrix, is_farther
from kfloc_ros.pixloc.refiner import failed_alignment
from kfloc_ros.types import Alignment

UNRELATED_COST = 0.26
"""Alignment cost above which no pose is accepted, however lax the limit that a map was calibrated with.

The features are the same in every map, and so is the cost of unrelated images: in an office (hololens_office) and in a
mirrored kitchen (RedKitchen) wrong places cost 0.26 and more, right ones at most 0.25. The search uses this limit even
if the map's own is stricter. A map's limit is calibrated on views close to the mapped ones, and right poses further
away cost more. The search also has evidence independent of the cost: its starting poses come from matched points."""


@dataclass(frozen=True)
class RelocalizationSettings:
    """Extent of the search, and the conditions under which a pose is accepted."""

    retrieved: int = 20
    """Reference views whose points are matched by mutual nearest neighbours."""
    matched: int = 6
    """Views, of the retrieved ones, that LightGlue matches if mutual nearest neighbours do not settle the pose."""
    near: int = 3
    """Views near the expected pose that are searched in addition."""
    min_matched_inliers: int = 10
    """Inliers that a pose from LightGlue matches needs; these matches are few and mostly right."""
    groups: int = 10
    """Largest number of view groups for which PnP is solved."""
    group_radius_m: float = 1.0
    """Radius of a group: views closer than this to the best view of the group join it, since they see one place."""
    places: int = 3
    """Largest number of starting poses that are aligned; those with most supporting cells come first."""
    same_start_m: float = 0.3
    same_start_deg: float = 10.0
    """Starting poses that differ by less than both limits count as one: they lead to the same alignment."""
    min_similarity: float = 0.7
    """Smallest cosine of two features that match."""
    max_error_px: float = 8.0
    """Inlier threshold of the reprojection error in PnP."""
    min_inliers: int = 20
    """Inlier cells that a pose from mutual nearest neighbours needs."""
    max_cost: float = UNRELATED_COST
    """Largest alignment cost of an accepted pose, if the camera was not expected there."""
    certain_agreement: float = 0.4
    """Share of agreeing mutual nearest neighbours from which a pose is accepted without LightGlue."""
    min_agreement: float = 0.31
    """Smallest accepted mean of two shares: agreeing mutual nearest neighbours, and agreeing LightGlue matches."""
    near_m: float = 0.3
    near_deg: float = 15.0
    """A pose within both limits of the expected one is also supported by the previous frames."""
    plausible_m: float = 0.15
    plausible_deg: float = 6.0
    """A pose further than either limit from the predicted one is checked."""
    near_agreement: float = 0.2
    """Smallest accepted agreement of a pose near the expected one."""
    near_max_cost: float = 0.28
    """Largest alignment cost of a pose near the expected one."""
    far_agreement: float = 0.35
    """Smallest accepted agreement of a pose elsewhere, if one was expected."""
    distinct_m: float = 0.5
    distinct_deg: float = 20.0
    """Two poses further apart than either limit are different places."""
    clear_margin: float = 1.15
    """Factor by which the second-best place must cost more than the best one. Otherwise no pose is returned."""
    clear_sigmas: float = 2.0
    """Significance, in standard deviations, of a difference in matches that rejects the pose with fewer."""


def choose(
    results: Sequence[Alignment],
    settings: RelocalizationSettings,
    place: Callable[[Alignment], str] | None = None,
    expected: Matrix | None = None,
) -> Alignment:
    """Choose the alignment at the place where the image was taken.

    Args:
        results: alignments from different starts.
        settings: conditions for accepting a pose.
        place: returns the place of an alignment in words.
        expected: expected pose ``T_map_camera`` (4, 4), if any.

    Returns:
        The chosen alignment; a failed one, with the reason, if no place is clearly better than the others.
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


def realigned(align: Callable[[Sequence[Matrix]], Alignment], first: Alignment) -> Alignment:
    """Return an alignment repeated from its end, where other views may see more, if that costs less; else the first
    one.
    """
    if not first.success or first.T_map_camera is None:
        return first
    second = align([first.T_map_camera])
    return second if second.success and second.final_cost < first.final_cost else first


def is_near(alignment: Alignment, expected: Matrix, settings: RelocalizationSettings) -> bool:
    """Return true if an alignment is near the expected pose."""
    T = alignment.T_map_camera
    return T is not None and not is_farther(T, expected, settings.near_m, settings.near_deg)


def distinct(a: Alignment, b: Alignment, settings: RelocalizationSettings) -> bool:
    """Return true if two alignments, both with a pose, are of different places."""
    assert a.T_map_camera is not None and b.T_map_camera is not None
    return is_farther(a.T_map_camera, b.T_map_camera, settings.distinct_m, settings.distinct_deg)


def has_more_support(other: NDArray[np.bool_], own: NDArray[np.bool_], settings: RelocalizationSettings) -> bool:
    """Return true if significantly more matches support another pose than one's own.

    The other pose must have more matches by ``clear_margin``, and the difference must be significant (McNemar's test on
    the matches that support one pose alone).

    Args:
        other: (N,) bool, true for matches that support the other pose.
        own: (N,) bool, true for matches that support one's own pose.
        settings: the margins.
    """
    only_other, only_own = int((other & ~own).sum()), int((own & ~other).sum())
    by_chance = settings.clear_sigmas * (only_other + only_own) ** 0.5
    return bool(settings.clear_margin * own.sum() < other.sum() and only_other - only_own > by_chance)


def cost_of(alignment: Alignment) -> float:
    """Return the final cost, as a sort key."""
    return alignment.final_cost


def _place(alignment: Alignment) -> str:
    assert alignment.T_map_camera is not None
    x, y, z = alignment.T_map_camera[:3, 3]
    return f"({x:.1f}, {y:.1f}, {z:.1f}) m"


@dataclass(frozen=True)
class SearchSettings:
    """Limits of a camera's motion, and the times between two searches for it."""

    max_speed_m_s: float = 2.0
    max_turn_deg_s: float = 120.0
    sigmas: float = 3.0
    view_m: float = 0.5
    view_deg: float = 45.0
    """Largest difference between an image and a view that shows enough of the same."""
    wait_s: float = 0.4
    longest_wait_s: float = 3.0
    """Time after a search without success until the next one; it doubles with every further one."""
    more_alike: float = 1.25
    """Factor by which an image resembles the map more than all searched in vain, if it is searched at once."""


class SearchPlan:
    """Plan of searches for a camera that has lost its pose: when, and among which views.

    A camera that had a pose is near it for a while. An image that resembles the map less than those that were searched
    in vain is not searched again and again.
    """

    def __init__(self, settings: SearchSettings | None = None) -> None:
        self._settings = settings or SearchSettings()
        self._last: tuple[int, Matrix, Matrix] | None = None
        self._failed: tuple[int, float, int] | None = None
        """Stamp of the last search without success, the greatest likeness of those since the pose, and their number."""
        self._in_vain: set[int] = set()
        """Views that these images resembled most."""

    def observe(self, stamp_ns: int, T_map_camera: Matrix, covariance: Matrix | None) -> None:
        """Add a pose (4, 4) with its covariance (6, 6); it ends the waiting."""
        self._last = stamp_ns, T_map_camera, np.zeros((6, 6)) if covariance is None else covariance
        self._failed = None
        self._in_vain.clear()

    def is_due(self, stamp_ns: int, likeness: float, best: int) -> bool:
        """Return true if an image is worth a search; every image is until there was a pose.

        An image that resembles the map more than those before, and another view than they did, shows another place.

        Args:
            stamp_ns: of the image.
            likeness: of the image to the views that it resembles most, on any scale.
            best: position of the view that it resembles most.
        """
        if self._last is None or self._failed is None:
            return True
        s, (failed_ns, most, count) = self._settings, self._failed
        wait_s = min(s.wait_s * 2.0 ** (count - 1), s.longest_wait_s)
        is_other = likeness > (most if best not in self._in_vain else s.more_alike * most)
        return is_other or not 0 <= stamp_ns - failed_ns < 1e9 * wait_s

    def failed(self, stamp_ns: int, likeness: float, best: int) -> None:
        """Add a search without success; arguments as of :meth:`is_due`."""
        _, most, count = self._failed or (0, 0.0, 0)
        self._failed = stamp_ns, max(most, likeness), count + 1
        self._in_vain.add(best)

    def in_reach(self, stamp_ns: int, T_map_cameras: NDArray[np.float64], best: int) -> list[int] | None:
        """Return the positions of the views that a camera can have in front of it, or None for the whole map.

        It is the whole map if the image resembles a view out of reach most, or if a search has failed since the pose.

        Args:
            stamp_ns: of the image.
            T_map_cameras: (K, 4, 4) poses of all views.
            best: position of the view that the image resembles most.
        """
        if self._last is None or self._failed is not None or stamp_ns <= self._last[0]:
            return None
        s, (last_ns, T, covariance) = self._settings, self._last
        passed_s = 1e-9 * (stamp_ns - last_ns)
        sigma_m, sigma_rad = (float(np.linalg.eigvalsh(covariance[k, k])[-1]) ** 0.5 for k in (slice(3), slice(3, 6)))
        limit_m = s.sigmas * sigma_m + s.max_speed_m_s * passed_s + s.view_m
        limit_deg = s.sigmas * np.degrees(sigma_rad) + s.max_turn_deg_s * passed_s + s.view_deg
        away_m = np.linalg.norm(T_map_cameras[:, :3, 3] - T[:3, 3], axis=1)
        cosine = (np.einsum("kij,ij->k", T_map_cameras[:, :3, :3], T[:3, :3]) - 1) / 2
        reached = (away_m <= limit_m) & (np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))) <= limit_deg)
        return [int(k) for k in np.flatnonzero(reached)] if reached[best] and not reached.all() else None

    def reset(self) -> None:
        """Forget the pose; the next image is searched in the whole map."""
        self._last = self._failed = None
        self._in_vain.clear()
