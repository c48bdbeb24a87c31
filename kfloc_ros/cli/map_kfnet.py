# SPDX-License-Identifier: Apache-2.0
"""``kfloc map kfnet``: puts KFNet's reference networks into a map, for its coarse poses."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kfloc_ros.cli.arguments import add_source_arguments, open_source_from

DESCRIPTION = """\
Copy a map and put trained reference networks (`kfloc train`, `kfloc convert kfnet-checkpoint`) into the copy. The copy
has the family `reference`: all commands and nodes use its networks for measurement, flow and filter; alignment is
unchanged. The networks must be trained in the map's frame. SOURCE gives frames with depth and poses that were not used
for training: on them, the scales of the networks' sigmas and of the coarse covariance are calibrated. Without SOURCE
they are not calibrated.
"""

EPILOG = """\
example:
  kfloc map build 7scenes:DIR@train --out maps/kitchen
  kfloc map kfnet 7scenes:DIR@test --frames 0:100 --map maps/kitchen --scoordnet out/stage3/scoordnet.safetensors \\
      --oflownet out/stage3/oflownet.safetensors --out maps/kitchen_kfnet
  kfloc localize 7scenes:DIR@test --map maps/kitchen_kfnet --out out/kitchen_kfnet
"""


def add_kfnet(actions: Any) -> None:
    """Register ``kfloc map kfnet``."""
    parser = actions.add_parser(
        "kfnet",
        help="put trained reference networks into a copy of a map",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser, required=False)
    parser.add_argument("--map", required=True, metavar="MAP", help="map folder, or name of an installed map")
    parser.add_argument("--scoordnet", type=Path, required=True, metavar="FILE", help="weights")
    parser.add_argument("--oflownet", type=Path, required=True, metavar="FILE", help="weights")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the map folder to write")
    parser.add_argument("--force", action="store_true", help="replace an existing map")
    parser.add_argument(
        "--runs",
        type=int,
        default=8,
        metavar="N",
        help="number of runs of SOURCE's frames to calibrate on (default: 8)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    parser.set_defaults(run_action=run)


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc map kfnet``; print the description of the map."""
    source = None if args.source is None else open_source_from(args)

    from dataclasses import replace

    from tqdm import tqdm

    from kfloc_ros.cli.tables import describe
    from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
    from kfloc_ros.kfnet.reference.weights import load_oflownet, load_scoordnet
    from kfloc_ros.mapping.build import check_free
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.training.kfnet_family import calibrate_networks, with_networks

    check_free(args.out, overwrite=args.force)
    networks = ReferenceNetworks(load_scoordnet(args.scoordnet), load_oflownet(args.oflownet))
    made = with_networks(SceneMap.load(resolve_map(args.map)), networks)
    noted = {"kfnet": f"{args.scoordnet.name}, {args.oflownet.name}, not calibrated"}
    if source is not None:
        with tqdm(total=100, unit="%", disable=not sys.stderr.isatty()) as bar:

            def show(share: float, text: str) -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update(round(100 * share) - bar.n)

            made = calibrate_networks(made, source, args.runs, args.device, show)
        noted = {"kfnet": f"{args.scoordnet.name}, {args.oflownet.name}, calibrated on {source.name}"}
    made = replace(made, name=args.out.name, provenance={**made.provenance, **noted})
    made.save(args.out, overwrite=args.force)
    print(describe(SceneMap.load(args.out)))
    return 0
