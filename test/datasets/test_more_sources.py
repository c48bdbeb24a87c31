# SPDX-License-Identifier: Apache-2.0
"""COLMAP models, TUM RGB-D, transforms.json and ScanNet-like folders, written small and read back."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.messages.transforms import PoseTrack
from kfloc_ros.types import Matrix

POINTS = np.random.default_rng(0).uniform([-1, -1, 3], [1, 1, 4], (40, 3))


def poses(count: int = 4) -> list[Matrix]:
    return [make_pose(so3_exp([0.02 * k, -0.05 * k, 0.1]), [0.1 * k, 0.02 * k, -0.1]) for k in range(count)]


def picture(path: Path, value: int = 90, size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((size[1], size[0], 3), value, np.uint8))


def depth_picture(path: Path, value: int, size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((size[1], size[0]), value, np.uint16))


def colmap_text(root: Path, *, second_camera: bool = False) -> Path:
    """A model in COLMAP's text format: 4 views of 40 points, one of which is seen wrongly by the first view."""
    model = root / "sparse" / "0"
    model.mkdir(parents=True)
    cameras = ["1 OPENCV 64 48 60 61 32.5 24.5 0.05 0 0.001 0"]
    if second_camera:
        cameras.append("2 PINHOLE 32 24 30 30 16 12")
    (model / "cameras.txt").write_text("\n".join(cameras) + "\n")
    lines, tracks = [], {j: [] for j in range(len(POINTS))}
    for k, T in enumerate(poses()):
        picture(root / "images" / f"{k + 8}.png", 40 * k, (32, 24) if second_camera and k == 3 else (64, 48))
        T_inv = inverse_pose(T)
        x, y, z, w = matrix_to_quaternion(T_inv[:3, :3])
        t = " ".join(map(repr, map(float, T_inv[:3, 3])))
        lines.append(f"{k + 1} {w} {x} {y} {z} {t} {2 if second_camera and k == 3 else 1} {k + 8}.png")
        local = POINTS @ T_inv[:3, :3].T + T_inv[:3, 3]
        D = (0.05, 0.0, 0.001, 0.0)
        uv = cv2.projectPoints(local, np.zeros(3), np.zeros(3), np.array([[60, 0, 32], [0, 61, 24], [0, 0, 1.0]]), D)[0]
        uv = uv.reshape(-1, 2) + 0.5
        if k == 0:
            uv[7] += 15.0
        lines.append(" ".join(f"{u} {v} {j + 1}" for j, (u, v) in enumerate(uv)))
        for j in range(len(POINTS)):
            tracks[j].append(f"{k + 1} {j}")
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{j + 1} {p[0]} {p[1]} {p[2]} 1 2 3 0.5 {' '.join(tracks[j])}" for j, p in enumerate(POINTS)]
    (model / "points3D.txt").write_text("\n".join(rows) + "\n")
    return root


def test_colmap_model_is_read_with_its_distortion_poses_and_points(tmp_path: Path) -> None:
    source = open_source(f"colmap:{colmap_text(tmp_path / 'room')}")
    camera = source.camera
    assert (camera.fx, camera.fy, camera.cx, camera.cy) == (60, 61, 32.0, 24.0)
    assert camera.distortion_model == "plumb_bob" and camera.distortion[:3] == (0.05, 0.0, 0.001)
    frames = list(source)
    assert [frame.name for frame in frames] == ["8.png", "9.png", "10.png", "11.png"]
    for frame, T in zip(frames, poses(), strict=True):
        assert frame.T_map_camera is not None
        np.testing.assert_allclose(frame.T_map_camera, T, atol=1e-9)
    seen = source.visible_points(0)
    assert seen is not None and len(seen) == len(POINTS) - 1
    assert not (np.linalg.norm(seen - POINTS[7], axis=1) < 1e-6).any()


def test_a_selection_keeps_its_points(tmp_path: Path) -> None:
    source = open_source(f"colmap:{colmap_text(tmp_path / 'room')}", frames="1:3")
    seen = source.visible_points(0)
    assert seen is not None and len(seen) == len(POINTS)


