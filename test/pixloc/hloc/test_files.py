# SPDX-License-Identifier: Apache-2.0
"""Files of the benchmarks and logs of hloc: written, read, and refused where they are not what they should be."""

from __future__ import annotations

import contextlib
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pycolmap
import pytest

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, so3_exp
from kfloc_ros.pixloc.hloc.files import (
    accuracy_text,
    read_hloc_log,
    read_pairs,
    read_poses,
    read_queries,
    result_name,
    write_poses,
)
from kfloc_ros.pixloc.hloc.inert_pickle import read_inert

POSE = make_pose(so3_exp([0.2, -0.5, 0.1]), [1.0, -2.0, 3.0])
T = inverse_pose(POSE)
X, Y, Z, W = matrix_to_quaternion(T[:3, :3])


def test_queries_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "day.txt").write_text("# name model\n\na/1.jpg SIMPLE_RADIAL 640 480 500 320 240 -0.1\n")
    (tmp_path / "night.txt").write_text("b/2.jpg PINHOLE 640 480 500 510 320 240\n")
    found = read_queries(tmp_path / "*.txt")
    assert list(found) == ["a/1.jpg", "b/2.jpg"]
    assert (found["b/2.jpg"].fy, found["b/2.jpg"].cx, found["a/1.jpg"].distortion[0]) == (510, 319.5, -0.1)


