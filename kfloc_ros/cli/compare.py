# SPDX-License-Identifier: Apache-2.0
"""``kfloc compare``: comparison of two result folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = """\
Compare two result folders of `kfloc localize` or `kfloc replay`, metric by metric.

If the runs have different frames, the figures are of the frames that both have. Other differences are listed:
results for different ground truth or machines are not comparable.
"""

EPILOG = """\
examples:
  kfloc compare out/before out/after
  kfloc compare out/before out/after --html out/compare.html
  kfloc compare out/before out/after --require 'change.recall.5cm_5deg>=-0.02' --require 'latency_ms.p95<=100'

exit codes: 0 done, 1 a requirement is not met, 2 invalid input
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``compare`` subcommand."""
    parser = subparsers.add_parser(
        "compare",
        help="compare two result folders",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", metavar="A", type=Path, help="result folder of the baseline (A)")
    parser.add_argument("second", metavar="B", type=Path, help="result folder to compare with it (B)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison as one HTML file")
    parser.add_argument(
        "--require", action="append", default=[], metavar="FIGURE<=N",
        help="required value of a metric in B's summary.json, or of change.METRIC (B minus A); can be repeated",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
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
