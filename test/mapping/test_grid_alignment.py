# SPDX-License-Identifier: Apache-2.0
"""Maps on occupancy grids: found by walls, refused where that is ambiguous, by hand, and written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.mapping.grid_alignment import align_by_hand, align_with_grid, read_grid
from kfloc_ros.mapping.registration import level
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.scene_map import SceneMap, in_frame
from kfloc_ros.simulation.faces import Face
from kfloc_ros.simulation.room import HALF_X_M, HALF_Y_M, room
from kfloc_ros.types import Matrix

RESOLUTION_M, ORIGIN = 0.05, (-3.0, -2.0)
T_CORNER_ROOM = make_pose(so3_exp([0.0, 0.0, 0.7]), [4.5, 4.0, 0.0])
T_GRID_ROOM = make_pose(np.eye(3), [*ORIGIN, 0.0]) @ T_CORNER_ROOM


def slice_of(faces: Sequence[Face], height_m: float) -> list[np.ndarray]:
    """The lines in which surfaces cross a height, as a lidar sees them."""
    lines = []
    for item in faces:
        corners = [item.corner, item.corner + item.right, item.corner + item.right + item.down, item.corner + item.down]
        crossings = []
        for a, b in zip(corners, [*corners[1:], corners[0]], strict=True):
            if (a[2] - height_m) * (b[2] - height_m) < 0:
                crossings.append(a + (height_m - a[2]) / (b[2] - a[2]) * (b - a))
        if len(crossings) == 2:
            lines.append(np.array(crossings))
    return lines


def write_grid(folder: Path, lines: Sequence[np.ndarray], size: tuple[int, int] = (180, 160)) -> Path:
    width, height = size
    image = np.full((height, width), 205, np.uint8)

    def pixel(point: Sequence[float]) -> tuple[int, int]:
        x, y = (T_CORNER_ROOM @ [point[0], point[1], 0.0, 1.0])[:2]
        return math.floor(x / RESOLUTION_M), height - 1 - math.floor(y / RESOLUTION_M)

    x, y = HALF_X_M, HALF_Y_M
    cv2.fillPoly(image, [np.array([pixel(p) for p in ((-x, -y), (x, -y), (x, y), (-x, y))])], 254)
    for a, b in lines:
        cv2.line(image, pixel(a), pixel(b), 0, 1)
    cv2.imwrite(str(folder / "grid.pgm"), image)
    path = folder / "grid.yaml"
    path.write_text(
        f"image: grid.pgm\nresolution: {RESOLUTION_M}\norigin: [{ORIGIN[0]}, {ORIGIN[1]}, 0.0]\nnegate: 0\n"
        "occupied_thresh: 0.65\nfree_thresh: 0.196\n"
    )
    return path


@pytest.fixture(scope="module")
def demo() -> SceneMap:
    return SceneMap.load(resolve_map("demo_room"))


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grid(tmp_path_factory.mktemp("grid"), slice_of(room(), 0.3))


def off(found: Matrix, truth: Matrix) -> tuple[float, float]:
    between = inverse_pose(truth) @ found
    return float(np.linalg.norm(between[:3, 3])), rotation_angle_deg(between[:3, :3])


@pytest.mark.thorough
def test_a_map_that_is_tilted_and_elsewhere_is_found_by_its_walls(demo: SceneMap, grid_file: Path) -> None:
    T = make_pose(so3_exp([0.1, -0.05, 2.0]), [7.0, -3.0, 1.5])
    found = align_with_grid(in_frame(demo, T, "map"), read_grid(grid_file))
    assert found.fault == "" and found.share > 0.8 and found.free_share > 0.9
    away_m, away_deg = off(found.T_grid_map @ T, T_GRID_ROOM)
    assert away_m < 0.03 and away_deg < 0.5


def test_leveling_puts_the_floor_at_zero(demo: SceneMap) -> None:
    assert off(level(demo), np.eye(4))[0] < 0.02
    T = make_pose(so3_exp([0.2, 0.1, 0.0]), [0.0, 0.0, 3.0])
    flat = level(in_frame(demo, T, "map")) @ T
    assert np.allclose(flat[:3, 2], [0, 0, 1], atol=0.01) and abs(flat[2, 3]) < 0.03


@pytest.mark.thorough
def test_a_bare_rectangle_is_ambiguous_and_other_walls_are_refused(demo: SceneMap, tmp_path: Path) -> None:
    x, y = HALF_X_M, HALF_Y_M
    corners = np.array([(-x, -y), (x, -y), (x, y), (-x, y), (-x, -y)])
    bare = [corners[k : k + 2] for k in range(4)]
    ambiguous = align_with_grid(demo, read_grid(write_grid(tmp_path, bare)))
    assert re.search(r"fits as well elsewhere, 0\.\d m and 1(79|80) deg away", ambiguous.fault), ambiguous.fault
    other = [np.array([(0.1 * k, -1.5), (0.1 * k, -1.2)]) for k in range(-10, 10)]
    refused = align_with_grid(demo, read_grid(write_grid(tmp_path, other)))
    assert "on occupied cells" in refused.fault


def test_two_points_by_hand(demo: SceneMap, grid_file: Path) -> None:
    corners = [(-2.5, -2.0), (2.5, 2.0)]
    pairs = [(x, y, *(T_GRID_ROOM @ [x, y, 0.0, 1.0])[:2]) for x, y in corners]
    found = align_by_hand(demo, read_grid(grid_file), pairs)
    away_m, away_deg = off(found.T_grid_map, T_GRID_ROOM)
    assert away_m < 0.02 and away_deg < 0.2 and found.share > 0.8
    with pytest.raises(SourceError, match="give --pair twice"):
        align_by_hand(demo, read_grid(grid_file), pairs[:1])
    x, y, *_ = pairs[0]
    with pytest.raises(SourceError, match=r"1\.\d+ times as far apart"):
        align_by_hand(demo, read_grid(grid_file), [(1.2 * x, 1.2 * y, *pairs[0][2:]), pairs[1]])


ENDS = "occupied_thresh: 0.6\nfree_thresh: 0.2\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image: a.pgm\n", "has no 'resolution'"),
        ("- 1\n", "no mapping"),
        ("image: a.pgm\nresolution: .nan\norigin: [0, 0, 0]\n" + ENDS, "out of range"),
        ("image: a.pgm\nresolution: 0.05\norigin: [0, 0]\n" + ENDS, "no occupancy"),
        ("image: a.pgm\nresolution: 0.05\norigin: [0, 0, 0]\n" + ENDS, "cannot be read"),
        ("image: [\n", "no occupancy grid"),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(SourceError, match=said):
        read_grid(tmp_path / "grid.yaml")


def test_an_image_that_is_none_and_one_without_walls_are_refused(tmp_path: Path) -> None:
    path = write_grid(tmp_path, [])
    with pytest.raises(SourceError, match="0 occupied cells"):
        read_grid(path)
    (tmp_path / "grid.pgm").write_bytes(b"")
    with pytest.raises(SourceError, match="is no image"):
        read_grid(path)


def test_the_command_writes_a_map_in_the_grids_frame_and_a_picture(
    grid_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "aligned", tmp_path / "aligned.png"
    pairs: list[str] = []
    for x, y in ((-2.5, -2.0), (2.5, 2.0)):
        gx, gy = (T_GRID_ROOM @ [x, y, 0.0, 1.0])[:2]
        pairs += ["--pair", str(x), str(y), str(gx), str(gy)]
    command = ["map", "align", "demo_room", str(grid_file), "--out", str(out), "--picture", str(picture), *pairs]
    assert main(command) == 0
    assert "on occupied cells" in capsys.readouterr().out
    before, after = SceneMap.load(resolve_map("demo_room")), SceneMap.load(out)
    moved = after.references.T_map_camera[0] @ inverse_pose(before.references.T_map_camera[0])
    assert off(moved, T_GRID_ROOM)[0] < 0.05
    assert "grid.yaml" in str(after.provenance["aligned"]) and after.frame_id == "map"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(command) != 0, "an existing map is not replaced"
