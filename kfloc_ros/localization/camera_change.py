# SPDX-License-Identifier: Apache-2.0
"""Steps of the pose that no motion explains, and the doubt whether the camera has changed since one.

An image alone hardly tells a zoom from a motion ahead. The images around it do: a camera that moves has a speed, before
or after, and a zoom has none. A large step shows in the image itself: what was seen before is seen elsewhere, or gone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.covariance import CHI2_6_999, pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, inverse_pose, is_farther, jumped, rotation_angle_deg
from kfloc_ros.localization.judgement import CHANGED_SINCE, PARTLY_FOUND, CameraDoubt, wrong_cameras
from kfloc_ros.pixloc.camera_fit import FittedCamera, combine, log_evidence
from kfloc_ros.pixloc.session_points import SessionPoints
from kfloc_ros.relocalization.matching import similar_cells
from kfloc_ros.types import PoseEstimate, TrackingState

MOST_CAMERA_RISK = 0.005
"""Probability of an error above 10 cm, 5 deg by a wrong camera from which a pose is not TRACKING."""
LIKELY = 0.5
"""Probability from which an image is said to be of another camera, or a changed one is in the covariance of poses."""
USUAL_STEP = 6.0
"""Squared size of a step, relative to its variances (6 axes), up to which it speaks of nothing."""
MOST_FITS = 24
"""Number of the last fits that are combined."""
ELSEWHERE = 0.01
"""Probability that an image's pose, or the one before, is at another place, and so may step anywhere."""
ELSEWHERE_SIGMA = np.repeat([0.5, 0.35], 3)
"""Standard deviations of such a step, metres and radians."""


@dataclass(frozen=True, eq=False)
class Step:
    """Change of a pose that the motion around it does not explain."""

    moved: Matrix
    """(6,) metres and radians, in the order of a pose's covariance."""
    variances: Matrix
    """(6,) of the same, by the images before."""

    @property
    def chi2(self) -> float:
        """Squared size relative to its standard deviations."""
        return float((self.moved**2 / self.variances).sum())

    def __add__(self, other: Step) -> Step:
        return Step(self.moved + other.moved, self.variances + other.variances)


@dataclass(frozen=True, eq=False)
class Steps:
    """Steps to the last pose and to the one before; None if there are too few poses."""

    last: Step | None
    """By the two motions before."""
    before: Step | None
    """By the motions before and after: a camera that moves on in another way has made no step."""


STEP_WINDOW, STEP_PRIOR_IMAGES = 20, 4
"""Number of steps from which their usual size is known, and number of images that the size before any counts as."""
USUAL_STEP_M, USUAL_STEP_RAD = 0.03, 0.026
"""Usual size on each axis before any image: that of a camera in the hand at ten images a second."""
LARGEST_STEP = 9.0
"""Largest squared step, relative to the median of the others, that counts in their usual size."""
MAX_STEP_S = 1.0
"""Longest time between two poses of one motion, in seconds."""


