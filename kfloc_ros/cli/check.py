# SPDX-License-Identifier: Apache-2.0
"""``kfloc check``: the mistakes of a source that its own images show."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from
from kfloc_ros.errors import KflocError, SourceError

if TYPE_CHECKING:
    from kfloc_ros.frames import FrameSource
    from kfloc_ros.mapping.source_check import SourceCheck

DESCRIPTION = """\
Match points between some twenty pairs of images, and compare them with the source's poses, calibration and depth. A
mistake is told with its number and the option of the source that mends it. Takes some seconds.

Exit code 1 if something contradicts the images beyond doubt; warnings leave it 0.
"""
EPILOG = """\
examples:
  kfloc check tum:/data/office
  kfloc check 'tum:/data/office?poses=world_to_camera&depth_scale=5' --page check.html
"""
NO_CHECK = "--no-check"
REPLAY_PAIRS = 12


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc check``."""
    parser = subparsers.add_parser(
        "check",
        help="find mistakes in a source's poses, calibration and depth by its images",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--pairs", type=_count, default=24, metavar="N", help="pairs of images (default: 24)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings as JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write an HTML page with pictures of pairs")


def run(args: argparse.Namespace) -> int:
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


def add_no_check(parser: argparse.ArgumentParser) -> None:
    """Add the option that leaves the check out at the start of a command."""
    parser.add_argument(
        NO_CHECK, action="store_true", help="do not check poses, calibration and depth by the images (see kfloc check)"
    )


def check_first(source: FrameSource, *, skip: bool, use_poses: bool = True) -> SourceCheck | None:
    """Check a source before it is worked on; warnings go to stderr. Poses that are not used are not checked.

    Returns:
        The check; None if it is skipped.

    Raises:
        SourceError: the images contradict the source beyond doubt.
    """
    from kfloc_ros.mapping.source_check import check_source

    if skip:
        return None
    check = check_source(source, use_poses=use_poses)
    for finding in check.findings:
        if finding.severity != "error":
            print(f"Warning: {finding.text}", file=sys.stderr)
    if check.errors:
        text = " ".join(finding.text for finding in check.errors)
        mend = f" Add '{check.words}' to the source." if check.words else ""
        raise SourceError(f"'{check.name}' contradicts itself. {text}{mend} {NO_CHECK} goes on all the same.")
    return check


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
