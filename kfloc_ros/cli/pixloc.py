# SPDX-License-Identifier: Apache-2.0
"""``kfloc pixloc``: benchmark runs of PixLoc (``run``), and the registration of ``localize``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kfloc_ros.cli import pixloc_localize, pixloc_preprocess
from kfloc_ros.cli.arguments import OverridesParser
from kfloc_ros.jobs import add_jobs_arguments, call, run_parts, workers_from

if TYPE_CHECKING:
    import torch

    from kfloc_ros.pixloc.hloc.layouts import DataSet, Paths
    from kfloc_ros.pixloc.hloc.options import RunOptions
    from kfloc_ros.pixloc.reference.model import PixLocModel
    from kfloc_ros.types import Matrix

NAMES = ("7scenes", "cambridge", "aachen", "cmu", "robotcar")
PATHS = {
    "reference_sfm": "COLMAP model of the references",
    "query_list": "queries with intrinsics: name MODEL w h params",
    "retrieval": "pairs of query and reference: query reference",
    "global_descriptors": "descriptors by image, .npz, .safetensors or .h5 (h5py)",
    "hloc_logs": "hloc's *_logs.pkl; no code in it is executed",
    "results": "results, 'name qw qx qy qz tx ty tz', world to camera",
}

DESCRIPTION = """\
PixLoc: camera poses by direct alignment of deep features. `run` replaces the original's run_7Scenes, run_Cambridge,
run_Aachen, run_CMU and run_RobotCar; `localize` localizes a single image; `preprocess` makes training data.
"""

RUN_DESCRIPTION = """\
Localize the queries of a benchmark with a trained PixLoc model. Prints the original's metrics (7-Scenes and Cambridge)
or writes the file to submit (the others). Options have the original's names and defaults, and are changed with
key=value (refinement.num_dbs=3 optimizer.num_iters=50 features.preprocessing.resize=640) or in a YAML file (--conf).
Every key of the original's is taken or refused with the reason.

Weights: --weights FILE, or experiment=NAME for outputs/training/NAME, where `kfloc train` and the original put them
(pixloc_best.safetensors, pixloc.safetensors, checkpoint_best.tar); default: the data set's published experiment.
Folders: datasets/NAME, outputs/hloc/NAME and outputs/results in the working directory, as in the original.
"""

RUN_EPILOG = """\
examples:
  kfloc pixloc run 7scenes --weights W.safetensors --dataset 7Scenes --dumps hloc/7Scenes --scenes heads stairs
  kfloc pixloc run aachen --weights W.safetensors --dataset Aachen --from-poses --hloc-logs aachen_logs.pkl --skip 10
  kfloc pixloc run cmu experiment=pixloc_cmu_mine --slices 2-6 refinement.num_dbs=3
  kfloc pixloc run cmu --conf config/run/cmu.yaml

