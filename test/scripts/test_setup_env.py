# SPDX-License-Identifier: Apache-2.0
"""Set-up: steps are done once, and every lack of the machine becomes one sentence."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import setup_machine
        import setup_progress
        import setup_steps
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return {"machine": setup_machine, "progress": setup_progress, "steps": setup_steps}


def test_a_step_is_done_once_and_again_when_its_key_changes(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    progress = scripts["progress"]
    done: list[str] = []
    runner = progress.Runner(tmp_path / "state")

    def steps(key: str) -> list[object]:
        return [progress.Step("one", "One", key, lambda: done.append(key))]

    runner.run(runner.pending(steps("a")))
    runner.run(runner.pending(steps("a")))
    runner.run(runner.pending(steps("b")))
    assert done == ["a", "b"]


def test_a_failed_step_is_not_stamped(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    progress = scripts["progress"]
    runner = progress.Runner(tmp_path)

    def fail() -> None:
        raise progress.SetupError("No.")

    step = progress.Step("one", "One", "a", fail)
    with pytest.raises(progress.SetupError):
        runner.run([step])
    assert runner.pending([step]) == [step]


def test_key_follows_content_and_names(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    digest = scripts["progress"].digest
    (tmp_path / "a").write_text("1")
    first = digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "x.pyc").write_text("1")
    assert digest(tmp_path) == first
    (tmp_path / "a").write_text("2")
    second = digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, digest(tmp_path)}) == 3


def test_output_of_commands_is_logged(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    progress = scripts["progress"]
    runner = progress.Runner(tmp_path)
    assert runner.command([sys.executable, "-c", "print('hello')"]).strip() == "hello"
    with pytest.raises(progress.CommandFailed, match="broken"):
        runner.command([sys.executable, "-c", "import sys; sys.exit('broken')"])
    assert "hello" in runner.log.read_text() and "broken" in runner.log.read_text()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for ros-rclpy==9.1.2", "has no ros-rclpy==9.1.2 for this Python"),
        ("Failed to establish a new connection\nERROR: No matching distribution found for numpy", "could not reach"),
        ("something else", "pip could not install a requirement"),
    ],
)
def test_pip_failures_become_sentences(scripts: dict[str, ModuleType], output: str, said: str) -> None:
    assert said in scripts["steps"]._explain_pip(output, Path("setup.log"))


def test_other_processors_are_pointed_to_a_ros_installation(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(scripts["progress"].SetupError, match=r"x86-64 Linux only, and this is aarch64.*install ROS 2"):
        scripts["machine"].check_wheels_fit()


def test_missing_tools_are_named_as_debian_packages(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(scripts["progress"].SetupError, match=r"apt-get install g\+\+ make cmake"):
        scripts["machine"].check_compiler()


def test_little_disk_is_said_in_gigabytes(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10e9, 9e9, 1.2e9))
    with pytest.raises(scripts["progress"].SetupError, match=r"Only 1\.2 GB are free"):
        scripts["machine"].check_disk(tmp_path, "cpu")


@pytest.mark.parametrize("python", ["/bin/false", "no-such-python"])
def test_wrong_python_is_one_sentence_and_exit_code_1(python: str) -> None:
    words = ["sh", str(ROOT / "scripts" / "setup.sh")]
    env = {**os.environ, "PYTHON": python}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "is not a CPython 3.10, 3.11, 3.12 or 3.13" in done.stderr
