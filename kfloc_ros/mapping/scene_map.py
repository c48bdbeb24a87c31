# SPDX-License-Identifier: Apache-2.0
"""The map folder: a YAML description, safetensors files and their checksums. Nothing in it is executed."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from kfloc_ros.errors import FrameError, MapError
from kfloc_ros.features.trunk import COARSE_CHANNELS, FINE_CHANNELS, SIZE_MULTIPLE
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.experts import MAX_HEADS, Head, heads_of, together
from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.mapping.map_files import file_checksum, read_file, read_tensors
from kfloc_ros.pixloc.references import ReferencePoints, ReferenceViews

FORMAT = "kfloc_map"
FORMAT_VERSION = 4
"""Version 1 kept reference features in half precision; versions 1 and 2 hold one head, no ``min_inlier_ratio``; version
3 was calibrated without the flow network. All are read."""
PLACE_FORMAT = "kfloc_place"
PLACE_VERSION = 1
NEWEST = {FORMAT: FORMAT_VERSION, PLACE_FORMAT: PLACE_VERSION}
"""What a ``map.yaml`` may describe, a map or a place of several (``place.py``), and the newest version that is read."""
DESCRIPTION = "map.yaml"
HEAD_FILE = "scoordnet.safetensors"
REFERENCES_FILE = "references.safetensors"
MAX_DESCRIPTION_BYTES = 1_000_000
MAX_DESCRIPTION_DEPTH = 16
MAX_CAMERA_SIDE_PX = 4096
MAX_HEAD_WIDTH, MAX_HEAD_BLOCKS = 2048, 32
FEATURE_STEPS = 127
"""Unit features are stored in one signed byte a channel; the rounding is far below the features' own noise."""

DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    RuntimeError,
    SafetensorError,
)
"""What reading a damaged map raises, file contents being whatever they are."""


@dataclass(frozen=True)
class Calibration:
    """What was measured on mapping views that neither the head nor the references have seen."""

    measurement_variance_scale: float = 1.0
    flow_temperature: float = 0.02
    process_scale: float = 1.0
    process_floor_m2: float = 1e-4
    coarse_covariance_scale: float = 1.0
    refined_covariance_scale: float = 1.0
    max_alignment_cost: float = 1.0
    min_inlier_ratio: float = 0.2
    """Of a coarse pose that stands on its own. Where measured, right ones had 0.30 or more, wrong ones up to 0.16."""
    learned_process_scale: float | None = None
    """As ``process_scale``, for the flow of the network; None: the map was calibrated without it."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is None and item.name == "learned_process_scale":
                continue
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise MapError(f"The map's calibration '{item.name}' must be a positive number, got {value!r}.")


@dataclass(frozen=True, eq=False)
class SceneMap:
    """Everything that localization needs to know about one place."""

    name: str
    frame_id: str
    camera: Camera
    """The pinhole camera that query images are brought to."""
    head: Head
    references: ReferenceViews
    calibration: Calibration
    bounds_m: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Smallest and largest corner of the box around the mapped points."""
    provenance: Mapping[str, Any]
    """Where the map comes from: source, command, number of frames, versions, time."""
    path: Path | None = None

    def save(self, folder: Path, *, overwrite: bool = False) -> Path:
        """Write the map folder; it appears whole or not at all.

        Raises:
            MapError: the folder exists and ``overwrite`` is false, or cannot be written.
        """
        folder = folder.absolute()
        if folder.exists() and not overwrite:
            raise MapError(f"'{folder}' exists; pass --force to replace it or name another folder.")
        if folder.exists() and not (folder / DESCRIPTION).is_file():
            raise MapError(f"'{folder}' exists and is not a map; it is not replaced.")
        temporary: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            self._write(temporary)
            temporary.chmod(0o755)
            for name in (HEAD_FILE, REFERENCES_FILE):
                (temporary / name).chmod(0o644)  # safetensors makes them private
            swap_in(temporary, folder)
        except OSError as error:
            raise MapError(f"The map cannot be written to '{folder}': {error}.") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _write(self, folder: Path) -> None:
        heads = heads_of(self.head)
        save_file(_pack_heads(heads), folder / HEAD_FILE)
        save_file(_pack_references(self.references), folder / REFERENCES_FILE)
        description = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "name": self.name,
            "frame_id": self.frame_id,
            "family": "fast",
            "units": {"length": "metre", "angle": "radian"},
            "camera": {**asdict(self.camera), "distortion": list(self.camera.distortion)},
            "head": {"width": self.head.width, "blocks": self.head.blocks, **_count(heads)},
            "bounds_m": [list(corner) for corner in self.bounds_m],
            "calibration": asdict(self.calibration),
            "provenance": dict(self.provenance),
            "files": {name: file_checksum((folder / name).read_bytes()) for name in (HEAD_FILE, REFERENCES_FILE)},
        }
        with (folder / DESCRIPTION).open("w") as stream:
            yaml.safe_dump(description, stream, sort_keys=False)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def load(cls, folder: Path | str) -> SceneMap:
        """Read a map folder and check it.

        Raises:
            MapError: missing, damaged, or of a newer format version; the message says which and what to do.
        """
        folder = Path(folder)
        description = read_description(folder, FORMAT)
        try:
            camera = read_camera(description["camera"])
            head = _unpack_heads(read_tensors(read_file(folder, HEAD_FILE, description)), description["head"])
            references = _unpack_references(read_tensors(read_file(folder, REFERENCES_FILE, description)))
            low, high = (tuple(float(v) for v in corner) for corner in description["bounds_m"])
            if not np.isfinite([low, high]).all():
                raise ValueError("its bounds are not finite")
            return cls(
                name=read_name(description["name"]),
                frame_id=read_name(description["frame_id"]),
                camera=camera,
                head=head.eval(),
                references=references,
                calibration=Calibration(**description["calibration"]),
                bounds_m=(low, high),  # type: ignore[arg-type]
                provenance=dict(description.get("provenance", {})),
                path=folder,
            )
        except (*DAMAGE, FrameError) as error:
            raise MapError(f"The map '{folder}' is damaged: {error}. Build it again.") from error
        except OSError as error:
            raise MapError(f"The map '{folder}' cannot be read: {error}.") from error

    def size_bytes(self) -> int:
        """Size of the map folder on disk; 0 for a map that was never saved."""
        return sum(p.stat().st_size for p in self.path.iterdir() if p.is_file()) if self.path else 0