Layouts of the data sets: docs/reference/pixloc.md.
"""


def add_parser(subparsers: Any) -> None:
    """Register ``kfloc pixloc`` and its actions."""
    parser = subparsers.add_parser(
        "pixloc",
        help="run PixLoc on benchmark data sets or on one image",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=OverridesParser)
    _add_run(actions)
    pixloc_localize.add_parser(actions)
    pixloc_preprocess.add_parser(actions)


def _add_run(actions: Any) -> None:
    """Add the ``run`` action."""
    from kfloc_ros.config import options_of
    from kfloc_ros.pixloc.hloc.layouts import RESULTS
    from kfloc_ros.pixloc.hloc.options import RunOptions

    options = "\n".join(f"  {o.name}={o.default}  {o.text}" for o in options_of(RunOptions))
    parser = actions.add_parser(
        "run",
        help="localize the queries of a benchmark",
        description=RUN_DESCRIPTION,
        epilog=f"{RUN_EPILOG}\noptions as key=value (defaults of 7scenes from retrieval):\n{options}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data_set", type=str.lower, choices=NAMES, metavar="DATASET", help=", ".join(NAMES))
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="model of `kfloc convert` or `kfloc train`, or a checkpoint_best.tar",
    )
    parser.add_argument("--conf", type=Path, metavar="FILE", help="YAML with options; key=value words override it")
    parser.add_argument("--dataset", type=Path, metavar="DIR", help="images and ground truth (default: datasets/NAME)")
    parser.add_argument(
        "--dumps", type=Path, metavar="DIR", help="models, lists, pairs (default: outputs/hloc/NAME, else --dataset)"
    )
    parser.add_argument(
        "--eval-dir", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (default: outputs/results)"
    )
    parser.add_argument(
        "--scenes", "--slices", "--conditions", dest="parts", nargs="+", metavar="NAME",
        help="scenes, slices (also 2-6) or conditions to run (default: all)",
    )  # fmt: skip
    parser.add_argument("--from-poses", action="store_true", help="refine the poses in hloc's log")
    parser.add_argument("--inlier-ranking", action="store_true", help="rank references by inliers in hloc's log")
    parser.add_argument("--skip", type=int, default=1, metavar="N", help="run every N-th query only")
    parser.add_argument("--eval-only", action="store_true", help="evaluate existing results instead of computing them")
    parser.add_argument(
        "--cache", metavar="FILE", help="cache file of reference features; can contain {scene}, {slice} and so on"
    )
    paths = parser.add_argument_group("files that differ from the data set's layout; can contain {scene} and so on")
    for name, text in PATHS.items():
        paths.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PATH", help=text)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the network")
    add_jobs_arguments(parser, "scenes, slices or conditions")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--verbose", action="store_true", help="print a line for every query")
    pixloc_localize.add_show_arguments(parser)
    parser.set_defaults(run_action=run_benchmark)


def run_benchmark(args: argparse.Namespace) -> int:
    """Run ``kfloc pixloc run`` on all selected parts; return 1 if no query was localized."""
    from kfloc_ros.cli.train_run import read_conf
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.pixloc.hloc.layouts import DATA_SETS, DATASETS, DUMPS, ORIGINAL_NAMES, choose_parts, paths_of
    from kfloc_ros.pixloc.hloc.options import run_options, translate

    if args.skip < 1:
        raise ConfigError(f"--skip takes 1 or more, got {args.skip}.")
    data_set = DATA_SETS[args.data_set]
    conf = read_conf(args.conf)
    args.weights = _weights(args, conf)
    options = run_options(
        args.data_set, from_poses=args.from_poses, words=args.overrides, inlier_ranking=args.inlier_ranking, conf=conf
    )
    for note in translate(conf, args.overrides).notes:
        print(f"no effect here: {note}")
    usual = ORIGINAL_NAMES[args.data_set]
    args.dataset = args.dataset or DATASETS / usual
    args.dumps = args.dumps or (DUMPS / usual if (DUMPS / usual).is_dir() else args.dataset)
    if args.scheduler:  # a worker's folder may be another
        for name in ("weights", "dataset", "dumps", "eval_dir", *PATHS):
            setattr(args, name, (path := getattr(args, name)) and path.absolute())
    parts = choose_parts(data_set, args.parts)
    given = {name: getattr(args, name) for name in PATHS}
    every = {part: paths_of(data_set, part, args.dataset, args.dumps, args.eval_dir, given) for part in parts}
    if len({paths.results for paths in every.values()}) < len(parts):
        raise ConfigError(f"--results is one file for {len(parts)} parts; put {{{data_set.part_name}}} into its name.")
    workers = None if args.eval_only else workers_from(args)
    found: dict[str, dict[str, Matrix]] = {}
    if workers is not None:
        work = [partial(_run_part, args, data_set, part, paths, options) for part, paths in every.items()]
        found = dict(zip(every, run_parts(call, work, workers), strict=True))
    localized = 0
    for part, paths in every.items():
        if args.eval_only:
            poses = _existing(paths)
        else:
            poses = found[part] if workers else _run_part(args, data_set, part, paths, options)
        localized += len(poses)
        if data_set.evaluated:
            print(f"{part}: {_figures(paths, poses, args.skip)}", flush=True)
    if not data_set.evaluated and len(parts) > 1:
        print(f"To submit: {_together(data_set, every, args)}")
    return 0 if localized else 1


def _run_part(
    args: argparse.Namespace, data_set: DataSet, part: str, paths: Paths, options: RunOptions
) -> dict[str, Matrix]:
    """Localize one part's queries and write the results; return the poses by the names in the results."""
    from kfloc_ros.cli.show_alignment import PixLocPictures
    from kfloc_ros.cli.tables import progress_bar
    from kfloc_ros.files import inside
    from kfloc_ros.pixloc.hloc.files import result_name, write_poses
    from kfloc_ros.pixloc.hloc.layouts import queries_of
    from kfloc_ros.pixloc.hloc.plan import Planner
    from kfloc_ros.pixloc.hloc.run import gather_views, log_entry, read_image, run_queries, view_settings
    from kfloc_ros.pixloc.reference.refiner import ReferenceRefiner
    from kfloc_ros.pixloc.reference.two_view import AlignmentTrace
    from kfloc_ros.pixloc.reference.views import read_scene

    model, device = _model(args)
    queries = queries_of(args.data_set, part, paths)
    names = list(queries)[:: args.skip]
    scene = read_scene(paths.reference_sfm)
    # a log whose path is a default is used only if necessary
    planner = Planner.from_files(scene, paths, options, needs_log=args.from_poses or bool(args.hloc_logs))
    make = planner.from_pose if args.from_poses else planner.from_retrieval
    plans = {name: make(name) for name in names}
    label = f"{args.data_set} {part}".strip()
    silent = args.quiet
    cache = Path(str(args.cache).replace(f"{{{data_set.part_name or 'part'}}}", part)) if args.cache else None
    with progress_bar(desc=f"{label}: references", unit="image", disable=silent) as bar:

        def show(done: int, total: int, _: str) -> None:
            bar.total = total
            bar.update(done - bar.n)

        positions = [view for plan in plans.values() for view in plan.views]
        store = gather_views(
            model.to(device), scene, positions, paths.reference_images,
            view_settings(options, device), cache=cache,
            on_progress=show,
        )  # fmt: skip
    refiner = ReferenceRefiner(model, scene, store, options.settings())
    poses: dict[str, Matrix] = {}
    entries: dict[str, Any] = {}
    success = 0
    traces: dict[str, AlignmentTrace] = {}
    pictures = None
    if args.show is not None:
        folder = args.show / part if part else args.show
        pictures = PixLocPictures(folder, label, scene, paths.reference_images, refiner.solver.loss, args.codec)

    def watcher(name: str) -> AlignmentTrace:
        traces[name] = AlignmentTrace()
        return traces[name]

    progress = progress_bar(total=len(plans), desc=f"{label}: queries", unit="query", disable=silent)
    try:
        for result in run_queries(refiner, queries, plans, paths.query_images, watcher if pictures else None):
            if result.T_map_camera is not None:
                poses[result_name(result.name, keep_parent=data_set.keep_parent)] = result.T_map_camera
            entries[result.name] = log_entry(result, scene)
            success += result.success
            if args.verbose:
                entry = entries[result.name]
                print(f"{result.name}: {entry['reason'] or 'aligned'}, score {entry.get('score', 0.0):.2f}", flush=True)
            if pictures is not None and (trace := traces.pop(result.name, None)) is not None and result.refinement:
                camera = queries[result.name]
                image = read_image(inside(paths.query_images, result.name), camera)
                pictures.add(result.name, image, camera, trace, result.refinement.views, result.reason)
            progress.update()
    finally:
        progress.close()
        drawn = pictures.close() if pictures is not None else []
        write_poses(paths.results, poses)
        _write_log(args, paths, options, entries)
    print(f"{label}: {success} of {len(plans)} queries aligned, {len(poses)} poses in {paths.results}", flush=True)
    for line in drawn:
        print(line)
    for reason, count in _common_reasons(entries)[:3]:
        print(f"  {count} not aligned: {reason}")
    return poses


