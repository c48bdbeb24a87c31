# SPDX-License-Identifier: Apache-2.0
"""Strict reader of the original PixLoc's ``checkpoint_best.tar``; no code in the file is executed.

Despite its name the file is written by ``torch.save``. It is read with ``weights_only``. Of all else that a pickle may
hold, only NumPy numbers are allowed, since the file's validation metrics are NumPy numbers.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from kfloc_ros.errors import ConfigError, WeightsError
from kfloc_ros.pixloc.reference.model import PixLocConfig, PixLocModel, load_model
from kfloc_ros.pixloc.reference.unet import BASIC, ENCODERS, RESNETS, VGGS, UNetConfig

DEPRECATED = frozenset({
    "lambda_", "learned_damping", "verbose", "sqrt_diag_damping", "bound_confidence", "no_conditions",
    "init_target_offset", "feature_dim",
})  # fmt: skip
"""Entries of older configurations, which the original ignores."""

_TRAINING_ONLY = frozenset({
    "name", "trainable", "freeze_batch_normalization", "success_thresh", "clamp_error", "normalize_dt",
    "checkpointed", "batch_size", "extractor", "optimizer", "duplicate_optimizer_per_scale", "grad_stop", "dt_stop",
    "dR_stop",
})  # fmt: skip
"""Known entries without effect on the model's computation here, or used elsewhere."""

_USED = {
    "model": {"normalize_features"},
    "extractor": {
        "encoder", "decoder", "decoder_norm", "output_scales", "output_dim", "do_average_pooling",
        "compute_uncertainty",
    },
    "optimizer": {"num_iters", "pad", "loss_fn", "jacobi_scaling", "damping", "interpolation", "normalize_features"},
}  # fmt: skip

