# SPDX-License-Identifier: Apache-2.0
"""Model of what may be wrong with a source's poses and calibration, and its fit to matched points.

A point x of the first image (on the plane z = 1) and its match y in the second obey ``y^T [t]x R x = 0``, where
``(R, t)`` is the relative pose. The residual is Sampson's distance in pixels. It needs no depth, and does not change
with the unit of the poses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, so3_exp
from kfloc_ros.mapping.check_pairs import WORKING_SIDE_PX, Pair, Poses
from kfloc_ros.types import Matrix

Array = NDArray[np.float64]

PARAMETERS = (
    "turn_x", "turn_y", "turn_z", "lever_x", "lever_y", "lever_z", "offset", "log_focal", "cx", "cy", "k1",
    "log_aspect", "readout",
)  # fmt: skip
"""Of :class:`Model`: radians, pose units, frames, log of a factor, shares of the focal length, k1, log of the factor of
fy by that of fx, and the frames between the exposures of the first and the last row."""
TURN, LEVER, MOUNT = (0, 1, 2), (3, 4, 5), (0, 1, 2, 3, 4, 5)
OFFSET, FOCAL, CENTRE, BENDING, ASPECT, READOUT = (6,), (7,), (8, 9), (10,), (11,), (12,)
STEPS = np.array([1e-4] * 3 + [1e-4] * 3 + [1e-2, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-2])
"""Of numerical derivatives; those of the lever are multiplied by the usual baseline."""
CAUCHY_PX = 1.0


@dataclass(frozen=True, eq=False)
class Model:
    """One way to read the poses and the calibration; the default reads them as they are given."""

    inverted: bool = False
    """The poses map from the world to the camera."""
    axes: Matrix = field(default_factory=lambda: np.eye(3))
    """(3, 3) rotation from the camera's optical axes to those that the poses are of."""
    pinhole: bool = False
    """The calibration's distortion is left out."""
    values: Array = field(default_factory=lambda: np.zeros(len(PARAMETERS)))
    """Of ``PARAMETERS``, on top of the rest."""

    @property
    def T_body_camera(self) -> Matrix:
        """The mounting: (4, 4), from optical camera axes to the body that the poses are of."""
        return make_pose(self.axes @ so3_exp(self.values[:3]), self.values[3:6])

    @property
    def offset(self) -> float:
        """Frames after an image at which its pose is found."""
        return float(self.values[6])

    @property
    def readout(self) -> float:
        """Frames between the exposures of the first and the last row; poses are those of the middle row."""
        return float(self.values[12])

    @property
    def focal_factor(self) -> float:
        """Right focal length by the given one."""
        return float(np.exp(self.values[7]))

    def changed(self, index: Sequence[int] | NDArray[np.int_], values: Sequence[float] | Array) -> Model:
        """The same with some of the values replaced."""
        copy = self.values.copy()
        copy[list(index)] = values
        return replace(self, values=copy)


