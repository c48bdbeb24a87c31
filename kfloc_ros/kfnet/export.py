# SPDX-License-Identifier: Apache-2.0
"""Runs the measure and filter stages over a source and writes their results in KFNet's formats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kfloc_ros.coarse_stage import CoarseStage
from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.geometry.camera import ImageAdapter
from kfloc_ros.kfnet.files import MapDescription, write_coordinates, write_description, write_flow, write_pose
from kfloc_ros.kfnet.flow_choice import FlowKind, choose_flow
from kfloc_ros.kfnet.fusion import warp
from kfloc_ros.localizer_config import LocalizerConfig
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.stages import CoarseResult
from kfloc_ros.types import Frame


def export_coordinates(
    source: FrameSource,
    scene_map: SceneMap,
    config: LocalizerConfig,
    out: Path,
    *,
    flow: bool = False,
    truth: Path | None = None,
) -> Iterator[int]:
    """Write ``coord_<i>.npy`` of every frame, i counting from 0; yields each i.

    Args:
        source: of frames.
        scene_map: to localize in.
        config: of the localizer.
        out: folder for the maps and ``coordinates.json``.
        flow: also write the flow from each frame to the one before.
        truth: folder for the true poses, one file a frame, and ``gt_list.txt``.
    """
    stage = CoarseStage(scene_map, config)
    adapter = ImageAdapter(source.camera, stage.camera)
    for folder in filter(None, (out, truth)):
        folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    previous: CoarseResult | None = None
    description = MapDescription(stage.camera)
    for i, frame in enumerate(source):
        result = stage.process(Frame(adapter(frame.image), stage.camera, frame.stamp_ns, frame.index, frame.name))
        coordinates = result.scene_coordinates
        assert coordinates is not None  # the stage runs in this process
        write_coordinates(out, i, coordinates)
        if flow and previous is not None:
            _write_flow(out, i, previous, result, scene_map, FlowKind(config.oflownet))
        if truth is not None:
            write_pose(truth / f"gt_{i}.txt", frame.T_map_camera)
        description = MapDescription(stage.camera, coordinates.stride, coordinates.pixel_offset)
        entries.append({"map": f"coord_{i}.npy", "index": frame.index, "name": frame.name, "stamp_ns": frame.stamp_ns})
        previous = result
        yield i
    write_description(out, description, entries)
    if truth is not None:
        (truth / "gt_list.txt").write_text("".join(f"gt_{i}.txt\n" for i in range(len(entries))))


@torch.inference_mode()
def _write_flow(
    out: Path, i: int, previous: CoarseResult, result: CoarseResult, scene_map: SceneMap, kind: FlowKind
) -> None:
    if scene_map.kfnet is not None:  # the filter has just had them; anew, there is nothing that was carried
        filtered = result.filtered
        if filtered is not None and filtered.flow is not None and filtered.prior is not None:
            write_flow(out, i, i - 1, filtered.flow.offset, filtered.prior.variance)
        return
    if result.features is None or previous.features is None or previous.scene_coordinates is None:
        return
    features = result.features.coarse[0]
    chosen = choose_flow(kind, scene_map.calibration, features.device)
    flow = chosen.flow(features, previous.features.coarse[0])
    prior = warp(previous.scene_coordinates, flow, chosen.process_scale, chosen.process_floor_m2)
    write_flow(out, i, i - 1, flow.offset, prior.variance)
