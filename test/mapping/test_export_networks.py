# SPDX-License-Identifier: Apache-2.0
"""Export of a map's networks as ONNX: the files compute the head's points, and bad targets are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.cli import main as cli
from kfloc_ros.errors import ConfigError, MapError
from kfloc_ros.features.backbone import Backbone
from kfloc_ros.kfnet.scoordnet import SCoordNet, head_input
from kfloc_ros.mapping import export
from kfloc_ros.maps.scene_map import SceneMap

needs_onnx = pytest.mark.skipif(not export.is_installed("onnxruntime"), reason="onnx or onnxruntime is not installed")


@needs_onnx
@pytest.mark.thorough
def test_the_files_in_a_row_give_the_points_of_an_image(room_map: Path, room, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert cli.main(["map", "export", str(room_map), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"backbone.onnx", "flow.onnx", "head.onnx"}
    backbone, head = (
        onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("backbone", "head")
    )
    image, network = Backbone().prepare(room[0].image), SceneMap.load(room_map).head
    coarse, _, context, _ = backbone.run(None, {"image": image.numpy()})
    cells = np.concatenate([coarse, context], axis=1)[0].reshape(192, -1).T
    points, log_scale = head.run(None, {"cells": np.ascontiguousarray(cells)})
    assert isinstance(network, SCoordNet)
    with torch.inference_mode():
        wanted, wanted_scale = network(head_input(Backbone()(image))[0].reshape(-1, 192))
    assert np.allclose(points, wanted, atol=1e-3) and np.allclose(log_scale, wanted_scale, atol=1e-3)


@needs_onnx
def test_a_file_that_differs_from_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = export.onnx_bytes

    def other(network, *given):  # type: ignore[no-untyped-def]
        torch.manual_seed(1)
        return written(torch.nn.Linear(192, 3), *given)

    monkeypatch.setattr(export, "onnx_bytes", other)
    with pytest.raises(MapError, match="does not compute what torch does"):
        export._write_onnx(tmp_path / "a.onnx", torch.nn.Linear(192, 3), (torch.randn(200, 192),), ["x"], ["y"])
    assert not (tmp_path / "a.onnx").exists()


def test_missing_packages_and_existing_folders_are_refused(
    room_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene_map = SceneMap.load(room_map)
    with pytest.raises(MapError, match="exists"):
        export.export_onnx(scene_map, tmp_path)
    monkeypatch.setattr(export, "is_installed", lambda name: False)
    with pytest.raises(ConfigError, match="pip install onnx onnxruntime"):
        export.export_onnx(scene_map, tmp_path / "new")
