# SPDX-License-Identifier: Apache-2.0
"""Check of a source by its own images: poses, calibration, depth and images that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kfloc_ros.datasets.source_options import MOUNTS
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import matrix_to_quaternion, rotation_angle_deg
from kfloc_ros.mapping.check_depth import (
    DEPTH_FACTORS,
    DepthPlace,
    DepthUnit,
    depth_place,
    depth_size_doubt,
    depth_unit,
)
from kfloc_ros.mapping.check_depth_views import DepthClock, DepthShift, depth_by_matches, depth_clock, depth_shift
from kfloc_ros.mapping.check_geometry import Model, Observations, fitted_camera
from kfloc_ros.mapping.check_hypotheses import (
    LENS_KINDS,
    LOOSE_PX,
    MIN_CENTRE,
    MIN_FOCAL,
    MIN_PAIRS,
    Cause,
    find_causes,
)
from kfloc_ros.mapping.check_pairs import Pair, PairFinder, Poses
from kfloc_ros.mapping.check_recording import ImageFacts, image_facts
from kfloc_ros.types import Matrix

ERROR, WARNING = "error", "warning"
BEYOND_DOUBT_PX, BEYOND_DOUBT_SHARE = 1.5, 0.35
"""A cause is beyond doubt if the median distance is more than this without it, and at most this share of it with it."""
POOR_PX = 5.0
"""Distance from which on poses that no cause explains are told."""
UNIT_WARNING, UNIT_ERROR, UNIT_SPREAD = 0.08, 0.3, 0.25
"""Of the logarithm of the factor between depth and poses."""
PLAUSIBLE_DEPTH_M = (0.12, 40.0)
NEAR = 0.12
"""Of the logarithm, within which a factor is taken for one that is usual."""
POSE_UNITS = {0.001: "millimetres", 0.01: "centimetres", 0.0254: "inches", 0.3048: "feet"}
DEPTH_PLACE_KINDS = ("depth_shift", "depth_clock")
MIN_DELAY_FRAMES = 2
MIN_SHIFT = 0.02
"""Least shift of the depth, as a share of the image's width, that is told."""


@dataclass(frozen=True)
class Finding:
    """One mistake in a source."""

    kind: str
    """Such as ``inverted``, ``offset``, ``focal`` or ``depth_unit``."""
    severity: str
    """``error``: the data contradict it beyond doubt; ``warning``."""
    text: str
    """A sentence with its number."""
    words: str = ""
    """Options of the source that mend it, such as ``poses=world_to_camera``; empty if none does."""
    value: float | None = None
    """The number in the text: degrees, seconds, a factor or pixels."""


@dataclass(frozen=True, eq=False)
class SourceCheck:
    """What a check found."""

    name: str
    findings: tuple[Finding, ...]
    figures: Mapping[str, float]
    """What was measured, by name."""
    notes: tuple[str, ...] = ()
    """What could not be checked, and why."""
    pairs: tuple[Pair, ...] = field(default=(), repr=False)
    observed: Observations | None = field(default=None, repr=False)
    model: Model = field(default_factory=Model, repr=False)
    """How the poses and the calibration are to be read."""

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == ERROR]

    @property
    def words(self) -> str:
        """The options that mend all that options mend, as they follow a SOURCE; empty if none does."""
        words = [finding.words for finding in self.findings if finding.words]
        return "?" + "&".join(words) if words else ""

    def to_dict(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "source": self.name,
            "findings": [asdict(finding) for finding in self.findings],
            "options": self.words,
            "figures": dict(self.figures),
            "notes": list(self.notes),
        }


