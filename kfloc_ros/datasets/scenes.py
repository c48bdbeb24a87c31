# SPDX-License-Identifier: Apache-2.0
"""The benchmark scenes that KFNet was published with: sizes, scales, official splits and training schedules.

One table for each dataset. Splits are those of the datasets' authors; scales and schedules are from KFNet's code,
where outdoor scenes were shrunk by ``scale`` (their results cannot be had without). ``kfloc train ... --scene NAME``
takes all of them but the splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kfloc_ros.errors import ConfigError


@dataclass(frozen=True)
class Scene:
    """One scene of a benchmark."""

    image_size: tuple[int, int]
    """Width and height that KFNet works at."""
    halving_steps: int
    """Training steps of SCoordNet in which the learning rate halves."""
    halvings: int = 5
    """The schedule is this many times as long."""
    scale: float = 1.0
    """Network units per metre."""
    train: tuple[int, ...] = field(default=())
    """Numbers of the training sequences; empty where the dataset brings lists of its own."""
    test: tuple[int, ...] = field(default=())


VGA = (640, 480)
CAMBRIDGE_SIZE = (848, 480)
"""Images of 852 x 480, cropped by 2 pixels on each side."""

SEVEN_SCENES = {
    "chess": Scene(VGA, 100_000, train=(1, 2, 4, 6), test=(3, 5)),
    "fire": Scene(VGA, 30_000, train=(1, 2), test=(3, 4)),
    "heads": Scene(VGA, 60_000, train=(2,), test=(1,)),
    "office": Scene(VGA, 100_000, train=(1, 3, 4, 5, 8, 10), test=(2, 6, 7, 9)),
    "pumpkin": Scene(VGA, 100_000, train=(2, 3, 6, 8), test=(1, 7)),
    "redkitchen": Scene(VGA, 100_000, train=(1, 2, 5, 7, 8, 11, 13), test=(3, 4, 6, 12, 14)),
    "stairs": Scene(VGA, 100_000, train=(2, 3, 5, 6), test=(1, 4)),
}

TWELVE_SCENES = {
    "apt1/kitchen": Scene(VGA, 30_000),
    "apt1/living": Scene(VGA, 30_000),
    "apt2/bed": Scene(VGA, 30_000),
    "apt2/kitchen": Scene(VGA, 30_000),
    "apt2/living": Scene(VGA, 70_000),
    "apt2/luke": Scene(VGA, 140_000),
    "office1/gates362": Scene(VGA, 70_000),
    "office1/gates381": Scene(VGA, 140_000),
    "office1/lounge": Scene(VGA, 70_000),
    "office1/manolis": Scene(VGA, 70_000),
    "office2/5a": Scene(VGA, 70_000),
    "office2/5b": Scene(VGA, 140_000),
}
"""The first sequence of each scene's ``split.txt`` is for testing, all others for training."""

CAMBRIDGE = {
    "GreatCourt": Scene(CAMBRIDGE_SIZE, 1_200_000, 3, 0.01),
    "KingsCollege": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.02),
    "OldHospital": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.1),
    "ShopFacade": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.1),
    "StMarysChurch": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.05),
    "Street": Scene(CAMBRIDGE_SIZE, 3_000_000, 3, 0.005),
    "Street-east": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.02),
    "Street-west": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.02),
    "Street-south": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.02),
    "Street-north1": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.02),
    "Street-north2": Scene(CAMBRIDGE_SIZE, 200_000, 3, 0.02),
}
"""``dataset_train.txt`` and ``dataset_test.txt`` of each scene hold its split; the parts of Street are KFNet's own."""

DEEPLOC = {"DeepLoc": Scene((864, 480), 200_000, 3, 0.02)}
"""Its folders ``train`` and ``test`` are its split."""

DATASETS: Mapping[str, Mapping[str, Scene]] = {
    "7-Scenes": SEVEN_SCENES,
    "12-Scenes": TWELVE_SCENES,
    "Cambridge Landmarks": CAMBRIDGE,
    "DeepLoc": DEEPLOC,
}


PARTS = ("train", "test")
"""Names of a scene's official splits."""


def split_part(path: str) -> tuple[Path, str | None]:
    """Return folder and part of ``DIR`` or ``DIR@train``."""
    folder, mark, part = path.rpartition("@")
    return (Path(folder), part) if mark and part in PARTS else (Path(path), None)


def find_scene(name: str) -> Scene:
    """Return the scene of a name: ``fire``, ``apt1/kitchen`` (also ``apt1-kitchen``), ``gates362``, ``ShopFacade``.

    Raises:
        ConfigError: no scene, or several, have that name.
    """
    known = {key.lower(): scene for scenes in DATASETS.values() for key, scene in scenes.items()}
    wanted = name.lower()
    if wanted in known:
        return known[wanted]
    if (parted := wanted.replace("-", "/", 1)) in known:
        return known[parted]
    found = [key for key in known if key.rpartition("/")[2] == wanted]
    if len(found) == 1:
        return known[found[0]]
    if found:
        raise ConfigError(f"There are several scenes '{name}': {', '.join(found)}; name one of them.")
    tables = "; ".join(f"{dataset}: {', '.join(scenes)}" for dataset, scenes in DATASETS.items())
    raise ConfigError(f"There is no scene '{name}' in the tables. {tables}.")
