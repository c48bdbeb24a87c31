# SPDX-License-Identifier: Apache-2.0
"""``kfloc evaluate`` and ``kfloc compare``: a trajectory file against its truth, and two result folders."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kfloc_ros.errors import SourceError

if TYPE_CHECKING:
    from kfloc_ros.evaluation.metrics import PoseError
    from kfloc_ros.evaluation.trajectories import Pair

DESCRIPTION = """\
Judge a trajectory against its truth: medians, recall within (m, deg), share of poses that are far off and, if there are
confidences, how well they tell good poses from bad ones.

ESTIMATE and --truth are files of one of these forms, or result folders of `kfloc localize` and `kfloc replay`:
  tum      t tx ty tz qx qy qz qw                        camera to map, seconds
  rio10    seq02_02/frame-000000 qw qx qy qz tx ty tz    camera to map
  lamar    timestamp, device_id, qw, qx, qy, qz, tx, ty, tz    camera to map, microseconds; also CroCoDL
  mapfree  name qw qx qy qz tx ty tz [confidence]        map to camera; also hloc and PixLoc
  7scenes  a folder with *.pose.txt, 4x4 matrices        camera to map; also a folder of such folders

An image of the truth without an estimate is a failure. With stamps (tum), only estimates are judged, since a truth may
have more poses than there were images; --count truth changes that.
"""

EPILOG = """\
examples:
  kfloc evaluate out/kitchen --truth out/kitchen/groundtruth.tum
  kfloc evaluate results.txt --truth GT_RIO10.txt --depth rio10/ --intrinsics intrinsics.txt --stats stats.txt
  kfloc evaluate CAB_query_phone.txt --truth CAB/sessions/query_phone/proc/alignment_trajectories.txt
  kfloc evaluate poses.txt --form mapfree --truth /data/chess/seq-03 --require 'recall.5cm_5deg>=0.9'

