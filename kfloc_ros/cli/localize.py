# SPDX-License-Identifier: Apache-2.0
"""``kfloc localize``: localizes the frames of a source offline, without ROS, and evaluates the poses."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli.arguments import add_recursion_argument, add_source_arguments, need_camera, open_source_from
from kfloc_ros.errors import SourceError
from kfloc_ros.jobs import add_jobs_arguments, run_parts, workers_from

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from kfloc_ros.evaluation.collection import Collection
    from kfloc_ros.evaluation.offline import FrameRecord
    from kfloc_ros.evaluation.summary import RunInfo
    from kfloc_ros.frames import FrameSource
    from kfloc_ros.jobs import Workers
    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.localization.place_localizer import AnyLocalizer
    from kfloc_ros.maps.place import AnyMap

DESCRIPTION = """\
Localize every frame of SOURCE in a map, offline, and evaluate the poses against the source's ground truth.

Writes to OUT: summary.json, frames.csv, trajectory.tum, groundtruth.tum, report.html, report.md and plots.
Ctrl-C stops early and still writes the results of the processed frames.
"""

EPILOG = """\
examples:
  kfloc localize 7scenes:DIR --poses sfm --split blocks50:test --map maps/kitchen --out out/kitchen
  kfloc localize bag:out/room_bag --map maps/room --out out/room --no-filter
  kfloc localize sim:building-3-localize --map maps/building --out out/building_3
  kfloc localize 7scenes:DIR@test --map maps/chess --out out/chess --jobs 2
  kfloc localize bag:out/monday --map maps/room --out out/monday --collect out/lacking
  kfloc map update maps/room out/lacking --out maps/room_2

With --jobs or --scheduler, each recording of SOURCE is localized by a localizer of its own, with one thread. The
results are the same for any number of jobs, and on a cluster of like processors.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``localize`` subcommand."""
    parser = subparsers.add_parser(
        "localize",
        help="localize the frames of a source in a map, without ROS",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_source_arguments(parser)
    parser.add_argument("--map", required=True, metavar="DIR", help="map or place folder, or the name of a shipped map")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument("--force", action="store_true", help="replace the results of another run in OUT")
    parser.add_argument(
        "--no-filter", action="store_true", help="localize each frame independently, without the filter"
    )
    add_recursion_argument(parser)
    parser.add_argument("--no-refine", action="store_true", help="output the coarse pose, without alignment")
    parser.add_argument(
        "--tracking", action="store_true", help="align from the predicted pose while that succeeds; faster"
    )
    parser.add_argument(
        "--use-depth",
        action="store_true",
        help="measure the depth images of SOURCE, too: they correct poses and refuse those that they contradict",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    parser.add_argument(
        "--loaded-submaps",
        type=int,
        default=4,
        metavar="N",
        help="for a place: number of submaps in memory (default: 4)",
    )
    parser.add_argument(
        "--camera-check",
        choices=("off", "warn", "correct"),
        default="warn",
        help="check of the calibration by the images; correct: localize with the camera that fits (default: warn)",
    )
    parser.add_argument(
        "--submit",
        choices=("rio10", "lamar", "mapfree"),
        metavar="FORM",
        help="also write OUT/results_FORM.txt as a benchmark takes it: rio10, lamar (and CroCoDL) or mapfree",
    )
    parser.add_argument(
        "--collect",
        type=Path,
        metavar="DIR",
        help="write poor frames whose poses are confirmed by the frames around them to DIR, a source for `kfloc map "
        "update`; at most 500 MB",
    )
    add_jobs_arguments(parser, "recordings, each by a localizer of its own,")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc localize``; return 0 when done, 130 when interrupted."""
    source = open_source_from(args, depth=args.use_depth or args.collect is not None)
    need_camera(source)
    if args.use_depth and len(source) and (first := source.read(0)) is not None and first.depth_m is None:
        raise SourceError(f"'{source.name}' has no depth images: its first frame has none. Leave --use-depth out.")

    # Imported late, so that a mistyped SOURCE is reported before torch is loaded.
    from kfloc_ros.cli.tables import progress_bar, summary_table
    from kfloc_ros.device import limit_threads
    from kfloc_ros.evaluation.collection import Collection, cost_limit
    from kfloc_ros.evaluation.results import result_folder, write_results
    from kfloc_ros.localization.place_localizer import localizer_for
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.place import load_map

    limit_threads()
    config = _config_from(args)
    map_path = resolve_map(args.map)
    loaded = load_map(map_path)
    workers = workers_from(args)
    if args.collect is not None and workers:
        raise SourceError("--collect follows one localizer from frame to frame; omit --jobs and --scheduler.")
    localizer = None if workers else localizer_for(loaded, config)
    collection = None if args.collect is None else Collection(args.collect, max_cost=cost_limit(loaded))

    with result_folder(args.out, force=args.force):
        start = time.perf_counter()
        with progress_bar(total=len(source), unit="frame", disable=args.quiet) as bar:
            if localizer is not None:
                localized = _in_order(source, localizer, collection, bar)
            else:
                assert workers is not None
                localized = _in_parts(args, source, map_path, config, workers, bar)
        records = localized.records
        info = _run_info(args, source, map_path, config, localized, time.perf_counter() - start)
        if localized.interrupted and not records:
            raise KeyboardInterrupt
        if not records:
            raise SourceError(f"No frame of '{source.name}' can be used. The first: {info.left_out_first}")
        place = {index: position for position, index in enumerate(source.indices())}

        def images_of(worst: Sequence[FrameRecord]) -> dict[int, NDArray[np.uint8]]:
            return {record.stamp_ns: source[place[record.index]].image for record in worst}

        summary = write_results(args.out, records, info, images_of=images_of)
    if args.submit:
        from kfloc_ros.evaluation.trajectories import submission

        (args.out / f"results_{args.submit}.txt").write_text(submission(records, args.submit), encoding="utf-8")
    if not args.quiet:
        print(summary_table(summary))
        print(f"\nResults: {args.out / 'report.html'}; poses: {args.out / 'frames.csv'} (a line an image, by name)")
    for line in _remarks(source, loaded, collection, localized):
        print(line, file=sys.stderr)
    return 130 if localized.interrupted else 0


