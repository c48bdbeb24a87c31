# SPDX-License-Identifier: Apache-2.0
"""What mapping a long recording takes: ``python long_recording.py pass 200 1000`` or ``... build 1200``.

Prints the peak of the process's memory in bytes, of ``pass`` after each count of views.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from textured_room import Room

from kfloc_ros.features.backbone import Backbone
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.mapping import mapping_pass, schedule
from kfloc_ros.mapping.build import MapBuildConfig, build_map
from kfloc_ros.mapping.point_evidence import EvidenceSettings, PointEvidence
from kfloc_ros.mapping.schedule import TimeBudget
from kfloc_ros.types import Frame

SMALL = Camera(160, 128, 130.0, 130.0, 79.5, 63.5)
LARGE = Camera(640, 480, 520.0, 520.0, 319.5, 239.5)
DIFFERENT_VIEWS = 48


class LongRecording(FrameSource):
    """A camera that sways in the room, there and back, for as long as asked for."""

    name = "long"

    def __init__(self, count: int, camera: Camera) -> None:
        self._count, self._camera, self._room = count, camera, Room(0)
        self._rendered: dict[int, Frame] = {}

    @property
    def camera(self) -> Camera:
        return self._camera

    def __len__(self) -> int:
        return self._count

    def indices(self) -> Sequence[int]:
        return range(self._count)

    def __getitem__(self, position: int) -> Frame:
        """A new frame every time, of one of a few views, which are rendered once."""
        view = abs(position % (2 * DIFFERENT_VIEWS) - DIFFERENT_VIEWS)
        if view not in self._rendered:
            self._rendered[view] = self._room.at(float(view), camera=self._camera)
        known = self._rendered[view]
        assert known.depth_m is not None
        return replace(
            known,
            image=known.image.copy(),
            depth_m=known.depth_m.copy(),
            index=position,
            stamp_ns=position * 100_000_000,
        )


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_pass(count: int) -> None:
    """One mapping pass whose limits on memory are reached with 200 views: a training buffer of 50,000 cells (20 MB)."""
    mapping_pass.MAX_CELLS = 50_000
    schedule.MAX_HELD_OUT = 16
    mapping_pass.PointEvidence = partial(PointEvidence, settings=EvidenceSettings(max_views=100))  # type: ignore[misc]
    settings = mapping_pass.MappingPassSettings(0, 100, 0.04, 2_000, 0)
    budget = TimeBudget(0.0, time.monotonic())
    recording = LongRecording(count, SMALL)
    mapping_pass.mapping_pass_over(recording, SMALL, Backbone(device="cpu"), settings, budget, lambda position: None)


def main(kind: str, *counts: str) -> None:
    torch.set_num_threads(1)
    for count in counts:
        if kind == "pass":
            run_pass(int(count))
        else:
            config = MapBuildConfig(train_seconds=600.0, train_steps=5, augmentations=0, device="cpu")
            with tempfile.TemporaryDirectory() as folder:
                build_map(LongRecording(int(count), LARGE), Path(folder) / "long", config)
        print(peak_bytes(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
