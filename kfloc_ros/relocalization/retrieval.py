# SPDX-License-Identifier: Apache-2.0
"""Retrieval of reference views by one compact descriptor a view, from the features that the map already holds.

The descriptor is a VLAD (Jegou et al., CVPR 2010) of the backbone's coarse features, normalised cluster by cluster
(Arandjelovic and Zisserman, CVPR 2013), each feature weighted by its reliability. The vocabulary is learned from the
map itself. A second step ranks the views with the most similar descriptors: each feature of the image votes for the
views that hold the points most similar to it, so features found everywhere do not decide. Everything is computed from
the reference points, so a map stores no data for retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kfloc_ros.device import linear
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

SHORTLIST = 60
"""Views that an image's features vote for; a limit, so that the cost of a search does not grow with the map."""
VOTES = 3
MIN_VOTE = 0.6
"""Smallest cosine of two features that counts as a vote; the excess over it is the vote's weight."""
CLUSTERS = 64
CLUSTERING_STEPS = 12
MAX_CLUSTERED = 20_000
BLOCK_CELLS = 4
CELLS_PER_BLOCK = 2
"""Most reliable cells taken from every block; blocks spread the cells over the image, like reference points."""


@dataclass(frozen=True)
class Retrieved:
    """Reference view similar to an image."""

    position: int
    """Position in the map's list of views."""
    similarity: float
    """Cosine of the two descriptors."""
    votes: float = 0.0
    """Weight of the image's features that voted for the view; 0 without a vote."""


@dataclass(frozen=True, eq=False)
class QueryCells:
    """Features that represent an image."""

    features: torch.Tensor
    """(N, 64) unit vectors."""
    weight: torch.Tensor
    """(N,)"""


@dataclass(frozen=True, eq=False)
class _ImageCells:
    """Cells of an image, with what was computed of them."""

    features: BackboneFeatures
    cells: QueryCells
    similarity: dict[int, torch.Tensor]
    """(N,) greatest cosine of each cell with the points of a view, by the view's position."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Cluster centres of the VLAD descriptor."""

    centres: torch.Tensor
    """(K, C) unit vectors."""

    @classmethod
    def learn(cls, features: torch.Tensor) -> Vocabulary:
        """Learn from unit features (N, C) of many views; at most :data:`MAX_CLUSTERED` of them are used."""
        sample = features[:: max(1, -(-len(features) // MAX_CLUSTERED))]
        return cls(_cluster(sample, min(CLUSTERS, len(sample))))

    def describe(self, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the unit descriptor (K C,) of unit features (N, C) with weights (N,)."""
        features, weight = features.to(self.centres), weight.to(self.centres)
        nearest = (features @ self.centres.t()).argmax(dim=1)
        residual = (features - self.centres[nearest]) * weight[:, None]
        summed = torch.zeros_like(self.centres).index_add_(0, nearest, residual)
        return F.normalize(F.normalize(summed, dim=1).reshape(-1), dim=0)

    def describe_view(self, view: ReferencePoints) -> torch.Tensor:
        """Return the unit descriptor (K C,) of a reference view."""
        return self.describe(view.coarse, view.confidence)


class ReferenceIndex:
    """Descriptors of all reference views of a map; building it takes a fraction of a second."""

    def __init__(self, references: ReferenceViews) -> None:
        self._views = references.views
        self._vocabulary = Vocabulary.learn(torch.cat([view.coarse for view in references.views]).float())
        rows = [self._vocabulary.describe_view(view) for view in references.views]
        self._mean = torch.stack(rows).mean(dim=0)
        self._descriptors = F.normalize(torch.stack(rows) - self._mean, dim=1)
        self._image: _ImageCells | None = None
        """Of the last image, which is often compared several times."""

    def search(self, features: BackboneFeatures, count: int, among: Sequence[int] | None = None) -> list[Retrieved]:
        """Return the reference views that show most of an image, best first, at most ``count``, of all or some."""
        if self._image is None or self._image.features is not features:
            self._image = _ImageCells(features, reliable_cells(features), {})
        cells = self._image.cells
        listed = self._nearest(self._vocabulary.describe(cells.features, cells.weight), max(count, SHORTLIST), among)
        votes = self._votes(self._image, [item.position for item in listed])
        voted = [replace(item, votes=weight) for item, weight in zip(listed, votes, strict=True)]
        return sorted(voted, key=lambda item: -item.votes)[:count]

    def search_view(self, view: ReferencePoints, count: int) -> list[Retrieved]:
        """Return the views most similar to a reference view, such as one of another map, by descriptor alone."""
        return self._nearest(self._vocabulary.describe_view(view), count)

    def _votes(self, image: _ImageCells, positions: Sequence[int]) -> list[float]:
        """Return the weight of votes of each view; a cell votes for the views with the points most similar to it."""
        features, similarity = image.cells.features.float(), image.similarity
        for k in positions:
            if k not in similarity:
                similarity[k] = linear(features, self._views[k].coarse.to(features)).amax(dim=1)
        best = torch.stack([similarity[k] for k in positions], dim=1).topk(min(VOTES, len(positions)), dim=1)
        weight = (best.values - MIN_VOTE).clamp(min=0) * image.cells.weight[:, None]
        votes = torch.zeros(len(positions), device=weight.device)
        return [float(v) for v in votes.index_add_(0, best.indices.reshape(-1), weight.reshape(-1))]

    def _nearest(self, row: torch.Tensor, count: int, among: Sequence[int] | None = None) -> list[Retrieved]:
        positions = torch.arange(len(self._descriptors)) if among is None else torch.tensor(list(among))
        similarity = self._descriptors[positions] @ F.normalize(row - self._mean, dim=0)
        values, order = similarity.topk(min(count, len(similarity)))
        chosen = positions[order.cpu()].tolist()
        return [Retrieved(int(k), float(v)) for k, v in zip(chosen, values.tolist(), strict=True)]


def reliable_cells(features: BackboneFeatures) -> QueryCells:
    """Return the most reliable cells of the (first) image, spread over it."""
    reliability, coarse = features.reliability[0].float(), features.coarse[0].float()
    h, w = (side // BLOCK_CELLS * BLOCK_CELLS for side in reliability.shape)
    index = torch.arange(reliability.numel(), device=reliability.device).reshape(reliability.shape)

    def blocks(cells: torch.Tensor) -> torch.Tensor:
        shape = (h // BLOCK_CELLS, BLOCK_CELLS, w // BLOCK_CELLS, BLOCK_CELLS)
        return cells[:h, :w].reshape(shape).transpose(1, 2).reshape(-1, BLOCK_CELLS**2)

    best = blocks(reliability).topk(CELLS_PER_BLOCK, dim=1)
    chosen = blocks(index).gather(1, best.indices).reshape(-1)
    return QueryCells(coarse.reshape(len(coarse), -1)[:, chosen].t().contiguous(), best.values.reshape(-1))


def _cluster(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return unit centres (K, C) of unit rows (N, C) by spherical k-means; the start is fixed, so the result is
    repeatable.
    """
    start = torch.linspace(0, len(rows) - 1, count).long().to(rows.device)
    centres = rows[start]
    for _ in range(CLUSTERING_STEPS):
        nearest = (rows @ centres.t()).argmax(dim=1)
        summed = torch.zeros_like(centres).index_add_(0, nearest, rows)
        filled = summed.norm(dim=1, keepdim=True) > 0
        centres = torch.where(filled, F.normalize(summed, dim=1), centres)
    return centres
