# SPDX-License-Identifier: Apache-2.0
"""Benchmark of a second visit: a recording localized in the map of another recording of the place, beside peers.

The localizer runs over the whole SOURCE in order. The peers see single frames (every --every-th): SIFT or DISK +
LightGlue matches with the reference views that the map's index retrieves, the depth of these views, and PnP. The table
has the localizer on all frames, and everyone on the peers' frames. "wrong" is the share of frames whose pose is claimed
(TRACKING, by the localizer) and is more than 10 cm or 10 degrees off. If the truth is not exact, --truth-sigma gives
its standard deviations, which are added to the covariance for NEES. The medians of methods that give poses on different
frames are not comparable, so a second table has the frames on which the localizer (in its first run) and a peer both
give one. "searched" is the share of frames, after the first pose, in which the whole map is searched; searches among
the views within reach of the last pose are not counted. --other-maps adds a row for the localizer with each of them,
such as the map after an update.

One frame that is taken otherwise changes all that follow, so a single run decides little. --runs N localizes N times:
once with the map as it is, then with 2 % of noise on the confidences of its points. The table has means, and "+-" the
standard deviation over the runs; the JSON file has both, and every run.

    python benchmarks/second_visit.py scannet:DATA/d435_office/test --mapped scannet:DATA/d435_office/map --map MAP \\
        --truth-sigma 0.02 1.0
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sift_pnp import SiftPnp
from tqdm import tqdm

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.cli.tables import format_table
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.evaluation.offline import localize_frames
from kfloc_ros.features.backbone import Backbone, BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.geometry.covariance import pose_tangent_error
from kfloc_ros.geometry.lie import Matrix, rotation_angle_deg
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap

RECALLS = ((0.02, 2.0), (0.05, 5.0), (0.10, 10.0), (0.25, 10.0))
WRONG_M, WRONG_DEG = 0.10, 10.0
CONFIDENCE_NOISE = 0.02
"""Relative standard deviation of the noise on the confidences of a map's points, from the second run on."""


class Matcher(Protocol):
    """Localizer of single images."""

    def locate(self, image: NDArray[np.uint8], features: BackboneFeatures) -> Matrix | None:
        """Return ``T_map_camera``, or None."""
        ...


@dataclass(frozen=True)
class Answer:
    """Pose of one frame, judged."""

    away_m: float
    """Infinite without a pose."""
    away_deg: float
    claimed: bool
    time_ms: float
    searched: bool = False
    """True if the whole map was searched, and there was a pose before."""
    nees: float = float("nan")


