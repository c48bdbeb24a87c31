# SPDX-License-Identifier: Apache-2.0
"""What is said of a recording while it is made: blur, speed, views, loops, and when it is enough."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from kfloc_ros.geometry.lie import make_pose
from kfloc_ros.mapping.recording_watch import RecordingWatch, WatchSettings
from kfloc_ros.simulation.trajectory import look_at

Image = NDArray[np.uint8]
WIDTH, HEIGHT = 320, 240
SETTINGS = WatchSettings(min_duration_s=20.0, min_keyframes=10)


@pytest.fixture(scope="module")
def wall() -> Image:
    """A long wall with details of many sizes."""
    rng = np.random.default_rng(4)
    shape = (HEIGHT, 6 * WIDTH)
    layers = [
        cv2.resize(rng.random((shape[0] // k, shape[1] // k)).astype(np.float32), shape[::-1]) for k in (3, 8, 30)
    ]
    mixed = sum(layers) / 3
    return np.asarray(255 * np.clip(3 * (mixed - 0.5) + 0.5, 0, 1), dtype=np.uint8)


def view(wall: Image, place: float) -> Image:
    """What a camera sees that has gone ``place`` image widths along the wall, which is closed to a ring."""
    start = int(place * WIDTH) % wall.shape[1]
    return np.ascontiguousarray(np.roll(wall, -start, axis=1)[:, :WIDTH])


def walk(watch: RecordingWatch, wall: Image, laps: float, *, speed: float = 0.15, blur: float = 0.0) -> list[str]:
    """Walk along the ring at 10 Hz with ``speed`` image widths a second; what was said, in order."""
    said = []
    for number in range(int(laps * 6 / speed * 10)):
        image = view(wall, number * speed / 10)
        if blur:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), blur), np.uint8)
        said.append(watch.add(10**9 + number * 100_000_000, image))
    return said


def test_a_walk_that_returns_is_enough_and_says_nothing(wall: Image) -> None:
    watch = RecordingWatch(SETTINGS)
    said = walk(watch, wall, 1.3)
    report = watch.report()
    assert set(said) == {""}
    assert report.is_enough, report.missing
    assert report.loops > 0 and report.loop_share > 0.6 and report.keyframes >= 10 and np.isnan(report.heading_share)


def test_an_open_end_is_not_enough(wall: Image) -> None:
    watch = RecordingWatch(SETTINGS)
    walk(watch, wall, 0.8)
    report = watch.report()
    assert report.loops == 0 and any("Return to where you began" in sentence for sentence in report.missing)


def test_standing_still_shows_too_little(wall: Image) -> None:
    watch = RecordingWatch(SETTINGS)
    for number in range(300):
        watch.add(10**9 + number * 100_000_000, view(wall, 0.0))
    report = watch.report()
    assert report.keyframes == 1 and any(sentence.startswith("Show more") for sentence in report.missing)


def test_a_fast_walk_is_told(wall: Image) -> None:
    watch = RecordingWatch(SETTINGS)
    assert "Slower" in " ".join(walk(watch, wall, 1.0, speed=1.2))
    assert watch.report().fast_share > 0.5


def test_blurred_images_are_told_and_count(wall: Image) -> None:
    watch = RecordingWatch(SETTINGS)
    walk(watch, wall, 0.5)
    told = []
    for number in range(40):
        image = np.asarray(cv2.blur(view(wall, 3 + 0.01 * number), (15, 1)), np.uint8)
        told.append(watch.add(10**12 + number * 100_000_000, image))
    assert sum("Blurred" in sentence for sentence in told) > 30
    assert watch.report().sharp_share < 1.0


def test_directions_count_where_poses_are_known(wall: Image) -> None:
    one_way, both = RecordingWatch(SETTINGS), RecordingWatch(SETTINGS)
    for number in range(80):
        target = [np.cos(number / 10), np.sin(number / 10), 1.0]
        stamp_ns, image = 10**9 + number * 100_000_000, view(wall, 0.01 * number)
        one_way.add(stamp_ns, image, look_at([0.5, 0.5, 1.0], [5.0, 0.5, 1.0]))
        both.add(stamp_ns, image, look_at([0.5, 0.5, 1.0], np.add([0.5, 0.5, 0.0], target)))
    assert any("Look the other way" in sentence for sentence in one_way.report().missing)
    assert both.report().heading_share == 1.0
    assert one_way.report().cells == both.report().cells == 1


def test_images_without_any_detail_and_of_another_size_do_no_harm(wall: Image) -> None:
    watch = RecordingWatch(replace(SETTINGS, min_keyframes=1))
    for number, image in enumerate(
        [np.zeros((HEIGHT, WIDTH), np.uint8), view(wall, 0), np.full((50, 60, 3), 255, np.uint8), view(wall, 0)] * 3
    ):
        watch.add(10**9 + number * 10**9, image, make_pose(np.eye(3), [0, 0, 0]))
    watch.add(5, view(wall, 0))
    assert watch.report().images == 12
    assert RecordingWatch().report().missing
