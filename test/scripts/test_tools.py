# SPDX-License-Identifier: Apache-2.0
"""The tools around the package: `make` deletes no results, and every check runs one version of its tool."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["clean", "distclean"])
def test_cleaning_leaves_results_and_maps(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    results = [tmp_path / name / "frames.csv" for name in ("out", "demo_out", "maps")]
    remade = [tmp_path / name / "file" for name in ("build", "install", "log", ".pytest_cache")]
    for path in [*results, *remade]:
        path.parent.mkdir()
        path.touch()
    subprocess.run(["make", target], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert all(path.exists() for path in results)
    assert not any(path.parent.exists() for path in remade)


def test_pre_commit_and_set_up_bring_the_same_tools() -> None:
    development = (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")
    pins = {line for line in development.splitlines() if not line.startswith("#")}
    hooks = re.findall(r'"(\S+==\S+)"', (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert {name.split("==")[0] for name in hooks} == {"ruff", "codespell"} and set(hooks) <= pins
    assert pins <= set((ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines())
