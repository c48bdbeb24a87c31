# SPDX-License-Identifier: Apache-2.0
"""Export of a map or a place to other programs: COLMAP text model, PLY point cloud, networks as ONNX.

Maps contain no images and no colours: points are grey, and image names are ``view_<id>.png`` with the frame index in
the mapping source; in a place, they start with the submap's name, ``kitchen/view_<id>.png``. Submaps are read one after
the other; all coordinates are in the place's frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.errors import ConfigError, MapError
from kfloc_ros.features.backbone import COARSE_STRIDE, Backbone
from kfloc_ros.features.runtime import is_installed, onnx_bytes
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_to_colmap, pixels_to_colmap
from kfloc_ros.geometry.lie import Matrix, inverse_pose, matrix_to_quaternion
from kfloc_ros.kfnet.flow import WINDOW_CELLS, CostWindow
from kfloc_ros.kfnet.flow_network import FlowNetwork, FlowReading, load_flow_network
from kfloc_ros.kfnet.scoordnet import INPUT_CHANNELS, heads_of
from kfloc_ros.maps.files import appearing, appearing_file
from kfloc_ros.maps.place import AnyMap, each_map
from kfloc_ros.messages.clouds import ply_bytes

GREY = 128
ERROR_UNKNOWN = -1.0


def export_colmap(known: AnyMap, folder: Path) -> Path:
    """Write cameras.txt, images.txt and points3D.txt: the reference views, and each point observed in its own view.

    Raises:
        MapError: the folder exists or cannot be written, or a submap cannot be read.
    """
    if folder.exists():
        raise MapError(f"'{folder}' exists; give another folder.")
    try:
        with appearing(folder.absolute()) as temporary:
            c = known.camera
            model, parameters = camera_to_colmap(c)
            line = f"1 {model} {c.width} {c.height} {' '.join(map(repr, parameters))}\n"
            (temporary / "cameras.txt").write_text(line)
            with (temporary / "images.txt").open("w") as images, (temporary / "points3D.txt").open("w") as points:
                for image_line, observations, point_lines in _colmap_lines(known):
                    images.write(f"{image_line}\n{observations}\n")
                    points.writelines(f"{line}\n" for line in point_lines)
    except OSError as error:
        raise MapError(f"'{folder}' cannot be written: {error}.") from error
    return folder


def export_ply(known: AnyMap, path: Path) -> Path:
    """Write all reference points as binary PLY: x, y, z in metres (map frame), confidence.

    Raises:
        MapError: the file exists or cannot be written, or a submap cannot be read.
    """
    views = (view for _, part in each_map(known) for view in part.references.views)
    rows = [np.c_[view.points.cpu().numpy(), view.confidence.cpu().numpy()] for view in views]
    table = np.concatenate(rows).astype("<f4").view([(name, "<f4") for name in ("x", "y", "z", "confidence")])[:, 0]
    return write_new_file(path, ply_bytes(table, f"frame {known.frame_id}"))


MAX_DIFFERENCE = 1e-3
"""Largest difference of an exported network's output from torch's, relative to the largest value."""


def export_onnx(known: AnyMap, folder: Path) -> Path:
    """Write the networks as ONNX: backbone.onnx, flow.onnx and head.onnx (in a place, one in a folder per submap).

    - backbone: ``image`` (1, 1, H, W), grey, any scale; ``coarse``, ``fine``, ``context`` and ``reliability`` as in
      :class:`~kfloc_ros.features.backbone.BackboneFeatures`.
    - head: ``cells`` (N, 192), coarse features and context of a cell; ``points`` (N, 3) metres, map frame, and
      ``log_scale`` (N,), the logarithm of the Laplace scale b in metres. An ensemble has head_0.onnx, head_1.onnx, ...
    - flow: ``scores``, ``inside`` and ``base`` as in :class:`~kfloc_ros.kfnet.flow.CostWindow`; ``offset``,
      ``log_scale`` and ``visible`` as in :class:`~kfloc_ros.kfnet.flow_network.FlowReading`.

    Each file is run by ONNX Runtime and compared with torch before the folder appears.

    Raises:
        ConfigError: onnx or onnxruntime is not installed.
        MapError: the map has KFNet's own networks; a file's results differ from torch's; the folder exists or cannot be
            written.
    """
    if folder.exists():
        raise MapError(f"'{folder}' exists; give another folder.")
    if not is_installed("onnxruntime"):
        raise ConfigError("Writing and checking ONNX needs two packages; `pip install onnx onnxruntime`.")
    c, generator = known.camera, torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, c.height, c.width, generator=generator)
    h, w = c.height // COARSE_STRIDE, c.width // COARSE_STRIDE
    cells = torch.randn(256, INPUT_CHANNELS, generator=generator)
    window = (
        torch.rand(h * w, WINDOW_CELLS, generator=generator),
        torch.rand(h * w, WINDOW_CELLS, generator=generator) > 0.1,
        torch.zeros(2, h, w, dtype=torch.int64),
    )
    grids, reading = ["coarse", "fine", "context", "reliability"], ["offset", "log_scale", "visible"]
    try:
        with appearing(folder.absolute()) as temporary:
            _write_onnx(temporary / "backbone.onnx", _Grids(Backbone()), (image,), ["image"], grids)
            flow = _FlowOfWindow(load_flow_network())
            _write_onnx(temporary / "flow.onnx", flow, window, ["scores", "inside", "base"], reading)
            for name, part in each_map(known):
                if part.kfnet is not None:
                    raise MapError(f"Map '{part.name}' has KFNet's own networks, which are not exported.")
                (temporary / name).mkdir(exist_ok=True)
                heads = heads_of(part.head)
                for number, head in enumerate(heads):
                    path = temporary / name / ("head.onnx" if len(heads) == 1 else f"head_{number}.onnx")
                    rows = {"cells": {0: "n"}, "points": {0: "n"}, "log_scale": {0: "n"}}
                    _write_onnx(path, head.cpu().eval(), (cells,), ["cells"], ["points", "log_scale"], rows)
    except OSError as error:
        raise MapError(f"'{folder}' cannot be written: {error}.") from error
    return folder


class _Grids(torch.nn.Module):
    """Backbone that returns its grids as a tuple."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.backbone.grids(image)