@dataclass
class _Localized:
    """Frames that were localized, and what was noticed."""

    records: list[FrameRecord] = field(default_factory=list)
    camera_notes: list[str] = field(default_factory=list)
    """What the images say against the camera; empty strings where nothing."""
    interrupted: bool = False


def _config_from(args: argparse.Namespace) -> LocalizerConfig:
    from kfloc_ros.device import choose_device
    from kfloc_ros.localization.config import LocalizerConfig

    return LocalizerConfig(
        device=str(choose_device(args.device)),
        filter=not args.no_filter,
        recursion=args.recursion,
        refine=not args.no_refine,
        tracking=args.tracking,
        camera_check=args.camera_check,
        use_depth=args.use_depth,
        loaded_submaps=args.loaded_submaps,
    )


def _in_order(source: FrameSource, localizer: AnyLocalizer, collection: Collection | None, bar: Any) -> _Localized:
    """Localize frame after frame by one localizer; Ctrl-C ends it with the frames so far."""
    from kfloc_ros.evaluation.offline import localize_frames

    localized = _Localized()
    try:
        for item in localize_frames(localizer, source):
            localized.records.append(item.record)
            if collection is not None:
                collection.offer(item.frame, item.estimate)
            bar.set_postfix_str(item.record.state, refresh=False)
            bar.update()
    except KeyboardInterrupt:
        localized.interrupted = True
    localized.camera_notes.append(localizer.camera_note)
    return localized


def _in_parts(
    args: argparse.Namespace, source: FrameSource, map_path: Path, config: LocalizerConfig, workers: Workers, bar: Any
) -> _Localized:
    """Localize each recording by a localizer of its own; the records are in the order of the source."""
    from kfloc_ros.evaluation.offline import Recording, localize_recording

    numbers = list(source.sequences())
    parts = [
        Recording(
            args.source, args.poses, args.frames, args.split, args.strict, number, map_path.absolute(), config
        )
        for number in dict.fromkeys(numbers)
    ]  # fmt: skip
    found = run_parts(
        localize_recording, parts, workers, on_done=lambda part: bar.update(numbers.count(parts[part].number))
    )
    place = {index: position for position, index in enumerate(source.indices())}
    records = sorted((record for part, _ in found for record in part), key=lambda record: place[record.index])
    return _Localized(records, [note for _, note in found])


def _run_info(
    args: argparse.Namespace, source: FrameSource, map_path: Path, config: LocalizerConfig, localized: _Localized,
    duration_s: float,
) -> RunInfo:  # fmt: skip
    from kfloc_ros.device import describe_hardware
    from kfloc_ros.evaluation.report import command_line
    from kfloc_ros.evaluation.summary import RunInfo

    return RunInfo(
        kind="localize",
        command=command_line(args.words),
        map=str(map_path),
        source=args.source,
        poses=args.poses,
        split=args.split,
        frames=args.frames,
        hardware=describe_hardware(config.device),
        received=len(localized.records),
        processed=len(localized.records),
        dropped=0,
        duration_s=duration_s,
        interrupted=localized.interrupted,
        left_out=len(source.left_out),
        left_out_first=next(iter(source.left_out.values()), ""),
        options={
            "device": config.device,
            "filter": config.filter,
            "recursion": config.recursion,
            "refine": config.refine,
            "tracking": config.tracking,
            **({"use_depth": True} if config.use_depth else {}),
        },
    )


def _remarks(
    source: FrameSource, loaded: AnyMap, collection: Collection | None, localized: _Localized
) -> Iterator[str]:
    """Yield what the user should know besides the figures."""
    from kfloc_ros.mapping.structure_scale import UNSCALED

    if collection is not None:
        yield collection.text
    if loaded.provenance.get("scale") == UNSCALED:
        yield f"The scale of the map is {UNSCALED} (see kfloc map scale)."
    for note in dict.fromkeys(filter(None, localized.camera_notes)):
        yield f"The camera does not fit: {note}."
    if localized.interrupted:
        yield f"Interrupted; the results cover the first {len(localized.records)} of {len(source)} frames."
