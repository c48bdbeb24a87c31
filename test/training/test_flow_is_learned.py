# SPDX-License-Identifier: Apache-2.0
"""The published loss, which never sees a flow, teaches the published OFlowNet to tell one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.training.kfnet_config import TrainConfig
from kfloc_ros.training.kfnet_family import HeldOutFrames
from kfloc_ros.training.kfnet_stages import FlowStage, StartWeights, samples_of, stage_of
from kfloc_ros.training.loop import train
from kfloc_ros.types import Frame
from studies.reference_networks import evaluate_oflownet, evaluate_zero_flow

CAMERA = Camera(128, 96, 110.0, 110.0, 64.0, 48.0)


class Wall(FrameSource):
    """A smooth picture on a wall 2 m away; between two frames the camera jumps sideways by a cell or two."""

    name = "wall"
    camera = CAMERA  # type: ignore[assignment]

    def __init__(self, seed: int, length: int) -> None:
        self._places_m = np.random.default_rng(seed).uniform(-0.22, 0.22, (length, 2))
        noise = np.random.default_rng(0).integers(0, 256, (14, 20, 3), dtype=np.uint8)
        self._picture = cv2.resize(noise, (600, 420), interpolation=cv2.INTER_CUBIC)

    def __len__(self) -> int:
        return len(self._places_m)

    def indices(self) -> range:
        return range(len(self))

    def __getitem__(self, position: int) -> Frame:
        x_m, y_m = self._places_m[position]
        v, u = np.mgrid[:96, :128].astype(np.float64)
        x, y = ((u - 64) / 55 + x_m) * 100 + 300, ((v - 48) / 55 + y_m) * 100 + 210
        image = cv2.remap(self._picture, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)
        depth_m, T = np.full((96, 128), 2.0, np.float32), make_pose(np.eye(3), [x_m, y_m, 0.0])
        return Frame(image, CAMERA, position * 33_000_000, position, depth_m=depth_m, T_map_camera=T)


@pytest.mark.slow
def test_flow_is_learned_from_warped_coordinates(tmp_path: Path) -> None:
    """For the first 700 steps the flow stays at nothing; then it is found, and holds where the camera has not been."""
    config = TrainConfig(steps=1200, halving_steps=2000, learning_rate=1e-3, augment="none", truncation=False)
    samples = samples_of("oflownet", Wall(1, 60), config)
    stage = stage_of("oflownet", samples, config, StartWeights())
    assert isinstance(stage, FlowStage)
    train(stage, samples, config, tmp_path, torch.device("cpu"))
    frames = HeldOutFrames(Wall(2, 24), CAMERA, torch.device("cpu"))
    still, learned = evaluate_zero_flow(frames, 12), evaluate_oflownet(stage.oflownet, frames, 12)
    assert still.median_cells > 1.0
    assert learned.median_cells < 0.4 * still.median_cells
    assert learned.prior_axis_median_m < 0.4 * still.prior_axis_median_m