class Observations:
    """The matches of all pairs in one array, and the poses they are held to."""

    def __init__(self, pairs: Sequence[Pair], poses: Poses, camera: Camera) -> None:
        self.pairs = list(pairs)
        self.poses = poses
        self.camera = camera
        self.pair_of = np.concatenate([np.full(len(pair), k) for k, pair in enumerate(pairs)])
        pixels = [np.concatenate([pair.pixels[side] for pair in pairs]) for side in (0, 1)]
        self._rays = {flat: [normalised(camera.pinhole() if flat else camera, x) for x in pixels] for flat in (0, 1)}
        self.focal_px = (camera.fx + camera.fy) / 2 / max(max(camera.width, camera.height) / WORKING_SIDE_PX, 1.0)
        """Focal length in the working images, in which residuals are told."""
        self.rows = [(x[:, 1] + 0.5) / camera.height - 0.5 for x in pixels]
        self._relative: dict[tuple[bool, float], tuple[Matrix, NDArray[np.bool_]]] = {}
        self._speeds: dict[tuple[bool, float], Matrix] = {}
        lengths = np.linalg.norm(self.relative(Model())[0][:, :3, 3], axis=1)
        known = lengths[self.relative(Model())[1]]
        self.baseline = float(np.median(known)) if len(known) and np.median(known) > 0 else 1.0
        """Usual distance between the positions of a pair, in the unit of the poses."""

    def rays(self, model: Model) -> tuple[Array, Array]:
        """(N, 3) directions of the matched points in both images, z = 1."""
        log_focal, cx, cy, k1, log_aspect = model.values[7:12]
        found = []
        for xy in self._rays[int(model.pinhole)]:
            moved = (xy - (cx, cy)) * np.exp((-log_focal, -log_focal - log_aspect))
            moved = moved * (1 + k1 * (moved**2).sum(1, keepdims=True))
            found.append(np.concatenate([moved, np.ones((len(moved), 1))], axis=1))
        return found[0], found[1]

    def relative(self, model: Model) -> tuple[Matrix, NDArray[np.bool_]]:
        """(K, 4, 4) poses of the first views in the second ones, by the model, and which pairs have one."""
        key = (model.inverted, model.offset)
        if key not in self._relative:
            if len(self._relative) > 64:
                self._relative.clear()
            self._relative[key] = self._body_motion(*key)
        motions, known = self._relative[key]
        T = model.T_body_camera
        return inverse_pose(T) @ motions @ T, known

    def _body_motion(self, inverted: bool, offset: float) -> tuple[Matrix, NDArray[np.bool_]]:
        motions = np.tile(np.eye(4), (len(self.pairs), 1, 1))
        known = np.zeros(len(self.pairs), dtype=np.bool_)
        for k, pair in enumerate(self.pairs):
            first, second = (self.poses.at(view.position, offset) for view in (pair.first, pair.second))
            if first is not None and second is not None:
                motions[k] = second @ inverse_pose(first) if inverted else inverse_pose(second) @ first
                known[k] = True
        return motions, known

    def residuals(self, model: Model) -> Array:
        """(N,) signed Sampson distances in pixels of the working images; NaN where a pose is missing."""
        motions, known = self.relative(model)
        x, y = self.rays(model)
        t = motions[:, :3, 3]
        length = np.linalg.norm(t, axis=1, keepdims=True)
        if model.readout:
            x, y, moved = self._at_middle_row(model, motions, x, y)
            back = np.cross(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12), y)
            E = motions[:, :3, :3][self.pair_of]
            line = np.cross(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12),
                            np.einsum("nij,nj->ni", E, x))  # fmt: skip
            back = -np.einsum("nji,nj->ni", E, back)
        else:
            t = t / np.maximum(length, 1e-12)
            zero = np.zeros(len(t))
            cross = np.array([[zero, -t[:, 2], t[:, 1]], [t[:, 2], zero, -t[:, 0]], [-t[:, 1], t[:, 0], zero]])
            E = (cross.transpose(2, 0, 1) @ motions[:, :3, :3])[self.pair_of]
            line, back = np.einsum("nij,nj->ni", E, x), np.einsum("nji,nj->ni", E, y)
        scale = self.focal_px * model.focal_factor * np.array([1.0, np.exp(model.values[11])])
        square = ((line[:, :2] / scale) ** 2).sum(1) + ((back[:, :2] / scale) ** 2).sum(1)
        found = (y * line).sum(1) / np.sqrt(np.maximum(square, 1e-30))
        good = known & (length[:, 0] > 1e-4 * self.baseline)
        return np.asarray(np.where(good[self.pair_of], found, np.nan))

    def turns(self, model: Model) -> Array:
        """(2, K, 3) rotation vectors of the camera from a frame before to a frame after both views."""
        T = model.T_body_camera
        speeds = inverse_pose(T) @ self._body_speed(model.inverted, model.offset) @ T
        return np.stack([rotation_vectors(speed[:, :3, :3]) for speed in speeds])

    def _at_middle_row(self, model: Model, motions: Matrix, x: Array, y: Array) -> tuple[Array, Array, Array]:
        """Directions (N, 3) as seen when the middle rows were exposed, and the way (N, 3) between the cameras."""
        T = model.T_body_camera
        speeds = inverse_pose(T) @ self._body_speed(model.inverted, model.offset) @ T
        moved = motions[self.pair_of][:, :3, 3]
        turned = []
        for side, rays in enumerate((x, y)):
            late = model.readout * self.rows[side]
            speed = speeds[side][self.pair_of]
            axis = late[:, None] * rotation_vectors(speed[:, :3, :3]) / 2
            way = late[:, None] * speed[:, :3, 3] / 2
            bent = rays + np.cross(axis, rays) + np.cross(axis, np.cross(axis, rays)) / 2
            turned.append(bent / bent[:, 2:])
            moved = moved + (np.einsum("nij,nj->ni", motions[self.pair_of][:, :3, :3], way) if side == 0 else -way)
        return turned[0], turned[1], moved

    def _body_speed(self, inverted: bool, offset: float) -> Matrix:
        """(2, K, 4, 4) motions of the body from a frame before to a frame after both views; none where unknown."""
        key = (inverted, offset)
        if key not in self._speeds:
            if len(self._speeds) > 64:
                self._speeds.clear()
            found = np.tile(np.eye(4), (2, len(self.pairs), 1, 1))
            for k, pair in enumerate(self.pairs):
                for side, view in enumerate((pair.first, pair.second)):
                    before, after = (self.poses.at(view.position, offset + step) for step in (-1.0, 1.0))
                    if before is not None and after is not None:
                        found[side, k] = before @ inverse_pose(after) if inverted else inverse_pose(before) @ after
            self._speeds[key] = found
        return self._speeds[key]

    def per_pair(self, model: Model) -> Array:
        """(K,) median absolute residual of each pair in pixels; NaN where a pose is missing."""
        r = np.abs(self.residuals(model))
        return np.array([np.median(r[self.pair_of == k]) for k in range(len(self.pairs))])

    def differs(self, model: Model) -> bool:
        """Return true if a model reads the source otherwise than it is given."""
        return model.inverted or model.pinhole or bool(np.any(model.values)) or not np.allclose(model.axes, np.eye(3))

    def epipolar_line(self, model: Model, pair: int, match: int) -> Array:
        """(2, 2) ends in pixels, within the second image's width and height, of the line that a match should lie on.

        The lens of the calibration as it is given is left out: lines are straight.
        """
        motions, _ = self.relative(model)
        x, _ = self.rays(model)
        T = motions[pair]
        a, b, c = np.cross(T[:3, 3], T[:3, :3] @ x[match])
        camera, (log_focal, cx, cy) = self.camera, model.values[7:10]
        low = ((np.array([0, 0]) - (camera.cx, camera.cy)) / (camera.fx, camera.fy) - (cx, cy)) * np.exp(-log_focal)
        size = np.array([camera.width, camera.height])
        high = ((size - (camera.cx, camera.cy)) / (camera.fx, camera.fy) - (cx, cy)) * np.exp(-log_focal)
        steep = abs(a) > abs(b)  # then it crosses the image from top to bottom
        ends = []
        for share in (0.0, 1.0):
            if steep:
                y = low[1] + share * (high[1] - low[1])
                ends.append((-(b * y + c) / a, y))
            else:
                u = low[0] + share * (high[0] - low[0])
                ends.append((u, -(a * u + c) / b) if b else (u, 0.0))
        shares = (np.array(ends) - low) / (high - low)
        return np.asarray(np.clip(shares, -50, 50) * size)

    def in_front(self, model: Model) -> float:
        """Share of the points with enough parallax that lie in front of both cameras: 1 where all is right."""
        motions, known = self.relative(model)
        x, y = self.rays(model)
        T = motions[self.pair_of]
        a, b, t = np.einsum("nij,nj->ni", T[:, :3, :3], x), y, T[:, :3, 3]
        # depth_y * b = depth_x * a + t, in least squares
        aa, bb, ab = (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)
        at, bt = (a * t).sum(1), (b * t).sum(1)
        determinant = aa * bb - ab * ab
        with np.errstate(divide="ignore", invalid="ignore"):
            depth_x, depth_y = (ab * bt - bb * at) / determinant, (aa * bt - ab * at) / determinant
        wide = known[self.pair_of] & (determinant > (aa * bb) * np.radians(1.0) ** 2)
        if wide.sum() < 30:
            return float("nan")
        return float(((depth_x > 0) & (depth_y > 0))[wide].mean())


