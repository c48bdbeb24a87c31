# SPDX-License-Identifier: Apache-2.0
"""The checkpoint reader: reads what the original writes, refuses everything else, and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kfloc_ros.cli.main import main
from kfloc_ros.errors import WeightsError
from kfloc_ros.pixloc.reference.checkpoint import read_checkpoint
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel, load_model, save_model
from kfloc_ros.pixloc.reference.unet import UNetConfig

CONF: dict[str, Any] = {
    "data": {"name": "megadepth"},
    "train": {"lr": 5e-6},
    "model": {
        "name": "two_view_refiner",
        "success_thresh": 3,
        "normalize_features": True,
        "duplicate_optimizer_per_scale": True,
        "extractor": {
            "name": "unet", "encoder": "vgg19", "decoder": [64, 64, 64, 32], "output_scales": [0, 2, 4],
            "output_dim": [32, 128, 128], "freeze_batch_normalization": False, "do_average_pooling": False,
            "compute_uncertainty": True, "checkpointed": True,
        },
        "optimizer": {
            "name": "learned_optimizer", "num_iters": 15, "pad": 3, "lambda_": 0.01, "verbose": False,
            "loss_fn": "scaled_barron(0, 0.1)", "jacobi_scaling": False, "learned_damping": True,
            "damping": {"type": "constant"},
        },
    },
}  # fmt: skip


def state_of(encoder: str) -> dict[str, torch.Tensor]:
    """Entries of the right shapes; each is one number repeated, and as small on disk."""
    with torch.device("meta"):
        shapes = PixLocModel(PixLocConfig(UNetConfig(encoder))).state_dict()
    return {
        name: torch.full((), 0.01 * k % 1.0).to(value.dtype).expand(value.shape)
        for k, (name, value) in enumerate(shapes.items())
    }


def write(path: Path, encoder: str = "vgg19", change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    conf = torch.utils._pytree.tree_map(lambda v: v, CONF)  # a copy of the nested dictionaries
    conf["model"]["extractor"]["encoder"] = encoder
    content = {
        "model": state_of(encoder), "optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {}, "conf": conf,
        "epoch": 17, "losses": None, "eval": {"loss/total": 1.5, "R_error_median": np.float64(0.2)},
    }  # fmt: skip
    change(content)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("encoder", ["vgg16", "vgg19"])
def test_reads_what_the_original_writes(tmp_path: Path, encoder: str) -> None:
    read = read_checkpoint(write(tmp_path / "checkpoint_best.tar", encoder))
    config = read.model.config
    assert (config.extractor.encoder, config.num_iters, config.pad, read.epoch) == (encoder, 15, 3, 17)
    assert config.loss == "scaled_barron(0, 0.1)"
    assert read.unknown_options == ()
    assert not read.model.training
    for name, value in state_of(encoder).items():
        assert torch.equal(read.model.state_dict()[name], value), name


def test_old_numpy_names_and_the_old_file_layout_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.tar"
    torch.save({"model": state_of("vgg16"), "eval": np.float64(1.0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert read_checkpoint(path).model.config.extractor.encoder == "vgg16"


@pytest.mark.parametrize("encoder", ["vgg16", "resnet18", "resnet34", "resnet50", "resnet101"])
def test_the_encoder_is_seen_without_a_configuration(encoder: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.tar", encoder, lambda content: content.pop("conf"))
    assert read_checkpoint(path).model.config.extractor.encoder == encoder


def test_one_damping_for_all_levels(tmp_path: Path) -> None:
    def share(content: dict[str, Any]) -> None:
        state = {k: v for k, v in content["model"].items() if "dampingnet" not in k}
        content["model"] = state | {"optimizer.dampingnet.const": torch.arange(6.0)}

    model = read_checkpoint(write(tmp_path / "c.tar", change=share)).model
    for level in range(3):
        assert torch.equal(model.damping(level), model.damping(0))
    assert model.damping(0)[0].item() == pytest.approx(10 ** (-6 + 0.5 * 11), rel=1e-5)


def test_deprecated_options_are_ignored_and_unknown_ones_named(tmp_path: Path) -> None:
    def add(content: dict[str, Any]) -> None:
        content["conf"]["model"]["optimizer"] |= {"sqrt_diag_damping": True, "bound_confidence": True, "warp": 9}

    assert read_checkpoint(write(tmp_path / "c.tar", change=add)).unknown_options == ("optimizer.warp",)


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for key in parents:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_set("model/extra.weight", torch.zeros(1)), "unknown entries 'extra.weight'"),
        (lambda c: c["model"].pop("extractor.uncertainty.1.0.bias"), "lacks 'extractor.uncertainty.1.0.bias'"),
        (_set("model/extractor.uncertainty.1.0.bias", torch.zeros(2)), r"of shape \(2,\) where \(1,\) is due"),
        (_set("model/extractor.uncertainty.1.0.bias", torch.tensor([torch.nan])), "not finite"),
        (_set("model/extractor.uncertainty.1.0.bias", 3), "no tensor"),
        (_set("conf/model/extractor/encoder", "vgg16"), "names the encoder 'vgg16'"),
        (_set("conf/model/extractor/decoder_norm", None), "normalisation"),
        (_set("conf/model/optimizer/loss_fn", "eval('1')"), "robust loss"),
        (_set("conf/model/optimizer/interpolation", {"mode": "cubic"}), "cubic"),
        (_set("conf/model/optimizer/num_iters", [3]), "cannot be used"),
        (_set("model", None), "no dictionary 'model'"),
        (_set("model", {}), "block 2 has 0 convolutions"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    with pytest.raises(WeightsError, match=sentence):
        read_checkpoint(write(tmp_path / "c.tar", change=change))


class Trap:
    """Runs code when it is unpickled carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_nothing_in_the_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = write(tmp_path / "c.tar", change=_set("losses", Trap(mark)))
    with pytest.raises(WeightsError, match="was not loaded"):
        read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 broken"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.tar"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"c\.tar"):
        read_checkpoint(path)
    with pytest.raises(WeightsError, match="no checkpoint"):
        read_checkpoint(tmp_path / "absent.tar")


def test_conversion_keeps_weights_and_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "c.tar", "vgg16"), tmp_path / "sub" / "model.safetensors"
    assert main(["convert", "pixloc-checkpoint", str(source), "--out", str(out)]) == 0
    assert "vgg16, 15,712,405 parameters, epoch 17" in capsys.readouterr().out
    loaded, read = load_model(out), read_checkpoint(source).model
    assert loaded.config == read.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), read.state_dict().values(), strict=True))


def test_a_converted_file_that_is_not_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(WeightsError, match="There is no"):
        load_model(path)
    path.write_bytes(b"12345678 nothing")
    with pytest.raises(WeightsError, match="kfloc convert"):
        load_model(path)
    save_model(path, PixLocModel(PixLocConfig(UNetConfig(decoder=(4, 4, 4, 4), output_dim=(2, 2, 2)))))
    path.write_bytes(path.read_bytes().replace(b"kfloc_pixloc", b"kfloc_xxxxxx"))
    with pytest.raises(WeightsError, match="not a PixLoc model"):
        load_model(path)


def test_an_original_that_is_missing_ends_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "pixloc-checkpoint", str(tmp_path / "no.tar"), "--out", str(tmp_path / "o")]) == 2
    assert "There is no checkpoint" in capsys.readouterr().err
