# SPDX-License-Identifier: Apache-2.0
"""Which images of a long recording may show the same place though they lie far apart in it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.features.trunk import Trunk
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.mapping.retrieval import QueryCells, Vocabulary, reliable_cells
from kfloc_ros.mapping.views import map_camera

BLOCK_ROWS = 512


def similar_pairs(
    images: Iterable[NDArray[np.uint8]], camera: Camera, trunk: Trunk, *, partners: int, min_apart: int
) -> list[tuple[int, int]]:
    """Pairs of images that look most alike among those at least ``min_apart`` from each other in the sequence.

    Args:
        images: RGB (H, W, 3), in order, of a pinhole camera; read once.
        camera: of the images.
        trunk: whose features describe them.
        partners: of each image, at most.
        min_apart: nearer images are somebody else's task.

    Returns:
        Sorted pairs (i, j), i < j, each once.
    """
    adapter = ImageAdapter(camera, map_camera(camera))
    cells = [_described(reliable_cells(trunk.extract(adapter(image)))) for image in images]
    if len(cells) <= min_apart:
        return []
    vocabulary = Vocabulary.learn(torch.cat([c.features for c in cells]).float())
    rows = torch.stack([vocabulary.describe(c.features.float(), c.weight.float()) for c in cells])
    rows = F.normalize(rows - rows.mean(dim=0), dim=1)
    place = torch.arange(len(rows), device=rows.device)
    found: set[tuple[int, int]] = set()
    for start in range(0, len(rows), BLOCK_ROWS):
        block = place[start : start + BLOCK_ROWS]
        similarity = rows[block] @ rows.t()
        similarity[(place[None] - block[:, None]).abs() < min_apart] = -torch.inf
        best = similarity.topk(min(partners, len(rows)), dim=1)
        for i, values, others in zip(block.tolist(), best.values.tolist(), best.indices.tolist(), strict=True):
            found.update((min(i, j), max(i, j)) for v, j in zip(values, others, strict=True) if v > 0)
    return sorted(found)


def _described(cells: QueryCells) -> QueryCells:
    """Half precision: a recording of thousands of images is held at once."""
    return QueryCells(cells.features.half(), cells.weight.half())
