# SPDX-License-Identifier: Apache-2.0
"""Agreement with the original PixLoc's own numbers, and a comparison that notices when there is none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.errors import SourceError
from studies.parity import TOLERANCE, ParityReport, compare, formula_weights

NUMBERS = Path(
    os.environ.get("KFLOC_PARITY", Path(__file__).parents[2] / ".." / "shared" / "parity" / "pixloc_vgg19.npz")
)


@pytest.fixture(scope="module")
def report() -> ParityReport:
    if not NUMBERS.is_file():
        pytest.skip(f"the original's numbers are not at '{NUMBERS}'; KFLOC_PARITY can name them")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the original ran
    try:
        return compare(NUMBERS)
    finally:
        torch.set_num_threads(threads)


def test_features_and_confidences_agree(report: ParityReport) -> None:
    assert report.max_feature_difference <= TOLERANCE
    assert report.max_confidence_difference <= TOLERANCE


def test_every_iteration_agrees(report: ParityReport) -> None:
    assert report.same_iterations
    assert report.same_valid
    assert report.max_pose_difference <= TOLERANCE
    assert report.max_cost_difference <= TOLERANCE
    assert report.agrees


def test_the_formula_is_seeded_by_name_and_salt() -> None:
    shapes = {
        "extractor.encoder.0.0.weight": torch.zeros(64, 3, 3, 3),
        "extractor.decoder.0.layers.1.weight": torch.zeros(64),
        "extractor.decoder.0.layers.1.num_batches_tracked": torch.tensor(5),
        "optimizer.0.dampingnet.const": torch.zeros(6),
    }
    a, b = formula_weights(shapes, 0), formula_weights(shapes, 1)
    assert a["extractor.encoder.0.0.weight"].std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.05)
    assert a["extractor.decoder.0.layers.1.weight"].mean().item() == pytest.approx(1.0, abs=0.05)
    assert a["extractor.decoder.0.layers.1.num_batches_tracked"].item() == 0
    assert not torch.equal(a["optimizer.0.dampingnet.const"], b["optimizer.0.dampingnet.const"])


def small(**changes: object) -> dict[str, object]:
    """A pair of another encoder, size and salt, with made-up results that nothing can agree with."""
    rng = np.random.default_rng(0)
    numbers: dict[str, object] = {
        "encoder": "vgg16", "salt": 3, "num_iters": 2,
        "image_ref": rng.random((3, 115, 101), dtype=np.float32),
        "image_query": rng.random((3, 115, 101), dtype=np.float32),
        "camera": np.array([101.0, 115, 90, 91, 50, 57, -0.05, 0.01]),
        "points3D_ref": np.c_[rng.uniform(-1.0, 1.0, (80, 2)), np.full(80, 4.0)],
        "iter_level": np.array([2, 1, 0]), "iter_index": np.array([0, 0, 0]),
        "iter_T": np.zeros((3, 12)), "iter_valid": np.array([1, 1, 1]),
        "ref_features0_every16": np.zeros((32, 7, 6), dtype=np.float32),
        "query_confidence1_every1": np.zeros((1, 28, 99), dtype=np.float32),
    }  # fmt: skip
    return numbers | changes


def test_disagreement_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "numbers.npz"
    np.savez(path, **small())  # type: ignore[arg-type]
    found = compare(path)
    assert not found.agrees
    assert found.encoder == "vgg16"
    assert found.max_feature_difference == np.inf  # one of the maps has another shape
    assert found.max_pose_difference > 0.5
    assert not found.same_valid


@pytest.mark.parametrize(
    ("changes", "sentence"), [({"encoder": "vgg99"}, "vgg99"), ({"camera": np.zeros(3)}, "6, 8 or 10")]
)
def test_files_that_cannot_be_compared_are_named(tmp_path: Path, changes: dict[str, object], sentence: str) -> None:
    path = tmp_path / "numbers.npz"
    np.savez(path, **small(**changes))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=sentence):
        compare(path)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="There is no file"):
        compare(tmp_path / "absent.npz")
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="not an archive"):
        compare(tmp_path / "broken.npz")
    np.savez(tmp_path / "empty.npz", salt=1)
    with pytest.raises(SourceError, match="lacks encoder"):
        compare(tmp_path / "empty.npz")
