# SPDX-License-Identifier: Apache-2.0
"""Changes of a place since it was mapped: points of older reference views that later images no longer show.

Later images are aligned with the older reference views around them, by the points' own matches. A point that is found
where the pose expects it still holds; a point that is not found, or elsewhere, contradicts. The share of points that
hold in an image says how much a contradiction tells: where the light is another, or the view is far, few points are
found although nothing has changed, and a missing point tells little. The evidence of all images is summed as a
log-likelihood ratio.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.mapping.picture import FloorPlan
from kfloc_ros.maps.files import appearing_file
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.pixloc.point_matching import AGREEING_BY_CHANCE, fit_pose, search_points
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews, view_distances
from kfloc_ros.pixloc.refiner import query_levels

MAX_IMAGES = 120
IMAGE_SPACING_M = 0.05
"""Smallest distance of images that count as independent, in metres (1 deg counts as 0.02 m)."""
SAME_VIEW_M = 0.45
"""Largest distance of an image from a reference view that it is compared with."""
COMPARED_VIEWS = 6
"""Largest number of reference views that an image is compared with."""
MIN_SUPPORT = 3.0
"""Smallest support of an image's alignment, see ``MatchedPose.support``: with less it may be at a wrong place."""
AGREES = 0.25
"""Agreement of a point, see ``MatchedPose.agreement``, at an error of one cell."""
RETIRED = -3.0
"""Log-likelihood ratio below which a point is retired: 20 to 1."""
RATE_LIMITS = (0.35, 0.95)
"""Limits on the share of points that hold in an image."""
MIN_VIEW_POINTS, MIN_VIEW_SHARE = 50, 0.34
"""Fewest points, and smallest share of its points, of a view that stays."""
BORDER_PX = 16
DARKEST, BRIGHTEST = 16, 245
"""Grey values beyond which an image is too dark or too bright to tell what is there."""
LOOKS_ALIKE = 0.5
"""Smallest share of observed points that hold of a view that a newer one beside it replaces."""
Report = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class ViewChange:
    """Result for one older reference view."""

    id: int
    session: int
    T_map_camera: Matrix
    images: int
    """Number of later images that it was compared with."""
    points: int
    contradicted: int
    """Number of its points that later images contradict."""
    agreement: float
    """Share of point observations that hold; NaN without images."""
    retired: bool
    """True if too few points are left."""


@dataclass(frozen=True, eq=False)
class Changes:
    """Changes that a recording shows of a map."""

    views: tuple[ViewChange, ...]
    """In the order of the references."""
    references: ReferenceViews
    """Views and points that still hold."""
    gone_points: NDArray[np.float64]
    """(N, 3) contradicted points, map frame, retired views' included."""
    images: int
    aligned: int
    """Number of images that were aligned, of those compared."""

    @property
    def changed(self) -> list[ViewChange]:
        """Views with contradicted points, the most changed first."""
        return sorted((v for v in self.views if v.contradicted), key=lambda v: -v.contradicted / v.points)

    def look_different(self) -> set[int]:
        """Return the ids of views that later images do not look like, beyond single points: the light was another."""
        return {v.id for v in self.views if not v.retired and v.agreement < LOOKS_ALIKE}

    def table(self) -> str:
        """Return CSV: a line a reference view, the most changed first."""
        text = io.StringIO()
        write = csv.writer(text, lineterminator="\n").writerow
        write(["view", "session", "x_m", "y_m", "z_m", "images", "points", "contradicted", "agreement", "retired"])
        for v in sorted(self.views, key=lambda v: -v.contradicted / v.points):
            place = [f"{x:.3f}" for x in v.T_map_camera[:3, 3]]
            agreement = "" if math.isnan(v.agreement) else f"{v.agreement:.2f}"
            write([v.id, v.session, *place, v.images, v.points, v.contradicted, agreement, int(v.retired)])
        return text.getvalue()

    def summary(self, most: int = 5) -> str:
        """Return sentences: how much has changed, and the most changed views."""
        seen = [v for v in self.views if v.images]
        if not seen:
            return "No older reference view was seen again closely enough to tell what has changed."
        points, gone = sum(v.points for v in seen), sum(v.contradicted for v in seen)
        retired = sum(v.retired for v in seen)
        lines = [
            f"{len(seen)} of {len(self.views)} older views were seen again, by {self.aligned} of {self.images} images: "
            f"{gone} of their {points} points ({100 * gone / points:.0f} %) are contradicted and retired, with "
            f"{retired} whole {'view' if retired == 1 else 'views'}."
        ]
        for v in self.changed[:most]:
            place = ", ".join(f"{x:.2f}" for x in v.T_map_camera[:3, 3])
            whole = ", retired" if v.retired else ""
            lines.append(
                f"  view {v.id} at ({place}) m: {v.contradicted} of {v.points} points, in {v.images} images{whole}"
            )
        return "\n".join(lines)