def check_source(source: FrameSource, *, pairs: int = 16, use_poses: bool = True) -> SourceCheck:
    """Check a source; some fifty of its frames are read, in some seconds.

    Args:
        source: with or without poses and depth.
        pairs: pairs of images to compare at most.
        use_poses: compare images with poses; without, what images, stamps and depth tell by themselves is checked.
    """
    finder = PairFinder(source, pairs)
    found = list(finder.pairs())
    facts = image_facts(source, finder.views, found, finder.at_rest)
    figures: dict[str, float] = {"frames": len(source), "pairs": len(found), **facts.figures()}
    findings = _image_findings(facts)
    notes: list[str] = []
    poses = Poses(source)
    posed = [p for p in found if use_poses and all(poses.at(v.position) is not None for v in (p.first, p.second))]
    if len(posed) < MIN_PAIRS:
        what = "show enough motion and common points" if len(found) < MIN_PAIRS else "have poses"
        notes.append(
            f"Poses, calibration and depth were not compared with the images: only {min(len(posed), len(found))} pairs "
            f"of neighbouring images {what}, and {MIN_PAIRS} are needed."
        )
        if doubt := depth_size_doubt(facts.usual_depth_m):
            findings.append(Finding("depth_size", WARNING, doubt, value=facts.usual_depth_m))
        return SourceCheck(source.name, tuple(findings), figures, tuple(notes), tuple(found))
    observed = Observations(posed, poses, source.camera)
    model, causes = find_causes(observed)
    period_s = _period_s(posed)
    mirrored = observed.in_front(model) < 0.5
    figures["epipolar_px"] = round(float(np.nanmedian(observed.per_pair(Model()))), 3)
    figures["epipolar_px_mended"] = round(float(np.nanmedian(observed.per_pair(model))), 3)
    findings += _pose_findings(causes, model, source.camera, period_s, mirrored)
    left = figures["epipolar_px_mended"]
    if left > POOR_PX:
        findings.append(
            Finding("poses", WARNING, f"The poses do not fit the images: half of the matched points lie more than "
                    f"{left:.1f} pixels from their epipolar lines, and no single mistake explains it.", value=left)
        )  # fmt: skip
    elif any(np.isfinite(p.depths_m[0]).any() for p in posed) and not mirrored:
        unit = depth_unit(observed, model)
        if unit is not None:
            figures["depth_by_poses"] = round(unit.factor, 4)
            figures["median_depth_m"] = round(unit.median_m, 3)
            findings += _unit_findings(unit)
        factor = 1.0 if unit is None else unit.factor
        place = depth_place(finder.views, observed, model, factor)
        if place is not None:
            findings += _place_findings(place, source.camera, period_s)
        calibrated = any(cause.kind in LENS_KINDS for cause in causes)  # then depth disagrees for that reason
        clock = None if calibrated else depth_clock(finder.views, observed, model, factor)
        if clock is not None:
            figures["depth_disagreement"] = round(clock.before, 4)
            if not any(finding.kind == "depth_clock" for finding in findings):
                findings += _clock_findings(clock, period_s)
        on_edges = place is not None and place.clear  # edges in the images tell a shift more finely than depth alone
        moved = None if causes or on_edges else depth_shift(finder.views, observed, model, factor)
        if moved is not None and not any(finding.kind in DEPTH_PLACE_KINDS for finding in findings):
            findings += _shift_findings(moved, source.camera)
        if left > LOOSE_PX and not calibrated and not any(finding.kind in DEPTH_PLACE_KINDS for finding in findings):
            by_matches = depth_by_matches(observed, model, factor)
            if isinstance(by_matches, DepthClock):
                findings += _clock_findings(by_matches, period_s)
            elif by_matches is not None:
                findings += _shift_findings(by_matches, source.camera)
    return SourceCheck(source.name, tuple(findings), figures, tuple(notes), tuple(posed), observed, model)


def _period_s(pairs: Sequence[Pair]) -> float:
    """Usual seconds from frame to frame."""
    steps = [
        (p.second.frame.stamp_ns - p.first.frame.stamp_ns) / 1e9 / (p.second.position - p.first.position) for p in pairs
    ]
    return float(np.median(steps))


def _pose_findings(
    causes: Sequence[Cause], model: Model, camera: Camera, period_s: float, mirrored: bool
) -> list[Finding]:
    found = []
    calibrated = [cause for cause in causes if cause.kind in LENS_KINDS]
    for cause in causes:
        sure = cause.before_px > BEYOND_DOUBT_PX and cause.after_px < BEYOND_DOUBT_SHARE * cause.before_px
        proof = (
            f"with that, matched points lie {cause.after_px:.2f} pixels from their epipolar lines in the median, "
            f"and {cause.before_px:.2f} without"
        )
        if cause.camera is not None:
            sure = cause.camera.is_certain
            proof = (
                f"fitted to the images together with corrections of the inaccurate poses (of about "
                f"{cause.camera.found.turn_deg:.1f} degrees from view to view)"
            )
            focal = cause.fit.sigma[7]
            proof += f", the focal length to {100 * focal:.1f} %" if np.isfinite(focal) else ""
        kind, text, words, value = _told(cause, model, camera, period_s, mirrored)
        if cause in calibrated[:-1]:
            words = ""  # the last one's camera has all of it
        found.append(Finding(kind, ERROR if sure else WARNING, f"{text}: {proof}.", words, value))
    if mirrored and not any(finding.kind == "mirrored" for finding in found):
        found.append(Finding("mirrored", ERROR, "By the poses, what the images show lies behind the camera: the images "
                             "are mirrored, or the poses are left-handed."))  # fmt: skip
    return found


