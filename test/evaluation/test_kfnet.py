# SPDX-License-Identifier: Apache-2.0
"""``kfloc kfnet eval``: files and figures of networks whose output is known, on folders made here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kfloc_ros.cli.main import main
from kfloc_ros.evaluation.kfnet import FrameErrors, LabelledFolder, inside_band
from kfloc_ros.kfnet.fusion import Prior
from kfloc_ros.kfnet.reference.files import write_label
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import save_network
from kfloc_ros.types import SceneCoordinates

WIDTH, HEIGHT = 96, 80
POINT = (0.3, -0.2, 2.0)
SIGMA_M = 0.04


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of noise in two sequences; every labelled pixel shows one point, and a corner has no label."""
    root = tmp_path / "scene"
    (root / "labels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    mask = np.ones((HEIGHT, WIDTH), dtype=bool)
    mask[:16, :16] = False
    names = [f"images/{sequence}/{i:06d}.png" for sequence, count in (("a", 3), ("b", 2)) for i in range(count)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        write_label(root / f"labels/{i}.bin", np.broadcast_to(np.float32(POINT), (HEIGHT, WIDTH, 3)), mask)
    (root / "image_list.txt").write_text("\n".join(names) + "\n")
    (root / "label_list.txt").write_text("".join(f"labels/{i}.bin\n" for i in range(5)))
    (root / "camera.txt").write_text(f"{WIDTH} {HEIGHT} 80 80 47.5 39.5\n")
    return root


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A SCoordNet that says the same point everywhere, 5 cm aside, and an untrained OFlowNet."""
    torch.manual_seed(0)
    scoordnet = ReferenceSCoordNet(width=1 / 64)
    with torch.no_grad():
        scoordnet.prediction.weight.zero_()
        scoordnet.prediction.bias.copy_(torch.tensor([POINT[0] + 0.05, *POINT[1:], math.log(SIGMA_M)]))
    save_network(tmp_path / "model" / "scoordnet.safetensors", scoordnet)
    save_network(tmp_path / "model" / "oflownet.safetensors", ReferenceOFlowNet())
    return tmp_path / "model"


def evaluate(stage: str, folder: Path, model: Path, out: Path, *more: str) -> dict:
    words = ["kfnet", "eval", stage, f"--input={folder}", f"--output={out}", f"--model={model}", "--device=cpu", *more]
    assert main(words) == 0
    return json.loads((out / "evaluation.json").read_text())


def test_scoordnet(folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate("scoordnet", folder, model / "scoordnet.safetensors", tmp_path / "out")
    figures = result["d_m"]
    assert (figures["frames"], figures["near"]) == (5, 0.0)
    assert [figures[key] for key in ("median_cm", "mean_cm", "std_cm", "sigma_cm")] == pytest.approx(
        [5, 5, 0, 4], abs=1e-4
    )
    written = np.load(tmp_path / "out" / "coord_4.npy")
    assert written.shape == (10, 12, 4)
    assert written[3, 3] == pytest.approx([0.35, -0.2, 2.0, 1 / SIGMA_M], rel=1e-5)
    assert json.loads((tmp_path / "out" / "coordinates.json").read_text())["camera"]["fx"] == 80.0
    assert "d_m: median 5.00 cm" in capsys.readouterr().out


def test_kfnet_starts_anew_with_every_sequence(folder: Path, model: Path, tmp_path: Path) -> None:
    result = evaluate("kfnet", folder, model, tmp_path / "out")
    assert (result["d_m"]["frames"], result["d_t"]["frames"], result["d_kf"]["frames"]) == (5, 3, 5)
    assert result["d_kf"]["median_cm"] == pytest.approx(5.0, abs=1e-4)
    assert result["d_kf"]["sigma_cm"] < result["d_m"]["sigma_cm"] < result["d_t"]["sigma_cm"]
    assert 0.0 <= result["nis_share"] <= 1.0
    confidence = [np.load(tmp_path / "out" / f"coord_{i}.npy")[..., 3].max() for i in range(5)]
    assert confidence[0] == confidence[3] == pytest.approx(1 / SIGMA_M)
    assert confidence[2] > confidence[1] > confidence[0] and confidence[4] > confidence[3]


def test_oflownet_is_evaluated_on_pairs_within_a_sequence(folder: Path, model: Path, tmp_path: Path) -> None:
    result = evaluate("oflownet", folder, model / "oflownet.safetensors", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == [
        "1_0_flow.npy", "2_1_flow.npy", "4_3_flow.npy",
    ]  # fmt: skip
    assert np.load(tmp_path / "out" / "2_1_flow.npy").shape == (10, 12, 3)
    assert result["d_t"]["frames"] == 3 and result["d_t"]["median_cm"] < 1e-3  # one point everywhere moves nowhere


def test_cells_without_a_label_do_not_count(folder: Path) -> None:
    truth = LabelledFolder(folder).truth(0, torch.device("cpu"))
    assert truth.valid.sum() == 12 * 10 - 4
    errors = FrameErrors()
    estimate = truth.mean.clone()
    estimate[:, :2, :2] += 7.0
    estimate[0, 2:, :] += torch.linspace(0.0, 0.04, 12)
    errors.add(estimate, torch.full((10, 12), 0.01), truth.valid, truth.mean)
    figures = errors.figures()
    assert figures.near == pytest.approx((20 + 8 * 6) / 116)
    assert figures.sigma_cm == pytest.approx(10.0)
    errors.add(estimate, torch.full((10, 12), 0.01), torch.zeros(10, 12, dtype=torch.bool), truth.mean)
    assert errors.figures().frames == 1


def test_consistent_variances_give_eighty_percent() -> None:
    draw = torch.Generator().manual_seed(0)
    everywhere = torch.ones(100, 100, dtype=torch.bool)
    prior = Prior(0.3 * torch.randn(3, 100, 100, generator=draw), torch.full((100, 100), 0.09), everywhere)
    measured = SceneCoordinates(
        0.4 * torch.randn(3, 100, 100, generator=draw), torch.full((100, 100), 0.16), everywhere, 8
    )
    inside, number = inside_band(prior, measured, everywhere)
    assert number == 30_000 and inside / number == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("kfnet", "scoordnet.safetensors"), "needs weights of oflownet"),
        (("oflownet", "scoordnet.safetensors"), "needs weights of oflownet"),
        (("scoordnet", "missing.safetensors"), "There is no file"),
        (("scoordnet", ".", "--scene=fire"), "leave out --scene"),
        (("scoordnet", ".", "--scene=mars"), "no scene 'mars'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: tuple[str, ...], answer: str, folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, name, *more = words
    told = ["kfnet", "eval", stage, f"--input={folder}", f"--output={tmp_path / 'out'}", f"--model={model / name}"]
    assert main([*told, *more, "--device=cpu"]) == 2
    assert answer in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_needs_the_scenes_transform(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "checkpoint.npz", **{"ScoreNet/conv1a/kernel": np.zeros((3, 3, 3, 64), np.float32)})
    words = ["kfnet", "eval", "scoordnet", f"--input={folder}", f"--output={tmp_path / 'out'}"]
    assert main([*words, f"--model={tmp_path / 'checkpoint.npz'}"]) == 2
    assert "transform.txt" in capsys.readouterr().err
