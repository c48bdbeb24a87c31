# SPDX-License-Identifier: Apache-2.0
"""Runs a module as a process that ends with its parent: ``python -m kfloc_ros.replay.guard PARENT MODULE ...``.

When the parent ends for whatever reason, SIGKILL included, the kernel sends this process SIGTERM, so that it can give
back what it shares with others (the segments that DDS keeps in /dev/shm); a moment later it is killed. So no node
outlives the command that started it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_PERIOD_S = 0.2
GRACE_S = 3.0
"""How long a process may take to end after its parent has."""


def main() -> None:
    """Tie this process to its parent, then become the module."""
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
