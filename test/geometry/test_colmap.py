# SPDX-License-Identifier: Apache-2.0
"""COLMAP models whose files contradict each other, or announce more than they hold, are refused."""

from __future__ import annotations

import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycolmap
import pytest

from kfloc_ros.errors import KflocError, MapError, SourceError
from kfloc_ros.geometry.colmap import read_model
from kfloc_ros.pixloc.reference.views import read_scene


def synthetic() -> pycolmap.Reconstruction:
    options = pycolmap.SyntheticDatasetOptions()
    options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig = 1, 1, 5
    options.num_points3D = 60
    return pycolmap.synthesize_dataset(options)


@pytest.fixture(scope="module")
def model() -> pycolmap.Reconstruction:
    return synthetic()


def write(model: pycolmap.Reconstruction, folder: Path, *, text: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (model.write_text if text else model.write_binary)(str(folder))
    return folder


def scaled(model: pycolmap.Reconstruction, factor: float) -> pycolmap.Reconstruction:
    other = pycolmap.Reconstruction(model)
    other.transform(pycolmap.Sim3d(np.concatenate([factor * np.eye(3), np.zeros((3, 1))], axis=1)))
    return other


@pytest.mark.parametrize("text", [False, True])
def test_a_whole_model_is_read(model: pycolmap.Reconstruction, tmp_path: Path, text: bool) -> None:
    read = read_model(write(model, tmp_path / "m", text=text))
    assert len(read.images) == 5 and len(read.points3D) == 60


def test_the_same_model_as_bin_and_as_txt_is_read(model: pycolmap.Reconstruction, tmp_path: Path) -> None:
    write(model, tmp_path / "m", text=True)
    assert len(read_model(write(model, tmp_path / "m")).images) == 5


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("reader", [read_model, read_scene])
def test_frames_that_are_older_than_the_images_are_refused(
    model: pycolmap.Reconstruction, tmp_path: Path, text: bool, reader: Callable[[Path], object]
) -> None:
    folder, end = write(model, tmp_path / "m", text=text), ".txt" if text else ".bin"
    if not (folder / f"frames{end}").is_file():
        pytest.skip("this COLMAP writes no frames")
    big = write(scaled(model, 2.0), tmp_path / "big", text=text)
    for name in ("cameras", "images", "points3D"):
        (folder / f"{name}{end}").write_bytes((big / f"{name}{end}").read_bytes())
    with pytest.raises(KflocError, match=rf"images\{end} and frames\{end} hold different poses.*delete both"):
        reader(folder)
    for name in ("frames", "rigs"):
        (folder / f"{name}{end}").unlink()
    again = read_model(folder)
    centres = np.array([image.projection_center() for image in again.images.values()])
    before = np.array([image.projection_center() for image in model.images.values()])
    assert np.ptp(centres, axis=0) == pytest.approx(2 * np.ptp(before, axis=0), rel=1e-6)


def moved(folder: Path) -> None:
    write(scaled(pycolmap.Reconstruction(str(folder)), 2.0), folder, text=True)


def other_focal(folder: Path) -> None:
    path = folder / "cameras.txt"
    lines = path.read_text().splitlines()
    words = lines[-1].split()
    words[4] = str(1.1 * float(words[4]))
    path.write_text("\n".join([*lines[:-1], " ".join(words)]) + "\n")


def other_points(folder: Path) -> None:
    path = folder / "points3D.txt"
    lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    path.write_text("".join(f"{w[0]} {2 * float(w[1])} {' '.join(w[2:])}\n" for w in lines))


@pytest.mark.parametrize("change", [moved, other_focal, other_points], ids=lambda change: change.__name__)
def test_a_txt_model_beside_another_bin_model_is_refused(
    model: pycolmap.Reconstruction, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    folder = write(model, write(model, tmp_path / "m", text=True))
    change(folder)
    with pytest.raises(SourceError, match=r"as \.bin and as \.txt, and the two differ"):
        read_model(folder)
    for name in ("cameras", "images", "points3D", "frames", "rigs"):
        (folder / f"{name}.bin").unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D", "frames", "rigs"])
@pytest.mark.parametrize("count", [2**62, 2**31])
def test_counts_that_a_file_cannot_hold_are_refused_before_memory_is_taken(
    model: pycolmap.Reconstruction, tmp_path: Path, name: str, count: int
) -> None:
    folder = write(model, tmp_path / "m")
    path = folder / f"{name}.bin"
    if not path.is_file():
        pytest.skip("this COLMAP writes no such file")
    path.write_bytes(struct.pack("<Q", count) + path.read_bytes()[8:])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(SourceError, match=f"announces {count} entries"):
        read_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 and time.monotonic() - start < 5


def test_an_image_that_sees_a_point_that_is_missing_is_refused(model: pycolmap.Reconstruction, tmp_path: Path) -> None:
    folder = write(model, tmp_path / "m", text=True)
    lines = (folder / "points3D.txt").read_text().splitlines(keepends=True)
    (folder / "points3D.txt").write_text("".join(lines[:-1]))
    with pytest.raises(SourceError, match="sees a point that the model does not have"):
        read_model(folder)


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
def test_a_file_that_is_cut_off_is_a_sentence(model: pycolmap.Reconstruction, tmp_path: Path, name: str) -> None:
    folder = write(model, tmp_path / "m")
    path = folder / f"{name}.bin"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError):
        read_model(folder)
    with pytest.raises(MapError):
        read_scene(folder)


def camera_files(folder: Path, model: int | str, parameters: list[float]) -> Path:
    """Model of one image, with a camera as no version of COLMAP would write it; binary if the model is a number."""
    folder.mkdir()
    values = {"images": "1 1 0 0 0 0 0 0 1 a.png\n\n", "points3D": ""}
    if isinstance(model, str):
        values["cameras"] = f"1 {model} 64 48 {' '.join(map(str, parameters))}\n"
        for name, text in values.items():
            (folder / f"{name}.txt").write_text(text)
        return folder
    (folder / "cameras.bin").write_bytes(struct.pack(f"<QIiQQ{len(parameters)}d", 1, 1, model, 64, 48, *parameters))
    (folder / "images.bin").write_bytes(struct.pack("<QI7dI", 1, 1, 1, *[0] * 6, 1) + b"a.png\0" + bytes(8))
    (folder / "points3D.bin").write_bytes(bytes(8))
    return folder


OPENCV = [60.0, 61.0, 32.0, 24.0, 0.05, -0.02, 0.001, 0.002]


@pytest.mark.parametrize("model", [4, "OPENCV"])
@pytest.mark.parametrize("parameters", [OPENCV[:-1], OPENCV[:-2], [*OPENCV, 0.1]], ids=["7", "6", "9"])
def test_another_number_of_parameters_than_the_lens_has_is_refused(
    tmp_path: Path, model: int | str, parameters: list[float]
) -> None:
    # COLMAP reads a binary camera that is cut off, and repeats the last parameter for those that are missing.
    with pytest.raises(SourceError, match=r"cameras in cameras\.bin take 96 bytes|and 8 finite parameters"):
        read_model(camera_files(tmp_path / "m", model, parameters))


def test_a_camera_with_all_its_parameters_is_read_from_both(tmp_path: Path) -> None:
    for model in (4, "OPENCV"):
        read = read_model(camera_files(tmp_path / str(model), model, OPENCV))
        assert list(read.cameras[1].params) == OPENCV


@pytest.mark.parametrize("model", [-1, 99, 2**31 - 1, "NO_SUCH", "opencv", "4"])
def test_a_camera_model_that_colmap_does_not_have_is_named(tmp_path: Path, model: int | str) -> None:
    with pytest.raises(SourceError, match=f"camera 1 has the model '{model}'"):
        read_model(camera_files(tmp_path / "m", model, OPENCV))


@pytest.mark.parametrize("line", ["1 OPENCV 64", "x PINHOLE 64 48 6 6 3 2", "1 PINHOLE 64 48 60,0 60 32 24",
                                  "1 PINHOLE -64 48 6 6 3 2", "1 PINHOLE 64.5 48 6 6 3 2", "1 PINHOLE 64 48 nan 6 3 2",
                                  "\ufeff1 PINHOLE 64 48 6 6 3 2"])  # fmt: skip
def test_a_line_of_cameras_txt_that_is_none_is_shown(tmp_path: Path, line: str) -> None:
    folder = camera_files(tmp_path / "m", "OPENCV", OPENCV)
    (folder / "cameras.txt").write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(SourceError, match="finite parameters") as said:
        read_model(folder)
    assert line in str(said.value)


def test_a_pipe_is_no_model(model: pycolmap.Reconstruction, tmp_path: Path) -> None:
    folder = write(model, tmp_path / "m", text=True)
    (folder / "points3D.txt").unlink()
    os.mkfifo(folder / "points3D.txt")
    with pytest.raises(SourceError, match="plain file"):
        read_model(folder)
