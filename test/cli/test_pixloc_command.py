# SPDX-License-Identifier: Apache-2.0
"""``kfloc pixloc`` from files to figures, on a rendered scene in every data set's own layout.

The network's weights are a formula's: trained ones do not come with the project.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycolmap
import pytest
import torch
import yaml
from poster import wall

from kfloc_ros.cli.main import main
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import inverse_pose, make_pose, matrix_to_quaternion, rotation_angle_deg, so3_exp
from kfloc_ros.pixloc.hloc.files import read_poses
from kfloc_ros.pixloc.hloc.layouts import DATA_SETS
from kfloc_ros.pixloc.reference.model import save_model
from kfloc_ros.types import Matrix
from kfloc_ros.visualization.trajectory import read_track
from studies.parity import formula_model

pytestmark = pytest.mark.thorough

CAMERA = Camera(160, 128, 113.0, 113.0, 79.5, 63.5)
INTRINSICS = "PINHOLE 160 128 113 113 80 64"
POINTS = np.c_[np.random.default_rng(1).uniform([-1.5, -1.1], [1.5, 1.1], (260, 2)), np.full(260, 2.5)]
REFERENCES = {
    name: make_pose(so3_exp([0.0, yaw, 0.0]), [x, 0.0, 0.0])
    for name, x, yaw in (("a", -0.02, 0.01), ("b", 0.12, -0.04), ("c", -0.14, 0.04))
}
TRUTH = {
    "p": make_pose(so3_exp([0.005, 0.0, 0.004]), [0.02, -0.015, 0.02]),
    "q": make_pose(so3_exp([-0.004, 0.004, -0.003]), [-0.04, 0.01, 0.015]),
}
QUICK = ["num_iters=30", "method=classic", "stop_period=1", "resize=160", "pad=1", "min_points_opt=20"]


def write_image(path: Path, T: Matrix) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), wall(CAMERA, T)[..., ::-1])


def write_model(folder: Path, poses: dict[str, Matrix]) -> None:
    """A COLMAP model, binary, through pycolmap: image k + 1 is the k-th, point k + 1 the k-th."""
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text(f"1 {INTRINSICS}\n")
    lines, tracks = [], [""] * len(POINTS)
    for number, (name, T_map_camera) in enumerate(poses.items(), start=1):
        T = inverse_pose(T_map_camera)
        x, y, z, w = matrix_to_quaternion(T[:3, :3])
        uv, seen = CameraTensor.from_camera(CAMERA).world2image(torch.from_numpy(POINTS @ T[:3, :3].T + T[:3, 3]))
        rows = np.flatnonzero(seen.numpy())
        lines.append(f"{number} {w} {x} {y} {z} {T[0, 3]} {T[1, 3]} {T[2, 3]} 1 {name}")
        lines.append(" ".join(f"{uv[k, 0] + 0.5} {uv[k, 1] + 0.5} {k + 1}" for k in rows))
        for place, k in enumerate(rows):
            tracks[k] += f" {number} {place}"
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    (folder / "points3D.txt").write_text(
        "".join(f"{k + 1} {x} {y} {z} 0 0 0 0.1{tracks[k]}\n" for k, (x, y, z) in enumerate(POINTS) if tracks[k])
    )
    pycolmap.Reconstruction(str(folder)).write(str(folder))
    for path in folder.glob("*.txt"):
        path.unlink()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "pixloc.safetensors"
    save_model(path, formula_model("vgg16", 0))
    return path


class Tree:
    """The scene in a data set's official layout."""

    def __init__(self, root: Path, name: str, part: str, folders: tuple[str, str] = ("ref", "seq")) -> None:
        self.root, self.name, self.part = root, name, part
        self.layout = DATA_SETS[name].layout
        ref, query = (f"{folder}/" if folder and not folder.endswith("_") else folder for folder in folders)
        self.references = {f"{ref}{k}.jpg": T for k, T in REFERENCES.items()}
        self.truth = {f"{query}{k}.jpg": T for k, T in TRUTH.items()}
        for images, folder in ((self.references, "reference_images"), (self.truth, "query_images")):
            for image, T in images.items():
                write_image(self.at(folder) / image, T)
        write_model(self.at("reference_sfm"), self.references)
        nearest = {f"{query}p.jpg": "abc", f"{query}q.jpg": "acb"}
        pairs = "".join(f"{q} {ref}{r}.jpg\n" for q, order in nearest.items() for r in order)
        self.write("retrieval", pairs)

    def at(self, field: str) -> Path:
        return self.root / getattr(self.layout, field).replace("{part}", self.part)

    def write(self, field: str, text: str) -> None:
        self.at(field).parent.mkdir(parents=True, exist_ok=True)
        self.at(field).write_text(text)

    def write_queries(self, field_text: str = "") -> None:
        path = self.at("query_list")
        path = path.with_name(path.name.replace("*", "day"))
        path.write_text(field_text or "".join(f"{name} {INTRINSICS}\n" for name in self.truth))

    def write_log(self) -> None:
        """hloc's log: a coarse pose, and all points of the first two references as inliers of both."""
        entries = {}
        for name, T_true in self.truth.items():
            T = inverse_pose(T_true @ make_pose(so3_exp([0.004, 0.004, 0.0]), [0.02, 0.01, 0.0]))
            x, y, z, w = matrix_to_quaternion(T[:3, :3])
            ids = list(range(1, len(POINTS) + 1))
            result = {"success": True, "qvec": np.array([w, x, y, z]), "tvec": T[:3, 3], "num_inliers": len(ids),
                      "inliers": [True] * len(ids)}  # fmt: skip
            matches = [(k, [0, 1]) for k in ids]
            entries[name] = {"db": [2, 1, 3], "PnP_ret": result, "points3D_ids": ids,
                             "keypoint_index_to_db": (list(range(len(ids))), matches)}  # fmt: skip
        self.at("hloc_logs").parent.mkdir(parents=True, exist_ok=True)
        self.at("hloc_logs").write_bytes(pickle.dumps({"loc": entries}))

    def run(self, weights: Path, *words: str) -> int:
        out = self.root / "out"
        base = ["pixloc", "run", self.name, "--weights", str(weights), "--dataset", str(self.root), "--quiet"]
        return main([*base, "--eval-dir", str(out), "--device", "cpu", *words, *QUICK])

    def check(self, results: Path, names: list[str], limit_m: float = 0.01) -> None:
        """Poses in the result file are right, and better than where they started."""
        found = read_poses(results)
        assert list(found) == names
        for name, T in found.items():
            truth = TRUTH[Path(name).stem]
            start_m = min(np.linalg.norm(r[:3, 3] - truth[:3, 3]) for r in REFERENCES.values())
            error_m = np.linalg.norm(T[:3, 3] - truth[:3, 3])
            assert error_m < min(limit_m, 0.6 * start_m)
            assert rotation_angle_deg(T[:3, :3].T @ truth[:3, :3]) < 0.4


