# SPDX-License-Identifier: Apache-2.0
"""Scale of a reconstruction from something of known size: an object, a printed marker, the camera's height.

Each method first checks a source before minutes of work (``check``), then measures in the model (``measure``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import Matrix, make_pose
from kfloc_ros.mapping.check_geometry import normalised

Array = NDArray[np.float64]

MIN_PARALLAX_DEG = 1.5
"""Smallest angle between two images' rays to a point that gives its place."""
MAX_REPROJECTION = 0.02
"""Largest distance between a point's pixel and its triangulated place, as a share of the focal length."""
MARKER_IMAGES = 200
"""Largest number of images that are searched for markers."""
MARKER_SIDE_PX = 1600
"""Longer side of the images that markers are searched in; larger images are made smaller."""
MAX_UNEQUAL = 0.15
"""Largest difference between the four sides of a marker, as a share of their mean."""
DICTIONARIES = ("APRILTAG_36h11", "4X4_50", "5X5_100", "6X6_250", "7X7_1000", "ARUCO_ORIGINAL")
FLOOR_TILT_DEG, FLOOR_SHARE = 35.0, 0.02
"""Largest tilt of the floor against the images' mean horizon, which is off where cameras look down, and its smallest
share of all points."""
RANSAC_TRIALS = 2000


@dataclass(frozen=True)
class Scale:
    """Metres per unit of a model, with its origin."""

    metres_per_unit: float
    origin: str
    """Part of a sentence, such as ``an object of 0.6 m in images 3 and 9``; stored in the map."""


@dataclass(frozen=True, eq=False)
class PosedViews:
    """Images of a source with their poses in a model of unknown scale."""

    source: FrameSource
    poses: Mapping[int, Matrix]
    """``T_model_camera`` by position."""
    points: Mapping[int, Array] = field(default_factory=dict)
    """(N, 3) points observed by each image, by position."""
    cameras: Mapping[int, Camera] = field(default_factory=dict)
    """Cameras as estimated, by position; empty if the source's own are right."""

    def camera(self, position: int) -> Camera:
        """Return the camera of an image as it was recorded."""
        return self.cameras[position] if self.cameras else self.source.own_camera(position)

    @classmethod
    def of(cls, source: FrameSource) -> PosedViews:
        """Return the views of a source that has poses."""
        poses = {k: T for k in range(len(source)) if not source.fault(k) and (T := source.pose(k)) is not None}
        points = {k: seen for k in poses if (seen := source.visible_points(k)) is not None}
        return cls(source, poses, points)

    @cached_property
    def positions(self) -> dict[int, int]:
        """Positions by ``Frame.index``."""
        return {index: position for position, index in enumerate(self.source.indices())}


@dataclass(frozen=True)
class ImageEnds:
    """Both ends of an object in one image."""

    index: int
    """``Frame.index`` of the image."""
    ends_px: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class ObjectLength:
    """Object of known length whose ends are given in two or more images."""

    metres: float
    images: tuple[ImageEnds, ...]

    def check(self, source: FrameSource) -> None:
        """Refuse images that do not exist and pixels outside of them.

        Raises:
            SourceError: an image does not exist, or a pixel is outside.
        """
        positions = {index: position for position, index in enumerate(source.indices())}
        for image in self.images:
            if image.index not in positions:
                raise SourceError(
                    f"--scale-object names image {image.index}, and '{source.name}' has images {min(positions)} to "
                    f"{max(positions)}. `kfloc map measure SOURCE` writes a page that shows them."
                )
            camera = source.own_camera(positions[image.index])
            for x, y in image.ends_px:
                if not (-0.5 <= x <= camera.width - 0.5 and -0.5 <= y <= camera.height - 0.5):
                    raise SourceError(
                        f"--scale-object gives the pixel ({x:g}, {y:g}) of image {image.index}, which has "
                        f"{camera.width}x{camera.height} pixels."
                    )

    def measure(self, views: PosedViews) -> Scale:
        """Return the scale.

        Raises:
            SourceError: an image has no pose, the images see the object from one direction, or the pixels disagree.
        """
        numbers = [image.index for image in self.images]
        named = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
        missing = [n for n in numbers if views.positions.get(n, -1) not in views.poses]
        if missing:
            raise SourceError(f"Image {missing[0]} of --scale-object could not be placed; choose another image.")
        places = [views.positions[n] for n in numbers]
        ends = []
        for k in (0, 1):
            pixels = [np.array(image.ends_px[k]) for image in self.images]
            point = triangulate(views, places, pixels)
            if isinstance(point, str):
                raise SourceError(f"The object of --scale-object in images {named} cannot be measured: {point}")
            ends.append(point)
        length = float(np.linalg.norm(ends[0] - ends[1]))
        if not length > 0:
            raise SourceError("Both ends of --scale-object are the same point.")
        return Scale(self.metres / length, f"an object of {self.metres:g} m in images {named}")


