# SPDX-License-Identifier: Apache-2.0
"""Set-up of the environment .venv and its content; does nothing if nothing has changed.

KFLOC_TORCH=cuda installs PyTorch's CUDA build instead of the CPU one. KFLOC_TORCH_INDEX gives a package index for
PyTorch, in addition to pip's own. KFLOC_ROS_WHEELS names the distribution of the ROS wheels, kilted (the default, the
newest) or jazzy. If a ROS 2 installation is sourced, it is used instead of the ROS wheels.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setup_machine import check_compiler, check_disk, check_python, check_wheels_fit, sourced_ros
from setup_progress import CommandFailed, Runner, SetupError
from setup_steps import WHEELS, Plan, Setup


def main() -> int:
    """Run the set-up; return 0 when the environment is ready."""
    parser = argparse.ArgumentParser(prog="make setup", description=__doc__)
    parser.add_argument("--dev", action="store_true", help="with the tools that tests and checks need")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    try:
        with _alone(root):
            _set_up(root, dev=args.dev)
    except SetupError as error:
        print(f"\nset-up: {error}", file=sys.stderr)
        return 1
    except CommandFailed as error:
        print(f"\nset-up: a command failed; what it said is in {root / '.venv/.kfloc/setup.log'}.", file=sys.stderr)
        print("\n".join(error.output.splitlines()[-5:]), file=sys.stderr)
        return 1
    except OSError as error:
        where = f" on {error.filename}" if error.filename else ""
        print(f"\nset-up: the system refused a file operation{where}: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run it again to go on, finished steps are kept.", file=sys.stderr)
        return 130
    return 0


def _set_up(root: Path, *, dev: bool) -> None:
    check_python()
    runner = Runner(root / ".venv" / ".kfloc")
    torch = os.environ.get("KFLOC_TORCH") or runner.stamp("torch_choice") or "cpu"
    if torch not in ("cpu", "cuda"):
        raise SetupError(f"KFLOC_TORCH is '{torch}'; it may be cpu (the default) or cuda.")
    wheels = os.environ.get("KFLOC_ROS_WHEELS") or runner.stamp("wheels_choice") or next(iter(WHEELS))
    if wheels not in WHEELS:
        raise SetupError(f"KFLOC_ROS_WHEELS is '{wheels}'; it may be {' or '.join(WHEELS)}.")
    plan = Plan(root, sourced_ros(), torch, dev or bool(runner.stamp("dev")), wheels)
    setup = Setup(plan, runner)
    pending = runner.pending(setup.steps())
    if not pending:
        return
    if not plan.ros:
        check_wheels_fit()
        if any(step.name == "underlay" for step in pending):
            check_compiler()
    if any(step.name in ("torch", "base", "ros") for step in pending):
        check_disk(root, torch)
    started_s = time.monotonic()
    which = f"the ROS 2 installation {plan.ros}" if plan.ros else f"ROS 2 {plan.wheels.capitalize()} from wheels"
    print(f"Setting up {plan.venv} with {which}", flush=True)
    runner.run(pending)
    runner.set_stamp("torch_choice", torch)
    runner.set_stamp("wheels_choice", wheels)
    print(f"Ready after {time.monotonic() - started_s:.0f} s: {plan.venv / 'bin' / 'kfloc'}", flush=True)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold a lock, so that one set-up at a time works on a checkout."""
    lock = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            print("Waiting for another set-up of this checkout to end.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
