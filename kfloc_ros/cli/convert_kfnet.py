# SPDX-License-Identifier: Apache-2.0
"""``kfloc convert kfnet-checkpoint``: original KFNet weights into files of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

NAME = "kfnet-checkpoint"

DESCRIPTION = """\
Read the variables of an original KFNet checkpoint from an .npz archive (name -> array) and write
scoordnet.safetensors and/or oflownet.safetensors into OUT, padded as TensorFlow pads. Where TensorFlow is
installed, this writes the archive; nothing of it is needed here:

  reader = tf.train.load_checkpoint("model.ckpt-500000")
  numpy.savez("kfnet.npz", **{n: reader.get_tensor(n) for n in reader.get_variable_to_shape_map()})
"""

EPILOG = """\
example:
  kfloc convert kfnet-checkpoint kfnet.npz --transform fire/transform.txt --out weights/fire
"""


def add_parser(actions: Any) -> None:
    """Register ``kfloc convert kfnet-checkpoint``."""
    parser = actions.add_parser(
        NAME,
        help="original KFNet (TensorFlow) weights",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("archive", type=Path, metavar="NPZ", help="name -> array archive of the checkpoint")
    parser.add_argument("--transform", type=Path, metavar="FILE", help="transform.txt of the scene, for SCoordNet")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="scale of an outdoor scene (default: 1)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the safetensors files")
    parser.set_defaults(run_action=run)


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from kfloc_ros.errors import WeightsError
    from kfloc_ros.kfnet.reference.frame import read_transform
    from kfloc_ros.kfnet.reference.weights import import_networks, read_archive, save_network

    frame = read_transform(args.transform, args.scale) if args.transform else None
    imported = import_networks(read_archive(args.archive), frame)
    if imported.scoordnet is not None and frame is None:
        raise WeightsError(
            "The archive holds a SCoordNet; name the scene's transform.txt with --transform, or its coordinates "
            "cannot be brought to the map."
        )
    for name, network in (("scoordnet", imported.scoordnet), ("oflownet", imported.oflownet)):
        if network is not None:
            path = args.out / f"{name}.safetensors"
            save_network(path, network)
            count = sum(p.numel() for p in network.parameters())
            print(f"{path}: {count:,} parameters")
    if imported.skipped:
        print(f"skipped {len(imported.skipped)} variables that no network has, such as '{imported.skipped[0]}'")
    return 0