def triangulate(views: PosedViews, positions: Sequence[int], pixels: Sequence[Array]) -> Array | str:
    """Return the point (3,) nearest to the rays of pixels (2,) in images, or a sentence that says why there is none."""
    rays, focals = [], []
    for position, pixel in zip(positions, pixels, strict=True):
        camera = views.camera(position)
        ray = np.append(normalised(camera, np.asarray(pixel, dtype=np.float64)[None])[0], 1.0)
        rays.append(views.poses[position][:3, :3] @ (ray / np.linalg.norm(ray)))
        focals.append(camera.fx)
    centres = np.stack([views.poses[position][:3, 3] for position in positions])
    cosines = np.clip(np.stack(rays) @ np.stack(rays).T, -1, 1)
    if np.degrees(np.arccos(cosines.min())) < MIN_PARALLAX_DEG:
        return (
            "the images see it from nearly the same direction, or the rays are parallel. Choose images that were "
            "taken some steps apart sideways."
        )
    projectors = np.stack([np.eye(3) - np.outer(ray, ray) for ray in rays])
    point = np.linalg.solve(projectors.sum(axis=0), np.einsum("kij,kj->i", projectors, centres))
    for position, ray, centre in zip(positions, rays, centres, strict=True):
        along = float((point - centre) @ ray)
        off = float(np.linalg.norm(point - centre - along * ray))
        if along <= 0 or off / along > MAX_REPROJECTION:
            index = views.source.indices()[position]
            return f"its rays do not meet: the pixels, for example those in image {index}, are not of the same point."
    return np.asarray(point)


@dataclass(frozen=True)
class Marker:
    """Printed marker that was found in an image."""

    name: str
    corners_px: Array
    """(4, 2)."""