def _write_log(args: argparse.Namespace, paths: Paths, options: RunOptions, entries: Mapping[str, Any]) -> None:
    log = {
        "paths": {key: str(value) for key, value in asdict(paths).items() if value is not None},
        "configuration": {"weights": str(args.weights), "from_poses": args.from_poses, **asdict(options)},
        "localization": entries,
    }
    Path(f"{paths.results}_logs.json").write_text(json.dumps(log, indent=1) + "\n")


def _common_reasons(entries: Mapping[str, Any]) -> list[tuple[str, int]]:
    from collections import Counter

    return Counter(entry["reason"] for entry in entries.values() if not entry["success"]).most_common()


def _model(args: argparse.Namespace) -> tuple[PixLocModel, torch.device]:
    from kfloc_ros.device import choose_device
    from kfloc_ros.pixloc.reference.checkpoint import load_weights

    return load_weights(args.weights), choose_device(args.device)


def _weights(args: argparse.Namespace, conf: dict[str, Any]) -> Path | None:
    """Return the file of --weights, or of ``experiment=NAME`` in the words or the configuration, and remove the key.

    Raises:
        ConfigError: both are given.
        WeightsError: the experiment has no weights.
    """
    from kfloc_ros.cli.train_run import experiment_weights
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.pixloc.hloc.options import PUBLISHED

    names = [word.partition("=")[2] for word in args.overrides if word.startswith("experiment=")]
    args.overrides = [word for word in args.overrides if not word.startswith("experiment=")]
    in_file = conf.pop("experiment", None)
    if args.weights is not None and names:
        raise ConfigError("--weights and experiment=NAME both give weights; omit one of them.")
    if args.weights is not None or args.eval_only:
        return args.weights  # type: ignore[no-any-return]
    name = str(names[-1] if names else in_file or PUBLISHED[args.data_set])
    return experiment_weights(name)


