# SPDX-License-Identifier: Apache-2.0
"""Variances hold 68 % of the errors among the mapped views, and away from them with the power of roughness found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.kfnet.scoordnet import SCoordNet
from kfloc_ros.mapping.calibration import (
    MAX_TURNED,
    ONE_SIGMA,
    TURNS,
    MeasuredView,
    calibrate_measurement,
    scale_of,
    scale_of_worse_runs,
)
from kfloc_ros.mapping.schedule import HeldOut
from kfloc_ros.mapping.views import View, similarity


def view(roughness_m: float, sigmas: float, seed: int, run: int = 1) -> MeasuredView:
    """A view whose errors are so many of the stated sigmas."""
    noise = torch.randn(3000, generator=torch.Generator().manual_seed(seed))
    return MeasuredView(roughness_m, (sigmas * noise).abs(), run)


def test_the_power_is_found_that_errors_grow_with() -> None:
    usual = [view(0.02, 1.2, seed) for seed in range(8)]
    turned = [view(r, 1.2 * (r / 0.02) ** 0.7, 100 + k) for k, r in enumerate((0.05, 0.1, 0.2, 0.4) * 3)]
    found = scale_of(usual, turned)
    assert found.variance_scale == pytest.approx(1.44, rel=0.05)
    assert found.roughness is not None and found.roughness.usual_m == pytest.approx(0.02)
    assert found.roughness.power == pytest.approx(1.4, rel=0.05)
    for seen in turned:  # not only all together
        factor = found.variance_scale * found.roughness.factor(torch.tensor(seen.roughness_m))
        assert (seen.ratios.square() < factor).float().mean() == pytest.approx(ONE_SIGMA, abs=0.04)


def test_views_as_they_are_may_differ_in_roughness_and_keep_their_share() -> None:
    usual = [view(r, max(1.0, (r / 0.02) ** 0.5), seed) for seed, r in enumerate((0.01, 0.02, 0.02, 0.03, 0.015))]
    found = scale_of(usual, [view(0.3, 3.9, 50)])
    assert found.roughness is not None and found.roughness.usual_m == pytest.approx(0.02)
    assert found.roughness.power == pytest.approx(1.0, rel=0.05)
    assert found.variance_scale == pytest.approx(1.0, rel=0.07)


def test_where_turned_views_do_not_ask_for_it_nothing_grows() -> None:
    usual = [view(0.02, 1.5, seed) for seed in range(4)]
    for turned in ([view(0.2, 1.3, 9)], [view(float("nan"), 9.0, 9)], []):
        found = scale_of(usual, turned)
        assert found.roughness is None
        assert found.variance_scale == pytest.approx(2.25, rel=0.05)
    assert scale_of([], [view(0.2, 1.3, 9)]).variance_scale == 1.0


def test_the_worse_half_of_the_runs_decides() -> None:
    generator = torch.Generator().manual_seed(0)

    def run(scale: float, count: int = 20_000) -> torch.Tensor:
        return (scale**0.5 * torch.randn(count, generator=generator)).abs()

    assert scale_of_worse_runs([run(1.5)]) == pytest.approx(1.5, rel=0.05)
    assert scale_of_worse_runs([run(0.5), run(1.2)]) == pytest.approx(1.2, rel=0.05)
    assert scale_of_worse_runs([run(3.0), run(0.5), run(3.0), run(0.6)]) == pytest.approx(3.0, rel=0.05)
    assert scale_of_worse_runs([run(9.0, 20), run(1.0)]) == pytest.approx(1.0, rel=0.05)  # too little to tell
    assert scale_of_worse_runs([]) == 1.0


class Shades:
    """Instead of the backbone: what a cell shows is where it lies on the wall, if the picture is upright."""

    def __init__(self) -> None:
        self.seen = 0

    def extract(self, image: np.ndarray) -> BackboneFeatures:
        self.seen += 1
        cells = torch.from_numpy(image).float().permute(2, 0, 1)[None] / 255.0
        coarse = F.pad(F.avg_pool2d(cells, 8), (0, 0, 0, 0, 0, 61))
        return BackboneFeatures(coarse, coarse[:, :24], torch.zeros(1, 128, 12, 16), coarse[:, 0])


def test_held_out_views_are_looked_at_as_they_are_and_turned() -> None:
    camera = Camera(128, 96, 100.0, 100.0, 63.5, 47.5)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    held = [HeldOut(View(image, np.full((96, 128), 2.0, np.float32), camera, np.eye(4), k), k, 1) for k in range(6)]
    torch.manual_seed(0)
    backbone = Shades()
    found = calibrate_measurement(SCoordNet(width=16, blocks=1).eval(), backbone, held)  # type: ignore[arg-type]
    inner = backbone.seen - len(TURNS) * min(MAX_TURNED, -(-4 // len(TURNS)))
    assert inner == 4  # of six in one run
    assert found.variance_scale > 0


def test_a_turned_view_is_turned_about_its_centre() -> None:
    camera = Camera(128, 96, 100.0, 100.0, 63.5, 47.5)
    turn = similarity(camera, np.radians(90.0), 0.5)
    assert turn @ [64.0, 48.0, 1.0] == pytest.approx([64.0, 48.0])
    assert turn @ [74.0, 48.0, 1.0] == pytest.approx([64.0, 53.0])
