# SPDX-License-Identifier: Apache-2.0
"""One frame that cannot be used does not end a run: it is left out, counted and named; ``strict`` stops."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.images import read_image
from kfloc_ros.datasets.posed_images import natural_key, pose_of_row
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource

COUNT, BAD = 4, 2
"""Frames of every folder here, and the number of the one that is damaged."""
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
POSE = "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"
CAMERA = "64 48 60 60 31.5 23.5\n"


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), IMAGE)
    return path


def seven_scenes(root: Path) -> tuple[str, Path, Path]:
    for k in range(COUNT):
        image(root / f"frame-{k:06d}.color.png")
        (root / f"frame-{k:06d}.pose.txt").write_text(POSE)
    (root / "camera.txt").write_text(CAMERA)
    return f"7scenes:{root}", root / f"frame-{BAD:06d}.color.png", root / f"frame-{BAD:06d}.pose.txt"


def twelve_scenes(root: Path) -> tuple[str, Path, Path]:
    data = root / "data"
    for k in range(COUNT):
        image(data / f"frame-{k:06d}.color.jpg")
        (data / f"frame-{k:06d}.pose.txt").write_text(POSE)
    K = "60 0 31.5 0 0 60 23.5 0 0 0 1 0 0 0 0 1"
    (root / "info.txt").write_text(
        "".join(
            f"m_{kind.lower()}Width = 64\nm_{kind.lower()}Height = 48\nm_calibration{kind}Intrinsic = {K}\n"
            for kind in ("Color", "Depth")
        )
    )
    (root / "split.txt").write_text(f"sequence0 [frames={COUNT}] [start=0 ; end={COUNT - 1}]\n")
    return f"12scenes:{root}", data / f"frame-{BAD:06d}.color.jpg", data / f"frame-{BAD:06d}.pose.txt"


def scannet(root: Path) -> tuple[str, Path, Path]:
    for k in range(COUNT):
        image(root / "color" / f"{k}.jpg")
        (root / "pose").mkdir(exist_ok=True)
        (root / "pose" / f"{k}.txt").write_text(POSE)
    (root / "intrinsic").mkdir()
    (root / "intrinsic" / "intrinsic_color.txt").write_text("60 0 31.5\n0 60 23.5\n0 0 1\n")
    return f"scannet:{root}", root / "color" / f"{BAD}.jpg", root / "pose" / f"{BAD}.txt"


def kfnet(root: Path) -> tuple[str, Path, Path]:
    for k in range(COUNT):
        image(root / f"{k}.png")
        (root / f"{k}.txt").write_text(POSE)
    (root / "image_list.txt").write_text("".join(f"{k}.png\n" for k in range(COUNT)))
    (root / "pose_list.txt").write_text("".join(f"{k}.txt\n" for k in range(COUNT)))
    (root / "camera.txt").write_text(CAMERA)
    return f"kfnet:{root}", root / f"{BAD}.png", root / f"{BAD}.txt"


def pictures(root: Path) -> tuple[str, Path, None]:
    for k in range(COUNT):
        image(root / f"{k}.jpg")
    (root / "camera.txt").write_text(CAMERA)
    return f"images:{root}", root / f"{BAD}.jpg", None


def tum(root: Path) -> tuple[str, Path, None]:
    for k in range(COUNT):
        image(root / "rgb" / f"{k}.png")
    (root / "rgb.txt").write_text("".join(f"{k + 1}.0 rgb/{k}.png\n" for k in range(COUNT)))
    (root / "camera.txt").write_text(CAMERA)
    return f"tum:{root}", root / "rgb" / f"{BAD}.png", None


def transforms(root: Path) -> tuple[str, Path, None]:
    frames = [{"file_path": f"images/{k}.png", "transform_matrix": np.eye(4).tolist()} for k in range(COUNT)]
    for k in range(COUNT):
        image(root / "images" / f"{k}.png")
    (root / "transforms.json").write_text(json.dumps({"fl_x": 60.0, "frames": frames}))
    return f"transforms:{root}", root / "images" / f"{BAD}.png", None


def cambridge(root: Path) -> tuple[str, Path, None]:
    rows = [f"seq1/frame{k:05d}.png 0 0 0 1 0 0 0\n" for k in range(COUNT)]
    for row in rows:
        image(root / row.split()[0])
    for part, kept in (("train", rows[:2]), ("test", rows[2:])):
        (root / f"dataset_{part}.txt").write_text("a\nb\nc\n" + "".join(kept))
    return f"cambridge:{root}", root / f"seq1/frame{BAD:05d}.png", None


def deeploc(root: Path) -> tuple[str, Path, None]:
    for part, numbers in (("train", (0, 1)), ("test", (2, 3))):
        for k in numbers:
            image(root / part / "LeftImages" / f"{k}.png")
        (root / part / "poses.txt").write_text("".join(f"{k} 0 0 0 1 0 0 0\n" for k in numbers))
    (root / "camera.txt").write_text(CAMERA)
    return f"deeploc:{root}", root / "test" / "LeftImages" / f"{BAD}.png", None


def colmap(root: Path) -> tuple[str, Path, None]:
    for k in range(COUNT):
        image(root / "images" / f"{k}.png")
    (root / "sparse").mkdir()
    (root / "sparse" / "cameras.txt").write_text("1 PINHOLE 64 48 60 60 32 24\n")
    (root / "sparse" / "images.txt").write_text("".join(f"{k + 1} 1 0 0 0 {k} 0 0 1 {k}.png\n\n" for k in range(COUNT)))
    (root / "sparse" / "points3D.txt").write_text("")
    return f"colmap:{root}", root / "images" / f"{BAD}.png", None


def absurd(root: Path) -> None:
    """Give a folder a focal length of 1e300 px, or an angle of view of 1e-300, in whatever file it has it."""
    for path in [*root.rglob("*.txt"), *root.rglob("*.json")]:
        if path.name in ("camera.txt", "cameras.txt", "info.txt", "intrinsic_color.txt", "transforms.json"):
            path.write_text(re.sub(r"\b60(\.0)?\b", "1e300", path.read_text()))


KINDS = (seven_scenes, twelve_scenes, scannet, kfnet, pictures, tum, transforms, cambridge, deeploc, colmap)
Make = Callable[[Path], tuple[str, Path, Path | None]]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def no_image(path: Path) -> None:
    path.write_bytes(b"This is no image.")


def turned(path: Path) -> None:
    cv2.imwrite(str(path), np.rot90(IMAGE))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def bomb(path: Path) -> None:
    """A PNG that announces 30,000 x 30,000 pixels."""
    data = bytearray(cv2.imencode(".png", IMAGE)[1].tobytes())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    path.write_bytes(data)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("damage", [cut, no_image, turned, pipe, bomb], ids=lambda damage: damage.__name__)
def test_an_image_that_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, make: Make, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    spec, victim, _ = make(tmp_path / "room")
    damage(victim)
    source = open_source(spec)
    assert [frame.index for frame in source] == [0, 1, 3]
    assert list(source.left_out) == [BAD] and victim.name in source.left_out[BAD]
    assert f"1 of {COUNT} frames" in caplog.text and victim.name in caplog.text
    with pytest.raises(SourceError, match=r"Without --strict"):
        open_source(spec, strict=True)


@pytest.mark.parametrize("make", [tum, transforms, cambridge, deeploc, colmap, kfnet], ids=lambda make: make.__name__)
def test_an_image_that_a_list_names_and_that_is_missing_is_left_out(tmp_path: Path, make: Make) -> None:
    spec, victim, _ = make(tmp_path / "room")
    victim.unlink()
    assert [frame.index for frame in open_source(spec)] == [0, 1, 3]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_source_without_a_usable_frame_is_refused_with_the_reason(tmp_path: Path, make: Make) -> None:
    spec, victim, _ = make(tmp_path / "room")
    for path in sorted(p for p in (tmp_path / "room").rglob("*") if p.suffix == victim.suffix):
        cut(path)
    with pytest.raises(SourceError, match=r"No frame .* The first: .* is cut off"):
        open_source(spec)


@pytest.mark.parametrize("make", KINDS[:4], ids=lambda make: make.__name__)
@pytest.mark.parametrize("word", ["nan", "-1.#IND", "1.#QNAN", "inf", "-nan(ind)", "1e300"])
def test_a_pose_that_is_none_is_a_frame_without_a_pose(tmp_path: Path, make: Make, word: str) -> None:
    spec, _, pose = make(tmp_path / "room")
    assert pose is not None
    pose.write_text(f"1 0 0 {word}\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    source = open_source(spec)
    assert [frame.T_map_camera is None for frame in source] == [k == BAD for k in range(COUNT)]
    assert [source.pose(k) is None for k in range(COUNT)] == [k == BAD for k in range(COUNT)]


@pytest.mark.parametrize("make", KINDS[:4], ids=lambda make: make.__name__)
def test_a_damaged_pose_file_is_left_out_and_named(tmp_path: Path, make: Make) -> None:
    spec, _, pose = make(tmp_path / "room")
    assert pose is not None
    pose.write_text("1 0 0 0\n0 1 0\n")
    source = open_source(spec)
    assert len(list(source)) == COUNT - 1 and pose.name in source.left_out[BAD]


@pytest.mark.parametrize("make", KINDS[:4], ids=lambda make: make.__name__)
def test_a_matrix_of_zeros_is_no_pose_and_one_that_scales_is_left_out(tmp_path: Path, make: Make) -> None:
    spec, _, pose = make(tmp_path / "room")
    assert pose is not None
    pose.write_text("0 0 0 0\n" * 4)
    assert [frame.T_map_camera is None for frame in open_source(spec)] == [k == BAD for k in range(COUNT)]
    for scaled in ("2 0 0 0\n0 2 0 0\n0 0 2 0\n0 0 0 1\n", "1 0 0 0\n0 1 0 0\n0 0 -1 0\n0 0 0 1\n"):
        pose.write_text(scaled)
        source = open_source(spec)
        assert len(list(source)) == COUNT - 1 and "no rotation" in source.left_out[BAD]


@pytest.mark.parametrize("make", [kind for kind in KINDS if kind is not cambridge], ids=lambda make: make.__name__)
def test_intrinsics_that_no_camera_has_are_refused_by_every_reader(tmp_path: Path, make: Make) -> None:
    spec, _, _ = make(tmp_path / "room")
    absurd(tmp_path / "room")
    with pytest.raises(SourceError, match=r"64x48 pixels has the focal lengths fx 1e\+300.*no camera has"):
        open_source(spec)


@pytest.mark.parametrize("make", [seven_scenes, twelve_scenes, kfnet], ids=lambda make: make.__name__)
@pytest.mark.parametrize("change", ["crlf", "mark", "comma", "short", "long", "words"])
def test_pose_files_as_other_systems_write_them(tmp_path: Path, make: Make, change: str) -> None:
    spec, _, pose = make(tmp_path / "room")
    assert pose is not None
    written = {
        "crlf": POSE.replace("\n", "\r\n"), "mark": "\ufeff" + POSE, "comma": POSE.replace("1", "1,0"),
        "short": POSE[:16], "long": POSE + "0 0 0 1\n", "words": "no pose\n",
    }  # fmt: skip
    pose.write_bytes(written[change].encode())
    source = open_source(spec)
    assert len(list(source)) == COUNT - (change not in ("crlf", "mark"))


@pytest.mark.parametrize("make", [seven_scenes, twelve_scenes], ids=lambda make: make.__name__)
def test_names_without_a_number_are_refused_and_short_numbers_are_in_order(tmp_path: Path, make: Make) -> None:
    spec, victim, _ = make(tmp_path / "room")
    for k in range(COUNT):
        for path in victim.parent.glob(f"frame-{k:06d}.*"):
            path.rename(path.with_name(path.name.replace(f"-{k:06d}", f"-{k + 8}")))
    split = tmp_path / "room" / "split.txt"
    split.write_text("sequence0 [frames=4] [start=8 ; end=11]\n")
    assert [frame.index for frame in open_source(spec)] == [8, 9, 10, 11]
    image(victim.with_name(victim.name.replace(f"{BAD:06d}", "abcdef")))
    with pytest.raises(SourceError, match="abcdef"):
        open_source(spec)


@pytest.mark.parametrize(
    ("translation", "quaternion", "posed"),
    [
        ((1, 2, 3), (0, 0, 0, 2), True),
        ((1, 2, 3), (0, 0, 0, 1e300), False),
        ((1, 2, 3), (0, 0, 0, 1e-9), False),
        ((1, 2, 1e9), (0, 0, 0, 1), False),
        ((1, float("nan"), 3), (0, 0, 0, 1), False),
        ((1, 2, 3), (0, float("inf"), 0, 1), False),
        ((1, 2, 3), (0, float("nan"), 0, 1), False),
    ],
)
def test_a_row_of_a_list_is_a_pose_or_none(translation: list[float], quaternion: list[float], posed: bool) -> None:
    T = pose_of_row(translation, quaternion)
    assert (T is not None) == posed
    assert T is None or (np.array_equal(T[:3, :3], np.eye(3)) and T[:3, 3].tolist() == list(translation))


@pytest.mark.parametrize("kind", ["pipe", "device", "broken link"])
def test_a_calibration_that_is_no_file_is_refused_and_not_guessed(tmp_path: Path, kind: str) -> None:
    spec, _, _ = pictures(tmp_path / "room")
    path = tmp_path / "room" / "camera.txt"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nothing")
    with pytest.raises(SourceError, match=r"camera\.txt"):
        open_source(spec)


@pytest.mark.parametrize("name", ["²", "1" * 5000, "٣"])
def test_what_python_counts_as_digits_in_names_is_no_number(name: str) -> None:
    assert natural_key(name) == [(1, 0, name)]


def test_a_quaternion_of_colmap_without_length_is_no_pose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec, _, _ = colmap(tmp_path / "room")
    path = tmp_path / "room" / "sparse" / "images.txt"
    path.write_text(path.read_text().replace("3 1 0 0 0 2 0 0", "3 0 0 0 0 2 0 0").replace("2 1 0 0 0", "2 0.5 0 0 0"))
    with caplog.at_level(logging.WARNING):
        source = open_source(spec)
    assert [frame.name for frame in source] == ["0.png", "1.png", "3.png"]
    assert np.allclose(source[1].T_map_camera[:3, :3], np.eye(3))
    assert "1 images of" in caplog.text and "'2.png'" in caplog.text


def test_poses_that_are_none_in_lists_leave_their_frames_without_one(tmp_path: Path) -> None:
    spec, _, _ = cambridge(tmp_path / "cambridge")
    path = tmp_path / "cambridge" / "dataset_test.txt"
    path.write_text(path.read_text().replace("0 0 0 1 0 0 0", "nan 0 0 1 0 0 0", 1))
    assert [frame.T_map_camera is None for frame in open_source(spec)] == [False, False, True, False]
    spec, _, _ = deeploc(tmp_path / "deeploc")
    path = tmp_path / "deeploc" / "test" / "poses.txt"
    path.write_text(path.read_text().replace("0 0 0 1 0 0 0", "0 0 0 -1.#IND 0 0 0", 1))
    assert [frame.T_map_camera is None for frame in open_source(spec)] == [False, False, True, False]
    spec, _, _ = transforms(tmp_path / "transforms")
    path = tmp_path / "transforms" / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][BAD]["transform_matrix"][0][3] = float("nan")
    path.write_text(json.dumps(content))
    assert [frame.T_map_camera is None for frame in open_source(spec)] == [False, False, True, False]
    spec, _, _ = tum(tmp_path / "tum")
    rows = [f"{k + 1}.0 0 0 0 0 0 0 {'nan' if k == BAD else 1}\n" for k in range(COUNT)]
    (tmp_path / "tum" / "groundtruth.txt").write_text("".join(rows))
    assert [frame.T_map_camera is None for frame in open_source(spec)] == [False, False, True, False]


def test_a_frame_that_fails_only_when_it_is_read_is_left_out_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, victim, _ = pictures(tmp_path / "room")
    source, strict = open_source(spec), open_source(spec, strict=True)
    victim.unlink()
    with caplog.at_level(logging.WARNING):
        assert [frame.index for frame in source] == [0, 1, 3]
    assert list(source.left_out) == [BAD] and f"Frame {BAD} of 'room' is left out" in caplog.text
    assert open_source(spec).left_out == {}, "an image that is not there is none of a folder's"
    with pytest.raises(FrameError, match=victim.name):
        list(strict)


def test_of_a_selection_only_its_own_frames_are_looked_at(tmp_path: Path) -> None:
    spec, victim, _ = pictures(tmp_path / "room")
    cut(victim)
    source: FrameSource = open_source(spec, frames="0:2", strict=True)
    assert len(source) == 2 and not source.left_out


def jpeg(path: Path, orientation: int, stored: np.ndarray) -> Path:
    """A JPEG file with EXIF's orientation, as phones write them."""
    encoded = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    tiff = b"MM\0*\0\0\0\x08" + (1).to_bytes(2, "big") + b"\x01\x12\0\x03\0\0\0\x01"
    tiff += orientation.to_bytes(2, "big") + b"\0\0" + b"\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    path.write_bytes(encoded[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + encoded[2:])
    return path