def picture_of_changes(before: SceneMap, changes: Changes) -> bytes:
    """Return a PNG of a map before an update: points that still hold grey, contradicted ones red, and the views.

    Args:
        before: the map before the update.
        changes: result of the update.
    """
    plan = FloorPlan(before)
    points, gone = plan.points, changes.gone_points
    plan.axes.scatter(points[:, plan.right], points[:, plan.ahead], s=0.8, c="#b0b0b0", linewidths=0, rasterized=True)
    plan.axes.scatter(
        gone[:, plan.right], gone[:, plan.ahead], s=3.0, c="#c62828", linewidths=0, label="contradicted points"
    )
    seen = [v for v in changes.views if v.images]
    for views, colour, label in (
        ([v for v in changes.views if not v.images], "#9e9e9e", "views not seen again"),
        ([v for v in seen if not v.retired], "#2e7d32", "views that hold"),
        ([v for v in seen if v.retired], "#c62828", "retired views"),
    ):
        if views:
            T = np.stack([v.T_map_camera for v in views])
            plan.axes.quiver(
                T[:, plan.right, 3], T[:, plan.ahead, 3], T[:, plan.right, 2], T[:, plan.ahead, 2],
                color=colour, angles="xy", scale_units="xy", scale=5.0, width=0.0018, label=label,
            )  # fmt: skip
    plan.draw_borders()
    plan.axes.set_title(f"{before.name}: {len(gone)} points have changed, {sum(v.retired for v in seen)} views retired")
    plan.axes.grid(alpha=0.25)
    plan.figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return plan.png()


def write_changes(folder: Path, before: SceneMap, changes: Changes) -> None:
    """Write ``changes.png`` and ``changes.csv`` to a folder.

    Raises:
        MapError: the folder cannot be written.
    """
    try:
        for name, data in (("png", picture_of_changes(before, changes)), ("csv", changes.table().encode())):
            with appearing_file(folder / f"changes.{name}") as stream:
                stream.write(data)
    except OSError as error:
        raise MapError(f"The map is updated, but its changes cannot be written to '{folder}': {error}.") from error


def find_changes(
    references: ReferenceViews,
    camera: Camera,
    source: FrameSource,
    T_map_session: Matrix,
    backbone: Backbone,
    on_progress: Report = lambda share: None,
) -> Changes:
    """Compare the reference views of a map with the images of a later recording.

    Args:
        references: views of the map.
        camera: pinhole camera of the map.
        source: recording with poses.
        T_map_session: (4, 4) motion from the recording's frame to the map's.
        backbone: feature network.
        on_progress: called with the completed share.

    Raises:
        SourceError: an image cannot be read.
    """
    tally = _Tally(references, camera)
    chosen = _spaced(references, source, T_map_session)
    adapter = ImageAdapter(source.camera, camera)
    for number, position in enumerate(chosen):
        on_progress(number / len(chosen))
        frame = source.read(position)
        if frame is not None and frame.T_map_camera is not None:
            image = adapter(frame.image)
            tally.add(image, backbone.extract(image), T_map_session @ frame.T_map_camera)
    return tally.changes()


def _spaced(references: ReferenceViews, source: FrameSource, T_map_session: Matrix) -> list[int]:
    """Return positions of frames near reference views and apart from each other, evenly over the recording."""
    kept: list[int] = []
    poses: list[Matrix] = []
    for position in range(len(source)):
        pose = source.pose(position)
        if pose is None or not np.isfinite(pose).all():
            continue
        T = T_map_session @ pose
        if view_distances(references.T_map_camera, T).min() > SAME_VIEW_M:
            continue
        if not poses or view_distances(np.stack(poses), T).min() > IMAGE_SPACING_M:
            kept.append(position)
            poses.append(T)
    even = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), MAX_IMAGES)).round().astype(int))
    return [kept[k] for k in even]


