# SPDX-License-Identifier: Apache-2.0
"""Run-times of the backbone: each gives the reference's features, and the fastest is measured once and remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.errors import ConfigError
from kfloc_ros.features import runtime
from kfloc_ros.features.backbone import Backbone, ChannelsLast
from kfloc_ros.features.runtime import REFERENCE, Runtime, candidates, choose, engine_of

SIZE = (64, 96)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kfloc_ros" / "runtimes.json"


def image() -> torch.Tensor:
    noise = torch.rand(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    return F.interpolate(noise, SIZE, mode="bicubic")


RUNTIMES = [
    Runtime("torch", "bfloat16"),
    *(Runtime(name) for name in ("openvino", "onnxruntime") if runtime.is_installed(name)),
]


@pytest.mark.parametrize("which", RUNTIMES, ids=str)
def test_every_runtime_gives_the_features_of_the_reference(backbone: Backbone, which: Runtime) -> None:
    engine = engine_of(ChannelsLast(backbone), which, SIZE)
    wanted, got = backbone(image()), engine(image())
    again = engine(torch.rand(1, 1, *SIZE))  # what was returned must stay
    assert not torch.equal(again[0], got[0])
    low = which.precision == "bfloat16"
    for grid, field in zip(got[:3], (wanted.coarse, wanted.fine, wanted.context), strict=True):
        expected = field.permute(0, 2, 3, 1)
        assert grid.shape == expected.shape and grid.dtype == torch.float32 and grid.is_contiguous()
        cosine = F.cosine_similarity(grid, expected, dim=-1)
        assert cosine.mean() > (0.999 if low else 0.99999)
    assert torch.allclose(got[3][..., 0], wanted.reliability, atol=0.1 if low else 1e-4)


@pytest.mark.skipif(not runtime.is_installed("openvino"), reason="OpenVINO is not installed")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_threads_that_help_change_no_bit(backbone: Backbone, precision: str) -> None:
    alone, helped = (engine_of(ChannelsLast(backbone), Runtime("openvino", precision), SIZE, n) for n in (0, 1))
    for one, other in zip(alone(image()), helped(image()), strict=True):
        assert torch.equal(one, other)


def test_torch_is_the_reference_to_the_bit_and_measures_nothing(cache: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    plain, forced = Backbone().extract(picture), Backbone(runtime="torch").extract(picture)
    assert torch.equal(plain.coarse, forced.coarse) and torch.equal(plain.fine, forced.fine)
    assert not cache.exists()


def test_the_fastest_is_taken_and_remembered(backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = Runtime("torch", "bfloat16")
    monkeypatch.setattr(runtime, "candidates", lambda name: [REFERENCE, quick])
    monkeypatch.setattr(runtime, "measure", lambda network, among: {str(REFERENCE): 30.0, str(quick): 20.0})
    first = choose("auto", ChannelsLast(backbone))
    assert first.runtime == quick and first.reason.startswith("measured now: torch (bfloat16) 20.0 ms")
    monkeypatch.setattr(runtime, "measure", None)  # not called again
    assert choose("auto", ChannelsLast(backbone)).reason.startswith("measured before")
    (key,) = json.loads(cache.read_text())
    assert "torch=" in key and "threads" in key


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "{"])
def test_a_damaged_cache_is_measured_anew(
    backbone: Backbone, cache: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    quick = Runtime("torch", "bfloat16")
    monkeypatch.setattr(runtime, "candidates", lambda name: [REFERENCE, quick])
    monkeypatch.setattr(runtime, "measure", lambda network, among: {str(REFERENCE): 30.0, str(quick): 29.5})
    chosen = choose("auto", ChannelsLast(backbone))
    assert chosen.runtime == REFERENCE  # the gain is noise
    assert isinstance(json.loads(cache.read_text()), dict)


def test_a_runtime_that_fails_or_differs_is_left_out(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = engine_of

    def engine(network: torch.nn.Module, which: Runtime, size: tuple[int, int]) -> runtime.Engine:
        if which.name == "openvino":
            raise RuntimeError("no such instruction")
        exact = real(network, REFERENCE, size)
        return exact if which == REFERENCE else lambda given: tuple(grid.flip(-1) for grid in exact(given))

    monkeypatch.setattr(runtime, "engine_of", engine)
    monkeypatch.setattr(runtime, "MEASURED_SIZE", SIZE)
    others = [Runtime("openvino"), Runtime("onnxruntime")]
    times = runtime.measure(ChannelsLast(backbone), [REFERENCE, *others])
    assert list(times) == [str(REFERENCE)] and times[str(REFERENCE)] > 0
    assert "no such instruction" in caplog.text and "features differ" in caplog.text


def test_a_runtime_that_is_not_installed_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "is_installed", lambda name: name == "torch")
    with pytest.raises(ConfigError, match="pip install openvino"):
        candidates("openvino")
    assert {found.name for found in candidates("auto")} == {"torch"}
