# SPDX-License-Identifier: Apache-2.0
"""Content of Rerun recordings: maps, frames with their filter state, steps of an alignment, result folders."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.metrics import pose_error
from kfloc_ros.evaluation.offline import localize_frames
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.localization.results import Localization
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.messages.poses import read_tum
from kfloc_ros.types import Alignment, Frame, Matrix, PoseEstimate
from kfloc_ros.visualization.alignment import by_residual, reference_points
from kfloc_ros.visualization.cells import flow_picture, flow_view, nis_picture, noise_view, sigma_picture
from kfloc_ros.visualization.clouds import FRUSTUM_DEPTH_M, camera_symbols, cell_cloud, map_cloud
from kfloc_ros.visualization.overlay import OverlayPainter, reproject
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.stream import View

REFERENCE_COLOUR, USED_COLOUR = (150, 150, 150), (255, 170, 0)
STEP_COLOUR = (80, 200, 255)
RADIUS_M = 0.006


def log_map(recording: Recording, scene_map: SceneMap) -> None:
    """Log the map's points and reference views, which are static."""
    cloud = map_cloud(scene_map)
    recording.cloud("map/points", cloud.points, cloud.colours, radius_m=0.004, static=True)
    symbols = camera_symbols(scene_map.references.T_map_camera, scene_map.camera, FRUSTUM_DEPTH_M)
    recording.lines("map/references", symbols.reshape(-1, 2, 3), REFERENCE_COLOUR, radius_m=0.001, static=True)


def log_frame(recording: Recording, view: View) -> None:
    """Log the image at its coarse pose."""
    frame, pose = view.frame, view.coarse.pose
    recording.at(frame.index, frame.stamp_ns)
    if pose.T_map_camera is not None:
        recording.camera("map/camera", pose.T_map_camera, frame.camera, frame.image)
    else:
        recording.text("log", f"frame {frame.index}: no pose: {pose.reason}")


def log_filter(recording: Recording, view: View, nis_threshold: float) -> None:
    """Log a frame with its scene points, and its noise, NIS and flow pictures."""
    log_frame(recording, view)
    if view.coarse.scene_coordinates is not None:
        cloud = cell_cloud(view.coarse.scene_coordinates, view.frame.image)
        recording.cloud("map/cells", cloud.points, cloud.colours, radius_m=0.012)
    filtered, measurement = view.coarse.filtered, view.coarse.measurement
    if filtered is None or measurement is None:
        return
    prior, posterior = filtered.prior, filtered.posterior
    both = None if prior is None else prior.valid & measurement.valid
    pictures = {
        "measurement": sigma_picture("", measurement.variance, measurement.valid),
        "nis": nis_picture(filtered.nis, both, nis_threshold),
        "process": None if prior is None else sigma_picture("", prior.process_variance, prior.valid),
        "flow": flow_picture(filtered.flow),
        "posterior": sigma_picture("", posterior.variance, posterior.valid),
    }
    for name, picture in pictures.items():
        if picture is not None:
            recording.picture(f"filter/{name}", picture.rgb)


def log_alignment(
    recording: Recording, frame: Frame, features: BackboneFeatures, alignment: Alignment, scene_map: SceneMap
) -> None:
    """Log the map, the reference views used, and camera and overlay at every step; the viewer's timeline is
    ``step``.
    """
    log_map(recording, scene_map)
    camera: Camera = frame.camera
    points = reference_points(scene_map, alignment.reference_ids).to(features.fine.device)
    positions = {ident: k for k, ident in enumerate(scene_map.references.ids)}
    used = [positions[ident] for ident in alignment.reference_ids]
    for k in used:
        view = scene_map.references.views[k]
        recording.cloud(f"map/used/{k}/points", view.points.cpu().numpy(), USED_COLOUR, radius_m=RADIUS_M, static=True)
    symbols = camera_symbols(scene_map.references.T_map_camera[used], camera, 2 * FRUSTUM_DEPTH_M)
    recording.lines("map/used/views", symbols.reshape(-1, 2, 3), USED_COLOUR, radius_m=0.002, static=True)
    path = [step.T_map_camera[:3, 3] for step in alignment.steps]
    if len(path) > 1:
        recording.lines("map/way", [path], STEP_COLOUR, static=True)
    for number, step in enumerate(alignment.steps):
        recording.step(number)
        recording.camera("map/camera", step.T_map_camera, camera, frame.image)
        recording.number(f"cost/stride_{step.stride}", step.cost)
        projected = reproject(features, points, step.T_map_camera, camera)
        recording.picture("overlay", by_residual(frame.image, projected), jpeg=True)


