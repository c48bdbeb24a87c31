# SPDX-License-Identifier: Apache-2.0
"""transform.txt: any isometry, nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kfloc_ros.errors import SourceError
from kfloc_ros.kfnet.reference.frame import NetworkFrame, read_transform, write_transform


def test_principal_axes_decorrelate_and_centre() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2000, 3)) @ rng.normal(size=(3, 3)) + [5.0, -1.0, 2.0]
    moved = NetworkFrame.of_points(points).to_network(points)
    assert np.allclose(moved.mean(0), 0, atol=1e-9)
    covariance = np.cov(moved.T)
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    assert np.all(np.diff(np.diag(covariance)) < 0)


@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_there_and_back_through_a_file(tmp_path: Path, determinant: float) -> None:
    Q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    Q[:, 0] *= determinant * np.linalg.det(Q)
    T = np.eye(4)
    T[:3, :3], T[:3, 3] = Q, [0.1, -7.0, 3.0]
    write_transform(tmp_path / "transform.txt", NetworkFrame(T))
    frame = read_transform(tmp_path / "transform.txt", scale=0.02)
    assert np.array_equal(frame.T_network_map, T)
    points = np.random.default_rng(2).normal(size=(7, 3))
    assert np.allclose(frame.to_map(frame.to_network(points)), points)
    assert np.linalg.norm(frame.to_network(points[0]) - frame.to_network(points[1])) == pytest.approx(
        0.02 * np.linalg.norm(points[0] - points[1])
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1", "stretches"),
        ("1 0 0\n0 1 0\n0 0 1", "4x4"),
        ("1 0 0 0\n0 1 0 0\n0 0 nan 0\n0 0 0 1", "finite"),
        ("a b c d", "not a scene transform"),
    ],
)
def test_what_is_not_an_isometry_is_refused_by_name(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "transform.txt"
    path.write_text(text)
    with pytest.raises(SourceError, match=words) as caught:
        read_transform(path)
    assert "transform.txt" in str(caught.value)
