# SPDX-License-Identifier: Apache-2.0
"""Files of others are refused before they take memory or time, with a sentence and never a traceback."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import lz4.frame
import numpy as np
import pytest
import torch
import yaml
from bag_messages import image, info, write_messages
from limits import peak_bytes, reset_peak
from rosbags.rosbag2 import CompressionMode, StoragePlugin, storage_mcap
from rosbags.rosbag2.errors import ReaderError
from safetensors.torch import load_file

from kfloc_ros.bags.reader import MAX_METADATA_BYTES
from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.images import image_fault, image_size, read_depth_m, read_image
from kfloc_ros.errors import FrameError, KflocError, MapError, SourceError
from kfloc_ros.files import (
    MAX_IMAGE_PIXELS,
    inside,
    number,
    read_array,
    read_arrays,
    read_bytes,
    read_json,
    read_yaml,
    save_tensors,
)
from kfloc_ros.mapping.build import check_free
from kfloc_ros.maps.files import appearing
from kfloc_ros.pixloc.hloc.files import read_descriptors


@pytest.fixture(autouse=True)
def within_seconds() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < 10


def png(width: int, height: int, bits: int = 8) -> bytes:
    """A grey PNG file of nothing but zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(b"\0" * (1 + width * bits // 8)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_image_of_more_pixels_than_allowed_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(png(9000, 9000))
    assert MAX_IMAGE_PIXELS < 9000 * 9000 and path.stat().st_size < 1_000_000
    before = reset_peak()
    for read in (read_image, image_size, lambda p: read_depth_m(p, 1e-3)):
        with pytest.raises(FrameError, match="9000x9000 pixels, more than"):
            read(path)
    assert "more than" in image_fault(path)
    assert peak_bytes() - before < 20e6
    assert int(os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"]) <= MAX_IMAGE_PIXELS, "for formats whose headers are not read"


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_what_is_written_behind_an_image_does_no_harm(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"0{ending}"
    cv2.imwrite(str(path), np.full((48, 64, 3), 90, np.uint8))
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    assert image_fault(path, (64, 48)) == "" and read_image(path).shape == (48, 64, 3)


@pytest.mark.parametrize("ending", [".bmp", ".tif", ".webp"])
def test_other_formats_are_read_too(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"0{ending}"
    assert cv2.imwrite(str(path), np.full((48, 64, 3), 90, np.uint8))
    assert image_fault(path) == "" and read_image(path, (64, 48)).shape == (48, 64, 3) and image_size(path) == (64, 48)
    with pytest.raises(FrameError, match="64x48 but its camera is 32x24"):
        read_image(path, (32, 24))


def test_random_damage_of_an_image_is_a_sentence(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for ending in (".png", ".jpg"):
        path = tmp_path / f"0{ending}"
        cv2.imwrite(str(path), rng.integers(0, 255, (24, 32, 3), np.uint8))
        whole = path.read_bytes()
        for _ in range(300):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            path.write_bytes(data[: rng.integers(1, len(data) + 1)])
            try:
                image_fault(path, (32, 24))
                assert read_image(path, (32, 24)).shape == (24, 32, 3)
            except FrameError as error:
                assert path.name in str(error)


def test_depth_has_no_measurement_where_a_count_is_0_or_65535(tmp_path: Path) -> None:
    raw = np.array([[0, 65535, 2000, 65534]], np.uint16)
    cv2.imwrite(str(tmp_path / "d.png"), raw)
    assert read_depth_m(tmp_path / "d.png", 1e-3).tolist() == [[0.0, 0.0, 2.0, pytest.approx(65.534)]]


@pytest.mark.parametrize("word", ["-1.#IND", "1.#QNAN", "1.#INF", "-nan(ind)", "NaN", "1.#QNAN0"])
def test_no_number_is_read_in_the_ways_of_windows(word: str) -> None:
    assert np.isnan(number(word))
    with pytest.raises(ValueError):
        number(f"{word}x")


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="plain file"):
            read_bytes(path)
    (tmp_path / "long").write_bytes(b"0" * 100)
    with pytest.raises(OSError, match="more than the 99 allowed"):
        read_bytes(tmp_path / "long", 99)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "link", "loop", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "x").write_text("x")
    (folder / "link").symlink_to(tmp_path / "x")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(SourceError, match=r"leads out of the folder|is no file's"):
        inside(folder, name)
    assert inside(folder, "a/b.png") == folder / "a/b.png"


def test_arrays_that_announce_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    (tmp_path / "big.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="announces"):
        read_array(tmp_path / "big.npy")
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        archive.writestr("a.npy", buffer.getvalue())
    with pytest.raises(ValueError, match="announces"):
        read_arrays(tmp_path / "big.npz")
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(10_000_000))
    with pytest.raises(ValueError, match="would unpack to"):
        read_arrays(tmp_path / "zeros.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="objects"):
        read_array(tmp_path / "objects.npy")
    np.savez(tmp_path / "good.npz", a=np.arange(3), b=np.eye(2))
    assert read_arrays(tmp_path / "good.npz")["a"].tolist() == [0, 1, 2]


STILL = "1 0 0 0 0 0 0 1\n2 0 0 0 0 0 0 1\n"


@pytest.mark.parametrize(
    ("rgb", "truth"),
    [
        ("1e999999999 0.png\n", STILL),
        ("1e999980 0.png\n2 1.png\n", STILL),
        ("nan 0.png\n", STILL),
        ("1" * 4_000 + " 0.png\n", STILL),
        ("1 0.png\n2 1.png\n", "1e999980 0 0 0 0 0 0 1\n"),
        ("1 0.png\n2 1.png\n", "1 0 0 0\n"),
        ("1\n", STILL),
    ],
)
def test_hostile_lists_of_a_tum_sequence_are_a_sentence(tmp_path: Path, rgb: str, truth: str) -> None:
    tum(tmp_path, rgb, truth)
    with pytest.raises(SourceError):
        open_source(f"tum:{tmp_path}")


def tum(folder: Path, rgb: str, truth: str) -> None:
    for k in range(2):
        cv2.imwrite(str(folder / f"{k}.png"), np.zeros((48, 64, 3), np.uint8))
    (folder / "camera.txt").write_text("64 48 60 60 31.5 23.5\n")
    (folder / "rgb.txt").write_text(rgb)
    (folder / "groundtruth.txt").write_text(truth)


@pytest.mark.parametrize("truth", ["1 1e308 1e308 1e308 0 0 0 1\n2 -1e308 0 0 0 0 0 1\n", "1 0 0 0 0 0 0 0\n"])
def test_poses_beyond_the_earth_and_of_zeros_are_none(tmp_path: Path, truth: str) -> None:
    tum(tmp_path, "1 0.png\n2 1.png\n", truth)
    assert all(frame.T_map_camera is None for frame in open_source(f"tum:{tmp_path}"))


FRAME = {"file_path": "0.png", "transform_matrix": np.eye(4).tolist()}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"fl_x": 525, "w": float("inf"), "h": 480, "frames": [FRAME]}),
        json.dumps({"fl_x": float("nan"), "w": 64, "h": 48, "frames": [FRAME]}),
        json.dumps({"fl_x": 525, "w": 10**400, "h": 48, "frames": [FRAME]}),
        json.dumps({"camera_angle_x": 0, "frames": [FRAME]}),
        json.dumps({"camera_angle_x": "wide", "frames": [FRAME]}),
        json.dumps({"fl_x": 60, "frames": [None]}),
        json.dumps({"fl_x": 60, "frames": [{**FRAME, "transform_matrix": "eye"}]}),
        json.dumps({"fl_x": 60, "frames": [{**FRAME, "file_path": "../0.png"}]}),
        json.dumps({"fl_x": 60, "frames": [{**FRAME, "depth_file_path": "/etc/passwd"}]}),
        json.dumps({"fl_x": 60, "frames": []}),
        '{"frames":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"fl_x": ' + "9" * 100_000 + ', "frames": []}',
        "[]",
        "{",
    ],
    ids=range(14),
)
def test_a_hostile_transforms_json_is_a_sentence(tmp_path: Path, text: str) -> None:
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((48, 64, 3), np.uint8))
    (tmp_path / "transforms.json").write_text(text)
    with pytest.raises(KflocError):
        open_source(f"transforms:{tmp_path}")


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["tum", "kfnet", "transforms"])
def test_a_list_of_more_frames_than_can_be_looked_at_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    tum(tmp_path, "1 a\n" * 1_000_000, STILL)
    (tmp_path / "image_list.txt").write_text("a\n" * 1_000_000)
    frame = '{"file_path":"a","transform_matrix":[]}'
    (tmp_path / "transforms.json").write_text('{"fl_x":60,"frames":[' + ",".join([frame] * 250_000) + "]}")
    with pytest.raises(SourceError, match="more than the 200000 allowed"):
        open_source(f"{kind}:{tmp_path}")


