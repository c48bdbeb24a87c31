# SPDX-License-Identifier: Apache-2.0
"""KFNet's folders: written from RGB-D, read back as a source, with either size of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from kfloc_ros.cli import main as cli
from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.kfnet import KfnetFolder, scene_points, write_kfnet_folder
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.kfnet.reference.files import read_label, write_label
from kfloc_ros.types import Frame, Matrix

CAMERA = Camera(160, 96, 130.0, 131.0, 79.0, 48.5)


class SlantedWall(FrameSource):
    """A wavy surface in front of a camera that moves; the third frame has no pose."""

    name = "wall"
    camera = CAMERA  # type: ignore[assignment]

    def __len__(self) -> int:
        return 4

    def indices(self) -> Sequence[int]:
        return range(4)

    def pose(self, position: int) -> Matrix:
        return make_pose(so3_exp([0.05 * position, 0.1, -0.2]), [1.0 + 0.1 * position, -2.0, 0.5])

    def __getitem__(self, position: int) -> Frame:
        v, u = np.mgrid[:96, :160]
        depth = (2.0 + 0.004 * u + 0.3 * np.sin(v / 20.0) + 0.1 * np.cos(u / 9.0)).astype(np.float32)
        depth[:10, :20] = 0.0
        image = np.random.default_rng(position).integers(0, 256, (96, 160, 3), dtype=np.uint8)
        pose = None if position == 2 else self.pose(position)
        return Frame(image, CAMERA, (position + 1) * 33_000_000, position, depth_m=depth, T_map_camera=pose)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("poses", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, full: bool, poses: bool) -> None:
    source = SlantedWall()
    written = list(write_kfnet_folder(source, tmp_path / "wall", full_resolution=full))
    assert [frame.index for frame in written] == [0, 1, 3]
    if not poses:  # as the original has it: the pose is in the labels
        (tmp_path / "wall" / "pose_list.txt").unlink()
    again = open_source(f"kfnet:{tmp_path / 'wall'}")
    assert len(again) == 3
    assert again.camera == CAMERA
    for frame, original in zip(again, written, strict=True):
        assert np.array_equal(frame.image, original.image)
        assert frame.T_map_camera is not None and frame.depth_m is not None
        assert original.T_map_camera is not None and original.depth_m is not None
        assert np.allclose(frame.T_map_camera, original.T_map_camera, atol=1e-9 if poses else 2e-4)
        exact = slice(None, None, 1 if full else 8)
        assert np.allclose(frame.depth_m[exact, exact], original.depth_m[exact, exact], atol=1e-3)


def test_lists_name_full_paths_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    list(write_kfnet_folder(SlantedWall(), Path("wall"), absolute=True))
    for kind in ("image", "label", "pose"):
        listed = [Path(line) for line in Path("wall", f"{kind}_list.txt").read_text().splitlines()]
        assert len(listed) == 3 and all(path.is_absolute() and path.is_file() for path in listed)
    assert len(open_source("kfnet:wall")) == 3


def test_transform_centres_the_scene(tmp_path: Path) -> None:
    list(write_kfnet_folder(SlantedWall(), tmp_path / "wall"))
    folder = KfnetFolder(tmp_path / "wall")
    points = np.concatenate([label.points[label.mask] for label in (folder.label(i) for i in range(3)) if label])
    moved = folder.frame.to_network(points)
    assert np.allclose(moved.mean(0), 0, atol=0.05)
    assert np.allclose(folder.frame.to_map(moved), points, atol=1e-5)


def test_sequences_in_one_list_are_told_apart_by_their_stamps(tmp_path: Path) -> None:
    list(write_kfnet_folder(SlantedWall(), tmp_path / "a"))
    list(write_kfnet_folder(SlantedWall(), tmp_path / "b"))
    both = tmp_path
    lines = [str(tmp_path / name / "images" / f"{i:06d}.png") for name in "ab" for i in range(3)]
    (both / "image_list.txt").write_text("\n".join(lines))
    (both / "camera.txt").write_text((tmp_path / "a" / "camera.txt").read_text())
    stamps = [frame.stamp_ns for frame in open_source(f"kfnet:{both}")]
    gaps = np.diff(stamps) / 1e9
    assert [gap > 1 for gap in gaps] == [False, False, True, False, False]
    assert all(frame.T_map_camera is None and frame.depth_m is None for frame in open_source(f"kfnet:{both}"))


def test_labels_of_either_size_agree_and_the_wide_ones_are_cropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points, mask = rng.normal(size=(480, 640, 3)).astype(np.float32), rng.random((480, 640)) > 0.3
    write_label(tmp_path / "full.bin", points, mask)
    assert (tmp_path / "full.bin").stat().st_size == 4_915_200
    write_label(tmp_path / "eighth.bin", points[::8, ::8], mask[::8, ::8])
    full, eighth = (read_label(tmp_path / f"{name}.bin", 640, 480) for name in ("full", "eighth"))
    assert (full.stride, eighth.stride) == (1, 8)
    assert np.array_equal(full.mask[::8, ::8], eighth.mask)
    assert np.array_equal(full.points[::8, ::8][eighth.mask], eighth.points[eighth.mask])
    write_label(tmp_path / "wide.bin", points[:, :100], mask[:, :100])
    assert np.array_equal(read_label(tmp_path / "wide.bin", 96, 480).mask, mask[:, 2:98])
    with pytest.raises(FrameError, match="4915200 bytes"):
        read_label(tmp_path / "full.bin", 320, 240)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    list(write_kfnet_folder(SlantedWall(), tmp_path / "wall"))
    with pytest.raises(SourceError, match="not empty"):
        list(write_kfnet_folder(SlantedWall(), tmp_path / "wall"))
    (tmp_path / "wall" / "label_list.txt").write_text("labels/000000.bin\n")
    with pytest.raises(SourceError, match="1 files for 3 images"):
        KfnetFolder(tmp_path / "wall")
    (tmp_path / "wall" / "label_list.txt").unlink()
    (tmp_path / "wall" / "camera.txt").unlink()
    with pytest.raises(SourceError, match="intrinsics unknown"):
        KfnetFolder(tmp_path / "wall")
    with pytest.raises(SourceError, match="image_list"):
        KfnetFolder(tmp_path)


def test_command_explains_itself_and_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["labels", "kfnet:nowhere", "--out", str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err
    list(write_kfnet_folder(SlantedWall(), tmp_path / "wall"))
    out = tmp_path / "again"
    assert cli.main(["labels", f"kfnet:{tmp_path / 'wall'}", "--eighth", "--out", str(out)]) == 0
    assert "3 labelled images of 3" in capsys.readouterr().out
    assert (out / "labels" / "000002.bin").stat().st_size == 12 * 20 * 16


def colmap_model(root: Path, frames: Sequence[Frame]) -> Path:
    """Frames as COLMAP would leave them: images, poses, and some points, which they see."""
    model = root / "sparse" / "0"
    model.mkdir(parents=True)
    (root / "images").mkdir()
    c = frames[0].camera
    (model / "cameras.txt").write_text(f"1 PINHOLE {c.width} {c.height} {c.fx} {c.fy} {c.cx + 0.5} {c.cy + 0.5}\n")
    first = frames[0]
    assert first.depth_m is not None and first.T_map_camera is not None
    points = scene_points(first.depth_m, c, first.T_map_camera)[16::32, 16::32].reshape(-1, 3)
    tracks: list[list[str]] = [[] for _ in points]
    lines = []
    for k, frame in enumerate(frames):
        assert frame.T_map_camera is not None
        assert cv2.imwrite(str(root / "images" / f"{k}.png"), frame.image[..., ::-1])
        T = inverse_pose(frame.T_map_camera)
        x, y, z, w = matrix_to_quaternion(T[:3, :3])
        lines.append(f"{k + 1} {w} {x} {y} {z} {T[0, 3]} {T[1, 3]} {T[2, 3]} 1 {k}.png")
        local = points @ T[:3, :3].T + T[:3, 3]
        u = local[:, 0] / local[:, 2] * c.fx + c.cx
        v = local[:, 1] / local[:, 2] * c.fy + c.cy
        seen = np.flatnonzero((u > 0) & (u < c.width - 1) & (v > 0) & (v < c.height - 1))
        lines.append(" ".join(f"{u[j] + 0.5} {v[j] + 0.5} {j + 1}" for j in seen))
        for place, j in enumerate(seen):
            tracks[j].append(f"{k + 1} {place}")
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{j + 1} {p[0]} {p[1]} {p[2]} 9 9 9 0.5 {' '.join(tracks[j])}" for j, p in enumerate(points)]
    (model / "points3D.txt").write_text("\n".join(rows) + "\n")
    return root


def test_labels_of_a_colmap_model_lie_on_the_surfaces(
    tmp_path: Path, room: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    walk = [make_pose(so3_exp([0, 0.4 + 0.02 * k, 0]), [0.15 * k - 0.3, 0.1 * (k % 2), -0.6]) for k in range(5)]
    frames = [room.view(T, k) for k, T in enumerate(walk)]
    source = f"colmap:{colmap_model(tmp_path / 'model', frames)}"
    out = tmp_path / "labels"
    assert cli.main(["labels", source, "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "5 labelled images of 5" in said and "depth from motion" in said
    errors, shares = [], []
    for label, frame in zip(open_source(f"kfnet:{out}"), frames, strict=True):
        assert label.depth_m is not None and frame.depth_m is not None
        known = label.depth_m > 0
        shares.append(known.mean())
        errors.append(np.abs(label.depth_m[known] / frame.depth_m[known] - 1))
    error = np.concatenate(errors)
    assert np.mean(shares) > 0.3
    assert np.median(error) < 0.03 and np.mean(error < 0.1) > 0.8
