# SPDX-License-Identifier: Apache-2.0
"""``kfloc replay`` of bags of which nothing can be used."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rosbags.rosbag2 import Reader, StoragePlugin, Writer
from textured_room import Room

from kfloc_ros.bags.topics import CAMERA_INFO
from kfloc_ros.bags.writer import BAG_VERSION, MessageCodec, write_bag
from kfloc_ros.cli.main import main
from kfloc_ros.replay import session


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bag whose camera_info has a focal length that is not a number."""
    folder, store = tmp_path_factory.mktemp("bags"), MessageCodec().typestore
    write_bag(Room(4, phase=0.37), folder / "whole", depth=False)
    bag = folder / "uncalibrated"
    with Reader(folder / "whole") as whole, Writer(bag, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as out:
        connections = {c.id: out.add_connection(c.topic, c.msgtype, typestore=store) for c in whole.connections}
        for connection, stamp_ns, data in whole.messages():
            message = store.deserialize_cdr(data, connection.msgtype)
            if connection.msgtype == CAMERA_INFO:
                message.k = np.array(message.k) * np.nan
            out.write(connections[connection.id], stamp_ns, store.serialize_cdr(message, connection.msgtype))
    return bag


@pytest.mark.parametrize("how", ["--offline", pytest.param("--rate=1", marks=[pytest.mark.ros, pytest.mark.slow])])
def test_a_bag_of_which_no_image_can_be_used_is_no_success(
    how: str, uncalibrated: Path, room_map: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["replay", str(uncalibrated), "--map", str(room_map), "--out", str(tmp_path / "out"), "--no-check", how]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.err.rstrip().splitlines()[-1].startswith("No image was processed. "), said.err
    assert "camera_info" in said.err
    assert "has no ground truth" not in said.out, said.out


@pytest.mark.parametrize("moment", ["ProcessSet.start", "_follow"])
def test_a_replay_that_is_interrupted_before_there_are_results_leaves_nothing(
    moment: str, uncalibrated: Path, room_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "check_ros", lambda: None)
    monkeypatch.setattr(session.ProcessSet, "start", lambda self, *_, log, **__: log.touch() or io.StringIO())
    monkeypatch.setattr(session.ProcessSet, "interrupt", lambda self, name: None)
    monkeypatch.setattr(f"kfloc_ros.replay.session.{moment}", interrupt)
    words = ["replay", str(uncalibrated), "--map", str(room_map), "--out", str(tmp_path / "out"), "--no-check"]
    assert main(words) == 130
    assert not (tmp_path / "out").exists()
