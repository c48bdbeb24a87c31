# SPDX-License-Identifier: Apache-2.0
"""Renderer of the README's picture: the demo's room, localized in the shipped map.

Left: the camera's image with the map's points projected by the pose, green where image and map agree. Right: the map
from above with the path so far, the true path, and the position's covariance, 100 standard deviations wide.

    .venv/bin/python scripts/front_picture.py docs/images/localization.gif
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kfloc_ros.datasets import open_source
from kfloc_ros.evaluation.offline import LocalizedFrame, localize_frames
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.localizer import Localizer
from kfloc_ros.mapping.picture import up_axis
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap
from kfloc_ros.visualization.clouds import Ortho, map_cloud
from kfloc_ros.visualization.overlay import OverlayPainter

WIDTH, HEIGHT = 400, 300
COLOURS = 96
FRAME_MS = 160
ELLIPSE_SIGMAS = 100.0
TRUTH_COLOUR, ELLIPSE_COLOUR = (40, 150, 60), (120, 60, 200)


def main() -> int:
    """Localize, draw, and write the animation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="GIF", help="file to write")
    parser.add_argument("--every", type=int, default=6, metavar="N", help="draw every N-th frame (default: 6)")
    args = parser.parse_args()
    scene_map = SceneMap.load(resolve_map("demo_room"))
    source = open_source("sim:localize", depth=False)
    localizer = Localizer(scene_map, LocalizerConfig(device="cpu"))
    drawing = Drawing(scene_map)
    pictures = []
    for number, item in enumerate(localize_frames(localizer, source)):
        picture = drawing.add(item)
        if number % args.every == 0:
            pictures.append(Image.fromarray(picture))
    palette = pictures[len(pictures) // 2].quantize(COLOURS)
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, optimize=True)
    print(f"{args.out}: {len(frames)} pictures, {args.out.stat().st_size / 1e6:.1f} MB")
    return 0


class Drawing:
    """Renderer of one frame after the other, with the path so far."""

    def __init__(self, scene_map: SceneMap) -> None:
        self._painter = OverlayPainter(scene_map.references, scene_map.camera)
        low, high = (np.array(corner, dtype=np.float64) for corner in scene_map.bounds_m)
        self._above = Ortho(low, high, *up_axis(scene_map), width=WIDTH, height=HEIGHT)
        cloud = map_cloud(scene_map)
        axis, sign = up_axis(scene_map)
        height = sign * cloud.points[:, axis]
        below = height < np.quantile(height, 0.9)  # the ceiling hides the room
        self._cloud = type(cloud)(cloud.points[below], cloud.colours[below])
        self._path: list[NDArray[np.float64]] = []
        self._truth: list[NDArray[np.float64]] = []

    def add(self, item: LocalizedFrame) -> NDArray[np.uint8]:
        """Add a frame and return its picture (HEIGHT, 2 WIDTH, 3)."""
        assert item.localization is not None
        estimate, image = item.estimate, item.localization.frame.image
        overlay = self._painter.paint(image, estimate, item.localization.features)
        T = estimate.T_map_camera
        if T is not None:
            self._path.append(T[:3, 3])
        if item.frame.T_map_camera is not None:
            self._truth.append(item.frame.T_map_camera[:3, 3])
        above = self._above.draw(self._cloud, path=np.array(self._path), camera=T, size_px=2)
        true_path = np.rint(self._above.pixels(np.array(self._truth))[:, :2]).astype(np.int32)
        cv2.polylines(above, [true_path], False, TRUTH_COLOUR, 1, cv2.LINE_AA)
        if T is not None and estimate.covariance is not None:
            self._ellipse(above, T[:3, 3], estimate.covariance[:3, :3])
        small = cv2.resize(overlay, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        return np.concatenate([small, above], axis=1)

    def _ellipse(
        self, picture: NDArray[np.uint8], centre: NDArray[np.float64], covariance: NDArray[np.float64]
    ) -> None:
        corners = self._above.pixels(np.vstack([np.zeros(3), np.eye(3)]))[:, :2]
        px_per_m = (corners[1:] - corners[0]).T  # (2, 3)
        root = np.linalg.cholesky(px_per_m @ covariance @ px_per_m.T + 1e-9 * np.eye(2))
        angles = np.linspace(0, 2 * np.pi, 40)
        circle = np.stack([np.cos(angles), np.sin(angles)])
        outline = self._above.pixels(centre[None])[:, :2] + ELLIPSE_SIGMAS * (root @ circle).T
        cv2.polylines(picture, [np.rint(outline).astype(np.int32)], True, ELLIPSE_COLOUR, 1, cv2.LINE_AA)


if __name__ == "__main__":
    raise SystemExit(main())