@pytest.mark.parametrize("make", [twelve_scenes, scannet, pictures], ids=lambda make: make.__name__)
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_pixels_are_those_that_are_stored(tmp_path: Path, make: Make, orientation: int) -> None:
    """Calibration, depth and poses are of the stored pixels: EXIF's orientation is for display."""
    spec, victim, _ = make(tmp_path / "room")
    stored = cv2.GaussianBlur(IMAGE, (0, 0), 3)
    jpeg(victim, orientation, stored)
    frame = open_source(spec)[BAD]
    assert np.abs(frame.image[..., ::-1].astype(int) - stored).max() < 12
    assert open_source(spec).encoded_image(BAD) == victim.read_bytes()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_image_whose_camera_is_that_of_the_turned_image_is_turned(tmp_path: Path, orientation: int) -> None:
    stored = cv2.GaussianBlur(IMAGE, (0, 0), 3)
    path = jpeg(tmp_path / "0.jpg", orientation, stored)
    shown = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert shown.shape == (64, 48, 3)
    assert np.array_equal(read_image(path, (48, 64))[..., ::-1], shown)
    (tmp_path / "camera.txt").write_text("48 64 60 60 23.5 31.5\n")
    source = open_source(f"images:{tmp_path}")
    assert source[0].image.shape == (64, 48, 3) and source.encoded_image(0) is None


