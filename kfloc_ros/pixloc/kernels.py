# SPDX-License-Identifier: Apache-2.0
"""Compiled loops of the alignment; :mod:`kfloc_ros.pixloc.cost` has the equations, and the torch path."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@compiled_loop
def normal_equations(
    image: Floats,
    trust: Floats,
    points: Floats,
    features: Floats,
    confidence: Floats,
    T: Doubles,
    intrinsics: Doubles,
    loss_scale: float,
    near_m: float,
    size: int,
) -> tuple[float, float, int, Doubles, Doubles]:
    """Return the sum of weights, the weighted sum of losses, the number of valid points, and unscaled H and g.

    Args:
        image: (H, W, C) features of the image.
        trust: (H, W) confidence of the image.
        points: (N, 3) metres.
        features: (N, C) reference features.
        confidence: (N,) of the points.
        T: (4, 4) ``T_camera_map``.
        intrinsics: fx, fy, cx, cy in cells, k1, skew, cells per pixel.
        loss_scale: scale of the robust loss.
        near_m: smallest depth.
        size: 6 for the pose, 12 for pose and camera.
    """
    rows, columns, channels = image.shape
    fx, fy, cx, cy, k1, skew, step = intrinsics
    c2 = 2.0 * loss_scale * loss_scale
    H, g = np.zeros((size, size)), np.zeros(size)
    J_u, J_v = np.zeros(size), np.zeros(size)
    weights, losses, count = 0.0, 0.0, 0
    for n in range(len(points)):
        X, Y, Z = float(points[n, 0]), float(points[n, 1]), float(points[n, 2])
        z = T[2, 0] * X + T[2, 1] * Y + T[2, 2] * Z + T[2, 3]
        if not z > near_m:
            continue
        x = (T[0, 0] * X + T[0, 1] * Y + T[0, 2] * Z + T[0, 3]) / z
        y = (T[1, 0] * X + T[1, 1] * Y + T[1, 2] * Z + T[1, 3]) / z
        r2 = x * x + y * y
        bend = 1.0 + k1 * r2
        u, v = fx * x * bend + cx + skew * fx * y * bend, fy * y * bend + cy
        if not (u >= 0.0 and v >= 0.0 and u <= columns - 1.0 and v <= rows - 1.0):
            continue
        if 1.0 + 3.0 * k1 * r2 <= 0.0:  # beyond the fold of the distortion, which would put it into the image
            continue
        u0, v0 = min(int(u), columns - 2), min(int(v), rows - 2)
        a, b = u - u0, v - v0
        w00, w10 = np.float32((1.0 - a) * (1.0 - b)), np.float32(a * (1.0 - b))
        w01, w11 = np.float32((1.0 - a) * b), np.float32(a * b)
        h00, h10 = np.float32(0.5) * w00, np.float32(0.5) * w10
        h01, h11 = np.float32(0.5) * w01, np.float32(0.5) * w11
        left, right = max(u0 - 1, 0), min(u0 + 2, columns - 1)
        above, below = max(v0 - 1, 0), min(v0 + 2, rows - 1)
        f00, f10, f01, f11 = image[v0, u0], image[v0, u0 + 1], image[v0 + 1, u0], image[v0 + 1, u0 + 1]
        l0, r0, l1, r1 = image[v0, left], image[v0, right], image[v0 + 1, left], image[v0 + 1, right]
        a0, a1, b0, b1 = image[above, u0], image[above, u0 + 1], image[below, u0], image[below, u0 + 1]
        wanted = features[n]
        squared = np.float32(0.0)
        uu, uv, vv = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        ur, vr = np.float32(0.0), np.float32(0.0)
        for c in range(channels):
            q00, q10, q01, q11 = f00[c], f10[c], f01[c], f11[c]
            r = w00 * q00 + w10 * q10 + w01 * q01 + w11 * q11 - wanted[c]
            du = h00 * (q10 - l0[c]) + h10 * (r0[c] - q00) + h01 * (q11 - l1[c]) + h11 * (r1[c] - q01)
            dv = h00 * (q01 - a0[c]) + h10 * (q11 - a1[c]) + h01 * (b0[c] - q00) + h11 * (b1[c] - q10)
            squared += r * r
            uu += du * du
            uv += du * dv
            vv += dv * dv
            ur += du * r
            vr += dv * r
        count += 1
        seen = w00 * trust[v0, u0] + w10 * trust[v0, u0 + 1] + w01 * trust[v0 + 1, u0] + w11 * trust[v0 + 1, u0 + 1]
        w = float(confidence[n]) * float(seen)
        far = float(squared) / c2
        weights += w
        losses += w * c2 * math.log1p(far)
        w /= 1.0 + far
        # derivative of the normalised point by (dt, dw), through the distortion
        along, across, up = fx * (bend + 2.0 * k1 * x * x), 2.0 * k1 * x * y, fy * (bend + 2.0 * k1 * y * y)
        across_u, across_v = fx * across, fy * across
        J_u[0], J_u[1], J_u[2] = along / z, across_u / z, -(along * x + across_u * y) / z
        J_v[0], J_v[1], J_v[2] = across_v / z, up / z, -(across_v * x + up * y) / z
        J_u[3], J_v[3] = -along * x * y - across_u * (1.0 + y * y), -across_v * x * y - up * (1.0 + y * y)
        J_u[4], J_v[4] = along * (1.0 + x * x) + across_u * x * y, across_v * (1.0 + x * x) + up * x * y
        J_u[5], J_v[5] = across_u * x - along * y, up * x - across_v * y
        if size > 6:
            J_u[6], J_u[8], J_u[10] = fx * x * bend, step, fx * x * r2
            J_v[6], J_v[7], J_v[9], J_v[10] = fy * y * bend, fy * y * bend, step, fy * y * r2
            J_u[11] = fx * y * bend
            for i in range(6):
                J_u[i] += skew * fx / fy * J_v[i]
            J_u[6] += skew * fx * y * bend
            J_u[10] += skew * fx * y * r2
        s_uu, s_uv, s_vv, s_u, s_v = w * uu, w * uv, w * vv, w * ur, w * vr
        for i in range(size):
            t_u, t_v = J_u[i] * s_uu + J_v[i] * s_uv, J_u[i] * s_uv + J_v[i] * s_vv
            g[i] += J_u[i] * s_u + J_v[i] * s_v
            for j in range(i + 1):
                H[i, j] += t_u * J_u[j] + t_v * J_v[j]
    for i in range(size):
        for j in range(i):
            H[j, i] = H[i, j]
    return weights, losses, count, H, g


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
def best_cells(
    image: Floats, features: Floats, at: Floats, radius: int, place: Floats, similarity: Floats, at_border: Booleans
) -> None:
    """Write, for every point, the place (N, 2) of the most similar cell around ``at`` (N, 2), and its cosine (N,).

    ``at_border`` (N,) is true where that cell lies at the border of the searched window. The search takes cells outside
    the image as the nearest ones inside; places between cells come from parabolas through the neighbours' cosines.
    """
    rows, columns, channels = image.shape
    side = 2 * radius + 1
    window = np.empty((side, side), np.float32)
    for n in range(len(at)):
        u0, v0 = int(np.rint(at[n, 0])) - radius, int(np.rint(at[n, 1])) - radius
        wanted = features[n]
        best, best_row, best_column = np.float32(-2.0), 0, 0
        for i in range(side):
            v = min(max(v0 + i, 0), rows - 1)
            for j in range(side):
                cell = image[v, min(max(u0 + j, 0), columns - 1)]
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
        place[n, 0] = u0 + best_column + min(max(du, -0.5), 0.5)
        place[n, 1] = v0 + best_row + min(max(dv, -0.5), 0.5)
        similarity[n] = best
        at_border[n] = i != best_row or j != best_column


@compiled_loop
def match_equations(
    pixels: Doubles,
    points: Doubles,
    weights: Doubles,
    T: Doubles,
    intrinsics: Doubles,
    scale_px: float,
    near_m: float,
    squared: Doubles,
) -> tuple[Doubles, Doubles]:
    """Return H (6, 6) and g (6,) of reprojection errors with the loss of Geman and McClure; write squared errors (N,).

    Args:
        pixels: (N, 2) places of the points in the image.
        points: (N, 3) metres.
        weights: (N,)
        T: (4, 4) ``T_camera_map``.
        intrinsics: fx, fy, cx, cy in pixels.
        scale_px: scale of the loss.
        near_m: smallest depth; nearer points have no weight.
        squared: (N,) squared errors, written, px^2.
    """
    fx, fy, cx, cy = intrinsics
    H, g = np.zeros((6, 6)), np.zeros(6)
    J_u, J_v = np.zeros(6), np.zeros(6)
    for n in range(len(points)):
        X, Y, Z = points[n]
        z = T[2, 0] * X + T[2, 1] * Y + T[2, 2] * Z + T[2, 3]
        in_front = z > near_m
        z = max(z, near_m)
        x = (T[0, 0] * X + T[0, 1] * Y + T[0, 2] * Z + T[0, 3]) / z
        y = (T[1, 0] * X + T[1, 1] * Y + T[1, 2] * Z + T[1, 3]) / z
        e_u, e_v = fx * x + cx - pixels[n, 0], fy * y + cy - pixels[n, 1]
        squared[n] = e_u * e_u + e_v * e_v
        if not in_front:
            continue
        root = 1.0 + squared[n] / (scale_px * scale_px)
        w = weights[n] / (root * root)
        J_u[0], J_u[2], J_u[3], J_u[4], J_u[5] = fx / z, -fx * x / z, -fx * x * y, fx * (1.0 + x * x), -fx * y
        J_v[1], J_v[2], J_v[3], J_v[4], J_v[5] = fy / z, -fy * y / z, -fy * (1.0 + y * y), fy * x * y, fy * x
        for i in range(6):
            g[i] += w * (J_u[i] * e_u + J_v[i] * e_v)
            for j in range(i + 1):
                H[i, j] += w * (J_u[i] * J_u[j] + J_v[i] * J_v[j])
    for i in range(6):
        for j in range(i):
            H[j, i] = H[i, j]
    return H, g
