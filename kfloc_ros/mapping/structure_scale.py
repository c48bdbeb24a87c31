# SPDX-License-Identifier: Apache-2.0
"""Scale of a reconstruction, which images alone do not determine.

It is computed from depth images, from approximate poses (odometry, another tracker), from one measured length, or as in
``measured_scale.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import DerivedSource, FrameSource
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.mapping.measured_scale import ImageEnds, ObjectLength, PosedViews, Scale
from kfloc_ros.types import Frame

DEPTH_VIEWS = 30
MIN_DEPTH_PAIRS = 200
MIN_BASELINE_M = 0.05
DOUBTED_FOCAL_SIGMA = 0.005
"""Standard deviation of an estimated focal length, as a share of it, from which on it is told: the usual error of a
calibration."""
UNSCALED = "unknown: lengths are in units of the model"
Array = NDArray[np.float64]


class ScaleMethod(Protocol):
    """Origin of the scale: refuses what cannot work before the reconstruction, and measures after it."""

    def check(self, source: FrameSource) -> None:
        """Raise SourceError if the scale cannot come from there."""
        ...

    def measure(self, views: PosedViews) -> Scale:
        """Return the metres per unit of the model, or raise SourceError."""
        ...


@dataclass(frozen=True)
class KnownLength:
    """Measured distance between the camera positions of two frames."""

    first: int
    second: int
    metres: float

    def check(self, source: FrameSource) -> None:
        """Refuse frames that do not exist.

        Raises:
            SourceError: a frame does not exist, both are the same, or the length is not positive.
        """
        indices = set(source.indices())
        for frame in (self.first, self.second):
            if frame not in indices:
                raise SourceError(f"--sfm-length names frame {frame}, and '{source.name}' has no such frame.")
        if self.first == self.second or not 0 < self.metres < float("inf"):
            raise SourceError("The measured length must be positive, and between two different positions.")

    def measure(self, views: PosedViews) -> Scale:
        """Return the scale.

        Raises:
            SourceError: a frame has no pose, or both have the same position.
        """
        centres = []
        for frame in (self.first, self.second):
            T = views.poses.get(views.positions.get(frame, -1))
            if T is None:
                raise SourceError(f"Frame {frame} of the measured length could not be placed; choose another frame.")
            centres.append(T[:3, 3])
        apart = float(np.linalg.norm(centres[0] - centres[1]))
        if not (self.metres > 0 and apart > 1e-9):
            raise SourceError("The measured length must be positive, and between two different positions.")
        return Scale(self.metres / apart, f"{self.metres:g} m between frames {self.first} and {self.second}")


def known_length(words: Sequence[str] | None) -> KnownLength | None:
    """Parse ``FRAME FRAME METRES`` from a command line.

    Raises:
        SourceError: the words are not two frame numbers and a length.
    """
    if words is None:
        return None
    try:
        return KnownLength(int(words[0]), int(words[1]), float(words[2]))
    except (ValueError, IndexError) as error:
        raise SourceError(f"--sfm-length takes two frame numbers and metres, not '{' '.join(words)}'.") from error


def object_length(words: Sequence[str]) -> ObjectLength:
    """Parse ``METRES IMAGE:X,Y,X,Y IMAGE:X,Y,X,Y`` from a command line.

    Raises:
        SourceError: the words have another form.
    """
    number = r"(-?\d+(?:\.\d*)?)"
    form = re.compile(rf"(\d+):{number},{number},{number},{number}")
    matches = [form.fullmatch(word.strip()) for word in words[1:]]
    try:
        metres = float(words[0])
    except (IndexError, ValueError):
        metres = float("nan")
    if not 0 < metres < float("inf") or len(matches) < 2 or None in matches:
        raise SourceError(
            "--scale-object takes the object's length in metres, and for two or more images the number and the pixels "
            f"of both ends, such as 0.60 3:100,200,340,210 9:80,220,330,215, and not '{' '.join(words)}'. "
            "`kfloc map measure SOURCE` writes a page that yields them by clicks."
        )
    values = [(int(m[1]), [float(m[k]) for k in range(2, 6)]) for m in matches if m is not None]
    if len({index for index, _ in values}) < len(values):
        raise SourceError("--scale-object names an image twice.")
    return ObjectLength(metres, tuple(ImageEnds(index, ((v[0], v[1]), (v[2], v[3]))) for index, v in values))


SCALE_HELP = (
    "Images alone do not give the scale. Add --scale-object (length of an object seen in two images; `kfloc map "
    "measure SOURCE` makes a page that yields its words by clicks), --scale-marker METRES (printed ArUco or AprilTag "
    "markers), --scale-height METRES (of the camera above the floor), --sfm-length FRAME FRAME METRES (between the "
    "camera's positions in two images), or --unscaled (`kfloc map scale` can set it later)."
)


@dataclass(frozen=True)
class FromSource:
    """Scale from the source's depth images, else from its poses, of which only distances are used."""

    def check(self, source: FrameSource) -> None:
        """Refuse a source without depth and poses.

        Raises:
            SourceError: it has neither.
        """
        probes = np.unique(np.linspace(0, len(source) - 1, min(5, len(source))).astype(int)).tolist()
        frames = [frame for position in probes if (frame := source.read(position)) is not None]
        posed = sum(source.pose(position) is not None for position in range(len(source)) if not source.fault(position))
        if posed < 2 and not any(frame.depth_m is not None for frame in frames):
            raise SourceError(f"'{source.name}' has neither depth nor poses. {SCALE_HELP}")

    def measure(self, views: PosedViews) -> Scale:
        """Return the scale.

        Raises:
            SourceError: depth and poses do not give it.
        """
        source, poses = views.source, views.poses
        scale = _scale_from_depth(source, poses, views.points)
        if scale is not None:
            return Scale(scale, "the depth images")
        scale = scale_from_poses(poses, {k: T for k in poses if (T := source.pose(k)) is not None})
        if scale is None:
            raise SourceError(f"Depth and poses of '{source.name}' do not give the scale. {SCALE_HELP}")
        return Scale(scale, "the distances between the source's poses")


