# SPDX-License-Identifier: Apache-2.0
"""What a training leaves behind: checkpoints, written whole or not at all and never pickled, and its log.

A checkpoint's tensors are in safetensors, the rest in JSON. The log is ``log.jsonl``; where TensorBoard is installed,
its event files are written as well.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from kfloc_ros.errors import WeightsError
from kfloc_ros.files import read_json, replacing, save_tensors

STATE_FILE = "state.json"
LOG_FILE = "log.jsonl"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    step: int
    seconds: float
    """Time spent in training, over all its runs."""


def save_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: Mapping[str, Any],
) -> None:
    """Write the next checkpoint and then remove the one before.

    ``state.json`` names the tensors' file and is replaced in one go: a kill at any time leaves one whole checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"module.{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()
    }
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
    path = folder / f"checkpoint-{progress.step:09d}.safetensors"
    save_tensors(tensors, path)
    state = {
        "version": FORMAT_VERSION,
        "step": progress.step,
        "seconds": round(progress.seconds, 3),
        "tensors": path.name,
        "config": dict(config),
    }
    with replacing(folder / STATE_FILE) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(state, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    for old in folder.glob("*checkpoint-*.safetensors"):
        if old != path:
            old.unlink()


def load_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any],
    free: frozenset[str] = frozenset(),
) -> Progress | None:
    """Restore the newest checkpoint of a folder; None if there is none.

    Args:
        folder: of the training.
        modules: to fill.
        optimizer: to fill; its parameters in the same order as when saved.
        config: must be the saved one, or the result would be neither the old training nor a new one; what an older
            version did not save yet may be anything.
        free: keys of the configuration that may differ.

    Raises:
        WeightsError: the checkpoint is damaged, or belongs to another configuration.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        return None
    try:
        state = read_json(path)
        if state["version"] != FORMAT_VERSION:
            raise WeightsError(f"'{path}' has version {state['version']}; this installation reads {FORMAT_VERSION}.")
        saved = dict(state["config"])
        differing = [k for k in config if k in saved and k not in free and saved[k] != config[k]]
        if differing:
            key = differing[0]
            raise WeightsError(
                f"'{folder}' holds a training with {key}={saved.get(key)!r}, now {config[key]!r}; "
                "continue with the same options, or name another folder."
            )
        tensors = load_file(folder / Path(state["tensors"]).name)
        for name, module in modules.items():
            module.load_state_dict(_below(tensors, f"module.{name}."))
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in _below(tensors, "optimizer.").items():
            index, field = key.split(".")
            entries.setdefault(int(index), {})[field] = value
        current = optimizer.state_dict()
        optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})
        progress = Progress(int(state["step"]), float(state["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise WeightsError(f"The checkpoint in '{folder}' is damaged: {error}.") from error
    if not math.isfinite(progress.seconds) or progress.step < 0:
        raise WeightsError(f"The checkpoint in '{folder}' is damaged: step {progress.step}.")
    return progress


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class TrainingLog:
    """Figures of a training by step, one JSON object a line; for TensorBoard, too, where it is installed.

    Args:
        folder: of the training.
        step: after which this run goes on. What a run that was killed logged of later steps is cut off.
        writes: False: nothing is written, as by all but the first of several processes.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True) -> None:
        self._stream: TextIO | None = None
        self._events: Any = None
        if not writes:
            return
        _forget_after(folder / LOG_FILE, step)
        self._stream = (folder / LOG_FILE).open("a", encoding="utf-8")
        self._events = _summary_writer(folder, step)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step; one that is not finite becomes null."""
        if self._stream is None:
            return
        clean = {key: value if math.isfinite(value) else None for key, value in figures.items()}
        self._stream.write(json.dumps({"step": step, **clean}) + "\n")
        self._stream.flush()
        if self._events is not None:
            for key, value in clean.items():
                if value is not None:
                    self._events.add_scalar(key, value, step)
            self._events.flush()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        if self._events is not None:
            self._events.close()


def _summary_writer(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def _forget_after(log: Path, step: int) -> None:
    """Cut off what a run that was killed logged after its last checkpoint: these steps are made again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the line that the kill cut short
    with replacing(log) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