_SHARED_DAMPING = "optimizer.dampingnet.const"
_NAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Model of a checkpoint, with notes for the user."""

    model: PixLocModel
    """Model in evaluation mode."""
    epoch: int | None
    unknown_options: tuple[str, ...]
    """Entries of the configuration that this reader does not know and did not use."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Read an original checkpoint.

    Raises:
        WeightsError: the file is missing, unreadable, contains anything but tensors and plain values, or does not fit
            the network; the message names the entries at fault.
    """
    content = _load(path)
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise WeightsError(f"'{path}' is not a PixLoc checkpoint: it has no dictionary 'model'.")
    state = {str(name): value for name, value in content["model"].items()}
    conf = content.get("conf")
    model_conf = conf.get("model") if isinstance(conf, Mapping) else None
    try:
        config, unknown = _config(state, model_conf if isinstance(model_conf, Mapping) else {})
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"The configuration in '{path}' cannot be used: {error}") from error
    model = PixLocModel(config)
    _fill(model, state, path)
    epoch = content.get("epoch")
    return Checkpoint(model.eval(), epoch if isinstance(epoch, int) else None, unknown)


def load_weights(path: Path) -> PixLocModel:
    """Read a converted model (``.safetensors``) or an original checkpoint (``.tar``), in evaluation mode.

    Raises:
        WeightsError: see :func:`load_model` and :func:`read_checkpoint`.
    """
    return read_checkpoint(path).model if path.suffix == ".tar" else load_model(path)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"There is no checkpoint '{path}'.")
    make_scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [np.dtype, *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "bool"))]
    allowed += [(make_scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise WeightsError(
            f"'{path}' holds something that is neither a tensor nor a plain value, or is damaged; it was not loaded. "
            f"({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise WeightsError(f"'{path}' is not a checkpoint, or is damaged: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _config(state: Mapping[str, Any], conf: Mapping[str, Any]) -> tuple[PixLocConfig, tuple[str, ...]]:
    parts: dict[str, Mapping[str, Any]] = {"model": conf}
    for name in ("extractor", "optimizer"):
        part = conf.get(name)
        parts[name] = part if isinstance(part, Mapping) else {}
    unknown = tuple(
        f"{where}.{key}"
        for where, part in parts.items()
        for key in part
        if key not in _USED[where] | _TRAINING_ONLY | DEPRECATED
    )
    extractor, optimizer = parts["extractor"], parts["optimizer"]
    norm = extractor.get("decoder_norm", "nn.BatchNorm2d")
    if "BatchNorm2d" not in str(norm):
        raise ConfigError(f"its decoder has the normalisation '{norm}', and only batch normalisation is supported.")
    if optimizer.get("normalize_features"):
        raise ConfigError("its optimizer normalises features after interpolation, which no published model does.")
    interpolation = optimizer.get("interpolation")
    interpolation = interpolation if isinstance(interpolation, Mapping) else {}
    if interpolation.get("mode", "linear") != "linear":
        raise ConfigError(f"it interpolates by '{interpolation['mode']}', which no published model does.")
    defaults, shape = PixLocConfig(), UNetConfig()
    damping = optimizer.get("damping")
    log_range = damping.get("log_range") if isinstance(damping, Mapping) else None
    learned = any(name.endswith("dampingnet.const") for name in state)
    unet = UNetConfig(
        encoder=_encoder(state, extractor.get("encoder")),
        decoder=_integers(extractor.get("decoder"), shape.decoder),
        output_scales=_integers(extractor.get("output_scales"), shape.output_scales),
        output_dim=_integers(extractor.get("output_dim"), shape.output_dim),
        average_pooling=bool(extractor.get("do_average_pooling", False)),
        # Without an option, the state dict decides.
        confidences=bool(extractor.get("compute_uncertainty", any("uncertainty" in name for name in state))),
    )
    config = PixLocConfig(
        extractor=unet,
        normalize_features=bool(conf.get("normalize_features", True)),
        loss=str(optimizer.get("loss_fn", defaults.loss)),
        num_iters=int(optimizer.get("num_iters", defaults.num_iters)),
        pad=int(optimizer.get("pad", interpolation.get("pad", defaults.pad))),
        jacobi_scaling=bool(optimizer.get("jacobi_scaling", False)),
        learned_damping=learned,
        lambda_=0.0 if learned else float(optimizer.get("lambda_", 0.0)),
        damping_log10_range=defaults.damping_log10_range if log_range is None else _pair(log_range),
    )
    return config, unknown


def _encoder(state: Mapping[str, Any], named: Any) -> str:
    """Return the encoder that the state dict fits; the configuration must agree."""
    convolutions = sum(bool(re.fullmatch(r"extractor\.encoder\.2\.\d+\.weight", name)) for name in state)
    blocks = tuple(
        sum(name.startswith(prefix) and name.endswith(".conv1.weight") for name in state) for prefix in _LAYERS
    )
    is_basic = not any(name.endswith(".conv3.weight") for name in state)
    shown = next((name for name, counts in VGGS.items() if counts[2] == convolutions), None)
    if any(blocks):
        shown = next((name for name, n in RESNETS.items() if n == blocks and (name in BASIC) == is_basic), None)
    if shown is None:
        kind = f" (it names '{named}')" if named else ""
        raise ConfigError(
            f"its encoder is none of {', '.join(ENCODERS)}{kind}: block 2 has {convolutions} convolutions, and its "
            f"layers {blocks} residual blocks."
        )
    if named is not None and named != shown:
        raise ConfigError(f"it names the encoder '{named}', but its entries are those of {shown}.")
    return shown


_LAYERS = tuple(f"extractor.encoder.{part}." for part in ("2.0.1", "3.0", "4.0"))
"""Beginnings of the parameters' names in a ResNet's layers."""


def _integers(values: Any, default: tuple[int, ...]) -> tuple[int, ...]:
    return default if values is None else tuple(int(value) for value in values)


def _pair(values: Any) -> tuple[float, float]:
    low, high = (float(value) for value in values)
    return low, high


def _fill(model: PixLocModel, state: dict[str, Any], path: Path) -> None:
    expected = model.state_dict()
    if _SHARED_DAMPING in state:
        shared = state.pop(_SHARED_DAMPING)
        state |= {name: shared for name in expected if name.startswith("optimizer.")}
    problems: list[str] = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"lacks {_listed(missing)}")
    if unknown := [name for name in state if name not in expected]:
        problems.append(f"has the unknown entries {_listed(unknown)}")
    for name in expected.keys() & state.keys():
        value, wanted = state[name], expected[name]
        if not isinstance(value, torch.Tensor):
            problems.append(f"has '{name}' that is no tensor")
        elif value.shape != wanted.shape:
            problems.append(f"has '{name}' of shape {tuple(value.shape)} where {tuple(wanted.shape)} is due")
        elif not value.isfinite().all():
            problems.append(f"has values in '{name}' that are not finite")
    if problems:
        raise WeightsError(
            f"The checkpoint '{path}' does not fit PixLoc with {model.config.extractor.encoder}: it "
            + "; it ".join(problems[:_NAMES_SHOWN])
            + "."
        )
    model.load_state_dict(state)


def _listed(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
