# SPDX-License-Identifier: Apache-2.0
"""The matcher: points of one scene in two views find each other; what is no scene, or no weights, is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
    pairs = matcher.match(matcher.own_context(first), matcher.own_context(second))
    shift = second.pixels[pairs[:, 1]] - first.pixels[pairs[:, 0]]
    assert len(pairs) > 60 and len(set(pairs[:, 1].tolist())) == len(pairs)
    assert ((shift - torch.tensor([16.0, 0.0])).norm(dim=1) < 6).float().mean() > 0.9


def test_points_of_unrelated_images_have_hardly_any_matches(matcher: LighterGlue, room) -> None:
    noise = torch.randint(0, 255, room[3].image.shape, generator=torch.Generator().manual_seed(0)).byte().numpy()
    sets = [matcher.own_context(points(image)) for image in (room[3].image, noise)]
    assert len(matcher.match(*sets)) < 10


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        LighterGlue(find_weights())
    with pytest.raises(WeightsError, match="cannot be read"):
        LighterGlue(tmp_path / "none.pt")


def test_attention_is_that_of_the_published_layers(matcher: LighterGlue) -> None:
    """The file has query, key and value of a channel side by side, and rotates neighbouring channels."""
    state = torch.load(find_weights().with_name("xfeat-lighterglue.pt"), map_location="cpu", weights_only=True)
    name = "matcher.transformers.2.self_attn"
    generator = torch.Generator().manual_seed(0)
    x, positions = torch.randn(50, 96, generator=generator), torch.rand(50, 2, generator=generator)

    def published(rows: torch.Tensor) -> torch.Tensor:
        even, odd = rows[:, 0::2], rows[:, 1::2]
        angle = (positions @ state["matcher.posenc.Wr.weight"].t()).repeat_interleave(2, dim=-1)
        return rows * angle.cos() + torch.stack([-odd, even], dim=-1).reshape(rows.shape) * angle.sin()

    projected = F.linear(x, state[f"{name}.Wqkv.weight"], state[f"{name}.Wqkv.bias"])
    query, key, value = projected.reshape(50, -1, 3).unbind(-1)
    message = F.scaled_dot_product_attention(published(query)[None], published(key)[None], value[None])[0]
    layer = matcher.transformers[2].self_attn
    with torch.inference_mode():
        message = layer.out_proj(message)
        wanted = x + layer.ffn(torch.cat([x, message], dim=-1))
        assert torch.allclose(layer(x, matcher.posenc(positions)), wanted, atol=1e-4)