class PoseSteps:
    """Detector of steps: by what a motion between two images exceeds both its neighbours, or the two before, if it is
    the last."""

    def __init__(self) -> None:
        self._last: tuple[int, Matrix] | None = None
        self._motions: deque[tuple[Matrix, float]] = deque(maxlen=3)
        """Speeds (6,) between the last poses, and the time that they lasted, seconds."""
        sizes: list[deque[tuple[Matrix, float]]] = [deque(maxlen=STEP_WINDOW) for _ in range(2)]
        self._of_last, self._of_before = sizes

    def observe(self, stamp_ns: int, T_map_camera: Matrix) -> Steps:
        """Add a pose, (4, 4), and return its steps; a gap or a jump begins a new motion."""
        last, self._last = self._last, (stamp_ns, T_map_camera)
        if last is None or not 0 < stamp_ns - last[0] <= 1e9 * MAX_STEP_S or jumped(last[1], T_map_camera):
            self._motions.clear()
            return Steps(None, None)
        elapsed_s = 1e-9 * (stamp_ns - last[0])
        self._motions.append((pose_tangent_error(last[1], T_map_camera) / elapsed_s, elapsed_s))
        if len(self._motions) < 3:
            return Steps(None, None)
        usual = np.sort([speed for speed, _ in self._motions], axis=0)[1]
        (_, (before, before_s), (newest, newest_s)) = self._motions
        return Steps(
            self._step(self._of_last, (newest - usual) * newest_s, newest_s),
            self._step(self._of_before, (before - usual) * before_s, before_s),
        )

    def reset(self) -> None:
        """Begin a new motion with the next pose."""
        self._last = None

    @staticmethod
    def _step(sizes: deque[tuple[Matrix, float]], moved: Matrix, elapsed_s: float) -> Step:
        """Return a step with the variances that those before suggest, and add its size to them."""
        usual = np.square([USUAL_STEP_M, USUAL_STEP_RAD])
        variances = usual
        if sizes:  # an acceleration moves by the square of the time
            longer = np.array([max(1.0, elapsed_s / before_s) ** 4 for _, before_s in sizes])
            squares = longer[:, None] * np.stack([size for size, _ in sizes])
            squares = np.minimum(squares, LARGEST_STEP * np.maximum(np.median(squares, axis=0), 1e-8))
            variances = (STEP_PRIOR_IMAGES * usual + squares.sum(axis=0)) / (STEP_PRIOR_IMAGES + len(squares))
        sizes.append((np.square(moved).reshape(2, 3).mean(axis=1), elapsed_s))
        return Step(moved, np.repeat(variances, 3))