class _FlowOfWindow(torch.nn.Module):
    """Flow network on the tensors of one cost window."""

    def __init__(self, network: FlowNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, scores: torch.Tensor, inside: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nowhere = torch.zeros(base.shape[1:], dtype=torch.bool)
        read: FlowReading = self.network([CostWindow(base, scores, inside, nowhere)])
        return read.offset, read.log_scale, read.visible


def _write_onnx(
    path: Path,
    network: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: dict[str, dict[int, str]] | None = None,
) -> None:
    """Write a network, and compare what ONNX Runtime computes from the file with torch."""
    import onnxruntime

    content = onnx_bytes(network, example, inputs, outputs, dynamic)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = [tensor[:100] if dynamic else tensor for tensor in example]  # another size, where it may differ
    found = session.run(None, {name: tensor.numpy() for name, tensor in zip(inputs, given, strict=True)})
    with torch.no_grad():
        wanted = network(*given)
    for name, got, want in zip(outputs, found, wanted, strict=True):
        reference = want.numpy()
        if not np.abs(got - reference).max() <= MAX_DIFFERENCE * max(1.0, float(np.abs(reference).max())):
            raise MapError(f"'{path.name}' does not compute what torch does: its output '{name}' differs.")
    path.write_bytes(content)


def write_new_file(path: Path, data: bytes) -> Path:
    """Write a new file atomically.

    Raises:
        MapError: the file exists or cannot be written.
    """
    if path.exists():
        raise MapError(f"'{path}' exists; give another file.")
    try:
        with appearing_file(path) as stream:
            stream.write(data)
    except OSError as error:
        raise MapError(f"'{path}' cannot be written: {error}.") from error
    return path


def _colmap_lines(known: AnyMap) -> Iterator[tuple[str, str, list[str]]]:
    """Yield for every view its line of images.txt, its observations, and its lines of points3D.txt."""
    views = (
        (_image_name(submap, ident), T, view)
        for submap, part in each_map(known)
        for ident, T, view in zip(part.references.ids, part.references.T_map_camera, part.references.views, strict=True)
    )
    first = 1
    for number, (name, T, view) in enumerate(views, start=1):
        T_camera_map = inverse_pose(T)
        points = view.points.cpu().double().numpy()
        pixels = pixels_to_colmap(_project(points, T_camera_map, known.camera))
        x, y, z, w = matrix_to_quaternion(T_camera_map[:3, :3])
        pose = " ".join(repr(float(v)) for v in (w, x, y, z, *T_camera_map[:3, 3]))
        numbers = range(first, first + len(points))
        observations = " ".join(f"{u:.3f} {v:.3f} {k}" for (u, v), k in zip(pixels, numbers, strict=True))
        lines = [
            f"{k} {x!r} {y!r} {z!r} {GREY} {GREY} {GREY} {ERROR_UNKNOWN} {number} {at}"
            for at, (k, (x, y, z)) in enumerate(zip(numbers, points.tolist(), strict=True))
        ]
        yield f"{number} {pose} 1 {name}", observations, lines
        first += len(points)


def _image_name(submap: str, ident: int) -> str:
    name = f"view_{ident:06d}.png"
    return f"{submap}/{name}" if submap else name


def _project(points: NDArray[np.float64], T_camera_map: Matrix, camera: Camera) -> NDArray[np.float64]:
    P = points @ T_camera_map[:3, :3].T + T_camera_map[:3, 3]
    return np.stack([camera.fx * P[:, 0] / P[:, 2] + camera.cx, camera.fy * P[:, 1] / P[:, 2] + camera.cy], axis=1)
