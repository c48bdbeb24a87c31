# SPDX-License-Identifier: Apache-2.0
"""Recordings for the Rerun viewer: 3-D content of the map frame over time, with pictures and curves.

Rerun (Apache-2.0 or MIT) is optional, half a gigabyte with its viewer, and imported when a recording starts.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kfloc_ros.errors import DrawingError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix

WORLD = "map"
"""Entity of the map frame, above all entities in it."""
JPEG_QUALITY = 85


def has_display() -> bool:
    """Return True if a window can be opened on this machine."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


class Recording:
    """Recording into a ``.rrd`` file, a live viewer, or both.

    Entities in the map frame are named below ``map/``; pictures and curves can have any other name.

    Args:
        title: title of the recording.
        path: the ``.rrd`` file; it is complete after :meth:`close`.
        live: open the viewer and show the content as it is logged.
        up: vertical axis of the map frame, 0 to 2 for x to z, and its sign.
        pictures: entities to show beside the 3-D view.
        curves: entities of numbers to show over time.

    Raises:
        DrawingError: Rerun is not installed, the file cannot be written, or there is no display for the viewer.
    """

    def __init__(
        self,
        title: str,
        *,
        path: Path | None = None,
        live: bool = False,
        up: tuple[int, float] | None = None,
        pictures: Sequence[str] = (),
        curves: Sequence[str] = (),
    ) -> None:
        self._rr = _import_rerun()
        if live and not has_display():
            raise DrawingError(
                "The live viewer needs a display, and there is none; write a recording to a .rrd file and open it "
                "with `rerun FILE` on a machine with a display."
            )
        self._stream = self._rr.RecordingStream("kfloc")
        self._stream.send_recording_name(title)
        sinks = []
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("wb").close()
            except OSError as error:
                raise DrawingError(f"The recording '{path}' cannot be written: {error.strerror}.") from error
            sinks.append(self._rr.FileSink(path))
        if live:
            self._rr.spawn(connect=False, recording=self._stream)
            sinks.append(self._rr.GrpcSink())
        self._stream.set_sinks(*sinks, default_blueprint=self._blueprint(pictures, curves))
        if up is not None:
            self._log(WORLD, getattr(self._rr.ViewCoordinates, _handedness(*up)), static=True)

    def at(self, frame: int, stamp_ns: int | None = None) -> None:
        """Set the frame, and the time since the epoch or the start, of the content logged next."""
        self._stream.set_time("frame", sequence=frame)
        if stamp_ns is not None:
            self._stream.set_time("time", duration=np.timedelta64(int(stamp_ns), "ns"))

    def step(self, number: int) -> None:
        """Set the step of an alignment of the content logged next."""
        self._stream.set_time("step", sequence=number)

    def cloud(
        self,
        entity: str,
        points: NDArray[np.floating],
        colours: ArrayLike,
        *,
        radius_m: float = 0.008,
        static: bool = False,
    ) -> None:
        """Log points (N, 3) in metres with RGB (N, 3), or one colour for all; points that are not finite are
        omitted.
        """
        points = np.asarray(points, dtype=np.float32).reshape(-1, 3)
        colours = np.asarray(colours, dtype=np.uint8)
        finite = np.isfinite(points).all(axis=1)
        colours = colours.reshape(-1, 3)[finite] if colours.ndim > 1 else colours
        self._log(entity, self._rr.Points3D(points[finite], colors=colours, radii=radius_m), static=static)

    def lines(
        self, entity: str, strips: ArrayLike, colour: ArrayLike, *, radius_m: float = 0.003, static: bool = False
    ) -> None:
        """Log polylines (K, L, 3) in metres of one colour, or one colour each (K, 3)."""
        coloured = np.asarray(colour, dtype=np.uint8)
        shape = self._rr.LineStrips3D(np.asarray(strips, dtype=np.float32), colors=coloured, radii=radius_m)
        self._log(entity, shape, static=static)

    def camera(
        self,
        entity: str,
        T_map_camera: Matrix,
        camera: Camera,
        image: NDArray[np.uint8] | None = None,
        *,
        colour: tuple[int, int, int] | None = None,
        size_m: float = 0.25,
    ) -> None:
        """Log a camera at a pose, with its image (H, W, 3)."""
        rr = self._rr
        self._log(entity, rr.Transform3D(translation=T_map_camera[:3, 3], mat3x3=T_map_camera[:3, :3]))
        shape = rr.Pinhole(
            image_from_camera=camera.K,
            width=camera.width,
            height=camera.height,
            image_plane_distance=size_m,
            color=colour,
        )
        self._log(f"{entity}/image" if image is not None else f"{entity}/frustum", shape)
        if image is not None:
            self._log(f"{entity}/image", rr.Image(image).compress(jpeg_quality=JPEG_QUALITY))

    def picture(self, entity: str, image: NDArray[np.uint8], *, jpeg: bool = False) -> None:
        """Log a picture (H, W, 3); ``jpeg`` reduces its size to a tenth."""
        picture = self._rr.Image(image)
        self._log(entity, picture.compress(jpeg_quality=JPEG_QUALITY) if jpeg else picture)

    def number(self, entity: str, value: float) -> None:
        """Log a point of a curve; NaN leaves a gap."""
        self._log(entity, self._rr.Scalars(float(value)))

    def text(self, entity: str, text: str) -> None:
        """Log a line of text."""
        self._log(entity, self._rr.TextLog(text))

    def clear(self, entity: str) -> None:
        """Show nothing at an entity and below from here on."""
        self._log(entity, self._rr.Clear(recursive=True))

    def close(self) -> None:
        """Write pending content."""
        self._stream.flush()
        self._stream.disconnect()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log(self, entity: str, what: Any, *, static: bool = False) -> None:
        self._stream.log(entity, what, static=static)

    def _blueprint(self, pictures: Sequence[str], curves: Sequence[str]) -> Any:
        rrb = self._rr.blueprint
        beside = [rrb.Spatial2DView(origin=name, name=name.rsplit("/", 1)[-1]) for name in pictures]
        beside += [rrb.TimeSeriesView(origin=name, name=name.rsplit("/", 1)[-1]) for name in curves]
        scene = rrb.Spatial3DView(origin=WORLD, name=WORLD)
        if not beside:
            return rrb.Blueprint(scene, collapse_panels=True)
        return rrb.Blueprint(
            rrb.Horizontal(scene, rrb.Grid(*beside), column_shares=[3, 2]), rrb.TimePanel(state="expanded")
        )


def _import_rerun() -> Any:
    try:
        return importlib.import_module("rerun")
    except ImportError as error:
        raise DrawingError(
            "Recordings for the Rerun viewer need the Python package 'rerun-sdk', which is not installed; install it "
            "with `pip install rerun-sdk`, or use pictures, videos or the HTML page, which do not need it."
        ) from error


def _handedness(axis: int, sign: float) -> str:
    return f"RIGHT_HAND_{'XYZ'[axis]}_{'UP' if sign > 0 else 'DOWN'}"