class _Tally:
    """Evidence of images on the points of reference views."""

    def __init__(self, references: ReferenceViews, camera: Camera) -> None:
        self._references, self._camera = references, camera
        counts = [len(view) for view in references.views]
        self._ratio = [np.zeros(n) for n in counts]
        self._held, self._missed = ([0] * len(counts) for _ in range(2))
        self._seen = [0] * len(counts)
        self._images = self._aligned = 0

    @torch.inference_mode()
    def add(self, image: NDArray[np.uint8], features: BackboneFeatures, T_map_camera: Matrix) -> None:
        """Add the evidence of an image at a pose, unless it does not align there."""
        self._images += 1
        distances = view_distances(self._references.T_map_camera, T_map_camera)
        near = [int(k) for k in np.argsort(distances, kind="stable")[:COMPARED_VIEWS] if distances[k] < SAME_VIEW_M]
        if not near:
            return
        views = [self._references.views[k] for k in near]
        points = ReferencePoints.concatenate(views)
        local = points.points - torch.from_numpy(T_map_camera[:3, 3].copy()).to(points.points)
        start = make_pose(T_map_camera[:3, :3].T, np.zeros(3))
        levels = query_levels(features)
        wanted = (points.coarse, points.fine)
        matches = search_points(levels, local, wanted, points.confidence, start, self._camera)
        matched = fit_pose(matches, local, start, self._camera)
        if matched is None or matched.support < MIN_SUPPORT:
            return
        self._aligned += 1
        P = local.double().numpy() @ matched.T_camera_local[:3, :3].T + matched.T_camera_local[:3, 3]
        u, v = (
            f * P[:, k] / np.maximum(P[:, 2], 1e-6) + c
            for k, f, c in ((0, self._camera.fx, self._camera.cx), (1, self._camera.fy, self._camera.cy))
        )
        width, height = self._camera.width, self._camera.height
        inside = (
            (P[:, 2] > 0.05) & (u > BORDER_PX) & (v > BORDER_PX) & (u < width - BORDER_PX) & (v < height - BORDER_PX)
        )
        grey = cv2.blur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 9))
        rows, columns = (np.where(inside, at, 0.0).round().astype(np.intp) for at in (v, u))
        inside &= (grey[rows, columns] > DARKEST) & (grey[rows, columns] < BRIGHTEST)
        holds = matched.agreement.cpu().numpy() > AGREES
        rate = float(np.clip(holds[inside].mean() if inside.any() else 0.0, *RATE_LIMITS))
        found = float((matches.weights > 0).float().mean())
        chance = AGREEING_BY_CHANCE * found
        if rate <= chance:
            return
        told = np.where(holds, math.log(rate / chance), math.log((1 - rate) / (1 - chance))) * inside
        ends = np.cumsum([len(view) for view in views])[:-1]
        parts = zip(near, np.split(told, ends), np.split(holds, ends), np.split(inside, ends), strict=True)
        for k, part, held, counted in parts:
            self._ratio[k] += part
            self._held[k] += int((held & counted).sum())
            self._missed[k] += int((~held & counted).sum())
            self._seen[k] += 1

    def changes(self) -> Changes:
        """Return what the evidence says of every view."""
        views, kept, parts, gone = [], [], [], []
        for k, view in enumerate(self._references.views):
            retired = self._ratio[k] < RETIRED
            left = int((~retired).sum())
            whole = bool(retired.any()) and (left < MIN_VIEW_POINTS or left < MIN_VIEW_SHARE * len(view))
            observed = self._held[k] + self._missed[k]
            views.append(
                ViewChange(
                    id=self._references.ids[k],
                    session=self._references.session_of(k),
                    T_map_camera=self._references.T_map_camera[k],
                    images=self._seen[k],
                    points=len(view),
                    contradicted=int(retired.sum()),
                    agreement=self._held[k] / observed if observed else float("nan"),
                    retired=whole,
                )
            )
            gone.append(view.points.double().numpy()[retired | whole])
            if not whole:
                kept.append(k)
                parts.append(view.selected(torch.from_numpy(~retired)) if retired.any() else view)
        holding = self._references.selected(kept)
        holding = ReferenceViews(holding.ids, holding.T_map_camera, tuple(parts), holding.sessions)
        return Changes(tuple(views), holding, np.concatenate(gone), self._images, self._aligned)