@dataclass(frozen=True, eq=False)
class Fit:
    """The best model of a kind."""

    model: Model
    sigma: Array
    """Standard deviations of ``PARAMETERS``, from how pairs disagree; NaN where not fitted."""


def fit(observed: Observations, start: Model, free: Sequence[int], iterations: int = 12) -> Fit:
    """Fit some parameters by Gauss-Newton with Cauchy weights.

    Args:
        observed: matches and poses.
        start: where it begins.
        free: indices of the parameters that are fitted.
        iterations: at most.
    """
    index = np.array(free)
    steps = STEPS[index] * np.where(np.isin(index, LEVER), observed.baseline, 1.0)
    values = start.values[index]
    damping = 1e-3
    r = observed.residuals(start)
    before = cost(r)
    H, groups = np.eye(len(index)), np.zeros((1, len(index)))
    for _ in range(iterations):
        columns = []
        for i in range(len(index)):
            moved = values.copy()
            moved[i] += steps[i]
            columns.append((observed.residuals(start.changed(index, moved)) - r) / steps[i])
        J = np.stack(columns, axis=1)
        good = np.isfinite(r) & np.isfinite(J).all(1)
        weight = np.where(good, 1 / (1 + (np.where(good, r, 0) / CAUCHY_PX) ** 2), 0.0)
        J, residual = np.where(good[:, None], J, 0), np.where(good, r, 0)
        gradients = (weight * residual)[:, None] * J
        H = J.T @ (weight[:, None] * J)
        H = H + 1e-12 * np.trace(H) * np.eye(len(index))
        groups = np.stack([np.bincount(observed.pair_of, gradients[:, i]) for i in range(len(index))], axis=1)
        for _ in range(5):
            change = -np.linalg.pinv(H + damping * np.diag(np.diag(H))) @ gradients.sum(0)  # zero without residuals
            trial = start.changed(index, values + change)
            new = observed.residuals(trial)
            if cost(new) < before:
                break
            damping *= 6
        else:
            break
        gain, before, r, values, damping = before - cost(new), cost(new), new, values + change, damping / 4
        if gain < 1e-5:
            break
    inverse = np.linalg.pinv(H)
    sigma = np.full(len(PARAMETERS), np.nan)
    sigma[index] = np.sqrt(np.maximum(np.diag(inverse @ (groups.T @ groups) @ inverse), 0))
    return Fit(start.changed(index, values), sigma)


