# SPDX-License-Identifier: Apache-2.0
"""Map build: one pass over the views, training of the head, calibration on held-out views."""

from __future__ import annotations

import dataclasses
import datetime
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kfloc_ros import __version__
from kfloc_ros.config import option
from kfloc_ros.device import choose_device
from kfloc_ros.errors import MapError
from kfloc_ros.features.backbone import Backbone, find_weights
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import rotation_angle_deg
from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.mapping.calibration import calibrate
from kfloc_ros.mapping.mapping_pass import MappingPass, MappingPassSettings, describe_left_out, mapping_pass_over
from kfloc_ros.mapping.pose_covariance import ABSURD_COVARIANCE_SCALE
from kfloc_ros.mapping.scene_head import HeadProgress, HeadTraining, train_head
from kfloc_ros.mapping.schedule import HeldOut, TimeBudget
from kfloc_ros.mapping.views import View, map_camera
from kfloc_ros.maps.files import MAX_POINTS
from kfloc_ros.maps.format import DESCRIPTION
from kfloc_ros.maps.scene_map import Calibration, SceneMap

MIN_CALIBRATION_VIEWS = 3
VIEWS_PER_FAR_VIEW = 3
"""Held-out views for each view that is aligned without what is near it, if time is limited: it takes three times as
long."""
FEW_REFERENCES = 4
ALIKE_M, ALIKE_DEG = 0.25, 20.0
"""Extent of the reference views below which they count as alike."""
LARGE_OWN_ERROR_M, LARGE_OWN_ERROR_DEG = 0.02, 0.6
"""Own errors of a map, on each axis, that are worth a sentence."""


@dataclass(frozen=True)
class MapBuildConfig:
    """Options of ``kfloc map build``."""

    train_seconds: float = option(
        180.0,
        "Longest training time of the head, in seconds; up to twice that on a slow machine. It ends sooner if the "
        "error on held-out views stops falling.",
        low=1.0,
        high=86_400.0,
    )
    train_steps: int = option(
        0, "Number of training steps, for a repeatable map on a machine of any speed; 0: train by time.", low=0
    )
    budget_s: float = option(
        0.0,
        "Time budget of the whole build, in seconds; views are left out if necessary. 0: no limit.",
        low=0.0,
        high=86_400.0,
    )
    augmentations: int = option(1, "Augmented copies (rotated and zoomed) of every view for training.", low=0, high=10)
    points_per_view: int = option(300, "Points stored per reference view.", low=50, high=5000)
    reference_spacing_m: float = option(
        0.04, "Smallest distance between reference views, in metres (1 deg counts as 0.02 m).", low=0.001, high=10.0
    )
    max_points: int = option(
        100_000,
        "Limit on reference points, about 150 bytes each; the spacing of the views grows if necessary.",
        low=1_000,
        high=MAX_POINTS,
    )
    device: str = option(
        "auto", "Device of the networks; auto: a GPU if there is one.", choices=("auto", "cpu", "cuda")
    )
    seed: int = option(0, "Seed of all random choices.", low=0)


@dataclass(frozen=True)
class BuildProgress:
    """Progress of a build, for display."""

    stage: str
    share_done: float
    text: str = ""


Report = Callable[[BuildProgress], None]


@dataclass(frozen=True, eq=False)
class MadeMap:
    """Map in memory, with views that it was not trained on."""

    scene_map: SceneMap
    held_out: Sequence[View]


def build_map(
    source: FrameSource,
    out: Path,
    config: MapBuildConfig | None = None,
    *,
    name: str = "",
    overwrite: bool = False,
    provenance: dict[str, Any] | None = None,
    started: float | None = None,
    on_progress: Report = lambda progress: None,
) -> SceneMap:
    """Build a map from a source with depth and poses and write it.

    The map is written in one step at the end: an interrupted build leaves an older map unchanged.

    Args:
        source: see :func:`make_map`.
        out: folder to write.
        config: options.
        name: name of the map; by default the name of the folder.
        overwrite: replace an existing map.
        provenance: additional entries for the map's description of its origin.
        started: see :func:`make_map`.
        on_progress: called with the progress of the build.

    Raises:
        SourceError: too few views with depth and pose, or a time budget that is too short.
        MapError: the folder exists and ``overwrite`` is false, or it cannot be written.
    """
    check_free(out, overwrite=overwrite)
    start = time.monotonic()
    made = make_map(
        source, config, name=name or out.name, provenance=provenance, started=started, on_progress=on_progress
    )
    made.scene_map.save(out, overwrite=overwrite)
    on_progress(BuildProgress("done", 1.0, f"'{out}' after {time.monotonic() - start:.0f} s"))
    return SceneMap.load(out)


