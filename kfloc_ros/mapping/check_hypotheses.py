# SPDX-License-Identifier: Apache-2.0
"""Search for the mistake that explains why poses and calibration do not fit the images: one cause at a time.

Causes compete: whichever explains the matches best is taken, and only if it explains most of the disagreement, in most
of the pairs. Poses that are merely inaccurate are explained by none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.mapping.check_camera import CAMERA, CameraFound, find_camera
from kfloc_ros.mapping.check_geometry import (
    ASPECT,
    BENDING,
    CENTRE,
    FOCAL,
    MOUNT,
    OFFSET,
    READOUT,
    TURN,
    Array,
    Fit,
    Model,
    Observations,
    cost,
    fit,
)
from kfloc_ros.types import Matrix

GOOD_PX = 0.25
"""Poses whose epipolar lines pass the matches this near are not searched for mistakes."""
GAIN = 0.62
"""A cause must bring the median over pairs to this share."""
BETTER, MOST, MOST_OF_OFFSET = 0.9, 0.75, 0.6
WORSE, FEW = 1.25, 0.15
"""A cause must bring most pairs to the first share or below, and no more than few above the second. In a pair without
acceleration, for instance, poses of another time fit as well."""
LARGE_DROP, LARGE_GAIN, LARGE_MOST, LARGE_FEW = 0.5, 0.7, 0.7, 0.2
"""Weaker limits for a mounting or a wrong lens if the cost falls by so much: inaccurate poses hide the rest."""
MIN_DROP = 0.12
"""Least fall of the mean Cauchy cost."""
PARAMETER_COST = 0.012
"""Added to the cost for every parameter, so that of equal explanations the simpler one is taken."""
NOISE_COST = 0.06
"""Added to it, times the cost that remains: poses that are inaccurate let every parameter explain a little."""
LOOSE_PX = 1.0
"""Poses whose epipolar lines pass the matches this far away, whatever is mended, are corrected for the calibration."""
MAX_CAUSES = 3
MIN_PAIRS = 7

MIN_OFFSET_FRAMES, MAX_OFFSET_FRAMES = 0.4, 6.0
MIN_READOUT_FRAMES, MAX_READOUT_FRAMES = 0.2, 6.0
MIN_FOCAL, MIN_CENTRE, MIN_BENDING, MIN_TURN_DEG = 0.03, 0.03, 0.04, 3.0
"""Least size of a mistake: factor less 1, share of the focal length, k1, degrees; see :func:`least`."""
NOISE_PX = 0.3
"""Distance from the epipolar lines, with the mistake mended, at which the least sizes are doubled; they grow to four
times at most."""
SIGMAS = 5.0
LENS_KINDS = ("focal", "centre", "calibration", "aspect", "distortion", "pinhole")
CAMERA_KINDS = (*LENS_KINDS, "rolling_shutter")


@dataclass(frozen=True, eq=False)
class Cause:
    """One explanation, and how well it does."""

    kind: str
    """``inverted``, ``axes``, ``mount``, ``offset``, ``focal``, ``centre``, ``calibration``, ``aspect``,
    ``distortion``, ``pinhole`` or ``rolling_shutter``."""
    fit: Fit
    before_px: float
    """Median distance of the matches from their epipolar lines without it, in the working images."""
    after_px: float
    drop: float
    rivals: tuple[str, ...] = ()
    """Other kinds that explain nearly as much."""
    camera: CameraFound | None = None
    """The fit of the camera, if poses were corrected in it."""


def rotations() -> list[Matrix]:
    """Return the 24 rotations (3, 3) that map axes onto axes; the identity is the first."""
    found = []
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            R = np.zeros((3, 3))
            R[range(3), order] = signs
            if np.linalg.det(R) > 0:
                found.append(R)
    return sorted(found, key=lambda R: rotation_angle_deg(R))


def find_causes(observed: Observations) -> tuple[Model, list[Cause]]:
    """Return the model that fits and what it corrects, in the order of importance; nothing where all is well."""
    model, causes = Model(), []
    taken: set[str] = set()
    for _ in range(MAX_CAUSES):
        if len(observed.pairs) < MIN_PAIRS or not np.nanmedian(observed.per_pair(model)) > GOOD_PX:
            break
        cause = _best_cause(observed, model, taken)
        if cause is None:
            break
        causes.append(cause)
        taken.add(cause.kind)
        model = cause.fit.model
    if len(observed.pairs) >= MIN_PAIRS and np.nanmedian(observed.per_pair(model)) > LOOSE_PX:
        return _with_corrected_poses(observed, model, causes)
    return model, causes


def _with_corrected_poses(observed: Observations, model: Model, causes: list[Cause]) -> tuple[Model, list[Cause]]:
    """The same where poses are inaccurate: what is wrong with the camera is told by a fit that corrects them."""
    base = replace(model, pinhole=False).changed(CAMERA, np.zeros(len(CAMERA)))
    found = find_camera(observed, base, _focal_start(observed, base))
    if not found.is_trusted:
        return model, causes
    kept = [cause for cause in causes if cause.kind not in CAMERA_KINDS]
    if not found.kind:
        return base, kept
    fitted = found.found.fit
    gain = found.given.cost - found.found.cost
    told = Cause(found.kind, fitted, found.given.residual_px, found.found.residual_px, gain, camera=found)
    return fitted.model, [*kept, told]


def _best_cause(observed: Observations, base: Model, taken: set[str]) -> Cause | None:
    e0, c0 = observed.per_pair(base), cost(observed.residuals(base))
    found: list[tuple[float, Cause]] = []
    tried = [(*item, cost(observed.residuals(item[2].model))) for item in _candidates(observed, base, taken)]
    if not tried:
        return None
    noise = min(c1 for *_, c1 in tried)
    for kind, parameters, candidate, c1 in tried:
        penalised = c1 + (PARAMETER_COST + NOISE_COST * noise) * parameters
        found.append((penalised, _judged(kind, candidate, observed, e0, c0 - c1)))
    found.sort(key=lambda item: item[0])
    for penalised, cause in found:
        if c0 - penalised < MIN_DROP:
            return None
        if not _explains(cause, observed, base, e0):
            continue
        rivals = tuple(
            other.kind for value, other in found if other is not cause and value < penalised + 0.15 * cause.drop
        )
        return replace(cause, rivals=tuple(dict.fromkeys(rivals)))
    return None


def _judged(kind: str, found: Fit, observed: Observations, e0: Array, drop: float) -> Cause:
    return Cause(kind, found, float(np.nanmedian(e0)), float(np.nanmedian(observed.per_pair(found.model))), drop)


def _explains(cause: Cause, observed: Observations, base: Model, e0: Array) -> bool:
    e1 = observed.per_pair(cause.fit.model)
    both = np.isfinite(e0) & np.isfinite(e1)
    if not both.any():
        return False
    better, worse = (e1[both] < BETTER * e0[both]).mean(), (e1[both] > WORSE * e0[both] + 0.1).mean()
    most = MOST_OF_OFFSET if cause.kind == "offset" else MOST
    explained = cause.after_px < GAIN * cause.before_px and better >= most and worse <= FEW
    if cause.kind in ("mount", "focal", "calibration", "aspect") and cause.drop > LARGE_DROP:
        explained = cause.after_px < LARGE_GAIN * cause.before_px and better >= LARGE_MOST and worse <= LARGE_FEW
    return explained and is_large(cause, base)


def least(size: float, cause: Cause) -> float:
    """Return the least size of a mistake where poses are as inaccurate as they are: a bias of theirs is none."""
    return size * (1 + min(cause.after_px / NOISE_PX, 3.0))


def is_large(cause: Cause, base: Model) -> bool:
    """Return true if what is corrected is large enough to be a mistake, and known well enough."""
    values, sigma = cause.fit.model.values - base.values, cause.fit.sigma
    sure = np.abs(values) > SIGMAS * sigma
    if cause.kind == "offset":
        return bool(sure[6]) and MIN_OFFSET_FRAMES < abs(values[6]) < MAX_OFFSET_FRAMES
    if cause.kind == "rolling_shutter":
        return bool(sure[12]) and MIN_READOUT_FRAMES < abs(values[12]) < MAX_READOUT_FRAMES
    if cause.kind == "aspect":
        return bool(sure[11]) and abs(values[11]) > least(MIN_FOCAL, cause)
    if cause.kind == "mount":
        R = cause.fit.model.T_body_camera[:3, :3]  # near whole quarter turns, those and no others are meant
        return min(rotation_angle_deg(axes.T @ R) for axes in rotations()) > least(MIN_TURN_DEG, cause)
    if cause.kind == "distortion":
        return bool(sure[10]) and abs(values[10]) > least(MIN_BENDING, cause)
    if cause.kind in ("focal", "calibration", "centre"):
        focal = bool(sure[7]) and abs(values[7]) > least(MIN_FOCAL, cause)
        centre = bool(sure[8:10].any()) and float(np.abs(values[8:10]).max()) > least(MIN_CENTRE, cause)
        return focal or centre
    return True


def _candidates(observed: Observations, base: Model, taken: set[str]) -> list[tuple[str, int, Fit]]:
    """(kind, parameters, fit) of every cause that was not found yet."""
    none = np.full(len(base.values), np.nan)
    found: list[tuple[str, int, Fit]] = []
    if not taken & {"inverted", "axes", "mount"}:
        found += _pose_candidates(observed, base)
    if "offset" not in taken:
        grid = np.arange(-5.0, 5.5, 1.0)
        costs = [cost(observed.residuals(base.changed(OFFSET, [k]))) for k in grid]
        found.append(("offset", 1, fit(observed, base.changed(OFFSET, [grid[int(np.argmin(costs))]]), OFFSET)))
    if "rolling_shutter" not in taken:
        found.append(("rolling_shutter", 1, fit(observed, base, READOUT)))
    if not taken & set(LENS_KINDS):
        if not observed.camera.is_pinhole and observed.camera.distortion_model != "equidistant":
            found.append(("pinhole", 0, Fit(replace(base, pinhole=True), none)))
        start = _focal_start(observed, base)
        found.append(("focal", 1, fit(observed, start, FOCAL)))
        found.append(("centre", 2, fit(observed, base, CENTRE)))
        found.append(("aspect", 2, fit(observed, start, (*FOCAL, *ASPECT))))
        found.append(("calibration", 3, fit(observed, start, (*FOCAL, *CENTRE))))
        found.append(("distortion", 2, fit(observed, base, (*FOCAL, *BENDING))))
    return found


def _focal_start(observed: Observations, base: Model) -> Model:
    grid = np.log([0.4, 0.5, 0.6, 0.72, 0.85, 1.0, 1.18, 1.4, 1.7, 2.0, 2.5])
    trials = [base.changed(FOCAL, [value]) for value in grid]
    return min(trials, key=lambda trial: cost(observed.residuals(trial)))


def _pose_candidates(observed: Observations, base: Model) -> list[tuple[str, int, Fit]]:
    none = np.full(len(base.values), np.nan)
    trials = [(inverted, R) for inverted in (False, True) for R in rotations()][1:]
    models = [replace(base, inverted=inverted, axes=R) for inverted, R in trials]
    costs = [cost(observed.residuals(model)) for model in models]
    order = np.argsort(costs)
    best = models[order[0]]
    found = [(_name(best), 1, Fit(best, none))]
    starts = [base, *(models[k] for k in order[:5])]
    turned = min((fit(observed, start, TURN, 8) for start in starts), key=lambda f: cost(observed.residuals(f.model)))
    found.append(("mount", 3, fit(observed, turned.model, TURN)))
    found.append(("mount", 6, fit(observed, turned.model, MOUNT)))
    return found


def _name(model: Model) -> str:
    return "inverted" if model.inverted else "axes"
