# SPDX-License-Identifier: Apache-2.0
"""A source's mistakes are found with the right value, and a good source passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from textured_room import ROOM_CAMERA, Room

from kfloc_ros.datasets.derived import Remembered
from kfloc_ros.datasets.source_options import parse_options, split_options, with_options
from kfloc_ros.frames import FrameSource, Selection
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import make_pose, rotation_angle_deg, so3_exp
from kfloc_ros.mapping.check_depth import depth_place
from kfloc_ros.mapping.check_depth_views import DepthClock, depth_by_matches
from kfloc_ros.mapping.check_geometry import Model, Observations, fitted_camera
from kfloc_ros.mapping.check_hypotheses import LOOSE_PX
from kfloc_ros.mapping.check_pairs import PairFinder, Poses, View
from kfloc_ros.mapping.motion_depth import poses_doubt
from kfloc_ros.mapping.source_check import SourceCheck, check_source
from kfloc_ros.mapping.source_pages import MEANINGS, write_page
from kfloc_ros.types import Frame, Matrix
from studies.mistakes import MISTAKES, MOUNTING, Mistake, Wrong, resized_camera, scaled

PAIRS = 12
NOT_HERE = ("depth_shift", "rolling_shutter")
"""Kinds that need steps of the depth, of which the room's inside has none, or a steadier camera."""

pytestmark = pytest.mark.thorough


class Walk(FrameSource):
    """The textured room, seen by a camera that moves and turns as a hand does, at 10 Hz."""

    name = "walk"
    camera: Camera = ROOM_CAMERA

    def __init__(self, length: int = 70) -> None:
        self._room, self._length = Room(1), length

    def __len__(self) -> int:
        return self._length

    def indices(self) -> Sequence[int]:
        return range(self._length)

    def stamp_ns(self, position: int) -> int:
        return 100_000_000 * position

    def pose(self, position: int) -> Matrix:
        a = 0.2 * position
        turn = [0.2 * np.sin(1.7 * a), 0.5 + 0.4 * np.sin(a), 0.15 * np.cos(1.3 * a)]
        place = [0.6 * np.cos(a), 0.35 * np.sin(1.4 * a), -0.3 + 0.4 * np.sin(1.1 * a)]
        return make_pose(so3_exp(turn), place)

    def __getitem__(self, position: int) -> Frame:
        frame = self._room.view(self.pose(position), position)
        return replace(frame, stamp_ns=self.stamp_ns(position))


@pytest.fixture(scope="module")
def walk() -> FrameSource:
    return Remembered(Walk(), 70)


@pytest.fixture(scope="module")
def good(walk: FrameSource) -> SourceCheck:
    return check_source(walk, pairs=PAIRS)


def mistake(name: str) -> Mistake:
    return next(item for item in MISTAKES if item.name == name)


def test_a_good_source_has_no_findings(good: SourceCheck) -> None:
    assert good.findings == () and good.notes == () and good.words == ""
    assert good.figures["epipolar_px"] < 0.3 and abs(good.figures["depth_by_poses"] - 1) < 0.02
    assert abs(good.figures["rate_hz"] - 10) < 0.01
    assert poses_doubt(good.figures["epipolar_px"], ROOM_CAMERA) == ""
    assert set(good.figures) <= set(MEANINGS), "every figure is explained"


@pytest.mark.thorough
@pytest.mark.parametrize("item", [item for item in MISTAKES if item.kind not in NOT_HERE], ids=lambda item: item.name)
def test_each_mistake_is_found_with_its_value(walk: FrameSource, item: Mistake) -> None:
    check = check_source(item.make(walk), pairs=PAIRS)
    assert [finding.kind for finding in check.findings] == [item.kind]
    finding = check.findings[0]
    assert finding.severity == "error" or item.kind in ("aspect", "distortion", "pinhole", "depth_clock")
    if item.value is not None:
        scale = 0.1 if item.kind == "offset" else 1.0  # frames to seconds
        assert finding.value == pytest.approx(item.value * scale, abs=item.tolerance * scale)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    ["inverted and OpenGL", "mounting left out, 19.7 deg", "poses 2 frames ahead", "focal length x 0.85",
     "distortion of -0.25 unknown", "rectified, said to be distorted", "depth x 0.2", "poses in feet"],
)  # fmt: skip
def test_the_words_of_a_finding_mend_the_source(walk: FrameSource, name: str) -> None:
    wrong = mistake(name).make(walk)
    words = check_source(wrong, pairs=PAIRS).words
    path, options = split_options("DIR" + words)
    assert path == "DIR" and options
    mended = check_source(with_options(wrong, options), pairs=PAIRS)
    assert mended.findings == () and mended.figures["epipolar_px"] < 0.5


