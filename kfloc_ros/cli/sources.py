# SPDX-License-Identifier: Apache-2.0
"""``kfloc sources``: the kinds of SOURCE, with the files that each expects and an example."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from kfloc_ros.datasets import SOURCE_KINDS

DESCRIPTION = """\
List the kinds of SOURCE that commands such as `kfloc localize` and `kfloc map build` read: the files that each kind
expects, and an example. A SOURCE is written KIND:PATH; KIND: can be left out if the files identify the kind.
"""

EPILOG = """\
examples:
  kfloc sources
  kfloc sources bag
"""

EXAMPLES = {
    "7scenes": "7scenes:/data/redkitchen@train",
    "kfnet": "kfnet:out/labels",
    "12scenes": "12scenes:/data/apt1/kitchen@test",
    "cambridge": "cambridge:/data/ShopFacade@train",
    "deeploc": "deeploc:/data/deeploc@test",
    "colmap": "colmap:/data/office",
    "tum": "tum:/data/rgbd_dataset_freiburg1_desk",
    "openloris": "openloris:/data/office1-1",
    "euroc": "'euroc:/data/V1_01_easy?sensor=cam1'",
    "rio10": "rio10:/data/seq02/seq02_01",
    "indoor6": "indoor6:/data/scene1@train",
    "capture": "'capture:/data/CAB/sessions/query_phone@queries'",
    "transforms": "transforms:/data/office/transforms.json",
    "scannet": "scannet:/data/scene0000_00",
    "bag": "'bag:walk?image=/camera/color/image_raw&pose=/mocap'",
    "images": "images:photos",
    "video": "'video:walk.mp4?every=10'",
    "sim": "sim:localize-quick",
}
"""Example of each kind, quoted for a shell if necessary."""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc sources``."""
    parser = subparsers.add_parser(
        "sources",
        help="list the kinds of SOURCE that commands read",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", choices=tuple(SOURCE_KINDS), metavar="KIND", help="only this kind")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc sources``; print the kinds and return 0."""
    kinds = SOURCE_KINDS if args.kind is None else {args.kind: SOURCE_KINDS[args.kind]}
    print("\n".join(render_kind(kind, text) for kind, text in kinds.items()))
    return 0


def render_kind(kind: str, text: str) -> str:
    """Return the lines that describe one kind of SOURCE."""
    lines = textwrap.wrap(text, 100, initial_indent=f"{kind + ':PATH':<17}", subsequent_indent=" " * 17)
    return "\n".join([*lines, f"{'':<17}example: {EXAMPLES[kind]}"])
