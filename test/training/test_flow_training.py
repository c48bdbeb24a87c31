# SPDX-License-Identifier: Apache-2.0
"""Training of the fast family's OFlowNet: true flow agrees with the pictures, and the network learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kfloc_ros.cli import main as cli
from kfloc_ros.cli.train import simulated_sources
from kfloc_ros.datasets.derived import Remembered
from kfloc_ros.datasets.kfnet import write_kfnet_folder
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.kfnet.flow_network import load_flow_network
from kfloc_ros.mapping.views import View, true_flow
from kfloc_ros.simulation.source import SimulatedSource
from kfloc_ros.training import flow as flow_pairs
from kfloc_ros.training.flow import FlowPairs, disturbed
from kfloc_ros.types import Frame

CAMERA = Camera(160, 96, 120.0, 120.0, 79.5, 47.5)


class Wall(FrameSource):
    """A picture on a plane at z = 2; a narrow board stands before it at z = 1."""

    name = "wall"
    camera = CAMERA  # type: ignore[assignment]

    def __init__(self, board: bool = False) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
        self._picture = cv2.resize(noise, (900, 600), interpolation=cv2.INTER_CUBIC)
        self._board, self.times_read = board, 0

    def __len__(self) -> int:
        return 8

    def indices(self) -> Sequence[int]:
        return range(8)

    def __getitem__(self, position: int) -> Frame:
        self.times_read += 1
        T = make_pose(so3_exp([0.0, 0.0, 0.02 * position]), [0.05 * position, 0.01 * position, 0.0])
        v, u = np.mgrid[:96, :160].astype(np.float64)
        rays = np.stack([(u - 79.5) / 120, (v - 47.5) / 120, np.ones_like(u)], axis=-1) @ T[:3, :3].T
        hit = T[:3, 3] + 2.0 * rays
        depth = np.full((96, 160), 2.0, np.float32)
        image = cv2.remap(
            self._picture, *(np.float32(hit[..., k] * 150 + (450, 300)[k]) for k in (0, 1)), cv2.INTER_LINEAR
        )
        if self._board:
            near = np.abs(T[0, 3] + rays[..., 0]) < 0.15
            depth[near], image[near] = 1.0, 90
        return Frame(image, CAMERA, position * 33_000_000, position, depth_m=depth, T_map_camera=T)

    def view(self, position: int) -> View:
        frame = self[position]
        assert frame.depth_m is not None and frame.T_map_camera is not None
        return View(frame.image, frame.depth_m, CAMERA, frame.T_map_camera, position)


def at_cells(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Grey values at the cells' centres moved by a flow."""
    rows, cols = np.mgrid[: flow.shape[1], : flow.shape[2]]
    x, y = (np.float32(8 * (grid + flow[k]) + 3.5) for k, grid in enumerate((cols, rows)))
    return cv2.remap(cv2.GaussianBlur(image, (0, 0), 2.0), x, y, cv2.INTER_LINEAR).mean(-1)


def test_true_flow_leads_to_the_same_picture() -> None:
    wall = Wall()
    now, before = wall.view(4), wall.view(1)
    flow, known, seen = true_flow(now, before)
    assert known.mean() > 0.9 and 0.5 < seen.mean() < known.mean()
    a, b = at_cells(now.image, np.zeros_like(flow)), at_cells(before.image, flow)
    assert np.corrcoef(a[seen], b[seen])[0, 1] > 0.98
    backward, _, _ = true_flow(before, now)
    assert np.abs(flow[:, seen].mean(1) + backward[:, seen].mean(1)).max() < 0.5


def test_what_a_board_hides_is_not_seen() -> None:
    wall = Wall(board=True)
    _, known, seen = true_flow(wall.view(0), wall.view(5))
    free_flow, _, free = true_flow(Wall().view(0), Wall().view(5))
    hidden = known & free & ~seen
    assert 0.02 < hidden.mean() < 0.3 and np.isfinite(free_flow).all()


