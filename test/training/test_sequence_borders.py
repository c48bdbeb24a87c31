# SPDX-License-Identifier: Apache-2.0
"""Training pairs and groups stay within one recording, in every source that joins several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.derived import Sequences, recordings
from kfloc_ros.datasets.kfnet import write_kfnet_folder
from kfloc_ros.frames import FrameSource, Selection
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.training.flow import FlowPairs
from kfloc_ros.training.kfnet_family import HeldOutFrames
from kfloc_ros.training.kfnet_samples import Samples, consecutive
from kfloc_ros.types import Frame

CAMERA = Camera(64, 48, 60.0, 60.0, 32.0, 24.0)


class Recording(FrameSource):
    """Frames of one recording; each image says by its grey level which."""

    camera = CAMERA  # type: ignore[assignment]

    def __init__(self, number: int, indices: Sequence[int] = range(3)) -> None:
        self.name, self._number, self._indices = f"recording{number}", number, indices

    def __len__(self) -> int:
        return len(self._indices)

    def indices(self) -> Sequence[int]:
        return self._indices

    def __getitem__(self, position: int) -> Frame:
        image = np.full((48, 64, 3), 40 * self._number, dtype=np.uint8)
        T, index = np.eye(4), self._indices[position]
        return Frame(image, CAMERA, index, index, depth_m=np.full((48, 64), 2, np.float32), T_map_camera=T)


def write_image(path: Path, value: int, width: int = 64, height: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), value, dtype=np.uint8))


def sequences(folder: Path) -> FrameSource:
    return Sequences("joined", [Recording(0), Recording(1)])


def kfnet_folders(folder: Path) -> FrameSource:
    """As the original lists them: full paths, sequences one after the other."""
    paths = [folder / f"seq-{k // 3:02d}" / f"frame-{k % 3:06d}.color.png" for k in range(6)]
    return kfnet_list(folder, paths)


def kfnet_numbers(folder: Path) -> FrameSource:
    """Two recordings in one folder, told apart by their numbers alone."""
    return kfnet_list(folder, [folder / "all" / f"frame-{n:06d}.png" for n in (0, 1, 2, 500, 501, 502)])


def kfnet_of_twelve_scenes(folder: Path) -> FrameSource:
    """One numbering over both sequences; the border is in the dataset's own file alone."""
    (folder / "split.txt").write_text("sequence0 [start=0 ; end=2]\nsequence1 [start=3 ; end=5]\n")
    return kfnet_list(folder, [folder / "data" / f"frame-{k:06d}.color.png" for k in range(6)])


