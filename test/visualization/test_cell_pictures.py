# SPDX-License-Identifier: Apache-2.0
"""Numbers as colours: order, thresholds, and what is not to be trusted."""

from __future__ import annotations

import numpy as np
import torch

from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.types import SceneCoordinates
from kfloc_ros.visualization.cells import (
    NO_VALUE,
    SIGMA,
    Scale,
    coordinates_picture,
    flow_colours,
    flow_picture,
    nis_picture,
    palette,
    sigma_picture,
)


def test_a_logarithmic_scale_puts_the_geometric_mean_in_the_middle() -> None:
    scale = Scale("", 1.0, 100.0, logarithmic=True)
    np.testing.assert_allclose(scale.share([1.0, 10.0, 100.0, 1000.0]), [0.0, 0.5, 1.0, 1.0])
    assert np.isnan(scale.share([np.nan])[0])
    assert tuple(scale.rgb([np.nan])[0]) == NO_VALUE


def test_sigma_is_the_root_of_the_variance_in_centimetres_and_invalid_cells_are_grey() -> None:
    variance = torch.tensor([[0.01**2, 0.10**2]])
    picture = sigma_picture("", variance, torch.tensor([[True, False]]))
    assert picture is not None
    np.testing.assert_array_equal(picture.rgb[0, 0], SIGMA.rgb(1.0))
    assert tuple(picture.rgb[0, 1]) == NO_VALUE
    assert sigma_picture("", None) is None


def test_nis_is_blue_below_its_threshold_and_red_above() -> None:
    picture = nis_picture(torch.tensor([[0.0, 7.815, 100.0]]), threshold=7.815)
    assert picture is not None
    below, at, above = picture.rgb[0].astype(int)
    assert below[2] > below[0] + 50
    assert at.min() > 230
    assert above[0] > above[2] + 50


def test_flow_has_the_hue_of_its_direction_and_uncertain_flow_none() -> None:
    right, left, none = flow_colours(np.array([[3.0, -3.0, 0.0], [0.0, 0.0, 0.0]])).astype(int)
    assert right.argmax() == 0 and right[0] > right[1] + 50
    assert left[0] < left[1] and left[0] < left[2]
    assert none.min() == none.max()
    flow = Flow(torch.ones(2, 1, 3), torch.tensor([[0.1, 4.0, 0.1]]), torch.tensor([[True, True, False]]))
    picture = flow_picture(flow)
    assert picture is not None
    assert [tuple(c) == NO_VALUE for c in picture.rgb[0]] == [False, True, True]


def test_coordinates_are_coloured_by_their_place_in_the_box() -> None:
    mean = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]], [[4.0, 0.0]]])
    coordinates = SceneCoordinates(mean, torch.ones(1, 2), torch.tensor([[True, True]]), 8)
    low_x, high_x = coordinates_picture(coordinates, ((0, 0, 0), (2, 2, 4))).rgb[0].astype(int)
    assert low_x[2] == 255 and low_x[0] == 40
    assert high_x[0] == 255 and high_x[2] == 40


def test_palettes_have_256_colours() -> None:
    assert all(palette(name).shape == (256, 3) for name in ("viridis", "turbo", "balance"))
