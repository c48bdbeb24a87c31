# SPDX-License-Identifier: Apache-2.0
"""Degradations do what they say, to the frames they say, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.training.flow import motion_blur
from kfloc_ros.types import Frame
from studies.degraded import Degradation, Degraded


class Noise(FrameSource):
    """Frames of noise, indices from 100."""

    name = "noise"
    camera = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)  # type: ignore[assignment]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, position: int) -> Frame:
        image = np.random.default_rng(position).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        return Frame(image, self.camera, (position + 1) * 33_000_000, 100 + position)

    def indices(self) -> Sequence[int]:
        return range(100, 160)


def test_nothing_asked_changes_nothing() -> None:
    plain = Degraded(Noise(), Degradation())
    assert list(plain.indices()) == list(range(100, 160))
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain, Noise(), strict=True))


def test_every_third_frame_is_blurred() -> None:
    changed = [
        not np.array_equal(a.image, b.image)
        for a, b in zip(Degraded(Noise(), Degradation(blur_every=3)), Noise(), strict=True)
    ]
    assert changed == [position % 3 == 2 for position in range(60)]


def test_half_the_image_is_covered_for_a_while() -> None:
    source = Degraded(Noise(), Degradation(cover_every=20, cover_frames=10))
    shares = [np.mean(np.any(a.image != b.image, axis=2)) for a, b in zip(source, Noise(), strict=True)]
    assert [share > 0 for share in shares] == [position % 20 >= 10 for position in range(60)]
    assert all(share == pytest.approx(0.5, abs=0.01) for share in shares if share > 0)


def test_dropped_frames_are_the_same_every_time_and_stamps_stay() -> None:
    source = Degraded(Noise(), Degradation(drop_share=0.3))
    assert list(source.indices()) == list(Degraded(Noise(), Degradation(drop_share=0.3)).indices())
    assert 0.5 < len(source) / 60 < 0.9
    assert all(frame.stamp_ns == (frame.index - 99) * 33_000_000 for frame in source)


def test_blur_spreads_a_point_along_its_direction_and_keeps_the_mean() -> None:
    image = np.zeros((61, 61, 3), dtype=np.uint8)
    image[30, 30] = 255
    image[10:20, 10:20] = 200
    blurred = motion_blur(image, 20.0, 0.0)
    assert blurred[30, 22:39].min() > 0
    assert blurred[[25, 35], 30].max() == 0
    flat = np.full((40, 40, 3), 90, dtype=np.uint8)
    assert np.array_equal(motion_blur(flat, 15.0, 1.0), flat)


def test_dropping_everything_is_refused() -> None:
    with pytest.raises(SourceError, match=r"\[0, 1\)"):
        Degradation(drop_share=1.0)
