# SPDX-License-Identifier: Apache-2.0
"""Bags that other people's tools write: each is read right, or refused in a sentence that says what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from bag_messages import OPTICAL, body_pose, header, image, info, msg, odometry, pose, transforms, write_messages
from rosbags.rosbag2 import StoragePlugin

from kfloc_ros.bags.stream import BagStream
from kfloc_ros.bags.truth import BagTransforms, read_truth
from kfloc_ros.bags.writer import write_bag
from kfloc_ros.datasets import open_source
from kfloc_ros.datasets.ros_bag import RosBag
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.geometry.lie import make_pose

Message = tuple[str, float, Any]
MOUNT = (0.0, "base_link", "optical", OPTICAL)
PICTURE = np.full((30, 40, 3), 90, np.uint8)


def camera(
    topic: str = "/cam/image_raw",
    info_topic: str = "/cam/camera_info",
    *,
    count: int = 3,
    change: Callable[[int, Any], None] = lambda k, message: None,
) -> Iterator[Message]:
    """Images, compressed if their topic says so, each with a camera_info that ``change`` may alter."""
    for k in range(count):
        said = info(k, "optical", 40, 30)
        change(k, said)
        yield info_topic, k, said
        if topic.endswith("/compressed"):
            data = cv2.imencode(".png", PICTURE)[1].reshape(-1)
            yield topic, k, msg("sensor_msgs/CompressedImage", header=header(k, "optical"), format="png", data=data)
        else:
            yield topic, k, image(k, "optical", PICTURE, "bgr8")


def with_odometry(
    messages: Iterable[Message], change: Callable[[int, Any], None] = lambda k, message: None
) -> Iterator[Message]:
    yield "/tf_static", 0, transforms(MOUNT)
    for k in range(3):
        said = odometry(k)
        change(k, said)
        yield "/odom", k, said
    yield from messages


def positions(source: Any) -> list[list[float] | None]:
    poses = [source.pose(k) for k in range(len(source))]
    return [None if T is None else T[:3, 3].round(3).tolist() for T in poses]


ROBOTS = [(body_pose(k) @ OPTICAL)[:3, 3].round(3).tolist() for k in range(3)]


# A rectified topic follows P, however it is recorded.


def rectify(k: int, said: Any) -> None:
    said.d = np.array([-0.3, 0.1, 0.0, 0.0, 0.0])
    said.p[[0, 5, 2, 6]] = 25.0, 25.0, 20.5, 15.5


@pytest.mark.parametrize("transport", ["", "/compressed"])
@pytest.mark.parametrize(
    ("name", "rectified"),
    [("image_rect", True), ("image_rect_color", True), ("image_rectified", True), ("imageRect", True),
     ("image_undistorted", True), ("rect/image", True), ("rectified/image_color", True), ("rect/image_raw", False),
     ("image_raw", False), ("image_corrected", False), ("direct", False), ("image_unrectified", False)],
)  # fmt: skip
def test_a_rectified_topic_follows_p(tmp_path: Path, name: str, transport: str, rectified: bool) -> None:
    bag = write_messages(tmp_path / "bag", camera(f"/cam/{name}{transport}", change=rectify))
    found = open_source(f"bag:{bag}").camera
    assert (found.fx, found.is_pinhole) == ((25.0, True) if rectified else (50.0, False))
    with BagStream(bag) as stream:
        assert stream.rectified == rectified
    assert open_source(f"bag:{bag}?rectified=true").camera.fx == 25.0
    assert open_source(f"bag:{bag}?rectified=false").camera.fx == 50.0


# Transforms of several robots.


def robots(image_topic: str, spaces: tuple[str, str] = ("/robot1", "/robot2")) -> Iterator[Message]:
    """Two robots, 5 m apart, that name their frames alike; the images are the first one's."""
    for space, offset in zip(spaces, (0.0, 5.0), strict=True):
        yield f"{space}/tf_static", 0, transforms(MOUNT)
        for k in range(3):
            T = make_pose(np.eye(3), [offset, 0, 0]) @ body_pose(k)
            yield f"{space}/tf", k + 0.01 * offset, transforms((k + 0.01 * offset, "odom", "base_link", T))
    yield from camera(image_topic, image_topic.rpartition("/")[0] + "/camera_info")


