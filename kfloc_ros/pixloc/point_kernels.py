# SPDX-License-Identifier: Apache-2.0
"""Compiled loops over points: rows of a feature level, views, corners, searches, and poses fitted to matches.

:mod:`kfloc_ros.pixloc.cost`, :mod:`kfloc_ros.pixloc.references`, :mod:`kfloc_ros.pixloc.session_points` and
:mod:`kfloc_ros.pixloc.point_matching` have the torch or NumPy path of each.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop
from kfloc_ros.geometry.kernels import moved, solve
from kfloc_ros.pixloc.kernels import derivatives, fit_matches, match_equations

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]


@compiled_loop
def sample(image: Floats, trust: Floats, uv: Floats, rows_out: Floats, inside: Booleans) -> None:
    """Write rows (N, 3 C + 1), features, their central differences and confidence, at cell positions uv (N, 2).

    A position outside takes the nearest one inside, and ``inside`` (N,) is false there.
    """
    rows, columns, channels = image.shape
    half = np.float32(0.5)
    for n in range(len(uv)):
        u, v = float(uv[n, 0]), float(uv[n, 1])
        inside[n] = u >= 0.0 and v >= 0.0 and u <= columns - 1.0 and v <= rows - 1.0
        if not inside[n]:
            u = min(max(u, 0.0), columns - 1.0) if u == u else 0.0
            v = min(max(v, 0.0), rows - 1.0) if v == v else 0.0
        u0, v0 = min(int(u), columns - 2), min(int(v), rows - 2)
        a, b = np.float32(u - u0), np.float32(v - v0)
        one = np.float32(1.0)
        w00, w10, w01, w11 = (one - a) * (one - b), a * (one - b), (one - a) * b, a * b
        left, right = max(u0 - 1, 0), min(u0 + 2, columns - 1)
        above, below = max(v0 - 1, 0), min(v0 + 2, rows - 1)
        f00, f10, f01, f11 = image[v0, u0], image[v0, u0 + 1], image[v0 + 1, u0], image[v0 + 1, u0 + 1]
        l0, r0, l1, r1 = image[v0, left], image[v0, right], image[v0 + 1, left], image[v0 + 1, right]
        a0, a1, b0, b1 = image[above, u0], image[above, u0 + 1], image[below, u0], image[below, u0 + 1]
        out = rows_out[n]
        for c in range(channels):
            q00, q10, q01, q11 = f00[c], f10[c], f01[c], f11[c]
            out[c] = w00 * q00 + w10 * q10 + w01 * q01 + w11 * q11
            out[channels + c] = half * (
                w00 * (q10 - l0[c]) + w10 * (r0[c] - q00) + w01 * (q11 - l1[c]) + w11 * (r1[c] - q01)
            )
            out[2 * channels + c] = half * (
                w00 * (q01 - a0[c]) + w10 * (q11 - a1[c]) + w01 * (b0[c] - q00) + w11 * (b1[c] - q10)
            )
        out[3 * channels] = (
            w00 * trust[v0, u0] + w10 * trust[v0, u0 + 1] + w01 * trust[v0 + 1, u0] + w11 * trust[v0 + 1, u0 + 1]
        )


@compiled_loop
def best_cell(
    image: Floats, wanted: Floats, u: float, v: float, window: Floats
) -> tuple[float, float, np.float32, bool]:
    """Return column and row of the place most similar to a feature (C,), its cosine, and true at the window's border.

    The window (side, side) is written; it lies around the cell nearest to (u, v), and takes cells outside the image as
    the nearest ones inside. Places between cells come from parabolas through the neighbours' cosines.
    """
    rows, columns, channels = image.shape
    side = len(window)
    u0, v0 = int(np.rint(u)) - side // 2, int(np.rint(v)) - side // 2
    best, best_row, best_column = np.float32(-2.0), 0, 0
    for i in range(side):
        row = min(max(v0 + i, 0), rows - 1)
        for j in range(side):
            cell = image[row, min(max(u0 + j, 0), columns - 1)]
            cosine = np.float32(0.0)
            for c in range(channels):
                cosine += cell[c] * wanted[c]
            window[i, j] = cosine
            if cosine > best:
                best, best_row, best_column = cosine, i, j
    i, j = min(max(best_row, 1), side - 2), min(max(best_column, 1), side - 2)
    bend_u = window[i, j - 1] - 2.0 * window[i, j] + window[i, j + 1]
    bend_v = window[i - 1, j] - 2.0 * window[i, j] + window[i + 1, j]
    du = 0.5 * (window[i, j - 1] - window[i, j + 1]) / bend_u if bend_u < -1e-6 else 0.0
    dv = 0.5 * (window[i - 1, j] - window[i + 1, j]) / bend_v if bend_v < -1e-6 else 0.0
    at_border = i != best_row or j != best_column
    return u0 + best_column + min(max(du, -0.5), 0.5), v0 + best_row + min(max(dv, -0.5), 0.5), best, at_border


@compiled_loop
def best_cells(
    image: Floats, features: Floats, at: Floats, radius: int, place: Floats, similarity: Floats, at_border: Booleans
) -> None:
    """Write, for every point, the place (N, 2) of the most similar cell around ``at`` (N, 2), and its cosine (N,).

    ``at_border`` (N,) is true where that cell lies at the border of the searched window; see :func:`best_cell`.
    """
    window = np.empty((2 * radius + 1, 2 * radius + 1), np.float32)
    for n in range(len(at)):
        u, v = at[n]
        place[n, 0], place[n, 1], similarity[n], at_border[n] = best_cell(image, features[n], u, v, window)


@compiled_loop
def search(
    coarse: Floats,
    fine: Floats,
    strides: Floats,
    points: Floats,
    coarse_features: Floats,
    fine_features: Floats,
    confidence: Floats,
    T: Floats,
    intrinsics: Floats,
    near_m: float,
    radii: tuple[int, int],
    min_similarity: float,
    pixels: Floats,
    weights: Floats,
) -> None:
    """Write the pixels (N, 2) where points find themselves, and weights (N,); zeros where they do not.

    Args:
        coarse, fine: (H, W, C) feature levels of the image.
        strides: of the two levels.
        points, coarse_features, fine_features, confidence: (N, 3), (N, C), (N, C) and (N,) of the points.
        T: (4, 4) ``T_camera_points``.
        intrinsics: fx, fy, cx, cy in pixels.
        near_m: smallest depth.
        radii: half sides of the searched windows in cells of the two levels.
        min_similarity: smallest cosine at the coarse level.
        pixels, weights: written.
    """
    rows, columns, _ = coarse.shape
    fx, fy, cx, cy = intrinsics
    half, near = np.float32(0.5), np.float32(near_m)
    window = np.empty((2 * radii[0] + 1, 2 * radii[0] + 1), np.float32)
    finer = np.empty((2 * radii[1] + 1, 2 * radii[1] + 1), np.float32)
    pixels[:], weights[:] = 0.0, 0.0
    for n in range(len(points)):
        X, Y, Z = points[n, 0], points[n, 1], points[n, 2]
        z = X * T[2, 0] + Y * T[2, 1] + Z * T[2, 2] + T[2, 3]
        if not z > near:
            continue
        u = (fx * (X * T[0, 0] + Y * T[0, 1] + Z * T[0, 2] + T[0, 3]) / z + cx + half) / strides[0] - half
        v = (fy * (X * T[1, 0] + Y * T[1, 1] + Z * T[1, 2] + T[1, 3]) / z + cy + half) / strides[0] - half
        if not (u > 0 and v > 0 and u < columns - 1 and v < rows - 1):
            continue
        column, row, similarity, at_border = best_cell(coarse, coarse_features[n], u, v, window)
        if at_border or not similarity > np.float32(min_similarity):
            continue
        weights[n] = confidence[n] * max(similarity, np.float32(0.0))
        u = ((np.float32(column) + half) * strides[0] - half + half) / strides[1] - half
        v = ((np.float32(row) + half) * strides[0] - half + half) / strides[1] - half
        column, row, _, _ = best_cell(fine, fine_features[n], u, v, finer)
        pixels[n, 0] = (np.float32(column) + half) * strides[1] - half
        pixels[n, 1] = (np.float32(row) + half) * strides[1] - half


@compiled_loop
def count_in_view(points: Floats, T: Floats, intrinsics: Floats, width: int, height: int, near_m: float) -> int:
    """Return the number of points (N, 3) in the image of a camera with the pose T (4, 4), ``T_map_camera``.

    ``intrinsics`` are fx, fy, cx, cy in pixels; the border of a pixel does not count.
    """
    fx, fy, cx, cy = intrinsics
    least, right, below, count = np.float32(near_m), np.float32(width - 1), np.float32(height - 1), 0
    for n in range(len(points)):
        X, Y, Z = points[n, 0] - T[0, 3], points[n, 1] - T[1, 3], points[n, 2] - T[2, 3]
        z = X * T[0, 2] + Y * T[1, 2] + Z * T[2, 2]
        u = fx * (X * T[0, 0] + Y * T[1, 0] + Z * T[2, 0]) / z + cx
        v = fy * (X * T[0, 1] + Y * T[1, 1] + Z * T[2, 1]) / z + cy
        if z > least and u > 0 and v > 0 and u < right and v < below:
            count += 1
    return count


@compiled_loop
def corner_scores(fine: Floats, trust: Floats, at: Floats, at_trust: Floats, scores: Floats) -> None:
    """Write the score (N,) of points that lie within the image: reliability times corner strength.

    The strength is the root of the smaller eigenvalue of the structure tensor of the fine features.

    Args:
        fine: (H, W, C) fine features.
        trust: (h, w) reliability of the coarse level.
        at, at_trust: (N, 2) positions in cells of either.
        scores: written.
    """
    rows, columns, channels = fine.shape
    high, wide = trust.shape
    one, half = np.float32(1.0), np.float32(0.5)
    for n in range(len(at)):
        u0, v0 = min(int(at[n, 0]), columns - 2), min(int(at[n, 1]), rows - 2)
        a, b = at[n, 0] - np.float32(u0), at[n, 1] - np.float32(v0)
        w00, w10, w01, w11 = (one - a) * (one - b), a * (one - b), (one - a) * b, a * b
        left, right = max(u0 - 1, 0), min(u0 + 2, columns - 1)
        above, below = max(v0 - 1, 0), min(v0 + 2, rows - 1)
        f00, f10, f01, f11 = fine[v0, u0], fine[v0, u0 + 1], fine[v0 + 1, u0], fine[v0 + 1, u0 + 1]
        l0, r0, l1, r1 = fine[v0, left], fine[v0, right], fine[v0 + 1, left], fine[v0 + 1, right]
        a0, a1, b0, b1 = fine[above, u0], fine[above, u0 + 1], fine[below, u0], fine[below, u0 + 1]
        uu, uv, vv = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for c in range(channels):
            q00, q10, q01, q11 = f00[c], f10[c], f01[c], f11[c]
            du = half * (w00 * (q10 - l0[c]) + w10 * (r0[c] - q00) + w01 * (q11 - l1[c]) + w11 * (r1[c] - q01))
            dv = half * (w00 * (q01 - a0[c]) + w10 * (q11 - a1[c]) + w01 * (b0[c] - q00) + w11 * (b1[c] - q10))
            uu += du * du
            uv += du * dv
            vv += dv * dv
        smaller = half * (uu + vv) - np.sqrt((half * (uu - vv)) ** 2 + uv * uv)
        u0, v0 = min(int(at_trust[n, 0]), wide - 2), min(int(at_trust[n, 1]), high - 2)
        a, b = at_trust[n, 0] - np.float32(u0), at_trust[n, 1] - np.float32(v0)
        seen = (one - b) * ((one - a) * trust[v0, u0] + a * trust[v0, u0 + 1])
        seen += b * ((one - a) * trust[v0 + 1, u0] + a * trust[v0 + 1, u0 + 1])
        scores[n] = seen * np.sqrt(max(smaller, np.float32(0.0)))


@compiled_loop
def in_turns(group: Integers, count: int) -> Integers:
    """Return ``count`` positions in numbers of groups (N,): the first of every group, then every second one, ..."""
    turn, sizes = np.empty(len(group), dtype=np.int64), np.zeros(group.max() + 1, dtype=np.int64)
    for n in range(len(group)):
        turn[n] = sizes[group[n]]
        sizes[group[n]] += 1
    ends = np.zeros(sizes.max() + 1, dtype=np.int64)
    for n in range(len(group)):
        ends[turn[n] + 1] += 1
    for k in range(1, len(ends)):
        ends[k] += ends[k - 1]
    positions = np.empty(len(group), dtype=np.int64)
    for n in range(len(group)):
        positions[ends[turn[n]]] = n
        ends[turn[n]] += 1
    return positions[:count]


@compiled_loop
def nearest(pixels: Doubles, others: Doubles) -> tuple[Integers, Doubles]:
    """Return, for each pixel (N, 2), the index of the nearest of others (M, 2), at least one, and its distance."""
    index, distance = np.zeros(len(pixels), dtype=np.int64), np.empty(len(pixels))
    for n in range(len(pixels)):
        best = math.inf
        for k in range(len(others)):
            x, y = others[k, 0] - pixels[n, 0], others[k, 1] - pixels[n, 1]
            squared = x * x + y * y
            if squared < best:
                best, index[n] = squared, k
        distance[n] = math.sqrt(best)
    return index, distance


@compiled_loop
def fit_matches_and_camera(
    pixels: Doubles,
    points: Doubles,
    weights: Doubles,
    T: Doubles,
    offsets: Doubles,
    camera: Doubles,
    precision: Doubles,
    scales_px: Doubles,
    steps: int,
    near_m: float,
    largest_step: float,
    small_gain: float,
) -> bool:
    """Fit a pose and a camera to matches by Gauss-Newton; return false if they do not fix them.

    Args:
        pixels, points, weights, near_m: of :func:`match_equations`.
        T, offsets: (4, 4) and (6,) the start; the fitted ones are written.
        camera: fx, fy, cx, cy in pixels.
        precision: (6,) inverse variances of the prior on the offsets.
        scales_px: scales of the loss, one after another.
        steps: largest number of steps for a scale.
        largest_step: in metres and radians, of a fit that stays near its start.
        small_gain: expected decrease, relative to the squared scale, that ends a scale.
    """
    J_u, J_v, model, step = np.zeros(12), np.zeros(12), np.zeros(7), np.zeros(12)
    for scale_px in scales_px:
        for _ in range(steps):
            fx, fy = camera[0] * math.exp(offsets[0]), camera[1] * math.exp(offsets[0] + offsets[1])
            cx, cy, k1, skew = camera[2] + offsets[2], camera[3] + offsets[3], offsets[4], offsets[5]
            model[0], model[1], model[2], model[3], model[4], model[5], model[6] = fx, fy, cx, cy, k1, skew, 1.0
            H, g = np.zeros((12, 12)), np.zeros(12)
            for n in range(len(points)):
                X, Y, Z = points[n]
                z = T[2, 0] * X + T[2, 1] * Y + T[2, 2] * Z + T[2, 3]
                if not z > near_m:
                    continue
                x = (T[0, 0] * X + T[0, 1] * Y + T[0, 2] * Z + T[0, 3]) / z
                y = (T[1, 0] * X + T[1, 1] * Y + T[1, 2] * Z + T[1, 3]) / z
                r2 = x * x + y * y
                if not 1.0 + 3.0 * k1 * r2 > 0.0:
                    continue
                bend = 1.0 + k1 * r2
                e_u, e_v = fx * (x + skew * y) * bend + cx - pixels[n, 0], fy * y * bend + cy - pixels[n, 1]
                root = 1.0 + (e_u * e_u + e_v * e_v) / (scale_px * scale_px)
                w = weights[n] / (root * root)
                derivatives(x, y, z, model, 12, J_u, J_v)
                for i in range(12):
                    g[i] += w * (J_u[i] * e_u + J_v[i] * e_v)
                    for j in range(i + 1):
                        H[i, j] += w * (J_u[i] * J_u[j] + J_v[i] * J_v[j])
            for i in range(6):
                H[6 + i, 6 + i] += scale_px * scale_px * precision[i]
                g[6 + i] += scale_px * scale_px * precision[i] * offsets[i]
            for i in range(12):
                H[i, i] += 1e-9 * H[i, i] + 1e-9
            if not solve(H, g, step) or np.abs(step[:6]).max() > largest_step:
                return False
            T[:] = moved(T, step)
            offsets += step[6:]
            if -(g * step).sum() < small_gain * scale_px * scale_px:
                break
    return True


def run_once() -> None:
    """Run every loop on a point or two, so that it is compiled, or read from the disk, before an image waits for it."""
    image, trust, at, row = (np.zeros(size, dtype=np.float32) for size in ((2, 2, 1), (2, 2), (2, 2), (2, 1)))
    flags, values, eye = np.zeros(2, dtype=np.bool_), np.zeros(2, dtype=np.float32), np.eye(4)
    sample(image, trust, at, np.zeros((2, 4), dtype=np.float32), flags)
    best_cells(image, row, at, 1, np.zeros((2, 2), dtype=np.float32), values, flags)
    count_in_view(np.zeros((2, 3), dtype=np.float32), eye.astype(np.float32), np.ones(4, dtype=np.float32), 2, 2, 0.1)
    corner_scores(image, trust, at, at, values)
    cloud, four = np.ones((2, 3), dtype=np.float32), np.ones(4, dtype=np.float32)
    of_level = cloud, row, row, values, eye.astype(np.float32), four
    search(image, image, four[:2], *of_level, 0.1, (1, 1), 0.0, np.zeros((2, 2), dtype=np.float32), values)
    pixels, points, ones = np.zeros((2, 2)), np.ones((2, 3)), np.ones(4)
    nearest(pixels, pixels)
    in_turns(np.zeros(2, dtype=np.int64), 1)
    fit_matches(pixels, points, ones[:2], eye, ones, ones[:1], 1, 1.0, 0.1, np.zeros(2))
    match_equations(pixels, points, ones[:2], eye, ones, 1.0, 0.1, np.zeros(2))
    fit_matches_and_camera(pixels, points, ones[:2], eye, np.zeros(6), ones, np.ones(6), ones[:1], 1, 0.1, 1.0, 1.0)