def test_an_hdf5_file_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "good.h5", "w") as file:
        file["db/1.jpg/global_descriptor"] = np.arange(4.0)
    assert read_descriptors(tmp_path / "good.h5")["db/1.jpg"].tolist() == [0.0, 1.0, 2.0, 3.0]
    with h5py.File(tmp_path / "large.h5", "w") as file:  # a terabyte of the fill value
        file.create_dataset("1.jpg/global_descriptor", shape=(10**6, 10**6), dtype="u1", chunks=(1024, 1024))
    with h5py.File(tmp_path / "many.h5", "w") as file:
        for k in range(8):
            file.create_dataset(f"{k}.jpg/global_descriptor", shape=(1000, 1000), dtype="f4", chunks=(100, 100))
    with h5py.File(tmp_path / "text.h5", "w") as file:
        file["1.jpg/global_descriptor"] = "words"
    (tmp_path / "raw").write_bytes(bytes(80))
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        file.create_dataset("1.jpg/global_descriptor", (10,), "f8", external=[(str(tmp_path / "raw"), 0, 80)])
    (tmp_path / "damaged.h5").write_bytes((tmp_path / "good.h5").read_bytes()[:900])
    before = reset_peak()
    for name in ("large", "many", "text", "outside", "damaged"):
        with pytest.raises(SourceError, match="cannot be read"):
            read_descriptors(tmp_path / f"{name}.h5")
    assert peak_bytes() - before < 2e8


