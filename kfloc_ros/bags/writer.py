# SPDX-License-Identifier: Apache-2.0
"""ROS 2 messages of a frame, serialized without ROS.

Poses are those of the camera's optical frame in the map frame.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rosbags.interfaces import Connection, Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from kfloc_ros.bags.topics import (
    CAMERA_FRAME,
    CAMERA_INFO_TOPIC,
    DEPTH_TOPIC,
    DEPTH_UNIT_M,
    IMAGE_TOPIC,
    MAP_FRAME,
    TF_TOPIC,
    TOPIC_TYPES,
    TRUTH_FRAME,
    TRUTH_TOPIC,
)
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.frames import FrameSource
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import matrix_to_quaternion
from kfloc_ros.messages.poses import ns_to_stamp
from kfloc_ros.types import Frame, Matrix

JPEG_QUALITY = 95


class MessageCodec:
    """Frames to serialized messages, and poses and stamps of messages back.

    The message definitions are those of ROS 2 Jazzy; the ones used here are the same in every later ROS 2.
    """

    def __init__(self) -> None:
        self.typestore = get_typestore(Stores.ROS2_JAZZY)

    def decode(self, data: bytes, message_type: str) -> Any:
        """The message object of serialized data."""
        return self.typestore.deserialize_cdr(data, message_type)

    def encode_frame(
        self, frame: Frame, *, jpeg: bytes | None = None, depth: bool = True
    ) -> Iterator[tuple[str, bytes | memoryview]]:
        """Topic and serialized message of everything a frame carries; the image comes last.

        ``jpeg``: the image as it was recorded, if it is at hand, instead of compressing ``frame.image`` again.
        """
        header = self._header(frame.stamp_ns, CAMERA_FRAME)
        yield self._encode(CAMERA_INFO_TOPIC, **self._camera_info(frame.camera, header))
        if frame.T_map_camera is not None:
            yield from self._truth(frame.stamp_ns, frame.T_map_camera)
        if depth and frame.depth_m is not None:
            yield self._encode(
                DEPTH_TOPIC, header=header, format="16UC1; png compressed", data=encode_depth(frame.depth_m)
            )
        data = np.frombuffer(jpeg, np.uint8) if jpeg is not None else encode_jpeg(frame.image)
        yield self._encode(IMAGE_TOPIC, header=header, format="jpeg", data=data)

    def _truth(self, stamp_ns: int, T_map_camera: Matrix) -> Iterator[tuple[str, bytes | memoryview]]:
        header = self._header(stamp_ns, MAP_FRAME)
        x, y, z = (float(value) for value in T_map_camera[:3, 3])
        qx, qy, qz, qw = (float(value) for value in matrix_to_quaternion(T_map_camera[:3, :3]))
        rotation = self._make("geometry_msgs/msg/Quaternion", x=qx, y=qy, z=qz, w=qw)
        point = self._make("geometry_msgs/msg/Point", x=x, y=y, z=z)
        pose = self._make("geometry_msgs/msg/Pose", position=point, orientation=rotation)
        yield self._encode(TRUTH_TOPIC, header=header, pose=pose)
        translation = self._make("geometry_msgs/msg/Vector3", x=x, y=y, z=z)
        transform = self._make("geometry_msgs/msg/Transform", translation=translation, rotation=rotation)
        stamped = self._make(
            "geometry_msgs/msg/TransformStamped", header=header, child_frame_id=TRUTH_FRAME, transform=transform
        )
        yield self._encode(TF_TOPIC, transforms=[stamped])

    def _camera_info(self, camera: Camera, header: Any) -> dict[str, Any]:
        projection = np.zeros((3, 4))
        projection[:, :3] = camera.K
        whole = self._make(
            "sensor_msgs/msg/RegionOfInterest", x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
        )
        return {
            "header": header,
            "height": camera.height,
            "width": camera.width,
            "distortion_model": "plumb_bob" if camera.distortion_model == "none" else camera.distortion_model,
            "d": np.array(camera.distortion or (0.0,) * 5),
            "k": camera.K.reshape(9),
            "r": np.eye(3).reshape(9),
            "p": projection.reshape(12),
            "binning_x": 0,
            "binning_y": 0,
            "roi": whole,
        }

    def _header(self, stamp_ns: int, frame_id: str) -> Any:
        seconds, nanoseconds = ns_to_stamp(stamp_ns)
        stamp = self._make("builtin_interfaces/msg/Time", sec=seconds, nanosec=nanoseconds)
        return self._make("std_msgs/msg/Header", stamp=stamp, frame_id=frame_id)

    def _make(self, message_type: str, **fields: Any) -> Any:
        return self.typestore.types[message_type](**fields)

    def _encode(self, topic: str, **fields: Any) -> tuple[str, bytes | memoryview]:
        message_type = TOPIC_TYPES[topic]
        return topic, self.typestore.serialize_cdr(self._make(message_type, **fields), message_type)


def encode_jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """JPEG bytes of an RGB image, without chroma subsampling: colour edges stay where they are.

    Raises:
        FrameError: OpenCV cannot compress the image.
    """
    flags = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    flags += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    done, data = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), flags)
    if not done:
        raise FrameError(f"An image of shape {image.shape} cannot be compressed as JPEG.")
    return np.asarray(data, dtype=np.uint8).reshape(-1)


def encode_depth(depth_m: NDArray[np.float32]) -> NDArray[np.uint8]:
    """16-bit PNG bytes of a depth image in metres, in millimetres; what does not fit becomes 0 (unknown).

    Raises:
        FrameError: OpenCV cannot compress the image.
    """
    units = np.rint(np.nan_to_num(depth_m, nan=0.0, posinf=0.0, neginf=0.0) / DEPTH_UNIT_M)
    units[(units < 0) | (units >= 65535)] = 0  # the highest count is read as no measurement
    done, data = cv2.imencode(".png", units.astype(np.uint16), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not done:
        raise FrameError(f"A depth image of shape {depth_m.shape} cannot be compressed as PNG.")
    return np.asarray(data, dtype=np.uint8).reshape(-1)


BAG_VERSION = 9


def offered_profile(*, is_reliable: bool, is_latched: bool, depth: int) -> Qos:
    """Return the QoS profile of a topic in a bag: without it, a player latches nothing, such as /tf_static."""
    forever = QosTime(9223372036, 854775807)
    return Qos(
        QosHistory.KEEP_LAST,
        depth,
        QosReliability.RELIABLE if is_reliable else QosReliability.BEST_EFFORT,
        QosDurability.TRANSIENT_LOCAL if is_latched else QosDurability.VOLATILE,
        deadline=forever,
        lifespan=forever,
        liveliness=QosLiveliness.SYSTEM_DEFAULT,
        liveliness_lease_duration=forever,
        avoid_ros_namespace_conventions=False,
    )


@dataclass(frozen=True)
class BagReport:
    """What was written."""

    path: Path
    frames: int
    with_depth: int
    with_truth: int
    duration_s: float
    size_bytes: int


def write_bag(
    source: FrameSource,
    out: Path,
    *,
    depth: bool = True,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> BagReport:
    """Write every frame of ``source`` with its own stamp, as it would have been recorded.

    The bag grows in a hidden folder beside ``out`` and is moved there when it is complete, so that an
    interruption or an error leaves nothing behind and never harms what ``out`` held before.

    Args:
        source: frames in temporal order; images it has as JPEG are stored as they are.
        out: folder of the bag.
        depth: store depth, where the source has it.
        force: replace a bag that is at ``out``.
        progress: called with the number of frames done after every frame.

    Raises:
        SourceError: ``out`` exists, or the source's stamps do not increase.
        OSError: the disk is full or not writable.
    """
    out = out.absolute()
    _refuse_overwriting(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        # The storage file takes the folder's name, so the bag has its final name in a folder of its own.
        report = _write(source, workspace / out.name, depth, progress)
        if out.exists():
            out.rename(workspace / "replaced")
        (workspace / out.name).rename(out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return BagReport(
        path=out,
        frames=report.frames,
        with_depth=report.with_depth,
        with_truth=report.with_truth,
        duration_s=report.duration_s,
        size_bytes=sum(file.stat().st_size for file in out.iterdir()),
    )


@dataclass(frozen=True)
class _Counts:
    frames: int
    with_depth: int
    with_truth: int
    duration_s: float


def _write(source: FrameSource, path: Path, depth: bool, progress: Callable[[int], None] | None) -> _Counts:
    codec = MessageCodec()
    written = with_depth = with_truth = 0
    first_ns = last_ns = -1
    with Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP) as writer:
        connections: dict[str, Connection] = {}
        for position in range(len(source)):
            frame = source.read(position)
            if frame is None:
                continue
            if frame.stamp_ns <= last_ns:
                raise SourceError(
                    f"The stamps of '{source.name}' do not increase: frame {frame.index} is at {frame.stamp_ns} ns, "
                    f"the one before at {last_ns} ns."
                )
            first_ns = frame.stamp_ns if first_ns < 0 else first_ns
            written += 1
            last_ns = frame.stamp_ns
            for topic, data in codec.encode_frame(frame, jpeg=source.encoded_image(position), depth=depth):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, TOPIC_TYPES[topic], typestore=codec.typestore)
                writer.write(connections[topic], frame.stamp_ns, data)
            with_depth += depth and frame.depth_m is not None
            with_truth += frame.T_map_camera is not None
            if progress is not None:
                progress(position + 1)
    return _Counts(written, with_depth, with_truth, (last_ns - first_ns) * 1e-9)


def _refuse_overwriting(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise SourceError(f"'{out}' exists already; name another --out or replace it with --force.")
    if not (out / "metadata.yaml").is_file():
        raise SourceError(f"'{out}' is not a rosbag2 folder, so --force does not replace it; name another --out.")