@pytest.mark.parametrize(
    ("image_topic", "spaces"),
    [("/robot1/cam/image_raw", ("/robot1", "/robot2")), ("/cam/image_raw", ("", "/robot2")),
     ("/a/b/cam/image_raw", ("/a/b", "/a"))],
)  # fmt: skip
def test_of_two_robots_the_one_with_the_camera_counts(
    tmp_path: Path, image_topic: str, spaces: tuple[str, str]
) -> None:
    bag = write_messages(tmp_path / "bag", robots(image_topic, spaces))
    assert positions(open_source(f"bag:{bag}")) == ROBOTS
    with BagStream(bag) as stream:
        T = BagTransforms(stream, "map", "odom").T_base_camera(6_000_000_000 - 900_000_000)
    assert T is not None and np.allclose(T, body_pose(1) @ OPTICAL)


def test_between_two_robots_the_user_chooses(tmp_path: Path) -> None:
    bag = write_messages(tmp_path / "bag", robots("/cam/image_raw"))
    with pytest.raises(SourceError, match=r"several trees of transforms.*\?tf=/robot1, \?tf=/robot2"):
        open_source(f"bag:{bag}")
    assert positions(open_source(f"bag:{bag}?tf=/robot1")) == ROBOTS
    with BagStream(bag) as stream, pytest.raises(SourceError, match=r"--tf /robot1"):
        read_truth(stream, "tf:odom:optical")
    with BagStream(bag, tf="/robot1") as stream:
        assert len(read_truth(stream, "tf:odom:optical").poses) == 3
    with pytest.raises(SourceError, match="no transforms in '/robot3'"):
        open_source(f"bag:{bag}?tf=/robot3")


def test_frames_of_another_namespace_that_do_not_contradict_count(tmp_path: Path) -> None:
    def messages() -> Iterator[Message]:
        yield "/tf_static", 0, transforms(MOUNT)
        for k in range(3):
            yield "/robot1/tf", k, transforms((k, "odom", "base_link", body_pose(k)))
        yield from camera("/robot1/cam/image_raw", "/robot1/cam/camera_info")

    assert positions(open_source(f"bag:{write_messages(tmp_path / 'bag', messages())}")) == ROBOTS


# Whose poses an Odometry tells.


def test_an_odometry_without_child_frame_is_not_the_cameras(tmp_path: Path) -> None:
    def forget(k: int, said: Any) -> None:
        said.child_frame_id = ""

    bag = write_messages(tmp_path / "bag", with_odometry(camera(), forget))
    with pytest.raises(SourceError, match=r"child_frame_id is empty.*\?body="):
        open_source(f"bag:{bag}")
    assert positions(open_source(f"bag:{bag}?body=base_link")) == ROBOTS
    with BagStream(bag) as stream:
        with pytest.raises(SourceError, match=r"child_frame_id is empty.*--truth-of"):
            read_truth(stream, "/odom")
        assert len(read_truth(stream, "/odom", "base_link").poses) == 3


@pytest.mark.parametrize("field", ["child_frame_id", "frame_id"])
def test_two_publishers_on_one_topic_of_poses_are_not_mixed(tmp_path: Path, field: str) -> None:
    def other(k: int, said: Any) -> None:
        setattr(said if field == "child_frame_id" else said.header, field, f"robot{k % 2}")

    with pytest.raises(SourceError, match="mixes poses of several frames"):
        open_source(f"bag:{write_messages(tmp_path / 'bag', with_odometry(camera(), other))}")