def cost(r: Array) -> float:
    """Return the mean Cauchy cost of residuals in pixels; infinite if too few are known."""
    good = np.isfinite(r)
    return float(np.log1p((r[good] / CAUCHY_PX) ** 2).mean()) if good.sum() > 50 else np.inf


def rotation_vectors(R: Array) -> Array:
    """Return rotation vectors (N, 3) of small rotations (N, 3, 3)."""
    skew = np.stack([R[:, 2, 1] - R[:, 1, 2], R[:, 0, 2] - R[:, 2, 0], R[:, 1, 0] - R[:, 0, 1]], axis=1) / 2
    sine = np.linalg.norm(skew, axis=1, keepdims=True)
    return np.asarray(skew * np.where(sine > 1e-9, np.arcsin(np.clip(sine, 0, 1)) / np.maximum(sine, 1e-9), 1.0))


def normalised(camera: Camera, pixels: Array) -> Array:
    """Return points (N, 2) on the plane z = 1 of pixels (N, 2)."""
    coefficients = np.array(camera.distortion or (0.0,) * 4)
    undistort = cv2.fisheye.undistortPoints if camera.distortion_model == "equidistant" else cv2.undistortPoints
    return np.asarray(undistort(pixels[:, None], camera.K, coefficients), dtype=np.float64).reshape(-1, 2)


def fitted_camera(model: Model, camera: Camera) -> Camera:
    """Return the camera that a model says, its distortion as ``plumb_bob``."""
    log_focal, cx, cy, k1, log_aspect = model.values[7:12]
    factor = float(np.exp(log_focal))
    known = camera.pinhole() if model.pinhole else camera
    fx, fy = known.fx * factor, known.fy * factor * float(np.exp(log_aspect))
    centre = known.cx + cx * known.fx, known.cy + cy * known.fy
    if k1 == 0:
        return Camera(known.width, known.height, fx, fy, *centre, known.distortion_model, known.distortion)
    # Pixels along the diagonal, where they are seen from, and the coefficients that bend those directions there.
    share = np.linspace(0.05, 1.0, 40)
    corner = np.hypot(known.width / 2, known.height / 2)
    pixels = np.array(centre) + share[:, None] * corner * np.array([0.8, 0.6])
    xy = np.linalg.norm((normalised(known, pixels) - (cx, cy)) * (known.fx / fx, known.fy / fy), axis=1)
    xy = xy * (1 + k1 * xy**2)
    bent = np.linalg.norm((pixels - np.array(centre)) / (fx, fy), axis=1)
    A = np.stack([xy**3, xy**5], axis=1)
    k = np.linalg.lstsq(A, bent - xy, rcond=None)[0]
    return Camera(known.width, known.height, fx, fy, *centre, "plumb_bob", (float(k[0]), float(k[1]), 0.0, 0.0))
