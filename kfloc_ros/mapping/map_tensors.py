# SPDX-License-Identifier: Apache-2.0
"""A map's heads and reference views as the tensors of its two files, and back; ``docs/map-format.md`` lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from kfloc_ros.features.trunk import COARSE_CHANNELS, FINE_CHANNELS
from kfloc_ros.kfnet.experts import MAX_HEADS, Head, together
from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

MAX_HEAD_WIDTH, MAX_HEAD_BLOCKS = 2048, 32
FEATURE_STEPS = 127
"""Unit features are stored in one signed byte a channel; the rounding is far below the features' own noise."""


def head_size(heads: Sequence[SCoordNet]) -> dict[str, int]:
    """What ``map.yaml`` says of the heads, all of which have one size."""
    count = {"count": len(heads)} if len(heads) > 1 else {}
    return {"width": heads[0].width, "blocks": heads[0].blocks, **count}


def pack_heads(heads: Sequence[SCoordNet]) -> dict[str, torch.Tensor]:
    """Half precision but for what the inputs are normalised with, and where the outputs are relative to."""
    tensors = {}
    for number, head in enumerate(heads):
        for key, value in head.state_dict().items():
            exact = key.startswith("input_") or key == "centre"
            tensors[f"heads.{number}.{key}" if len(heads) > 1 else key] = value if exact else value.half()
    return {key: value.contiguous().cpu() for key, value in tensors.items()}


def unpack_heads(tensors: Mapping[str, torch.Tensor], size: Mapping[str, Any]) -> Head:
    """The heads of a size; it and their number are refused before memory is taken for them.

    Raises:
        ValueError: the size is no map's.
        RuntimeError: the tensors are not those of such heads.
    """
    width, blocks, count = int(size["width"]), int(size["blocks"]), int(size.get("count", 1))
    if not (1 <= width <= MAX_HEAD_WIDTH and 0 <= blocks <= MAX_HEAD_BLOCKS and 1 <= count <= MAX_HEADS):
        raise ValueError(f"no map has {count} heads with {blocks} blocks of {width}")
    head = together([SCoordNet(width, blocks) for _ in range(count)])
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


def pack_references(references: ReferenceViews) -> dict[str, torch.Tensor]:
    """The views' tensors, one after the other, as stored."""
    everything = ReferencePoints.concatenate(references.views)
    counts = [len(view) for view in references.views]
    return {
        "ids": torch.tensor(references.ids, dtype=torch.int64),
        "T_map_camera": torch.from_numpy(references.T_map_camera.copy()),
        "counts": torch.tensor(counts, dtype=torch.int64),
        "points": everything.points.contiguous(),
        "coarse": _quantize(everything.coarse),
        "fine": _quantize(everything.fine),
        "confidence": everything.confidence.half().contiguous(),
    }


def _quantize(unit_features: torch.Tensor) -> torch.Tensor:
    """(N, C) int8 of unit vectors (N, C); their length is restored on reading."""
    return (unit_features * FEATURE_STEPS).round().to(torch.int8).contiguous()


def unpack_references(tensors: Mapping[str, torch.Tensor]) -> ReferenceViews:
    """The views.

    Raises:
        ValueError: the tensors do not fit each other, or hold what no view can.
        KeyError: one is missing.
    """
    if tensors["counts"].ndim != 1 or tensors["ids"].shape != tensors["counts"].shape or not len(tensors["counts"]):
        raise ValueError("the reference views are not listed")
    total = int(tensors["counts"].sum())
    shapes = {"points": (3,), "coarse": (COARSE_CHANNELS,), "fine": (FINE_CHANNELS,), "confidence": ()}
    for name, channels in shapes.items():
        if tuple(tensors[name].shape) != (total, *channels):
            raise ValueError(f"the references' {name} have the shape {tuple(tensors[name].shape)}")
    counts = tensors["counts"].tolist()
    columns = {name: tensors[name].float() for name in ("points", "confidence")}
    columns |= {name: F.normalize(tensors[name].float(), dim=1) for name in ("coarse", "fine")}
    parts = {name: torch.split(columns[name], counts) for name in ("points", "coarse", "fine", "confidence")}
    views = tuple(
        ReferencePoints(points, coarse, fine, confidence)
        for points, coarse, fine, confidence in zip(*parts.values(), strict=True)
    )
    poses = tensors["T_map_camera"].double().numpy()
    if poses.shape != (len(views), 4, 4):
        raise ValueError("the reference poses do not fit the reference views")
    R = poses[:, :3, :3]
    turned = R @ R.transpose(0, 2, 1) - np.eye(3)
    if not (np.abs(turned).max() < 1e-2 and (np.linalg.det(R) > 0).all() and (poses[:, 3] == [0, 0, 0, 1]).all()):
        raise ValueError("the reference poses are no rigid poses")
    return ReferenceViews(tuple(int(i) for i in tensors["ids"].tolist()), poses, views)
