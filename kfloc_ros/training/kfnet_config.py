# SPDX-License-Identifier: Apache-2.0
"""Options of training KFNet's networks, and the published schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kfloc_ros.config import option
from kfloc_ros.datasets.scenes import Scene
from kfloc_ros.kfnet.reference.weights import OFLOWNET
from kfloc_ros.training.loop import LoopConfig, Schedule
from kfloc_ros.training.stage import Stage


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Options of ``kfloc train``, each settable as key=value; the defaults are the published schedule."""

    FREE_KEYS: ClassVar[frozenset[str]] = LoopConfig.FREE_KEYS | {"remember_mb", "precision", "compile"}

    steps: int = option(0, "Steps in all; 0: all halvings of the learning rate.", low=0)
    halvings: int = option(5, "Of the learning rate, in all; published: 3 for outdoor scenes.", low=1, high=100)
    halving_steps: int = option(100_000, "Steps in which the learning rate halves, continuously.", low=1)
    learning_rate: float = option(1e-4, "At step 0.", low=0.0, high=1.0)
    weight_decay: float = option(1e-4, "L2 on all variables, added to the gradient.", low=0.0)
    batch: int = option(0, "Samples in a step; 0: 4 images, 1 pair or 1 group of four.", low=0, high=1024)
    width: float = option(1.0, "Share of SCoordNet's published channels.", low=0.01, high=4.0)
    padding: str = option("centred", "Of convolutions.", choices=("centred", "tensorflow"))
    scale: float = option(1.0, "Network units per metre; below 1 for large outdoor scenes.", low=1e-6, high=1e3)
    image_width: int = option(0, "Scale images to this width; 0 keeps them.", low=0, high=10_000)
    image_height: int = option(0, "And to this height; 0 keeps their shape, to a multiple of 8.", low=0, high=10_000)
    augment: str = option("stage", "Augmentation.", choices=("stage", "none", "rotate", "full"))
    max_step: int = option(1, "Largest step of the frame index between neighbouring frames.", low=1)
    spacing: int = option(1, "Frames from one of a group to the next; more where images are small.", low=1, high=1000)
    truncation: bool = option(True, "Truncate the likelihood in stages 2 and 3.")
    noise: bool = option(False, "Stage 2: noise of 5 to 10 mm on the coordinates that are warped.")
    reset_step: bool = option(
        False, "Stage 3: the whole schedule, not its last halving; stages 1 and 2: from step 0 after --finetune."
    )
    fix_flow: bool = option(False, "Stage 3: train SCoordNet only.")
    precision: str = option("float32", "Of the forward pass.", choices=("float32", "bfloat16"))
    compile: bool = option(False, "Compile the networks; pays on a GPU after some minutes.")
    seed: int = option(0, "Of initial weights, order and augmentation.", low=0)
    snapshot_every: int = option(5000, "Steps between checkpoints; one is also written at the end.", low=1)
    log_every: int = option(50, "Steps between lines of the log.", low=1)
    workers: int = option(4, "Threads that read images.", low=1, high=64)
    remember_mb: int = option(
        2000,
        "Images and depth kept in memory, at the networks' size, so that they are read once.",
        low=0,
        high=1_000_000,
    )

    def schedule(self, stage: Stage[Any]) -> Schedule:
        published = self.halvings * self.halving_steps
        starts_late = stage.last_halving_only and not self.steps and not self.reset_step
        return Schedule(
            first=published - self.halving_steps if starts_late else 0,
            last=self.steps or published,
            batch=self.batch or stage.batch,
            rates=self.rates,
            weight_decay=self.weight_decay,
            precision=self.precision,
            compile=self.compile,
        )

    def rates(self, step: int) -> tuple[float]:
        """Return the learning rate at a step: it halves continuously."""
        return (float(self.learning_rate * 0.5 ** (step / self.halving_steps)),)


def scene_options(scene: Scene, stage: str) -> dict[str, Any]:
    """Return the options that a benchmark's scene was published with.

    OFlowNet is one network for all scenes: only the size of the images and the scale are the scene's.
    """
    width, height = scene.image_size
    options: dict[str, Any] = {"image_width": width, "image_height": height, "scale": scene.scale}
    if stage != OFLOWNET:
        options |= {"halving_steps": scene.halving_steps, "halvings": scene.halvings}
    return options