def test_a_video_that_ends_before_its_header_says_so_has_the_frames_that_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "walk.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, (64, 48))
    for k in range(30):
        writer.write(np.full((48, 64, 3), 8 * k, np.uint8))
    writer.release()
    assert len(open_source(f"video:{path}")) == 30 and not caplog.text
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    source = open_source(f"video:{path}")
    assert 5 < len(source) < 30 and len(list(source)) == len(source)
    assert "says it has 30 frames" in caplog.text
    assert [round(float(frame.image.mean()) / 8) for frame in source] == list(range(len(source)))
    assert len(open_source(f"video:{path}?every=3")) == -(-len(source) // 3)


def test_seven_scenes_of_another_camera_needs_its_intrinsics_and_has_its_own_poses(tmp_path: Path) -> None:
    spec, _, _ = seven_scenes(tmp_path / "room")
    depth = np.full((48, 64), 2000, np.uint16)
    depth[:24] = 65535
    cv2.imwrite(str(tmp_path / "room" / "frame-000000.depth.png"), depth)
    frame = open_source(spec)[0]
    assert frame.camera.fx == 60 and frame.T_map_camera is not None and np.array_equal(frame.T_map_camera, np.eye(4))
    assert frame.depth_m is not None and float(frame.depth_m[30, 30]) == pytest.approx(2.0)
    assert not frame.depth_m[:24].any()
    (tmp_path / "room" / "camera.txt").unlink()
    with pytest.raises(SourceError, match=r"64x48, not 640x480.*camera\.txt"):
        open_source(spec)


def test_seven_scenes_of_the_kinect_keeps_its_cameras(tmp_path: Path) -> None:
    for k in range(2):
        cv2.imwrite(str(tmp_path / f"frame-{k:06d}.color.png"), np.zeros((480, 640, 3), np.uint8))
        (tmp_path / f"frame-{k:06d}.pose.txt").write_text(POSE)
    frame = open_source(f"7scenes:{tmp_path}")[0]
    assert frame.camera.fx == 525 and frame.T_map_camera is not None
    assert np.linalg.norm(frame.T_map_camera[:3, 3]) == pytest.approx(0.0256, abs=1e-3), "poses are the depth camera's"


@pytest.mark.parametrize("factor", [0.5, 0.75, 2.0])
def test_intrinsics_of_the_images_before_they_were_resized_are_refused(tmp_path: Path, factor: float) -> None:
    spec, _, _ = scannet(tmp_path / "room")
    path = tmp_path / "room" / "intrinsic" / "intrinsic_color.txt"
    cx, cy = 32 / factor - 0.5, 24 / factor - 0.5
    path.write_text(f"{60 / factor} 0 {cx}\n0 {60 / factor} {cy}\n0 0 1\n")
    with pytest.raises(SourceError, match=r"resized"):
        open_source(spec)
    spec, _, _ = transforms(tmp_path / "other")
    path = tmp_path / "other" / "transforms.json"
    content = json.loads(path.read_text()) | {"fl_x": 60 / factor, "cx": 32 / factor, "cy": 24 / factor}
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"resized"):
        open_source(spec)


