# SPDX-License-Identifier: Apache-2.0
"""Benchmark of trust: treated frames of which a wrong pose is claimed, on several maps.

Every treatment (wrong calibration, moved parts, blur, prints, other places; see studies/treatments.py) is applied to
frames of every scene, as single frames (the localizer is reset before each; what it knows of the camera stays) and as
streams. A frame is falsely claimed (``false_ok``) if its state is TRACKING without any sentence, and its pose is wrong:
an error above 10 cm or 5 deg, a normalised squared error (NEES) above 50, or any pose where none is right.

A scene is a map and a source with truth, followed by options of the source:

    python benchmarks/trust.py --scene demo_room sim:localize --scene MAP 7scenes:DIR split=blocks50:test poses=sfm
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kfloc_ros.cli.tables import format_table
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.evaluation.metrics import auroc, pose_error
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState
from studies.treatments import TREATMENTS, Image, Treatment

MAX_M, MAX_DEG, MAX_NEES = 0.10, 5.0, 50.0
"""Errors above which a pose is wrong."""
PERIOD_NS = 100_000_000


@dataclass(frozen=True)
class Outcome:
    """Result of one frame."""

    scene: str
    treatment: str
    group: str
    mode: str
    """``single`` or ``stream``."""
    frame: int
    state: str
    said: str
    """Reason of the state, or the sentence on the camera."""
    has_pose: bool
    """False if no pose is right."""
    error_m: float | None
    error_deg: float | None
    nees: float | None
    sigma_m: float | None
    inside_sigma: float | None
    """Share of the six axes with an error inside one sigma."""
    total_ms: float
    confidence: float | None
    evidence: Mapping[str, float]

    @property
    def is_wrong(self) -> bool:
        """True if there is a pose, and it is wrong."""
        if self.error_m is None or self.error_deg is None:
            return False
        far = self.error_m > MAX_M or self.error_deg > MAX_DEG or (self.nees is not None and self.nees > MAX_NEES)
        return far or not self.has_pose

    @property
    def is_right(self) -> bool:
        """True if there is a pose within 10 cm and 5 deg of the truth."""
        if self.error_m is None or self.error_deg is None:
            return False
        return self.has_pose and self.error_m < MAX_M and self.error_deg < MAX_DEG

    @property
    def false_ok(self) -> bool:
        """True if a wrong pose is claimed without a word."""
        return self.state == TrackingState.TRACKING.value and not self.said and self.is_wrong


@dataclass(frozen=True)
class Scene:
    """Map with a source of frames with truth."""

    name: str
    scene_map: SceneMap
    source: FrameSource
    truth_sigma: tuple[float, float]
    """Standard deviations of the truth on each axis, metres and degrees."""
    frames: dict[int, Frame] = field(default_factory=dict)
    """Frames read so far, by position: every treatment starts from the same ones."""

    def frame(self, position: int) -> Frame:
        """Return a frame of the source."""
        if position not in self.frames:
            self.frames[position] = self.source[position]
        return self.frames[position]


def main() -> int:
    """Run the benchmark; print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scene",
        nargs="+",
        action="append",
        metavar="WORD",
        required=True,
        help="map, source, and options of the source: split=..., poses=..., frames=..., name=...; the truth's "
        "standard deviations on each axis, sigma_m=... and sigma_deg=..., are added for NEES; once for each scene",
    )
    parser.add_argument("--frames", type=int, default=12, help="single frames of each treatment (default: 12)")
    parser.add_argument("--streams", type=int, default=1, help="streams of each treatment (default: 1)")
    parser.add_argument("--length", type=int, default=10, help="frames of each stream (default: 10)")
    parser.add_argument("--clean-factor", type=int, default=3, help="times as many frames that are clean (default: 3)")
    parser.add_argument("--first", action="store_true", help="run the first scene only; others lend it foreign images")
    parser.add_argument("--only", help="treatments whose name or group contains this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary and every frame as JSON")
    parser.add_argument("--resume", action="store_true", help="keep what --json has, and run only what it has not")
    args = parser.parse_args()
    wanted = [t for t in TREATMENTS if not args.only or args.only in t.name or args.only == t.group]
    if args.resume and args.json is None:
        parser.error("--resume needs --json FILE, which has the pieces so far")
    start = time.time()
    try:
        outcomes = load(args.json) if args.resume and args.json.exists() else []
        done = {(o.scene, o.treatment) for o in outcomes}
        scenes = [_open(words) for words in args.scene]
        others = [_foreign(scenes, k) for k in range(len(scenes))]
        for scene, other in list(zip(scenes, others, strict=True))[: 1 if args.first else None]:
            for treatment in wanted:
                if (scene.name, treatment.name) in done:
                    continue
                outcomes += run(scene, other, treatment, args)
                if args.json is not None:
                    text = json.dumps({**summarize(outcomes), "outcomes": [asdict(o) for o in outcomes]})
                    (part := args.json.with_suffix(".part")).write_text(text)
                    part.replace(args.json)
                print(f"\r{scene.name}: {treatment.name:40s} {time.time() - start:.0f} s", end="", file=sys.stderr)
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    print(file=sys.stderr)
    rows, header = _table(outcomes, list(dict.fromkeys(o.scene for o in outcomes)))
    print(format_table(rows, header=header))
    print(json.dumps(summarize(outcomes), indent=1))
    return 0


