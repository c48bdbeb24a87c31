# SPDX-License-Identifier: Apache-2.0
"""Run-times for the backbone on a processor: torch, OpenVINO or ONNX Runtime, in float32 or bfloat16.

Which is fastest depends on the processor, so ``auto`` measures the installed ones once and keeps the result, by
processor, versions and threads, in the user's cache folder.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from kfloc_ros.device import computes_bfloat16, cpu_name
from kfloc_ros.errors import ConfigError

LOG = logging.getLogger(__name__)

PACKAGES = {"torch": "torch", "openvino": "openvino", "onnxruntime": "onnxruntime"}
MEASURED_SIZE = (480, 640)
"""Rows and columns of the image that run-times are measured with."""
MEASURED_PASSES = 5
MIN_COSINE = 0.999
"""Smallest mean cosine of a run-time's features with those of torch in float32."""
MIN_GAIN = 0.95
"""Largest share of torch's time at which another run-time is taken."""

Grids = tuple[torch.Tensor, ...]
Engine = Callable[[torch.Tensor], Grids]
"""Network on an image (1, 1, H, W): grids (1, h, w, C), channels last, which the caller may keep."""


@dataclass(frozen=True)
class Runtime:
    """Program that computes a network, and the precision of its products."""

    name: str
    precision: str = "float32"

    def __str__(self) -> str:
        return f"{self.name} ({self.precision})"


REFERENCE = Runtime("torch")


def is_installed(name: str) -> bool:
    """Return true if a run-time can be used; ONNX Runtime also needs the package that writes its file."""
    needed = ("onnxruntime", "onnx") if name == "onnxruntime" else (PACKAGES[name],)
    return all(importlib.util.find_spec(package) is not None for package in needed)


def candidates(name: str) -> list[Runtime]:
    """Return the run-times that an option ``auto``, ``openvino`` or ``onnxruntime`` stands for on this machine.

    Raises:
        ConfigError: the run-time is not installed.
    """
    if name != "auto" and not is_installed(name):
        packages = "onnxruntime onnx" if name == "onnxruntime" else name
        raise ConfigError(
            f"runtime is '{name}', which is not installed; `pip install {packages}`, or use 'auto' or 'torch'."
        )
    names = [n for n in PACKAGES if is_installed(n)] if name == "auto" else [name]
    both = ("float32", "bfloat16") if computes_bfloat16(torch.device("cpu")) else ("float32",)
    return [Runtime(n, precision) for n in names for precision in (("float32",) if n == "onnxruntime" else both)]


@dataclass(frozen=True)
class Choice:
    """Chosen run-time, with the reason as a sentence."""

    runtime: Runtime
    reason: str


def choose(name: str, network: nn.Module) -> Choice:
    """Return the run-time for an option; measure candidates where that was not done before on this machine.

    Args:
        name: ``auto``, ``torch`` (float32, the reference), ``openvino`` or ``onnxruntime``.
        network: maps an image (1, 1, H, W) to grids (1, h, w, C).

    Raises:
        ConfigError: the run-time is not installed.
    """
    if name == "torch":
        return Choice(REFERENCE, "as the option 'runtime' says")
    among = candidates(name)
    if among == [REFERENCE]:
        return Choice(REFERENCE, "the only one that is installed, and the processor has no bfloat16")
    key = _key(among)
    times = _remembered(key)
    measured = times is None
    if times is None:
        times = measure(network, among)
        _remember(key, times)
    best = min(among, key=lambda runtime: times.get(str(runtime), float("inf")))
    reference = times.get(str(REFERENCE), float("inf"))
    if name == "auto" and times.get(str(best), float("inf")) > MIN_GAIN * reference:
        best = REFERENCE
    told = ", ".join(f"{runtime} {ms:.1f} ms" for runtime, ms in sorted(times.items(), key=lambda item: item[1]))
    return Choice(best, f"{'measured now' if measured else 'measured before'}: {told}")


def measure(network: nn.Module, among: list[Runtime]) -> dict[str, float]:
    """Return the time of a pass, ms, of each run-time that works and whose features agree with the reference's."""
    image = torch.rand(1, 1, *MEASURED_SIZE, generator=torch.Generator().manual_seed(0))
    image = F.avg_pool2d(image, 5, stride=1, padding=2)  # with structures, as images have
    wanted = engine_of(network, REFERENCE, MEASURED_SIZE)(image)
    times: dict[str, float] = {}
    for runtime in among:
        try:
            engine = engine_of(network, runtime, MEASURED_SIZE)
            grids = engine(image)
        except Exception as error:  # whatever another program raises, torch remains
            LOG.warning("The run-time %s does not work here and is left out: %s", runtime, error)
            continue
        cosine = min(
            float(F.cosine_similarity(got, want, dim=-1).mean()) for got, want in zip(grids[:3], wanted, strict=False)
        )
        if not cosine >= MIN_COSINE:
            LOG.warning("The run-time %s is left out: its features differ (cosine %.4f).", runtime, cosine)
            continue
        spent = []
        for _ in range(MEASURED_PASSES):
            start = time.perf_counter()
            engine(image)
            spent.append(1e3 * (time.perf_counter() - start))
        times[str(runtime)] = round(min(spent), 3)
    return times