@pytest.mark.parametrize("topic", ["/odom", "/tf"])
def test_two_robots_in_turn_on_one_topic_are_told(tmp_path: Path, topic: str) -> None:
    def messages() -> Iterator[Message]:
        yield "/tf_static", 0, transforms(MOUNT)
        for k in np.arange(0.0, 3.0, 0.25):
            T = make_pose(np.eye(3), [5.0 * (4 * k % 2), 0, 0]) @ body_pose(k)
            said = odometry(k)
            said.pose.pose = pose(T)
            yield topic, k, said if topic == "/odom" else transforms((k, "odom", "base_link", T))
        yield from camera()

    with pytest.raises(SourceError, match="jump back and forth"):
        open_source(f"bag:{write_messages(tmp_path / 'bag', messages())}")


def test_two_cameras_on_one_topic_are_not_mixed(tmp_path: Path) -> None:
    def messages() -> Iterator[Message]:
        yield from camera()
        yield "/cam/image_raw", 3, image(3, "other_optical", PICTURE, "bgr8")

    with pytest.raises(SourceError, match="mixes messages of several frames: optical, other_optical"):
        open_source(f"bag:{write_messages(tmp_path / 'bag', messages())}")


def test_poses_that_are_none_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(k: int, said: Any) -> None:
        if k == 1:
            said.pose.pose.position.x = float("nan")

    found = positions(open_source(f"bag:{write_messages(tmp_path / 'bag', with_odometry(camera(), spoil))}"))
    assert (found[0], found[2]) == (ROBOTS[0], ROBOTS[2])
    assert found[1] == pytest.approx(ROBOTS[1], abs=2e-3), "interpolated between its neighbours"
    assert "1 of 3 poses on /odom" in caplog.text


# Calibrations.


def test_a_camera_info_of_another_camera_is_refused(tmp_path: Path) -> None:
    def of_depth(k: int, said: Any) -> None:
        said.header.frame_id = "depth_optical"

    bag = write_messages(tmp_path / "bag", camera("/cam/color/image_raw", "/cam/depth/camera_info", change=of_depth))
    with pytest.raises(SourceError, match=r"'depth_optical'.*'optical'.*\?info=/cam/depth/camera_info"):
        open_source(f"bag:{bag}")
    assert open_source(f"bag:{bag}?info=/cam/depth/camera_info").camera.fx == 50.0


def test_of_several_calibrations_elsewhere_the_one_of_the_images_frame_counts(tmp_path: Path) -> None:
    def messages() -> Iterator[Message]:
        yield from camera("/image", "/infos/color")
        yield "/infos/depth", 0, info(0, "depth_optical", 20, 10)

    assert open_source(f"bag:{write_messages(tmp_path / 'bag', messages())}").camera.width == 40


def test_a_calibration_of_another_size_is_refused(tmp_path: Path) -> None:
    def halve(k: int, said: Any) -> None:
        said.width, said.height = 20, 15

    with pytest.raises(SourceError, match=r"40x30, its camera_info 20x15.*\?info="):
        open_source(f"bag:{write_messages(tmp_path / 'bag', camera(change=halve))}")


def test_a_grey_camera_of_16_bits_is_no_depth(tmp_path: Path) -> None:
    grey = (np.arange(1200).reshape(30, 40) * 3).astype(np.uint16)  # a camera of 12 bits

    def messages(depth: str) -> Iterator[Message]:
        for k in range(3):
            yield "/thermal/image_raw", k, image(k, "optical", grey, "mono16")
            yield "/thermal/camera_info", k, info(k, "optical", 40, 30)
            if depth:
                yield depth, k, image(k, "optical", np.full((30, 40), 1500, np.uint16), "mono16")

    frame = open_source(f"bag:{write_messages(tmp_path / 'grey', messages(''))}")[0]
    assert frame.depth_m is None and frame.image.max() == grey.max() >> 4
    both = write_messages(tmp_path / "both", messages("/thermal/depth/image"))
    assert np.allclose(open_source(f"bag:{both}")[0].depth_m, 1.5)


