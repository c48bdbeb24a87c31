# SPDX-License-Identifier: Apache-2.0
"""Compiled loops of the check by the whole image; :mod:`kfloc_ros.pixloc.image_check` has the torch or NumPy paths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@compiled_loop
def around(image: Floats, wanted: Floats, column: Integers, row: Integers, out: Floats) -> None:
    """Write the similarities (N, 3, 3) of features (N, C) to the cells (H, W, C) at and around their own."""
    rows, columns, channels = image.shape
    for n in range(len(wanted)):
        feature = wanted[n]
        for i in range(3):
            for j in range(3):
                cell = image[min(max(row[n] + i - 1, 0), rows - 1), min(max(column[n] + j - 1, 0), columns - 1)]
                cosine = np.float32(0.0)
                for c in range(channels):
                    cosine += cell[c] * feature[c]
                out[n, i, j] = cosine


@compiled_loop
def add_surroundings(
    image: Floats, wanted: Floats, column: Integers, row: Integers, group: Integers, weight: Floats, reach: int,
    sums: Floats,
) -> None:  # fmt: skip
    """Add the similarities of features (N, C) to the cells (H, W, C) around their own to sums (G, side, side).

    The weight (N,) of a feature is that in the sum of its group; cells outside the image add nothing.
    """
    rows, columns, channels = image.shape
    for n in range(len(wanted)):
        feature, own, w = wanted[n], sums[group[n]], weight[n]
        for i in range(max(reach - row[n], 0), min(2 * reach + 1, rows - row[n] + reach)):
            for j in range(max(reach - column[n], 0), min(2 * reach + 1, columns - column[n] + reach)):
                cell = image[row[n] + i - reach, column[n] + j - reach]
                cosine = np.float32(0.0)
                for c in range(channels):
                    cosine += cell[c] * feature[c]
                own[i, j] += w * cosine


@compiled_loop
def group_medians(values: Doubles, group: Integers, counts: Integers, medians: Doubles) -> None:
    """Write the numbers (G,) and the medians (G, 2) of values (N, 2) in each group; 0 for empty groups."""
    counts[:] = 0
    for g in group:
        counts[g] += 1
    for g in range(len(counts)):
        medians[g] = 0.0
        if counts[g] == 0:
            continue
        for axis in range(2):
            own, at = np.empty(counts[g]), 0
            for n in range(len(group)):
                if group[n] == g:
                    own[at] = values[n, axis]
                    at += 1
            own.sort()
            medians[g, axis] = 0.5 * (own[(at - 1) // 2] + own[at // 2])


@compiled_loop
def displacement_votes(
    around: Floats, here: Floats, known: Booleans, gap: float, nearly: float, similar: float, votes: Booleans
) -> None:
    """Write (G, side, side) bool: a displacement explains a group better than none, which is the middle one.

    A vote is for similarities (G, side, side), or ones next to them, above three limits: that of no displacement (G,)
    plus ``gap``, the group's best less ``nearly``, and ``similar``. Groups that are not ``known`` (G,) have no votes,
    and neither have displacements by a cell.
    """
    side = around.shape[1]
    votes[:] = False
    for g in range(len(around)):
        if not known[g]:
            continue
        best = around[g].max()
        least = max(here[g] + np.float32(gap), best - np.float32(nearly), np.float32(similar))
        for i in range(side):
            for j in range(side):
                if around[g, i, j] > least:
                    votes[g, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] = True
        middle = side // 2
        votes[g, middle - 1 : middle + 2, middle - 1 : middle + 2] = False


def run_once() -> None:
    """Run every loop on a point, so that it is compiled, or read from the disk, before an image waits for it."""
    image, row, weight = (np.zeros(size, dtype=np.float32) for size in ((2, 2, 1), (1, 1), 1))
    first, out = np.zeros(1, dtype=np.int64), np.zeros((1, 3, 3), dtype=np.float32)
    around(image, row, first, first, out)
    add_surroundings(image, row, first, first, first, weight, 1, out)
    group_medians(np.zeros((1, 2)), first, np.zeros(1, dtype=np.int64), np.zeros((1, 2)))
    known = np.ones(1, dtype=np.bool_)
    displacement_votes(out, row[0], known, 0.0, 0.0, 0.0, np.empty(out.shape, dtype=np.bool_))
