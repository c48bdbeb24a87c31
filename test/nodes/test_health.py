# SPDX-License-Identifier: Apache-2.0
"""Counters, rates, and warnings that neither flood nor hide."""

from __future__ import annotations

import math

import pytest

from kfloc_ros.errors import FrameError
from kfloc_ros.nodes.health import Counters, Health


class Log:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)


@pytest.fixture
def log() -> Log:
    return Log()


def test_text_of_a_message_cannot_write_log_lines_of_its_own(log: Log) -> None:
    health = Health(log)
    forged = "rgb8'\n[FATAL] [1.0] [localizer]: map lost\x1b[2K\r\u2028"
    health.fault(FrameError(f"An image has the encoding '{forged}'."))
    health.warn("x" * 100_000)
    for text in (*log.warnings, health.last_fault):
        assert text.isprintable() and len(text) < 1100
    assert "\\n[FATAL]" in log.warnings[0] and "\\x1b" in log.warnings[0]


def test_refused_and_failed_frames_are_counted_apart(log: Log) -> None:
    health = Health(log)
    health.fault(FrameError("An image has no pixels: its size is 0x0."))
    health.fault(RuntimeError("boom"))
    assert (health.counters.refused, health.counters.failed) == (1, 1)
    assert "no pixels" in log.warnings[0]
    assert "RuntimeError: boom" in log.errors[0]
    assert health.last_fault == "RuntimeError: boom"


def test_the_same_kind_is_said_once_and_another_kind_at_once(log: Log) -> None:
    health = Health(log)
    for size in range(100):
        health.warn(f"An image is {size} pixels wide.")
    health.warn("No camera_info has come.")
    assert len(log.warnings) == 2


def test_one_place_of_internal_errors_gets_one_traceback(log: Log) -> None:
    health = Health(log)
    for number in range(10):
        try:
            raise ValueError(number)
        except ValueError as error:
            health.fault(error)
    assert len(log.errors) == 1 and health.counters.failed == 10
    assert "Traceback" in log.errors[0]


def test_rates_are_nan_or_zero_before_anything_came_and_right_after(log: Log) -> None:
    health = Health(log)
    assert health.rates().input_hz == 0 and math.isnan(health.rates().latency_p50_ms)
    for latency in (10.0, 20.0, 30.0):
        health.count("received")
        health.count_processed(latency)
    rates = health.rates()
    assert rates.latency_p50_ms == 20.0 and 20.0 < rates.latency_p95_ms <= 30.0
    assert rates.input_hz > 0 and health.counters.processed == 3


def test_counters_along_a_chain_of_processes() -> None:
    camera = Counters(received=10, processed=8, dropped=1, refused=1)
    refiner = Counters(received=7, processed=6, dropped=1, failed=0)
    assert refiner.after(camera) == Counters(received=10, processed=6, dropped=2, refused=1, failed=0)


@pytest.mark.parametrize("period_s", [0.05, 1.0, 4.0, 15.0])
def test_a_low_image_rate_is_a_rate_and_a_camera_that_stops_is_noticed(
    log: Log, monkeypatch: pytest.MonkeyPatch, period_s: float
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr("kfloc_ros.nodes.health.time.monotonic", lambda: now_s[0])
    health = Health(log)
    assert not health.receives
    for number in range(200):
        now_s[0] += period_s / 4
        if number % 4 == 0:
            health.count("received")
        if number >= 8:
            assert health.receives and health.rates().input_hz == pytest.approx(1 / period_s), number
    now_s[0] += max(6.0, 4 * period_s)
    assert not health.receives and health.rates().input_hz == 0.0


def test_after_a_long_pause_the_rate_is_of_the_new_images(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr("kfloc_ros.nodes.health.time.monotonic", lambda: now_s[0])
    health = Health(log)
    health.count("received")
    now_s[0] += 3600.0
    for _ in range(3):
        health.count("received")
        now_s[0] += 0.1
    assert health.receives and health.rates().input_hz == pytest.approx(10.0)