_NEEDED_BYTES = 4_000_000
"""Free space that the smallest maps need."""


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that must not be written, before minutes of work.

    Raises:
        MapError: the folder exists and ``overwrite`` is false, it is not a map, or nothing can be written beside it.
    """
    if out.exists() and not (overwrite and (out / DESCRIPTION).is_file()):
        raise MapError(f"'{out}' exists; pass --force to replace a map, or give another folder.")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Refuse a folder beside which nothing can be written, such as on a full disk.

    Raises:
        MapError: nothing can be written there.
    """
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{out.name}.", dir=parent) as probe:
            probe.write(bytes(_NEEDED_BYTES))
    except OSError as error:
        raise MapError(f"No map can be written to '{out}': {error.strerror}.") from error


def make_map(
    source: FrameSource,
    config: MapBuildConfig | None = None,
    *,
    camera: Camera | None = None,
    name: str = "",
    provenance: dict[str, Any] | None = None,
    started: float | None = None,
    on_progress: Report = lambda progress: None,
) -> MadeMap:
    """Build a map in memory.

    Args:
        source: views with depth and poses.
        config: options.
        camera: camera of the map; by default a pinhole camera derived from the source's, see ``map_camera``.
        name: name of the map.
        provenance: additional entries for the map's description of its origin.
        started: start of the time budget, from ``time.monotonic``; by default now.
        on_progress: called with the progress of the build.

    Raises:
        SourceError: too few views with depth and pose, or a time budget that is too short.
        MapError: depth, poses and images contradict each other.
    """
    config = config or MapBuildConfig()
    start = time.monotonic()
    time_budget = TimeBudget(config.budget_s, start if started is None else started)
    device = choose_device(config.device)
    camera = camera or map_camera(source.camera)
    settings = MappingPassSettings(
        config.augmentations, config.points_per_view, config.reference_spacing_m, config.max_points, config.seed
    )

    def reading(position: int) -> None:
        on_progress(BuildProgress("read", position / len(source), f"view {position + 1} of {len(source)}"))

    mapping_pass = mapping_pass_over(
        source, camera, Backbone(device=device, runtime="auto"), settings, time_budget, reading
    )
    held_out = affordable(
        mapping_pass.held_out, time_budget.calibration_views(len(mapping_pass.held_out), mapping_pass.backbone_pass_s)
    )
    draft = SceneMap(
        name=name or source.name,
        frame_id="map",
        camera=camera,
        head=_train(mapping_pass, config, time_budget, len(held_out), device, on_progress),
        references=mapping_pass.references.views,
        calibration=Calibration(),
        bounds_m=_bounds(mapping_pass.cells.coordinates),
        provenance={
            "source": source.name,
            "views": mapping_pass.used,
            **_left_out(mapping_pass),
            "references": len(mapping_pass.all_references.ids),
            "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "kfloc_ros": __version__,
            "backbone": find_weights().name,
            **(provenance or {}),
            "build_seconds": round(time.monotonic() - start, 1),
        },
    )

    def calibrating(share: float, text: str) -> None:
        on_progress(BuildProgress("calibrate", share, text))

    checked = mapping_pass.references
    if time_budget.limited:
        checked = checked.with_spread(len(held_out) // VIEWS_PER_FAR_VIEW)
    finished = calibrate(draft, held_out, config.device, calibrating, checked)
    _check_sane(finished.calibration)
    finished = dataclasses.replace(finished, references=mapping_pass.all_references)
    return MadeMap(finished, [held.view for held in mapping_pass.held_out])


def _check_sane(calibration: Calibration) -> None:
    """Refuse a map whose held-out views contradict it.

    Raises:
        MapError: the alignment's errors are far larger than its residuals allow.
    """
    scale = calibration.refined_covariance_scale
    if scale > ABSURD_COVARIANCE_SCALE:
        raise MapError(
            "The map is not written, because it contradicts itself: on views that it was not made from, the errors of "
            f"aligned poses are {math.sqrt(scale):.0f} times as large as its points allow. The likely cause is depth "
            "in another unit than the poses, or poses of another camera or time. `kfloc check SOURCE` measures these "
            "and names the source's option, such as depth_scale=5."
        )


def weaknesses(scene_map: SceneMap) -> list[str]:
    """Return sentences on what makes a new map weak: few or like reference views, or views that disagree."""
    T = scene_map.references.T_map_camera
    count = len(T)
    if count < FEW_REFERENCES:
        views = "reference view" if count == 1 else "reference views"
        return [
            f"The map has only {count} {views}: it localizes cameras near them only. Record more of the place, while "
            "moving."
        ]
    extent_m = float(np.linalg.norm(np.ptp(T[:, :3, 3], axis=0)))
    turned_deg = max(rotation_angle_deg(T[0, :3, :3].T @ other[:3, :3]) for other in T)
    if extent_m < ALIKE_M and turned_deg < ALIKE_DEG:
        return [
            f"All {count} reference views are alike: within {100 * extent_m:.0f} cm and {turned_deg:.0f} deg. The map "
            "localizes cameras near them only. Record more of the place, while moving."
        ]
    own_m, own_deg = scene_map.calibration.own_error_m, math.degrees(scene_map.calibration.own_error_rad)
    if own_m > LARGE_OWN_ERROR_M or own_deg > LARGE_OWN_ERROR_DEG:
        return [
            f"The poses of the map's views disagree: {100 * own_m:.1f} cm and {own_deg:.1f} deg on each axis. If they "
            "are of a tracking camera or of odometry, --adjust-poses corrects them."
        ]
    return []


def _train(
    mapping_pass: MappingPass,
    config: MapBuildConfig,
    time_budget: TimeBudget,
    calibration_views: int,
    device: torch.device,
    report: Report,
) -> SCoordNet:
    def training(progress: HeadProgress) -> None:
        text = f"loss {progress.loss:.2f}, error {progress.median_error_m * 100:.1f} cm, step {progress.step}"
        report(BuildProgress("train", progress.share_done, text))

    settings = HeadTraining(seconds=config.train_seconds, steps=config.train_steps, seed=config.seed)
    if time_budget.limited:
        seconds = time_budget.training_s(calibration_views, mapping_pass.backbone_pass_s)
        settings = dataclasses.replace(settings, seconds=seconds, stretches=False)
    cells, others = mapping_pass.cells, mapping_pass.held_out_cells
    return train_head(cells.inputs, cells.coordinates, settings, device, training, (others.inputs, others.coordinates))


def affordable(held_out: Sequence[HeldOut], count: int) -> Sequence[HeldOut]:
    """Return ``count`` of the held-out views, in evenly chosen runs: those that there is time to calibrate with."""
    runs: dict[int, list[HeldOut]] = {}
    for held in held_out:
        runs.setdefault(held.run, []).append(held)
    step = -(-len(held_out) // max(count, 1))
    chosen = [held for number, run in enumerate(runs.values()) if number % step == 0 for held in run]
    return chosen[: max(count, MIN_CALIBRATION_VIEWS)]


def _left_out(mapping_pass: MappingPass) -> dict[str, Any]:
    noted: dict[str, Any] = {"views_left_out": sum(mapping_pass.left_out.values())}
    if mapping_pass.left_out:
        noted["left_out"] = describe_left_out(mapping_pass.left_out)
    if mapping_pass.unread:
        noted["unread_for_want_of_time"] = mapping_pass.unread
    return noted


def _bounds(points: torch.Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return the box that contains 99.8 % of the points per axis, so that a few depth outliers have no effect."""
    sample = points[:: max(1, len(points) // 100_000)].double()
    low, high = (torch.quantile(sample, q, dim=0).tolist() for q in (0.001, 0.999))
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])