class Rolling(Walk):
    """The same with a camera that exposes its rows over 0.6 frames; poses are those of the middle row."""

    READOUT, STRIPES = 0.6, 8

    def __getitem__(self, position: int) -> Frame:
        frame = super().__getitem__(position)
        image, edges = frame.image.copy(), np.linspace(0, len(frame.image), self.STRIPES + 1).astype(int)
        for k in range(self.STRIPES):
            later = position + self.READOUT * ((k + 0.5) / self.STRIPES - 0.5)
            image[edges[k] : edges[k + 1]] = self._room.view(self.pose(later), position).image[edges[k] : edges[k + 1]]
        return replace(frame, image=image)


def test_a_rolling_shutter_is_told_with_its_time() -> None:
    findings = check_source(Remembered(Rolling(), 70), pairs=PAIRS).findings
    assert [finding.kind for finding in findings] == ["rolling_shutter"]
    assert findings[0].value == pytest.approx(0.06, abs=0.012) and "first to the last row" in findings[0].text


def test_gaps_of_a_recording_are_counted(walk: FrameSource) -> None:
    check = check_source(Selection(walk, [*range(30), *range(55, 70)]), pairs=PAIRS)
    assert check.figures["gaps"] == 1 and check.figures["longest_gap_s"] == pytest.approx(2.6)
    told = next(finding for finding in check.findings if finding.kind == "gaps")
    assert "1 gap, the longest of 2.6 s" in told.text and told.value == pytest.approx(25 / 70, abs=0.01)


def test_the_mounting_is_told_with_its_lever(walk: FrameSource) -> None:
    check = check_source(mistake("mounting left out, 19.7 deg").make(walk), pairs=PAIRS)
    T = parse_options(split_options(check.words)[1]).T_body_camera
    assert T is not None
    left = T @ MOUNTING
    assert rotation_angle_deg(left[:3, :3]) < 0.3 and np.linalg.norm(left[:3, 3]) < 0.02


def shaken(source: FrameSource) -> FrameSource:
    """The same with poses that are 0.8 degrees and 1.7 cm off, each for itself."""
    rng = np.random.default_rng(3)
    errors = [make_pose(so3_exp(rng.normal(0, np.radians(0.8), 3)), rng.normal(0, 0.01, 3)) for _ in range(len(source))]

    class Shaken(Wrong):
        def pose(self, position: int) -> Matrix | None:
            T = super().pose(position)
            return None if T is None else T @ errors[position]

    return Shaken(source)


def test_poses_that_are_merely_inaccurate_are_explained_by_no_mistake(walk: FrameSource) -> None:
    check = check_source(shaken(walk), pairs=PAIRS)
    assert check.figures["epipolar_px"] > 0.6
    assert "too inaccurate for depth from motion" in poses_doubt(check.figures["epipolar_px"], walk.camera)
    assert [finding for finding in check.findings if finding.kind != "poses"] == []


@pytest.mark.parametrize(
    "name",
    ["focal length x 0.85", "fy x 0.88", "principal point off by 12 %", "distortion of -0.25 unknown",
     "rectified, said to be distorted", "calibration of half the size"],
)  # fmt: skip
def test_a_wrong_lens_is_told_where_poses_are_inaccurate(walk: FrameSource, name: str) -> None:
    """The camera is fitted together with corrections of the poses, which would bias it."""
    item = mistake(name)
    check = check_source(shaken(item.make(walk)), pairs=PAIRS)
    assert check.figures["epipolar_px_mended"] > LOOSE_PX, "else the poses are taken as they are"
    assert [finding.kind for finding in check.findings] == [item.kind]
    assert "corrections of the inaccurate poses" in check.findings[0].text
    if item.value is not None:
        assert check.findings[0].value == pytest.approx(item.value, abs=item.tolerance)


