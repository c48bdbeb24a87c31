# SPDX-License-Identifier: Apache-2.0
"""Compiled loops of the alignment.

:mod:`kfloc_ros.pixloc.cost`, :mod:`kfloc_ros.pixloc.optimizer` and :mod:`kfloc_ros.pixloc.point_matching` have the
equations, and the torch or NumPy path of each. A loop runs to its end without the interpreter's lock, which the thread
that prepares the next image needs meanwhile. Numba compiles a file anew when that file changes, so a change of a loop
that ``point_kernels`` or ``patch_kernels`` calls needs one in these files.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop
from kfloc_ros.geometry.kernels import moved, solve

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@compiled_loop
def derivatives(x: float, y: float, z: float, intrinsics: Doubles, size: int, J_u: Doubles, J_v: Doubles) -> None:
    """Write the derivatives (size,) of a position in the image, u and v, by (dt, dw) and the camera's offsets.

    ``x``, ``y`` and ``z`` are normalised image coordinates and depth; entries that are always zero are left alone.
    """
    fx, fy, _, _, k1, skew, step = intrinsics
    r2 = x * x + y * y
    bend = 1.0 + k1 * r2
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
    fx, fy, cx, cy, k1, skew, _ = intrinsics
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
        derivatives(x, y, z, intrinsics, size, J_u, J_v)
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
def descend(
    image: Floats,
    trust: Floats,
    points: Floats,
    features: Floats,
    confidence: Floats,
    T: Doubles,
    intrinsics: Doubles,
    loss_scale: float,
    near_m: float,
    rule: Doubles,
    poses: Doubles,
    costs: Doubles,
    ends: Doubles,
) -> tuple[int, int]:
    """Minimise the cost from a pose by Levenberg and Marquardt; return the numbers of iterations and accepted steps.

    Args:
        image, trust, points, features, confidence, T, intrinsics, loss_scale, near_m: of :func:`normal_equations`.
        rule: largest number of iterations, step in metres and radians and relative gain that count as converged; first,
            smallest and largest damping, and what is added to the diagonal.
        poses, costs: (iterations + 1, 4, 4) and (iterations + 1,) written: start and every accepted pose.
        ends: (2, 45) written for the first and the last pose: sums of weights and losses, number of points, H and g.
    """
    step_m, step_rad, least_gain, damping, least, most, floor = rule[1:]
    weights, losses, count, H, g = normal_equations(
        image, trust, points, features, confidence, T, intrinsics, loss_scale, near_m, 6
    )
    cost = losses / weights if weights > 0.0 else math.inf
    poses[0], costs[0] = T, cost
    ends[0, 0], ends[0, 1], ends[0, 2] = weights, losses, count
    ends[0, 3:39], ends[0, 39:] = H.copy().reshape(36), g
    ends[1] = ends[0]
    step, iterations, accepted = np.zeros(6), 0, 0
    while iterations < rule[0] and count > 0 and weights > 0.0:
        iterations += 1
        damped = H / weights
        for i in range(6):
            damped[i, i] += damped[i, i] * damping + floor
        if not solve(damped, g / weights, step):
            break
        candidate = moved(poses[accepted], step)
        new_weights, new_losses, new_count, new_H, new_g = normal_equations(
            image, trust, points, features, confidence, candidate, intrinsics, loss_scale, near_m, 6
        )
        new_cost = new_losses / new_weights if new_weights > 0.0 else math.inf
        is_small = math.sqrt(step[0] ** 2 + step[1] ** 2 + step[2] ** 2) < step_m
        is_small = is_small and math.sqrt(step[3] ** 2 + step[4] ** 2 + step[5] ** 2) < step_rad
        if new_cost < cost and new_count * 3 >= count * 2:
            gain = (cost - new_cost) / max(cost, 1e-12)
            weights, cost, count, H, g = new_weights, new_cost, new_count, new_H, new_g
            accepted += 1
            poses[accepted], costs[accepted] = candidate, cost
            ends[1, 0], ends[1, 1], ends[1, 2] = weights, new_losses, count
            ends[1, 3:39], ends[1, 39:] = H.copy().reshape(36), g
            damping = max(damping / 10.0, least)
            if is_small or gain < least_gain:
                break
        else:
            damping *= 10.0
            if damping > most or is_small:
                break
    return iterations, accepted


@compiled_loop
def descend_with_camera(
    image: Floats, trust: Floats, points: Floats, features: Floats, confidence: Floats, T: Doubles, offsets: Doubles,
    camera: Doubles, precision: Doubles, loss_scale: float, near_m: float, min_points: int, iterations: int, H: Doubles,
) -> tuple[float, int]:  # fmt: skip
    """Minimise the cost over pose and camera by Levenberg and Marquardt; return the cost and the number of points.

    Args:
        image, trust, points, features, confidence, loss_scale, near_m: of :func:`normal_equations`.
        T, offsets: (4, 4) and (6,) the start; the end is written.
        camera: fx, fy, cx, cy in pixels, and the stride of the level.
        precision: (6,) inverse variances of the prior on the offsets.
        min_points: number of points below which nothing is done.
        iterations: largest number of them.
        H: (12, 12) written: the normal equations at the end, scaled to information.
    """
    new_T, new_offsets, model, step = T.copy(), offsets.copy(), np.empty(7), np.zeros(12)
    g, cost, count, damping, stride = np.zeros(12), math.inf, 0, 1e-3, camera[4]
    for iteration in range(iterations + 1):
        model[0] = camera[0] * math.exp(new_offsets[0]) / stride
        model[1] = camera[1] * math.exp(new_offsets[0] + new_offsets[1]) / stride
        model[2] = (camera[2] + new_offsets[2] + 0.5) / stride - 0.5
        model[3] = (camera[3] + new_offsets[3] + 0.5) / stride - 0.5
        model[4], model[5], model[6] = new_offsets[4], new_offsets[5], 1.0 / stride
        weights, losses, new_count, new_H, new_g = normal_equations(
            image, trust, points, features, confidence, new_T, model, loss_scale, near_m, 12
        )
        new_cost = losses / weights if weights > 0.0 else math.inf
        if iteration == 0 and new_count < min_points:
            return new_cost, new_count
        if iteration == 0 or (new_cost < cost and 3 * new_count >= 2 * count):
            is_last = iteration > 0 and (cost - new_cost) / max(cost, 1e-12) < 1e-5
            damping = damping if iteration == 0 else max(damping / 10.0, 1e-7)
            scale = new_count / max(new_cost, 1e-9) / weights
            cost, count, H[:], g = new_cost, new_count, scale * new_H, scale * new_g
            T[:], offsets[:] = new_T, new_offsets
        else:
            damping *= 10.0
            is_last = damping > 1e3
        if is_last:
            break
        damped, slope = H.copy(), g.copy()
        for i in range(12):
            damped[i, i] += damping * H[i, i] + 1e-9
        for i in range(6):
            damped[6 + i, 6 + i] += precision[i]
            slope[6 + i] += precision[i] * offsets[i]
        if not solve(damped, slope, step):
            break
        new_T, new_offsets = moved(T, step), offsets + step[6:]
    return cost, count


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


@compiled_loop
def fit_matches(
    pixels: Doubles,
    points: Doubles,
    weights: Doubles,
    T: Doubles,
    intrinsics: Doubles,
    scales_px: Doubles,
    steps: int,
    converged: float,
    near_m: float,
    squared: Doubles,
) -> bool:
    """Fit a pose to matches by Gauss-Newton, one scale of the loss after another; return false if they do not fix it.

    Args:
        pixels, points, weights, intrinsics, near_m, squared: of :func:`match_equations`.
        T: (4, 4) the start; the fitted pose is written.
        scales_px: scales of the loss.
        steps: largest number of steps for a scale.
        converged: largest step, metres and radians, that ends a scale.
    """
    step = np.zeros(6)
    for scale_px in scales_px:
        for _ in range(steps):
            H, g = match_equations(pixels, points, weights, T, intrinsics, scale_px, near_m, squared)
            for i in range(6):
                H[i, i] += 1e-6 * H[i, i] + 1e-9
            if not solve(H, g, step):
                return False
            T[:] = moved(T, step)
            if np.abs(step).max() < converged:
                break
    return True