def engine_of(network: nn.Module, runtime: Runtime, size: tuple[int, int], helpers: int = 0) -> Engine:
    """Return a network compiled for one size (H, W) of images on the processor, with torch's number of threads.

    OpenVINO gets ``helpers`` threads more; its results do not depend on their number.
    """
    if runtime.name == "openvino":
        return _openvino_engine(network, runtime.precision, size, torch.get_num_threads() + helpers)
    if runtime.name == "onnxruntime":
        return _onnxruntime_engine(network, size)
    if runtime.precision == "bfloat16":
        network = copy.deepcopy(network).to(torch.bfloat16)
    return lambda image: tuple(network(image))


_SHARED: dict[tuple[str, Runtime, tuple[int, int], int], Engine] = {}
_LOCK = threading.Lock()


def shared_engine(source: str, network: nn.Module, runtime: Runtime, size: tuple[int, int], helpers: int = 0) -> Engine:
    """Return :func:`engine_of` a network, which all networks from the same source share; it runs one image at a time.

    A map that is reloaded, or a second submap, then does not compile it again.
    """
    key = source, runtime, size, torch.get_num_threads() + helpers
    with _LOCK:
        if key not in _SHARED:
            engine, lock = engine_of(network, runtime, size, helpers), threading.Lock()

            def run(image: torch.Tensor) -> Grids:
                with lock:
                    return engine(image)

            _SHARED[key] = run
        return _SHARED[key]


def _openvino_engine(network: nn.Module, precision: str, size: tuple[int, int], threads: int) -> Engine:
    import openvino as ov
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.rand(1, 1, *size)
    # the front end itself, since openvino.convert_model reports its use over the network
    front = FrontEndManager().load_by_framework("pytorch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing, which OpenVINO's front end takes
        trace: Callable[..., object] = torch.jit.trace
        decoder = TorchScriptPythonDecoder(trace(network, example, check_trace=False), example_input=example)
        model = front.convert(front.load(decoder))
    model.reshape([1, 1, *size])
    hint = "bf16" if precision == "bfloat16" else "f32"
    compiled = ov.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    shapes = [tuple(port.shape) for port in compiled.outputs]

    def run(image: torch.Tensor) -> Grids:
        grids = [np.empty(shape, dtype=np.float32) for shape in shapes]  # the network writes into the caller's memory
        for number, grid in enumerate(grids):
            request.set_output_tensor(number, ov.Tensor(grid, shared_memory=True))
        request.infer([image.contiguous().numpy()], share_inputs=True, share_outputs=True)
        return tuple(torch.from_numpy(grid) for grid in grids)

    return run


def _onnxruntime_engine(network: nn.Module, size: tuple[int, int]) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    example = torch.rand(1, 1, *size)
    content = onnx_bytes(network, (example,), ["image"], ["coarse", "fine", "context", "reliability"])
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(image: torch.Tensor) -> Grids:
        found: list[NDArray[np.float32]] = session.run(None, {"image": image.contiguous().numpy()})
        return tuple(torch.from_numpy(grid) for grid in found)

    return run


def onnx_bytes(
    network: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> bytes:
    """Return a network as ONNX.

    Args:
        network: the network, in evaluation mode.
        example: inputs of the sizes that the file is for.
        inputs, outputs: their names.
        dynamic: names of the axes whose size may differ from the example's, by input or output.

    Raises:
        ConfigError: the package ``onnx`` is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError("Writing ONNX needs the package 'onnx'; `pip install onnx`.")
    stream = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of sizes that are constants, which they are meant to be
        torch.onnx.export(
            network,
            example,
            stream,  # type: ignore[arg-type]  # the exporter that is not "dynamo" takes a stream
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=dynamic,
            opset_version=17,
            dynamo=False,
        )
    return stream.getvalue()


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kfloc_ros" / "runtimes.json"


def forget() -> None:
    """Forget the times that were measured before, such as on a machine that was busy then."""
    _cache_file().unlink(missing_ok=True)


def _key(among: list[Runtime]) -> str:
    """Return what the measured times depend on, as text."""
    names = sorted({PACKAGES[runtime.name] for runtime in among} | {"torch"})
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in names)
    instructions = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        instructions = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    digest = hashlib.sha256(instructions.encode()).hexdigest()[:12]
    wanted = " ".join(map(str, among))
    return f"{cpu_name()} {digest}; {versions}; {torch.get_num_threads()} threads; {wanted}"


def _remembered(key: str) -> dict[str, float] | None:
    """Return times, ms, that were measured before; None if there are none that can be used."""
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
        times = {str(name): float(ms) for name, ms in content[key].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return times if times and all(0 < ms < 1e6 for ms in times.values()) else None


def _remember(key: str, times: dict[str, float]) -> None:
    """Add times to the cache; a folder that cannot be written only costs the next process a second or two."""
    path = _cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    if not isinstance(content, dict):
        content = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**content, key: times}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        LOG.warning("The measured run-times cannot be kept ('%s': %s).", path, error)
