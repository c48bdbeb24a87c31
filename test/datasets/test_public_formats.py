# SPDX-License-Identifier: Apache-2.0
"""RIO10, Indoor-6, Capture (LaMAR, CroCoDL), OpenLORIS and EuRoC folders, written small and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.scannet import indoor6_split
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.types import Matrix

T_BODY_CAMERA = make_pose(so3_exp([0.1, -1.2, 0.4]), [0.2, -0.05, 0.9])
START_US = 1_600_000_000_000_000


def pose(k: float) -> Matrix:
    return make_pose(so3_exp([0.02 * k, -0.05 * k, 0.1]), [0.1 * k, 0.02 * k, -0.1])


def image(path: Path, value: int = 90, size: tuple[int, int] = (64, 48), kind: Any = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if kind is np.uint8 else (size[1], size[0])
    cv2.imwrite(str(path), np.full(shape, value, kind))


def words(T: Matrix, order: str, separator: str = " ") -> str:
    x, y, z, w = matrix_to_quaternion(T[:3, :3])
    q = (w, x, y, z) if order.startswith("w") else (x, y, z, w)
    numbers = [*q, *T[:3, 3]] if order in ("wt", "xt") else [*T[:3, 3], *q]
    return separator.join(f"{float(value)!r}" for value in numbers)


def rio10(root: Path) -> Path:
    folder = root / "seq02" / "seq02_01"
    for k in range(3):
        image(folder / f"frame-{k:06d}.color.jpg", 30 * k, (54, 96))
        image(folder / f"frame-{k:06d}.rendered.depth.png", 1500, (27, 48), np.uint16)
        np.savetxt(folder / f"frame-{k:06d}.pose.txt", pose(k))
    (root / "intrinsics.txt").write_text("seq01_01 1 1 1 1\nseq02_01 75.6 75.7 27.0 49.3\n")
    return folder


def indoor6(root: Path) -> Path:
    names = [f"image-{k:06d}" for k in range(4)]
    for k, name in enumerate(names):
        image(root / "images" / f"{name}.color.jpg", 20 * k)
        (root / "images" / f"{name}.intrinsics.txt").write_text("64 48 60.0 32.5 24.5 0.01 original.jpg\n")
        np.savetxt(root / "images" / f"{name}.pose.txt", inverse_pose(pose(k))[:3])
    # Written as protocol 0 by hand, so that no test needs the module.
    lists = {"train": names[:2], "val": names[2:3], "test": names[3:]}
    body = "".join(
        f"V{part}\n(l" + "".join(f"V{name}.color.jpg\na" for name in chosen) + f"sV{part}_idx\n(lI0\nas"
        for part, chosen in lists.items()
    )
    (root / "train_test_val.pkl").write_bytes(f"(d{body}.".encode())
    return root


def capture(root: Path, *, rig: bool = False, cameras: int = 1) -> Path:
    session = root / "sessions" / "query_phone"
    names = [f"cam{n}" for n in range(cameras)]
    sensors = ["# sensor_id, name, sensor_type, [sensor_params]+"]
    sensors += [f"{name}, phone, camera, PINHOLE, 64, 48, 60, 61, 32.5, 24.5" for name in names]
    images, trajectory = ["# timestamp, sensor_id, image_path"], ["# timestamp, device_id, qw, qx, qy, qz, tx, ty, tz"]
    for k in range(4):
        stamp = START_US + 100_000 * k
        for name in names:
            image(session / "raw_data" / "images" / name / f"{stamp}.jpg", 20 * k)
            images.append(f"{stamp}, {name}, images/{name}/{stamp}.jpg")
        device = "rig0" if rig else names[0]
        T = pose(k) @ inverse_pose(T_BODY_CAMERA) if rig else pose(k)
        if k != 2:
            trajectory.append(f"{stamp}, {device}, {words(T, 'wt', ', ')}")
    (session / "sensors.txt").write_text("\n".join([*sensors, "wifi0, w, wifi"]) + "\n")
    (session / "images.txt").write_text("\n".join(images) + "\n")
    (session / "trajectories.txt").write_text("\n".join(trajectory) + "\n")
    (session / "queries.txt").write_text(f"# timestamp, sensor_id\n{START_US + 100_000}, cam0\n")
    if rig:
        lines = [f"rig0, {name}, {words(T_BODY_CAMERA, 'wt', ', ')}" for name in names]
        (session / "rigs.txt").write_text("# rig_id, sensor_id, qw\n" + "\n".join(lines) + "\n")
    return session


def openloris(root: Path) -> Path:
    stamps = [f"{1560004885.4 + 0.1 * k:.6f}" for k in range(3)]
    for k, stamp in enumerate(stamps):
        image(root / "color" / f"{stamp}.png", 20 * k)
        image(root / "aligned_depth" / f"{stamp}.png", 2000, kind=np.uint16)
    for name in ("color", "aligned_depth"):
        (root / f"{name}.txt").write_text("#t name\n" + "".join(f"{s} {name}/{s}.png\n" for s in stamps))
    T_camera_body = inverse_pose(T_BODY_CAMERA)
    rows = [f"{stamp} {words(pose(k) @ T_camera_body, 'tx')}\n" for k, stamp in enumerate(stamps)]
    (root / "groundtruth.txt").write_text("".join(rows))
    (root / "sensors.yaml").write_text(
        "%YAML:1.0\nd400_color_optical_frame:\n   width: 64\n   height: 48\n   model: pinhole\n"
        "   intrinsics: !!opencv-matrix\n      rows: 1\n      cols: 4\n      dt: d\n      data: [ 60., 32.,\n"
        "         61., 24. ]\n"
    )
    split = make_pose(so3_exp([0.3, 0, 0]), [0, 0, 0.5])
    parts = {("base_link", "mast"): split, ("mast", "d400_color_optical_frame"): inverse_pose(split) @ T_BODY_CAMERA}
    storage = cv2.FileStorage(str(root / "trans_matrix.yaml"), cv2.FILE_STORAGE_WRITE)
    storage.startWriteStruct("trans_matrix", cv2.FileNode_SEQ)
    for (parent, child), T in parts.items():
        storage.startWriteStruct("", cv2.FileNode_MAP)
        storage.write("parent_frame", parent)
        storage.write("child_frame", child)
        storage.write("matrix", T)
        storage.endWriteStruct()
    storage.endWriteStruct()
    storage.release()
    return root


def euroc(root: Path) -> Path:
    base = root / "V1_01" / "mav0"
    stamps = [1_403_715_273_262_142_976 + 50_000_000 * k for k in range(3)]
    for k, stamp in enumerate(stamps):
        image(base / "cam0" / "data" / f"{stamp}.png", 20 * k)
    lines = [f"{stamp},{stamp}.png\r" for stamp in stamps]
    (base / "cam0" / "data.csv").write_text("#timestamp [ns],filename\r\n" + "\n".join(lines) + "\n")
    numbers = ", ".join(f"{float(value)!r}" for value in T_BODY_CAMERA.reshape(-1))
    (base / "cam0" / "sensor.yaml").write_text(
        "sensor_type: camera\nT_BS:\n  cols: 4\n  rows: 4\n"
        f"  data: [{numbers}]\nrate_hz: 20\nresolution: [64, 48]\nintrinsics: [60.0, 61.0, 32.0, 24.0]\n"
        "distortion_model: radial-tangential\ndistortion_coefficients: [-0.2, 0.07, 0.0001, 1.8e-05]\n"
    )
    truth = base / "state_groundtruth_estimate0"
    truth.mkdir(parents=True)
    T_camera_body = inverse_pose(T_BODY_CAMERA)
    # Between the images as well, so that poses are interpolated.
    rows = [
        f"{stamps[0] + 25_000_000 * n},{words(pose(0.5 * n) @ T_camera_body, 'wq', ',')},0,0,0,0,0,0,0,0,0"
        for n in range(5)
    ]
    (truth / "data.csv").write_text("#timestamp,p_RS_R_x [m]\n" + "\n".join(rows) + "\n")
    return root / "V1_01"


def check(source: FrameSource, *, fx: float, cx: float, missing: tuple[int, ...] = ()) -> None:
    for k in range(len(source)):
        found = source.pose(k)
        assert (found is None) == (k in missing)
        assert found is None or np.allclose(found, pose(k), atol=1e-6)
    assert (source.camera.fx, source.camera.cx) == pytest.approx((fx, cx))
    assert source[1].image.shape == (source.camera.height, source.camera.width, 3)
    stamps = [source.stamp_ns(k) for k in range(len(source))]
    assert stamps == sorted(set(stamps))


def test_rio10_has_rendered_depth_and_the_sequences_intrinsics(tmp_path: Path) -> None:
    folder = rio10(tmp_path)
    source = open_source(str(folder))
    check(source, fx=75.6, cx=27.0)
    frame = source[2]
    assert frame.name == "seq02_01/frame-000002"
    assert frame.depth_m is not None and frame.depth_m.shape == (96, 54) and np.allclose(frame.depth_m, 1.5)
    (folder / "frame-000001.pose.txt").unlink()  # a hidden test frame
    assert open_source(f"rio10:{folder}").pose(1) is None
    (tmp_path / "intrinsics.txt").write_text("seq01_01 1 1 1 1\n")
    with pytest.raises(SourceError, match="no line for the sequence 'seq02_01'"):
        open_source(f"rio10:{folder}")


def test_indoor6_reads_poses_of_colmap_and_the_split_without_loading_it(tmp_path: Path) -> None:
    root = indoor6(tmp_path / "scene1")
    source = open_source(str(root))
    check(source, fx=60.0, cx=32.0)
    assert list(source.sequences()) == [0, 1, 2, 3]
    assert [len(open_source(f"indoor6:{root}@{part}")) for part in ("train", "val", "test")] == [2, 1, 1]
    (root / "train_test_val.pkl").write_bytes(b"cos\nsystem\n(S'touch evil'\ntR.")
    with pytest.raises(SourceError, match="names no images"):
        indoor6_split(root / "train_test_val.pkl")
    assert not Path("evil").exists()
    (root / "train_test_val.pkl").write_bytes(b"\x80\x05\x95")
    with pytest.raises(SourceError, match="cannot be read"):
        open_source(f"indoor6:{root}@train")


@pytest.mark.parametrize("rig", [False, True])
def test_a_capture_session_has_poses_of_its_camera_or_of_its_rig(rig: bool, tmp_path: Path) -> None:
    session = capture(tmp_path, rig=rig)
    check(open_source(str(session)), fx=60.0, cx=32.0, missing=(2,))
    queries = open_source(f"capture:{session}@queries")
    assert [queries[0].name, len(queries)] == [f"{START_US + 100_000}/cam0", 1]
    aligned = session / "proc" / "alignment_trajectories.txt"
    aligned.parent.mkdir()
    aligned.write_text((session / "trajectories.txt").read_text().replace(f"{START_US}, ", f"{START_US + 7}, "))
    assert open_source(str(session)).pose(0) is None


def test_a_capture_session_of_several_cameras_wants_one_named(tmp_path: Path) -> None:
    session = capture(tmp_path, rig=True, cameras=2)
    with pytest.raises(SourceError, match="cam0, cam1"):
        open_source(str(session))
    check(open_source(f"{session}?sensor=cam1"), fx=60.0, cx=32.0, missing=(2,))
    with pytest.raises(SourceError, match="name one"):
        open_source(f"capture:{session}?sensor=cam7")
    with pytest.raises(SourceError, match=r"\?sensor=NAME"):
        open_source(f"capture:{session}?lens=1")


def test_openloris_poses_are_moved_from_the_base_along_the_chain(tmp_path: Path) -> None:
    root = openloris(tmp_path / "office1-1")
    source = open_source(str(root))
    check(source, fx=60.0, cx=32.0)
    assert (source.camera.fy, source.camera.cy) == (61.0, 24.0)
    depth_m = source[0].depth_m
    assert depth_m is not None and np.allclose(depth_m, 2.0)
    (root / "trans_matrix.yaml").write_text("%YAML:1.0\ntrans_matrix: []\n")
    with pytest.raises(SourceError, match="does not connect"):
        open_source(f"openloris:{root}")
    (root / "sensors.yaml").write_text("%YAML:1.0\nother: 1\n")
    with pytest.raises(SourceError, match="does not describe"):
        open_source(f"openloris:{root}")


def test_euroc_poses_are_interpolated_and_moved_to_the_camera(tmp_path: Path) -> None:
    root = euroc(tmp_path)
    source = open_source(str(root))
    camera = source.camera
    assert (camera.fx, camera.fy, camera.distortion_model) == (60.0, 61.0, "plumb_bob")
    for k in range(3):
        found = source.pose(k)
        assert found is not None and np.allclose(found, pose(k), atol=1e-6)
    with pytest.raises(SourceError, match="cam7"):
        open_source(f"euroc:{root}?sensor=cam7")
    sensor = root / "mav0" / "cam0" / "sensor.yaml"
    sensor.write_text("%YAML:1.0\n" + sensor.read_text())  # as OpenCV needs it
    assert open_source(f"euroc:{root}").camera == camera
    sensor.write_text(sensor.read_text().replace("radial-tangential", "magic"))
    with pytest.raises(SourceError, match="'magic' is not one of"):
        open_source(f"euroc:{root}")


@pytest.mark.parametrize(
    ("make", "file", "text"),
    [
        (rio10, "intrinsics.txt", "seq02_01 a b c d\n"),
        (indoor6, "images/image-000000.intrinsics.txt", "64 48\n"),
        (indoor6, "images/image-000000.pose.txt", "1 2 3\n"),
        (capture, "sessions/query_phone/sensors.txt", "cam0, x, camera, PINHOLE, 64\n"),
        (capture, "sessions/query_phone/images.txt", "now, cam0, a.jpg\n"),
        (capture, "sessions/query_phone/images.txt", "1, cam0, ../../../../etc/passwd\n"),
        (capture, "sessions/query_phone/trajectories.txt", "1, cam0, w, 0, 0, 0, 1, 2, 3\n"),
        (openloris, "sensors.yaml", "%YAML:1.0\nd400_color_optical_frame: { width: 64 }\n"),
        (openloris, "trans_matrix.yaml", "\0\0"),
        (euroc, "V1_01/mav0/cam0/data.csv", "12,\n1e5,b.png\n"),
        (euroc, "V1_01/mav0/cam0/sensor.yaml", "resolution: [64, 48]\n"),
    ],
)
def test_damaged_files_are_refused_with_a_sentence(make: Any, file: str, text: str, tmp_path: Path) -> None:
    root = tmp_path if make is not indoor6 and make is not openloris else tmp_path / "scene"
    folder = make(root)
    (root / file).write_text(text)
    kind = make.__name__
    with pytest.raises(SourceError):
        open_source(f"{kind}:{folder}")
