# SPDX-License-Identifier: Apache-2.0
"""Sources of frames: ``open_source("7scenes:DIR")`` and friends."""

from __future__ import annotations

from pathlib import Path

from kfloc_ros.datasets.base import FrameSource, Selection, select
from kfloc_ros.errors import SourceError

__all__ = ["SOURCE_KINDS", "FrameSource", "Selection", "open_source", "select"]

SOURCE_KINDS = {
    "7scenes": "a folder with frame-000000.color.png|jpg, .depth.png, .pose.txt (or one seq-* folder in it); "
    "DIR@train and DIR@test are a scene's official split",
    "kfnet": "a folder with image_list.txt and, for maps, label_list.txt, as the original KFNet takes it",
    "12scenes": "a scene's folder with info.txt, split.txt and data/; @train or @test for a part of its split",
    "cambridge": "a scene's folder with dataset_train.txt and dataset_test.txt; @train or @test for one of them",
    "bag": "a rosbag2 folder as `kfloc bag make` writes it",
    "sim": "the rendered room of the demo: sim:map, sim:localize, or the shorter sim:map-quick, sim:localize-quick",
}
"""Prefix of a SOURCE and what it holds."""


def open_source(
    spec: str, *, poses: str = "file", frames: str | None = None, split: str | None = None, depth: bool = True
) -> FrameSource:
    """Open ``KIND:PATH`` and keep the frames asked for.

    Args:
        spec: such as ``7scenes:/data/redkitchen/seq-01`` or ``bag:/data/kitchen_bag``.
        poses: which ground truth, where a source has several (``file`` or ``sfm``).
        frames: see :func:`select`.
        split: see :func:`select`.
        depth: read the depth images; without, a 7-Scenes frame loads a hundred times faster.

    Raises:
        SourceError: unknown kind, missing or damaged data, or an empty selection.
    """
    kind, separator, path = spec.partition(":")
    if not separator or kind not in SOURCE_KINDS:
        known = "; ".join(f"{name}:PATH ({text})" for name, text in SOURCE_KINDS.items())
        raise SourceError(f"A SOURCE is written KIND:PATH, got '{spec}'. Known: {known}.")
    if kind == "7scenes":
        from kfloc_ros.datasets.official import seven_scenes, split_part
        from kfloc_ros.datasets.seven_scenes import SevenScenes

        root, part = split_part(path)
        source: FrameSource = (
            seven_scenes(root, part, poses=poses, depth=depth) if part else SevenScenes(root, poses=poses, depth=depth)
        )
    elif kind == "12scenes":
        from kfloc_ros.datasets.official import split_part
        from kfloc_ros.datasets.twelve_scenes import TwelveScenes

        source = TwelveScenes(*split_part(path), depth=depth)
    elif kind == "cambridge":
        from kfloc_ros.datasets.cambridge import Cambridge
        from kfloc_ros.datasets.official import split_part

        source = Cambridge(*split_part(path))
    elif kind == "kfnet":
        from kfloc_ros.datasets.kfnet import KfnetFolder

        source = KfnetFolder(Path(path), depth=depth)
    elif kind == "sim":
        from kfloc_ros.simulation.source import SimulatedSource

        source = SimulatedSource.from_name(path)
    else:
        from kfloc_ros.datasets.bag import BagSource

        source = BagSource(Path(path), depth=depth)
    return select(source, frames=frames, split=split)