def kfnet_list(folder: Path, paths: Sequence[Path]) -> FrameSource:
    for k, path in enumerate(paths):
        write_image(path, 40 * (k // 3))
    (folder / "image_list.txt").write_text("".join(f"{path}\n" for path in paths))
    (folder / "camera.txt").write_text("64 48 60 60 32 24\n")
    return open_source(f"kfnet:{folder}")


def labels_of_joined(folder: Path) -> FrameSource:
    list(write_kfnet_folder(Sequences("joined", [Recording(0), Recording(1)]), folder / "labels"))
    return open_source(f"kfnet:{folder / 'labels'}")


def labels_of_blocks(folder: Path) -> FrameSource:
    """Frames 0 to 2 and 150 to 152 of one recording, as a split leaves them."""
    list(write_kfnet_folder(Recording(1, [0, 1, 2, 150, 151, 152]), folder / "labels"))
    return open_source(f"kfnet:{folder / 'labels'}")


def seven_scenes(folder: Path) -> FrameSource:
    for k in range(6):
        stem = folder / "heads" / f"seq-{1 + k // 3:02d}" / f"frame-{k % 3:06d}"
        write_image(stem.with_suffix(".color.png"), 40 * (k // 3), 640, 480)
        np.savetxt(stem.with_suffix(".pose.txt"), np.eye(4))
    (folder / "heads" / "TrainSplit.txt").write_text("sequence1\nsequence2\n")
    return open_source(f"7scenes:{folder / 'heads'}@train")


def twelve_scenes(folder: Path) -> FrameSource:
    kfnet_of_twelve_scenes(folder)
    (folder / "split.txt").write_text("sequence0 [start=9 ; end=9]\nsequence1 [start=0 ; end=2]\n"
                                      "sequence2 [start=3 ; end=5]\n")  # fmt: skip
    calibration = "60 0 32 0 0 60 24 0 0 0 1 0 0 0 0 1"
    (folder / "info.txt").write_text(
        "".join(f"m_{kind}Width = 64\nm_{kind}Height = 48\n" for kind in ("color", "depth"))
        + f"m_calibrationColorIntrinsic = {calibration}\nm_calibrationDepthIntrinsic = {calibration}\n"
    )
    return open_source(f"12scenes:{folder}@train")


def cambridge(folder: Path) -> FrameSource:
    lines = ["", "", ""]
    for k in range(6):
        name = f"seq{1 + k // 3}/frame{k % 3:05d}.png"
        write_image(folder / name, 40 * (k // 3))
        lines.append(f"{name} 0 0 0 1 0 0 0")
    (folder / "dataset_train.txt").write_text("\n".join(lines))
    return open_source(f"cambridge:{folder}@train")


def deeploc(folder: Path) -> FrameSource:
    for part, first in (("train", 0), ("test", 3)):
        for k in range(first, first + 3):
            write_image(folder / part / "LeftImages" / f"Image_{k}.png", 40 * (k // 3))
        lines = [f"Image_{k} 0 0 0 1 0 0 0\n" for k in range(first, first + 3)]
        (folder / part / "poses.txt").write_text("".join(lines))
    (folder / "camera.txt").write_text("64 48 60 60 32 24\n")
    return open_source(f"deeploc:{folder}")


JOINING = [
    sequences, kfnet_folders, kfnet_numbers, kfnet_of_twelve_scenes, labels_of_joined, labels_of_blocks, seven_scenes,
    twelve_scenes, cambridge, deeploc,
]  # fmt: skip


@pytest.mark.parametrize("joining", JOINING, ids=lambda joining: joining.__name__)
def test_no_group_crosses_a_border(joining: Callable[[Path], FrameSource], tmp_path: Path) -> None:
    """Of six frames of two recordings there are two pairs in each and one group of three, however they are chosen."""
    source = joining(tmp_path)
    assert len(source) == 6
    for part in (source, Selection(source, range(6))):
        assert list(part.sequences()) == [0, 0, 0, 1, 1, 1] or len(set(np.diff(part.sequences()).nonzero()[0])) == 1
        assert [tuple(group) for group in consecutive(part, 2)] == [(0, 1), (1, 2), (3, 4), (4, 5)]
        assert [tuple(group) for group in consecutive(part, 3)] == [(0, 1, 2), (3, 4, 5)]
        assert consecutive(part, 2, spacing=3) == [] and consecutive(part, 4, max_step=1000) == []


def test_all_that_trains_on_neighbours_heeds_the_borders() -> None:
    source = Sequences("joined", [Recording(1), Recording(2)])
    pairs = FlowPairs([source], max_step=4, augment=False)
    for number in range(30):
        first, second = pairs[number].images.mean(dim=(1, 2, 3)).tolist()
        assert first == second  # the grey level of one recording
    groups = Samples(source, 2, both_directions=True)
    assert len(groups) == 8
    assert all(groups[k].images[0].mean() == groups[k].images[1].mean() for k in range(8))
    held_out = HeldOutFrames(source, CAMERA, device="cpu")  # type: ignore[arg-type]
    assert held_out.runs(3, 10) == [range(0, 3), range(3, 6)]


def test_a_gap_in_a_joined_part_is_a_border_too() -> None:
    source = Sequences("joined", [Recording(0, [0, 1, 7, 8]), Recording(1)])
    assert list(source.indices()) == list(range(7))
    assert [tuple(group) for group in consecutive(source, 2)] == [(0, 1), (2, 3), (4, 5), (5, 6)]


def test_pauses_and_steps_back_begin_another_recording_and_uneven_steps_do_not() -> None:
    assert recordings([0] * 6, [0, 33, 66, 130, 163, 196]) == [0] * 6  # a dropped frame
    assert recordings([0] * 6, [0, 33, 66, 5000, 5033, 5066]) == [0, 0, 0, 1, 1, 1]
    assert recordings([0] * 4, [5, 6, 0, 1]) == [0, 0, 1, 1]
    assert recordings("aabba") == [0, 0, 1, 1, 2]
    assert recordings([]) == [] and recordings("a", [7]) == [0]
