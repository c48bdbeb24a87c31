# SPDX-License-Identifier: Apache-2.0
"""The saved pose: whole or not there, and not believed when anything about it is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.nodes.pose_file import PoseFileError, SavedPose, delete_pose, load_pose, save_pose

POSE = SavedPose("room 0123", 17, make_pose(so3_exp([0.3, 0.2, 0.1]), [1, 2, 3]), 0.01 * np.eye(6))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pose.json"
    assert load_pose(path, "room 0123") is None
    save_pose(path, POSE)
    saved = load_pose(path, "room 0123")
    assert saved is not None and saved.stamp_ns == 17
    assert np.array_equal(saved.T_map_camera, POSE.T_map_camera)
    assert np.array_equal(saved.covariance, POSE.covariance)
    assert os.listdir(path.parent) == ["pose.json"]


def test_a_pose_of_another_map_is_not_used(tmp_path: Path) -> None:
    save_pose(tmp_path / "pose.json", POSE)
    with pytest.raises(PoseFileError, match="another map"):
        load_pose(tmp_path / "pose.json", "room 4567")


@pytest.mark.parametrize(
    "change",
    [
        {"T_map_camera": np.zeros((4, 4)).tolist()},
        {"T_map_camera": [[1, 0], [0, 1]]},
        {"T_map_camera": None},
        {"T_map_camera": np.diag([1, 1, -1, 1]).tolist()},
        {"T_map_camera": np.full((4, 4), float("nan")).tolist()},
        {"covariance": (-np.eye(6)).tolist()},
        {"covariance": "wide"},
        {"T_map_camera": np.diag([1e200, 1e200, 1e200, 1.0]).tolist()},
        {"T_map_camera": make_pose(np.eye(3), [1e300, 0, 0]).tolist()},
        {"T_map_camera": make_pose(np.eye(3), [0, 0, -1.1e8]).tolist()},
        {"covariance": (1e308 * np.eye(6)).tolist()},
        {"covariance": (np.eye(6) + 5 * (1 - np.eye(6))).tolist()},
        {"covariance": (np.eye(6) + np.triu(np.ones((6, 6)), 1)).tolist()},
        {"stamp_ns": float("inf")},
        {"stamp_ns": 10**3999},
        {"stamp_ns": -1},
        {"stamp_ns": "1"},
        {"version": 2},
        {"format": "something"},
    ],
)
def test_a_damaged_pose_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "pose.json"
    save_pose(path, POSE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PoseFileError):
        load_pose(path, "room 0123")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 50_000, b" " * 200_000])
def test_what_is_no_pose_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pose.json"
    path.write_bytes(content)
    with pytest.raises(PoseFileError):
        load_pose(path, "room 0123")


def test_a_full_disk_is_said_and_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pose.json"
    save_pose(path, POSE)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PoseFileError, match="No space left"):
        save_pose(path, SavedPose("room 0123", 18, POSE.T_map_camera, POSE.covariance))
    saved = load_pose(path, "room 0123")
    assert saved is not None and saved.stamp_ns == 17
    assert os.listdir(tmp_path) == ["pose.json"]


@pytest.mark.parametrize("content", [b"three years of work\n", b"[]", b"{}", b'{"format": "other"}', b"x" * 200_000])
def test_a_file_that_holds_no_pose_is_neither_replaced_nor_removed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    for destroy in (lambda: save_pose(path, POSE), lambda: delete_pose(path)):
        with pytest.raises(PoseFileError, match="name another"):
            destroy()
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(PoseFileError, match="name another"):
        delete_pose(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b'{"format": "kfloc_pose", "version": 1, "ma', b'{"version": 9, "format": "kfloc_pose"}']
)
def test_a_damaged_pose_file_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pose.json"
    path.write_bytes(content)
    save_pose(path, POSE)
    assert load_pose(path, "room 0123") is not None
    delete_pose(path)
    delete_pose(path)
    assert not path.exists()