def test_a_colmap_model_without_its_images_is_refused_before_it_is_read_in_whole(tmp_path: Path) -> None:
    room = colmap_text(tmp_path / "room")
    (room / "images").rename(room / "elsewhere")
    (room / "images").mkdir()
    with pytest.raises(SourceError, match=r"None of the 4 images of the model .* is in '.*images'; the first would be"):
        open_source(f"colmap:{room}")


def test_images_of_a_second_colmap_camera_are_brought_to_the_first(tmp_path: Path) -> None:
    source = open_source(f"colmap:{colmap_text(tmp_path / 'room', second_camera=True)}")
    assert source.camera.is_pinhole
    assert {frame.image.shape for frame in source} == {(48, 64, 3)}


def test_binary_colmap_models_are_read_too(tmp_path: Path) -> None:
    model = colmap_text(tmp_path / "room") / "sparse" / "0"
    pycolmap.Reconstruction(str(model)).write_binary(str(model))
    for name in ("cameras", "images", "points3D"):
        (model / f"{name}.txt").unlink()
    assert len(open_source(f"colmap:{tmp_path}")) == 4


def test_several_colmap_models_are_refused_by_name(tmp_path: Path) -> None:
    root = colmap_text(tmp_path / "room")
    second = root / "sparse" / "1"
    second.mkdir()
    for path in (root / "sparse" / "0").iterdir():
        (second / path.name).write_bytes(path.read_bytes())
    with pytest.raises(SourceError, match="several models"):
        open_source(f"colmap:{root}")


def test_a_damaged_colmap_model_is_a_sentence(tmp_path: Path) -> None:
    model = colmap_text(tmp_path / "room") / "sparse" / "0"
    (model / "cameras.txt").write_text("1 NO_SUCH_MODEL 64 48 1 2 3\n")
    with pytest.raises(SourceError):
        open_source(f"colmap:{tmp_path}")


def test_image_names_may_not_leave_the_folder(tmp_path: Path) -> None:
    model = colmap_text(tmp_path / "room") / "sparse" / "0"
    text = (model / "images.txt").read_text().replace("8.png", "../../../8.png", 1)
    (model / "images.txt").write_text(text)
    with pytest.raises(SourceError, match="leads out"):
        open_source(f"colmap:{tmp_path}")


def write_transforms(root: Path, **changes: object) -> Path:
    """Frames in shuffled order, OpenGL axes."""
    frames = []
    for k in (2, 0, 1):
        picture(root / "images" / f"{k + 9}.png", 40 * k)
        T = poses()[k].copy()
        T[:, 1:3] *= -1
        frames.append({"file_path": f"./images/{k + 9}", "transform_matrix": T.tolist()})
    content = {"fl_x": 60.0, "fl_y": 61.0, "cx": 32.0, "cy": 24.0, "w": 64, "h": 48, "k1": 0.01, "frames": frames}
    (root / "transforms.json").write_text(json.dumps(content | changes))
    return root


def test_transforms_json_turns_opengl_axes_and_orders_frames_by_name(tmp_path: Path) -> None:
    source = open_source(f"transforms:{write_transforms(tmp_path) / 'transforms.json'}")
    assert (source.camera.cx, source.camera.cy) == (31.5, 23.5)
    for frame, T in zip(source, poses(), strict=False):
        assert frame.T_map_camera is not None
        np.testing.assert_allclose(frame.T_map_camera, T, atol=1e-12)
    assert [frame.name for frame in source] == ["images/9", "images/10", "images/11"]


@pytest.mark.parametrize("prefix", ["./data/phone", "data"])
def test_transforms_json_with_paths_of_another_place(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_transforms(tmp_path)
    path = root / "transforms.json"
    content = json.loads(path.read_text())
    names = [frame.name for frame in open_source(f"transforms:{root}")]
    for frame in content["frames"]:
        frame["file_path"] = f"{prefix}/{frame['file_path'].removeprefix('./')}"
    path.write_text(json.dumps(content))
    source = open_source(f"transforms:{root}")
    assert [frame.name for frame in source] == names
    assert prefix.removeprefix("./") in caplog.text


def test_transforms_json_without_its_images_names_the_paths_of_the_file(tmp_path: Path) -> None:
    root = write_transforms(tmp_path)
    path = root / "transforms.json"
    content = json.loads(path.read_text())
    for frame in content["frames"]:
        frame["file_path"] = "elsewhere/none.png"
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"elsewhere/none\.png"):
        open_source(f"transforms:{root}")[0]