def test_an_image_or_depth_that_cannot_be_read_is_that_frames_fault(tmp_path: Path) -> None:
    def messages() -> Iterator[Message]:
        yield from camera()
        yield "/cam/image_raw", 3, image(3, "optical", PICTURE[:20], "bgr8")
        for k in range(3):
            depth = image(k, "optical", np.full((30, 40), 2000, np.uint16), "16UC1")
            depth.data = depth.data[: 2400 if k else 100]
            yield "/cam/depth", k, depth

    source = open_source(f"bag:{write_messages(tmp_path / 'bag', messages())}")
    assert source[1].depth_m is not None
    for position, said in ((0, "Image 0 of the bag.*has 100 bytes"), (3, "Image 3 of the bag.*It is 40x20")):
        with pytest.raises(FrameError, match=said):
            source[position]


def zoom(k: int, said: Any) -> None:
    said.k[[0, 4]] = 50.0 if k == 0 else 80.0


def focus(k: int, said: Any) -> None:
    said.k[[0, 4]] = 50.0 + 0.01 * k


def late(k: int, said: Any) -> None:
    if k == 0:
        said.k[:] = 0.0


def never(k: int, said: Any) -> None:
    said.k[:] = 0.0


@pytest.mark.parametrize(
    ("change", "said"), [(zoom, r"changes.*fx 50\.0.*0\.1 s after.*fx 80\.0"), (never, "no calibration")]
)
def test_a_camera_that_changes_or_is_never_calibrated_is_refused(
    tmp_path: Path, change: Callable[[int, Any], None], said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        open_source(f"bag:{write_messages(tmp_path / 'bag', camera(change=change))}")


@pytest.mark.parametrize("change", [late, focus])
def test_a_late_calibration_counts_and_autofocus_is_no_other_camera(
    tmp_path: Path, change: Callable[[int, Any], None]
) -> None:
    source = open_source(f"bag:{write_messages(tmp_path / 'bag', camera(change=change))}")
    assert {frame.camera.fx for frame in source} == {50.0}


# A bag of our own is known by its topics and frames.


@pytest.mark.parametrize("space", ["/usb_cam", "/camera", "/front/camera"])
def test_a_robots_bag_with_our_names_is_a_robots_bag(tmp_path: Path, space: str) -> None:
    messages = with_odometry(camera(f"{space}/image/compressed", f"{space}/camera_info"))
    assert positions(open_source(f"bag:{write_messages(tmp_path / 'bag', messages)}")) == ROBOTS


def test_our_topics_with_a_robots_tf_are_a_robots_bag(tmp_path: Path) -> None:
    def messages() -> Iterator[Message]:
        for k in range(3):
            yield "/tf", k, transforms((k, "odom", "optical", body_pose(k) @ OPTICAL))
        yield from camera("/camera/image/compressed", "/camera/camera_info")

    assert positions(open_source(f"bag:{write_messages(tmp_path / 'bag', messages())}")) == ROBOTS


def test_a_bag_made_of_a_bag_has_its_poses(tmp_path: Path) -> None:
    source = open_source(f"bag:{write_messages(tmp_path / 'bag', with_odometry(camera()))}")
    write_bag(source, tmp_path / "own")
    assert positions(RosBag(tmp_path / "own", {})) == ROBOTS


# Files and clocks.


def test_an_sqlite_file_with_messages_still_in_its_log_is_refused(tmp_path: Path) -> None:
    bag = write_messages(tmp_path / "bag", camera())
    database = bag / "bag.db3"
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("DELETE FROM messages WHERE id > 2")
    connection.commit()
    assert (bag / "bag.db3-wal").stat().st_size > 0
    for opened in (lambda: open_source(f"bag:{bag}"), lambda: BagStream(bag)):
        with pytest.raises(SourceError, match=r"bag\.db3-wal.*wal_checkpoint"):
            opened()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    assert len(open_source(f"bag:{bag}")) == 1


@pytest.mark.parametrize("kept", [8, 0.5, 0.99])
def test_an_mcap_file_whose_recorder_was_killed_says_how_to_repair_it(tmp_path: Path, kept: float) -> None:
    bag = write_messages(tmp_path / "bag", camera(), StoragePlugin.MCAP)
    assert len(open_source(f"bag:{bag}")) == len(open_source(f"bag:{bag / 'bag.mcap'}")) == 3
    data = (bag / "bag.mcap").read_bytes()
    (bag / "bag.mcap").write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    for name in (bag, bag / "bag.mcap"):
        for opened in (lambda name=name: open_source(f"bag:{name}"), lambda name=name: BagStream(name)):
            with pytest.raises(SourceError, match=r"bag\.mcap' has no end.*mcap recover.*ros2 bag reindex"):
                opened()
    (bag / "metadata.yaml").unlink()  # which a recorder writes at the end
    for spec in (f"bag:{bag}", str(bag), str(bag / "bag.mcap")):
        with pytest.raises(SourceError, match=r"bag\.mcap' has no end.*mcap recover.*ros2 bag reindex"):
            open_source(spec)
    (bag / "bag.mcap").write_bytes(data)
    with pytest.raises(SourceError, match=r"no metadata\.yaml\. If its recorder was killed.*ros2 bag reindex"):
        open_source(f"bag:{bag}")


def test_a_bag_with_fewer_images_than_it_says_is_read_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bag = write_messages(tmp_path / "bag", camera())
    with sqlite3.connect(bag / "bag.db3") as connection:
        connection.execute("DELETE FROM messages WHERE id > 4")
    assert len(open_source(f"bag:{bag}")) == 2
    assert "says 3 images on /cam/image_raw, and 2 can be read" in caplog.text


def test_images_and_poses_of_two_clocks_are_told_apart(tmp_path: Path) -> None:
    def shift(k: int, said: Any) -> None:
        said.header.stamp.sec += 1_700_000_000

    bag = write_messages(tmp_path / "bag", with_odometry(camera(), shift))
    with pytest.raises(SourceError, match=r"/odom.*1700000005\.000 to 1700000005\.200 s against 5\.000 to 5\.200 s"):
        open_source(f"bag:{bag}")
    assert positions(open_source(f"bag:{bag}?pose=none")) == [None, None, None]
    with BagStream(bag) as stream, pytest.raises(SourceError, match="of other times than the images"):
        read_truth(stream, "/odom", "base_link")


def test_transforms_and_depth_of_another_clock_are_told(tmp_path: Path) -> None:
    def moving() -> Iterator[Message]:
        for k in range(3):
            yield "/tf", k, transforms((k + 1e5, "odom", "optical", body_pose(k)))
        yield from camera()

    with pytest.raises(SourceError, match=r"the transforms are of other times.*\?pose=none"):
        open_source(f"bag:{write_messages(tmp_path / 'moving', moving())}")

    def deep() -> Iterator[Message]:
        yield "/cam/depth", 0, image(1e5, "optical", np.full((30, 40), 2000, np.uint16), "16UC1")
        yield from camera()

    bag = write_messages(tmp_path / "deep", deep())
    with pytest.raises(SourceError, match=r"the depth images on /cam/depth are of other times.*\?depth=none"):
        open_source(f"bag:{bag}")
    assert open_source(f"bag:{bag}?depth=none")[0].depth_m is None


@pytest.mark.parametrize(
    ("stamped", "said"),
    [([(1e5, "map")], "of other times than the images"), ([(0, "map"), (1, "odom")], "mixes poses")],
)
def test_poses_that_can_be_no_truth_are_none_and_say_so(
    tmp_path: Path, stamped: list[tuple[float, str]], said: str
) -> None:
    def messages() -> Iterator[Message]:
        for k, frame in stamped:
            yield "/goal", k % 10, msg("geometry_msgs/PoseStamped", header=header(k, frame), pose=pose(body_pose(0)))
        yield from camera()

    with BagStream(write_messages(tmp_path / "bag", messages())) as stream:
        truth = read_truth(stream, None)
        assert not truth.poses and said in truth.name
        with pytest.raises(SourceError, match=said):
            read_truth(stream, "/goal")