class CameraChange:
    """Possibility that the camera has changed since a step of the pose: a zoom, a new focus, another calibration.

    A wrong camera moves the pose by its offsets times the pose's sensitivity to them. So a step that such offsets
    explain, and the motion does not, tells of them, and more than the image itself if that shows little depth. By
    Bayes' rule, it is weighed against the motion and against poses at different places. Fits since then count as well.

    Args:
        fit_scale: factor on the covariance of the fit to one image, from the map's calibration.
        usual: (6, 6) covariance of the usual error of calibrations.
        width: image width, pixels.
        wrong_prior: probability of a wrong camera before any image; 0: none is ever wrong.
    """

    def __init__(self, fit_scale: float, usual: NDArray[np.float64], width: int, wrong_prior: float) -> None:
        self._fit_scale, self._usual, self._wrong_prior = fit_scale, usual, wrong_prior
        self._cameras = wrong_cameras(usual, width)
        self._next_prior = CHANGED_SINCE * wrong_prior
        self._poses, self._last = PoseSteps(), Steps(None, None)
        self._claims = False, False
        self.is_claimed = False
        """True if the last pose was claimed; a step away from any other says nothing of the camera."""
        self._drop()

    def _drop(self) -> None:
        self._step: Step | None = None
        self._fits: list[FittedCamera] = []
        self._sensitivity, self._is_first, self._prior = np.eye(6), False, self._next_prior

    def reset(self) -> None:
        """Forget step and motion: a camera that was found replaces the given one."""
        self._drop()
        self.begin_motion()

    def begin_motion(self) -> None:
        """Begin a new motion with the next pose; what is known of the camera stays."""
        self._poses.reset()

    @property
    def step_m(self) -> float:
        """Distance by which the pose stepped, in metres."""
        return 0.0 if self._step is None else float(np.linalg.norm(self._step.moved[:3]))

    def observe(self, stamp_ns: int, T_map_camera: Matrix) -> None:
        """Add the pose (4, 4) of an image."""
        self._last, self._claims = self._poses.observe(stamp_ns, T_map_camera), (self.is_claimed, self._claims[0])
        before, is_first, self._is_first = self._last.before, self._is_first, False
        if self._step is None or before is None:
            return
        if is_first:  # the same step, known better now
            self._step = before
        elif before.chi2 > CHI2_6_999 > (self._step + before).chi2:  # back
            self._drop()
            self._last = Steps(None, None)

    def announced(self, so_far: float) -> None:
        """Note that the next image comes with another camera than the last, which was wrong with a probability."""
        self._fits = []
        self._next_prior = self._wrong_prior**2 / max(self._wrong_prior + so_far, 1e-9)

    def doubt(self, sensitivity: NDArray[np.float64], fitted: FittedCamera | None) -> CameraDoubt | None:
        """Return the doubt about the camera of the image whose pose was added last; None if no step speaks of another.

        Args:
            sensitivity: (6, 6) derivative of the pose by the offsets.
            fitted: fit to the image, if there is one.
        """
        prior, self._next_prior = self._next_prior, CHANGED_SINCE * self._wrong_prior
        fits = [] if fitted is None else [fitted]
        if self._wrong_prior == 0.0:
            return None
        if self._step is not None:
            self._fits = [*self._fits, *fits][-MOST_FITS:]
            doubt = self._judged(self._step, self._sensitivity, self._fits, self._prior)
            if doubt.probability >= self._prior:
                return doubt
            self._drop()
            return None
        for step, is_from_claimed in zip((self._last.last, self._last.before), self._claims, strict=True):
            if step is None or not is_from_claimed or step.chi2 < USUAL_STEP:
                continue
            doubt = self._judged(step, sensitivity, fits, prior)
            if doubt.probability > LIKELY or doubt.of_pose(sensitivity)[1] > MOST_CAMERA_RISK:
                self._step, self._fits, self._sensitivity, self._prior = step, fits, sensitivity, prior
                self._is_first = step is self._last.last
                return doubt
        return None

    def _judged(self, step: Step, S: NDArray[np.float64], fits: Sequence[FittedCamera], prior: float) -> CameraDoubt:
        """Return the doubt by a step of a pose with sensitivity S, (6, 6), and fits since."""
        together = None
        if fits:
            together = combine([f.fit for f in fits], np.stack([f.T_map_camera for f in fits]), self._fit_scale)
        offsets, found = together or (np.zeros(6), np.zeros((6, 6)))
        found = PARTLY_FOUND * found
        noise = np.diag(step.variances)
        right = math.log(1.0 - ELSEWHERE) + log_evidence(step.moved, noise)
        apart = math.log(ELSEWHERE) + log_evidence(step.moved, noise + np.diag(ELSEWHERE_SIGMA**2))
        right = float(np.logaddexp(right, apart))
        if together is not None:
            right += log_evidence(offsets, found + self._usual)
        logs, moments = [], []
        for camera in self._cameras:
            total = noise + S @ camera @ S.T
            gain = camera @ S.T @ np.linalg.inv(total)
            mean, left = -gain @ step.moved, camera - gain @ S @ camera
            log = math.log(prior / len(self._cameras)) + log_evidence(step.moved, total)
            if together is not None:
                log += log_evidence(offsets - mean, found + left)
                gain = left @ np.linalg.inv(found + left)
                mean, left = mean + gain @ (offsets - mean), left - gain @ left
            logs.append(log)
            moments.append(left + np.outer(mean, mean))
        likely = np.exp(np.array(logs) - max(logs))
        mixed = np.einsum("k,kij->ij", likely / likely.sum(), np.stack(moments))
        odds = max(logs) + math.log(likely.sum()) - right
        return CameraDoubt(1.0 / (1.0 + math.exp(-max(min(odds, 30.0), -30.0))), 0.5 * (mixed + mixed.T))


