# SPDX-License-Identifier: Apache-2.0
"""Damage to files of maps and places, for the tests that read whatever is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

TYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int8, torch.int64, torch.bool, torch.uint8])
SHAPES = st.one_of(st.none(), st.lists(st.integers(0, 6), max_size=4))
FILLS = st.sampled_from([0.0, 1.0, -1.0, 1e4, 1e30, 3e38, float("nan"), float("inf"), 1e-40])

TensorChange = tuple[str, torch.dtype | None, list[int] | None, float]
"""Name of a tensor, its new type and shape, None for its own, and the value that fills it."""


def tensor_changes(names: Sequence[str]) -> st.SearchStrategy[list[TensorChange]]:
    """One or two tensors of any type, shape and value."""
    change = st.tuples(st.sampled_from(names), st.one_of(st.none(), TYPES), SHAPES, FILLS)
    return st.lists(change, min_size=1, max_size=2)


def write_changed(good: Mapping[str, torch.Tensor], changes: Sequence[TensorChange], file: Path) -> None:
    """Write tensors with the changes made one after the other."""
    tensors = {key: value.clone() for key, value in good.items()}
    for name, dtype, shape, fill in changes:
        size = tuple(tensors[name].shape) if shape is None else tuple(shape)
        kind = tensors[name].dtype if dtype is None else dtype
        tensors[name] = torch.full(size, fill, dtype=torch.float64).to(kind)
    save_file(tensors, file)


def damaged_archive(good: bytes, edits: Sequence[tuple[int, int]], length: int | None) -> bytes:
    """An archive cut off, and bytes changed, counted from the end, where names and sizes are."""
    data = bytearray(good if length is None else good[: length % len(good)])
    for at, value in edits:
        if data:
            data[-1 - at % len(data)] = value
    return bytes(data)