def read_description(folder: Path, *formats: str) -> dict[str, Any]:
    """The checked content of ``map.yaml``.

    Args:
        folder: of the map.
        formats: those of :data:`NEWEST` that will do; by default all.

    Raises:
        MapError: no such folder, not a map, unreadable, or of a newer format version.
    """
    path = folder / DESCRIPTION
    try:
        if not folder.is_dir():
            way_out = f"Build one with `kfloc map build SOURCE --out {folder}`."
            raise MapError(f"There is no map folder '{folder}'. {way_out}")
        if not path.is_file():
            raise MapError(f"'{folder}' is not a map: it has no {DESCRIPTION}.")
        if path.is_symlink():
            raise MapError(f"'{path}' is a link to another file; a map holds its files itself. Copy it there.")
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            raise MapError(f"'{path}' is larger than any map description; it is damaged.")
        text = path.read_text()
        _check_structure(path, text)
        description = yaml.safe_load(text)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise MapError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise MapError(f"'{path}' does not describe a map of this package.")
    known = description.get("format")
    if not isinstance(known, str) or known not in NEWEST:
        raise MapError(f"'{path}' does not describe a map of this package.")
    if formats and known not in formats:
        if known == PLACE_FORMAT:
            raise MapError(f"'{folder}' is a place of several maps, and one map is needed: name a folder below it.")
        raise MapError(f"'{folder}' is a single map, and a place of several is needed: see `kfloc map place --help`.")
    version = description.get("version")
    if not isinstance(version, int) or version < 1:
        raise MapError(f"'{path}' has no valid format version.")
    if version > NEWEST[known]:
        raise MapError(
            f"The map '{folder}' has format version {version}, newer than the {NEWEST[known]} that this installation "
            "reads. Update kfloc_ros, or build the map again."
        )
    return description


