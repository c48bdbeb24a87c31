# SPDX-License-Identifier: Apache-2.0
"""Poses from the images alone: right up to a motion, in metres, upright; and what cannot be told is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.posed_images import write_calibration
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource, Selection
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.mapping import structure, structure_scale, structure_solver
from kfloc_ros.mapping.structure import reconstruct, with_principal_point
from kfloc_ros.mapping.structure_scale import KnownLength, ReconstructedSource, Unscaled, known_length, scale_from_poses
from kfloc_ros.types import Frame

pytestmark = pytest.mark.thorough


class Walk(FrameSource):
    """Ten views of the room from a camera that moves sideways, as its images, depth and rough poses."""

    name = "walk"

    def __init__(self, room) -> None:
        self.frames = []
        for k in range(10):
            R = so3_exp(np.array([0.02 * np.sin(k), 0.05 * np.cos(2.0 * k), 0.0]))
            self.frames.append(room.view(make_pose(R, [-0.9 + 0.2 * k, 0.05 * np.sin(k), -0.8]), k))

    @property
    def camera(self):
        return self.frames[0].camera

    def __len__(self) -> int:
        return len(self.frames)

    def indices(self) -> Sequence[int]:
        return range(len(self.frames))

    def __getitem__(self, position: int) -> Frame:
        return self.frames[position]


class Blind(Walk):
    """The same as images and nothing else."""

    def __getitem__(self, position: int) -> Frame:
        return replace(self.frames[position], depth_m=None, T_map_camera=None)


@pytest.fixture(scope="module")
def walk(room) -> Walk:
    return Walk(room)


def centres(source: FrameSource) -> np.ndarray:
    return np.stack([T[:3, 3] for k in range(len(source)) if (T := source.pose(k)) is not None])


def distances(source: FrameSource) -> np.ndarray:
    c = centres(source)
    return np.linalg.norm(c[:, None] - c[None], axis=2)


@pytest.fixture(scope="module")
def found(walk, tmp_path_factory) -> ReconstructedSource:
    folder = tmp_path_factory.mktemp("sfm")
    stages: dict[str, float] = {}
    source = reconstruct(walk, folder / "walk", on_progress=lambda stage, share: stages.update({stage: share}))
    assert stages["writing images"] == 1.0 and stages["placing images at once"] == 1.0
    again = open_source(f"colmap:{folder / 'walk'}")  # the model that is kept is the same map frame
    np.testing.assert_allclose(again[3].T_map_camera, source[3].T_map_camera, atol=1e-6)
    return source


def test_poses_are_found_and_the_depth_makes_them_metric(walk, found) -> None:
    assert len(centres(found)) == len(walk)
    assert np.abs(distances(found) - distances(walk)).max() < 0.03
    assert found[4].depth_m is not None and found.visible_points(4).shape[0] > 50


@pytest.mark.parametrize("at_once", [True, False])
def test_many_images_are_placed_at_once_or_those_between_find_their_place_among_the_others(
    walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    monkeypatch.setattr(structure_solver, "KEY_IMAGES", 5)
    monkeypatch.setattr(structure_solver, "EXHAUSTIVE_IMAGES", 5)
    if not at_once:
        monkeypatch.setattr(structure_solver, "_global", lambda *given: None)
    shares: list[float] = []
    source = reconstruct(walk, tmp_path / "walk", on_progress=lambda stage, share: shares.append(share))
    assert [k for k in range(len(source)) if source.pose(k) is not None] == list(range(10))
    np.testing.assert_allclose(distances(source), distances(walk), atol=0.03)
    assert shares[-1] == 1.0


def test_the_larger_model_is_taken_where_neither_way_places_all_images(
    walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure_solver, "ENOUGH_AT_ONCE", 1.1)
    incremental = structure_solver._incremental
    monkeypatch.setattr(
        structure_solver, "_incremental", lambda d, i, out, names, *o: incremental(d, i, out, names[:8], *o)
    )
    source = reconstruct(walk, tmp_path / "walk")
    assert [k for k in range(len(source)) if source.pose(k) is not None] == list(range(10))


def test_parts_that_few_points_join_are_not_one_model(walk, tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    reconstruct(walk, tmp_path / "walk")
    model = pycolmap.Reconstruction(tmp_path / "walk" / "sparse")
    assert structure_solver._joined(model).num_reg_images() == 10
    part = {image_id: image.name < "000006.png" for image_id, image in model.images.items()}
    across = [
        key
        for key, point in model.points3D.items()
        if len({part[element.image_id] for element in point.track.elements}) == 2
    ]
    for key in across[structure_solver.MIN_SHARED - 1 :]:
        model.delete_point3D(key)
    joined = structure_solver._joined(model)
    assert sorted(joined.images[key].name for key in joined.reg_image_ids()) == [f"{k:06d}.png" for k in range(6)]


@pytest.mark.parametrize(("views", "at_once"), [(4, 160), (30, 160), (30, 10)])
def test_the_principal_point_is_found_if_the_images_contradict_the_middle(
    views: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A camera whose principal point is 12 px from the middle: many views tell it, four with noise do not."""
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions(num_rigs=1, num_cameras_per_rig=1, num_frames_per_rig=views)
    options.num_points3D, options.camera_width, options.camera_height = 50 * views, 640, 480
    options.camera_model_id, options.camera_params = pycolmap.CameraModelId.SIMPLE_RADIAL, [500.0, 320.0, 252.0, 0.0]
    pycolmap.set_random_seed(0)
    model = pycolmap.synthesize_dataset(options)
    noise = pycolmap.SyntheticNoiseOptions(point2D_stddev=0.2)
    pycolmap.synthesize_noise(noise, model)
    (camera,) = model.cameras.values()
    camera.params = [500.0, 320.0, 240.0, 0.0]
    monkeypatch.setattr(structure, "CAMERA_IMAGES", at_once)
    adjusted = with_principal_point(model)
    (camera,) = adjusted.model.cameras.values()
    assert adjusted.focal_sigma is not None
    if views == 4:
        assert adjusted.model is model and list(camera.params) == [500.0, 320.0, 240.0, 0.0]
        assert adjusted.focal_sigma > structure_scale.DOUBTED_FOCAL_SIGMA
    else:
        assert camera.params[1:3] == pytest.approx([320.0, 252.0], abs=1.0)
        assert adjusted.model.compute_mean_reprojection_error() < 0.3
        assert adjusted.focal_sigma < structure_scale.DOUBTED_FOCAL_SIGMA


