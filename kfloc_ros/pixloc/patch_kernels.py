# SPDX-License-Identifier: Apache-2.0
"""Form of the patches, and the compiled loop of their alignment; :mod:`kfloc_ros.pixloc.patches` has the other one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

PATCH_RADIUS = 3
PATCH_SIDE = 2 * PATCH_RADIUS + 1
WARP_LIMITS = 0.1, 10.0
"""Smallest and largest area of a patch in the image, relative to its view; others are not compared."""
MIN_DEVIATION = 3.0
"""Standard deviation of a patch's grey values, of 255, below which it shows nothing."""


def window_of(sigma_px: float) -> Floats:
    """Return the weights (side^2,) of a patch's pixels, with sum 1."""
    offsets = np.arange(PATCH_SIDE) - PATCH_RADIUS
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma_px**2)).reshape(-1)
    return np.asarray(window / window.sum(), dtype=np.float32)


def normalised_patches(
    patches: NDArray[np.uint8], min_deviation: float = MIN_DEVIATION
) -> tuple[Floats, NDArray[np.bool_]]:
    """Return patches (N, side^2) with mean 0 and standard deviation 1, and which of them show something, (N,)."""
    values = patches.astype(np.float64)
    deviation = values.std(axis=1)
    values = (values - values.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1.0)[:, None]
    return values.astype(np.float32), deviation > min_deviation


@compiled_loop
def patch_equations(
    image: Floats, points: Doubles, right: Doubles, down: Doubles, patches: Floats, window: Floats,
    confidence: Doubles, T: Doubles, intrinsics: Doubles, loss_scale: float, near_m: float, dissimilarity: Doubles,
) -> tuple[Doubles, Doubles]:  # fmt: skip
    """Return H (6, 6) and g (6,) of patches, as ``patches.patch_equations`` does, which has the arguments."""
    rows, columns = image.shape
    fx, fy, cx, cy = intrinsics
    side = round(math.sqrt(patches.shape[1]))
    radius, count = side // 2, side * side
    seen = np.empty((side + 2, side + 2), np.float32)
    H, g = np.zeros((6, 6)), np.zeros(6)
    J_u, J_v = np.zeros(6), np.zeros(6)
    P, A, B = np.empty(3), np.empty(3), np.empty(3)
    for n in range(len(points)):
        dissimilarity[n] = -1.0
        for k in range(3):
            P[k] = T[k, 0] * points[n, 0] + T[k, 1] * points[n, 1] + T[k, 2] * points[n, 2] + T[k, 3]
            A[k] = T[k, 0] * right[n, 0] + T[k, 1] * right[n, 1] + T[k, 2] * right[n, 2]
            B[k] = T[k, 0] * down[n, 0] + T[k, 1] * down[n, 1] + T[k, 2] * down[n, 2]
        z = P[2]
        if not z > near_m:
            continue
        x, y = P[0] / z, P[1] / z
        u, v = fx * x + cx, fy * y + cy
        a, b = fx * (A[0] - x * A[2]) / z, fx * (B[0] - x * B[2]) / z
        c, d = fy * (A[1] - y * A[2]) / z, fy * (B[1] - y * B[2]) / z
        area = a * d - b * c
        if not (WARP_LIMITS[0] < area < WARP_LIMITS[1]):
            continue
        reach_u, reach_v = (radius + 1) * (abs(a) + abs(b)), (radius + 1) * (abs(c) + abs(d))
        if not (u > reach_u and v > reach_v and u < columns - 1.001 - reach_u and v < rows - 1.001 - reach_v):
            continue
        for i in range(side + 2):
            for j in range(side + 2):
                at_u = u + a * (j - radius - 1) + b * (i - radius - 1)
                at_v = v + c * (j - radius - 1) + d * (i - radius - 1)
                u0, v0 = int(at_u), int(at_v)
                s, t = np.float32(at_u - u0), np.float32(at_v - v0)
                above = image[v0, u0] + s * (image[v0, u0 + 1] - image[v0, u0])
                below = image[v0 + 1, u0] + s * (image[v0 + 1, u0 + 1] - image[v0 + 1, u0])
                seen[i, j] = above + t * (below - above)
        mean = mean_r = mean_s = squares = 0.0
        for i in range(1, side + 1):
            for j in range(1, side + 1):
                mean += seen[i, j]
                squares += seen[i, j] * seen[i, j]
                mean_r += 0.5 * (seen[i, j + 1] - seen[i, j - 1])
                mean_s += 0.5 * (seen[i + 1, j] - seen[i - 1, j])
        mean, mean_r, mean_s = mean / count, mean_r / count, mean_s / count
        scale = 1.0 / max(math.sqrt(max(squares / count - mean * mean, 0.0)), 1.0)
        squared = rr = ss = rs = r_e = s_e = 0.0
        for i in range(side):
            for j in range(side):
                w = window[i * side + j]
                e = scale * (seen[i + 1, j + 1] - mean) - patches[n, i * side + j]
                along = scale * (0.5 * (seen[i + 1, j + 2] - seen[i + 1, j]) - mean_r)
                across = scale * (0.5 * (seen[i + 2, j + 1] - seen[i, j + 1]) - mean_s)
                squared += w * e * e
                rr += w * along * along
                rs += w * along * across
                ss += w * across * across
                r_e += w * along * e
                s_e += w * across * e
        dissimilarity[n] = squared
        root = 1.0 + squared / (2.0 * loss_scale * loss_scale)
        weight = confidence[n] / (root * root)
        # gradients along the image's axes, from those along the patch's
        ru, su, rv, sv = d / area, -c / area, -b / area, a / area
        uu = weight * (ru * ru * rr + 2.0 * ru * su * rs + su * su * ss)
        uv = weight * (ru * rv * rr + (ru * sv + su * rv) * rs + su * sv * ss)
        vv = weight * (rv * rv * rr + 2.0 * rv * sv * rs + sv * sv * ss)
        u_e, v_e = weight * (ru * r_e + su * s_e), weight * (rv * r_e + sv * s_e)
        J_u[0], J_u[2], J_u[3], J_u[4], J_u[5] = fx / z, -fx * x / z, -fx * x * y, fx * (1.0 + x * x), -fx * y
        J_v[1], J_v[2], J_v[3], J_v[4], J_v[5] = fy / z, -fy * y / z, -fy * (1.0 + y * y), fy * x * y, fy * x
        for i in range(6):
            g[i] += J_u[i] * u_e + J_v[i] * v_e
            t_u, t_v = J_u[i] * uu + J_v[i] * uv, J_u[i] * uv + J_v[i] * vv
            for j in range(i + 1):
                H[i, j] += t_u * J_u[j] + t_v * J_v[j]
    for i in range(6):
        for j in range(i):
            H[j, i] = H[i, j]
    return H, g


def run_once() -> None:
    """Run the loop on one patch, so that it is compiled or read from the disk before the first image."""
    point, image = np.array([[0.0, 0.0, 1.0]]), np.zeros((32, 32), np.float32)
    patch, window = np.zeros((1, 9), np.float32), np.full(9, 1 / 9, np.float32)
    right, down = np.array([[0.1, 0.0, 0.0]]), np.array([[0.0, 0.1, 0.0]])
    intrinsics = np.array([10.0, 10.0, 16.0, 16.0])
    patch_equations(
        image, point, right, down, patch, window, np.ones(1), np.eye(4), intrinsics, 0.35, 0.05, np.empty(1)
    )