def test_without_poses_nothing_is_claimed_of_them(walk: FrameSource) -> None:
    class NoPoses(Wrong):
        def pose(self, position: int) -> Matrix | None:
            return None

    check = check_source(NoPoses(walk), pairs=PAIRS)
    assert check.findings == () and "have poses" in check.notes[0]


def test_a_depth_unit_that_no_pose_tells_is_doubted(walk: FrameSource) -> None:
    class NoPoses(Wrong):
        def pose(self, position: int) -> Matrix | None:
            return None

    def with_depth(factor: float) -> FrameSource:
        return NoPoses(walk, frame=lambda f: replace(f, depth_m=None if f.depth_m is None else f.depth_m * factor))

    for factor, mended in ((1000, 0.001), (0.05, 5)):
        (finding,) = check_source(with_depth(factor), pairs=PAIRS).findings
        assert finding.kind == "depth_size" and f"depth_scale={mended:g} " in finding.text
    assert not check_source(with_depth(0.3), pairs=PAIRS).findings


def test_stamps_that_are_no_seconds_are_told(walk: FrameSource) -> None:
    class Fast(Wrong):
        def stamp_ns(self, position: int) -> int:
            return super().stamp_ns(position) // 1000

        def __getitem__(self, position: int) -> Frame:
            return replace(super().__getitem__(position), stamp_ns=self.stamp_ns(position))

    finding = next(f for f in check_source(Fast(walk), pairs=PAIRS).findings if f.kind == "stamps")
    assert "10000 images a second" in finding.text


def test_a_recording_in_which_few_frames_have_poses_is_checked(walk: FrameSource) -> None:
    """As of a model in which a part of the images was registered: no pose of another time is known."""
    used = {view.position for pair in PairFinder(walk, PAIRS).pairs() for view in (pair.first, pair.second)}

    class Few(Wrong):
        def pose(self, position: int) -> Matrix | None:
            return super().pose(position) if position in used else None

    findings = check_source(Few(walk, camera=resized_camera(0.85)), pairs=PAIRS).findings
    assert [finding.kind for finding in findings] == ["focal"]


