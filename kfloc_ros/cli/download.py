# SPDX-License-Identifier: Apache-2.0
"""``kfloc download``: public data sets and weights, in the layout that the other commands expect."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kfloc_ros.datasets.downloads import COLLECTIONS, DATA, HLOC, TRAINING, Asset, assets_of, mirrored
from kfloc_ros.errors import DownloadError, KflocError

DESCRIPTION = """\
Download public data sets and weights into the layout that `kfloc pixloc run`, `kfloc train` and the sources expect.

This is the only command that uses the network. An interrupted download is continued by the same command; a file
appears only when it is complete, with its size and checksum checked where they are known. Archives are unpacked and
removed. Every collection has terms of use, which are shown and must be accepted.
"""

EPILOG = """\
examples:
  kfloc download --list
  kfloc download --select checkpoints Aachen CMU --CMU_slices 2
  kfloc download --select 7Scenes --scenes heads --only data
  kfloc download --select CMU MegaDepth --training --dry-run

then, for example:
  kfloc map build 7scenes:datasets/7Scenes/heads@train --out maps/heads
  kfloc pixloc run cmu --slices 2 --dataset datasets/CMU --dumps outputs/hloc/CMU --weights W.safetensors

exit codes: 0 everything is there, 1 something could not be downloaded, 2 invalid input
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``download`` subcommand."""
    parser = subparsers.add_parser(
        "download",
        help="download public data sets and weights into their layout",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--select", nargs="+", choices=tuple(COLLECTIONS), default=[], metavar="NAME",
        help=f"what to download: {', '.join(COLLECTIONS)}",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the collections with sizes and terms")
    parser.add_argument("--dry-run", action="store_true", help="print addresses and targets, without any connection")
    parser.add_argument("--scenes", "--parts", nargs="+", default=[], metavar="NAME", help="only these scenes or parts")
    parser.add_argument(
        "--CMU_slices", "--cmu-slices", dest="slices", nargs="+", default=[], metavar="N", help="only these CMU slices"
    )
    parser.add_argument("--training", action="store_true", help="also what only training needs")
    parser.add_argument(
        "--only", nargs="+", choices=(DATA, HLOC, TRAINING), default=[DATA, HLOC, TRAINING], metavar="ROOT",
        help="data: images and ground truth; hloc: models, lists and pairs; training: weights (default: all)",
    )  # fmt: skip
    folders = parser.add_argument_group("folders")
    folders.add_argument("--data", type=Path, default=Path("datasets"), metavar="DIR", help="default: datasets")
    folders.add_argument("--hloc", type=Path, default=Path("outputs/hloc"), metavar="DIR", help="default: outputs/hloc")
    folders.add_argument(
        "--weights", type=Path, default=Path("outputs/training"), metavar="DIR", help="default: outputs/training"
    )
    parser.add_argument("--accept-terms", action="store_true", help="accept the terms of what is selected, unasked")
    parser.add_argument("--keep-archives", action="store_true", help="keep archives after unpacking them")
    parser.add_argument(
        "--mirror", default="", metavar="URL", help="server that has the files below the names of their hosts"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc download``; return 1 if something could not be downloaded."""
    if args.list:
        print(_listing())
        return 0
    if not args.select:
        raise DownloadError("Nothing is selected: pass --select NAME, and --list to see what there is.")
    roots = {DATA: args.data, HLOC: args.hloc, TRAINING: args.weights}
    chosen: dict[str, tuple[Asset, ...]] = {}
    for name in dict.fromkeys(args.select):
        parts = args.slices if name == "CMU" and args.slices else args.scenes
        chosen[name] = assets_of(name, parts=parts, training=args.training, roots=args.only)
    wanted = [asset for items in chosen.values() for asset in items]
    if args.dry_run:
        for asset in wanted:
            print(f"{mirrored(asset.address, args.mirror)} -> {_target(asset, roots)} ({_size_text(asset)})")
        return 0
    for name in chosen:
        _accept(name, accepted=args.accept_terms)
    failures = [failure for asset in wanted if (failure := _download(asset, roots[asset.root], args))]
    for failure in failures:
        print(f"kfloc: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _download(asset: Asset, root: Path, args: argparse.Namespace) -> str:
    """Download one asset; return why it failed, or empty."""
    from tqdm import tqdm

    from kfloc_ros.datasets.transfer import obtain

    with tqdm(unit="B", unit_scale=True, disable=args.quiet or not sys.stderr.isatty(), desc=asset.name) as bar:

        def show(name: str, done: int, total: int | None) -> None:
            bar.set_description(name, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        try:
            is_new = obtain(
                asset, mirrored(asset.address, args.mirror), root, on_bytes=show, keep_archives=args.keep_archives
            )
        except (KflocError, OSError) as error:
            return " ".join(str(error).split())
    print(f"{asset.name}: {'done' if is_new else 'was there'}, in {root / asset.folder}", flush=True)
    return ""


def _accept(name: str, *, accepted: bool) -> None:
    """Show the terms of a collection and have the user accept them.

    Raises:
        DownloadError: they are not accepted.
    """
    collection = COLLECTIONS[name]
    print(f"{name}: {collection.terms}; see {collection.page}", flush=True)
    if accepted:
        return
    if not sys.stdin.isatty():
        raise DownloadError(
            f"The terms of '{name}' must be accepted: read {collection.page}, then pass --accept-terms."
        )
    if input("Do you accept these terms? Type yes: ").strip().lower() not in ("y", "yes"):
        raise DownloadError(f"The terms of '{name}' were not accepted; nothing was downloaded.")


def _target(asset: Asset, roots: dict[str, Path]) -> Path:
    folder = roots[asset.root] / asset.folder
    return folder if asset.is_listing else folder / asset.name


def _size_text(asset: Asset) -> str:
    if asset.size_bytes is not None:
        return f"{asset.size_bytes / 1e9:.2f} GB, {'SHA-256 known' if asset.sha256 else 'size checked'}"
    if asset.about_bytes is not None:
        return f"about {asset.about_bytes / 1e9:.0f} GB"
    return "folder" if asset.is_listing else "size told by the server"


def _listing() -> str:
    """Return the collections as a table, with the parts of each below it."""
    from kfloc_ros.cli.tables import format_table

    rows = []
    for name, item in COLLECTIONS.items():
        known = sum(asset.size_bytes or asset.about_bytes or 0 for asset in item.assets)
        rows.append((name, f"{known / 1e9:.0f} GB or more" if known else "not published", item.terms, item.text))
    table = format_table(rows, header=("NAME", "size", "terms", "content"))
    parts = [f"{name}: {', '.join(item.parts)}" for name, item in COLLECTIONS.items() if item.parts]
    return "\n".join([table, "", "parts, for --scenes or --CMU_slices:", *(f"  {line}" for line in parts)])
