# SPDX-License-Identifier: Apache-2.0
"""Lenses of files of other tools: a fisheye stays one without coefficients, and an unknown lens is refused."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.colmap import camera_of
from kfloc_ros.datasets.posed_images import read_calibration, write_calibration
from kfloc_ros.errors import KflocError, SourceError
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.geometry.colmap import COLMAP_MODELS, camera_from_parameters, camera_to_colmap

FISHEYES = tuple(model for model in COLMAP_MODELS if "FISHEYE" in model)


def transforms(root: Path, **said: object) -> str:
    """A transforms.json of two images of 64x48 pixels."""
    (root / "images").mkdir(parents=True)
    frames = []
    for k in range(2):
        cv2.imwrite(str(root / "images" / f"{k}.png"), np.full((48, 64, 3), 90, np.uint8))
        T = np.eye(4)
        T[0, 3] = 0.1 * k
        frames.append({"file_path": f"images/{k}.png", "transform_matrix": T.tolist()})
    content = {"fl_x": 60.0, "cx": 32.0, "cy": 24.0, "w": 64, "h": 48, "frames": frames, **said}
    (root / "transforms.json").write_text(json.dumps(content))
    return f"transforms:{root}"


def at_45_degrees(camera: Camera) -> float:
    return float(camera.distort(np.array([[1.0, 0.0]]))[0, 0])


@pytest.mark.parametrize("model", FISHEYES)
def test_an_equidistant_lens_of_colmap_without_coefficients_is_no_pinhole(model: str) -> None:
    focal = [60.0, 60.0] if model == "OPENCV_FISHEYE" else [60.0]
    count = {"OPENCV_FISHEYE": 4, "SIMPLE_RADIAL_FISHEYE": 1, "RADIAL_FISHEYE": 2}[model]
    camera = camera_from_parameters(model, 64, 48, [*focal, 32.0, 24.0, *[0.0] * count])
    assert at_45_degrees(camera) == pytest.approx(31.5 + 60 * np.pi / 4)
    assert not camera.is_pinhole and not ImageAdapter(camera, camera.pinhole()).is_identity
    name, parameters = camera_to_colmap(camera)
    assert camera_from_parameters(name, 64, 48, parameters) == camera


@pytest.mark.parametrize(
    "said", [{"is_fisheye": True}, {"camera_model": "OPENCV_FISHEYE"}, {"camera_model": "SIMPLE_RADIAL_FISHEYE"}]
)
def test_an_equidistant_lens_of_transforms_json_without_coefficients_is_no_pinhole(
    tmp_path: Path, said: dict[str, object]
) -> None:
    camera = open_source(transforms(tmp_path / "t", **said)).camera
    assert at_45_degrees(camera) == pytest.approx(31.5 + 60 * np.pi / 4)
    assert not camera.is_pinhole and not ImageAdapter(camera, camera.pinhole()).is_identity


def test_the_lens_models_of_colmap_and_of_transforms_json_are_the_same(tmp_path: Path) -> None:
    coefficients = {"k1": 0.05, "k2": -0.02, "p1": 0.001, "p2": -0.002, "k3": 0.01, "k4": 0.03, "k5": 0.002, "k6": 0.01}
    expected = {
        "SIMPLE_PINHOLE": [], "PINHOLE": [], "SIMPLE_RADIAL": ["k1"], "RADIAL": ["k1", "k2"],
        "OPENCV": ["k1", "k2", "p1", "p2"], "FULL_OPENCV": list(coefficients), "SIMPLE_RADIAL_FISHEYE": ["k1"],
        "RADIAL_FISHEYE": ["k1", "k2"], "OPENCV_FISHEYE": ["k1", "k2", "k3", "k4"],
    }  # fmt: skip
    assert set(expected) == set(COLMAP_MODELS)
    for model, keys in expected.items():
        values = {key: coefficients[key] for key in keys}
        focal = [60.0] if "SIMPLE" in model or "RADIAL" in model else [60.0, 60.0]
        colmap = camera_from_parameters(model, 64, 48, [*focal, 32.0, 24.0, *values.values()])
        camera = open_source(transforms(tmp_path / model, camera_model=model, **values)).camera
        rays = np.array([[0.1, -0.2], [0.4, 0.3]])
        assert camera.distort(rays) == pytest.approx(colmap.distort(rays), abs=1e-9), model


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"camera_model": "OPENCV", "k4": 0.3}, "k4"),
        ({"k5": 0.1}, "k5"),
        ({"camera_model": "PINHOLE", "k1": 0.1}, "k1"),
        ({"camera_model": "EQUIRECTANGULAR"}, "EQUIRECTANGULAR"),
        ({"camera_model": "THIN_PRISM_FISHEYE", "k1": 0.1}, "THIN_PRISM_FISHEYE"),
        ({"ftheta_p0": 0.0, "ftheta_p1": 0.9}, "ftheta_p1"),
        ({"b1": 2.0}, "b1"),
        ({"is_fisheye": True, "camera_model": "OPENCV"}, "no fisheye"),
    ],
)
def test_a_lens_that_is_not_known_is_refused(tmp_path: Path, said: dict[str, object], named: str) -> None:
    with pytest.raises(SourceError, match=named):
        open_source(transforms(tmp_path / "t", **said))


def test_zeros_of_a_lens_that_is_not_known_say_nothing(tmp_path: Path) -> None:
    source = open_source(transforms(tmp_path / "t", camera_model="OPENCV", k4=0.0, ftheta_p0=0.0, k1=0.1))
    assert source.camera.distortion == (0.1, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "model",
    ["FOV", "THIN_PRISM_FISHEYE", "RAD_TAN_THIN_PRISM_FISHEYE", "SIMPLE_DIVISION", "DIVISION", "FISHEYE", "EUCM"],
)
def test_a_colmap_lens_that_is_not_known_is_refused(model: str) -> None:
    import pycolmap

    known = pycolmap.CameraModelId.__members__
    if model not in known:
        pytest.skip("this COLMAP does not have the model")
    camera = pycolmap.Camera.create_from_model_id(1, known[model], 60.0, 64, 48)
    with pytest.raises(SourceError, match=f"'{model}' is not supported.*Undistort"):
        camera_of(camera)


@pytest.mark.parametrize("model", COLMAP_MODELS)
def test_every_colmap_lens_that_is_known_projects_as_colmap_does(model: str) -> None:
    import pycolmap

    camera = pycolmap.Camera.create_from_model_id(1, pycolmap.CameraModelId.__members__[model], 60.0, 64, 48)
    lens = [0.05, -0.02, 0.001, 0.002, 0.01, 0.003, 0.02, 0.001]
    camera.params = [*camera.params[: 4 - (len(camera.focal_length_idxs()) == 1)], *lens][: len(camera.params)]
    rays = np.array([[x, y] for x in (-0.45, 0.0, 0.3) for y in (-0.3, 0.0, 0.35)])
    pixels = np.array([camera.img_from_cam(np.array([*ray, 1.0])) for ray in rays])
    assert camera_of(camera).distort(rays) == pytest.approx(pixels - 0.5, abs=1e-9)


@pytest.mark.parametrize(
    "lens",
    [
        ("none", ()),
        ("plumb_bob", (-0.03, 0.035, -0.0001, -0.0001, -0.012)),
        ("rational_polynomial", (0.5, -0.2, 0.001, 0.0005, 0.01, 0.6, -0.1, 0.02)),
        ("equidistant", (0.0, 0.0, 0.0, 0.0)),
        ("equidistant", (0.05, -0.01, 0.002, 0.0)),
    ],
)
def test_camera_txt_holds_every_lens(tmp_path: Path, lens: tuple[str, tuple[float, ...]]) -> None:
    camera = Camera(64, 48, 60.0, 61.0, 31.5, 23.5, *lens)
    write_calibration(tmp_path / "camera.txt", camera)
    assert read_calibration(tmp_path / "camera.txt") == camera


@pytest.mark.parametrize(
    ("text", "lens"),
    [
        ("-.03 .035 0 0 -.012 0 0 0", ("plumb_bob", (-0.03, 0.035, 0.0, 0.0, -0.012))),
        (".5 -.2 0 0 .01 .6 -.1 .02" + 6 * " 0", ("rational_polynomial", (0.5, -0.2, 0.0, 0.0, 0.01, 0.6, -0.1, 0.02))),
        ("plumb_bob -.03 .035 0 0 0 0 0 0", ("plumb_bob", (-0.03, 0.035, 0.0, 0.0, 0.0))),
        ("equidistant .1 0 0 0 0", ("equidistant", (0.1, 0.0, 0.0, 0.0))),
    ],
)
def test_zeros_beyond_a_lens_in_camera_txt_are_left_out(
    tmp_path: Path, text: str, lens: tuple[str, tuple[float, ...]]
) -> None:
    (tmp_path / "camera.txt").write_text(f"64 48 60 61 31.5 23.5 {text}\n")
    camera = read_calibration(tmp_path / "camera.txt")
    assert (camera.distortion_model, camera.distortion) == lens


@pytest.mark.parametrize(
    "text",
    ["inf inf 1 1 1 1", "nan nan 1 1 1 1", "64.5 48 60 60 32 24", "64 48 60 60 32", "64 48 60 60 32 24 fov 0.1",
     "64 48 60 60 32 24 .1 0 0 0 0 0 0 0 0.2", ""],
)  # fmt: skip
def test_a_camera_txt_that_is_none_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "camera.txt").write_text(text)
    with pytest.raises(SourceError, match="width height fx fy cx cy"):
        read_calibration(tmp_path / "camera.txt")


def test_depth_of_instant_ngp_has_the_length_it_says(tmp_path: Path) -> None:
    root = tmp_path / "t"
    spec = transforms(root, integer_depth_scale=0.0002)
    content = json.loads((root / "transforms.json").read_text())
    (root / "depth").mkdir()
    for k, frame in enumerate(content["frames"]):
        cv2.imwrite(str(root / "depth" / f"{k}.png"), np.full((48, 64), 10_000 if k == 0 else 65_535, np.uint16))
        frame["depth_path"] = f"depth/{k}.png"
    (root / "transforms.json").write_text(json.dumps(content))
    first, second = (frame.depth_m for frame in open_source(spec))
    assert first is not None and second is not None
    assert float(np.median(first)) == pytest.approx(2.0) and not second.any()
    del content["integer_depth_scale"]
    (root / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(KflocError, match="integer_depth_scale"):
        open_source(spec)
