# SPDX-License-Identifier: Apache-2.0
"""``kfloc convert``: published weights of KFNet and PixLoc into files of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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


def add_parser(subparsers: Any) -> None:
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