@dataclass(frozen=True)
class Row:
    """Figures of one method over frames."""

    method: str
    frames: int
    pose_given: float
    recalls: Mapping[str, float]
    median_m: float
    median_deg: float
    wrong: float
    searched: float
    median_nees: float
    median_ms: float
    mean_ms: float
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation over the runs, by the figure; empty for a single run."""
    runs: Sequence[Row] = ()
    """Every run; empty for a single one."""


def main() -> int:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder or name")
    parser.add_argument("--mapped", metavar="SOURCE", help="recording of the map, with depth, for the peers")
    parser.add_argument("--mapped-split", metavar="SPLIT", help="part of it that the map was made of")
    parser.add_argument("--other-maps", nargs="*", default=[], metavar="MAP", help="maps to compare with")
    parser.add_argument("--peers", nargs="*", choices=("sift", "disk"), default=["sift"], help="default: sift")
    parser.add_argument("--every", type=int, default=4, help="frames between two of the peers' (default: 4)")
    parser.add_argument("--views", type=int, default=5, help="views that peers retrieve (default: 5)")
    parser.add_argument("--keypoints", type=int, default=2048, help="of each image, by peers (default: 2048)")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="runs of the localizer (default: 1)")
    parser.add_argument("--truth-sigma", type=float, nargs=2, default=(0.0, 0.0), metavar=("M", "DEG"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    args = parser.parse_args()
    if args.peers and args.mapped is None:
        parser.error("the peers need --mapped; without peers, give --peers alone")
    if args.runs < 1:
        parser.error("--runs needs at least one run")
    try:
        source, scene_map = open_source_from(args, depth=False), SceneMap.load(resolve_map(args.map))
        own = [localizer_answers(source, noisy(scene_map, run), *args.truth_sigma) for run in range(args.runs)]
        rows = [mean_row([row("kfloc, all frames", list(answers.values())) for answers in own])]
        chosen = list(own[0])[:: args.every]
        peers_frames = [[answers[p] for p in chosen] for answers in own]
        rows.append(mean_row([row("kfloc, frames of the peers", answers) for answers in peers_frames]))
        shared: list[Row] = []
        for name in args.other_maps:
            other = SceneMap.load(resolve_map(name))
            runs = [localizer_answers(source, noisy(other, run), *args.truth_sigma) for run in range(args.runs)]
            title = f"kfloc, {Path(name).name}"
            rows.append(mean_row([row(title, list(answers.values())) for answers in runs]))
        for name in args.peers:
            mapped = open_source(args.mapped, poses=args.poses, split=args.mapped_split)
            title, answers = peer_answers(name, source, scene_map, mapped, chosen, args)
            rows.append(row(title, answers))
            shared += shared_rows(title, answers, peers_frames[0])
    except KflocError as error:
        print(error, file=sys.stderr)
        return 2
    names = [f"{100 * m:.0f} cm/{deg:.0f} deg" for m, deg in RECALLS]
    header = ["method", "frames", "pose", *names, "median", "wrong", "searched", "NEES", "ms a frame (mean)"]
    print(format_table([cells(r) for r in rows], header=header))
    if shared:
        print("\nFrames on which both methods give a pose:")
        print(format_table([cells(r) for r in shared], header=header))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in (*rows, *shared)], indent=1))
    return 0


def noisy(scene_map: SceneMap, run: int) -> SceneMap:
    """Return the map for a run: as it is for run 0, else with noise on the confidences of its points."""
    if run == 0:
        return scene_map
    generator = torch.Generator().manual_seed(run)

    def with_noise(confidence: torch.Tensor) -> torch.Tensor:
        return confidence * (1 + CONFIDENCE_NOISE * torch.randn(len(confidence), generator=generator))

    views = tuple(replace(view, confidence=with_noise(view.confidence)) for view in scene_map.references.views)
    return replace(scene_map, references=replace(scene_map.references, views=views))


def localizer_answers(
    source: FrameSource, scene_map: SceneMap, truth_sigma_m: float, truth_sigma_deg: float
) -> dict[int, Answer]:
    """Return the localizer's answers by the position of the frame, over the whole source in order."""
    truth_variance = np.diag([truth_sigma_m**2] * 3 + [np.deg2rad(truth_sigma_deg) ** 2] * 3)
    localizer = Localizer(scene_map, LocalizerConfig())
    positions = {index: position for position, index in enumerate(source.indices())}
    answers = {}
    for localized in tqdm(localize_frames(localizer, source), total=len(source), desc="localizing", unit="frame"):
        frame, estimate = localized.frame, localized.estimate
        truth = source.pose(positions[frame.index])
        if truth is None:
            continue
        nees = float("nan")
        if estimate.T_map_camera is not None and estimate.covariance is not None:
            error = pose_tangent_error(estimate.T_map_camera, truth)
            nees = float(error @ np.linalg.solve(estimate.covariance + truth_variance, error))
        answers[positions[frame.index]] = Answer(
            *_away(estimate.T_map_camera, truth),
            claimed=estimate.state.value == "TRACKING",
            time_ms=estimate.timings_ms.get("total", float("nan")),
            searched="relocalize" in estimate.timings_ms and any(np.isfinite(a.away_m) for a in answers.values()),
            nees=nees,
        )
    return answers


def peer_answers(
    name: str,
    source: FrameSource,
    scene_map: SceneMap,
    mapped: FrameSource,
    positions: Sequence[int],
    args: argparse.Namespace,
) -> tuple[str, list[Answer]]:
    """Return a peer's name and its answers.

    Raises:
        SourceError: the mapped source has no depth.
        WeightsError: the peer's packages are not installed.
    """
    if mapped[0].depth_m is None:
        raise SourceError(f"The peers need depth, and '{args.mapped}' has none.")
    matcher: Matcher
    if name == "sift":
        title, matcher = "SIFT + PnP", SiftPnp(scene_map, mapped, views=args.views, keypoints=args.keypoints)
    else:
        from disk_lightglue import DiskLightGlue

        title, matcher = (
            "DISK + LightGlue",
            DiskLightGlue(scene_map, mapped, views=args.views, keypoints=args.keypoints),
        )
    backbone, adapter = Backbone(), ImageAdapter(source.camera, scene_map.camera)
    answers = []
    for position in tqdm(positions, desc=title, unit="frame"):
        frame = source.read(position)
        if frame is None or frame.T_map_camera is None:
            continue
        image = adapter(frame.image)
        start = time.perf_counter()
        T = matcher.locate(image, backbone.extract(image))
        answers.append(Answer(*_away(T, frame.T_map_camera), T is not None, 1e3 * (time.perf_counter() - start)))
    return title, answers