PICTURES = ("overlay", "noise", "flow")
CURVES = ("error_cm", "latency_ms", "sigma_cm", "inliers")
VIEWS_COLOUR = (216, 90, 38)
PATH_COLOUR = (80, 200, 255)
TRUTH_COLOUR = (90, 220, 90)
SPREAD_COLOUR = (255, 200, 60)
_PATH_PERIOD = 5
"""Number of frames between two logs of the whole path."""


def begin(title: str, scene_map: SceneMap | None, path: Path | None) -> Recording:
    """Start a recording with a map in it, to a file or, without one, to a live viewer. Raises DrawingError."""
    up = None if scene_map is None else up_axis(scene_map)
    recording = Recording(title, path=path, live=path is None, up=up, pictures=PICTURES, curves=CURVES)
    if scene_map is not None:
        cloud = map_cloud(scene_map)
        recording.cloud("map/points", cloud.points, cloud.colours, radius_m=0.004, static=True)
        symbols = camera_symbols(scene_map.references.T_map_camera, scene_map.camera, FRUSTUM_DEPTH_M)
        recording.lines("map/reference_views", symbols.reshape(-1, 2, 3), VIEWS_COLOUR, radius_m=0.001, static=True)
    return recording


class Trail:
    """Path so far, drawn again every few poses."""

    def __init__(self, recording: Recording, entity: str, colour: tuple[int, int, int]) -> None:
        self._recording, self._entity, self._colour = recording, entity, colour
        self._positions: list[NDArray[np.float64]] = []

    def add(self, T_map_camera: Matrix | None) -> None:
        """Add a pose, if there is one."""
        if T_map_camera is None:
            return
        self._positions.append(T_map_camera[:3, 3])
        if len(self._positions) % _PATH_PERIOD == 2 % _PATH_PERIOD:
            self.draw()

    def draw(self) -> None:
        """Draw the current path."""
        if len(self._positions) > 1:
            self._recording.lines(self._entity, np.stack(self._positions)[None], self._colour)


def view_source(
    recording: Recording, scene_map: SceneMap, localizer: Localizer, source: FrameSource
) -> Iterator[PoseEstimate]:
    """Localize every frame of a source and log all results; yields after each frame.

    Raises:
        SourceError: an image cannot be read.
    """
    painter = OverlayPainter(scene_map.references, scene_map.camera)
    path, truth = Trail(recording, "map/path", PATH_COLOUR), Trail(recording, "map/true_path", TRUTH_COLOUR)
    states = StateLog(recording)
    for number, item in enumerate(localize_frames(localizer, source)):
        recording.at(number, item.frame.stamp_ns)
        localization, estimate = item.localization, item.estimate
        if localization is not None:
            _show_frame(recording, localization)
            overlay = painter.paint(localization.frame.image, estimate, localization.features)
            recording.picture("overlay", overlay, jpeg=True)
        show_covariance(recording, estimate.T_map_camera, estimate.covariance)
        path.add(estimate.T_map_camera)
        truth.add(item.frame.T_map_camera)
        states.add(estimate.state.value, estimate.reason)
        yield estimate
    path.draw()
    truth.draw()


