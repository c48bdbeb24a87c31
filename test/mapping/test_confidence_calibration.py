# SPDX-License-Identifier: Apache-2.0
"""Calibration of the confidence when a map is built."""

from __future__ import annotations

import numpy as np
import pytest

from kfloc_ros.mapping.calibration import odds_factor


def test_confidences_that_are_right_stay() -> None:
    rights = [k % 10 != 0 for k in range(200)]
    assert odds_factor([0.9] * 200, rights) == pytest.approx(1.0, abs=1e-6)
    assert odds_factor([], []) == 1.0


def test_confidences_that_are_too_high_are_lowered_to_what_was_right() -> None:
    rights = [k % 2 == 0 for k in range(1000)]
    factor = odds_factor([0.9] * 1000, rights)
    odds = 9.0 * factor
    assert odds / (1.0 + odds) == pytest.approx(0.5, abs=0.01)


def test_a_few_images_change_little() -> None:
    assert odds_factor([0.9], [False]) > np.exp(-1.0)
    assert np.isfinite(odds_factor([0.0, 1.0] * 10, [True, False] * 10))
