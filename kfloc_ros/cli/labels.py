# SPDX-License-Identifier: Apache-2.0
"""``kfloc labels``: scene-coordinate labels of a source, in the format of the original KFNet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from

DESCRIPTION = """\
Write a source with depth and poses as a folder that KFNet trains from: image_list.txt, label_list.txt (raw float32
H x W x 4: x, y, z in metres and a mask), transform.txt, and as additions camera.txt and pose_list.txt.
The folder is itself a SOURCE: kfnet:OUT.
"""

EPILOG = """\
example:
  kfloc labels 7scenes:DIR --split blocks50:train --eighth --out out/labels
  kfloc map build kfnet:out/labels --out maps/kitchen
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc labels``."""
    parser = subparsers.add_parser(
        "labels",
        help="write scene-coordinate labels in KFNet's format",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--eighth", action="store_true", help="labels of every eighth pixel: 1/64 of the size")


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    source = open_source_from(args)

    from tqdm import tqdm

    from kfloc_ros.datasets.labels import write_kfnet_folder

    written = write_kfnet_folder(source, args.out, full_resolution=not args.eighth)
    count = sum(1 for _ in tqdm(written, total=len(source), unit="frame", disable=not sys.stderr.isatty()))
    print(f"{args.out}: {count} labelled images of {len(source)}")
    return 0