def test_transforms_json_with_an_angle_only(tmp_path: Path) -> None:
    root = write_transforms(tmp_path)
    content = json.loads((root / "transforms.json").read_text())
    for key in ("fl_x", "fl_y", "w", "h"):
        del content[key]
    (root / "transforms.json").write_text(json.dumps(content | {"camera_angle_x": np.pi / 2}))
    assert open_source(f"transforms:{root}").camera.fx == pytest.approx(32.0)


def test_transforms_json_without_rotations_is_refused(tmp_path: Path) -> None:
    root = write_transforms(tmp_path)
    frame = {"file_path": "images/9", "transform_matrix": (2 * np.eye(4)).tolist()}
    for frames in ([frame], [{"file_path": "images/9"}], [{"file_path": "../../x", "transform_matrix": []}], 3):
        write_transforms(root, frames=frames)
        with pytest.raises(SourceError):
            open_source(f"transforms:{root}")


@pytest.mark.parametrize("matrix", [None, (2 * np.eye(4)).tolist(), [[1.0]], [[float("nan")] * 4] * 4])
def test_one_frame_of_transforms_json_without_a_pose_ends_nothing(tmp_path: Path, matrix: object) -> None:
    root = write_transforms(tmp_path)
    content = json.loads((root / "transforms.json").read_text())
    content["frames"][1]["transform_matrix"] = matrix
    (root / "transforms.json").write_text(json.dumps(content))
    poses = [open_source(f"transforms:{root}").pose(k) for k in range(len(content["frames"]))]
    assert sum(pose is None for pose in poses) == 1 and len(poses) > 1


