# SPDX-License-Identifier: Apache-2.0
"""Index of a place: ranks the submaps by similarity to an image and by distance to a pose, without loading them.

Each reference view of every submap has a descriptor (see ``retrieval.py``) in a common vocabulary, reduced to its
principal axes, the signs of its best points' features, and its pose. A view takes 1.6 kB, a twentieth of its points'
size. Descriptors select the submaps that look like the image. Among these, the image's own features vote for submaps
that match where the others do not. If rooms look alike, the vote decides: a poster is a small part of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.features.backbone import COARSE_CHANNELS, BackboneFeatures
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.pixloc.references import ReferenceViews, view_distances
from kfloc_ros.relocalization.retrieval import (
    CLUSTERS,
    MAX_CLUSTERED,
    QueryCells,
    Retrieved,
    Vocabulary,
    reliable_cells,
)

AXES = 256
"""Number of principal axes of a descriptor (of 4096 dimensions)."""
_POWER_STEPS = 4
SHORTLIST = 16
"""Number of submaps among which an image's features vote: the cost of a search does not grow with the place."""
VOTING_VIEWS = 10
"""Number of views per submap that take part in the vote: those most similar to the image."""
CODED_POINTS = 128
"""Number of points per view whose features are stored, by sign; a view's points start with the best ones."""
_MIN_LEAD = 0.1
"""A cell votes for a submap if its cosine exceeds that of half of the others by at least this."""
MAX_REACH_M = 1e8
POINTS_SHOWN = 16
STEPS = 127
"""Reduced descriptors are stored in one signed byte per axis."""


@dataclass(frozen=True)
class SubmapCandidate:
    """Submap in which an image may have been taken."""

    submap: int
    retrieved: tuple[Retrieved, ...]
    """Views most similar to the image, best first."""
    votes: float = 0.0
    """Weight of image content that matches this submap and not the others; 0 if there was no vote."""


