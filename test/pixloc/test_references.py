# SPDX-License-Identifier: Apache-2.0
"""Reference views: nearest by place and direction; points on smooth depth, spread over the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kfloc_ros.device import torch_only
from kfloc_ros.features.backbone import BackboneFeatures
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, so3_exp
from kfloc_ros.pixloc import references
from kfloc_ros.pixloc.references import (
    ReferencePoints,
    ReferenceViews,
    extract_reference_points,
    nearness_of,
    query_points,
    smooth_depth_mask,
    view_distances,
)

CAMERA = Camera(320, 256, 260.0, 260.0, 159.5, 127.5)


def random_features() -> BackboneFeatures:
    generator = torch.Generator().manual_seed(0)

    def maps(channels: int, stride: int) -> torch.Tensor:
        return F.normalize(torch.randn(1, channels, 256 // stride, 320 // stride, generator=generator), dim=1)

    return BackboneFeatures(maps(64, 8), maps(24, 4), maps(128, 8), torch.rand(1, 32, 40, generator=generator))


def test_points_lie_on_the_depth_they_came_from_and_cover_the_image() -> None:
    depth = np.full((256, 320), 2.0, dtype=np.float32)
    T = make_pose(so3_exp([0.1, 0.2, -0.1]), [1.0, 2.0, 3.0])
    points = extract_reference_points(random_features(), depth, CAMERA, T, max_points=200)
    assert len(points) == 200
    P = points.points.double().numpy() @ T[:3, :3] - T[:3, 3] @ T[:3, :3]
    assert np.abs(P[:, 2] - 2.0).max() < 1e-4
    u = P[:, 0] / P[:, 2] * CAMERA.fx + CAMERA.cx
    v = P[:, 1] / P[:, 2] * CAMERA.fy + CAMERA.cy
    buckets = {(int(a), int(b)) for a, b in zip(u // 32, v // 32, strict=True)}
    assert len(buckets) == 80  # every bucket of the 10 x 8 has its best point
    assert torch.allclose(points.coarse.norm(dim=1), torch.ones(200), atol=1e-5)


def test_depth_edges_and_holes_give_no_points() -> None:
    depth = np.full((256, 320), 2.0, dtype=np.float32)
    depth[:, 160:] = 3.0
    depth[100:120, 40:60] = 0.0
    mask = smooth_depth_mask(depth)
    assert not mask[:, 158:162].any()
    assert not mask[98:122, 38:62].any()
    assert mask[50, 50]


def test_nearest_counts_place_and_direction() -> None:
    poses = np.stack(
        [
            make_pose(np.eye(3), [0.5, 0, 0]),
            make_pose(so3_exp([0, np.radians(90), 0]), [0, 0, 0]),
            make_pose(so3_exp([0, np.radians(5), 0]), [0.1, 0, 0]),
        ]
    )
    empty = ReferencePoints(torch.zeros(0, 3), torch.zeros(0, 64), torch.zeros(0, 24), torch.zeros(0))
    views = ReferenceViews((10, 20, 30), poses, (empty, empty, empty))
    assert views.nearest(np.eye(4), 3) == [2, 0, 1]
    assert views.nearest(np.eye(4), 1) == [2]


def test_the_nearest_view_counts_most() -> None:
    poses = np.stack([make_pose(np.eye(3), [x, 0.0, 0.0]) for x in (0.5, 0.0, 0.1)])
    empty = ReferencePoints(torch.zeros(0, 3), torch.zeros(0, 64), torch.zeros(0, 24), torch.zeros(0))
    references = ReferenceViews((0, 1, 2), poses, (empty,) * 3)
    here = np.eye(4)
    assert references.nearest(here, 2) == [1, 2]
    weights = nearness_of(view_distances(poses[[1, 2, 0]], here))
    assert weights[0] == 1.0 and weights[0] > weights[1] > weights[2] > 0.0
    there = make_pose(np.eye(3), [50.0, 0.0, 0.0])
    assert min(nearness_of(view_distances(poses, there))) > 0.9  # far from all of them none is better


def test_views_that_look_past_what_the_camera_sees_come_last() -> None:
    ahead, beside = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[9.0, 0.0, 0.5]])
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = [0.1, 0.5, 2.0]
    parts = tuple(
        ReferencePoints(points.repeat(5, 1), torch.zeros(5, 64), torch.zeros(5, 24), torch.ones(5))
        for points in (beside, ahead, ahead)
    )
    references = ReferenceViews((0, 1, 2), poses, parts)
    camera = Camera(640, 480, 500.0, 500.0, 319.5, 239.5)
    assert references.nearest(np.eye(4), 2) == [0, 1]
    assert references.overlapping(np.eye(4), camera, 2) == [1, 2]
    assert references.overlapping(np.eye(4), camera, 3) == [1, 2, 0]  # still there if there is nothing better


def test_further_views_lend_points_where_little_is_in_view() -> None:
    poses = np.tile(np.eye(4), (4, 1, 1))
    poses[:, 0, 3] = [0.1, 0.2, 0.3, 0.4]
    ahead, beside = torch.tensor([[0.0, 0.0, 3.0]]), torch.tensor([[9.0, 0.0, 0.5]])

    def view(seen: int, unseen: int) -> ReferencePoints:
        points = torch.cat([ahead.repeat(seen, 1), beside.repeat(unseen, 1)])
        n = len(points)
        return ReferencePoints(points, torch.zeros(n, 64), torch.zeros(n, 24), torch.ones(n))

    camera = Camera(640, 480, 500.0, 500.0, 319.5, 239.5)
    full = ReferenceViews((0, 1, 2, 3), poses, tuple(view(300, 0) for _ in range(4)))
    assert full.overlapping(np.eye(4), camera, 2) == [0, 1]
    little = ReferenceViews((0, 1, 2, 3), poses, (view(200, 100), view(200, 100), view(200, 100), view(200, 100)))
    assert little.overlapping(np.eye(4), camera, 2) == [0, 1, 2]
    past = ReferenceViews((0, 1, 2, 3), poses, (view(50, 250), view(40, 260), view(60, 240), view(0, 300)))
    assert past.overlapping(np.eye(4), camera, 2) == [2, 0, 1]
    assert little.best_overlapping(np.eye(4), camera, 2) == [0, 1]
    assert past.best_overlapping(np.eye(4), camera, 2) == [2, 0]


@pytest.mark.parametrize("count", [1, 40, 10_000])
def test_points_of_the_buckets_take_turns(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    uv, score = torch.randint(0, 200, (500, 2), generator=generator).float(), torch.rand(500, generator=generator)
    chosen = references._spread(uv, score, count)
    monkeypatch.setattr(references, "has_numba", lambda: False)
    assert torch.equal(chosen, references._spread(uv, score, count)) and len(chosen) == min(count, 500)
    buckets = [tuple(b) for b in (uv[chosen] // references.BUCKET_PX).long().tolist()]
    first = len({tuple(b) for b in (uv // references.BUCKET_PX).long().tolist()})
    assert len(set(buckets[:first])) == min(first, count)  # no second one before the first of every bucket
    assert (score[chosen][: min(first, count)].diff() <= 0).all()


def test_compiled_loops_choose_the_points_and_views_that_torch_does() -> None:
    features, generator = random_features(), np.random.default_rng(0)
    clouds = [generator.normal([x, 0.0, 2.0], 1.5, (200, 3)) for x in (-1.0, 0.0, 1.0)]
    parts = tuple(
        ReferencePoints(torch.from_numpy(p).float(), torch.zeros(200, 64), torch.zeros(200, 24), torch.ones(200))
        for p in clouds
    )
    views = ReferenceViews((0, 1, 2), np.repeat(np.eye(4)[None], 3, axis=0), parts)
    pose = make_pose(so3_exp([0.1, -0.2, 0.0]), [0.1, 0.0, -0.3])
    pixels, _ = query_points(features, 200)
    in_view = views._in_view(pose, CAMERA, [2, 0, 1])
    with torch_only():
        slow_pixels, _ = query_points(features, 200)
        assert views._in_view(pose, CAMERA, [2, 0, 1]) == in_view and min(in_view) > 0 and max(in_view) < 200
    shared = {tuple(p) for p in pixels.tolist()} & {tuple(p) for p in slow_pixels.tolist()}
    assert len(shared) >= 198  # points whose scores differ by rounding may swap