def find_markers(image: NDArray[np.uint8]) -> list[Marker]:
    """Return the ArUco and AprilTag markers in an RGB image (H, W, 3); large images are searched at a smaller size."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = max(max(grey.shape) / MARKER_SIDE_PX, 1.0)
    if scale > 1:
        size = (round(grey.shape[1] / scale), round(grey.shape[0] / scale))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    ratio = np.array([image.shape[1] / grey.shape[1], image.shape[0] / grey.shape[0]])
    parameters = cv2.aruco.DetectorParameters()
    parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_SUBPIX
    found = []
    for name in DICTIONARIES:
        dictionary = cv2.aruco.getPredefinedDictionary(getattr(cv2.aruco, f"DICT_{name}"))
        corners, numbers, _ = cv2.aruco.ArucoDetector(dictionary, parameters).detectMarkers(grey)
        if numbers is not None:
            found += [
                Marker(
                    f"{name}:{int(number)}", (np.asarray(corner, dtype=np.float64).reshape(4, 2) + 0.5) * ratio - 0.5
                )
                for number, corner in zip(np.ravel(numbers), corners, strict=True)
            ]
    return found


@dataclass(frozen=True)
class MarkerSize:
    """Printed ArUco or AprilTag markers with sides of one known length."""

    metres: float
    """Side of the black square."""
    _seen: dict[int, list[Marker]] = field(default_factory=dict, compare=False, repr=False)

    def check(self, source: FrameSource) -> None:
        """Search the images for markers.

        Raises:
            SourceError: no marker is seen in two images.
        """
        for position in np.unique(np.linspace(0, len(source) - 1, min(MARKER_IMAGES, len(source))).astype(int)):
            frame = source.read_recorded(int(position))
            markers = find_markers(frame.image) if frame is not None else []
            if markers:
                self._seen[int(position)] = markers
        if not self._twice():
            once = len({marker.name for markers in self._seen.values() for marker in markers})
            what = f"{once} markers in one image each" if once else "no marker"
            raise SourceError(
                f"--scale-marker needs a marker that two images show; '{source.name}' shows {what}. Families that are "
                f"known: {', '.join(DICTIONARIES)}; the marker needs a white border."
            )

    def _twice(self, among: Mapping[int, Matrix] | None = None) -> dict[str, list[tuple[int, Array]]]:
        """(position, corners) of the images that show a marker, by markers that two of them show."""
        seen: dict[str, list[tuple[int, Array]]] = {}
        for position, markers in self._seen.items():
            if among is None or position in among:
                names = [marker.name for marker in markers]
                for marker in markers:
                    if names.count(marker.name) == 1:
                        seen.setdefault(marker.name, []).append((position, marker.corners_px))
        return {name: rows for name, rows in seen.items() if len(rows) >= 2}

    def measure(self, views: PosedViews) -> Scale:
        """Return the scale: the median over markers.

        Raises:
            SourceError: no marker could be measured.
        """
        if not self._seen:
            self.check(views.source)
        scales, counted, reason = [], 0, "the images that show it could not be placed."
        for rows in self._twice(views.poses).values():
            places = [position for position, _ in rows]
            corners = [triangulate(views, places, [pixels[k] for _, pixels in rows]) for k in range(4)]
            refused = [corner for corner in corners if isinstance(corner, str)]
            if refused:
                reason = refused[0]
                continue
            square = np.stack([corner for corner in corners if not isinstance(corner, str)])
            sides = np.linalg.norm(square - np.roll(square, 1, axis=0), axis=1)
            if np.abs(sides / sides.mean() - 1).max() > MAX_UNEQUAL:
                reason = "its four sides differ by more than 15 %."
                continue
            scales.append(self.metres / float(sides.mean()))
            counted += len(rows)
        if not scales:
            raise SourceError(f"No marker of --scale-marker could be measured: {reason}")
        what = "a marker" if len(scales) == 1 else f"{len(scales)} markers"
        return Scale(float(np.median(scales)), f"{what} of {self.metres:g} m in {counted} views")


@dataclass(frozen=True)
class CameraHeight:
    """Known height of the camera above a level floor."""

    metres: float

    def check(self, source: FrameSource) -> None:
        """Nothing can be checked before the reconstruction."""

    def measure(self, views: PosedViews) -> Scale:
        """Return the scale: the median height of the cameras above the floor, the lowest level plane of points.

        Raises:
            SourceError: there is no floor.
        """
        R = upright(views.poses)[:3, :3]
        points = np.concatenate([points for points in views.points.values() if len(points)] or [np.zeros((0, 3))])
        centres = np.stack([T[:3, 3] for T in views.poses.values()])
        height = height_above_floor(points @ R.T, centres @ R.T)
        if height is None:
            raise SourceError(
                "--scale-height needs a level floor with texture that the images show, and none was found below the "
                "cameras."
            )
        return Scale(self.metres / height, f"a camera height of {self.metres:g} m above the floor")


def height_above_floor(points: Array, centres: Array) -> float | None:
    """Return the median distance of camera centres (M, 3) from the lowest nearly level plane of points (N, 3), z up.

    The plane is the one with the most points by RANSAC below the cameras; None if it has too few.
    """
    low = points[points[:, 2] < np.median(centres[:, 2])]
    if len(low) < 50:
        return None
    extent = float(np.median(np.linalg.norm(low - np.median(centres, axis=0), axis=1)))
    near = 0.015 * extent
    rng = np.random.default_rng(0)
    best: tuple[int, Array, float] | None = None
    for _ in range(RANSAC_TRIALS):
        a, b, c = low[rng.choice(len(low), 3, replace=False)]
        normal = np.cross(b - a, c - a)
        length = float(np.linalg.norm(normal))
        if length < 1e-12 or abs(normal[2]) / length < np.cos(np.radians(FLOOR_TILT_DEG)):
            continue
        normal = normal / length * np.sign(normal[2])
        offset = float(normal @ a)
        count = int((np.abs(low @ normal - offset) < near).sum())
        below = float((low @ normal < offset - 3 * near).mean())
        if below < 0.05 and (best is None or count > best[0]):
            best = count, normal, offset
    if best is None or best[0] < max(50, FLOOR_SHARE * len(points)):
        return None
    inside = low[np.abs(low @ best[1] - best[2]) < near]
    normal = np.linalg.svd(inside - inside.mean(axis=0), full_matrices=False)[2][2]
    normal = normal * np.sign(normal @ best[1])
    heights = (centres - inside.mean(axis=0)) @ normal
    height = float(np.median(heights))
    return height if height > 3 * near else None


def upright(poses: Mapping[int, Matrix]) -> Matrix:
    """Return the rotation (4, 4) to a frame with z upwards, assuming that the images are upright on average."""
    up = -np.mean([T[:3, 1] for T in poses.values()], axis=0)
    if np.linalg.norm(up) < 1e-3:  # images in all directions: no upward direction
        return np.eye(4)
    z = up / np.linalg.norm(up)
    ahead = np.mean([T[:3, 2] for T in poses.values()], axis=0)
    x = ahead - (ahead @ z) * z
    if np.linalg.norm(x) < 1e-3:
        x = np.cross(z, np.eye(3)[int(np.abs(z).argmin())])
    x /= np.linalg.norm(x)
    return make_pose(np.stack([x, np.cross(z, x), z]), np.zeros(3))
