# SPDX-License-Identifier: Apache-2.0
"""No process outlives what started it: not after an end, a crash or SIGKILL. The environment of these processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kfloc_ros.replay
from kfloc_ros.errors import RosUnavailableError
from kfloc_ros.replay import processes as env
from kfloc_ros.replay.processes import GRACE_S, ProcessSet

REPOSITORY = Path(__file__).resolve().parents[2]
FAST = ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.3), (signal.SIGKILL, 3.0))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "polite.py").write_text(
        "import time\nprint('up', flush=True)\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('bye')\n"
    )
    (tmp_path / "stubborn.py").write_text(
        "import signal, time\nfor s in (signal.SIGINT, signal.SIGTERM):\n    signal.signal(s, signal.SIG_IGN)\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "tidy.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('tidied', flush=True)))\n"
        "print('up', flush=True)\ntime.sleep(60)\n"
    )
    (tmp_path / "failing.py").write_text("print('[FATAL] no map')\nprint('traceback')\nraise SystemExit(3)\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}


def wait_until(condition, patience_s: float = 10.0) -> bool:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_polite_process_ends_by_sigint(environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessSet(environment) as processes:
        processes.start("p", "polite", [], log=log)
        assert wait_until(lambda: "up" in log.read_text())
    assert processes.endings["p"].code == 0 and processes.endings["p"].forced == ""
    assert processes.left() == 0
    assert "bye" in log.read_text()


def test_a_process_started_where_sigint_is_ignored_ends_by_sigint(environment: dict[str, str], tmp_path: Path) -> None:
    """As in the background of a shell."""
    log = tmp_path / "log"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ProcessSet(environment) as processes:
            processes.start("p", "polite", [], log=log)
            assert wait_until(lambda: "up" in log.read_text())
    finally:
        signal.signal(signal.SIGINT, before)
    assert processes.endings["p"].code == 0 and processes.endings["p"].forced == ""


def test_a_stubborn_process_is_killed_and_said_so(environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessSet(environment) as processes:
        processes.start("s", "stubborn", [], log=log)
        assert wait_until(lambda: "up" in log.read_text())
        processes.stop(steps=FAST)
    assert processes.endings["s"].code == -signal.SIGKILL
    assert processes.endings["s"].forced == "SIGKILL"
    assert processes.left() == 0


def test_an_error_in_the_parent_ends_the_children(environment: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ProcessSet(environment) as processes:
        processes.start("p", "polite", [], log=tmp_path / "log")
        raise ZeroDivisionError
    assert processes.left() == 0


def test_a_process_that_ends_by_itself_is_noticed_with_its_last_words(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with ProcessSet(environment) as processes:
        processes.start("f", "failing", [], log=tmp_path / "log")
        assert wait_until(lambda: processes.ended() == ["f"])
        assert processes.exit_code("f") == 3
        assert processes.last_words("f") == "[FATAL] no map"


@pytest.mark.parametrize("kind", ["stubborn", "tidy"])
def test_children_die_with_a_parent_that_is_killed(environment: dict[str, str], tmp_path: Path, kind: str) -> None:
    parent = tmp_path / "parent.py"
    log = tmp_path / "log"
    parent.write_text(
        textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from kfloc_ros.replay.processes import ProcessSet
        processes = ProcessSet(dict(os.environ))
        processes.start("s", {kind!r}, [], log=Path({str(log)!r}))
        print(processes._processes["s"].pid, flush=True)
        time.sleep(60)
        """)
    )
    with subprocess.Popen([sys.executable, str(parent)], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert wait_until(lambda: log.exists() and "up" in log.read_text())
        assert is_alive(child)
        process.kill()
    assert wait_until(lambda: not is_alive(child), GRACE_S + 2.0)
    assert ("tidied" in log.read_text()) == (kind == "tidy"), "whoever obeys SIGTERM has the time to clean up"


def test_the_viewer_of_running_nodes_ends_with_its_command(environment: dict[str, str], tmp_path: Path) -> None:
    """It is in the command's process group, where SIGTERM to the command alone does not reach it."""
    (tmp_path / "viewer.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    code = (
        "from kfloc_ros.cli import main, view; from kfloc_ros.replay import processes; "
        "view.VIEWER, processes.check_ros = 'viewer', lambda: None; main.main(['view', '--live'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.terminate()
        assert process.wait(10.0) == -signal.SIGTERM
    assert wait_until(lambda: not is_alive(child), GRACE_S + 2.0)


def test_a_domain_of_its_own_and_local_discovery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROS_DOMAIN_ID", "42")
    monkeypatch.delenv("ROS_AUTOMATIC_DISCOVERY_RANGE", raising=False)
    values = env.ros_environment()
    assert 1 <= int(values["ROS_DOMAIN_ID"]) <= env.MAX_DOMAIN_ID
    assert values["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    assert env.ros_environment(7)["ROS_DOMAIN_ID"] == "7"
    assert os.environ["ROS_DOMAIN_ID"] == "42"


def test_a_domain_of_its_own_is_neither_the_robots_nor_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bag that is played into the domain of a running robot would move it."""
    monkeypatch.delenv("ROS_DOMAIN_ID", raising=False)
    first = env.free_domain(40)
    monkeypatch.setenv("ROS_DOMAIN_ID", str(first))
    second = env.free_domain(40)
    assert second != first
    for port in (7400, 7410, 7414):  # of discovery by multicast, and of two participants
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as participant:
            participant.bind(("", port + 250 * second))
            assert env.free_domain(40) not in (first, second)
    assert 1 <= env.free_domain(env.MAX_DOMAIN_ID - 1) <= env.MAX_DOMAIN_ID


@pytest.mark.ros
def test_the_domain_of_a_live_node_is_in_use(new_world: Callable[[], Any]) -> None:
    domain_id = new_world().domain_id
    assert env.free_domain(domain_id - 1) != domain_id


def test_what_the_user_set_for_fast_dds_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTRTPS_DEFAULT_PROFILES_FILE", raising=False)
    monkeypatch.setenv("FASTDDS_DEFAULT_PROFILES_FILE", "mine.xml")
    assert env.ros_environment()["FASTDDS_DEFAULT_PROFILES_FILE"] == "mine.xml"
    monkeypatch.delenv("FASTDDS_DEFAULT_PROFILES_FILE")
    assert env.ros_environment()["FASTDDS_DEFAULT_PROFILES_FILE"].endswith("config/fastdds.xml")


def test_without_rclpy_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RosUnavailableError, match="make setup"):
        env.check_ros()


@pytest.mark.thorough
def test_preparing_a_replay_does_not_import_rclpy() -> None:
    code = "import sys, kfloc_ros.replay, kfloc_ros.cli.replay; sys.exit('rclpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", kfloc_ros.replay.__all__)
def test_names_that_are_imported_late_exist(name: str) -> None:
    assert callable(getattr(kfloc_ros.replay, name))
