# SPDX-License-Identifier: Apache-2.0
"""Whole benchmark scenes with their official splits, written ``7scenes:DIR@train`` or ``12scenes:DIR@test``."""

from __future__ import annotations

import re
from pathlib import Path

from kfloc_ros.datasets.base import FrameSource
from kfloc_ros.datasets.scenes import SEVEN_SCENES
from kfloc_ros.datasets.sequences import Sequences
from kfloc_ros.datasets.seven_scenes import SevenScenes
from kfloc_ros.errors import SourceError

PARTS = ("train", "test")


def split_part(path: str) -> tuple[Path, str | None]:
    """Folder and part of ``DIR`` or ``DIR@train``."""
    folder, mark, part = path.rpartition("@")
    return (Path(folder), part) if mark and part in PARTS else (Path(path), None)


def seven_scenes(root: Path, part: str, *, poses: str, depth: bool) -> FrameSource:
    """All sequences of a part of a 7-Scenes scene, by its ``TrainSplit.txt``/``TestSplit.txt`` or, without, its name.

    Raises:
        SourceError: the split is unknown or a sequence is missing.
    """
    numbers = _listed(root / f"{part.capitalize()}Split.txt")
    if numbers is None:
        scene = SEVEN_SCENES.get(root.name.lower())
        if scene is None:
            known = ", ".join(SEVEN_SCENES)
            raise SourceError(
                f"'{root}' has no {part.capitalize()}Split.txt and is not named like one of the scenes {known}."
            )
        numbers = list(scene.train if part == "train" else scene.test)
    folders = [root / f"seq-{number:02d}" for number in numbers]
    if missing := [folder.name for folder in folders if not folder.is_dir()]:
        raise SourceError(f"'{root}' lacks {', '.join(missing)} of its {part} split.")
    return Sequences(root.name, [SevenScenes(folder, poses=poses, depth=depth) for folder in folders])


def _listed(path: Path) -> list[int] | None:
    if not path.is_file():
        return None
    numbers = [int(n) for n in re.findall(r"(?m)^\s*sequence(\d+)", path.read_text(encoding="utf-8"))]
    if not numbers:
        raise SourceError(f"'{path}' names no sequence; its lines are like 'sequence3'.")
    return numbers