def view_results(recording: Recording, folder: Path) -> int:
    """Log a result folder of `kfloc localize` or `kfloc replay`: both paths, states, errors and latencies.

    Returns:
        The number of frames.

    Raises:
        SourceError: the folder is not a result folder, or is damaged.
    """
    for name, entity, colour in (
        ("groundtruth.tum", "map/true_path", TRUTH_COLOUR), ("trajectory.tum", "map/path", PATH_COLOUR)
    ):  # fmt: skip
        poses = read_tum(_part(folder, name))
        if len(poses) > 1:
            strip = np.stack([poses[stamp_ns][:3, 3] for stamp_ns in sorted(poses)])
            recording.lines(entity, strip[None], colour, static=True)
    trajectory = read_tum(folder / "trajectory.tum")
    states = StateLog(recording)
    count = 0
    try:
        with _part(folder, "frames.csv").open(newline="", encoding="utf-8") as stream:
            for count, row in enumerate(csv.DictReader(stream), start=1):
                stamp_ns = int(row["stamp_ns"])
                recording.at(count - 1, stamp_ns)
                _show_row(recording, row)
                if stamp_ns in trajectory:
                    recording.cloud("map/camera", trajectory[stamp_ns][:3, 3], PATH_COLOUR, radius_m=0.03)
                states.add(row["state"], row["reason"])
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise SourceError(f"'{folder / 'frames.csv'}' is damaged: {error}") from error
    return count


class StateLog:
    """Log of changes of the tracking state."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._last = recording, ""

    def add(self, state: str, reason: str) -> None:
        """Add the state of one frame."""
        if state != self._last:
            self._last = state
            self._recording.text("state", f"{state}: {reason}" if reason else state)


def show_covariance(recording: Recording, T_map_camera: Matrix | None, covariance: Matrix | None) -> None:
    """Log the principal axes of the position's covariance, two standard deviations to either side."""
    if T_map_camera is None or covariance is None:
        recording.clear("map/covariance")
        return
    spreads, axes = np.linalg.eigh(covariance[:3, :3])
    arms = (2 * np.sqrt(np.clip(spreads, 0, None)) * axes).T
    centre = T_map_camera[:3, 3]
    recording.lines("map/covariance", np.stack([centre - arms, centre + arms], axis=1), SPREAD_COLOUR, radius_m=0.002)


def _show_frame(recording: Recording, localization: Localization) -> None:
    frame, coarse, estimate = localization.frame, localization.coarse, localization.estimate
    T = estimate.T_map_camera
    if T is not None:
        recording.camera("map/camera", T, frame.camera, frame.image)
        if frame.T_map_camera is not None:
            recording.number("error_cm", 100 * pose_error(T, frame.T_map_camera).translation_m)
    if localization.belief is not None:
        cloud = cell_cloud(localization.belief, frame.image)
        recording.cloud("map/scene_coordinates", cloud.points, cloud.colours)
    if coarse is not None:
        for entity, picture in (("flow", flow_view(coarse)), ("noise", noise_view(coarse))):
            if picture is not None:
                recording.picture(entity, picture, jpeg=True)
        recording.number("inliers", coarse.pose.inlier_count)
    recording.number("latency_ms", sum(value for name, value in estimate.timings_ms.items() if name != "total"))
    if estimate.covariance is not None:
        recording.number("sigma_cm", 100 * math.sqrt(max(float(estimate.covariance[:3, :3].trace()), 0.0)))


def _show_row(recording: Recording, row: dict[str, str]) -> None:
    columns = {
        "error_cm": ("translation_error_m", 100.0),
        "latency_ms": ("latency_ms", 1.0),
        "inliers": ("inlier_count", 1.0),
    }
    for entity, (column, factor) in columns.items():
        if row.get(column):
            recording.number(entity, factor * float(row[column]))
    sigmas = [row.get(f"sigma_t{axis}_m") for axis in "xyz"]
    if all(sigmas):
        recording.number("sigma_cm", 100 * math.hypot(*(float(sigma or "nan") for sigma in sigmas)))


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise SourceError(f"'{folder}' is not a complete result folder: {name} is missing.")
    return folder / name
