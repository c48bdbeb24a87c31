# SPDX-License-Identifier: Apache-2.0
"""Videos, point clouds and views from above, read back."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.errors import DrawingError
from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.messages.clouds import Cloud
from kfloc_ros.visualization.clouds import Ortho, below, merged, precise_points, write_ply
from kfloc_ros.visualization.rerun import Recording
from kfloc_ros.visualization.video import PictureSeries, Video


def plain(value: int, width: int = 64, height: int = 48) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.mark.parametrize("codec", ["vp9", "mpeg4"])
def test_a_video_holds_every_picture_in_order_and_in_its_colours(codec: str, tmp_path: Path) -> None:
    red = plain(0)
    red[..., 0] = 200
    with Video(tmp_path / "a.mp4", fps=5.0, codec=codec) as video:
        for picture in (red, plain(40, 65, 49), plain(240)):
            video.add(picture)
    assert video.codec == codec
    read = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    frames = [read.read()[1] for _ in range(3)]
    assert not read.read()[0]
    assert frames[0].shape == (48, 64, 3)
    blue, _, back = frames[0].reshape(-1, 3).mean(axis=0)
    assert back > 150 > 60 > blue
    assert frames[1].mean() < 80 < 200 < frames[2].mean()


def test_a_video_where_nothing_can_be_written_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(DrawingError, match=r"a\.mp4"):
        Video(tmp_path / "a.mp4").add(plain(0))


def test_one_frame_gives_a_picture_and_several_a_video_too(tmp_path: Path) -> None:
    with PictureSeries(tmp_path, "one", pictures=False) as one:
        one.add(7, plain(10))
    assert (tmp_path / "one" / "000007.png").is_file() and not (tmp_path / "one.mp4").exists()
    with PictureSeries(tmp_path, "two", pictures=False) as two:
        two.add(7, plain(10))
        two.add(9, plain(20))
    assert not (tmp_path / "two").exists() and (tmp_path / "two.mp4").is_file()
    assert "2 frames" in two.written[0]


def test_a_ply_has_the_finite_points_with_colours_and_sigma(tmp_path: Path) -> None:
    cloud = Cloud(
        np.array([[1, 2, 3], [np.nan, 0, 0], [4, 5, 6]], np.float32),
        np.array([[255, 0, 0], [0, 0, 0], [0, 255, 7]], np.uint8),
        np.array([0.01, 0.02, 0.03], np.float32),
    )
    assert write_ply(tmp_path / "sub" / "c.ply", cloud, "two\nlines") == 2
    header, _, body = (tmp_path / "sub" / "c.ply").read_bytes().partition(b"end_header\n")
    assert b"element vertex 2" in header and b"comment two lines, metres" in header
    fields = [*((n, "<f4") for n in "xyz"), *((n, "u1") for n in "rgb"), ("sigma", "<f4")]
    rows = np.frombuffer(body, dtype=fields)
    assert rows["x"].tolist() == [1, 4] and rows["b"].tolist() == [0, 7]
    np.testing.assert_allclose(rows["sigma"], [0.01, 0.03])


def test_of_a_voxel_the_surest_point_stays() -> None:
    def cloud(x: float, sigma: float) -> Cloud:
        return Cloud(np.array([[x, 0, 0]], np.float32), np.zeros((1, 3), np.uint8), np.array([sigma], np.float32))

    one = merged([cloud(0.011, 0.05), cloud(0.012, 0.01), cloud(0.5, 0.09)], 0.1)
    np.testing.assert_allclose(np.sort(one.points[:, 0]), [0.012, 0.5])
    assert len(precise_points(one, 0.05).points) == 1
    assert len(merged([], 0.1).points) == 0


def test_from_above_nearer_points_hide_farther_ones_and_x_goes_to_the_right() -> None:
    points = np.array([[0.8, 0.5, 0.0], [0.8, 0.5, 1.0]], np.float32)
    cloud = Cloud(points, np.array([[255, 0, 0], [0, 0, 255]], np.uint8))
    view = Ortho(np.zeros(3), np.ones(3), 2, 1.0, upward=(1, 1.0), width=100, height=100)
    u, v, _ = view.pixels(points)[0]
    assert u == pytest.approx(50 + 0.3 * view.pixels_per_m) and v == pytest.approx(50)
    picture = view.draw(cloud, camera=make_pose(np.eye(3), [0.1, 0.1, 0.0]))
    assert picture[round(v), round(u)].tolist() == [0, 0, 255]
    lower = view.draw(below(cloud, 2, 1.0, 0.5))
    assert lower[round(v), round(u)].tolist() == [255, 0, 0]


def test_a_recording_without_rerun_or_display_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(DrawingError, match="pip install"):
        Recording("a", path=tmp_path / "a.rrd")