def row(method: str, answers: Sequence[Answer]) -> Row:
    """Return the figures of a method."""
    away_m, away_deg = (np.array([getattr(a, key) for a in answers]) for key in ("away_m", "away_deg"))
    given = np.isfinite(away_m)
    wrong = np.array([a.claimed for a in answers]) & given & ((away_m > WRONG_M) | (away_deg > WRONG_DEG))
    nees = [a.nees for a in answers if np.isfinite(a.nees)]
    return Row(
        method=method,
        frames=len(answers),
        pose_given=float(given.mean()),
        recalls={f"{m}_{deg}": float(np.mean((away_m < m) & (away_deg < deg))) for m, deg in RECALLS},
        median_m=float(np.median(away_m[given])) if given.any() else float("nan"),
        median_deg=float(np.median(away_deg[given])) if given.any() else float("nan"),
        wrong=float(wrong.mean()),
        searched=float(np.mean([a.searched for a in answers])),
        median_nees=float(np.median(nees)) if nees else float("nan"),
        median_ms=float(np.median([a.time_ms for a in answers])),
        mean_ms=float(np.mean([a.time_ms for a in answers])),
    )


def shared_rows(title: str, peer: Sequence[Answer], own: Sequence[Answer]) -> list[Row]:
    """Return the rows of a peer and of the localizer over the frames on which both give a pose; empty without any."""
    both = [(a, b) for a, b in zip(peer, own, strict=True) if np.isfinite(a.away_m) and np.isfinite(b.away_m)]
    if not both:
        return []
    return [row(f"kfloc, shared with {title}", [b for _, b in both]), row(f"{title}, shared", [a for a, _ in both])]


def mean_row(runs: Sequence[Row]) -> Row:
    """Return the mean of several runs of one method over the same frames, with their spread."""
    if len(runs) == 1:
        return runs[0]
    first = runs[0]
    names = [f.name for f in fields(Row) if isinstance(getattr(first, f.name), float)]
    values = {name: np.array([getattr(r, name) for r in runs]) for name in names}
    recalls = {key: np.array([r.recalls[key] for r in runs]) for key in first.recalls}
    return replace(
        first,
        **{name: float(v.mean()) for name, v in values.items()},
        recalls={key: float(v.mean()) for key, v in recalls.items()},
        spread={key: float(v.std(ddof=1)) for key, v in {**values, **recalls}.items()},
        runs=tuple(runs),
    )


def cells(r: Row) -> list[str]:
    """Return the row as text; shares and medians of several runs with their standard deviation."""

    def text(key: str, value: float, unit: str, scale: float, digits: int) -> str:
        spread = f" +- {scale * r.spread[key]:.{digits}f}" if key in r.spread else ""
        return f"{scale * value:.{digits}f}{spread} {unit}"

    shares = [text(key, value, "%", 100, 1) for key, value in {"pose_given": r.pose_given, **r.recalls}.items()]
    median = f"{text('median_m', r.median_m, 'cm', 100, 2)}, {text('median_deg', r.median_deg, 'deg', 1, 2)}"
    rest = [text(key, getattr(r, key), "%", 100, 1) for key in ("wrong", "searched")]
    times = f"{r.median_ms:.0f} ({r.mean_ms:.0f})"
    return [r.method, str(r.frames), *shares, median, *rest, f"{r.median_nees:.1f}", times]


def _away(T: Matrix | None, truth: Matrix) -> tuple[float, float]:
    if T is None:
        return float("inf"), float("inf")
    return float(np.linalg.norm(T[:3, 3] - truth[:3, 3])), rotation_angle_deg(T[:3, :3].T @ truth[:3, :3])


if __name__ == "__main__":
    sys.exit(main())
