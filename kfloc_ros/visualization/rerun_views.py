# SPDX-License-Identifier: Apache-2.0
"""What goes into recordings: the filter's frames, and the steps of an alignment."""

from __future__ import annotations

from kfloc_ros.features.trunk import TrunkFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.mapping.scene_map import SceneMap
from kfloc_ros.pixloc.residuals import reproject
from kfloc_ros.types import Alignment, Frame
from kfloc_ros.visualization.alignment_views import by_residual, reference_points
from kfloc_ros.visualization.cells import flow_picture, nis_picture, sigma_picture
from kfloc_ros.visualization.clouds import FRUSTUM_DEPTH_M, camera_symbols, cell_cloud, map_cloud
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.stream import Seen

REFERENCE_COLOUR, USED_COLOUR = (150, 150, 150), (255, 170, 0)
STEP_COLOUR = (80, 200, 255)
RADIUS_M = 0.006


def log_map(recording: Recording, scene_map: SceneMap) -> None:
    """The map's points and reference views, which never change."""
    cloud = map_cloud(scene_map)
    recording.cloud("map/points", cloud.points, cloud.colours, radius_m=0.004, static=True)
    symbols = camera_symbols(scene_map.references.T_map_camera, scene_map.camera, FRUSTUM_DEPTH_M)
    recording.lines("map/references", symbols.reshape(-1, 2, 3), REFERENCE_COLOUR, radius_m=0.001, static=True)


def log_frame(recording: Recording, seen: Seen) -> None:
    """The image, where its coarse pose puts it."""
    frame, pose = seen.frame, seen.coarse.pose
    recording.at(frame.index, frame.stamp_ns)
    if pose.T_map_camera is not None:
        recording.camera("map/camera", pose.T_map_camera, frame.camera, frame.image)
    else:
        recording.text("log", f"frame {frame.index}: no pose: {pose.reason}")


def log_filter(recording: Recording, seen: Seen, nis_threshold: float) -> None:
    """A frame with the points that its cells see, and its noise, NIS and flow pictures."""
    log_frame(recording, seen)
    if seen.coarse.scene_coordinates is not None:
        cloud = cell_cloud(seen.coarse.scene_coordinates, seen.frame.image)
        recording.cloud("map/cells", cloud.points, cloud.colours, radius_m=0.012)
    filtered, measurement = seen.coarse.filtered, seen.coarse.measurement
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
    recording: Recording, frame: Frame, features: TrunkFeatures, alignment: Alignment, scene_map: SceneMap
) -> None:
    """The map, the reference views used, and camera and overlay at every step; the viewer's timeline is ``step``."""
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
    way = [step.T_map_camera[:3, 3] for step in alignment.steps]
    if len(way) > 1:
        recording.lines("map/way", [way], STEP_COLOUR, static=True)
    for number, step in enumerate(alignment.steps):
        recording.step(number)
        recording.camera("map/camera", step.T_map_camera, camera, frame.image)
        recording.number(f"cost/stride_{step.stride}", step.cost)
        seen = reproject(features, points, step.T_map_camera, camera)
        recording.picture("overlay", by_residual(frame.image, seen), jpeg=True)
