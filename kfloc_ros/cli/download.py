# SPDX-License-Identifier: Apache-2.0
"""``kfloc download``: public data sets and weights, in the layout that the other commands expect.

``kfloc convert``: published weights of KFNet and PixLoc into files of this package.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

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


KFNET = """\
Convert an original KFNet checkpoint, given as an .npz archive (name -> array), into scoordnet.safetensors and/or
oflownet.safetensors in OUT, with TensorFlow's padding. The archive is made where TensorFlow is installed; `kfloc`
itself does not need TensorFlow:

  reader = tf.train.load_checkpoint("model.ckpt-500000")
  numpy.savez("kfnet.npz", **{n: reader.get_tensor(n) for n in reader.get_variable_to_shape_map()})
"""

KFNET_EXAMPLE = """\
example:
  kfloc convert kfnet-checkpoint kfnet.npz --transform fire/transform.txt --out weights/fire
"""

PIXLOC = """\
Convert checkpoint_best.tar of PixLoc (pixloc_cmu, pixloc_megadepth, or your own training with the original code) into a
safetensors file that contains its configuration. No code in the checkpoint is executed, and every entry must fit the
network.
"""

PIXLOC_EXAMPLE = """\
example:
  kfloc convert pixloc-checkpoint pixloc_megadepth/checkpoint_best.tar --out weights/pixloc_megadepth.safetensors
"""


def add_convert_parser(subparsers: Any) -> None:
    """Register ``kfloc convert``."""
    parser = subparsers.add_parser("convert", help="convert published weights of KFNet and PixLoc")
    actions = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    kfnet = actions.add_parser(
        "kfnet-checkpoint",
        help="original KFNet (TensorFlow) weights",
        description=KFNET,
        epilog=KFNET_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kfnet.add_argument("archive", type=Path, metavar="NPZ", help="name -> array archive of the checkpoint")
    kfnet.add_argument("--transform", type=Path, metavar="FILE", help="transform.txt of the scene, for SCoordNet")
    kfnet.add_argument("--scale", type=float, default=1.0, metavar="S", help="scale of an outdoor scene (default: 1)")
    kfnet.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the safetensors files")
    kfnet.set_defaults(run_action=run_kfnet)
    pixloc = actions.add_parser(
        "pixloc-checkpoint",
        help="original PixLoc checkpoint",
        description=PIXLOC,
        epilog=PIXLOC_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pixloc.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint_best.tar")
    pixloc.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    pixloc.set_defaults(run_action=run_pixloc)


def run_kfnet(args: argparse.Namespace) -> int:
    """Run ``kfloc convert kfnet-checkpoint``; print the files written."""
    from kfloc_ros.errors import WeightsError
    from kfloc_ros.kfnet.reference.scoordnet import read_transform
    from kfloc_ros.kfnet.reference.weights import import_networks, read_archive, save_network

    frame = read_transform(args.transform, args.scale) if args.transform else None
    imported = import_networks(read_archive(args.archive), frame)
    if imported.scoordnet is not None and frame is None:
        raise WeightsError(
            "The archive contains a SCoordNet: give the scene's transform.txt with --transform, which transforms its "
            "coordinates into the map frame."
        )
    for name, network in (("scoordnet", imported.scoordnet), ("oflownet", imported.oflownet)):
        if network is not None:
            path = args.out / f"{name}.safetensors"
            save_network(path, network)
            count = sum(p.numel() for p in network.parameters())
            print(f"{path}: {count:,} parameters")
    if imported.skipped:
        print(f"skipped {len(imported.skipped)} variables of no known network, such as '{imported.skipped[0]}'")
    return 0


def run_pixloc(args: argparse.Namespace) -> int:
    """Run ``kfloc convert pixloc-checkpoint``; print the file written."""
    from kfloc_ros.pixloc.reference.checkpoint import read_checkpoint
    from kfloc_ros.pixloc.reference.model import save_model

    read = read_checkpoint(args.checkpoint)
    model, config = read.model, read.model.config
    save_model(args.out, model, origin=f"{args.checkpoint.parent.name}/{args.checkpoint.name}")
    epoch = "" if read.epoch is None else f", epoch {read.epoch}"
    print(f"{args.out}: {config.extractor.encoder}, {sum(p.numel() for p in model.parameters()):,} parameters{epoch}")
    if config.learned_damping:
        print("damping (tx ty tz rx ry rz of the query camera):")
        for level, stride in enumerate(config.extractor.strides):
            print(f"  stride {stride:2d}: " + " ".join(f"{value:.3g}" for value in model.damping(level).tolist()))
    if read.unknown_options:
        print("unknown options in the checkpoint, not used: " + ", ".join(read.unknown_options))
    return 0