@dataclass(frozen=True)
class Unscaled:
    """No scale: the model keeps its unit."""

    def check(self, source: FrameSource) -> None:
        """Accept every source."""

    def measure(self, views: PosedViews) -> Scale:
        """Return a factor of 1."""
        return Scale(1.0, UNSCALED)


def _scale_from_depth(source: FrameSource, poses: Mapping[int, Matrix], points: Mapping[int, Array]) -> float | None:
    """Return the median ratio of measured depth to the model's depth at its points."""
    camera = source.camera.pinhole()
    adapter = ImageAdapter(source.camera, camera)
    ratios: list[Array] = []
    known = list(poses)
    for position in known[:: max(1, len(known) // DEPTH_VIEWS)]:
        frame = source.read(position)
        depth_m = None if frame is None else frame.depth_m
        if depth_m is None:
            continue
        T = inverse_pose(poses[position])
        local = points[position] @ T[:3, :3].T + T[:3, 3]
        local = local[local[:, 2] > 1e-6]
        u = np.round(camera.fx * local[:, 0] / local[:, 2] + camera.cx).astype(np.int64)
        v = np.round(camera.fy * local[:, 1] / local[:, 2] + camera.cy).astype(np.int64)
        inside = (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
        measured = adapter.nearest(depth_m)[v[inside], u[inside]]
        ratios.append((measured / local[inside, 2])[measured > 0].astype(np.float64))
    pairs = np.concatenate(ratios) if ratios else np.zeros(0)
    return float(np.median(pairs)) if len(pairs) >= MIN_DEPTH_PAIRS else None


def scale_from_poses(model: Mapping[int, Matrix], known: Mapping[int, Matrix]) -> float | None:
    """Return the median ratio of distances between the same two distant frames in two sets of poses.

    Distances are used rather than positions, since odometry drifts and the frames differ.
    """
    frames = [k for k, T in known.items() if np.isfinite(T).all() and k in model]
    if len(frames) < 2:
        return None
    a, b = (np.stack([poses[k][:3, 3] for k in frames]) for poses in (model, known))
    apart_model, apart_m = (np.linalg.norm(c[:, None] - c[None], axis=2)[np.triu_indices(len(c), 1)] for c in (a, b))
    far = (apart_m > max(MIN_BASELINE_M, float(np.median(apart_m)))) & (apart_model > 1e-9)
    return float(np.median(apart_m[far] / apart_model[far])) if far.any() else None


class ReconstructedSource(DerivedSource):
    """Images, and depth if there is any, of one source with the poses of a reconstruction.

    Args:
        source: source of the images; its own poses are ignored.
        poses: ``T_map_camera`` by position; images that were not registered have none.
        points: (N, 3) points in the map frame observed by each image, by position.
        cameras: estimated cameras of the images as recorded, by position, if the source's camera was a guess. Images of
            other cameras are brought to the camera that most of them have.
        scale: metres per unit of the model and their origin, which was applied.
        focal_sigma: standard deviation of an estimated focal length, as a share of it; None if it is not known.
    """

    passes_images_on = True

    def __init__(
        self,
        source: FrameSource,
        poses: Mapping[int, Matrix],
        points: Mapping[int, NDArray[np.float64]],
        cameras: Mapping[int, Camera] | None = None,
        scale: Scale | None = None,
        focal_sigma: float | None = None,
    ) -> None:
        super().__init__(source)
        self._poses, self._points, self._cameras = poses, points, dict(cameras or {})
        self.scale = scale or Scale(1.0, UNSCALED)
        self.focal_sigma = focal_sigma
        kinds = Counter(self._cameras.values())
        self._is_of_several = len(kinds) > 1
        usual = kinds.most_common(1)[0][0] if kinds else source.camera
        self._camera = usual.pinhole() if self._is_of_several else usual
        self._adapters: dict[Camera, ImageAdapter] = {}

    @property
    def camera(self) -> Camera:
        return self._camera

    @property
    def camera_doubt(self) -> str:
        """Return a sentence if the images hardly tell the focal length that was estimated; else an empty string."""
        if self.focal_sigma is None or self.focal_sigma <= DOUBTED_FOCAL_SIGMA:
            return ""
        return (
            f"The images tell the focal length of {self._camera.fx:.0f} px to {100 * self.focal_sigma:.1f} % at best; "
            "the map may be bent. Put a camera.txt with the camera's calibration beside the images, or record near and "
            "far things from more sides."
        )

    @property
    def camera_is_guess(self) -> bool:
        return False

    def __getitem__(self, position: int) -> Frame:
        if not self._is_of_several:
            return super().__getitem__(position)
        frame = self.recorded(position)
        adapter = self._adapters.get(frame.camera)
        if adapter is None:
            adapter = self._adapters.setdefault(frame.camera, ImageAdapter(frame.camera, self._camera))
        depth_m = None if frame.depth_m is None else adapter.nearest(frame.depth_m)
        return replace(frame, image=adapter(frame.image), depth_m=depth_m, camera=self._camera)

    def encoded_image(self, position: int) -> bytes | None:
        return None if self._is_of_several else super().encoded_image(position)

    def changed(self, frame: Frame, position: int) -> Frame:
        camera = frame.camera if self._is_of_several else self._camera
        return replace(frame, camera=self._cameras.get(position, camera), T_map_camera=self._poses.get(position))

    def pose(self, position: int) -> Matrix | None:
        return self._poses.get(position)

    def visible_points(self, position: int) -> NDArray[np.float64] | None:
        return self._points.get(position)
