# SPDX-License-Identifier: Apache-2.0
"""The command line from outside: help, exit codes, one sentence for an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from kfloc_ros import __version__
from kfloc_ros.cli import main as cli
from kfloc_ros.errors import MapError


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize("command", ["map build", "localize", "bag make", "replay", "view", "demo", "bench"])
def test_every_command_explains_itself_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    assert f"kfloc {command}" in capsys.readouterr().out.split("\n", 1)[1]


def test_help_and_light_commands_do_not_load_torch() -> None:
    """It takes a second."""
    helps = [["--help"], *([name, "--help"] for name in ("localize", "record", "replay", "show", "view", "check"))]
    lines = [*helps, ["sources"], ["bag", "info", "nowhere"], ["download", "--list"]]
    code = f"import sys; from kfloc_ros.cli.main import main; print(*map(main, {lines}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == " ".join(["0"] * len(helps) + ["0 2 0 False"]), done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_nothing_asked_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lokalize"]) == 2
    assert "lokalize" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "words"),
    [("kitchen", "KIND:PATH"), ("7scenes:does/not/exist", "does/not/exist"), ("tape:x", "7scenes")],
)
def test_a_bad_source_is_one_sentence_and_exit_2(
    source: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    assert cli.main(["localize", source, "--map", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("kfloc: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MapError("The map is\nof a newer version."), 2, "kfloc: The map is of a newer version.\n"),
        (KeyboardInterrupt(), 130, "Interrupted; nothing more was written.\n"),
        (PermissionError(13, "Permission denied", "out"), 2, "refused"),
    ],
)
def test_errors_become_sentences(
    error: BaseException, code: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise error

    module = SimpleNamespace(add_parser=lambda subparsers: subparsers.add_parser("demo"), run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    assert cli.main(["demo"]) == code
    assert text in capsys.readouterr().err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: object) -> int:
        raise ZeroDivisionError

    module = SimpleNamespace(add_parser=lambda subparsers: subparsers.add_parser("demo"), run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: module)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize(("reader", "code"), [("", 141), ("> /dev/full", 2), (">&-", 0)])
def test_output_that_nobody_takes_is_no_traceback(reader: str, code: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reading, pipe = os.pipe()
    os.close(reading)
    command = ["sh", "-c", f"'{sys.executable}' -m kfloc_ros.cli --help {reader}"]
    done = subprocess.run(command, env=environment, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    os.close(pipe)
    assert done.returncode == code
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert ("No space left on device" in done.stderr) == (code == 2)


COMMAND = """
import atexit, os, sys, tempfile, threading, time
from pathlib import Path
from types import SimpleNamespace
from kfloc_ros.cli import main as cli

class Said:
    def __init__(self, text): self.text = text
    def __del__(self): print(self.text, file=sys.stderr, flush=True)

kept = Said("freed by the interpreter")

def action(args):
    sys.temporary = tempfile.TemporaryDirectory(dir=".")
    atexit.register(print, "and at the end")
    cycle = [Said("freed by a collection")]
    cycle.append(cycle)
    threading.Thread(target=lambda: (time.sleep(0.3), Path("thread.txt").touch())).start()
    print("told", end=" ")
    if "BUG" in os.environ:
        raise ZeroDivisionError
    return 3

sys.modules["stub"] = SimpleNamespace(add_parser=lambda commands: commands.add_parser("demo"), run=action)
cli.COMMANDS["demo"] = cli.Command("stub", "")
cli.run()
"""


@pytest.mark.parametrize("bug", [False, True])
def test_end_of_a_command_loses_nothing_and_skips_that_of_the_interpreter(bug: bool, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"BUG": "1"} if bug else {})
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if bug else 3), done.stderr
    assert done.stdout == "told and at the end\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thread.txt"]
    assert "freed by a collection" in done.stderr
    assert ("ZeroDivisionError" in done.stderr) == ("freed by the interpreter" in done.stderr) == bug


def test_ctrl_c_while_a_library_is_imported_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(0.5)\nexcept KeyboardInterrupt:\n    pass\n"
    )
    code = COMMAND.replace("    atexit.register", "    import library\n    time.sleep(60)\n    atexit.register")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", code, "demo"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20.0) == 130


@pytest.mark.thorough
def test_without_the_libraries_that_lack_arm_wheels_images_are_localized(tmp_path: Path) -> None:
    """PoseLib, pycolmap and embreex have no wheels for Linux on ARM."""
    hidden = "import sys; sys.modules.update(poselib=None, pycolmap=None, embreex=None)"
    run = f"{hidden}; from kfloc_ros.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
    words = ["localize", "sim:localize-quick", "--frames", "4:6", "--map", "demo_room", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", run, *words, "--quiet"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "frames.csv").read_text(encoding="utf-8").count("TRACKING") == 2


def test_a_library_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: object) -> int:
        raise ModuleNotFoundError("No module named 'pycolmap'", name="pycolmap")

    monkeypatch.delenv("KFLOC_DEBUG", raising=False)
    monkeypatch.setattr("kfloc_ros.cli.sources.run", run)
    assert cli.main(["sources"]) == 2
    assert "'pycolmap' is not installed" in capsys.readouterr().err


@pytest.mark.thorough
def test_depth_is_used_where_a_source_has_it_and_asked_for_in_vain_where_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["localize", "sim:localize-quick", "--frames", "4:5", "--map", "demo_room", "--use-depth", "--quiet"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["options"]["use_depth"] is True
    photos = tmp_path / "photos"
    photos.mkdir()
    cv2.imwrite(str(photos / "0.png"), np.full((48, 64, 3), 90, np.uint8))
    (photos / "camera.txt").write_text("64 48 52 52 31.5 23.5\n", encoding="utf-8")
    words[1:4] = [f"images:{photos}"]
    assert cli.main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "has no depth images" in capsys.readouterr().err