@dataclass(frozen=True, eq=False)
class PlaceIndex:
    """Descriptors and poses of all reference views of a place."""

    vocabulary: Vocabulary
    mean: torch.Tensor
    """(K C,) mean of all descriptors, subtracted as common content."""
    axes: torch.Tensor
    """(D, K C) orthonormal rows."""
    descriptors: torch.Tensor
    """(N, D) unit rows."""
    submap: NDArray[np.int64]
    """(N,) number of each view's submap; the views of a submap are consecutive, in its order."""
    T_place_camera: NDArray[np.float64]
    """(N, 4, 4)"""
    codes: torch.Tensor
    """(N, P, 8) uint8, signs of the features of each view's best points."""
    points: torch.Tensor
    """(N, P, 3) some of each view's points in the place's frame, for display."""

    @property
    def submap_count(self) -> int:
        return int(self.submap.max()) + 1

    def view_count(self, submap: int) -> int:
        """Return the number of reference views of a submap."""
        return int((self.submap == submap).sum())

    @torch.inference_mode()
    def search(self, features: BackboneFeatures, submaps: int, views: int) -> list[SubmapCandidate]:
        """Return the submaps most similar to an image, best first, at most :data:`SHORTLIST`.

        Args:
            features: features of the image.
            submaps: number of submaps needed; if there are more candidates, they are ranked by vote.
            views: limit on views per submap.
        """
        cells = reliable_cells(features)
        similarity = self._similarity(cells)
        order = np.argsort(-similarity, kind="stable")
        first = np.searchsorted(self.submap, np.arange(self.submap_count))
        _, best = np.unique(self.submap[order], return_index=True)
        candidates = []
        for submap in np.argsort(best)[:SHORTLIST].tolist():
            chosen = order[self.submap[order] == submap][:views]
            retrieved = tuple(Retrieved(int(k - first[submap]), float(similarity[k])) for k in chosen)
            candidates.append(SubmapCandidate(submap, retrieved))
        if len(candidates) > submaps:
            votes = self._votes(cells, [first[item.submap] for item in candidates], candidates)
            candidates = [replace(item, votes=weight) for item, weight in zip(candidates, votes, strict=True)]
            candidates.sort(
                key=lambda item: -item.votes
            )  # stable: without a vote, the order of the descriptors remains
        return candidates

    @torch.inference_mode()
    def views_of(self, submap: int, features: BackboneFeatures, views: int) -> tuple[Retrieved, ...]:
        """Return the views of one submap most similar to an image, best first."""
        own = np.flatnonzero(self.submap == submap)
        similarity = self._similarity(reliable_cells(features))[own]
        best = np.argsort(-similarity, kind="stable")[:views].tolist()
        return tuple(Retrieved(k, float(similarity[k])) for k in best)

    def _similarity(self, cells: QueryCells) -> NDArray[np.float32]:
        """Return the cosine (N,) of an image's reduced descriptor with those of the views."""
        row = self.axes @ (self.vocabulary.describe(cells.features, cells.weight) - self.mean)
        return np.asarray((self.descriptors @ F.normalize(row, dim=0)).numpy(), dtype=np.float32)

    def _votes(self, cells: QueryCells, first: Sequence[int], candidates: Sequence[SubmapCandidate]) -> list[float]:
        """Return the weights of the votes: the margins of cells that fit a submap better than half of the others."""
        query, alike = _signs(_coded(cells.features)), []
        for start, item in zip(first, candidates, strict=True):
            rows = self.codes[[start + view.position for view in item.retrieved[:VOTING_VIEWS]]]
            agreement = (query @ _signs(rows.reshape(-1, rows.shape[-1])).t()).amax(dim=1) / query.shape[1]
            alike.append(torch.sin(agreement * (torch.pi / 2)))  # expected cosine given the agreement of signs
        table = torch.stack(alike, dim=1)
        lead = (table - table.median(dim=1, keepdim=True).values - _MIN_LEAD).clamp(min=0)
        return [float(v) for v in (lead * cells.weight.to(lead)[:, None]).sum(dim=0)]

    def distances(self, T_place_camera: Matrix) -> NDArray[np.float64]:
        """Return the distances (M,) from a pose to each submap's nearest view in metres; 1 deg counts as 0.02 m."""
        away = view_distances(self.T_place_camera, T_place_camera)
        nearest = np.full(self.submap_count, np.inf)
        np.minimum.at(nearest, self.submap, away)
        return nearest

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors."""
        return {
            "centres": self.vocabulary.centres.half().contiguous(),
            "mean": self.mean.float().contiguous(),
            "axes": self.axes.half().contiguous(),
            "descriptors": (self.descriptors * STEPS).round().to(torch.int8).contiguous(),
            "submap": torch.from_numpy(self.submap.copy()),
            "T_place_camera": torch.from_numpy(self.T_place_camera.copy()),
            "codes": self.codes.contiguous(),
            "points": self.points.float().contiguous(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], submaps: int) -> PlaceIndex:
        """Return the index in stored tensors, for a place with this number of submaps.

        Raises:
            ValueError: the tensors do not match each other.
            KeyError: a tensor is missing.
        """
        centres = F.normalize(tensors["centres"].float(), dim=1)
        submap = tensors["submap"].to(torch.int64).numpy()
        T = tensors["T_place_camera"].double().numpy()
        length, count, axis_count = centres.numel(), len(submap), len(tensors["axes"])
        shapes = {
            "mean": (length,),
            "axes": (axis_count, length),
            "descriptors": (count, axis_count),
            "codes": (count, CODED_POINTS, COARSE_CHANNELS // 8),
            "points": (count, POINTS_SHOWN, 3),
        }
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"the index's {name} have the shape {tuple(tensors[name].shape)}")
        if (
            centres.ndim != 2
            or centres.shape[1] != COARSE_CHANNELS
            or not (len(centres) <= CLUSTERS and 1 <= axis_count <= AXES)
        ):
            raise ValueError("the index has another kind of vocabulary")
        if tensors["codes"].dtype != torch.uint8:
            raise ValueError("the index's codes are not bytes")
        if not np.array_equal(np.unique(submap), np.arange(submaps)) or (np.diff(submap) < 0).any():
            raise ValueError("the index does not list the views of every submap")
        if T.shape != (count, 4, 4) or not are_rigid(T):
            raise ValueError("the index's poses are not rigid poses")
        descriptors, points = F.normalize(tensors["descriptors"].float(), dim=1), tensors["points"].float()
        return cls(
            Vocabulary(centres),
            tensors["mean"].float(),
            tensors["axes"].float(),
            descriptors,
            submap,
            T,
            tensors["codes"],
            points,
        )


def make_index(load: Callable[[int], ReferenceViews], count: int) -> PlaceIndex:
    """Build the index of submaps; each is loaded twice, and one is in memory at a time.

    Args:
        load: returns the views of a submap in the place's frame, by its number.
        count: number of submaps.
    """
    samples = []
    for submap in range(count):
        features = torch.cat([view.coarse for view in load(submap).views]).float()
        samples.append(features[:: max(1, -(-len(features) * count // MAX_CLUSTERED))])
    vocabulary = Vocabulary.learn(torch.cat(samples))
    rows: list[torch.Tensor] = []
    owners: list[int] = []
    poses, codes, points = [], [], []
    for submap in range(count):
        references = load(submap)
        rows += [vocabulary.describe_view(view) for view in references.views]
        owners += [submap] * len(references.views)
        poses.append(references.T_map_camera)
        codes += [_best_codes(view.coarse) for view in references.views]
        points += [_some(view.points) for view in references.views]
    table = torch.stack(rows)
    mean = table.mean(dim=0)
    axes = _principal_axes(table - mean, min(AXES, len(table)))
    descriptors = F.normalize((table - mean) @ axes.t(), dim=1)
    submap_of = np.array(owners, np.int64)
    return PlaceIndex(
        vocabulary,
        mean,
        axes,
        descriptors,
        submap_of,
        np.concatenate(poses),
        torch.stack(codes),
        torch.stack(points).float(),
    )


def are_rigid(T: NDArray[np.float64]) -> bool:
    """Return True if matrices (N, 4, 4) are rigid motions with plausible translations."""
    if not (np.abs(T) < MAX_REACH_M).all():  # nor NaN
        return False
    R = T[:, :3, :3]
    turned = np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max()
    return bool(turned < 1e-2 and (np.linalg.det(R) > 0).all() and (T[:, 3] == [0, 0, 0, 1]).all())


def _principal_axes(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return principal axes (D, C) of rows (N, C) as orthonormal rows, by subspace iteration from a fixed start."""
    basis = torch.randn(rows.shape[1], count, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(rows.t() @ (rows @ basis)).Q
    return basis.t().contiguous()


def _some(points: torch.Tensor) -> torch.Tensor:
    """Return (P, 3) of a view's points (N, 3), evenly chosen."""
    return points[torch.linspace(0, len(points) - 1, POINTS_SHOWN).round().long()]


def _best_codes(features: torch.Tensor) -> torch.Tensor:
    """Return codes (P, 8) of the first features (N, C) of a view, repeated from the start if there are fewer."""
    return _coded(features[torch.arange(CODED_POINTS) % len(features)])


def _coded(features: torch.Tensor) -> torch.Tensor:
    """Return the signs of features (N, C) as uint8 (N, C / 8)."""
    return torch.from_numpy(np.packbits((features > 0).cpu().numpy(), axis=1))


def _signs(codes: torch.Tensor) -> torch.Tensor:
    """Return codes as (N, C) of 1 and -1."""
    return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1)).float() * 2 - 1
