# SPDX-License-Identifier: Apache-2.0
"""Which submaps of a place does an image show, and which lie around a pose? Told without loading any of them.

Every reference view of every submap has a descriptor (see ``retrieval.py``) in one vocabulary, shortened to its
principal axes, the signs of its best points' features, and its pose. A view takes 1.6 kB, a twentieth of what its
points take. The descriptors say which submaps look like the image; among them, the image's own features vote for those
that show what the others do not. Where rooms are alike the latter decides: a poster is a small part of a view.
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
"""Principal axes kept of a descriptor's 4096 numbers."""
_POWER_STEPS = 4
SHORTLIST = 16
"""Submaps among which an image's features vote: what a search costs does not grow with the place."""
VOTING_VIEWS = 10
"""Of each of them, those most like the image."""
CODED_POINTS = 128
"""Points of a view whose features are kept, by their signs; a view's points begin with the best of all over it."""
_MIN_LEAD = 0.1
"""A cell votes for a submap where it fits better by this cosine than in half of the others."""
MAX_REACH_M = 1e8
POINTS_SHOWN = 16
STEPS = 127
"""Shortened descriptors are stored in one signed byte an axis."""


@dataclass(frozen=True)
class SubmapCandidate:
    """A submap that an image may have been taken in."""

    submap: int
    retrieved: tuple[Retrieved, ...]
    """Its views that look most like the image, best first."""
    votes: float = 0.0
    """How much the image shows that it shows and others do not; 0 where there was no vote."""


