# SPDX-License-Identifier: Apache-2.0
"""Small maps of nothing in particular, and the checksums that somebody who means harm would set right again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.maps.format import DESCRIPTION, HEAD_FILE, INDEX_FILE, REFERENCES_FILE
from kfloc_ros.maps.scene_map import Calibration, SceneMap
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

CAMERA = Camera(96, 64, 70.0, 70.0, 47.5, 31.5)
MOTION = make_pose(so3_exp([0.1, -0.2, 0.7]), [4.0, -2.0, 1.0])


def closet(seed: int, camera: Camera = CAMERA) -> SceneMap:
    """A map of nothing in particular."""
    torch.manual_seed(seed)
    unit = torch.nn.functional.normalize
    points = torch.randn(80, 3) + torch.tensor([0.0, 0.0, 4.0])
    views = tuple(
        ReferencePoints(points, unit(torch.randn(80, 64)), unit(torch.randn(80, 24)), torch.rand(80)) for _ in range(3)
    )
    head = SCoordNet(width=8, blocks=0)
    head.normalize_with(torch.randn(50, 192), points)
    poses = np.stack([make_pose(np.eye(3), [0.1 * k, 0.0, 0.0]) for k in range(3)])
    return SceneMap(
        name=f"closet {seed}",
        frame_id="map",
        camera=camera,
        head=head.eval(),
        references=ReferenceViews((3, 5, 9), poses, views),
        calibration=Calibration(),
        bounds_m=((0.0, 0.0, 0.0), (1.0, 2.0, 3.0)),
        provenance={"source": "test"},
    )


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Write a place's description that somebody who means harm has made, checksums and all."""
    sign(folder, (INDEX_FILE,), edit)


def sign(
    folder: Path,
    names: Sequence[str] = (HEAD_FILE, REFERENCES_FILE),
    edit: Callable[[dict[str, Any]], Any] = lambda description: None,
) -> None:
    """Make the checksums of files right again, as somebody who means harm would, with a change of the description."""
    description = yaml.safe_load((folder / DESCRIPTION).read_text())
    edit(description)
    data = {name: (folder / name).read_bytes() for name in names}
    description["files"] = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in data.items()
    }
    (folder / DESCRIPTION).write_text(yaml.safe_dump(description))


def files_below(path: Path) -> dict[str, bytes]:
    """Content of every file in a folder, by its path there."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
