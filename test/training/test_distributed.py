# SPDX-License-Identifier: Apache-2.0
"""Two processes make the steps that one makes of batches of twice the size, in every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import two_processes
from safetensors.torch import load_file

from kfloc_ros.errors import WeightsError
from kfloc_ros.pixloc.reference import unet
from kfloc_ros.training.distributed import agree, draw, mean_count, mean_of_figures, rank, world_size

HELPERS = Path(two_processes.__file__).parent
ROOT = HELPERS.parents[1]


def torchrun(*words: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(HELPERS), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every stage's training in two processes, of batches of one each."""
    out = tmp_path_factory.mktemp("two")
    process = torchrun(two_processes.__file__, str(out), *two_processes.NAMES)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return out


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.thorough
@pytest.mark.parametrize("name", two_processes.NAMES)
def test_two_processes_equal_one_of_twice_the_batch(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, averaged gradients (Adam's first moment) and running means agree to rounding, PixLoc's in double."""
    precision = 1e-9 if name in ("pixloc", "gnnet") else 2e-3
    monkeypatch.setattr(unet, "BLOCK_CHANNELS", two_processes.FEW_CHANNELS)
    two_processes.run(name, 2, tmp_path / name)
    one, two = (log_of(folder / name) for folder in (tmp_path, trained))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        key = "loss" if "loss" in a else "validation/loss"
        assert b[key] == pytest.approx(a[key], rel=min(precision, 1e-5) if a["step"] < 2 else precision), a["step"]
    first, second = (load_file(next((folder / name).glob("checkpoint-*"))) for folder in (tmp_path, trained))
    assert first.keys() == second.keys()
    compared = [key for key in first if key.endswith("exp_avg") or "running_" in key]
    assert compared
    for key in compared:
        size = float(first[key].abs().max())
        assert torch.allclose(first[key], second[key], rtol=5 * precision, atol=precision * (size + 1e-6)), key


@pytest.mark.thorough
def test_a_training_of_two_processes_is_not_continued_by_one(trained: Path) -> None:
    """Its batches would be others."""
    with pytest.raises(WeightsError, match="processes=2"):
        two_processes.run("scoordnet", 1, trained / "scoordnet", steps=3)


@pytest.mark.slow
def test_an_interrupted_training_ends_with_one_checkpoint(tmp_path: Path) -> None:
    """SIGTERM, as torchrun hands it on: both processes end after the same step."""
    script = tmp_path / "long.py"
    script.write_text(
        "import sys, two_processes as t\nfrom pathlib import Path\n"
        "with t.processes(t.CPU):\n"
        "    print(t.run('scoordnet', 1, Path(sys.argv[1]), steps=100_000).stopped_by, flush=True)\n"
    )
    process = torchrun(str(script), str(tmp_path / "out"))
    log = tmp_path / "out" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and len(log.read_text().splitlines()) > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.count("interrupted") == 2, output
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert state["step"] >= 3 and (tmp_path / "out" / state["tensors"]).is_file()


def test_one_process_exchanges_nothing() -> None:
    assert (rank(), world_size(), agree(3)) == (0, 1, 3)
    assert int(mean_count(torch.tensor(7))) == 7 and mean_of_figures({"a": 1.0}) == {"a": 1.0}
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    assert torch.equal(draw(torch.rand, (3, 2), generators[0]), torch.rand((3, 2), generator=generators[1]))
