# SPDX-License-Identifier: Apache-2.0
"""Form of the patches, and the compiled loops of their alignment; :mod:`kfloc_ros.pixloc.patches` has the others."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop
from kfloc_ros.geometry.kernels import moved, solve

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
    pixels, one, below_px = image.ravel(), np.uintp(1), np.uintp(columns)
    fx, fy, cx, cy = intrinsics
    side = round(math.sqrt(patches.shape[1]))
    radius, count = side // 2, side * side
    seen = np.empty((side + 2, side + 2), np.float32)
    flat, where = seen.ravel(), np.empty((side + 2) ** 2, np.int64)
    rest_u, rest_v = np.empty(len(flat), np.float32), np.empty(len(flat), np.float32)
    across_px, along_px = np.empty(len(flat), np.float32), np.empty(len(flat), np.float32)
    for k in range(len(flat)):
        across_px[k], along_px[k] = k % (side + 2) - radius - 1, k // (side + 2) - radius - 1
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
        u0, v0 = int(u), int(v)
        base, part_u, part_v = v0 * columns + u0, np.float32(u - u0), np.float32(v - v0)
        a32, b32, c32, d32 = np.float32(a), np.float32(b), np.float32(c), np.float32(d)
        for k in range(len(across_px)):
            at_u = part_u + a32 * across_px[k] + b32 * along_px[k]
            at_v = part_v + c32 * across_px[k] + d32 * along_px[k]
            low_u, low_v = np.floor(at_u), np.floor(at_v)
            rest_u[k], rest_v[k] = at_u - low_u, at_v - low_v
            where[k] = base + np.int32(low_v) * columns + np.int32(low_u)
        for k in range(len(across_px)):
            s, t = rest_u[k], rest_v[k]
            at = np.uintp(where[k])  # unsigned: a negative index would count from the end, which costs a test
            p00, p10, p01, p11 = pixels[at], pixels[at + one], pixels[at + below_px], pixels[at + below_px + one]
            above, below = p00 + s * (p10 - p00), p01 + s * (p11 - p01)
            flat[k] = above + t * (below - above)
        mean = mean_r = mean_s = squares = 0.0
        for i in range(1, side + 1):
            for j in range(1, side + 1):
                mean += seen[i, j]
                squares += seen[i, j] * seen[i, j]
                mean_r += 0.5 * (seen[i, j + 1] - seen[i, j - 1])
                mean_s += 0.5 * (seen[i + 1, j] - seen[i - 1, j])
        mean, mean_r, mean_s = mean / count, mean_r / count, mean_s / count
        scale = 1.0 / max(math.sqrt(max(squares / count - mean * mean, 0.0)), 1.0)
        scale32, mean32, half = np.float32(scale), np.float32(mean), np.float32(0.5 * scale)
        mean_r32, mean_s32 = np.float32(scale * mean_r), np.float32(scale * mean_s)
        squared = rr = ss = rs = r_e = s_e = np.float32(0.0)
        for i in range(side):
            for j in range(side):
                w = window[i * side + j]
                e = scale32 * (seen[i + 1, j + 1] - mean32) - patches[n, i * side + j]
                along = half * (seen[i + 1, j + 2] - seen[i + 1, j]) - mean_r32
                across = half * (seen[i + 2, j + 1] - seen[i, j + 1]) - mean_s32
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


@compiled_loop
def robust_sums(dissimilarity: Doubles, confidence: Doubles, loss_scale: float) -> tuple[float, float]:
    """Return the mean dissimilarity of the patches that the loss lets count, and the sum of their robust scores."""
    weights = weighted = scores = 0.0
    for n in range(len(confidence)):
        if dissimilarity[n] < 0.0:
            continue
        root = 1.0 + dissimilarity[n] / (2.0 * loss_scale * loss_scale)
        weight = confidence[n] / (root * root)
        scores += confidence[n] / root
        weights += weight
        weighted += weight * dissimilarity[n]
    return weighted / max(weights, 1e-9), scores


@compiled_loop
def away_from(T: Doubles, start: Doubles, away: Doubles) -> None:
    """Write (dt, dw) (6,) of the left perturbation that takes one pose (4, 4) to another."""
    R = np.zeros((3, 3))
    for i in range(3):
        for j in range(3):
            for k in range(3):
                R[i, j] += T[i, k] * start[j, k]
        away[i] = T[i, 3]
    for i in range(3):
        for j in range(3):
            away[i] -= R[i, j] * start[j, 3]
    x, y, z = 0.5 * (R[2, 1] - R[1, 2]), 0.5 * (R[0, 2] - R[2, 0]), 0.5 * (R[1, 0] - R[0, 1])
    sine = math.sqrt(x * x + y * y + z * z)
    angle = math.atan2(sine, 0.5 * (R[0, 0] + R[1, 1] + R[2, 2] - 1.0))
    factor = angle / sine if sine > 1e-12 else 1.0
    away[3], away[4], away[5] = factor * x, factor * y, factor * z


@compiled_loop
def fit_patches(
    image: Floats, points: Doubles, right: Doubles, down: Doubles, patches: Floats, window: Floats,
    confidence: Doubles, T: Doubles, intrinsics: Doubles, loss_scale: float, near_m: float, dissimilarity: Doubles,
    prior: Doubles, rule: Doubles, H: Doubles,
) -> tuple[float, float, float]:  # fmt: skip
    """Fit a pose to patches by Gauss-Newton, as ``patches.PatchAligner`` does step by step.

    Args:
        image, points, right, down, patches, window, confidence, intrinsics, loss_scale, near_m, dissimilarity: of
            :func:`patch_equations`.
        T: (4, 4) the start; the fitted pose is written.
        prior: (6, 6) information of (dt, dw) at the start.
        rule: largest number of iterations; step in metres and radians that is the last one; longest step in metres;
            mean dissimilarity at which the prior counts fully.
        H: (6, 6) written: normal equations of the patches at the end, before the last step if that is a small one.

    Returns:
        Mean dissimilarity at the end, and sums of robust scores at the start and the end; a mean of -1: diverged.
    """
    start, first, last, variance = T.copy(), 0.0, 0.0, 0.0
    away, step = np.empty(6), np.empty(6)
    for iteration in range(int(rule[0]) + 1):
        A, g = patch_equations(
            image, points, right, down, patches, window, confidence, T, intrinsics, loss_scale, near_m, dissimilarity
        )
        variance, last = robust_sums(dissimilarity, confidence, loss_scale)
        H[:] = A
        if iteration == 0:
            first = last
        if iteration == int(rule[0]):
            break
        away_from(T, start, away)
        weight = variance * (variance / rule[4]) ** 4
        for i in range(6):
            for j in range(6):
                A[i, j] += weight * prior[i, j]
                g[i] += weight * prior[i, j] * away[j]
        for i in range(6):
            A[i, i] += 1e-6 * A[i, i] + 1e-12
        if not solve(A, g, step):
            return -1.0, first, last
        length = math.sqrt(step[0] ** 2 + step[1] ** 2 + step[2] ** 2)
        if length > rule[3]:
            step *= rule[3] / length
            length = rule[3]
        T[:] = moved(T, step)
        # what a step below the limits changes needs no evaluation
        if iteration > 0 and length < rule[1] and math.sqrt(step[3] ** 2 + step[4] ** 2 + step[5] ** 2) < rule[2]:
            break
    return variance, first, last


def run_once() -> None:
    """Run the loops on one patch, so that they are compiled or read from the disk before the first image."""
    point, image = np.array([[0.0, 0.0, 1.0]]), np.zeros((32, 32), np.float32)
    patch, window = np.zeros((1, 9), np.float32), np.full(9, 1 / 9, np.float32)
    right, down = np.array([[0.1, 0.0, 0.0]]), np.array([[0.0, 0.1, 0.0]])
    args = image, point, right, down, patch, window, np.ones(1), np.eye(4), np.array([10.0, 10.0, 16.0, 16.0])
    patch_equations(*args, 0.35, 0.05, np.empty(1))
    fit_patches(*args, 0.35, 0.05, np.empty(1), np.eye(6), np.ones(5), np.empty((6, 6)))
