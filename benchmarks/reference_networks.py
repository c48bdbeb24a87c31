# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the reference networks at 640x480, and of the per-cell U-Net for several chunk sizes.

    python benchmarks/reference_networks.py --device cpu --repeat 3 --json out/reference_networks.json

Memory is the peak minus that of the weights: torch's allocator on a GPU, the process's high-water mark on a CPU
(which cannot fall below an earlier row's, so rows run from the smallest chunk to the largest).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kfloc_ros.cli.tables import format_table
from kfloc_ros.device import choose_device, describe_hardware
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet

HEIGHT, WIDTH = 480, 640


def measure(work: Callable[[], object], device: torch.device, repeat: int) -> tuple[float, float]:
    """Return median milliseconds and peak megabytes of ``work``, after one run to warm up."""
    before = _peak_mb(device)
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:]), _peak_mb(device) - before


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> int:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed runs of each row")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[80, 400, 1200, 4800], metavar="CELLS")
    parser.add_argument("--skip-scoordnet", action="store_true", help="its 233 GMAC take seconds on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    flow_net = ReferenceOFlowNet().to(device).eval()
    image = torch.rand(1, 3, HEIGHT, WIDTH, device=device) * 255
    rows: list[dict[str, float | str]] = []

    def add(name: str, work: Callable[[], object]) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms, mb = measure(work, device, args.repeat)
        rows.append({"name": name, "ms": round(ms, 2), "peak_mb": round(mb, 1)})

    with torch.inference_mode():
        features = flow_net.features(image)[0]
        add("OFlowNet features", lambda: flow_net.features(image))
        for chunk in sorted(args.chunks):
            flow_net.chunk = chunk
            add(f"window U-Net, chunks of {chunk} cells", lambda: flow_net.flow(features, features.flip(2)))
        if not args.skip_scoordnet:
            net = ReferenceSCoordNet().to(device).eval()
            add("SCoordNet", lambda: net(image))
    print(format_table([(str(r["name"]), f"{r['ms']} ms", f"{r['peak_mb']} MB") for r in rows]))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        hardware = describe_hardware(device.type)
        args.json.write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
