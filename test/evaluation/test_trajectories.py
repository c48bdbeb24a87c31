# SPDX-License-Identifier: Apache-2.0
"""Trajectory files of the benchmarks: written, read back, judged, and the command around them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from kfloc_ros.cli.main import main
from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.offline import FrameRecord
from kfloc_ros.evaluation.trajectories import (
    NamedPose,
    Trajectory,
    dcre,
    judged,
    paired,
    read_trajectory,
    submission,
    trajectory_text,
)
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.types import Matrix


def pose(k: float, off_m: float = 0.0) -> Matrix:
    return make_pose(so3_exp([0.1 * k, -0.3, 0.2 * k]), [k + off_m, 0.5, -k])


NAMES = {
    "tum": [""] * 4,
    "rio10": [f"seq02_03/frame-{k:06d}" for k in range(4)],
    "lamar": [f"{1_000_000 + k}/ios_1" for k in range(4)],
    "mapfree": [f"seq1/frame_{k:05d}.jpg" for k in range(4)],
}


def named(form: str) -> list[NamedPose]:
    return [NamedPose(name, 10**9 * (k + 1), pose(k), 10.0 - k) for k, name in enumerate(NAMES[form])]


@pytest.mark.parametrize("form", NAMES)
def test_each_form_is_recognised_and_read_as_it_was_written(form: str, tmp_path: Path) -> None:
    path = tmp_path / "poses.txt"
    path.write_text(trajectory_text(named(form), form))
    found = read_trajectory(path)
    assert found.form == form
    keys = [10**9 * (k + 1) for k in range(4)] if form == "tum" else NAMES[form]
    assert list(found.poses) == keys
    assert all(np.allclose(T, pose(k), atol=1e-7) for k, T in enumerate(found.poses.values()))
    assert found.confidence == ({name: 10.0 - k for k, name in enumerate(keys)} if form == "mapfree" else {})


def test_a_folder_of_pose_files_is_a_trajectory(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / "seq-03").mkdir(exist_ok=True)
        np.savetxt(tmp_path / "seq-03" / f"frame-{k:06d}.pose.txt", pose(k))
    found = read_trajectory(tmp_path)
    assert list(found.poses) == [f"seq-03/frame-{k:06d}" for k in range(3)]
    with pytest.raises(SourceError, match="is a folder"):
        read_trajectory(tmp_path, "tum")


@pytest.mark.parametrize("text", ["", "a b c\n", "name 1 2 3 4 5 6 7\n", "seq02_01/frame-000001 0 0 0 0 1 2 3\n"])
def test_what_is_no_trajectory_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "poses.txt"
    path.write_text(text)
    with pytest.raises(SourceError):
        read_trajectory(path)


def test_a_name_without_an_estimate_is_a_failure() -> None:
    truth = Trajectory("rio10", {f"seq01_02/frame-{k:06d}": pose(k) for k in range(4)})
    estimate = Trajectory("mapfree", {f"frame-{k:06d}": pose(k, 0.03 * k) for k in range(3)})
    judgement, errors = judged(paired(estimate, truth))
    assert (judgement.accuracy.frames, judgement.accuracy.localized) == (4, 3)
    assert judgement.accuracy.recall["5cm_5deg"] == 0.5 and judgement.recall["10cm_1deg"] == 0.75
    assert [round(error.translation_m, 3) for error in errors] == [0, 0.03, 0.06, np.inf]
    assert judgement.catastrophic == 0.0 and judgement.figures()["confidence_auc"] is None
    assert judged(paired(estimate, truth, count="estimates"))[0].accuracy.frames == 3


def test_stamps_are_compared_with_an_interpolated_truth() -> None:
    truth = Trajectory("tum", {10**7 * n: pose(0) + 0.01 * n * np.eye(4, k=3) for n in range(100)})
    estimate = Trajectory("tum", {10**7 * n + 5 * 10**6: truth.poses[10**7 * n] for n in range(0, 90, 10)})
    pairs = paired(estimate, truth)
    assert len(pairs) == 9
    assert judged(pairs)[1][3].translation_m == pytest.approx(0.005)
    counted = paired(estimate, truth, count="truth", max_dt_s=0.006)
    assert len(counted) == 100 and judged(counted)[0].accuracy.localized >= 9
    with pytest.raises(SourceError, match="stamps and the other names"):
        paired(estimate, Trajectory("rio10", {"a": pose(0)}))
    with pytest.raises(SourceError, match="same recording"):
        paired(Trajectory("tum", {10**15: pose(0)}), truth)


def test_confidences_that_sort_good_from_bad_have_the_larger_area() -> None:
    truth = Trajectory("mapfree", {str(k): pose(k) for k in range(10)})
    poses = {str(k): pose(k, 0.0 if k < 5 else 3.0) for k in range(10)}
    sure = {str(k): float(10 - k) for k in range(10)}
    unsure = {name: -value for name, value in sure.items()}
    good, bad = (judged(paired(Trajectory("mapfree", poses, c), truth))[0].confidence_auc for c in (sure, unsure))
    assert good == pytest.approx((5 + sum(5 / n for n in range(6, 11))) / 10)
    assert bad < 0.3 < good
    assert judged(paired(Trajectory("mapfree", poses, sure), truth))[0].catastrophic == 0.5


def test_dcre_is_the_mean_way_of_the_pixels() -> None:
    depth_m = np.full((40, 30), 2.0, np.float32)
    depth_m[:5] = 0
    intrinsics = (25.0, 25.0, 14.5, 19.5)
    T = pose(0)
    assert dcre(T, T, depth_m, intrinsics) < 1e-12
    moved = T @ make_pose(np.eye(3), [0.08, 0, 0])
    assert dcre(T, moved, depth_m, intrinsics) == pytest.approx(25 * 0.08 / 2 / 50)
    turned = T @ make_pose(so3_exp([0, np.pi, 0]), [0, 0, 4.0])
    assert 0.2 < dcre(T, turned, depth_m, intrinsics) <= 1.0
    far = T @ make_pose(np.eye(3), [1e6, 0, 2.0])
    assert dcre(T, far, depth_m, intrinsics) == 1.0
    assert np.isnan(dcre(T, T, np.zeros((4, 3), np.float32), intrinsics))


def test_a_run_is_written_with_the_inverse_deviation_as_confidence(tmp_path: Path) -> None:
    records = [
        FrameRecord(0, 1, None, estimate=pose(1), covariance=0.01 / 3 * np.eye(6), name="a.jpg"),
        FrameRecord(1, 2, None, name="b.jpg"),
        FrameRecord(2, 3, None, estimate=pose(2), name="c.jpg"),
    ]
    path = tmp_path / "results.txt"
    path.write_text(submission(records, "mapfree"))
    found = read_trajectory(path)
    assert list(found.poses) == ["a.jpg", "c.jpg"]
    assert found.confidence == {"a.jpg": 10.0, "c.jpg": 0.0}
    for form in ("lamar", "7scenes"):
        with pytest.raises(SourceError):
            submission(records, form)


@pytest.fixture
def rio10(tmp_path: Path) -> Path:
    names = [f"seq02_02/frame-{k:06d}" for k in range(8)]
    (tmp_path / "seq02" / "seq02_02").mkdir(parents=True)
    for name in names:
        cv2.imwrite(str(tmp_path / "seq02" / f"{name}.rendered.depth.png"), np.full((40, 27), 2000, np.uint16))
    truth = [NamedPose(name, 0, pose(k), 0) for k, name in enumerate(names)]
    estimate = [NamedPose(name, 0, pose(k, 0.02 if k < 4 else 0.3), 0) for k, name in enumerate(names)]
    (tmp_path / "GT.txt").write_text(trajectory_text(truth, "rio10"))
    (tmp_path / "poses.txt").write_text(trajectory_text(estimate[:7], "rio10"))
    (tmp_path / "intrinsics.txt").write_text("seq02_02 756 756 270 480\n")
    rows = [f"{name}\t{0.1 * k}\t{1.0 - 0.1 * k}\n" for k, name in enumerate(names)]
    (tmp_path / "stats.txt").write_text("frame\tNSSD\tNCCOEFF\n" + "".join(rows))
    return tmp_path


def test_the_command_gives_rio10s_figures(rio10: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(rio10 / "poses.txt"), "--truth", str(rio10 / "GT.txt"), "--depth", str(rio10)]
    out = rio10 / "figures.json"
    extra = ["--stats", str(rio10 / "stats.txt"), "--json", str(out), "--errors", str(rio10 / "errors.txt")]
    assert main(["evaluate", *words, *extra]) == 0
    text = capsys.readouterr().out
    assert [line.split() for line in text.splitlines() if line.startswith("NSSD")] == [
        ["NSSD", "100.0", "%", "100.0", "%", "0.0", "%", "0.0", "%"]
    ]
    figures = json.loads(out.read_text())
    assert figures["frames"] == 8 and figures["recall.5cm_5deg"] == 0.5
    assert figures["dcre_below_0.05"] == 0.5 and figures["dcre_below_0.15"] == 0.875
    assert len((rio10 / "errors.txt").read_text().splitlines()) == 7
    assert main(["evaluate", *words, "--require", "recall.5cm_5deg>=0.6"]) == 1
    assert main(["evaluate", *words, "--require", "no_such>=0.6"]) == 2
    assert main(["evaluate", str(rio10 / "none.txt"), "--truth", str(rio10 / "GT.txt")]) == 2
