# SPDX-License-Identifier: Apache-2.0
"""Scale of a model: an object, a marker, the camera's height; asked for before the work, and no model is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from photos import photo

from kfloc_ros.cli.main import main
from kfloc_ros.cli.map_scale import scaled_source
from kfloc_ros.datasets import open_source
from kfloc_ros.errors import MapError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.kfnet.scoordnet import INPUT_CHANNELS, heads_of
from kfloc_ros.mapping import structure
from kfloc_ros.mapping.measured_scale import (
    CameraHeight,
    MarkerSize,
    PosedViews,
    find_markers,
)
from kfloc_ros.mapping.source_pages import measure_page
from kfloc_ros.mapping.structure import read_notes, reconstruct
from kfloc_ros.mapping.structure_scale import KnownLength, object_length
from kfloc_ros.maps.scene_map import SceneMap, scaled_map
from kfloc_ros.types import Frame

CAMERA = Camera(640, 480, 520.0, 520.0, 319.5, 239.5, "plumb_bob", (-0.1, 0.02, 0.0, 0.0))
UNIT = 0.4
"""Metres of one unit of the models here."""
MARKER_M = 0.3


def looking_at(position: Sequence[float], target: Sequence[float]) -> np.ndarray:
    """Pose of a camera, z of the world upwards."""
    ahead = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.cross(ahead, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    return make_pose(np.stack([right, np.cross(ahead, right), ahead], axis=1), np.asarray(position, dtype=float))


POSES = [looking_at([-0.6 + 0.3 * k, -2.0, 1.4], [0.0, 0.0, 0.9]) for k in range(5)]
"""In metres."""


def pixels_of(points_m: np.ndarray, T: np.ndarray) -> np.ndarray:
    local = points_m @ inverse_pose(T)[:3, :3].T + inverse_pose(T)[:3, 3]
    return CAMERA.distort(local[:, :2] / local[:, 2:])


class Drawn(FrameSource):
    """Views of a wall with one printed marker."""

    name = "drawn"

    def __init__(self) -> None:
        dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_APRILTAG_36h11)
        print_ = cv2.copyMakeBorder(
            cv2.aruco.generateImageMarker(dictionary, 7, 400), 100, 100, 100, 100, cv2.BORDER_CONSTANT, value=255
        )
        corners = np.array([[-0.5, 0, 0.5], [0.5, 0, 0.5], [0.5, 0, -0.5], [-0.5, 0, -0.5]]) * MARKER_M * 1.5
        self.images = []
        for T in POSES:
            local = (corners + np.array([0.1, 0, 0.9])) @ inverse_pose(T)[:3, :3].T + inverse_pose(T)[:3, 3]
            flat = local[:, :2] / local[:, 2:] * CAMERA.fx + (CAMERA.cx, CAMERA.cy)
            edge = np.array([[-0.5, -0.5], [599.5, -0.5], [599.5, 599.5], [-0.5, 599.5]], np.float32)
            H = cv2.getPerspectiveTransform(edge, flat.astype(np.float32))
            image = cv2.warpPerspective(
                print_, H, (640, 480), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_CONSTANT, borderValue=128
            )
            u, v = np.meshgrid(np.arange(640), np.arange(480))
            pixels = np.stack([u, v], -1).reshape(-1, 1, 2).astype(np.float64)
            rays = cv2.undistortPoints(pixels, CAMERA.K, np.array(CAMERA.distortion)).reshape(-1, 2)
            at = (rays * CAMERA.fx + (CAMERA.cx, CAMERA.cy)).astype(np.float32).reshape(480, 640, 2)
            bent = cv2.remap(image, at[..., 0].copy(), at[..., 1].copy(), cv2.INTER_LINEAR)
            self.images.append(np.repeat(bent[..., None], 3, axis=2))

    @property
    def camera(self) -> Camera:
        return CAMERA

    def __len__(self) -> int:
        return len(POSES)

    def indices(self) -> Sequence[int]:
        return range(10, 10 + len(POSES))

    def __getitem__(self, position: int) -> Frame:
        return Frame(self.images[position], CAMERA, position, 10 + position, str(position))


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture
def views(drawn: Drawn) -> PosedViews:
    """The right poses in units of 0.4 m, in a frame of their own."""
    away = make_pose(so3_exp(np.array([0.3, -0.2, 0.5])), [3.0, 1.0, -2.0])
    poses = {k: away @ make_pose(T[:3, :3], T[:3, 3] / UNIT) for k, T in enumerate(POSES)}
    return PosedViews(drawn, poses)


def test_an_object_seen_in_two_images_gives_the_scale(views: PosedViews) -> None:
    ends = np.array([[-0.3, 0.2, 0.7], [0.35, 0.1, 1.1]])
    length = float(np.linalg.norm(ends[1] - ends[0]))
    words = [f"{length}"]
    for k in (0, 3):
        (a, b), (c, d) = pixels_of(ends, POSES[k])
        words.append(f"{10 + k}:{a:.2f},{b:.2f},{c:.2f},{d:.2f}")
    method = object_length(words)
    method.check(views.source)
    assert method.measure(views).metres_per_unit == pytest.approx(UNIT, rel=1e-3)
    assert "images 10 and 13" in method.measure(views).origin


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["0.6", "3:1,2,3,4"], "two or more images"),
        (["x", "3:1,2,3,4", "4:1,2,3,4"], "length in metres"),
        (["-1", "3:1,2,3,4", "4:1,2,3,4"], "length in metres"),
        (["0.6", "3:1,2,3", "4:1,2,3,4"], "both ends"),
        (["0.6", "3:1,2,3,4", "3:1,2,3,4"], "twice"),
    ],
)
def test_words_of_an_object_that_are_wrong_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(SourceError, match=match):
        object_length(words)


def test_an_object_is_refused_before_the_work_where_it_cannot_be_there(drawn: Drawn) -> None:
    with pytest.raises(SourceError, match="names image 3, and 'drawn' has images 10 to 14"):
        object_length(["0.6", "3:1,2,3,4", "11:1,2,3,4"]).check(drawn)
    with pytest.raises(SourceError, match="640x480"):
        object_length(["0.6", "10:1,2,3,4", "11:1,2,700,4"]).check(drawn)


def test_pixels_that_are_not_of_one_point_and_views_without_parallax_are_refused(views: PosedViews) -> None:
    ends = pixels_of(np.array([[-0.3, 0.2, 0.7], [0.35, 0.1, 1.1]]), POSES[0])
    words = ",".join(f"{value:.1f}" for value in ends.ravel())
    with pytest.raises(SourceError, match="do not meet"):
        object_length(["0.5", f"10:{words}", "13:400,40,300,440"]).measure(views)
    still = replace(views, poses=dict.fromkeys(range(5), views.poses[0]))
    with pytest.raises(SourceError, match="same direction"):
        object_length(["0.5", f"10:{words}", f"13:{words}"]).measure(still)


def test_a_printed_marker_gives_the_scale(views: PosedViews) -> None:
    assert {marker.name for marker in find_markers(views.source[2].image)} == {"APRILTAG_36h11:7"}
    large = find_markers(cv2.resize(views.source[2].image, (2560, 1920), interpolation=cv2.INTER_CUBIC))
    small = find_markers(views.source[2].image)
    np.testing.assert_allclose((large[0].corners_px + 0.5) / 4 - 0.5, small[0].corners_px, atol=0.3)
    method = MarkerSize(MARKER_M)
    method.check(views.source)
    assert method.measure(views).metres_per_unit == pytest.approx(UNIT, rel=0.01)
    blank = [np.full_like(image, 128) for image in views.source.images]
    views.source.images = [views.source.images[0], *blank[1:]]
    try:
        with pytest.raises(SourceError, match="1 markers in one image each"):
            MarkerSize(MARKER_M).check(views.source)
    finally:
        views.source.__init__()


def test_the_height_above_the_floor_gives_the_scale(views: PosedViews) -> None:
    rng = np.random.default_rng(1)
    floor = np.column_stack([rng.uniform(-2, 2, (400, 2)), rng.normal(0, 0.004, 400)])
    table = np.column_stack([rng.uniform(-0.5, 0.5, (300, 2)), np.full(300, 0.75)])
    clutter = rng.uniform([-2, -2, 0], [2, 2, 2.5], (500, 3))
    points = np.concatenate([floor, table, clutter]) / UNIT
    T = views.poses[0] @ inverse_pose(make_pose(POSES[0][:3, :3], POSES[0][:3, 3] / UNIT))
    seen = {0: points @ T[:3, :3].T + T[:3, 3]}
    scale = CameraHeight(1.4).measure(replace(views, points=seen)).metres_per_unit
    assert scale == pytest.approx(UNIT, rel=0.02)
    with pytest.raises(SourceError, match="level floor"):
        CameraHeight(1.4).measure(replace(views, points={0: np.zeros((0, 3))}))


def test_the_page_shows_the_images_and_yields_the_words(drawn: Drawn) -> None:
    page = measure_page(drawn, [10, 13])
    assert re.findall(r'data-n="(\d+)" data-w="640" data-h="480"', page) == ["10", "13"]
    assert page.count("data:image/jpeg;base64,") == 2 and "--scale-object" in page
    with pytest.raises(SourceError, match="no image 3"):
        measure_page(drawn, [3])


def test_a_map_is_scaled_in_all_its_lengths(room_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scene_map = SceneMap.load(room_map)
    assert main(["map", "scale", str(room_map), "--factor", "2.5", "--out", str(tmp_path / "m")]) == 0
    assert re.search(r"scale +a factor of 2.5", capsys.readouterr().out)
    made = SceneMap.load(tmp_path / "m")
    np.testing.assert_allclose(
        made.references.T_map_camera[:, :3, 3], 2.5 * scene_map.references.T_map_camera[:, :3, 3]
    )
    np.testing.assert_array_equal(made.references.T_map_camera[:, :3, :3], scene_map.references.T_map_camera[:, :3, :3])
    np.testing.assert_allclose(np.array(made.bounds_m), 2.5 * np.array(scene_map.bounds_m))
    np.testing.assert_allclose(made.references.views[3].points, 2.5 * scene_map.references.views[3].points, rtol=1e-6)
    noise = torch.randn(5, INPUT_CHANNELS, generator=torch.Generator().manual_seed(0))
    inputs = heads_of(scene_map.head)[0].input_mean + 0.01 * noise
    exact = scaled_map(scene_map, 2.5)  # a folder has half precision
    (mean, log_b), (scaled, log_scaled) = (heads_of(m.head)[0](inputs) for m in (scene_map, exact))
    torch.testing.assert_close(scaled, 2.5 * mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(log_scaled, log_b + np.log(2.5), rtol=1e-4, atol=1e-4)
    assert made.calibration.process_floor_m2 == pytest.approx(2.5**2 * scene_map.calibration.process_floor_m2)
    for name in ("own_error_m", "covariance_doubling_m"):
        assert getattr(made.calibration, name) == pytest.approx(2.5 * getattr(scene_map.calibration, name))
    assert made.calibration.own_error_growth == pytest.approx(scene_map.calibration.own_error_growth / 2.5)
    with pytest.raises(MapError, match="by a factor"):
        scaled_map(scene_map, float("nan"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either --factor or one of"),
        (["--factor", "2", "--unscaled"], "either --factor or one of"),
        (["--scale-marker", "0.2"], "A SOURCE is missing"),
        (["--factor", "-1"], "not a positive number"),
        (["--scale-height", "1", "--scale-marker", "2"], "not allowed with"),
    ],
)
def test_what_cannot_scale_a_map_is_refused(
    room_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["map", "scale", str(room_map), *words, "--out", str(tmp_path / "m")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "m").exists()


FOCAL_35MM = 27
"""Of the room's camera, in whole millimetres as EXIF has it."""