def test_a_model_of_several_cameras_stays() -> None:
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions(num_rigs=2, num_cameras_per_rig=1, num_frames_per_rig=8)
    model = pycolmap.synthesize_dataset(options)
    adjusted = with_principal_point(model)
    assert len(model.cameras) == 2 and adjusted.model is model and adjusted.focal_sigma is None


def test_a_focal_length_that_the_images_hardly_tell_is_told(walk) -> None:
    def doubt(sigma: float | None) -> str:
        return ReconstructedSource(walk, {}, {}, focal_sigma=sigma).camera_doubt

    assert not doubt(None) and not doubt(0.001)
    assert "to 1.6 % at best" in doubt(0.016) and "camera.txt" in doubt(0.016)


def test_the_map_frame_has_its_z_axis_upwards(found) -> None:
    down = np.mean([found.pose(k)[:3, 1] for k in range(len(found))], axis=0)
    assert down[2] < -0.95


def test_points_that_an_image_sees_lie_where_it_sees_them(walk, found) -> None:
    T = np.linalg.inv(found.pose(5))
    local = found.visible_points(5) @ T[:3, :3].T + T[:3, 3]
    camera = walk.camera
    u, v = (
        np.round(f * local[:, k] / local[:, 2] + c)
        for k, f, c in ((0, camera.fx, camera.cx), (1, camera.fy, camera.cy))
    )
    inside = (u >= 0) & (u < camera.width) & (v >= 0) & (v < camera.height)
    assert inside.mean() > 0.95
    depth = walk[5].depth_m[v[inside].astype(int), u[inside].astype(int)]
    assert np.median(np.abs(local[inside, 2] / depth - 1)) < 0.02


def test_too_few_images_and_a_folder_that_is_there_are_refused(walk, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="exists"):
        reconstruct(walk, tmp_path)
    with pytest.raises(SourceError, match=r"could be registered"):
        reconstruct(Selection(walk, [0, 1, 2]), tmp_path / "few")
    assert [path.name for path in tmp_path.iterdir()] == ["few"]  # a model that was made is kept
    assert len(open_source(f"colmap:{tmp_path / 'few'}")) == 3


