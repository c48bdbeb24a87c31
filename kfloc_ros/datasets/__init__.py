# SPDX-License-Identifier: Apache-2.0
"""Sources of frames: ``open_source("7scenes:DIR")`` and friends."""

from __future__ import annotations

from kfloc_ros.datasets.kinds import KINDS, detect_kind
from kfloc_ros.frames import FrameSource, Selection, select, usable

__all__ = ["SOURCE_KINDS", "FrameSource", "Selection", "open_source", "select"]

SOURCE_KINDS = {name: kind.text for name, kind in KINDS.items()}
"""Prefix of a SOURCE and what it holds."""


def open_source(
    spec: str,
    *,
    poses: str = "file",
    frames: str | None = None,
    split: str | None = None,
    depth: bool = True,
    strict: bool = False,
) -> FrameSource:
    """Open ``KIND:PATH``, or a path whose kind is then found out, and keep the frames asked for.

    Args:
        spec: such as ``7scenes:/data/redkitchen/seq-01``, ``bag:/data/kitchen_bag`` or ``/data/kitchen_bag``, and
            after a ``?`` the options of :mod:`kfloc_ros.datasets.source_options`.
        poses: which ground truth, where a source has several (``file`` or ``sfm``).
        frames: see :func:`select`.
        split: see :func:`select`.
        depth: read the depth images; without, a 7-Scenes frame loads a hundred times faster.
        strict: refuse the source for a frame that cannot be used; else such frames are left out, counted and named.

    Raises:
        SourceError: unknown or ambiguous kind, missing or damaged data, or an empty selection.
    """
    from kfloc_ros.datasets.source_options import split_options, with_options  # loads torch, which help does not need

    spec, options = split_options(spec)
    kind, separator, path = spec.partition(":")
    if not separator or kind not in KINDS:
        kind, path = detect_kind(spec), spec
    source = with_options(KINDS[kind].open(path, poses, depth), options)
    return usable(select(source, frames=frames, split=split), strict=strict)
