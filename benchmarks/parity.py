# SPDX-License-Identifier: Apache-2.0
"""Comparison of PixLoc with numbers of the original: features, confidences and every iteration's pose.

    python benchmarks/parity.py ../shared/parity/pixloc_vgg19.npz --json out/parity.json

The exit code is 0 if everything agrees to 1e-5 with the same iterations and valid points, 1 if not, 2 without a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from kfloc_ros.cli.tables import format_table
from kfloc_ros.errors import KflocError
from studies.parity import compare


def main() -> int:
    """Compare and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="archive that the original wrote")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the figures here")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads; the original's had one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        report = compare(args.file)
    except KflocError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    figures = {**dataclasses.asdict(report), "agrees": report.agrees}
    print(format_table([(name, str(value)) for name, value in figures.items()]))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if report.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
