# SPDX-License-Identifier: Apache-2.0
"""Photos as phones write them: sub-folders, turned by EXIF, of several sizes and cameras, HEIC."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from photos import exif, photo

from kfloc_ros.datasets import image_headers, open_source, pictures
from kfloc_ros.datasets.image_headers import header_of
from kfloc_ros.datasets.kinds import detect_kind
from kfloc_ros.errors import SourceError

SCENE = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8), (0, 0), 3)
"""As seen upright, RGB."""
STORED = {
    1: SCENE, 2: SCENE[:, ::-1], 3: SCENE[::-1, ::-1], 4: SCENE[::-1], 5: SCENE.transpose(1, 0, 2),
    6: np.rot90(SCENE, 1), 7: SCENE[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(SCENE, -1),
}  # fmt: skip
"""The same as stored, by EXIF's orientation."""


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_and_start_at_the_focal_length_of_exif(
    tmp_path: Path, orientation: int, order: str
) -> None:
    photo(tmp_path / "0.jpg", STORED[orientation], orientation, 26, order)
    source = open_source(f"images:{tmp_path}")
    assert source[0].image.shape == SCENE.shape
    assert np.abs(source[0].image.astype(int) - SCENE).mean() < 3
    assert source.camera.fx == pytest.approx(26 / np.hypot(36, 24) * np.hypot(64, 48))
    assert source.camera_is_guess and (source.encoded_image(0) is None) == (orientation != 1)


def test_with_a_calibration_pixels_are_those_stored(tmp_path: Path) -> None:
    photo(tmp_path / "0.jpg", SCENE, 3)
    (tmp_path / "camera.txt").write_text("64 48 60 60 31.5 23.5\n")
    assert np.abs(open_source(f"images:{tmp_path}")[0].image.astype(int) - SCENE).mean() < 3


def test_sub_folders_are_recordings_in_natural_order(tmp_path: Path) -> None:
    for name in ("b/IMG_10.jpg", "b/IMG_9.jpg", "a/IMG_2.JPG", "a/deep/1.jpeg", ".trash/IMG_1.jpg", "a/notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no photo")
        else:
            photo(tmp_path / name, SCENE)
    assert detect_kind(str(tmp_path)) == "images"
    source = open_source(str(tmp_path))
    assert [source[k].name for k in range(4)] == ["a/IMG_2", "a/deep/1", "b/IMG_9", "b/IMG_10"]
    assert list(source.sequences()) == [0, 1, 2, 2]


def test_a_folder_with_depth_beside_colour_is_not_taken_for_photos(tmp_path: Path) -> None:
    for name in ("rgb", "depth"):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "0.png"), SCENE)
    with pytest.raises(SourceError, match="Did you mean"):
        detect_kind(str(tmp_path))


def test_portrait_landscape_and_two_lenses_are_cameras_of_their_own(tmp_path: Path) -> None:
    for k in range(3):
        photo(tmp_path / f"{k}.jpg", SCENE, 1, 26)
    photo(tmp_path / "3.jpg", STORED[6], 6, 26)  # as above, stored turned
    photo(tmp_path / "4.jpg", np.rot90(SCENE), 1, 26)  # portrait
    photo(tmp_path / "5.jpg", SCENE, 1, 52)
    photo(tmp_path / "6.jpg", cv2.resize(SCENE, (32, 24)), 1, 26)
    source = open_source(f"images:{tmp_path}")
    assert len(source) == 7 and (source.camera.width, source.camera.height) == (64, 48)
    assert [(source.own_camera(k).width, round(source.own_camera(k).fx)) for k in range(7)] == [
        *[(64, 48)] * 4, (48, 48), (64, 96), (32, 24),
    ]  # fmt: skip
    assert source.recorded(4).image.shape == (64, 48, 3) and source[4].image.shape == (48, 64, 3)
    middle = source[6].image[12:36, 16:48].astype(int) - SCENE[12:36, 16:48]
    assert np.abs(middle).mean() < 6  # the same view at half the size, brought to the usual camera


def test_exif_that_is_damaged_is_none(tmp_path: Path) -> None:
    photo(tmp_path / "0.jpg", SCENE, 6, 26)
    data = bytearray((tmp_path / "0.jpg").read_bytes())
    start = data.index(b"Exif") + 6
    for at in range(start, start + 40, 3):
        other = data.copy()
        other[at : at + 2] = b"\xff\xff"
        (tmp_path / "0.jpg").write_bytes(bytes(other))
        header = header_of(tmp_path / "0.jpg")
        assert header is None or (1 <= header.orientation <= 8 and header.focal_35mm <= 2000)


def test_heic_is_read_where_the_library_is_and_told_where_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    large = cv2.resize(SCENE, (128, 96))
    heif = pillow_heif.from_bytes("RGB", (128, 96), large.tobytes())
    heif.save(tmp_path / "IMG_1.HEIC", quality=95, exif=exif(1, 26))
    source = open_source(str(tmp_path))
    assert len(source) == 1 and np.abs(source[0].image.astype(int) - large).mean() < 6
    assert source.camera.fx == pytest.approx(26 / np.hypot(36, 24) * np.hypot(128, 96))
    (tmp_path / "IMG_2.HEIC").write_bytes((tmp_path / "IMG_1.HEIC").read_bytes()[:300])
    assert len(open_source(str(tmp_path))) == 1  # the damaged one is left out
    (tmp_path / "IMG_2.HEIC").unlink()

    for module in (image_headers, pictures):
        monkeypatch.setattr(module, "reads_heic", lambda: False)
    with pytest.raises(SourceError, match="1 HEIC photos, which are read with `pip install pillow-heif`"):
        open_source(str(tmp_path))
    photo(tmp_path / "IMG_3.jpg", SCENE)
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(tmp_path))) == 1
    assert "pillow-heif" in caplog.text
