# SPDX-License-Identifier: Apache-2.0
"""Original checkpoints: layouts, padding arithmetic, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from kfloc_ros.cli import main as cli
from kfloc_ros.errors import WeightsError
from kfloc_ros.kfnet.reference import weights
from kfloc_ros.kfnet.reference.layers import Conv, Padding, UpConv
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import import_networks, read_archive


def oflownet_variables(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """A made-up checkpoint of the process network in TensorFlow's names and layouts."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[np.float32]] = {}
    for path, layer in ReferenceOFlowNet().named_modules():
        name = f"Temporal/{path.split('.')[-1]}"
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            b, a, h, w = layer.weight.shape
            arrays[f"{name}/kernel"] = rng.normal(size=(h, w, a, b)).astype(np.float32)
        elif isinstance(layer, torch.nn.Linear):
            arrays[f"{name}/kernel"] = rng.normal(size=layer.weight.shape[::-1]).astype(np.float32)
        else:
            continue
        arrays[f"{name}/bias"] = rng.normal(size=layer.bias.shape).astype(np.float32)
    return arrays


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
def test_same_padding_is_tensorflows(size: int) -> None:
    """y[i] = sum_k x[2 i + k - before] w[k], before = floor(missing / 2): worked out in NumPy, one dimension."""
    layer = Conv(1, 1, stride=2, padding=Padding.TENSORFLOW)
    kernel = np.array([[0, 0, 0], [1.0, 10.0, 100.0], [0, 0, 0]])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(kernel)[None, None])
    x = np.arange(1.0, size + 1)
    count = -(-size // 2)
    missing = max((count - 1) * 2 + 3 - size, 0)
    padded = np.pad(x, (missing // 2, missing - missing // 2))
    expected = [padded[2 * i : 2 * i + 3] @ kernel[1] for i in range(count)]
    image = torch.zeros(1, 1, 5, size)
    image[0, 0, 2] = torch.from_numpy(x)
    # five rows: missing 2, one above and one below, so row 1 of 3 is centred on row 2
    assert layer(image)[0, 0, 1].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("padding", list(Padding))
def test_up_convolution_is_the_adjoint_of_the_strided_one(padding: Padding) -> None:
    """That is how TensorFlow defines it, with the same kernel array for both."""
    torch.manual_seed(0)
    down, up = Conv(3, 5, stride=2, padding=padding), UpConv(5, 3, padding=padding)
    with torch.no_grad():
        up.weight.copy_(down.weight)
    x, y = torch.randn(1, 3, 8, 8), torch.randn(1, 5, 4, 4)
    assert float((down(x) * y).sum().detach()) == pytest.approx(float((x * up(y)).sum().detach()), rel=1e-4)


def test_layouts_are_transposed_and_slots_skipped() -> None:
    arrays = oflownet_variables() | {
        "Temporal/feat1/kernel/Adam": np.zeros(3, np.float32),
        "global_step": np.zeros(1, np.float32),
    }
    imported = import_networks(arrays)
    assert imported.scoordnet is None and imported.oflownet is not None
    assert imported.skipped == ("Temporal/feat1/kernel/Adam", "global_step")
    net = imported.oflownet
    assert net.padding is Padding.TENSORFLOW
    assert net.converted
    kernel = arrays["Temporal/feat2/kernel"]
    assert float(net.features.feat2.weight[5, 3, 0, 2]) == kernel[0, 2, 3, 5]
    kernel = arrays["Temporal/upconv1/kernel"]  # height, width, out, in
    assert float(net.unet.upconv1.weight[60, 7, 1, 2]) == kernel[1, 2, 7, 60]
    assert float(net.unet.fc1.weight[9, 100]) == arrays["Temporal/fc1/kernel"][100, 9]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("Temporal/conv4/bias"), "lacks 1 variables of Temporal, such as 'Temporal/conv4/bias'"),
        (lambda a: a.update({"Temporal/fc2/bias": np.zeros(7, np.float32)}), "Temporal/fc2/bias.*shape"),
        (lambda a: a.update({"Temporal/fc2/bias": np.full(32, np.nan, np.float32)}), "not finite"),
        (lambda a: a.clear(), "no variable under"),
    ],
)
def test_an_unfit_archive_is_refused(change, words: str) -> None:
    arrays = oflownet_variables()
    change(arrays)
    with pytest.raises(WeightsError, match=words):
        import_networks(arrays)


def test_command_writes_files_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "kfnet.npz", **{f"{k}:0": v for k, v in oflownet_variables().items()})
    archive = str(tmp_path / "kfnet.npz")
    assert cli.main(["convert", "kfnet-checkpoint", archive, "--out", str(tmp_path / "out")]) == 0
    assert "691,698 parameters" in capsys.readouterr().out
    net = weights.load_oflownet(tmp_path / "out" / "oflownet.safetensors")
    assert net.padding is Padding.TENSORFLOW
    again = import_networks(read_archive(tmp_path / "kfnet.npz")).oflownet
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    with pytest.raises(WeightsError, match="holds oflownet, not weights of scoordnet"):
        weights.load_scoordnet(tmp_path / "out" / "oflownet.safetensors")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(WeightsError, match="plain arrays"):
        read_archive(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(WeightsError, match="plain arrays"):
        read_archive(tmp_path / "text.npz")


def test_scoordnet_keeps_width_padding_and_frame(tmp_path: Path) -> None:
    net = ReferenceSCoordNet(Padding.TENSORFLOW, width=1 / 64)
    net.scale.fill_(0.02)
    weights.save_network(tmp_path / "s.safetensors", net)
    loaded = weights.load_scoordnet(tmp_path / "s.safetensors")
    assert (loaded.padding, loaded.width, loaded.frame.scale) == (Padding.TENSORFLOW, 1 / 64, 0.02)
    assert torch.equal(loaded.conv4a.weight, net.conv4a.weight)
    assert loaded.image_size is None
    assert not loaded.converted
    net.image_size = (160, 120)
    weights.save_network(tmp_path / "s.safetensors", net)
    assert weights.load_scoordnet(tmp_path / "s.safetensors").image_size == (160, 120)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("width", "1e9", "published channels"), ("width", "wide", "wide"), ("image_size", "-8x6", "-8x6 pixels")],
)
def test_a_damaged_description_is_refused(tmp_path: Path, key: str, value: str, words: str) -> None:
    net = ReferenceSCoordNet(width=1 / 64)
    weights.save_network(tmp_path / "s.safetensors", net)
    description = {"format": "kfloc_kfnet", "version": "1", "network": "scoordnet", "padding": "centred"}
    save_file(net.state_dict(), tmp_path / "s.safetensors", {**description, "width": "0.015625", key: value})
    with pytest.raises(WeightsError, match=words):
        weights.load_scoordnet(tmp_path / "s.safetensors")
