# SPDX-License-Identifier: Apache-2.0
"""Choice of the device and the threads of networks, compiled loops, and description of the machine."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import cv2
import torch
import torch.nn.functional as F
from torch import nn

from kfloc_ros.errors import ConfigError

LOG = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def choose_device(name: str) -> torch.device:
    """Return the torch device of an option ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: a GPU is requested and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'.")
    return torch.device(name)


def computes_bfloat16(device: torch.device) -> bool:
    """Return True if a processor has bfloat16 instructions; without them, bfloat16 is half as fast as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def quick_matmul(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which layers compute in bfloat16 if the processor does so natively, else as usual.

    It is three times as fast on a CPU with native bfloat16. The error is about 4 mm in a scene coordinate, whose own
    error is 2 cm or more.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16) if computes_bfloat16(device) else nullcontext()


@cache
def _prefers_onednn() -> bool:
    """Return true if torch leaves products to MKL and has oneDNN's, too: on x86-64, not on arm64."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return bool(_by_onednn(torch.ones(1, 1), torch.ones(1, 1), None) == 1)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _by_onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    linear: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise
    return linear(inputs, weight, bias, "none", [], "")


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``inputs @ weight.t() + bias`` of matrices (n, in) and (out, in), without gradients.

    Torch leaves products in float32 to MKL, which uses half of the width of an AMD's vectors; oneDNN, which torch has
    for other precisions, uses all of it. The two differ by rounding.
    """
    if inputs.device.type == "cpu" and inputs.dtype == weight.dtype == torch.float32 and _prefers_onednn():
        # in one piece: other layouts may take oneDNN's slow path
        return _by_onednn(inputs.contiguous(), weight.contiguous(), bias)
    return F.linear(inputs, weight, bias)


class PackedLinear(nn.Module):
    """Linear layer of a processor with bfloat16, whose weights are converted and packed once, not at every call.

    The results are those of the layer within :func:`quick_matmul`.

    Raises:
        AttributeError, RuntimeError: this torch has no such layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().to(torch.bfloat16)
        self._weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = layer.bias.detach().to(torch.bfloat16)
        self.forward(torch.zeros(1, layer.in_features))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (n, out), bfloat16, of inputs (n, in)."""
        linear: Callable[..., torch.Tensor] = torch.ops.mkldnn._linear_pointwise
        return linear(inputs.to(torch.bfloat16), self._weight, self._bias, "none", [], "")


N = TypeVar("N", bound=nn.Module)


def with_packed_layers(network: N, names: set[str]) -> N:
    """Return a copy with the named linear layers packed; the network itself on a device without bfloat16."""
    device = next(network.parameters()).device
    if device.type != "cpu" or not computes_bfloat16(device):
        return network
    result = copy.deepcopy(network).eval()
    try:
        for name, layer in list(result.named_modules()):
            if name in names and isinstance(layer, nn.Linear):
                result.set_submodule(name, PackedLinear(layer))
    except (AttributeError, RuntimeError):  # of a torch without such a layer
        return network
    return result


def prefers_int8(device: torch.device) -> bool:
    """Return True if a processor has instructions for products in int8 (VNNI), and none in bfloat16."""
    if device.type != "cpu" or computes_bfloat16(device):
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


MAX_THREADS = 4


def limit_threads() -> None:
    """Set torch to half the cores, at most ``MAX_THREADS``, for localization; ``OMP_NUM_THREADS`` overrides it.

    A frame is hundreds of small operations, which wait for each other longer than they compute: on two cores one thread
    is a fifth faster than two, and the other core is free for the robot's other work. OpenCV gets as many: its own
    choice is one for every core, and where the cores are busy, a conversion of an image waits for threads that wait for
    a core.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(max((os.cpu_count() or 1) // 2, 1), MAX_THREADS))
    cv2.setNumThreads(torch.get_num_threads())


def spare_threads() -> int:
    """Return the number of threads beside those of torch that may help with a frame that waits for nothing else.

    It is one on a processor with a second core, and none if ``OMP_NUM_THREADS`` says how many there are.
    """
    return min(len(os.sched_getaffinity(0)) - 1, 1) if "OMP_NUM_THREADS" not in os.environ else 0


# A stage of a frame is hundreds of operations on small tensors, whose calls take longer than their arithmetic; a
# compiled loop makes one call of them. Beside every loop there is a torch path, its reference. Numba keeps the machine
# code on disk (beside the module, or in the user's cache folder), so a machine compiles once, in seconds. It looks at
# the processor, so a copied cache is compiled anew where it must be.

FAST_MATH = {"reassoc", "nsz", "arcp", "contract"}
"""Sums may be reordered, so that they use the processor's vectors; NaN and infinity keep their meaning."""

_switched_off = False


@cache
def has_numba() -> bool:
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


def runs_compiled(*tensors: torch.Tensor) -> bool:
    """Return true if compiled loops can take these tensors: float32 on the CPU, without gradients."""
    return (
        not _switched_off
        and all(t.device.type == "cpu" and t.dtype == torch.float32 and not t.requires_grad for t in tensors)
        and has_numba()
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


def compiled_loop(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function with Numba on its first call, without the interpreter's lock, and keep the code on disk.

    Without Numba the function is returned as it is; :func:`runs_compiled` keeps callers from calling it.
    """
    if not has_numba():
        return function
    import numba

    options: dict[str, Any] = {"nogil": True, "fastmath": FAST_MATH, "error_model": "numpy"}
    try:
        compiled: Callable[P, R] = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the code can be written: compile in every process
        compiled = numba.njit(**options)(function)
    return compiled


def describe_hardware(device: str = "cpu") -> dict[str, str | int | float | None]:
    """Return processor, usable cores, memory, versions and, if ``device`` is a GPU, its name."""
    gpu = torch.cuda.get_device_name(0) if device.startswith("cuda") and torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": gpu,
        "torch_threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def cpu_name() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