@pytest.mark.parametrize("number", range(6))
def test_a_pair_stays_true_however_it_is_placed_and_covered(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_pairs, "LIGHT_SHARE", 0.0)
    monkeypatch.setattr(flow_pairs, "BLUR_SHARE", 0.0)
    pair = FlowPairs([Wall()], seed=5)[number]
    again = FlowPairs([Wall()], seed=5)[number]
    assert torch.equal(pair.images, again.images) and torch.equal(pair.flow, again.flow)
    assert pair.images.shape == (2, 1, 96, 160) and pair.flow.shape == (2, 12, 20)
    assert pair.seen.sum() > 20 and not (pair.seen & ~pair.known).any()
    pictures = [np.repeat(image[0].numpy()[..., None], 3, -1) for image in pair.images]
    a = at_cells(pictures[0], np.zeros((2, 12, 20), np.float32))[pair.seen.numpy()]
    b = at_cells(pictures[1], pair.flow.numpy())[pair.seen.numpy()]
    assert np.corrcoef(a, b)[0, 1] > 0.95


def test_frames_are_made_once_and_pairs_are_near() -> None:
    wall = Wall()
    remembered = Remembered(wall, 3)
    for position in (0, 1, 2, 0, 1, 2):
        assert remembered[position].index == position
    assert wall.times_read == 3 and len(remembered) == 8 and remembered.camera == CAMERA
    assert remembered[3].index == 3 and remembered[1].index == 1 and wall.times_read == 4

    class Far(Wall):
        def indices(self) -> Sequence[int]:
            return range(0, 80, 10)

    with pytest.raises(SourceError, match="no two frames within 4"):
        FlowPairs([Far()])


def test_disturbed_images_say_where_they_are_covered() -> None:
    image = Wall().view(0).image
    covers = [disturbed(image, np.random.default_rng(seed)) for seed in range(40)]
    assert all(changed.dtype == np.uint8 and changed.shape == image.shape for changed, _ in covers)
    shares = [mask.mean() for _, mask in covers]
    assert 0 < sum(share > 0 for share in shares) < 15 and max(shares) < 0.7


def test_what_ships_is_trained_on_simulated_rooms_that_are_not_the_demo_s() -> None:
    sources = simulated_sources()
    assert {source.name for source in sources} == {"map", "localize"} and len(sources) == 4
    for source in sources:  # one seed makes the pictures and the walk
        walked, shipped = source._source.trajectory, SimulatedSource(source.name).trajectory  # type: ignore[attr-defined]
        assert not np.allclose(walked.pose(1.0), shipped.pose(1.0), atol=1e-3)


@pytest.mark.thorough
def test_command_learns_resumes_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list(write_kfnet_folder(Wall(), tmp_path / "wall"))
    words = ["train", "oflownet", "--family", "fast", f"kfnet:{tmp_path / 'wall'}", "augment=none", "batch=1"]
    words += ["log_every=1", "workers=1"]
    for steps, out in ((2, "a"), (8, "a"), (8, "b")):
        assert cli.main([*words, f"steps={steps}", "--out", str(tmp_path / out)]) == 0
    assert "step 8 of 8 (finished)" in capsys.readouterr().out
    logs = [(tmp_path / out / "log.jsonl").read_text() for out in "ab"]
    assert logs[0] == logs[1]
    losses = [json.loads(line)["loss"] for line in logs[0].splitlines()]
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    a, b = (load_flow_network(tmp_path / out / "oflownet.safetensors") for out in "ab")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert cli.main([*words, "width=0.5", "--out", str(tmp_path / "c")]) == 2
    assert "The fast family has no option" in capsys.readouterr().err
    assert cli.main(["train", "oflownet", "--out", str(tmp_path / "c")]) == 2
    assert "Give a SOURCE" in capsys.readouterr().err
    assert cli.main([*words, "--scene", "fire", "--out", str(tmp_path / "c")]) == 2
    assert "--scene is of the published network" in capsys.readouterr().err