def test_the_scale_comes_from_other_poses_wherever_their_frame_is(walk) -> None:
    known = {k: frame.T_map_camera for k, frame in enumerate(walk.frames)}
    elsewhere = make_pose(so3_exp(np.array([0.4, 1.0, -0.3])), [9.0, 2.0, 1.0])
    model = {}
    for k, T in known.items():
        model[k] = elsewhere @ T
        model[k][:3, 3] /= 2.5
    assert scale_from_poses(model, known) == pytest.approx(2.5)
    known[3] = np.full((4, 4), np.inf)
    assert scale_from_poses(model, known) == pytest.approx(2.5)
    assert scale_from_poses(model, {}) is None


def test_a_length_on_the_command_line() -> None:
    assert known_length(None) is None
    assert known_length(["0", "12", "1.5"]) == KnownLength(0, 12, 1.5)
    with pytest.raises(SourceError, match="two frame numbers"):
        known_length(["0", "x", "1.5"])


def test_a_folder_of_images_and_a_video_are_sources(walk, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    video = cv2.VideoWriter(str(tmp_path / "walk.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 20.0, (320, 256))
    for k, frame in enumerate(walk.frames):
        bgr = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(folder / f"photo{k}.png"), bgr)
        video.write(bgr)
    video.release()
    photos = open_source(str(folder))
    assert len(photos) == 10 and photos.camera_is_guess and photos[2].T_map_camera is None
    np.testing.assert_array_equal(photos[2].image, walk[2].image)
    (folder / "camera.txt").write_text("320 256 260 260 159.5 127.5")
    assert main(["map", "build", str(tmp_path / "walk.avi"), "--out", str(tmp_path / "map")]) == 2
    assert "--sfm" in capsys.readouterr().err
    assert not open_source(str(folder)).camera_is_guess and open_source(str(folder)).camera == walk.camera
    assert main(["localize", str(tmp_path / "walk.avi"), "--map", "demo_room", "--out", str(tmp_path / "out")]) == 2
    assert "DIR/camera.txt" in capsys.readouterr().err
    film = open_source(f"video:{tmp_path / 'walk.avi'}?every=3")
    assert len(film) == 4 and film.camera_is_guess
    for position in (2, 0, 1):
        difference = np.abs(film[position].image.astype(int) - walk[3 * position].image)
        assert difference.mean() < 12
    with pytest.raises(SourceError, match="every=10"):
        open_source(f"video:{tmp_path / 'walk.avi'}?each=3")


def test_how_well_the_images_tell_their_camera_is_kept_with_the_model(walk, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, frame in enumerate(walk.frames):
        cv2.imwrite(str(folder / f"{k}.png"), cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR))
    found = reconstruct(open_source(str(folder)), tmp_path / "model", method=Unscaled())
    again = reconstruct(open_source(str(folder)), tmp_path / "model", method=Unscaled())
    assert found.focal_sigma is not None and found.focal_sigma == again.focal_sigma > 0
    assert found.camera == again.camera and (tmp_path / "model" / "camera.txt").is_file()


@pytest.mark.parametrize("words", [["labels"], ["train", "scoordnet"], ["map", "build"]])
def test_what_needs_poses_says_how_to_find_them(walk, tmp_path: Path, capsys, words: list[str]) -> None:
    for k, frame in enumerate(walk.frames[:3]):
        cv2.imwrite(str(tmp_path / f"{k}.png"), frame.image)
    (tmp_path / "camera.txt").write_text("320 256 260 260 159.5 127.5")  # the camera is known, the poses are not
    assert main([*words, f"images:{tmp_path}", "--out", str(tmp_path / "out")]) == 2
    assert "--sfm" in capsys.readouterr().err


def test_a_camera_that_was_found_can_be_put_beside_other_images_of_it(walk, tmp_path: Path) -> None:
    camera = replace(walk.camera, distortion_model="plumb_bob", distortion=(-0.03, 0.0, 0.0, 0.0, 0.0))
    write_calibration(tmp_path / "camera.txt", camera)
    cv2.imwrite(str(tmp_path / "0.png"), walk[0].image)
    source = open_source(f"images:{tmp_path}")
    assert source.camera == camera and not source.camera_is_guess