def _told(
    cause: Cause, model: Model, camera: Camera, period_s: float, mirrored: bool
) -> tuple[str, str, str, float | None]:
    """(kind, sentence, options, value) of a cause."""
    own = cause.fit.model
    if cause.kind in ("inverted", "axes"):
        if mirrored:
            signs = tuple(np.diag(own.axes).astype(int).tolist())
            flip = {(1, -1, -1): ", left to right,", (-1, 1, -1): ", top to bottom,"}.get(signs, "")
            text = f"The images are mirrored{flip} against the poses, or the poses are left-handed"
            return "mirrored", text, "poses=world_to_camera" if own.inverted else "", None
        options = ["poses=world_to_camera"] if own.inverted else []
        text = "The poses map from the world to the camera" if own.inverted else ""
        angle = rotation_angle_deg(own.axes)
        if angle > 1:
            options.append(f"mount={_mount_words(own.T_body_camera)}")
            text += ", and their" if own.inverted else "The poses'"
            text += f" axes are not the camera's (x right, y down, z forward) but {_axes_words(own.axes)}"
        return cause.kind, text, "&".join(options), angle
    if cause.kind == "mount":
        T = own.T_body_camera
        angle, arm = rotation_angle_deg(T[:3, :3]), float(np.linalg.norm(T[:3, 3]))
        lever = f" and about {arm:.2f} units away" if arm > 0 else ""
        words = ("poses=world_to_camera&" if own.inverted else "") + f"mount={_mount_words(T)}"
        text = f"The poses are those of a body on which the camera is mounted turned by {angle:.1f} degrees{lever}"
        return "mount", text, words, angle
    if cause.kind == "offset":
        seconds = own.offset * period_s
        side = "ahead of" if seconds < 0 else "behind"
        text = f"The poses run {abs(seconds):.3f} s ({abs(own.offset):.1f} frames) {side} the images"
        return "offset", text, f"pose_offset_s={seconds:.3f}", seconds
    if cause.kind == "rolling_shutter":
        seconds = own.readout * period_s
        rows = "first to the last" if seconds > 0 else "last to the first"
        text = f"The camera exposes row by row (rolling shutter): {abs(seconds):.3f} s from the {rows} row"
        return "rolling_shutter", text, "", seconds
    fitted = fitted_camera(model, camera)
    words = f"camera={camera_words(fitted)}"
    if cause.kind == "pinhole":
        return "pinhole", "The images are rectified already, and the calibration tells a distortion", words, None
    if cause.kind == "aspect":
        text = (
            f"The focal lengths that fit the images are {fitted.fx:.0f} (fx) and {fitted.fy:.0f} (fy) pixels, and not "
            f"{camera.fx:.0f} and {camera.fy:.0f}"
        )
        return "aspect", text, words, float(np.exp(own.values[11]))
    if cause.kind == "distortion" and (cause.camera is not None or abs(own.values[10]) > abs(own.values[7])):
        k1 = fitted.distortion[0] if fitted.distortion else 0.0
        text = f"The images are distorted otherwise than the calibration says (k1 about {k1:.2f})"
        return "distortion", text, words, k1
    if cause.kind == "centre" or (cause.kind == "calibration" and abs(own.values[7]) < MIN_FOCAL):
        centre = f"({fitted.cx:.0f}, {fitted.cy:.0f}), and not ({camera.cx:.0f}, {camera.cy:.0f})"
        return "centre", f"The principal point that fits the images is {centre}", words, fitted.cx
    text = f"The focal length that fits the images is {fitted.fx:.0f} pixels, and not {camera.fx:.0f}"
    if cause.kind == "calibration" and np.abs(own.values[8:10]).max() > MIN_CENTRE:
        centre = f"({fitted.cx:.0f}, {fitted.cy:.0f}), and not ({camera.cx:.0f}, {camera.cy:.0f})"
        text += f"; the principal point is {centre}"
        return "calibration", text, words, own.focal_factor
    return "focal", text, words, own.focal_factor


def camera_words(camera: Camera) -> str:
    """Return a camera as the value of the source's option ``camera``."""
    values = [camera.fx, camera.fy, camera.cx, camera.cy]
    words = [str(camera.width), str(camera.height), *(f"{value:.2f}" for value in values)]
    return ",".join(words + [f"{k:.4f}" for k in camera.distortion])