def load(path: Path) -> list[Outcome]:
    """Return the outcomes in a JSON file of this benchmark."""
    try:
        return [Outcome(**outcome) for outcome in json.loads(path.read_text())["outcomes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not a result of this benchmark ({error}); give another --json FILE.") from error


def run(scene: Scene, other: Sequence[Image], treatment: Treatment, args: argparse.Namespace) -> list[Outcome]:
    """Return the outcomes of one treatment in one scene; ``args`` are those of the command."""
    factor = args.clean_factor if treatment.group == "clean" else 1
    outcomes: list[Outcome] = []
    for mode, plans in (
        ("single", [] if treatment.frozen else [_spread(len(scene.source), args.frames * factor)]),
        ("stream", _streams(scene.source, args.streams * factor, args.length)),
    ):
        for plan in plans:
            outcomes += _localize(scene, other, treatment, mode, plan)
    return outcomes


def summarize(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return the figures over all scenes and treatments."""
    treated = [o for o in outcomes if o.group != "clean"]
    clean = [o for o in outcomes if o.group == "clean"]
    medians = {s: _median(o.nees for o in clean if o.scene == s) for s in dict.fromkeys(o.scene for o in outcomes)}
    known = [m for m in medians.values() if m is not None]
    inside = [o.inside_sigma for o in clean if o.inside_sigma is not None]
    return {
        "frames": len(outcomes),
        "treated_frames": len(treated),
        "false_ok_share": _share(o.false_ok for o in treated),
        "clean_tracking_share": _share(o.state == TrackingState.TRACKING.value for o in clean),
        "worst_median_nees": max(known, key=lambda m: abs(np.log(m / 5.35))) if known else None,
        "median_nees": medians,
        "clean_inside_one_sigma": float(np.mean(inside)) if inside else None,
        "median_ms": _median(o.total_ms for o in clean),
        **_areas([o for o in outcomes if o.error_m is not None]),
    }


def _areas(posed: Sequence[Outcome]) -> dict[str, float | None]:
    """Return how well confidence and standard deviation tell right poses from wrong ones."""
    right = np.array([o.is_right for o in posed], dtype=bool)
    confidence = np.array([o.confidence if o.confidence is not None else 0.0 for o in posed])
    sigma = np.array([o.sigma_m if o.sigma_m is not None else np.inf for o in posed])
    return {"confidence_auroc": auroc(confidence, right), "sigma_auroc": auroc(-sigma, right)}


def _localize(
    scene: Scene, other: Sequence[Image], treatment: Treatment, mode: str, positions: Sequence[int]
) -> Iterator[Outcome]:
    localizer_config = LocalizerConfig(device="cpu")
    localizer = Localizer(scene.scene_map, localizer_config, _backbone())
    told = treatment.camera(scene.source.camera)
    adapter = ImageAdapter(told, localizer.camera)
    first: Image | None = None
    first_ns = 10**9
    for number, position in enumerate(positions):
        frame = scene.frame(position)
        image = treatment.paint(frame.image, other[position % len(other)], np.random.default_rng(position))
        if treatment.frozen:
            first = image if first is None else first
            image = first
        stamp_ns = first_ns + number * (4 if treatment.frozen else 1) * PERIOD_NS
        if mode == "single":
            localizer.reset("each frame for itself")
            stamp_ns = 10**9 * (10 * number + 1)
        seen = Frame(adapter(image), localizer.camera, stamp_ns, position, source_camera=told)
        estimate = localizer.process(seen).estimate
        repeated_s = 1e-9 * (stamp_ns - first_ns)
        if treatment.frozen and repeated_s <= localizer_config.max_repeat_s:
            continue  # within the time that a repeated image is allowed
        if frame.T_map_camera is not None:
            yield _outcome(scene, treatment, mode, frame, estimate, localizer.camera_note)


def _outcome(scene: Scene, treatment: Treatment, mode: str, frame: Frame, estimate: PoseEstimate, note: str) -> Outcome:
    T, truth = estimate.T_map_camera, frame.T_map_camera
    assert truth is not None
    error = pose_error(T, truth)
    nees, sigma, inside = _nees(T, estimate.covariance, truth, scene.truth_sigma)
    return Outcome(
        scene.name,
        treatment.name,
        treatment.group,
        mode,
        frame.index,
        estimate.state.value,
        estimate.reason or note,
        treatment.has_pose,
        None if T is None else error.translation_m,
        None if T is None else error.rotation_deg,
        nees,
        sigma,
        inside,
        estimate.timings_ms.get("total", 0.0),
        estimate.confidence,
        dict(estimate.evidence),
    )


def _nees(
    T: Matrix | None, covariance: Matrix | None, truth: Matrix, truth_sigma: tuple[float, float]
) -> tuple[float | None, float | None, float | None]:
    """Return NEES, the standard deviation of the position, and the share of axes inside one sigma."""
    if T is None or covariance is None:
        return None, None, None
    error = pose_tangent_error(T, truth)
    of_truth = np.repeat([truth_sigma[0] ** 2, np.radians(truth_sigma[1]) ** 2], 3)
    total = covariance + np.diag(of_truth)
    inside = float(np.mean(np.abs(error) < np.sqrt(np.diag(total))))
    return float(error @ np.linalg.solve(total, error)), float(np.sqrt(np.trace(covariance[:3, :3]))), inside


_shared: list[Backbone] = []


def _backbone() -> Backbone:
    if not _shared:
        _shared.append(Backbone())
    return _shared[0]


def _open(words: Sequence[str]) -> Scene:
    if len(words) < 2:
        raise SourceError("--scene needs a map and a source, such as: --scene demo_room sim:localize")
    options = dict(word.partition("=")[::2] for word in words[2:])
    name = options.pop("name", Path(words[0]).name)
    sigma = float(options.pop("sigma_m", 0.0)), float(options.pop("sigma_deg", 0.0))
    unknown = set(options) - {"split", "poses", "frames"}
    if unknown:
        raise SourceError(
            f"--scene has no option '{min(unknown)}'; it has split, poses, frames, name, sigma_m and sigma_deg."
        )
    source = open_source(words[1], depth=False, **options)
    return Scene(name, SceneMap.load(resolve_map(words[0])), source, sigma)


def _foreign(scenes: Sequence[Scene], k: int) -> list[Image]:
    """Return images of another scene; for a single scene, its own upside down."""
    source = scenes[(k + 1) % len(scenes)].source
    if scenes[(k + 1) % len(scenes)].source.name == scenes[k].source.name and len(scenes) > 2:
        source = scenes[(k + 2) % len(scenes)].source
    images = [source[p].image for p in _spread(len(source), 7)]
    return images if source is not scenes[k].source else [np.ascontiguousarray(i[::-1]) for i in images]


def _spread(length: int, count: int) -> list[int]:
    """Return equally spaced positions."""
    return [int(p) for p in np.linspace(0, length - 1, min(count, length) + 2)[1:-1]]


def _streams(source: FrameSource, count: int, length: int) -> list[list[int]]:
    """Return runs of frames that follow each other, every third one if there are enough."""
    step = 3 if len(source) >= 3 * length * max(count, 1) else 1
    starts = _spread(len(source) - step * length, count) if count else []
    return [[start + step * k for k in range(length)] for start in starts]


def _table(outcomes: Sequence[Outcome], scenes: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    header = ["treatment", "frames", "TRACKING, silent %", "false ok %"]
    header += [f"{scene}: false ok % / err cm / NEES" for scene in scenes]
    rows = []
    for treatment in dict.fromkeys(o.treatment for o in outcomes):
        mine = [o for o in outcomes if o.treatment == treatment]
        silent = _share(o.state == TrackingState.TRACKING.value and not o.said for o in mine)
        row = [treatment, str(len(mine)), f"{100 * silent:.0f}", f"{100 * _share(o.false_ok for o in mine):.0f}"]
        for scene in scenes:
            here = [o for o in mine if o.scene == scene]
            error, nees = _median(o.error_m for o in here), _median(o.nees for o in here)
            figures = [f"{100 * _share(o.false_ok for o in here):.0f}"]
            figures += ["-" if error is None else f"{100 * error:.1f}", "-" if nees is None else f"{nees:.1f}"]
            row.append(" / ".join(figures))
        rows.append(row)
    return rows, header


def _share(values: Iterable[bool]) -> float:
    chosen = list(values)
    return sum(chosen) / len(chosen) if chosen else 0.0


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None


if __name__ == "__main__":
    sys.exit(main())