exit codes: 0 done, 1 a requirement is not met, 2 invalid input
"""
STATISTICS_BINS = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``evaluate`` subcommand."""
    from kfloc_ros.evaluation.trajectories import FORMS

    parser = subparsers.add_parser(
        "evaluate",
        help="judge any trajectory file against its truth",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("estimate", metavar="ESTIMATE", type=Path, help="estimated poses")
    parser.add_argument("--truth", type=Path, required=True, metavar="PATH", help="true poses")
    parser.add_argument("--form", choices=tuple(FORMS), default="", metavar="FORM", help="form of ESTIMATE")
    parser.add_argument("--truth-form", choices=tuple(FORMS), default="", metavar="FORM", help="form of the truth")
    parser.add_argument(
        "--max-dt", type=float, default=0.02, metavar="S", help="largest distance of stamps, s (default: 0.02)"
    )
    parser.add_argument("--count", choices=("truth", "estimates"), default="", help="which images count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--errors", type=Path, metavar="FILE", help="write `name, m, deg, DCRE` of each image")
    parser.add_argument(
        "--require", action="append", default=[], metavar="FIGURE<=N", help="required figure; can be repeated"
    )
    group = parser.add_argument_group("RIO10")
    group.add_argument("--depth", type=Path, metavar="DIR", help="folder with seqXX_YY/*.rendered.depth.png: DCRE")
    group.add_argument("--intrinsics", type=Path, metavar="FILE", help="intrinsics.txt (default: in --depth)")
    group.add_argument("--stats", type=Path, metavar="FILE", help="stats.txt: errors by how much the scene changed")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc evaluate``; return 1 if a requirement is not met."""
    from kfloc_ros.cli.tables import format_table
    from kfloc_ros.evaluation.compare import parse_requirement
    from kfloc_ros.evaluation.trajectories import judged, paired, read_trajectory

    if not 0 <= args.max_dt < 3600:
        raise SourceError(f"--max-dt takes seconds, 0 or more, got {args.max_dt:g}.")
    requirements = [parse_requirement(text) for text in args.require]
    estimate = read_trajectory(args.estimate, args.form)
    truth_path = args.truth / "groundtruth.tum" if (args.truth / "groundtruth.tum").is_file() else args.truth
    truth = read_trajectory(truth_path, args.truth_form)
    pairs = paired(estimate, truth, max_dt_s=args.max_dt, count=args.count)
    judgement, errors = judged(pairs)
    figures: dict[str, float | None] = dict(judgement.figures())
    shares = _dcre(pairs, args.depth, args.intrinsics) if args.depth is not None else {}
    if shares:
        figures |= {
            f"dcre_below_{limit:g}": sum(value < limit for value in shares.values()) / len(pairs)
            for limit in (0.05, 0.15)
        }
        figures["dcre_from_0.5"] = sum(value >= 0.5 for value in shares.values()) / len(pairs)
    print(format_table([(name, _text(name, value)) for name, value in figures.items()]))
    if args.stats is not None:
        print("\nWithin 5 cm and 5 deg, by quarters of the images with the least to the most change:")
        print(format_table(_by_change(args.stats, pairs, errors), header=("", "1", "2", "3", "4")))
    if args.errors is not None:
        lines = [
            f"{pair.key} {error.translation_m:.6g} {error.rotation_deg:.6g} {shares.get(str(pair.key), math.nan):.6g}\n"
            for pair, error in zip(pairs, errors, strict=True)
            if pair.estimate is not None
        ]
        args.errors.write_text("".join(lines), encoding="utf-8")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    failures = [failure for item in requirements if (failure := item.failure(figures))]
    for failure in failures:
        print(f"Requirement not met: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _text(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    if name in ("frames", "localized"):
        return str(int(value))
    if name == "median_translation_m":
        return f"{100 * value:.2f} cm"
    if name == "median_rotation_deg":
        return f"{value:.3f} deg"
    return f"{value:.3f}" if name == "confidence_auc" else f"{100 * value:.1f} %"


def _dcre(pairs: list[Pair], folder: Path, intrinsics: Path | None) -> dict[str, float]:
    """Return RIO10's dense reprojection error of every estimate whose depth image is there."""
    from tqdm import tqdm

    from kfloc_ros.datasets.images import read_depth_m
    from kfloc_ros.datasets.seven_scenes import RIO10_DEPTH_UNIT_M, RIO10_WIDTH_PX, rio10_intrinsics
    from kfloc_ros.evaluation.trajectories import dcre
    from kfloc_ros.files import inside

    known = rio10_intrinsics(intrinsics or folder / "intrinsics.txt")
    found: dict[str, float] = {}
    for pair in tqdm(pairs, unit="image", disable=not sys.stderr.isatty()):
        name = str(pair.key)
        sequence = name.split("/")[0]
        places = [inside(folder, f"{prefix}{name}.rendered.depth.png") for prefix in ("", f"{sequence.split('_')[0]}/")]
        path = next((path for path in places if path.is_file()), None)
        if pair.estimate is None or path is None:
            continue
        if sequence not in known:
            raise SourceError(f"The intrinsics have no line for the sequence '{sequence}'.")
        depth_m = read_depth_m(path, RIO10_DEPTH_UNIT_M)
        scale = depth_m.shape[1] / RIO10_WIDTH_PX
        found[name] = dcre(pair.truth, pair.estimate, depth_m, tuple(scale * value for value in known[sequence]))
    if not found:
        raise SourceError(f"'{folder}' has no rendered depth image of an estimate, such as {pairs[0].key}.")
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _by_change(path: Path, pairs: list[Pair], errors: list[PoseError]) -> list[tuple[str, ...]]:
    """Return, for each statistic of RIO10's ``stats.txt``, the recall in quarters of the images."""
    from kfloc_ros.evaluation.metrics import recall
    from kfloc_ros.files import read_text

    try:
        header, *lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
        values = {words[0]: [float(word) for word in words[1:]] for words in lines}
    except (OSError, ValueError) as error:
        raise SourceError(f"'{path}' is no table 'frame STATISTIC ...': {error}") from error
    known = [(values[str(p.key)], e) for p, e in zip(pairs, errors, strict=True) if str(p.key) in values]
    if not known or any(len(row) != len(header) - 1 for row, _ in known):
        raise SourceError(f"'{path}' has no complete line for an image that is judged.")
    rows = []
    for column, name in enumerate(header[1:]):
        order = sorted(known, key=lambda item: item[0][column])
        cut = [len(order) * k // STATISTICS_BINS for k in range(STATISTICS_BINS + 1)]
        shares = [recall([e for _, e in order[a:b]], 0.05, 5.0) for a, b in itertools.pairwise(cut)]
        rows.append((name, *("-" if math.isnan(share) else f"{100 * share:.1f} %" for share in shares)))
    return rows


COMPARE = """\
Compare two result folders of `kfloc localize` or `kfloc replay`, metric by metric.

If the runs have different frames, the figures are of the frames that both have. Other differences are listed:
results for different ground truth or machines are not comparable.
"""

COMPARE_EXAMPLES = """\
examples:
  kfloc compare out/before out/after
  kfloc compare out/before out/after --html out/compare.html
  kfloc compare out/before out/after --require 'change.recall.5cm_5deg>=-0.02' --require 'latency_ms.p95<=100'

exit codes: 0 done, 1 a requirement is not met, 2 invalid input
"""


def add_compare_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``compare`` subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two result folders",
        description=COMPARE,
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", type=Path, help="result folder of the baseline (A)")
    parser.add_argument("second", metavar="B", type=Path, help="result folder to compare with it (B)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison as one HTML file")
    parser.add_argument(
        "--require", action="append", default=[], metavar="FIGURE<=N",
        help="required value of a metric in B's summary.json, or of change.METRIC (B minus A); can be repeated",
    )  # fmt: skip
    parser.set_defaults(run_action=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    """Run ``kfloc compare``; return 1 if a requirement is not met."""
    from kfloc_ros.cli.tables import format_table
    from kfloc_ros.evaluation.compare import (
        compare_page,
        compare_rows,
        differences,
        on_common_frames,
        parse_requirement,
        with_changes,
    )

    requirements = [parse_requirement(text) for text in args.require]
    common = on_common_frames((args.first, args.second))
    first, second = common.first, common.second
    marks = {1: "better", -1: "worse", 0: ""}
    rows = [(r.name, r.first, r.second, r.change, marks[r.verdict]) for r in compare_rows(first, second)]
    print(format_table(rows, header=("", str(args.first), str(args.second), "change", "")))
    if common.note:
        print(f"\n{common.note}")
    others = differences(first, second)
    print("\nOther differences: " + ("; ".join(others) if others else "nothing") + ".")
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(
            compare_page((str(args.first), str(args.second)), first, second, common.note), encoding="utf-8"
        )
    figures = with_changes(first, second)
    failures = [failure for item in requirements if (failure := item.failure(figures))]
    for failure in failures:
        print(f"Requirement not met: {failure}", file=sys.stderr)
    return 1 if failures else 0
