# SPDX-License-Identifier: Apache-2.0
"""Set-up steps that run once: a stamp per step, elapsed time on the terminal, a log of all commands."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class SetupError(Exception):
    """Error for the user: one sentence with the fault and the remedy."""


class CommandFailed(Exception):
    """Error: a command failed; ``output`` has its text."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


@dataclass(frozen=True)
class Step:
    """Step of the set-up, with the key that identifies its completed state."""

    name: str
    title: str
    key: str
    work: Callable[[], None]


def digest(*parts: str | Path) -> str:
    """Return a key of texts and of the content of files and folders, without caches and build products."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file())
            for path in files:
                if "__pycache__" not in path.parts:
                    sha.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        else:
            sha.update(part.encode() + b"\0")
    return sha.hexdigest()[:16]


class Runner:
    """Runner of steps, in order; skips those with a matching stamp."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._log = state / "setup.log"
        self._label = ""
        self._started_s = 0.0
        self._live = sys.stdout.isatty()

    @property
    def log(self) -> Path:
        """Path of the log with the output of all commands."""
        return self._log

    def pending(self, steps: Sequence[Step]) -> list[Step]:
        """Return the steps whose stamp is missing or has another key."""
        return [step for step in steps if self.stamp(step.name) != step.key]

    def stamp(self, name: str) -> str:
        """Return the value stored for a name; empty if there is none."""
        path = self._state / f"{name}.stamp"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    def set_stamp(self, name: str, value: str) -> None:
        """Store a value for a name."""
        self._state.mkdir(parents=True, exist_ok=True)
        (self._state / f"{name}.stamp").write_text(value + "\n", encoding="utf-8")

    def run(self, steps: Sequence[Step]) -> None:
        """Run the steps and stamp each one that succeeds."""
        for number, step in enumerate(steps, start=1):
            self._label = f"[{number}/{len(steps)}] {step.title}"
            self._started_s = time.monotonic()
            if not self._live:
                print(self._label, flush=True)
            step.work()
            self.set_stamp(step.name, step.key)
            self._show("done", end="\n")

    def command(
        self, words: Sequence[str | Path], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> str:
        """Run a command with its output in the log; return the output.

        Raises:
            CommandFailed: the command failed.
        """
        self._state.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        with (
            open(self._log, "a", encoding="utf-8") as log,
            subprocess.Popen(
                [str(word) for word in words], cwd=cwd, env=dict(os.environ if env is None else env), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
            ) as process,
        ):  # fmt: skip
            log.write(f"$ {' '.join(str(word) for word in words)}\n")
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                lines.append(line)
                if self._live and line.strip():
                    self._show(re.sub(r"\s+", " ", line.strip()))
        output = "".join(lines)
        if process.returncode:
            raise CommandFailed(output)
        return output

    def note(self, sentence: str) -> None:
        """Print a sentence on a line of its own."""
        print(("\r\033[K" if self._live else "") + f"      {sentence}", flush=True)

    def _show(self, what: str, end: str = "") -> None:
        elapsed = f"{time.monotonic() - self._started_s:6.1f} s"
        if self._live:
            width = os.get_terminal_size().columns if sys.stdout.isatty() else 80
            print(f"\r\033[K{f'{self._label}  {elapsed}  {what}'[: max(width - 1, 20)]}", end=end, flush=True)
        elif end:
            print(f"      {what}, {elapsed.strip()}", flush=True)
