# SPDX-License-Identifier: Apache-2.0
"""The committed map of the test room is what today's builder makes, and is small."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from textured_room import MAPPED_VIEWS, POINTS_PER_VIEW, build_room_map

from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.maps.scene_map import SceneMap


@pytest.fixture(scope="module")
def built_anew(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build_room_map(tmp_path_factory.mktemp("built") / "room").path
    assert path is not None
    return path


def position_errors_m(folder: Path, room: Any) -> list[float]:
    """Of every fifth view that the map was not built from; infinite where no pose is claimed."""
    localizer = Localizer(SceneMap.load(folder), LocalizerConfig(device="cpu"))
    errors = []
    for position in range(2, MAPPED_VIEWS, 5):
        frame = room[position]
        T = localizer.process(replace(frame, depth_m=None, T_map_camera=None)).estimate.T_map_camera
        errors.append(np.inf if T is None else float(np.linalg.norm(T[:3, 3] - frame.T_map_camera[:3, 3])))
    return errors


def layout(value: Any) -> Any:
    """The keys of a description, and the types of what they hold."""
    if isinstance(value, dict):
        return {key: layout(inner) for key, inner in value.items()}
    return [layout(inner) for inner in value] if isinstance(value, list) else type(value).__name__


def tensors(folder: Path) -> dict[str, dict[str, tuple[torch.dtype, torch.Size]]]:
    files = sorted(folder.glob("*.safetensors"))
    return {file.name: {key: (t.dtype, t.shape) for key, t in load_file(file).items()} for file in files}


def test_the_committed_map_is_small_and_localizes_to_a_centimetre(room_map: Path, room: Any) -> None:
    assert sum(path.stat().st_size for path in room_map.iterdir()) < 320_000
    errors = position_errors_m(room_map, room)
    assert np.median(errors) < 0.01 and max(errors) < 0.03


@pytest.mark.slow
def test_the_map_built_anew_has_the_same_layout(room_map: Path, built_anew: Path) -> None:
    descriptions = [yaml.safe_load((folder / "map.yaml").read_text()) for folder in (room_map, built_anew)]
    assert layout(descriptions[0]) == layout(descriptions[1])
    assert tensors(room_map) == tensors(built_anew)


@pytest.mark.slow
def test_the_map_built_anew_has_the_same_views_and_figures(room_map: Path, built_anew: Path, room: Any) -> None:
    """Points and poses are the same; what is trained differs by machine, and so do the figures measured with it."""
    committed, made = SceneMap.load(room_map), SceneMap.load(built_anew)
    assert committed.camera == made.camera and committed.references.ids == made.references.ids
    assert np.allclose(committed.references.T_map_camera, made.references.T_map_camera)
    assert all(len(view) == POINTS_PER_VIEW for view in made.references.views)
    assert np.allclose(committed.bounds_m, made.bounds_m, atol=0.01)
    figures = [asdict(scene_map.calibration) for scene_map in (committed, made)]
    ratios = {name: figures[1][name] / value for name, value in figures[0].items() if isinstance(value, float)}
    assert {name: ratio for name, ratio in ratios.items() if not 0.4 < ratio < 2.5} == {}
    errors = position_errors_m(built_anew, room)
    assert np.median(errors) < 0.01 and max(errors) < 0.03
