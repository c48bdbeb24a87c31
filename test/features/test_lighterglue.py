# SPDX-License-Identifier: Apache-2.0
"""The matcher: points of one scene in two views find each other; what is no scene, or no weights, is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kfloc_ros.errors import WeightsError
from kfloc_ros.features.backbone import Backbone, find_weights
from kfloc_ros.features.lighterglue import LighterGlue, PointSet
from kfloc_ros.pixloc.references import query_points


@pytest.fixture(scope="module")
def matcher() -> LighterGlue:
    return LighterGlue()


def points(image) -> PointSet:
    return PointSet(*query_points(Backbone(device="cpu").extract(image), 300), image.shape[1], image.shape[0])


def test_points_of_a_moved_view_are_found_where_they_went(matcher: LighterGlue, room) -> None:
    image = room[3].image
    moved = torch.roll(torch.from_numpy(image), 16, dims=1).numpy()
    first, second = points(image), points(moved)
    pairs = matcher.match(first, second)
    shift = second.pixels[pairs[:, 1]] - first.pixels[pairs[:, 0]]
    assert len(pairs) > 60 and len(set(pairs[:, 1].tolist())) == len(pairs)
    assert ((shift - torch.tensor([16.0, 0.0])).norm(dim=1) < 6).float().mean() > 0.9


def test_points_of_unrelated_images_have_hardly_any_matches(matcher: LighterGlue, room) -> None:
    noise = torch.randint(0, 255, room[3].image.shape, generator=torch.Generator().manual_seed(0)).byte().numpy()
    assert len(matcher.match(points(room[3].image), points(noise))) < 10


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        LighterGlue(find_weights())
    with pytest.raises(WeightsError, match="cannot be read"):
        LighterGlue(tmp_path / "none.pt")