def test_pairs_keep_their_rank(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("q1 c\nq1 a\nq2 b\nq1 b\n")
    assert read_pairs(path) == {"q1": ("c", "a", "b"), "q2": ("b",)}


def test_poses_are_written_from_world_to_camera_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out" / "results.txt"
    write_poses(path, {"seq/1.png": POSE, "seq/2.png": np.eye(4)})
    name, *numbers = path.read_text().splitlines()[0].split()
    assert name == "seq/1.png"
    assert np.allclose([float(n) for n in numbers], [W, X, Y, Z, *T[:3, 3]])
    found = read_poses(path)
    assert np.allclose(found["seq/1.png"], POSE)
    assert result_name("query/day/1.png", keep_parent=False) == "1.png"
    assert result_name("query/day/1.png", keep_parent=True) == "day/1.png"


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (read_queries, "a.jpg PINHOLE 640 480 500", "Line 1"),
        (read_queries, "a.jpg PINHOLE", "Line 1"),
        (read_queries, "a.jpg THIN 640 480 500", "THIN"),
        (read_pairs, "a b\na", "Line 2"),
        (read_poses, "a 1 0 0 0 1 2", "Line 1"),
        (read_poses, "a 0 0 0 0 1 2 3", "quaternion"),
        (read_poses, "a 1 0 0 0 1 2 nan", "finite"),
    ],
)
def test_lines_that_do_not_fit_are_named(tmp_path: Path, read: Any, text: str, sentence: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(SourceError, match=sentence):
        read(path)
    with pytest.raises(SourceError):
        read(tmp_path / "absent.txt")


def test_figures_as_the_original_prints_them() -> None:
    truth = {str(k): np.eye(4) for k in range(4)}
    moved = {str(k): make_pose(so3_exp([0, 0, np.radians(0.5)]), [m, 0, 0]) for k, m in enumerate((0.005, 0.015, 0.04))}
    text = accuracy_text(moved, truth)
    assert "Median errors: 0.028m, 0.500deg" in text
    assert "\t1cm, 1deg : 25.00%" in text
    assert "\t5cm, 5deg : 75.00%" in text
    assert "\t500cm, 10deg : 75.00%" in text
    assert "\t500cm, 10deg : 100.00%" in accuracy_text(moved, truth, only_estimated=True)


def entry(**changes: Any) -> dict[str, Any]:
    """What hloc of 2021 wrote of a query."""
    matches = [(np.int64(70), [0, 2]), (np.int64(71), [1]), (np.int64(72), [0])]
    return {
        "db": [5, 9, 4],
        "PnP_ret": {
            "success": True, "qvec": np.array([W, X, Y, Z]), "tvec": T[:3, 3], "num_inliers": 2,
            "inliers": [True, False, True], "cfg": {"model": "PINHOLE"},
        },
        "points3D_ids": [70, 71, 72], "num_matches": 3, "keypoint_index_to_db": ([3, 4, 8], matches),
    } | changes  # fmt: skip


def log(path: Path, protocol: int | None = None, /, **queries: Any) -> Path:
    content = {"features": Path("a.h5"), "matches": Path("b.h5"), "retrieval": Path("c.txt"), "loc": queries}
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_log_of_2021(tmp_path: Path, protocol: int) -> None:
    found = read_hloc_log(log(tmp_path / "x_logs.pkl", protocol, q=entry(), bad=entry(PnP_ret={"success": False})))
    q = found["q"]
    assert q.database_ids == (5, 9, 4)
    assert q.T_map_camera is not None and np.allclose(q.T_map_camera, POSE)
    assert q.num_inliers == 2
    assert q.inlier_counts() == {5: 2, 4: 1}
    assert q.point_ids[q.inliers].tolist() == [70, 72]
    assert found["bad"].T_map_camera is None
    assert found["bad"].inlier_counts() == {}


@pytest.mark.parametrize("mask_name", ["inliers", "inlier_mask"])
def test_a_log_of_today(tmp_path: Path, mask_name: str) -> None:
    result = {
        "cam_from_world": pycolmap.Rigid3d(T[:3]), "num_inliers": 2, mask_name: np.array([True, False, True]),
        "camera": pycolmap.Camera(model="PINHOLE", width=3, height=4, params=[1.0, 1, 1, 1]),
    }  # fmt: skip
    found = read_hloc_log(log(tmp_path / "x_logs.pkl", q=entry(PnP_ret=result), failed=entry(PnP_ret=None)))
    pose = found["q"].T_map_camera
    assert pose is not None and np.allclose(pose, POSE)
    assert found["q"].inlier_counts() == {5: 2, 4: 1}
    assert found["failed"].T_map_camera is None


def test_a_log_with_clusters(tmp_path: Path) -> None:
    clusters = [entry(), entry() | {"cluster_ids": [9, 5, 4]}]
    found = read_hloc_log(log(tmp_path / "x.pkl", q={"db": [5, 9, 4], "best_cluster": 1, "log_clusters": clusters}))
    assert found["q"].database_ids == (9, 5, 4)


class Trap:
    """Runs code when it is unpickled carelessly."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_nothing_in_a_log_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(SourceError, match="not"):
        read_hloc_log(log(tmp_path / "x.pkl", q=Trap(mark)))
    assert not mark.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_come_out_of_a_pickle_as_they_went_in(protocol: int) -> None:
    value = {
        "c": np.arange(6, dtype=np.float32).reshape(2, 3), "f": np.asfortranarray(np.eye(3)[:, :2]),
        "big": np.ones(2, ">i4"), "scalar": np.int64(-3), "flags": np.array([True, False]), "empty": np.zeros((0, 2)),
        "text": np.array(["ab", "c"]),
        "plain": [1, -2.5, None, True, "é", b"\xff", (), (1,), {2}, frozenset({3})], "long": 2**70,
    }  # fmt: skip
    value["again"] = value["c"]
    found = read_inert(pickle.dumps(value, protocol))
    assert found.keys() == value.keys()
    for name, expected in value.items():
        assert np.array_equal(found[name], expected) if name != "plain" else found[name] == expected, name
        if isinstance(expected, np.ndarray):
            assert found[name].dtype == expected.dtype


def test_a_damaged_pickle_is_always_a_value_error() -> None:
    content = pickle.dumps({"loc": {"q": entry()}})
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(content)
        for position in rng.integers(len(content), size=3):
            damaged[position] = rng.integers(256)
        with contextlib.suppress(ValueError):
            read_inert(bytes(damaged[: rng.integers(1, len(damaged) + 1)]))


def test_something_that_contains_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        read_inert(pickle.dumps(endless))


@pytest.mark.parametrize(
    "content", [b"", b"nothing", pickle.dumps([1]), pickle.dumps({"loc": {"q": {"PnP_ret": {"success": True}}}}),
                pickle.dumps({"loc": {"q": 3}}), pickle.dumps({"loc": {"q": entry(db=[1])}})],
)  # fmt: skip
def test_files_that_are_no_logs_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.pkl"):
        read_hloc_log(path)
    with pytest.raises(SourceError, match="cannot be read"):
        read_hloc_log(tmp_path / "absent.pkl")


def nested(levels: int) -> bytes:
    """Opcodes of a tuple that holds two numbers, in a tuple that holds it twice, and so on: 2^levels values."""
    return b"(I1\nI1\ntp0\n" + b"".join(b"(g%d\ng%d\ntp%d\n" % (i - 1, i - 1, i) for i in range(1, levels)) + b"0"


@pytest.mark.parametrize(
    "content",
    [
        nested(200) + b"(g199\nI1\nd.",
        b"\x80\x04" + nested(200) + b"\x8f(g199\n\x90.",
        b"\x80\x04" + nested(200) + b"(g199\n\x91.",
        nested(200) + b"g199\n.",
        nested(200) + b"(S'loc'\n(S'q'\ng199\ndd.",
        b"\x80\x04(" + b"\x8f" * 2_000_000 + b"t.",
    ],
    ids=["as a key", "in a set", "in a frozenset", "as the value", "in a log", "many sets"],
)
def test_a_pickle_that_says_more_than_it_holds_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x_logs.pkl"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(SourceError, match="damaged or not hloc's"):
        read_hloc_log(path)
    assert time.process_time() - start < 5


def test_tuples_of_plain_values_are_keys() -> None:
    value = {("a", 1): {2, (3, "b")}, "c": frozenset({4})}
    for protocol in range(2, 6):
        assert read_inert(pickle.dumps(value, protocol=protocol)) == value
