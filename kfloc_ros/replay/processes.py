# SPDX-License-Identifier: Apache-2.0
"""Python modules as processes, every one of which ends, whatever happens.

``python -m kfloc_ros.replay.processes PARENT MODULE ...`` runs a module as a process that ends with its parent. When
the parent ends for whatever reason, SIGKILL included, the kernel sends this process SIGTERM, so that it can give back
what it shares with others (the segments that DDS keeps in /dev/shm); a moment later it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from kfloc_ros.errors import RosUnavailableError

STOP_STEPS: tuple[tuple[signal.Signals, float], ...] = (
    (signal.SIGINT, 8.0),
    (signal.SIGTERM, 3.0),
    (signal.SIGKILL, 3.0),
)
"""Signals of a shutdown, in order, and how many seconds each may take."""


@dataclass(frozen=True)
class Ending:
    """How a process ended."""

    code: int | None
    """Exit status, negative for a signal; None if it could not be ended."""
    forced: str
    """The harshest signal that was needed beyond SIGINT, or empty."""


def tied_command(module: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs a module as a process that ends with this one; see the top of this file."""
    return [sys.executable, "-m", "kfloc_ros.replay.processes", str(os.getpid()), module, *arguments]


class ProcessSet:
    """Processes that live no longer than this context, each in a session and process group of its own.

    A Ctrl-C in the terminal does not reach them; they end when the context does, by SIGINT first, then
    SIGTERM, then SIGKILL, and by the kernel if this process is killed.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._logs: dict[str, Path] = {}
        self.endings: dict[str, Ending] = {}

    def start(
        self, name: str, module: str, arguments: Sequence[str], *, log: Path, pipe: bool = False
    ) -> IO[str] | None:
        """Start ``python -m module arguments``; errors (and, without ``pipe``, output) go to the log file.

        Returns:
            Its standard output if ``pipe``.
        """
        command = tied_command(module, arguments)
        with log.open("w", encoding="utf-8") as sink:
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else sink,
                stderr=sink if pipe else subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
        self._processes[name], self._logs[name] = process, log
        return process.stdout

    def ended(self) -> list[str]:
        """Names of the processes that have ended by themselves."""
        return [name for name, process in self._processes.items() if process.poll() is not None]

    def exit_code(self, name: str) -> int | None:
        """Exit status of a process, None while it runs."""
        return self._processes[name].poll()

    def last_words(self, name: str, lines: int = 3) -> str:
        """What a process logged last, on one line: its last FATAL line, or the last few lines."""
        text = self._logs[name].read_text(encoding="utf-8", errors="replace").strip().splitlines()
        fatal = [line for line in text if "[FATAL]" in line]
        return " | ".join(line.strip() for line in (fatal[-1:] or text[-lines:])) or "(none)"

    def interrupt(self, name: str) -> None:
        """Ask one process to end."""
        self._signal(self._processes[name], signal.SIGINT)

    def stop(self, *, steps: Sequence[tuple[signal.Signals, float]] = STOP_STEPS) -> None:
        """End all processes and what they started, and note how."""
        forced = ""
        for number, (step, patience_s) in enumerate(steps):
            alive = [p for p in self._processes.values() if self._group_alive(p)]
            if not alive:
                break
            forced = step.name if number else ""
            for process in alive:
                self._signal(process, step)
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and any(self._group_alive(process) for process in alive):
                time.sleep(0.02)
        for name, process in self._processes.items():
            if name not in self.endings:
                self.endings[name] = Ending(process.poll(), forced if self._was_forced(process) else "")
            if process.stdout is not None:
                process.stdout.close()

    def left(self) -> int:
        """How many of the process groups still have a member."""
        return sum(self._group_alive(process) for process in self._processes.values())

    def __enter__(self) -> ProcessSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except KeyboardInterrupt:  # a second Ctrl-C: no more patience
            self.stop(steps=STOP_STEPS[-1:])
            raise

    @staticmethod
    def _was_forced(process: subprocess.Popen[str]) -> bool:
        return process.poll() in (-signal.SIGTERM, -signal.SIGKILL, None)

    @staticmethod
    def _group_alive(process: subprocess.Popen[str]) -> bool:
        process.poll()  # takes away a zombie, which would count as alive
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    @staticmethod
    def _signal(process: subprocess.Popen[str], which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, which)


MAX_DOMAIN_ID = 101
"""Larger ROS domain ids reach into the port range that Linux hands out to programs."""


_FIRST_PORT, _PORTS_OF_DOMAIN = 7400, 250
"""UDP ports of the ROS domains, by the DDSI-RTPS standard: so many for each domain, from the first one on."""
_PARTICIPANTS = 32
"""Number of participants of a domain that are looked for."""


def free_domain(first: int) -> int:
    """Return the first ROS domain that no process of this machine is in, nor ``ROS_DOMAIN_ID`` of the environment.

    Args:
        first: number to begin with; beyond the last domain, it begins at 1 again.
    """
    own = os.environ.get("ROS_DOMAIN_ID", "")
    domains = [1 + (first + step) % MAX_DOMAIN_ID for step in range(MAX_DOMAIN_ID)]
    return next((domain for domain in domains if str(domain) != own and not _is_used(domain)), domains[0])


def _is_used(domain_id: int) -> bool:
    """Return True if a participant of a domain listens for others on this machine."""
    base = _FIRST_PORT + _PORTS_OF_DOMAIN * domain_id
    for port in (base, *range(base + 10, base + 10 + 2 * _PARTICIPANTS, 2)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return True
    return False


def check_ros() -> None:
    """Raise RosUnavailableError where rclpy is not installed; importing it here could restart the interpreter."""
    if importlib.util.find_spec("rclpy") is None:
        raise RosUnavailableError(
            "Replaying needs ROS 2, and rclpy is not installed here. "
            "Run `make setup`, or source a ROS 2 installation (Jazzy or newer) and use its Python."
        )


def ros_environment(domain_id: int | None = None) -> dict[str, str]:
    """This process's environment, changed so that ROS children find each other and nobody else.

    What the user has set for Fast DDS and the discovery range is kept. ``domain_id`` None takes one
    that nobody is in.
    """
    environment = dict(os.environ)
    environment["ROS_DOMAIN_ID"] = str(free_domain(os.getpid()) if domain_id is None else domain_id)
    environment.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if not ({"FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"} & environment.keys()):
        profile = find_config("fastdds.xml")
        if profile is not None:
            environment["FASTDDS_DEFAULT_PROFILES_FILE"] = str(profile)
    libraries = Path(sys.prefix) / "lib"
    if (libraries / "librcl.so").exists():  # ROS as wheels: without this, importing rclpy restarts the interpreter
        known = environment.get("LD_LIBRARY_PATH", "")
        if str(libraries) not in known.split(os.pathsep):
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(libraries), known)))
    package_root = str(Path(__file__).resolve().parents[2])
    known = environment.get("PYTHONPATH", "")
    if package_root not in known.split(os.pathsep):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package_root, known)))
    return environment


def find_config(name: str) -> Path | None:
    """A file of the package's ``config`` folder, in a ROS prefix, the environment or the source tree."""
    prefixes = [Path(prefix) for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep) if prefix]
    folders = [prefix / "share" / "kfloc_ros" / "config" for prefix in (*prefixes, Path(sys.prefix))]
    for folder in (Path(__file__).resolve().parents[2] / "config", *folders):
        if (folder / name).is_file():
            return folder / name
    return None


_PR_SET_PDEATHSIG = 1
_PERIOD_S = 0.2
GRACE_S = 3.0
"""How long a process may take to end after its parent has."""


def main() -> None:
    """Tie this process to its parent, then become the module; see the top of this file."""
    parent, module, *arguments = sys.argv[1:]
    # A shell starts what it puts into the background with SIGINT ignored, and that is inherited.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):  # it ended before the line above took effect
        raise SystemExit(1)
    threading.Thread(target=_end_with, args=(int(parent),), name="guard", daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PERIOD_S)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