def _mount_words(T: Matrix) -> str:
    for name, known in MOUNTS.items():
        if np.allclose(T, known, atol=1e-6):
            return name
    return ",".join(f"{value:.4f}".rstrip("0").rstrip(".") for value in (*T[:3, 3], *matrix_to_quaternion(T[:3, :3])))


def _axes_words(axes: Matrix) -> str:
    for name, text in (("opengl", "OpenGL's (x right, y up, z backward)"), ("ros_body", "a ROS body's (x forward)")):
        if np.allclose(axes, MOUNTS[name][:3, :3]):
            return text
    angle = rotation_angle_deg(axes)
    if abs(axes[2, 2] - 1) < 1e-6:
        return f"turned by {angle:.0f} degrees about the view, as in images that were turned"
    names = ("x", "y", "z")
    columns = [("-" if column.min() < -0.5 else "") + names[int(np.abs(column).argmax())] for column in axes.T]
    return f"others (right, down and forward are their {', '.join(columns)})"


def _unit_findings(unit: DepthUnit) -> list[Finding]:
    size = abs(float(np.log(unit.factor)))
    sure = size > UNIT_ERROR and unit.spread < UNIT_SPREAD
    if not sure and (size < UNIT_WARNING or size < 4 * unit.spread / np.sqrt(unit.pairs) or unit.spread > 0.1):
        return []
    severity = ERROR if sure else WARNING
    plausible = PLAUSIBLE_DEPTH_M[0] < unit.median_m < PLAUSIBLE_DEPTH_M[1]
    poses = min(POSE_UNITS, key=lambda value: abs(np.log(value * unit.factor)))
    depth = min(DEPTH_FACTORS, key=lambda value: abs(np.log(value / unit.factor)))
    proof = (
        f"depth triangulated from the poses is {unit.factor:.4g} times the measured depth, "
        f"whose median is {unit.median_m:.3g} m ({unit.pairs} pairs)"
    )
    is_known = abs(np.log(poses * unit.factor)) < NEAR and abs(np.log(depth / unit.factor)) > NEAR
    if plausible and (is_known or unit.factor > 100):
        text = f"The poses are in {POSE_UNITS[poses]}"
        return [Finding("pose_unit", severity, f"{text}: {proof}.", f"pose_scale={poses:g}", poses)]
    value = depth if abs(np.log(depth / unit.factor)) < NEAR else unit.factor
    text = f"Depth and poses have different units: the depth must be multiplied by {value:.4g}"
    return [Finding("depth_unit", severity, f"{text}: {proof}.", f"depth_scale={value:.4g}", value)]


def _place_findings(place: DepthPlace, camera: Camera, period_s: float) -> list[Finding]:
    dx, dy = place.shift_px
    if place.delay_clear and abs(place.delay_frames) >= MIN_DELAY_FRAMES:
        text = (
            f"The depth images are those of about {abs(place.delay_frames):.0f} frames "
            f"{'later' if place.delay_frames > 0 else 'earlier'} ({abs(place.delay_frames) * period_s:.3f} s): "
            f"there, their edges lie {place.gain:.1f} times as well on those of the colour images"
        )
        return [Finding("depth_clock", WARNING, f"{text}.", value=place.delay_frames * period_s)]
    if place.clear and np.hypot(dx, dy) > MIN_SHIFT * camera.width:
        text = f"The depth lies {dx:.0f} pixels right and {dy:.0f} down of where the colour image shows the same edges"
        return [Finding("depth_shift", WARNING, f"{text}: it is not registered to the colour camera.", value=dx)]
    return []


def _shift_findings(shift: DepthShift, camera: Camera) -> list[Finding]:
    if not shift.clear or np.hypot(*shift.shift_px) < MIN_SHIFT * camera.width:
        return []
    return [Finding("depth_shift", WARNING, shift.sentence(), value=shift.shift_px[0])]


def _clock_findings(clock: DepthClock, period_s: float) -> list[Finding]:
    if not clock.clear or abs(clock.delay_frames) < MIN_DELAY_FRAMES:
        return []
    return [Finding("depth_clock", WARNING, clock.sentence(period_s), value=clock.delay_frames * period_s)]


def _image_findings(facts: ImageFacts) -> list[Finding]:
    return [Finding(kind, WARNING, text, value=value) for kind, text, value in facts.faults()]