@dataclass(frozen=True, eq=False)
class PlaceIndex:
    """Descriptors and poses of all reference views of a place."""

    vocabulary: Vocabulary
    mean: torch.Tensor
    """(K C,) of all descriptors; what all views have in common says nothing."""
    axes: torch.Tensor
    """(D, K C) orthonormal rows."""
    descriptors: torch.Tensor
    """(N, D) unit rows."""
    submap: NDArray[np.int64]
    """(N,) which submap each view is of; the views of a submap follow one another, in its order."""
    T_place_camera: NDArray[np.float64]
    """(N, 4, 4)"""
    codes: torch.Tensor
    """(N, P, 8) uint8, signs of the features of each view's best points."""
    points: torch.Tensor
    """(N, P, 3) some of each view's points in the place's frame, to be looked at."""

    @property
    def submap_count(self) -> int:
        return int(self.submap.max()) + 1

    def view_count(self, submap: int) -> int:
        """Reference views of a submap."""
        return int((self.submap == submap).sum())

    @torch.inference_mode()
    def search(self, features: BackboneFeatures, submaps: int, views: int) -> list[SubmapCandidate]:
        """The submaps that an image looks most like, best first, at most :data:`SHORTLIST`.

        Args:
            features: of the image.
            submaps: how many of the first are wanted; where there are more, there is a vote.
            views: how many of each one's views at most.
        """
        cells = reliable_cells(features)
        similarity = self._similarity(cells)
        order = np.argsort(-similarity, kind="stable")
        first = np.searchsorted(self.submap, np.arange(self.submap_count))
        _, best = np.unique(self.submap[order], return_index=True)
        found = []
        for submap in np.argsort(best)[:SHORTLIST].tolist():
            chosen = order[self.submap[order] == submap][:views]
            retrieved = tuple(Retrieved(int(k - first[submap]), float(similarity[k])) for k in chosen)
            found.append(SubmapCandidate(submap, retrieved))
        if len(found) > submaps:
            votes = self._votes(cells, [first[item.submap] for item in found], found)
            found = [replace(item, votes=weight) for item, weight in zip(found, votes, strict=True)]
            found.sort(key=lambda item: -item.votes)  # stable: without a vote the descriptors decide
        return found

    @torch.inference_mode()
    def views_of(self, submap: int, features: BackboneFeatures, views: int) -> tuple[Retrieved, ...]:
        """The views of one submap that an image looks most like, best first."""
        own = np.flatnonzero(self.submap == submap)
        similarity = self._similarity(reliable_cells(features))[own]
        best = np.argsort(-similarity, kind="stable")[:views].tolist()
        return tuple(Retrieved(k, float(similarity[k])) for k in best)

    def _similarity(self, cells: QueryCells) -> NDArray[np.float32]:
        """(N,) cosine of an image's shortened descriptor with those of the views."""
        row = self.axes @ (self.vocabulary.describe(cells.features, cells.weight) - self.mean)
        return np.asarray((self.descriptors @ F.normalize(row, dim=0)).numpy(), dtype=np.float32)

    def _votes(self, cells: QueryCells, first: Sequence[int], found: Sequence[SubmapCandidate]) -> list[float]:
        """Weight of the cells that fit a submap better than half of the others, and by how much."""
        query, alike = _signs(_coded(cells.features)), []
        for start, item in zip(first, found, strict=True):
            rows = self.codes[[start + seen.position for seen in item.retrieved[:VOTING_VIEWS]]]
            agreement = (query @ _signs(rows.reshape(-1, rows.shape[-1])).t()).amax(dim=1) / query.shape[1]
            alike.append(torch.sin(agreement * (torch.pi / 2)))  # what the cosine is likely to be
        table = torch.stack(alike, dim=1)
        lead = (table - table.median(dim=1, keepdim=True).values - _MIN_LEAD).clamp(min=0)
        return [float(v) for v in (lead * cells.weight.to(lead)[:, None]).sum(dim=0)]

    def distances(self, T_place_camera: Matrix) -> NDArray[np.float64]:
        """How far (M,) each submap's nearest view is from a pose, metres; a degree counts as 2 cm."""
        away = view_distances(self.T_place_camera, T_place_camera)
        nearest = np.full(self.submap_count, np.inf)
        np.minimum.at(nearest, self.submap, away)
        return nearest

    def tensors(self) -> dict[str, torch.Tensor]:
        """As stored."""
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
        """From what was stored, for a place with so many submaps.

        Raises:
            ValueError: the tensors do not fit each other.
            KeyError: one is missing.
        """
        centres = F.normalize(tensors["centres"].float(), dim=1)
        submap = tensors["submap"].to(torch.int64).numpy()
        T = tensors["T_place_camera"].double().numpy()
        length, count, kept = centres.numel(), len(submap), len(tensors["axes"])
        shapes = {
            "mean": (length,),
            "axes": (kept, length),
            "descriptors": (count, kept),
            "codes": (count, CODED_POINTS, COARSE_CHANNELS // 8),
            "points": (count, POINTS_SHOWN, 3),
        }
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"the index's {name} have the shape {tuple(tensors[name].shape)}")
        if (
            centres.ndim != 2
            or centres.shape[1] != COARSE_CHANNELS
            or not (len(centres) <= CLUSTERS and 1 <= kept <= AXES)
        ):
            raise ValueError("the index's vocabulary is of another kind")
        if tensors["codes"].dtype != torch.uint8:
            raise ValueError("the index's codes are no bytes")
        if not np.array_equal(np.unique(submap), np.arange(submaps)) or (np.diff(submap) < 0).any():
            raise ValueError("the index does not list the views of every submap")
        if T.shape != (count, 4, 4) or not are_rigid(T):
            raise ValueError("the index's poses are no rigid poses")
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
    """The index of submaps; each is loaded twice, and one is in memory at a time.

    Args:
        load: the views of a submap, in the place's frame, by its number.
        count: how many submaps there are.
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
    """Whether matrices (N, 4, 4) are rigid motions on Earth."""
    if not (np.abs(T) < MAX_REACH_M).all():  # nor NaN
        return False
    R = T[:, :3, :3]
    turned = np.abs(R @ R.transpose(0, 2, 1) - np.eye(3)).max()
    return bool(turned < 1e-2 and (np.linalg.det(R) > 0).all() and (T[:, 3] == [0, 0, 0, 1]).all())


def _principal_axes(rows: torch.Tensor, count: int) -> torch.Tensor:
    """(D, C) orthonormal rows that span where rows (N, C) differ most, by subspace iteration from a fixed start."""
    basis = torch.randn(rows.shape[1], count, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(rows.t() @ (rows @ basis)).Q
    return basis.t().contiguous()


def _some(points: torch.Tensor) -> torch.Tensor:
    """(P, 3) of a view's points (N, 3), from all over it."""
    return points[torch.linspace(0, len(points) - 1, POINTS_SHOWN).round().long()]


def _best_codes(features: torch.Tensor) -> torch.Tensor:
    """(P, 8) of a view's features (N, C), from the first on, and again from the first where there are not as many."""
    return _coded(features[torch.arange(CODED_POINTS) % len(features)])


def _coded(features: torch.Tensor) -> torch.Tensor:
    """(N, C / 8) uint8, the signs of features (N, C)."""
    return torch.from_numpy(np.packbits((features > 0).cpu().numpy(), axis=1))


def _signs(codes: torch.Tensor) -> torch.Tensor:
    """(N, C) of 1 and -1."""
    return torch.from_numpy(np.unpackbits(codes.numpy(), axis=1)).float() * 2 - 1
