# SPDX-License-Identifier: Apache-2.0
"""``kfloc sources`` and ``kfloc check``: the kinds of SOURCE, and the mistakes of one that its own images show."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.datasets import SOURCE_KINDS
from kfloc_ros.errors import KflocError

if TYPE_CHECKING:
    from kfloc_ros.mapping.source_check import SourceCheck

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


CHECK = """\
Match points between some twenty pairs of images, and compare them with the source's poses, calibration and depth. A
mistake is told with its number and the option of the source that mends it. Takes some seconds.

Exit code 1 if something contradicts the images beyond doubt; warnings leave it 0.
"""
CHECK_EXAMPLES = """\
examples:
  kfloc check tum:/data/office
  kfloc check 'tum:/data/office?poses=world_to_camera&depth_scale=5' --page check.html
"""
REPLAY_PAIRS = 12


def add_check_parser(subparsers: Any) -> None:
    """Register ``kfloc check``."""
    parser = subparsers.add_parser(
        "check",
        help="find mistakes in a source's poses, calibration and depth by its images",
        description=CHECK,
        epilog=CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--pairs", type=_count, default=24, metavar="N", help="pairs of images (default: 24)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with pictures of pairs")
    parser.set_defaults(run_action=run_check)


def run_check(args: argparse.Namespace) -> int:
    """Run ``kfloc check``; 1 if there is an error among the findings."""
    from kfloc_ros.mapping.source_check import check_source
    from kfloc_ros.mapping.source_pages import write_page

    check = check_source(open_source_from(args), pairs=args.pairs)
    print(report(check))
    if args.json is not None:
        args.json.write_text(json.dumps(check.to_dict(), indent=2) + "\n", encoding="utf-8")
    if args.page is not None:
        write_page(check, args.page)
    return 1 if check.errors else 0


def report(check: SourceCheck) -> str:
    """Return findings, notes and figures as text."""
    from kfloc_ros.mapping.source_pages import MEANINGS

    lines = [f"{finding.severity}: {finding.text}" for finding in check.findings]
    if check.words:
        lines.append(f"To mend: add '{check.words}' to the source (quote it for the shell).")
    lines += [f"note: {note}" for note in check.notes]
    if not lines:
        lines.append(f"No mistake was found in '{check.name}'.")
    figures = [f"{name:<22}{value:<10g}{MEANINGS.get(name, '')}".rstrip() for name, value in check.figures.items()]
    return "\n".join([*lines, "", *figures])


def check_bag(args: argparse.Namespace) -> None:
    """Check the bag of a replay, its truth included, before it is played; all findings go to stderr as warnings.

    A bag that cannot be read as a source is left to the replay, which says why.
    """
    from kfloc_ros.datasets import open_source
    from kfloc_ros.mapping.source_check import check_source

    truth = args.truth or ""
    words = {"image": args.image_topic, "info": args.camera_info_topic, "tf": args.tf}
    if truth.startswith("/"):
        words |= {"pose": truth, "body": args.truth_of}
    elif truth:  # a file, or frames of the transforms, of which the replay alone knows which
        words["pose"] = "none"
    options = "&".join(f"{name}={value}" for name, value in words.items() if value)
    try:
        check = check_source(open_source(f"bag:{args.bag}" + (f"?{options}" if options else "")), pairs=REPLAY_PAIRS)
    except KflocError:
        return
    for finding in check.findings:
        print(f"Warning: {finding.text}", file=sys.stderr)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 8 <= int(text) <= 200:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of pairs between 8 and 200")
    return int(text)