def _check_structure(path: Path, text: str) -> None:
    """Refuse what makes a YAML reader take for ever: aliases, which multiply, and nesting without end."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise MapError(f"'{path}' refers to itself with YAML aliases, which no map description does.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DESCRIPTION_DEPTH:
            raise MapError(f"'{path}' is nested deeper than any map description.")


def verify_map(folder: Path) -> list[str]:
    """Everything wrong with a map folder, one sentence each; empty if it is whole."""
    try:
        loaded = SceneMap.load(folder)
    except MapError as error:
        return [str(error)]
    tensors = {f"head.{k}": v for k, v in loaded.head.state_dict().items()}
    for ident, view in zip(loaded.references.ids, loaded.references.views, strict=True):
        tensors |= {f"reference {ident} {name}": getattr(view, name) for name in ("points", "coarse", "fine")}
    problems = [f"{name} holds values that are not finite." for name, t in tensors.items() if not t.isfinite().all()]
    if not np.isfinite(loaded.references.T_map_camera).all():
        problems.append("Reference poses hold values that are not finite.")
    return problems


def maps_search_path() -> list[Path]:
    """Folders in which a map is looked up by name."""
    folders = [Path(p) for p in os.environ.get("KFLOC_MAPS", "").split(os.pathsep) if p]
    folders.append(Path.home() / ".ros" / "kfloc_maps")
    for prefix in os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep):
        if prefix:
            folders.append(Path(prefix) / "share" / "kfloc_ros" / "maps")
    folders.append(Path(__file__).resolve().parents[2] / "maps")
    return folders


def resolve_map(name_or_path: str) -> Path:
    """Folder of a map given by path or by name.

    Raises:
        MapError: nothing found; the message lists where it was looked for.
    """
    if not name_or_path:
        raise MapError("No map was named; give a map folder or the name of one, such as map:=kitchen.")
    try:
        path = Path(name_or_path).expanduser()
        if path.is_dir() or path.is_absolute() or len(path.parts) > 1:
            return path
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a zero byte
        raise MapError(f"There is no map '{name_or_path[:200]}': {error}.") from error
    searched = maps_search_path()
    for folder in searched:
        if (folder / name_or_path / DESCRIPTION).is_file():
            return folder / name_or_path
    places = ", ".join(f"'{folder}'" for folder in [Path.cwd(), *searched])
    raise MapError(f"There is no map '{name_or_path}' in {places}. Name a folder, or set KFLOC_MAPS.")


def swap_in(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        temporary.rename(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old / folder.name, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _pack_references(references: ReferenceViews) -> dict[str, torch.Tensor]:
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


def read_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r} is no name")
    return name


def read_camera(values: Mapping[str, Any]) -> Camera:
    """The map's camera, refused before memory is taken for its images."""
    camera = Camera(**{**values, "distortion": tuple(values.get("distortion", ()))})
    for side in (camera.width, camera.height):
        if type(side) is not int or side > MAX_CAMERA_SIDE_PX or side % SIZE_MULTIPLE:
            raise ValueError(f"its camera has {camera.width}x{camera.height} pixels")
    if not camera.is_pinhole:
        raise ValueError("its camera has a distortion")
    return camera


def _count(heads: Sequence[SCoordNet]) -> dict[str, int]:
    return {"count": len(heads)} if len(heads) > 1 else {}


def _pack_heads(heads: Sequence[SCoordNet]) -> dict[str, torch.Tensor]:
    """Half precision but for what the inputs are normalised with, and where the outputs are relative to."""
    tensors = {}
    for number, head in enumerate(heads):
        for key, value in head.state_dict().items():
            exact = key.startswith("input_") or key == "centre"
            tensors[f"heads.{number}.{key}" if len(heads) > 1 else key] = value if exact else value.half()
    return {key: value.contiguous().cpu() for key, value in tensors.items()}


def _unpack_heads(tensors: Mapping[str, torch.Tensor], size: Mapping[str, Any]) -> Head:
    """The heads, their size and number refused before memory is taken for them."""
    width, blocks, count = int(size["width"]), int(size["blocks"]), int(size.get("count", 1))
    if not (1 <= width <= MAX_HEAD_WIDTH and 0 <= blocks <= MAX_HEAD_BLOCKS and 1 <= count <= MAX_HEADS):
        raise ValueError(f"no map has {count} heads with {blocks} blocks of {width}")
    head = together([SCoordNet(width, blocks) for _ in range(count)])
    head.load_state_dict({key: value.float() for key, value in tensors.items()})
    return head


def _unpack_references(tensors: Mapping[str, torch.Tensor]) -> ReferenceViews:
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