JUMP_SHARE = 0.1
"""Motion of the session's points in the image, in the median and relative to its width, from which a pose jumps."""
SMALL_M, SMALL_DEG = 0.05, 2.0
"""Motions within both limits are none."""
STAYED_SHARE, MOVED_RATIO = 0.15, 0.6
"""Median distance between points and where they were, relative to the width, up to which they may have stayed; and that
to where the new pose has them, relative to it, from which they have not moved there. Real motions have a ratio of at
most 0.33, or 0.19 to 0.47 of the width (six maps); squeezed images have 0.06 to 0.14 of the width and 0.95 to 2.4."""
MIN_SIMILARITY, MIN_FOUND = 0.7, 15
"""Smallest cosine of a point and the cell in which it is found again, and fewest such points."""


class JumpCheck:
    """Check of a pose that jumps from a claimed one, by the points of this session's images.

    Another camera, such as a squeezed image, or a picture of the room may fit the map at a pose far from the last one.
    The image denies that the camera has moved there if points are found again near where they were, and hardly nearer
    to where they would be seen from the new pose. A camera that did jump sees other points, or sees them there.

    Args:
        points: points of this session's images.
        camera: pinhole camera of the images.
        longest_s: longest time after the claimed pose.
    """

    def __init__(self, points: SessionPoints, camera: Camera, longest_s: float) -> None:
        self._points, self._width, self._longest_ns = points, camera.width, int(1e9 * longest_s)
        self._claimed: tuple[int, Matrix] | None = None
        self._denied: Matrix | None = None
        """Last pose that was denied, or went on from such a pose."""

    def observe(self, estimate: PoseEstimate) -> None:
        """Take the pose of an image whose points were learned; one that the map confirms holds against others."""
        T = estimate.T_map_camera
        if T is not None and estimate.state is TrackingState.TRACKING and not estimate.held:
            self._claimed = estimate.stamp_ns, T
        elif T is None or self._claimed is None or jumped(self._claimed[1], T):
            self._claimed = None

    def forget(self) -> None:
        """Forget the claimed pose: the camera may be anywhere."""
        self._claimed = self._denied = None

    def judged(self, features: BackboneFeatures, estimate: PoseEstimate) -> PoseEstimate:
        """Return the estimate of an image with these features; DEGRADED and tentative if the image denies its jump.

        Poses that go on from a denied one are denied, too, whatever their images show: the camera moves on.
        """
        T, last, denied = estimate.T_map_camera, self._claimed, self._denied
        if T is None or last is None or not 0 < estimate.stamp_ns - last[0] <= self._longest_ns:
            self._denied = None
            return estimate
        goes_on = denied is not None and not jumped(denied, T)
        if not is_farther(last[1], T, SMALL_M, SMALL_DEG) or not (goes_on or self._is_denied(features, last[1], T)):
            self._denied = None
            return estimate
        self._denied = T
        if estimate.state is not TrackingState.TRACKING:
            return replace(estimate, tentative=True)
        moved = inverse_pose(last[1]) @ T
        reason = (
            f"the image shows what the last ones showed, not a motion by {np.linalg.norm(moved[:3, 3]):.1f} m and "
            f"{rotation_angle_deg(moved[:3, :3]):.0f} deg"
        )
        return replace(estimate, state=TrackingState.DEGRADED, reason=reason, tentative=True)

    @torch.inference_mode()
    def _is_denied(self, features: BackboneFeatures, before: Matrix, now: Matrix) -> bool:
        """Return true if the image denies that the camera has moved between two poses (4, 4)."""
        points, width = self._points, self._width
        if points.displacement_px(before, now) < JUMP_SHARE * width:
            return False
        (at, in_view), (later, _) = points.places(before), points.places(now)
        if in_view.sum() < MIN_FOUND:
            return False
        rows = points.all()[0]
        pixels, found = similar_cells(rows[torch.from_numpy(in_view).to(rows.device)], features, MIN_SIMILARITY)
        if len(pixels) < MIN_FOUND:
            return False
        stayed_px, moved_px = (np.linalg.norm(p[in_view][found] - pixels, axis=1) for p in (at, later))
        return bool(
            np.median(stayed_px) < STAYED_SHARE * width and np.median(moved_px) > MOVED_RATIO * np.median(stayed_px)
        )
