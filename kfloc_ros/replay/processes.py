# SPDX-License-Identifier: Apache-2.0
"""Starts Python modules as processes and ends every one of them, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

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
        command = [sys.executable, "-m", "kfloc_ros.replay.guard", str(os.getpid()), module, *arguments]
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