def test_json_that_is_nested_too_deeply_is_a_value_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_chunk_of_a_bag_is_unpacked_to_no_more_than_it_announces(compression: str) -> None:
    compress = {"zstd": storage_mcap.zstd.compress, "lz4": lz4.frame.compress}[compression]
    parts = [bytes([k]) * 5000 for k in range(3)]
    assert storage_mcap.decompress(b"".join(map(compress, parts)), compression, 15_000, 0) == b"".join(parts)
    data = compress(bytes(300_000_000))
    before = reset_peak()
    with pytest.raises(ReaderError, match="size mismatch"):
        storage_mcap.decompress(data, compression, 1000, 0)
    assert peak_bytes() - before < 50e6


@pytest.mark.parametrize(
    ("storage", "packed", "said"),
    [
        (StoragePlugin.MCAP, CompressionMode.STORAGE, "would unpack to 4000"),
        (StoragePlugin.SQLITE3, CompressionMode.MESSAGE, "unpacks to more than"),
        (StoragePlugin.SQLITE3, CompressionMode.FILE, "unpacks to more than"),
        (StoragePlugin.MCAP, CompressionMode.FILE, "unpacks to more than"),
    ],
)
def test_a_bag_that_unpacks_to_much_more_than_it_holds_is_refused(
    tmp_path: Path, storage: StoragePlugin, packed: CompressionMode, said: str
) -> None:
    def bag_of(width: int, height: int) -> Path:
        empty = np.zeros((height, width), np.uint8)
        told = (
            ("/a/camera_info", 0, info(0, "lens", width, height)),
            ("/a/image_raw", 0, image(0, "lens", empty, "mono8")),
        )
        return write_messages(tmp_path / f"{width}", told, storage, packed)

    assert open_source(f"bag:{bag_of(64, 48)}")[0].image.shape == (48, 64, 3)
    bag = bag_of(8000, 5000)
    assert sum(path.stat().st_size for path in bag.iterdir()) < 200_000
    with pytest.raises(SourceError, match=said):
        open_source(f"bag:{bag}")


def test_metadata_of_a_bag_that_takes_a_minute_to_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.yaml").write_text("a: {b: [1, 2, 3]}\n" * 200_000)
    with pytest.raises(SourceError, match=f"more than the {MAX_METADATA_BYTES} allowed"):
        open_source(f"bag:{tmp_path}")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "- " * 100_000,
        "a: &a [x, x]\nb: [*a, *a]\n",
        "a: &a {x: 1}\nb:\n  <<: *a\n",
        "a: 1\n" * 300_000,
        "a: [",
    ],
    ids=["deep", "compact", "anchors", "merged", "long", "cut"],
)
def test_yaml_that_grows_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sensor.yaml"
    path.write_text(text)
    with pytest.raises((OSError, ValueError)):
        read_yaml(path)
    path.write_text(yaml.safe_dump({"a": [{"b": 1.5}], "c": "d"}))
    assert read_yaml(path) == {"a": [{"b": 1.5}], "c": "d"}


def test_a_jpeg_of_a_thousand_scans_is_refused_and_a_progressive_one_read(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    whole = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(whole)
    assert read_image(tmp_path / "a.jpg").shape == (48, 64, 3)
    last = whole[whole.rfind(b"\xff\xda") : -2]
    (tmp_path / "b.jpg").write_bytes(whole[:-2] + 1000 * last + b"\xff\xd9")
    with pytest.raises(FrameError, match="not a readable image"):
        read_image(tmp_path / "b.jpg")


def test_another_format_under_the_name_of_a_jpeg_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(cv2.imencode(".tiff", np.zeros((30, 40, 3), np.uint16))[1].tobytes())
    for read in (read_image, image_size):
        with pytest.raises(FrameError, match="not a readable image"):
            read(tmp_path / "a.jpg")


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file can have more than a thousand bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_tensors_that_cannot_be_written_are_an_error_of_the_system_and_leave_what_was_there(
    tmp_path: Path, small_files: None
) -> None:
    """The library has an error of its own for a full disk: a traceback for who has built a map for minutes."""
    path = tmp_path / "new" / "weights.safetensors"
    save_tensors({"a": torch.ones(3)}, path)
    with pytest.raises(OSError, match=r"File too large: .*weights\.safetensors"):
        save_tensors({"a": torch.zeros(3000)}, path)
    assert list(path.parent.iterdir()) == [path] and load_file(path)["a"].tolist() == [1, 1, 1]
    with pytest.raises(OSError), appearing(tmp_path / "map") as folder:
        save_tensors({"a": torch.zeros(3000)}, folder / "head.safetensors")
    assert [item.name for item in tmp_path.iterdir()] == ["new"]


def test_a_map_that_cannot_be_written_is_refused_before_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MapError, match="No map can be written"):
        check_free(tmp_path / "file" / "map", overwrite=False)
    check_free(tmp_path / "new" / "map", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
