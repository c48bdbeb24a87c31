# SPDX-License-Identifier: Apache-2.0
"""The images of a bag through the localizer in this process: what the nodes would answer if they answered every frame.

The same messages, the same decoding, calibration, judgement of stamps and localizer as in the live nodes, but no
clock, no DDS and no dropped frame, so that two runs give the same poses to the last digit. Needs no ROS.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.bags.stream import BagEvent, BagStream, ReplayRange
from kfloc_ros.bags.truth import read_truth
from kfloc_ros.device import choose_device, describe_hardware
from kfloc_ros.errors import FrameError
from kfloc_ros.evaluation.offline import FrameRecord, record_of
from kfloc_ros.evaluation.results import write_results
from kfloc_ros.evaluation.summary import RunInfo, Summary
from kfloc_ros.geometry.camera import Camera, ImageAdapter
from kfloc_ros.localization.config import LocalizerConfig
from kfloc_ros.localization.place_localizer import AnyLocalizer, localizer_for
from kfloc_ros.maps.format import resolve_map
from kfloc_ros.maps.place import load_map
from kfloc_ros.messages.camera_info import camera_from_info, check_view
from kfloc_ros.messages.poses import StampGuard
from kfloc_ros.replay.recording import ReplayConfig
from kfloc_ros.types import Frame, Matrix, PoseEstimate, TrackingState

WENT_BACKWARDS = "time went backwards"


class BagLocalizer:
    """Feeds a localizer with the messages of a bag, as the camera node would.

    Args:
        stream: the open bag.
        localizer: is reset where time goes backwards.
        max_gap_s: see :class:`kfloc_ros.localization.config.LocalizerConfig`.
        rectified: see :func:`kfloc_ros.messages.camera_info.camera_from_info`.
        truth: ``T_map_camera`` by stamp.
        positions: number of the image in its bag by stamp.
    """

    def __init__(
        self,
        stream: BagStream,
        localizer: AnyLocalizer,
        *,
        max_gap_s: float,
        rectified: bool,
        truth: Mapping[int, Matrix],
        positions: Mapping[int, int],
    ) -> None:
        self._stream, self._localizer, self._rectified = stream, localizer, rectified
        self._truth, self._positions = truth, positions
        self._stamps = StampGuard(max_gap_s)
        self._last_ns: int | None = None
        self._camera: Camera | None = None
        self._adapter = ImageAdapter(localizer.camera, localizer.camera)

    def records(self, part: ReplayRange) -> Iterator[FrameRecord]:
        """One record an image; one that cannot be used has ``processed`` False and the reason."""
        self._stamps.forget()  # the clock jumps back where a part begins, and the nodes are told
        for event in self._stream.events(part):
            if event.is_image:
                yield self._localize(event)
            else:
                self._set_camera(event)

    def _set_camera(self, event: BagEvent) -> None:
        try:
            self._camera = camera_from_info(self._stream.message_of(event), rectified=self._rectified)
        except FrameError:
            return  # as the nodes do: the last usable one counts

    def _localize(self, event: BagEvent) -> FrameRecord:
        truth = self._truth.get(event.stamp_ns)
        index = self._positions.get(event.stamp_ns, 0)
        try:
            fault = self._stamps.fault(event.stamp_ns)
            if fault:
                raise FrameError(fault)
            image = self._stream.rgb(self._stream.message_of(event))
            start = time.perf_counter()
            adapted = self._adapter_for(image)(image)
        except FrameError as error:
            return FrameRecord(index, event.stamp_ns, truth, reason=str(error), processed=False)
        rectify_ms = 1e3 * (time.perf_counter() - start)
        frame = Frame(
            adapted,
            self._localizer.camera,
            event.stamp_ns,
            index,
            T_map_camera=truth,
            source_camera=self._adapter.source,
        )
        if self._last_ns is not None and event.stamp_ns < self._last_ns:
            self._localizer.reset(WENT_BACKWARDS)
        self._last_ns = event.stamp_ns
        try:
            estimate = self._localizer.process(frame).estimate
        except FrameError as error:
            estimate = PoseEstimate(event.stamp_ns, TrackingState.LOST, str(error))
        latency_ms = 1e3 * (time.perf_counter() - start)
        return record_of(frame, estimate, latency_ms=latency_ms, rectify_ms=rectify_ms)

    def _adapter_for(self, image: NDArray[np.uint8]) -> ImageAdapter:
        camera = self._camera
        if camera is None:
            raise FrameError(f"No usable camera_info has come on '{self._stream.info.name}' before this image.")
        if (camera.width, camera.height) != (image.shape[1], image.shape[0]):
            raise FrameError(
                f"The image is {image.shape[1]}x{image.shape[0]}, its camera_info {camera.width}x{camera.height}."
            )
        if self._adapter.source != camera:
            check_view(camera, self._localizer.camera)
            self._adapter = ImageAdapter(camera, self._localizer.camera)
        return self._adapter


def run_offline(
    config: ReplayConfig, *, command: str = "", progress: Callable[[str, int, int], None] | None = None
) -> Summary:
    """Localize every image of the bag in this process and write the result folder.

    A KeyboardInterrupt ends the run; the summary of what was done until then is written and marked ``interrupted``.
    What concerns only live nodes (rate, separate, domain, patience) is not looked at.

    Raises:
        SourceError: the bag cannot be used.
        MapError: there is no such map, or it is damaged.
    """
    report = progress or (lambda text, done, total: None)
    map_path = resolve_map(config.map).absolute()
    device = str(choose_device(config.device))
    options = LocalizerConfig(device=device, filter=config.filter, refine=config.refine)
    records: list[FrameRecord] = []
    interrupted = False
    with config.open() as stream:
        total = stream.image_count(config.part) * config.loops
        truth = read_truth(stream, config.truth, config.truth_of)
        bag = BagLocalizer(
            stream,
            localizer_for(load_map(map_path), options),
            max_gap_s=options.max_gap_s,
            rectified=config.is_rectified(stream),
            truth=truth.poses,
            positions=stream.positions(),
        )
        start = time.perf_counter()
        try:
            for _ in range(config.loops):
                for record in bag.records(config.part):
                    records.append(record)
                    report("localizing", len(records), total)
        except KeyboardInterrupt:
            if not records:
                raise
            interrupted = True
        processed = sum(record.processed for record in records)
        run = RunInfo(
            kind="localize",
            command=command,
            map=str(map_path),
            source=str(config.bag),
            poses=truth.name,
            split=None,
            frames=None,
            hardware=describe_hardware(device),
            received=len(records),
            processed=processed,
            dropped=len(records) - processed,
            duration_s=time.perf_counter() - start,
            interrupted=interrupted,
            options={"offline": True, **config.played(stream)},
        )

        def images_of(worst: Sequence[FrameRecord]) -> dict[int, NDArray[np.uint8]]:
            return stream.images({record.stamp_ns for record in worst})

        return write_results(config.out, records, run, images_of=images_of)