def _existing(paths: Paths) -> dict[str, Matrix]:
    from kfloc_ros.pixloc.hloc.files import read_poses

    return read_poses(paths.results)


def _figures(paths: Paths, poses: Mapping[str, Matrix], skip: int) -> str:
    """Return medians and recall against the ground truth as text."""
    from kfloc_ros.errors import SourceError
    from kfloc_ros.geometry.lie import inverse_pose
    from kfloc_ros.pixloc.hloc.files import accuracy_text
    from kfloc_ros.pixloc.hloc.layouts import read_names
    from kfloc_ros.pixloc.reference.views import read_scene

    if paths.ground_truth is None or not paths.ground_truth.is_dir():
        return f"not evaluated: there is no ground truth in '{paths.ground_truth}'"
    truth = {image.name: inverse_pose(image.T_camera_map) for image in read_scene(paths.ground_truth).images}
    if paths.truth_list is not None and paths.truth_list.is_file():
        listed = read_names(paths.truth_list)
        if unknown := next((name for name in listed if name not in truth), None):
            raise SourceError(f"'{paths.truth_list}' lists '{unknown}', which is not in the ground truth.")
        truth = {name: truth[name] for name in listed}
    return accuracy_text(poses, truth, only_estimated=skip > 1)


def _together(data_set: DataSet, every: Mapping[str, Paths], args: argparse.Namespace) -> Path:
    """Join the results of all parts in one file; return its path."""
    from kfloc_ros.pixloc.hloc.layouts import paths_of

    label = "-".join(part[:3] for part in every)
    given = {"results": args.results}
    target = paths_of(data_set, label, args.dataset, args.dataset, args.eval_dir, given).results
    target.write_text("".join(paths.results.read_text() for paths in every.values()))
    return target
