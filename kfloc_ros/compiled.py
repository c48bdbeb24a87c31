# SPDX-License-Identifier: Apache-2.0
"""Compiled inner loops: Numba where it is installed; beside every loop there is a torch path, its reference.

A stage of a frame is hundreds of operations on small tensors, whose calls take longer than their arithmetic. A compiled
loop makes one call of them. Numba keeps the machine code on disk (beside the module, or in the user's cache folder), so
a machine compiles once, in seconds; it looks at the processor, so a copied cache is compiled anew where it must be.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

FAST_MATH = {"reassoc", "nsz", "arcp", "contract"}
"""Sums may be reordered, so that they use the processor's vectors; NaN and infinity keep their meaning."""

_switched_off = False


@cache
def is_available() -> bool:
    """Return true if Numba is installed and works; if not, log the consequence once."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        LOG.warning("NUMBA_DISABLE_JIT is set: inner loops run in torch, and a frame takes about half as long again.")
        return False
    reason = "is not installed"
    if importlib.util.find_spec("numba") is not None:
        try:
            importlib.import_module("numba")
            return True
        except Exception as error:  # such as a NumPy that it does not support
            reason = f"cannot be loaded ({error})"
    LOG.warning(
        "Numba %s: inner loops run in torch, and a frame takes about half as long again. `pip install numba` helps.",
        reason,
    )
    return False


def serves(*tensors: torch.Tensor) -> bool:
    """Return true if compiled loops can take these tensors: float32 on the CPU, without gradients."""
    return (
        not _switched_off
        and all(t.device.type == "cpu" and t.dtype == torch.float32 and not t.requires_grad for t in tensors)
        and is_available()
    )


@contextmanager
def torch_only() -> Iterator[None]:
    """Run the torch path of every loop within this context; for comparisons."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def loop(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function with Numba on its first call, without the interpreter's lock, and keep the code on disk.

    Without Numba the function is returned as it is; :func:`serves` keeps callers from calling it.
    """
    if not is_available():
        return function
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    try:
        compiled: Callable[P, R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the code can be written: compile in every process
        compiled = numba.njit(**options)(function)
    return compiled