class Photos:
    """Photos of the room in a folder; the camera moves sideways, turns and comes nearer: its focal length is fixed."""

    def __init__(self, room, folder: Path, count: int = 10) -> None:
        self.folder = folder
        self.poses = []
        for k in range(count):
            R = so3_exp(np.array([0.12 * np.sin(1.7 * k), 0.3 * np.sin(0.9 * k), 0.0]))
            T = make_pose(R, [-0.9 + 0.2 * k, 0.2 * np.sin(1.3 * k), -0.8 + 0.4 * np.sin(0.7 * k)])
            frame = room.view(T, k)
            self.poses.append(frame.T_map_camera)
            part = folder / ("first" if k < count // 2 else "second")
            part.mkdir(parents=True, exist_ok=True)
            photo(part / f"photo{k}.jpg", frame.image, 1, FOCAL_35MM)

    def distances(self) -> np.ndarray:
        centres = np.stack([T[:3, 3] for T in self.poses])
        return np.linalg.norm(centres[:, None] - centres[None], axis=2)


def distances(source: FrameSource) -> np.ndarray:
    centres = np.stack([source.pose(k)[:3, 3] for k in range(len(source))])
    return np.linalg.norm(centres[:, None] - centres[None], axis=2)


@pytest.mark.thorough
def test_photos_become_a_model_whose_scale_can_come_before_or_after(
    room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = Photos(room, tmp_path / "photos")
    source = open_source(f"images:{photos.folder}")
    assert len(source) == 10 and len(set(source.sequences())) == 2
    build = ["map", "build", str(photos.folder), "--sfm", str(tmp_path / "sfm"), "--out", str(tmp_path / "map")]
    assert main(build) == 2  # nothing was computed for a scale that is not there
    assert "--scale-object" in capsys.readouterr().err and not (tmp_path / "sfm").exists()

    length = float(photos.distances()[0, 9])
    found = reconstruct(source, tmp_path / "sfm", method=KnownLength(0, 9, length))
    assert np.abs(distances(found) - photos.distances()).max() < 0.04
    assert read_notes(tmp_path / "sfm").scale.origin == found.scale.origin

    def never(*args: object, **words: object) -> None:
        raise AssertionError("the model was made again")

    monkeypatch.setattr(structure, "solve", never)
    again = reconstruct(source, tmp_path / "sfm")  # the model and its scale are used again
    np.testing.assert_allclose(again.pose(4), found.pose(4), atol=1e-9)
    half = reconstruct(source, tmp_path / "sfm", method=KnownLength(0, 9, length / 2))
    np.testing.assert_allclose(distances(half), distances(found) / 2, atol=1e-6)
    with pytest.raises(SourceError, match=r"The model is kept in .*repeat the command"):
        reconstruct(source, tmp_path / "sfm", method=object_length(["1", "0:5,5,9,9", "9:300,200,9,200"]))
    model = f"colmap:{tmp_path / 'sfm'}"
    np.testing.assert_allclose(distances(open_source(model)), distances(half), atol=1e-6)
    other, scale = scaled_source(open_source(model), KnownLength(0, 9, length))  # as `map build colmap:DIR` takes it
    np.testing.assert_allclose(distances(other), distances(found), atol=1e-6)
    assert scale.origin == f"{length:g} m between frames 0 and 9"
    with pytest.raises(SourceError, match="has depth and poses"):
        scaled_source(open_source("sim:map-quick", frames="0:3"), KnownLength(0, 2, 1.0))
    with pytest.raises(SourceError, match="not a model of these images"):
        reconstruct(open_source(f"images:{photos.folder / 'first'}"), tmp_path / "sfm")
    (tmp_path / "sfm" / "model.json").write_text(json.dumps({"source": "photos"}))
    with pytest.raises(SourceError, match="damaged"):
        reconstruct(source, tmp_path / "sfm")


@pytest.mark.thorough
def test_portrait_and_landscape_photos_become_one_model_of_two_cameras(room, tmp_path: Path) -> None:
    poses = []
    for k in range(16):
        R = so3_exp(np.array([0.12 * np.sin(1.7 * k), 0.3 * np.sin(0.9 * k), 0.0]))
        T = make_pose(R, [-0.9 + 0.12 * k, 0.2 * np.sin(1.3 * k), -0.8 + 0.4 * np.sin(0.7 * k)])
        poses.append(T)
        sideways = make_pose(so3_exp(np.array([0.0, 0.0, np.pi / 2])), np.zeros(3))
        image = np.rot90(room.view(T @ sideways, k).image, -1) if k % 2 else room.view(T, k).image
        photo(tmp_path / f"{k}.jpg", image, 1, FOCAL_35MM)
    source = open_source(f"images:{tmp_path}")
    assert {source.own_camera(k).width for k in range(16)} == {320, 256}
    centres = np.stack([T[:3, 3] for T in poses])
    length = float(np.linalg.norm(centres[15] - centres[0]))
    found = reconstruct(source, tmp_path / "sfm", method=KnownLength(0, 15, length))
    assert np.abs(distances(found) - np.linalg.norm(centres[:, None] - centres[None], axis=2)).max() < 0.05
    own = {(camera.width, round(camera.fx, -1)) for k in range(16) for camera in [found.recorded(k).camera]}
    assert len(own) == 2 and all(abs(fx - 260) <= 20 for _, fx in own)
    assert found[3].image.shape[:2] == (found.camera.height, found.camera.width) and found[3].camera == found.camera
    for k in range(1, 16):  # upright, whichever way the camera was held
        turned = found.pose(0)[:3, :3].T @ found.pose(k)[:3, :3]
        true = poses[0][:3, :3].T @ poses[k][:3, :3]
        assert rotation_angle_deg(turned.T @ true) < 3