def test_images_that_cannot_be_mapped_are_told(walk: FrameSource) -> None:
    dark = Wrong(walk, frame=lambda f: replace(f, image=f.image // 20))
    assert [finding.kind for finding in check_source(dark, pairs=PAIRS).findings] == ["dark"]
    blurred = Wrong(walk, frame=lambda f: replace(f, image=cv2.GaussianBlur(f.image, (0, 0), 4.0)))
    assert "blur" in [finding.kind for finding in check_source(blurred, pairs=PAIRS).findings]


def test_a_mirrored_image_is_no_turned_one(walk: FrameSource) -> None:
    """Epipolar lines are the same in both; only what lies in front of the camera tells them apart."""
    finding = check_source(mistake("images mirrored").make(walk), pairs=PAIRS).findings[0]
    assert "left to right" in finding.text and finding.words == ""


def test_the_fitted_camera_bends_as_the_lens_does(walk: FrameSource) -> None:
    check = check_source(mistake("distortion of -0.25 unknown").make(walk), pairs=PAIRS)
    lens = replace(ROOM_CAMERA, distortion_model="plumb_bob", distortion=(-0.25, 0.0, 0.0, 0.0))
    assert fitted_camera(check.model, ROOM_CAMERA).difference_px(lens) < 6.0 < ROOM_CAMERA.difference_px(lens)


def test_depth_steps_tell_shift_and_clock(walk: FrameSource) -> None:
    pairs = list(PairFinder(walk, PAIRS).pairs())
    observed = Observations(pairs, Poses(walk), walk.camera)
    rng = np.random.default_rng(0)

    def view(position: int, dx: int, dy: int) -> View:
        grey = np.full((256, 320), 120, np.uint8)
        depth = np.full((256, 320), 3.0, np.float32)
        for _ in range(9):
            x, y, w, h = (int(v) for v in rng.integers((20, 20, 20, 20), (260, 200, 60, 60)))
            near = float(rng.uniform(1.0, 2.0))
            cv2.rectangle(grey, (x, y), (x + w, y + h), int(rng.integers(0, 255)), -1)
            cv2.rectangle(depth, (x + dx, y + dy), (x + dx + w, y + dy + h), near, -1)
        frame = Frame(grey[:1, :1, None].repeat(3, 2), walk.camera, 0, position, depth_m=depth)
        return View(position, frame, grey, np.empty((0, 2)), np.empty((0, 128), np.float32))

    millimetres = Observations(pairs, Poses(Wrong(walk, pose=scaled(1000.0))), walk.camera)
    for dx, dy in ((0, 0), (9, -4)):
        views = [view(position, dx, dy) for position in range(10, 30)]
        place = depth_place(views, observed, Model(), 1.0)
        assert place is not None and place.clear
        assert place.shift_px == pytest.approx((dx, dy), abs=1.5) and not (dx == 0 and place.delay_frames)
        other = depth_place(views, millimetres, Model(), 1000.0)
        assert other is not None
        assert (other.delay_frames, other.gain) == pytest.approx((place.delay_frames, place.gain), rel=1e-3)


def test_late_depth_is_told_beside_poses_in_millimetres(walk: FrameSource) -> None:
    findings = check_source(
        mistake("poses in millimetres").make(mistake("depth 4 frames late").make(walk)), pairs=PAIRS
    )
    told = {finding.kind: finding.value for finding in findings.findings}
    assert told == {"pose_unit": 0.001, "depth_clock": pytest.approx(-0.4, abs=0.11)}


def test_late_depth_by_matches_is_the_same_in_millimetres(walk: FrameSource) -> None:
    late = Remembered(mistake("depth 4 frames late").make(shaken(walk)), 70)
    found = []
    for source, factor in ((late, 1.0), (Wrong(late, pose=scaled(1000.0)), 1000.0)):
        observed = Observations(list(PairFinder(source, PAIRS).pairs()), Poses(source), source.camera)
        found.append(depth_by_matches(observed, Model(), factor))
    assert all(isinstance(clock, DepthClock) for clock in found)
    assert found[0].delay_frames == found[1].delay_frames


def test_page_and_json(tmp_path: Path, walk: FrameSource, good: SourceCheck) -> None:
    check = check_source(mistake("poses in OpenGL axes").make(walk), pairs=PAIRS)
    for number, item in enumerate((good, check)):
        write_page(item, tmp_path / f"{number}.html")
    pages = [(tmp_path / f"{number}.html").read_text(encoding="utf-8") for number in (0, 1)]
    assert "No mistake was found" in pages[0] and "mount=opengl" in pages[1]
    assert all(page.count("<img") == 4 and len(page) < 500_000 for page in pages)
    told = json.loads(json.dumps(check.to_dict()))
    assert told["options"] == "?mount=opengl" and told["findings"][0]["kind"] == "axes"


def test_units_without_depth_are_not_guessed(walk: FrameSource) -> None:
    flat = Wrong(walk, pose=scaled(1000.0), frame=lambda f: replace(f, depth_m=None))
    assert check_source(flat, pairs=PAIRS).findings == ()


class Standing(Walk):
    """The same, from one place; ``noise`` is the standard deviation of the images' grey values."""

    noise = 4.0

    def read(self, position: int) -> Frame | None:
        frame = super().read(0)
        assert frame is not None
        noise = np.random.default_rng(position).normal(0.0, self.noise, frame.image.shape) if self.noise else 0.0
        image = np.clip(frame.image + noise, 0, 255).astype(np.uint8)
        return replace(frame, image=image, stamp_ns=self.stamp_ns(position), index=position)


@pytest.mark.parametrize("noise", [0.0, 4.0])
def test_a_camera_that_stands_still_is_told(noise: float) -> None:
    standing = Standing(40)
    standing.noise = noise
    check = check_source(standing, pairs=PAIRS, use_poses=False)
    assert check.figures["at_rest"] == 1.0 and check.figures["pairs"] == 0
    assert "rest" in [finding.kind for finding in check.findings] and not check.errors
    assert "the camera stands still" in " ".join(finding.text for finding in check.findings)


def test_a_camera_that_moves_does_not_stand_still(walk: FrameSource) -> None:
    assert check_source(walk, pairs=PAIRS).figures["at_rest"] == 0.0