def test_depth_of_another_shape_is_not_the_images(tmp_path: Path) -> None:
    """Depth of half the size is that of the image; depth of a square sensor belongs to other pixels."""
    root = write_transforms(tmp_path)
    content = json.loads((root / "transforms.json").read_text())
    source = open_source(f"transforms:{root}")
    for frame in content["frames"]:
        frame["depth_file_path"] = "depth.png"
    (root / "transforms.json").write_text(json.dumps(content))
    for size, fits in (((source.camera.height // 2, source.camera.width // 2), True), ((16, 16), False)):
        cv2.imwrite(str(root / "depth.png"), np.full(size, 2000, np.uint16))
        if fits:
            depth_m = open_source(f"transforms:{root}")[0].depth_m
            assert depth_m is not None and (depth_m == 2.0).all()
            continue
        with pytest.raises(SourceError, match="not registered to the colour camera"):
            open_source(f"transforms:{root}")


def write_tum(root: Path) -> Path:
    """Depth is 8 ms late and missing once; poses lie between the images."""
    rgb, depth, truth = ["# color images"], [], ["# timestamp tx ty tz qx qy qz qw"]
    for k in range(3):
        picture(root / "rgb" / f"{k}.png", size=(640, 480))
        rgb.append(f"1305031102.{k}00000 rgb/{k}.png")
        if k != 1:
            depth_picture(root / "depth" / f"{k}.png", 10_000, (640, 480))
            depth.append(f"1305031102.{k}08000 depth/{k}.png")
    for k, T in enumerate(poses()):
        q = " ".join(map(str, matrix_to_quaternion(T[:3, :3])))
        stamp = 1305031102_000 - 50 + 100 * k
        truth.append(f"{stamp // 1000}.{stamp % 1000:03d} {T[0, 3]} {T[1, 3]} {T[2, 3]} {q}")
    for name, lines in (("rgb", rgb), ("depth", depth), ("groundtruth", truth)):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tum_lists_are_tied_by_stamp(tmp_path: Path) -> None:
    root = tmp_path / "rgbd_dataset_freiburg3_desk"
    root.mkdir()
    frames = list(open_source(f"tum:{write_tum(root)}"))
    assert [frame.stamp_ns for frame in frames] == [1305031102_000000000 + k * 100_000_000 for k in range(3)]
    assert [frame.depth_m is not None for frame in frames] == [True, False, True]
    assert frames[0].depth_m is not None and float(frames[0].depth_m.max()) == pytest.approx(2.0)
    assert frames[0].T_map_camera is not None
    np.testing.assert_allclose(frames[0].T_map_camera[:3, 3], (poses()[0] + poses()[1])[:3, 3] / 2, atol=1e-9)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    root = tmp_path / "rgbd_dataset_freiburg3_desk"
    root.mkdir()
    return write_tum(root)


@pytest.mark.parametrize("list_name", ["groundtruth.txt", "depth.txt"])
def test_tum_lists_of_another_clock_are_told(desk: Path, list_name: str) -> None:
    """Nanoseconds in one list and seconds in the other would leave every image without a pose, or without depth."""
    path = desk / list_name
    lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if not line.startswith("#")]
    path.write_text("".join(f"{float(stamp) + 1e6:.6f} {rest}\n" for stamp, rest in lines))
    with pytest.raises(SourceError, match="of other times than the images"):
        open_source(f"tum:{desk}")


def test_a_list_written_on_windows_is_read(desk: Path) -> None:
    path = desk / "groundtruth.txt"
    before = [open_source(f"tum:{desk}").pose(k) for k in range(2)]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    for k, T in enumerate(before):
        found = open_source(f"tum:{desk}").pose(k)
        assert T is not None and found is not None and np.array_equal(T, found)


def test_a_quaternion_of_zero_is_no_pose(desk: Path) -> None:
    """As trackers write it while they are lost."""
    path = desk / "groundtruth.txt"
    lines = path.read_text().splitlines()
    lines[-1] = " ".join([*lines[-1].split()[:4], "0", "0", "0", "0"])
    path.write_text("\n".join(lines) + "\n")
    source = open_source(f"tum:{desk}")
    assert source.pose(0) is not None and source.pose(2) is None


def test_tum_needs_a_camera(tmp_path: Path) -> None:
    write_tum(tmp_path)
    with pytest.raises(SourceError, match=r"camera\.txt"):
        open_source(f"tum:{tmp_path}")
    (tmp_path / "camera.txt").write_text("640 480 500 501 320 240\n")
    assert open_source(f"tum:{tmp_path}").camera.fy == 501


def test_scannet_folder_with_smaller_depth(tmp_path: Path) -> None:
    for k, T in enumerate(poses(3)):
        picture(tmp_path / "color" / f"{k}.jpg", size=(128, 96))
        depth_picture(tmp_path / "depth" / f"{k}.png", 1500)
        (tmp_path / "pose").mkdir(exist_ok=True)
        np.savetxt(tmp_path / "pose" / f"{k}.txt", T if k != 1 else np.full((4, 4), -np.inf))
    (tmp_path / "intrinsic").mkdir()
    for name, scale in (("color", 2.0), ("depth", 1.0)):
        K = np.diag([60.0 * scale, 60.0 * scale, 1.0, 1.0])
        K[:2, 2] = 32 * scale, 24 * scale
        np.savetxt(tmp_path / "intrinsic" / f"intrinsic_{name}.txt", K)
    frames = list(open_source(str(tmp_path)))
    assert [frame.T_map_camera is None for frame in frames] == [False, True, False]
    depth_m = frames[0].depth_m
    assert depth_m is not None and depth_m.shape == (96, 128)
    assert float(np.median(depth_m[depth_m > 0])) == pytest.approx(1.5)


def test_a_bare_path_is_recognised_and_an_ambiguous_one_refused(tmp_path: Path) -> None:
    colmap, json_only = tmp_path / "a", tmp_path / "b"
    colmap_text(colmap)
    json_only.mkdir()
    write_transforms(json_only)
    assert type(open_source(str(colmap))).__name__ == "ColmapModel"
    assert type(open_source(str(json_only))).__name__ == "TransformsFile"
    write_transforms(colmap)
    with pytest.raises(SourceError, match=r"colmap:.*transforms:"):
        open_source(str(colmap))
    empty = tmp_path / "c"
    empty.mkdir()
    with pytest.raises(SourceError, match="not recognised"):
        open_source(str(empty))
    with pytest.raises(SourceError, match="nothing at"):
        open_source(str(tmp_path / "missing"))


def test_a_track_says_nothing_in_its_gaps() -> None:
    track = PoseTrack([0, 100_000_000, 1_000_000_000], poses(3))
    assert track.at(50_000_000) is not None
    assert track.at(110_000_000) is not None
    assert track.at(500_000_000) is None
    assert PoseTrack([], []).at(0) is None