@pytest.mark.parametrize("make", [seven_scenes, kfnet, pictures, tum], ids=lambda make: make.__name__)
def test_resized_images_are_not_taken_for_those_of_camera_txt(tmp_path: Path, make: Make) -> None:
    spec, victim, _ = make(tmp_path / "room")
    for path in sorted(p for p in (tmp_path / "room").rglob("*") if p.suffix == victim.suffix):
        cv2.imwrite(str(path), cv2.resize(IMAGE, (32, 24)))
    with pytest.raises(SourceError, match=r"32x24 but its camera is 64x48"):
        open_source(spec)


def test_names_in_lists_may_not_lead_out_of_a_data_set(tmp_path: Path) -> None:
    outside = image(tmp_path / "secret.png")
    for make, listed in ((kfnet, "image_list.txt"), (kfnet, "pose_list.txt"), (tum, "rgb.txt"), (cambridge, None)):
        root = tmp_path / make.__name__
        shutil.rmtree(root, ignore_errors=True)
        spec, victim, _ = make(root)
        path = root / (listed or "dataset_test.txt")
        for name in ("../secret.png", str(outside)):
            text = path.read_text()
            old = victim.relative_to(root).as_posix() if listed != "pose_list.txt" else f"{BAD}.txt"
            path.write_text(text.replace(old, name))
            with pytest.raises(SourceError, match="leads out of the folder"):
                open_source(spec)
            path.write_text(text)
    spec, victim, _ = tum(tmp_path / "linked")
    victim.unlink()
    victim.symlink_to(outside)
    with pytest.raises(SourceError, match="leads out of the folder"):
        open_source(spec)
