# SPDX-License-Identifier: Apache-2.0
"""Which mistakes, put into good recordings, does `kfloc check` find, and with the right value? None may be seen where
there is none.

    python benchmarks/source_check.py sim:map-quick 7scenes:DATA/7scenes/redkitchen scannet:DATA/d435_office/map

Prints a row for each recording and mistake. Exit code 1 if a good recording raises a finding, or with --require N if
fewer mistakes are found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.derived import Remembered
from kfloc_ros.datasets.posed_images import DepthFiles, PosedImage, PosedImages
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.mapping.source_check import SourceCheck, check_source
from studies.mistakes import MISTAKES, Mistake

KEPT_FRAMES, FAST_HZ = 160, 24.0
IN_FRAMES = ("offset", "rolling_shutter")
"""Kinds whose values are told in frames there and in seconds by the check."""


def hololens(root: Path) -> FrameSource:
    """Return the recording in a folder with intrinsics.json, poses_c2w.txt (its file names, then 3x4 poses)."""
    values = json.loads((root / "intrinsics.json").read_text(encoding="utf-8"))
    camera = Camera(*(values[name] for name in ("width", "height", "fx", "fy", "cx", "cy")))
    images = []
    for line in (root / "poses_c2w.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        color, depth, *numbers = line.split()
        T = np.eye(4)
        T[:3] = np.array(numbers, dtype=np.float64).reshape(3, 4)
        images.append(PosedImage(root / color, color, len(images) * 100_000_000, camera, T, root / depth))
    return PosedImages(root.name, images, depth=DepthFiles(1e-3))


def verdict(check: SourceCheck, mistake: Mistake) -> str:
    """Return ``found``, or what is wrong: ``missed``, ``other kind``, ``other value`` or ``and more``."""
    own = [finding for finding in check.findings if finding.kind == mistake.kind]
    if not own:
        return "other kind" if check.findings else "missed"
    value = own[0].value
    if mistake.value is not None and (value is None or abs(value - expected(check, mistake)) > limit(check, mistake)):
        return "other value"
    return "found" if len(check.findings) == 1 else "and more"


def expected(check: SourceCheck, mistake: Mistake) -> float:
    """Return the value of a mistake; offsets are told in frames there and in seconds by the check."""
    assert mistake.value is not None
    return mistake.value / check.figures["rate_hz"] if mistake.kind in IN_FRAMES else mistake.value


def limit(check: SourceCheck, mistake: Mistake) -> float:
    """Return how far from it the value may be."""
    return mistake.tolerance / check.figures["rate_hz"] if mistake.kind in IN_FRAMES else mistake.tolerance


def rows(name: str, source: FrameSource, is_video: bool) -> Iterator[tuple[str, str, str]]:
    """Return (mistake, verdict, findings) of a recording, as they come."""
    kept = Remembered(source, KEPT_FRAMES)
    started = time.process_time()
    check = check_source(kept)
    seconds = time.process_time() - started
    yield "none", "FALSE ALARM" if check.findings else "good", f"{seconds:.1f} s  {told(check)}"
    has = {"": True, "depth": "depth_known" in check.figures, "video": is_video}
    has["fast"] = is_video and check.figures["rate_hz"] > FAST_HZ
    for mistake in MISTAKES:
        if not has[mistake.needs]:
            continue
        check = check_source(mistake.make(kept))
        yield mistake.name, verdict(check, mistake), told(check)


def told(check: SourceCheck) -> str:
    """Return the findings of a check, short."""
    return "; ".join(
        f"{f.severity} {f.kind}" + ("" if f.value is None else f" {f.value:.4g}") + (f" [{f.words}]" if f.words else "")
        for f in check.findings
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="good recordings; hololens:DIR is one, too")
    parser.add_argument("--poses", choices=("file", "sfm"), default="file")
    parser.add_argument("--require", type=int, default=0, metavar="N", help="mistakes that must be found")
    args = parser.parse_args()
    found = alarms = count = 0
    for spec in args.sources:
        own = spec.startswith("hololens:")
        source = hololens(Path(spec.partition(":")[2])) if own else open_source(spec, poses=args.poses)
        for mistake, result, text in rows(spec, source, is_video=not spec.startswith("colmap:")):
            count += mistake != "none"
            found += result in ("found", "and more")
            alarms += result == "FALSE ALARM"
            print(f"{source.name:<16}{mistake:<34}{result:<12}{text}", flush=True)
    print(f"{found} of {count} mistakes found; {alarms} false alarms.")
    return 1 if alarms or found < args.require else 0


if __name__ == "__main__":
    sys.exit(main())