def log_of(results: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(f"{results}_logs.json").read_text())
    return content


def test_7scenes_from_retrieval(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = Tree(tmp_path, "7scenes", "heads")
    tree.write_queries()
    write_model(tree.at("ground_truth"), tree.truth)
    tree.write("truth_list", "".join(f"{name}\n" for name in tree.truth))
    cache = str(tmp_path / "cache-{scene}.safetensors")
    words = ["--scenes", "heads", "--cache", cache, "refinement.multiscale=[2,1]", "refinement.num_dbs=2"]
    assert tree.run(weights, *words) == 0
    results = tmp_path / "out" / "pixloc_7scenes_heads.txt"
    tree.check(results, ["seq/p.jpg", "seq/q.jpg"])
    said = capsys.readouterr().out
    assert "2 of 2 queries aligned" in said and "1cm, 1deg : 100.00%" in said and "Median errors: 0.00" in said
    log = log_of(results)
    assert log["localization"]["seq/q.jpg"]["references"] == ["ref/a.jpg", "ref/c.jpg"]
    assert log["configuration"]["multiscale"] == "2,1"
    assert (tmp_path / "cache-heads.safetensors").is_file()

    first = results.read_text()
    assert tree.run(weights, *words, "--skip", "2") == 0  # with cached features
    assert results.read_text() == first.splitlines()[0] + "\n"
    assert "100.00%" in capsys.readouterr().out  # what was skipped does not count
    assert tree.run(weights, "--scenes", "heads", "--eval-only") == 0
    assert "1cm, 1deg : 50.00%" in capsys.readouterr().out  # now it does


def test_cambridge_from_poses(tmp_path: Path, weights: Path) -> None:
    tree = Tree(tmp_path, "cambridge", "ShopFacade")
    tree.write_queries()
    tree.write_log()
    assert tree.run(weights, "--scenes", "ShopFacade", "--from_poses") == 0
    results = tmp_path / "out" / "pixloc_Cambridge_ShopFacade.txt"
    tree.check(results, ["seq/p.jpg", "seq/q.jpg"])
    entry = log_of(results)["localization"]["seq/p.jpg"]
    assert sorted(entry["references"]) == ["ref/a.jpg", "ref/b.jpg"]  # c has no inliers
    assert entry["points"] < len(POINTS)  # one residual a point, of those that have three observations
    assert entry["moved_m"] > 0.01


def test_an_experiment_in_the_originals_folders(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights by the training's name, data, dumps and results where the original has them, options in a file."""
    monkeypatch.chdir(tmp_path)
    tree = Tree(tmp_path / "datasets" / "7Scenes", "7scenes", "heads")
    tree.write_queries()
    write_model(tree.at("ground_truth"), tree.truth)
    tree.write("truth_list", "".join(f"{name}\n" for name in tree.truth))
    assert main(["pixloc", "run", "7Scenes", "--scenes", "heads", "--quiet"]) == 2
    assert "no weights in 'outputs/training/pixloc_megadepth'" in capsys.readouterr().err
    folder = tmp_path / "outputs" / "training" / "mine"
    folder.mkdir(parents=True)
    (folder / "pixloc_best.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({
        "experiment": "mine", "features": {"preprocessing": {"resize": 160}}, "refinement": {"multiscale": [1]},
        "optimizer": {"lambda_": 0.0},
    }))  # fmt: skip
    words = [
        "--conf",
        "run.yaml",
        "--scenes",
        "heads",
        "--device",
        "cpu",
        "--quiet",
        "--verbose",
        "--show",
        "shown",
        *QUICK,
    ]
    assert main(["pixloc", "run", "7Scenes", *words]) == 0
    said = capsys.readouterr().out
    assert "no effect here: optimizer.lambda_" in said and "seq/p.jpg: aligned, score 0." in said
    tree.check(tmp_path / "outputs" / "results" / "pixloc_7scenes_heads.txt", ["seq/p.jpg", "seq/q.jpg"])
    track = read_track(tmp_path / "outputs" / "results" / "pixloc_7scenes_heads.txt")
    assert [path.name for path in track.images] == ["p.jpg", "q.jpg"] and track.frames[0].state == "aligned"
    assert np.allclose(track.frames[0].truth, TRUTH["p"], atol=1e-6)
    shown = tmp_path / "shown" / "heads"
    assert {path.name for path in (shown / "alignment").iterdir()} >= {"seq_p.png", "seq_p.mp4", "seq_q.png"}
    assert (shown / "confidence.mp4").is_file() and (shown / "alignment.html").is_file()
    words = [*words, "experiment=mine"]
    assert main(["pixloc", "run", "7Scenes", "--weights", str(weights), *words]) == 2
    assert "omit one" in capsys.readouterr().err


