# SPDX-License-Identifier: Apache-2.0
"""Compiled loops of least squares on poses: the step, and the pose after it.

Numba compiles a file anew when that file changes, so a change here needs one in the files of the loops that call these.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.device import compiled_loop

Doubles = NDArray[np.float64]


@compiled_loop
def solve(H: Doubles, g: Doubles, step: Doubles) -> bool:
    """Write the step (n,) with H step = -g; return false if H (n, n), which is overwritten, is not positive definite.

    The lower triangle of H becomes its Cholesky factor.
    """
    n = len(g)
    for j in range(n):
        pivot = H[j, j]
        for k in range(j):
            pivot -= H[j, k] * H[j, k]
        if not pivot > 0.0:
            return False
        H[j, j] = math.sqrt(pivot)
        for i in range(j + 1, n):
            rest = H[i, j]
            for k in range(j):
                rest -= H[i, k] * H[j, k]
            H[i, j] = rest / H[j, j]
    for i in range(n):
        rest = -g[i]
        for k in range(i):
            rest -= H[i, k] * step[k]
        step[i] = rest / H[i, i]
    for i in range(n - 1, -1, -1):
        rest = step[i]
        for k in range(i + 1, n):
            rest -= H[k, i] * step[k]
        step[i] = rest / H[i, i]
        if not math.isfinite(step[i]):
            return False
    return True


@compiled_loop
def moved(T: Doubles, step: Doubles) -> Doubles:
    """Return a pose (4, 4) after the left perturbation (dt, dw): P' = Exp(dw) P + dt."""
    x, y, z = step[3], step[4], step[5]
    angle = math.sqrt(x * x + y * y + z * z)
    sine, versine = 1.0, 0.0  # of a small angle: sin(a) / a, and (1 - cos(a)) / a^2
    if angle >= 1e-8:
        sine, versine = math.sin(angle) / angle, (1.0 - math.cos(angle)) / (angle * angle)
    R = np.empty((3, 3))
    R[0, 0], R[0, 1] = 1.0 - versine * (y * y + z * z), versine * x * y - sine * z
    R[1, 1], R[1, 2] = 1.0 - versine * (x * x + z * z), versine * y * z - sine * x
    R[2, 2], R[2, 0] = 1.0 - versine * (x * x + y * y), versine * x * z - sine * y
    R[0, 2], R[1, 0], R[2, 1] = versine * x * z + sine * y, versine * x * y + sine * z, versine * y * z + sine * x
    out = np.zeros((4, 4))
    for i in range(3):
        for j in range(4):
            out[i, j] = R[i, 0] * T[0, j] + R[i, 1] * T[1, j] + R[i, 2] * T[2, j]
        out[i, 3] += step[i]
    out[3, 3] = 1.0
    return out
