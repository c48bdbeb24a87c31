# SPDX-License-Identifier: Apache-2.0
"""Map of one place: head, reference views, camera and calibration. ``format.py`` defines its storage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from kfloc_ros.errors import FrameError, MapError, WeightsError
from kfloc_ros.files import save_tensors
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks, describe_networks, pack_networks, unpack_networks
from kfloc_ros.kfnet.scoordnet import Head, RoughnessScale, ensemble_of, heads_of, transformed_head, with_variance_scale
from kfloc_ros.maps.files import (
    MAX_REFERENCES_BYTES,
    appearing,
    file_checksum,
    head_size,
    pack_heads,
    pack_references,
    read_file,
    read_tensors,
    read_whole,
    unpack_heads,
    unpack_references,
)
from kfloc_ros.maps.format import (
    DAMAGE,
    DESCRIPTION,
    FAST,
    FORMAT,
    FORMAT_VERSION,
    HEAD_FILE,
    KFNET_FILE,
    REFERENCE,
    REFERENCES_FILE,
    read_camera,
    read_description,
    read_name,
    write_description,
)
from kfloc_ros.pixloc.references import ReferenceViews

LATER = frozenset(
    {
        "confidence_odds",
        "own_error_m",
        "own_error_rad",
        "camera_fit_scale",
        "covariance_doubling_m",
        "patch_covariance_scale",
        "own_error_growth",
        "usual_shift_chi2",
        "sideways",
    }
)
"""Values that maps of earlier versions lack; they have the defaults."""
ROUGHNESS = "roughness"


@dataclass(frozen=True)
class Calibration:
    """Values calibrated on mapping views that are neither in the head's training data nor in the references."""

    measurement_variance_scale: float = 1.0
    flow_temperature: float = 0.02
    process_scale: float = 1.0
    process_floor_m2: float = 1e-4
    coarse_covariance_scale: float = 1.0
    refined_covariance_scale: float = 1.0
    max_alignment_cost: float = 1.0
    min_inlier_ratio: float = 0.2
    """Smallest inlier ratio of a coarse pose without refinement. Measured: right poses had 0.30 or more, wrong ones up
    to 0.16.
    """
    learned_process_scale: float | None = None
    """Like ``process_scale``, for the flow network; None if the map was calibrated without it."""
    confidence_odds: float = 1.0
    """Factor on the odds that a pose is right, relative to the shipped model of the confidence."""
    own_error_m: float = 1e-4
    own_error_rad: float = 1e-4
    """Standard deviations, on each axis, of the map's own error: its views disagree by these with poses aligned with
    other views, such as those of another pass through the place."""
    camera_fit_scale: float = 4.0
    """Factor on the covariance of cameras that are fitted to an image; neighbouring residuals share errors."""
    covariance_doubling_m: float = 1e6
    """Distance from the nearest reference view at which ``refined_covariance_scale`` counts twice; it grows evenly."""
    own_error_growth: float = 1e-6
    """Standard deviation of a rotation, on each axis, that is added to the map's own error, rad per metre from the
    nearest reference view: features change with the viewpoint, and all points of a view alike."""
    usual_shift_chi2: float = 2.0
    """Mean squared displacement of the image's blocks, relative to its variance, that right poses have in this map."""
    patch_covariance_scale: float = 1.0
    """Factor on the covariance of aligned poses where patches have improved them."""
    sideways: float = 1.0
    """Factor on the standard deviations of aligned poses along the camera's x axis and about its y axis, and divisor of
    those along y and about x: errors sideways and upwards differ, depending on how the recording moved and turned."""
    roughness: RoughnessScale | None = None
    """Growth of the head's variance away from the mapped views; None if it does not grow."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == ROUGHNESS or (value is None and item.name == "learned_process_scale"):
                continue
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise MapError(f"The map's calibration '{item.name}' must be a positive number, got {value!r}.")


@dataclass(frozen=True, eq=False)
class SceneMap:
    """Data that localization needs for one place."""

    name: str
    frame_id: str
    camera: Camera
    """Pinhole camera to which query images are adapted."""
    head: Head
    references: ReferenceViews
    calibration: Calibration
    bounds_m: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Smallest and largest corner of the box around the mapped points."""
    provenance: Mapping[str, Any]
    """Origin of the map: source, command, number of frames, versions, time."""
    path: Path | None = None
    kfnet: ReferenceNetworks | None = None
    """KFNet's own networks, which replace the head for coarse poses; None in maps of the fast family."""

    @property
    def family(self) -> str:
        """Family of the networks that compute the coarse pose."""
        return FAST if self.kfnet is None else REFERENCE

    def save(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the map folder atomically.

        Raises:
            MapError: the folder exists and ``overwrite`` is false, or it cannot be written.
        """
        folder = folder.absolute()
        if folder.exists() and not overwrite:
            raise MapError(f"'{folder}' exists; pass --force to replace it or give another folder.")
        if folder.exists() and not (folder / DESCRIPTION).is_file():
            raise MapError(f"'{folder}' exists and is not a map; it is not replaced.")
        try:
            with appearing(folder, overwrite=overwrite) as temporary:
                self._write(temporary)
        except OSError as error:
            raise MapError(f"The map cannot be written to '{folder}': {error}.") from error
        return folder

    def _write(self, folder: Path) -> None:
        heads = heads_of(self.head)
        save_tensors(pack_heads(heads), folder / HEAD_FILE)
        save_tensors(pack_references(self.references), folder / REFERENCES_FILE)
        names, kfnet = [HEAD_FILE, REFERENCES_FILE], {}
        if self.kfnet is not None:
            save_tensors(pack_networks(self.kfnet), folder / KFNET_FILE)
            names, kfnet = [*names, KFNET_FILE], {"kfnet": describe_networks(self.kfnet)}
        description = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name,
            "frame_id": self.frame_id,
            "family": self.family,
            "units": {"length": "metre", "angle": "radian"},
            "camera": {**asdict(self.camera), "distortion": list(self.camera.distortion)},
            "head": head_size(heads),
            **kfnet,
            "bounds_m": [list(corner) for corner in self.bounds_m],
            **_described(self.calibration),
            "provenance": dict(self.provenance),
            "files": {name: file_checksum((folder / name).read_bytes()) for name in names},
        }
        write_description(folder, description)

    @classmethod
    def load(cls, folder: Path | str) -> SceneMap:
        """Read and check a map folder; if it is replaced meanwhile, the old or the new map is read completely.

        Raises:
            MapError: missing, damaged, or of another format version; the message names the fault and the remedy.
        """
        return read_whole(Path(folder), cls._read)

    @classmethod
    def _read(cls, folder: Path) -> SceneMap:
        description = read_description(folder, FORMAT)
        try:
            camera = read_camera(description["camera"])
            head = unpack_heads(read_tensors(read_file(folder, HEAD_FILE, description)), description["head"])
            stored = read_file(folder, REFERENCES_FILE, description, MAX_REFERENCES_BYTES)
            references = unpack_references(read_tensors(stored))
            kfnet = None
            if description.get("family", FAST) == REFERENCE:
                kfnet = unpack_networks(read_tensors(read_file(folder, KFNET_FILE, description)), description["kfnet"])
                kfnet.camera(camera)
            low, high = (tuple(float(v) for v in corner) for corner in description["bounds_m"])
            if not np.isfinite([low, high]).all():
                raise ValueError("its bounds are not finite")
            return cls(
                name=read_name(description["name"]),
                frame_id=read_name(description["frame_id"]),
                camera=camera,
                head=head.eval(),
                references=references,
                calibration=_calibration(description),
                bounds_m=(low, high),  # type: ignore[arg-type]
                provenance=dict(description.get("provenance", {})),
                path=folder,
                kfnet=kfnet,
            )
        except (*DAMAGE, FrameError, WeightsError) as error:
            raise MapError(f"The map '{folder}' is damaged: {error}. Build it again.") from error
        except OSError as error:
            raise MapError(f"The map '{folder}' cannot be read: {error}.") from error

    def size_bytes(self) -> int:
        """Return the size of the map folder on disk in bytes; 0 for a map that was never saved."""
        return sum(p.stat().st_size for p in self.path.iterdir() if p.is_file()) if self.path else 0


def _described(calibration: Calibration) -> dict[str, Any]:
    """Return the entries of a calibration in ``map.yaml``."""
    numbers = asdict(calibration)
    roughness = numbers.pop(ROUGHNESS)
    return {"calibration": numbers, **({ROUGHNESS: roughness} if roughness is not None else {})}


def _calibration(description: Mapping[str, Any]) -> Calibration:
    roughness = RoughnessScale(**description[ROUGHNESS]) if ROUGHNESS in description else None
    if missing := {item.name for item in fields(Calibration)} - {ROUGHNESS} - LATER - set(description["calibration"]):
        raise ValueError(f"its calibration lacks {', '.join(sorted(missing))}")
    return Calibration(**description["calibration"], roughness=roughness)


def verify_map(folder: Path) -> list[str]:
    """Return the faults of a map folder, one sentence each; empty if it is intact."""
    try:
        loaded = SceneMap.load(folder)
    except MapError as error:
        return [str(error)]
    tensors = {f"head.{k}": v for k, v in loaded.head.state_dict().items()}
    for ident, view in zip(loaded.references.ids, loaded.references.views, strict=True):
        tensors |= {f"reference {ident} {name}": getattr(view, name) for name in ("points", "coarse", "fine")}
    problems = [f"{name} has values that are not finite." for name, t in tensors.items() if not t.isfinite().all()]
    if not np.isfinite(loaded.references.T_map_camera).all():
        problems.append("Reference poses have values that are not finite.")
    return problems


Box = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Smallest and largest corner."""


def in_frame(scene_map: SceneMap, T: Matrix, frame_id: str) -> SceneMap:
    """Return a map in another frame: each point p becomes T p, also in the head's output."""
    if np.array_equal(T, np.eye(4)):
        return replace(scene_map, frame_id=frame_id)
    return replace(
        scene_map,
        frame_id=frame_id,
        head=ensemble_of([transformed_head(head, T) for head in heads_of(scene_map.head)]).eval(),
        kfnet=None if scene_map.kfnet is None else scene_map.kfnet.transformed(T),
        references=transformed(scene_map.references, T),
        bounds_m=_box(scene_map.bounds_m, T),
    )


def scaled_map(scene_map: SceneMap, factor: float) -> SceneMap:
    """Return a map whose lengths are multiplied by a factor: points, poses, the head's output and its variances.

    Raises:
        MapError: the factor is not a positive number, or the map has networks of KFNet.
    """
    if not (math.isfinite(factor) and 1e-6 <= factor <= 1e6):
        raise MapError(f"A map can be scaled by a factor from 1e-6 to 1e6, not by {factor!r}.")
    if scene_map.kfnet is not None:
        raise MapError("A map with KFNet's networks cannot be scaled; scale the map without them, and add them after.")
    S = np.diag([factor, factor, factor, 1.0])
    references = transformed(scene_map.references, S)
    T_map_camera = scene_map.references.T_map_camera.copy()
    T_map_camera[:, :3, 3] *= factor
    calibration, roughness = scene_map.calibration, scene_map.calibration.roughness
    if roughness is not None:
        roughness = replace(roughness, usual_m=roughness.usual_m * factor)
    heads = [with_variance_scale(transformed_head(head, S), factor**2) for head in heads_of(scene_map.head)]
    return replace(
        scene_map,
        head=ensemble_of(heads).eval(),
        references=replace(references, T_map_camera=T_map_camera),
        calibration=replace(
            calibration,
            process_floor_m2=calibration.process_floor_m2 * factor**2,
            own_error_m=calibration.own_error_m * factor,
            covariance_doubling_m=calibration.covariance_doubling_m * factor,
            own_error_growth=calibration.own_error_growth / factor,
            roughness=roughness,
        ),
        bounds_m=_box(scene_map.bounds_m, S),
    )


def _box(bounds_m: Box, T: Matrix) -> Box:
    corners = np.array(list(itertools.product(*zip(*bounds_m, strict=True)))) @ T[:3, :3].T + T[:3, 3]
    low, high = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def transformed(references: ReferenceViews, T: Matrix) -> ReferenceViews:
    """Return the views in another frame."""
    views = []
    for view in references.views:
        points = view.points.double().numpy() @ T[:3, :3].T + T[:3, 3]
        views.append(replace(view, points=view.points.new_tensor(points)))
    return replace(references, T_map_camera=T @ references.T_map_camera, views=tuple(views))
