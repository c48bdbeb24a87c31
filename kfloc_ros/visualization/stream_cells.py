# SPDX-License-Identifier: Apache-2.0
"""The scene coordinates of a stream, gathered into one cloud."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.visualization.clouds import Cloud, cell_cloud
from kfloc_ros.visualization.filter_views import cell_panels
from kfloc_ros.visualization.from_above import Ortho, below
from kfloc_ros.visualization.ply import merged, surest, write_ply
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.rerun_views import log_frame
from kfloc_ros.visualization.series import write_picture
from kfloc_ros.visualization.sheet import Panel, Sheet
from kfloc_ros.visualization.stream import Seen

HEADROOM_M = 0.6
"""What lies higher above the cameras than this is not drawn from above: it hides the room."""


class CellStream:
    """Takes frames one after the other.

    Args:
        bounds_m: smallest and largest corner of the map.
        up: the map's axis that points up, and its sign.
        max_sigma_m: points less certain than this are left out.
        voxel_m: of the points in a cube of this side, the surest one is kept.
    """

    def __init__(
        self, bounds_m: Sequence[Sequence[float]], up: tuple[int, float], max_sigma_m: float, voxel_m: float
    ) -> None:
        self.cloud = self._latest = merged([], voxel_m)
        self._bounds, self._up = bounds_m, up
        self._max_sigma_m, self._voxel_m = max_sigma_m, voxel_m
        self._way: list[NDArray[np.float64]] = []
        self._files = 0
        low, high = (np.array(corner, dtype=np.float64) for corner in bounds_m)
        self._above = Ortho(low, high, *up)
        side = next(k for k in range(3) if k != up[0])
        self._side = Ortho(low, high, side, 1.0, upward=up)

    def add(self, seen: Seen, folder: Path) -> list[Panel]:
        """Write the frame's PLY into a folder, add its points to the cloud, and return the panels of its sheet."""
        coordinates, pose = seen.coarse.scene_coordinates, seen.coarse.pose
        assert coordinates is not None  # the stages run in this process
        cloud = surest(cell_cloud(coordinates, seen.frame.image), self._max_sigma_m)
        write_ply(folder / f"{seen.frame.index:06d}.ply", cloud, f"frame {seen.frame.index}")
        self._files += 1
        self._latest = cloud
        self.cloud = merged([self.cloud, cloud], self._voxel_m)
        if pose.T_map_camera is not None:
            self._way.append(pose.T_map_camera[:3, 3])
        from_above = self._above.draw(self._low_enough(), way=self._line(), camera=pose.T_map_camera)
        return cell_panels(seen.frame, seen.coarse, self._bounds, from_above)

    def log(self, recording: Recording, seen: Seen) -> None:
        """The frame, and its points, which stay."""
        log_frame(recording, seen)
        recording.cloud(f"map/cloud/{seen.frame.index}", self._latest.points, self._latest.colours, radius_m=0.006)

    def write(self, out: Path, title: str) -> list[str]:
        """Write ``cloud.ply`` and ``cloud.png`` of all frames; returns what there is, in words."""
        count = write_ply(out / "cloud.ply", self.cloud, title)
        sheet = Sheet(2, self._above.width, self._above.height)
        panels = [
            Panel("from above, with the cameras' way", self._above.draw(self._low_enough(), way=self._line())),
            Panel("from the side", self._side.draw(self.cloud, way=self._line())),
        ]
        rule = f"sigma below {100 * self._max_sigma_m:g} cm, one point in {100 * self._voxel_m:g} cm"
        heading = f"{title}: scene coordinates of {self._files} frames, {count} points ({rule})"
        write_picture(out / "cloud.png", sheet.draw(heading, panels))
        return [
            f"{out / 'cells'}: {self._files} point clouds",
            f"{out / 'cloud.ply'}: {count} points of all frames",
            f"{out / 'cloud.png'}",
        ]

    def _line(self) -> NDArray[np.float64] | None:
        return np.array(self._way) if self._way else None

    def _low_enough(self) -> Cloud:
        if not self._way:
            return self.cloud
        axis, sign = self._up
        return below(self.cloud, axis, sign, max(sign * centre[axis] for centre in self._way) + HEADROOM_M)
