# SPDX-License-Identifier: Apache-2.0
"""Benchmark of trust: treated frames of which a wrong pose is claimed, on several maps.

Every treatment (wrong calibration, moved parts, blur, prints, other places; see studies/treatments.py) is applied to
frames of every scene, as single frames (the localizer is reset before each; what it knows of the camera stays) and as
streams, which begin treated, or after good frames (``--after``), which are not counted. A frame is falsely claimed
(``false_ok``) if its state is TRACKING without any sentence, and its pose is wrong: an error above 10 cm or 5 deg, a
normalised squared error (NEES) above 50, or any pose where none is right.

A scene is a map and a source with truth, followed by options of the source:

    python benchmarks/trust.py --scene demo_room sim:localize --scene MAP 7scenes:DIR split=blocks50:test poses=sfm
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kfloc_ros.cli.tables import format_table
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.evaluation.metrics import pose_error
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.types import Frame, Matrix
from studies.outcomes import Outcome, load, save, summarize, table
from studies.treatments import TREATMENTS, ZOOMS, Image, Treatment

PERIOD_NS = 100_000_000


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
    parser.add_argument("--length", type=int, default=10, help="treated frames of each stream (default: 10)")
    parser.add_argument("--after", type=int, default=0, help="good frames of a stream before these (default: 0)")
    parser.add_argument("--clean-factor", type=int, default=3, help="times as many frames that are clean (default: 3)")
    parser.add_argument("--first", action="store_true", help="run the first scene only; others lend it foreign images")
    parser.add_argument("--only", help="treatments whose name or group contains this text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary and every frame as JSON")
    parser.add_argument("--resume", action="store_true", help="keep what --json has, and run only what it has not")
    args = parser.parse_args()
    known = [*TREATMENTS, *(ZOOMS if args.after else ())]
    wanted = [t for t in known if not args.only or args.only in t.name or args.only == t.group]
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
                    save(args.json, outcomes)
                print(f"\r{scene.name}: {treatment.name:40s} {time.time() - start:.0f} s", end="", file=sys.stderr)
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    print(file=sys.stderr)
    rows, header = table(outcomes, list(dict.fromkeys(o.scene for o in outcomes)))
    print(format_table(rows, header=header))
    print(json.dumps(summarize(outcomes), indent=1))
    return 0


def run(scene: Scene, other: Sequence[Image], treatment: Treatment, args: argparse.Namespace) -> list[Outcome]:
    """Return the outcomes of one treatment in one scene; ``args`` are those of the command."""
    factor = args.clean_factor if treatment.group == "clean" else 1
    outcomes: list[Outcome] = []
    if args.frames and not treatment.frozen:
        single = _spread(len(scene.source), args.frames * factor)
        outcomes += localize(scene, other, treatment, "single", single)
    for plan in stream_positions(scene.source.indices(), args.streams * factor, args.length, args.after):
        outcomes += localize(scene, other, treatment, "stream", plan, args.after)
    return outcomes


def localize(
    scene: Scene, other: Sequence[Image], treatment: Treatment, mode: str, positions: Sequence[int], after: int = 0
) -> Iterator[Outcome]:
    """Localize frames, of which the first ``after`` are good; yield the outcome of each treated one."""
    localizer_config = LocalizerConfig(device="cpu")
    localizer = Localizer(scene.scene_map, localizer_config, _backbone())
    good, told = scene.source.camera, treatment.camera(scene.source.camera)
    adapters = ImageAdapter(good, localizer.camera), ImageAdapter(told, localizer.camera)
    first: Image | None = None
    stamp_ns = first_ns = 10**9
    for number, position in enumerate(positions):
        frame = scene.frame(position)
        if number < after:
            localizer.process(Frame(adapters[0](frame.image), localizer.camera, stamp_ns, position, source_camera=good))
            stamp_ns = first_ns = stamp_ns + PERIOD_NS
            continue
        image = treatment.paint(frame.image, other[position % len(other)], np.random.default_rng(position))
        if treatment.frozen:
            first = image if first is None else first
            image = first
        if mode == "single":
            localizer.reset("each frame for itself")
        seen = Frame(adapters[1](image), localizer.camera, stamp_ns, position, source_camera=told)
        estimate = localizer.process(seen).estimate
        repeated_s = 1e-9 * (stamp_ns - first_ns)
        stamp_ns += 10**10 if mode == "single" else PERIOD_NS * (4 if treatment.frozen else 1)
        if treatment.frozen and repeated_s <= localizer_config.max_repeat_s:
            continue  # within the time that a repeated image is allowed
        if frame.T_map_camera is None:
            continue
        T = estimate.T_map_camera
        error = pose_error(T, frame.T_map_camera)
        nees, sigma, inside = _nees(T, estimate.covariance, frame.T_map_camera, scene.truth_sigma)
        yield Outcome(
            scene.name,
            treatment.name,
            treatment.group,
            mode,
            frame.index,
            estimate.state.value,
            estimate.reason or localizer.camera_note,
            treatment.has_pose,
            None if T is None else error.translation_m,
            None if T is None else error.rotation_deg,
            nees,
            sigma,
            inside,
            estimate.timings_ms.get("total", 0.0),
            estimate.confidence,
            dict(estimate.evidence),
            number - after,
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


def stream_positions(indices: Sequence[int], count: int, length: int, after: int = 0) -> list[list[int]]:
    """Return runs of frames that follow each other: ``after`` good ones, and ``length`` to be treated.

    Runs that begin treated have every third frame if there are enough. Others have all, without gaps in the recording.

    Args:
        indices: ``Frame.index`` of each frame of the source.
        count: number of runs.
        length: treated frames of each run.
        after: frames before these.
    """
    whole = after + length
    step = 3 if not after and len(indices) >= 3 * length * max(count, 1) else 1
    starts = np.arange(max(len(indices) - step * whole, 0))
    if after and len(starts):
        ends = np.asarray(indices)[starts + whole - 1]
        starts = starts[ends - np.asarray(indices)[starts] == whole - 1]
    return [[int(starts[k]) + step * n for n in range(whole)] for k in (_spread(len(starts), count) if count else [])]


if __name__ == "__main__":
    sys.exit(main())