def test_aachen_starts_at_a_mean_of_poses(tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = Tree(tmp_path, "aachen", "")
    tree.write_queries()
    assert tree.run(weights) == 2
    assert "global descriptors" in capsys.readouterr().err
    names = [*tree.references, *tree.truth]
    np.savez(tmp_path / "d.npz", **{name: np.array([1.0, 0.1 * k]) for k, name in enumerate(names)})
    words = ["--global-descriptors", str(tmp_path / "d.npz"), "multiscale=1"]
    assert tree.run(weights, *words) == 0
    results = tmp_path / "out" / "pixloc_Aachen.txt"
    tree.check(results, ["p.jpg", "q.jpg"])
    start = np.array(log_of(results)["localization"]["seq/p.jpg"]["T_map_camera_init"])
    assert not any(np.allclose(start, T) for T in REFERENCES.values())


def test_cmu_makes_its_queries_and_one_file_to_submit(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("2", "3"):
        tree = Tree(tmp_path, "cmu", part, folders=("", "img_1_c0_"))  # names of CMU hold the camera
        listed = tmp_path / f"slice{part}" / f"test-images-slice{part}.txt"
        listed.write_text("".join(f"{name}\n" for name in tree.truth))
    (tmp_path / "intrinsics.txt").write_text(f"# camera model\nc0 {INTRINSICS}\nc1 {INTRINSICS}\n")
    words = ["cmu", "--weights", str(weights), "--dataset", str(tmp_path), "--eval_dir", str(tmp_path), "--quiet"]
    assert main(["pixloc", "run", *words, "--slices", "[2, 3]", "--device", "cpu", *QUICK]) == 0
    together = tmp_path / "pixloc_CMU_slice2-3.txt"
    assert str(together) in capsys.readouterr().out
    assert [line.split()[0] for line in together.read_text().splitlines()] == ["img_1_c0_p.jpg", "img_1_c0_q.jpg"] * 2
    before = at_once = together.read_text()
    words += ["--eval_dir", str(tmp_path / "jobs"), "--jobs"]
    for jobs in ("1", "2"):
        assert main(["pixloc", "run", *words, jobs, "--slices", "2-3", "--device", "cpu", *QUICK]) == 0
        again = (tmp_path / "jobs" / together.name).read_text()
        assert again == (before if jobs == "1" else at_once)
        at_once = again


def test_robotcar_with_inlier_ranking(tmp_path: Path, weights: Path) -> None:
    tree = Tree(tmp_path, "robotcar", "dusk", folders=("ref/rear", "dusk/rear"))
    (tmp_path / "intrinsics").mkdir()
    for side in ("left", "right", "rear"):
        (tmp_path / "intrinsics" / f"{side}_intrinsics.txt").write_text("fx 113.0\nfy 113.0\ncx 80\ncy 64\n")
    tree.write_log()
    words = ["--conditions", "dusk", "--inlier_ranking"]
    assert tree.run(weights, *words) == 0  # but RobotCar's images are 1024 x 1024, and these are not
    log = log_of(tmp_path / "out" / "pixloc_RobotCar_dusk.txt")["localization"]
    assert all("its camera is 1024x1024" in entry["reason"] for entry in log.values())
    tree.write_queries()
    assert tree.run(weights, "--conditions", "dusk", "--inlier-ranking") == 0
    results = tmp_path / "out" / "pixloc_RobotCar_dusk.txt"
    tree.check(results, ["rear/p.jpg", "rear/q.jpg"])
    # 'b' is what the log has first, and retrieval has it second or last
    assert set(log_of(results)["localization"]["dusk/rear/p.jpg"]["references"]) == {"ref/rear/a.jpg", "ref/rear/b.jpg"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["refinement.num_db=3"], "did you mean 'refinement.num_dbs'"),
        (["multiscale=four"], "numbers such as"),
        (["--scenes", "kitchen"], "it has: chess"),
        (["--skip", "0"], "--skip takes 1"),
        (["--results", "all.txt"], "put {scene} into its name"),
        (["--from-poses", "--scenes", "heads"], "query list"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, weights: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["pixloc", "run", "7scenes", "--weights", str(weights), "--dataset", str(tmp_path), "--device", "cpu"]
    assert main([*base, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_picture_of_ones_own_in_a_colmap_model(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    references = {f"{name}.jpg": T for name, T in REFERENCES.items()}
    write_model(tmp_path / "sparse", references)
    for name, T in {**references, "own.jpg": TRUTH["p"]}.items():
        write_image(tmp_path / "images" / name, T)
    picture, values = tmp_path / "fit.png", tmp_path / "pose.json"
    words = ["--map", str(tmp_path / "sparse"), "--images", str(tmp_path / "images"), "--weights", str(weights)]
    words += ["--out", str(picture), "--json", str(values), "--device", "cpu", "multiscale=1", *QUICK]
    assert main(["pixloc", "localize", str(tmp_path / "images" / "own.jpg"), *words]) == 0
    found = json.loads(values.read_text())
    T = np.array(found["T_map_camera"])
    assert np.linalg.norm(T[:3, 3] - TRUTH["p"][:3, 3]) < 0.01
    shown = tmp_path / "shown"
    assert main(["pixloc", "localize", str(tmp_path / "images" / "own.jpg"), *words, "--show", str(shown)]) == 0
    assert cv2.imread(str(shown / "alignment" / "own.png")).shape[0] > 360
    video = cv2.VideoCapture(str(shown / "alignment" / "own.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) >= 9
    assert "/*DATA*/" not in (shown / "alignment.html").read_text()
    assert np.linalg.norm(T[:3, 3] - TRUTH["p"][:3, 3]) < 0.01
    assert capsys.readouterr().out.startswith("own.jpg ")
    drawn = cv2.imread(str(picture))
    assert drawn.shape == (CAMERA.height, CAMERA.width, 3)
    green = (drawn[..., 1].astype(int) - drawn[..., 2] > 60).sum()
    assert green > 200  # the points where they ended


def test_a_picture_of_ones_own_in_a_map(room_map: Path, room: Any, tmp_path: Path) -> None:
    frame = room[3]
    path = tmp_path / "own.png"
    cv2.imwrite(str(path), frame.image[..., ::-1])
    values = tmp_path / "pose.json"
    assert (
        main(["pixloc", "localize", str(path), "--map", str(room_map), "--json", str(values), "--device", "cpu"]) == 0
    )
    found = json.loads(values.read_text())
    assert found["state"] == "TRACKING"
    assert np.linalg.norm(np.array(found["T_map_camera"])[:3, 3] - frame.T_map_camera[:3, 3]) < 0.02
    assert (tmp_path / "own_pose.png").is_file()
