# SPDX-License-Identifier: Apache-2.0
"""Parts of work for the executor: they say who computes them, and one waits to be killed the first time."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kfloc_ros.errors import SourceError

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Part:
    """One part; its workers' process identifiers are left in ``folder``."""

    number: int
    folder: Path
    dies: bool = False
    fails: bool = False


def compute(part: Part) -> tuple[int, float, int]:
    """Return number, a sum that depends on the order of additions, and the number of threads."""
    earlier = sorted(part.folder.glob(f"{part.number}-*"))
    (part.folder / f"{part.number}-{len(earlier)}-{os.getpid()}").touch()
    if part.fails:
        raise SourceError(f"Part {part.number} cannot be computed.")
    if part.dies and not earlier:
        time.sleep(PATIENCE_S)  # the test kills this process
    rng = np.random.default_rng(part.number)
    values = torch.from_numpy(rng.normal(size=(200, 200)).astype(np.float32))
    return part.number, float((values @ values.T).softmax(1).sum(0).std()), torch.get_num_threads()


def end_at_once(part: Part) -> None:
    """End the worker's process."""
    (part.folder / f"ended-{os.getpid()}").touch()
    os._exit(1)
