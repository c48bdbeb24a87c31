# SPDX-License-Identifier: Apache-2.0
"""Choice of the device and the threads of networks, and description of the machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from kfloc_ros.errors import ConfigError


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


MAX_THREADS = 4


def limit_threads() -> None:
    """Set torch to half the cores, at most ``MAX_THREADS``, for localization; ``OMP_NUM_THREADS`` overrides it.

    A frame is hundreds of small operations, which wait for each other longer than they compute: on two cores one thread
    is a fifth faster than two, and the other core is free for the robot's other work.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(max((os.cpu_count() or 1) // 2, 1), MAX_THREADS))


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
