# SPDX-License-Identifier: Apache-2.0
"""Compiled loops of the filter: cost volume, inputs of the flow network, propagation along the flow, and PnP.

:mod:`kfloc_ros.kfnet.flow`, :mod:`kfloc_ros.kfnet.flow_network`, :mod:`kfloc_ros.kfnet.fusion` and
:mod:`kfloc_ros.kfnet.pnp` have the equations, and the torch or NumPy path of each.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop
from kfloc_ros.geometry.kernels import moved, solve

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]


@compiled_loop
def pooled(cells: Floats) -> Floats:
    """Return unit features (rows, columns, C) of 2x2 blocks of cells (h, w, C); the last block may be smaller."""
    h, w, channels = cells.shape
    out = np.zeros(((h + 1) // 2, (w + 1) // 2, channels), dtype=np.float32)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            target = out[i, j]
            for y in range(2 * i, min(2 * i + 2, h)):
                for x in range(2 * j, min(2 * j + 2, w)):
                    source = cells[y, x]
                    for c in range(channels):
                        target[c] += source[c]
            squared = np.float32(0.0)
            for c in range(channels):
                squared += target[c] * target[c]
            scale = np.float32(1.0) / max(np.sqrt(squared), np.float32(1e-12))
            for c in range(channels):
                target[c] *= scale
    return out


@compiled_loop
def search(current: Floats, previous: Floats, radius: int) -> tuple[Integers, Integers]:
    """Return the displacements x and y (rows, columns) at which 3x3 neighbourhoods of unit features match best.

    Args:
        current, previous: (rows, columns, C) unit features; outside the image they are zero.
        radius: largest displacement, cells.
    """
    rows, columns, channels = current.shape
    side = 2 * radius + 1
    scores = np.zeros((rows, columns, side * side), dtype=np.float32)
    for i in range(rows):
        for j in range(columns):
            query, out = current[i, j], scores[i, j]
            for dy in range(max(-radius, -i), min(radius, rows - 1 - i) + 1):
                for dx in range(max(-radius, -j), min(radius, columns - 1 - j) + 1):
                    match = previous[i + dy, j + dx]
                    score = np.float32(0.0)
                    for c in range(channels):
                        score += query[c] * match[c]
                    out[(dy + radius) * side + dx + radius] = score
    best_x, best_y = np.empty((rows, columns), dtype=np.int64), np.empty((rows, columns), dtype=np.int64)
    total = np.empty(side * side, dtype=np.float32)
    for i in range(rows):
        for j in range(columns):
            total[:] = np.float32(0.0)
            for y in range(max(i - 1, 0), min(i + 2, rows)):
                for x in range(max(j - 1, 0), min(j + 2, columns)):
                    out = scores[y, x]
                    for k in range(side * side):
                        total[k] += out[k]
            best = np.argmax(total)
            best_x[i, j], best_y[i, j] = best % side - radius, best // side - radius
    return best_x, best_y


@compiled_loop
def window_scores(
    current: Floats, previous: Floats, base: Integers, radius: int, scores: Floats, inside: Flags
) -> None:
    """Write cosines (h w, n) of each cell with the n cells of its window, and whether those lie in the image.

    Args:
        current, previous: (h, w, C) unit features; a cell of the window outside the image is the nearest one inside.
        base: (2, h, w) displacement of the window's centre, x then y.
        radius: of the window.
        scores, inside: (h w, n) written, rows of the window first.
    """
    h, w, channels = current.shape
    for i in range(h):
        for j in range(w):
            n, k = i * w + j, 0
            query = current[i, j]
            for dy in range(-radius, radius + 1):
                y = i + base[1, i, j] + dy
                for dx in range(-radius, radius + 1):
                    x = j + base[0, i, j] + dx
                    inside[n, k] = x >= 0 and x < w and y >= 0 and y < h
                    match = previous[min(max(y, 0), h - 1), min(max(x, 0), w - 1)]
                    score = np.float32(0.0)
                    for c in range(channels):
                        score += query[c] * match[c]
                    scores[n, k] = score
                    k += 1


@compiled_loop
def cell_inputs(scores: Floats, inside: Flags, inputs: Floats, relative: Floats) -> None:
    """Write the inputs (n, 2 k + 2) of the flow network's first half, and scores less their best (n, k).

    Args:
        scores: (n, k) cosines.
        inside: (n, k); a score outside counts as -1.
        inputs: (n, 2 k + 2) written: scores below the best, times 4, at least -4; inside; best; mean.
        relative: (n, k) written.
    """
    count, size = scores.shape
    for n in range(count):
        best, total = np.float32(-1.0), np.float32(0.0)
        for k in range(size):
            score = scores[n, k] if inside[n, k] else np.float32(-1.0)
            best = max(best, score)
            total += score
        for k in range(size):
            score = (scores[n, k] if inside[n, k] else np.float32(-1.0)) - best
            relative[n, k] = score
            inputs[n, k] = max(np.float32(4.0) * score, np.float32(-4.0))
            inputs[n, size + k] = np.float32(1.0) if inside[n, k] else np.float32(0.0)
        inputs[n, 2 * size] = best
        inputs[n, 2 * size + 1] = total / np.float32(size)


@compiled_loop
def neighbour_inputs(flow: Floats, state: Floats, side: int, limit: float, inputs: Floats) -> None:
    """Write the inputs (h w, side^2 (2 + s)) of the flow network's second half; the border repeats.

    Args:
        flow: (h, w, 2) cells.
        state: (h, w, s)
        side: of the square of neighbours.
        limit: largest difference of flows.
        inputs: written: for each neighbour its flow relative to the cell's own, and its state.
    """
    h, w, states = state.shape
    reach, width = side // 2, 2 + states
    run = side * width
    # a row of neighbours is one run of memory
    cells = np.empty((h + 2 * reach, w + 2 * reach, width), dtype=np.float32)
    for i in range(h + 2 * reach):
        for j in range(w + 2 * reach):
            y, x = min(max(i - reach, 0), h - 1), min(max(j - reach, 0), w - 1)
            cells[i, j, :2], cells[i, j, 2:] = flow[y, x], state[y, x]
    rows = cells.reshape(h + 2 * reach, (w + 2 * reach) * width)
    own, most = np.zeros(run, dtype=np.float32), np.full(run, np.float32(np.inf))
    for k in range(0, run, width):
        most[k] = most[k + 1] = np.float32(limit)
    for i in range(h):
        for j in range(w):
            out = inputs[i * w + j]
            for k in range(0, run, width):
                own[k], own[k + 1] = flow[i, j, 0], flow[i, j, 1]
            for dy in range(side):
                row, at = rows[i + dy], dy * run
                for k in range(run):
                    out[at + k] = min(max(row[j * width + k] - own[k], -most[k]), most[k])


@compiled_loop
def neighbour_mean(flow: Floats, weights: Floats, correction: Floats, side: int, offset: Floats) -> None:
    """Write the flow (2, h, w): the weighted mean of the neighbours' flows, plus half a correction.

    Args:
        flow: (h, w, 2) cells.
        weights: (h w, side^2), which sum to one.
        correction: (h w, 2) cells.
        side: of the square of neighbours.
        offset: written.
    """
    h, w, _ = flow.shape
    reach = side // 2
    for i in range(h):
        for j in range(w):
            n, k = i * w + j, 0
            own_x, own_y = flow[i, j, 0], flow[i, j, 1]
            x_sum, y_sum = np.float32(0.0), np.float32(0.0)
            for dy in range(-reach, reach + 1):
                y = min(max(i + dy, 0), h - 1)
                for dx in range(-reach, reach + 1):
                    x = min(max(j + dx, 0), w - 1)
                    x_sum += weights[n, k] * (flow[y, x, 0] - own_x)
                    y_sum += weights[n, k] * (flow[y, x, 1] - own_y)
                    k += 1
            offset[0, i, j] = own_x + x_sum + np.float32(0.5) * correction[n, 0]
            offset[1, i, j] = own_y + y_sum + np.float32(0.5) * correction[n, 1]


@compiled_loop
def warp(
    mean: Floats,
    uncertainty: Floats,
    valid: Flags,
    offset: Floats,
    warped: Floats,
    carried: Floats,
    spread: Floats,
    whole: Flags,
) -> None:
    """Write a belief interpolated along a backward flow.

    Args:
        mean, uncertainty, valid: (3, h, w), (h, w) and (h, w) of the belief.
        offset: (2, h, w) cells, x then y.
        warped: (3, h, w) written: interpolated mean.
        carried: (h, w) written: interpolated uncertainty.
        spread: (h, w) written: variance of the four interpolated means, per axis.
        whole: (h, w) written: every interpolated cell is valid.
    """
    _, h, w = mean.shape
    one = np.float32(1.0)
    for i in range(h):
        for j in range(w):
            u, v = np.float32(j) + offset[0, i, j], np.float32(i) + offset[1, i, j]
            u = min(max(u, np.float32(0.0)), np.float32(w - 1)) if u == u else np.float32(0.0)
            v = min(max(v, np.float32(0.0)), np.float32(h - 1)) if v == v else np.float32(0.0)
            u0, v0 = min(int(u), w - 2), min(int(v), h - 2)
            a, b = u - np.float32(u0), v - np.float32(v0)
            w00, w10, w01, w11 = (one - a) * (one - b), a * (one - b), (one - a) * b, a * b
            deviation = np.float32(0.0)
            for axis in range(3):
                p00, p10 = mean[axis, v0, u0], mean[axis, v0, u0 + 1]
                p01, p11 = mean[axis, v0 + 1, u0], mean[axis, v0 + 1, u0 + 1]
                middle = p00 + (w10 * (p10 - p00) + w01 * (p01 - p00) + w11 * (p11 - p00))
                warped[axis, i, j] = middle
                deviation += (
                    w00 * (p00 - middle) ** 2
                    + w10 * (p10 - middle) ** 2
                    + w01 * (p01 - middle) ** 2
                    + w11 * (p11 - middle) ** 2
                )
            spread[i, j] = deviation / np.float32(3.0)
            carried[i, j] = (
                w00 * uncertainty[v0, u0]
                + w10 * uncertainty[v0, u0 + 1]
                + w01 * uncertainty[v0 + 1, u0]
                + w11 * uncertainty[v0 + 1, u0 + 1]
            )
            share = np.float32(0.0)
            if valid[v0, u0]:
                share += w00
            if valid[v0, u0 + 1]:
                share += w10
            if valid[v0 + 1, u0]:
                share += w01
            if valid[v0 + 1, u0 + 1]:
                share += w11
            whole[i, j] = share > np.float32(0.999)


@compiled_loop
def onto_rays(mean: Floats, valid: Flags, T: Doubles, model: Doubles, near_m: float, onto: Floats, kept: Flags) -> None:
    """Write points (3, h, w) moved, at their depth, onto the rays of their cells, and which are valid, (h, w).

    ``T`` is ``T_map_camera`` (4, 4); ``model`` has fx, fy, cx, cy, and the cells' stride and first pixel.
    """
    _, h, w = mean.shape
    fx, fy, cx, cy, stride, first = model
    for i in range(h):
        for j in range(w):
            z = 0.0
            for k in range(3):
                z += T[k, 2] * (mean[k, i, j] - T[k, 3])
            x, y = (stride * j + first - cx) / fx * z, (stride * i + first - cy) / fy * z
            for k in range(3):
                onto[k, i, j] = T[k, 0] * x + T[k, 1] * y + T[k, 2] * z + T[k, 3]
            kept[i, j] = valid[i, j] and z > near_m


@compiled_loop
def ray_equations(
    points: Doubles, tangents: Doubles, sigma_m: Doubles, T: Doubles, sigma_per_m: float
) -> tuple[Doubles, Doubles]:
    """Return H (6, 6) and g (6,) of points (N, 3) and ray tangents (N, 2, 3); see :mod:`kfloc_ros.kfnet.pnp`."""
    H, g, J = np.zeros((6, 6)), np.zeros(6), np.empty(6)
    for n in range(len(points)):
        X, Y, Z = points[n, 0], points[n, 1], points[n, 2]
        z = T[2, 0] * X + T[2, 1] * Y + T[2, 2] * Z + T[2, 3]
        if not z > 0.05:
            continue
        x = T[0, 0] * X + T[0, 1] * Y + T[0, 2] * Z + T[0, 3]
        y = T[1, 0] * X + T[1, 1] * Y + T[1, 2] * Z + T[1, 3]
        variance = sigma_m[n] ** 2 + (sigma_per_m * z) ** 2
        a, b = tangents[n, 0], tangents[n, 1]
        e, f = a[0] * x + a[1] * y + a[2] * z, b[0] * x + b[1] * y + b[2] * z
        weight = 1.0 / ((1.0 + (e * e + f * f) / (4.0 * variance)) * variance)
        for side in range(2):
            t, error = tangents[n, side], e if side == 0 else f
            J[0], J[1], J[2] = t[0], t[1], t[2]
            J[3], J[4], J[5] = y * t[2] - z * t[1], z * t[0] - x * t[2], x * t[1] - y * t[0]
            for i in range(6):
                w = weight * J[i]
                g[i] += w * error
                for j in range(i + 1):
                    H[i, j] += w * J[j]
    for i in range(6):
        for j in range(i):
            H[j, i] = H[i, j]
    return H, g


@compiled_loop
def fit_rays(
    pixels: Doubles, points: Doubles, sigma_m: Doubles, intrinsics: Doubles, T: Doubles, sigma_px: float, steps: int
) -> Doubles:
    """Fit a pose to points (N, 3) and the viewing rays of pixels (N, 2); return H (6, 6) before the last step.

    Args:
        pixels, points, sigma_m: cells, see :class:`kfloc_ros.kfnet.pnp.Correspondences`.
        intrinsics: fx, fy, cx, cy.
        T: (4, 4) the start; the fitted pose is written.
        sigma_px: standard deviation of a cell's position.
        steps: largest number of steps.
    """
    fx, fy, cx, cy = intrinsics
    tangents = np.empty((len(points), 2, 3))
    for n in range(len(points)):
        x, y = (pixels[n, 0] - cx) / fx, (pixels[n, 1] - cy) / fy
        first = 1.0 / math.sqrt(1.0 + x * x)
        second = first / math.sqrt(1.0 + x * x + y * y)
        tangents[n, 0, 0], tangents[n, 0, 1], tangents[n, 0, 2] = first, 0.0, -x * first
        tangents[n, 1, 0], tangents[n, 1, 1], tangents[n, 1, 2] = -x * y * second, (1.0 + x * x) * second, -y * second
    H, step = np.zeros((6, 6)), np.zeros(6)
    for _ in range(steps):
        H, g = ray_equations(points, tangents, sigma_m, T, sigma_px / fx)
        damped = H.copy()
        for i in range(6):
            damped[i, i] += 1e-9 * H[i, i]
        if not solve(damped, g, step):
            break
        T[:] = moved(T, step)
        if np.abs(step).max() < 1e-5:
            break
    return H
