# SPDX-License-Identifier: Apache-2.0
"""Layouts of the benchmarks' data sets: paths of their files, as the original expects them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from kfloc_ros.errors import SourceError
from kfloc_ros.files import read_text
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.colmap import camera_from_parameters
from kfloc_ros.pixloc.hloc.files import read_queries

CMU_SLICES = tuple(str(n) for n in (*range(2, 7), *range(13, 22)))
ROBOTCAR_SIZE = 1024


@dataclass(frozen=True)
class Layout:
    """Paths of one data set; ``{part}`` stands for a scene, a slice or a condition.

    Images and ground truth are relative to the data set's folder; lists, models and logs to that of hloc's outputs;
    results to the folder for results.
    """

    query_images: str
    reference_images: str
    reference_sfm: str
    query_list: str
    retrieval: str
    results: str
    global_descriptors: str = ""
    hloc_logs: str = ""
    ground_truth: str = ""
    truth_list: str = ""
    """Names of the images to evaluate; with ``ground_truth``, a COLMAP model."""


@dataclass(frozen=True)
class DataSet:
    """Benchmark data set."""

    layout: Layout
    part_name: str
    """Name of ``{part}`` in this data set."""
    parts: tuple[str, ...]
    keep_parent: bool
    """True if names in results keep the last folder."""
    evaluated: bool
    """True if there is ground truth to evaluate with; otherwise the results are to be submitted."""


DATA_SETS: Mapping[str, DataSet] = {
    "7scenes": DataSet(
        Layout(
            query_images="{part}",
            reference_images="{part}",
            reference_sfm="{part}/sfm_superpoint+superglue+depth",
            query_list="{part}/query_list_with_intrinsics.txt",
            retrieval="7scenes_densevlad_retrieval/{part}_top10.txt",
            results="pixloc_7scenes_{part}.txt",
            hloc_logs="{part}/results_dense.txt_logs.pkl",
            ground_truth="7scenes_sfm_triangulated/{part}/triangulated",
            truth_list="7scenes_sfm_triangulated/{part}/triangulated/list_test.txt",
        ),
        "scene",
        ("chess", "fire", "heads", "office", "pumpkin", "redkitchen", "stairs"),
        keep_parent=True,
        evaluated=True,
    ),
    "cambridge": DataSet(
        Layout(
            query_images="{part}",
            reference_images="{part}",
            reference_sfm="{part}/sfm_superpoint+superglue",
            query_list="{part}/query_list_with_intrinsics.txt",
            retrieval="{part}/pairs-query-netvlad10.txt",
            results="pixloc_Cambridge_{part}.txt",
            hloc_logs="{part}/results.txt_logs.pkl",
            ground_truth="CambridgeLandmarks_Colmap_Retriangulated_1024px/{part}/empty_all",
            truth_list="CambridgeLandmarks_Colmap_Retriangulated_1024px/{part}/list_query.txt",
        ),
        "scene",
        ("ShopFacade", "KingsCollege", "GreatCourt", "OldHospital", "StMarysChurch"),
        keep_parent=True,
        evaluated=True,
    ),
    "aachen": DataSet(
        Layout(
            query_images="images/images_upright",
            reference_images="images/images_upright",
            reference_sfm="sfm_superpoint+superglue",
            query_list="*_time_queries_with_intrinsics.txt",
            retrieval="pairs-query-netvlad50.txt",
            results="pixloc_Aachen.txt",
            global_descriptors="aachen_tf-netvlad.h5",
            hloc_logs="Aachen_hloc_superpoint+superglue_netvlad50.txt_logs.pkl",
        ),
        "",
        ("",),
        keep_parent=False,
        evaluated=False,
    ),
    "cmu": DataSet(
        Layout(
            query_images="slice{part}/query",
            reference_images="slice{part}/database",
            reference_sfm="slice{part}/sfm_superpoint+superglue/model",
            query_list="slice{part}/queries_with_intrinsics.txt",
            retrieval="slice{part}/pairs-query-netvlad10.txt",
            results="pixloc_CMU_slice{part}.txt",
            global_descriptors="slice{part}/cmu-slice{part}_tf-netvlad.h5",
            hloc_logs="slice{part}/CMU_hloc_superpoint+superglue_netvlad10_slice{part}.txt_logs.pkl",
        ),
        "slice",
        CMU_SLICES,
        keep_parent=False,
        evaluated=False,
    ),
    "robotcar": DataSet(
        Layout(
            query_images="images",
            reference_images="images",
            reference_sfm="sfm_superpoint+superglue",
            query_list="{part}_queries_with_intrinsics.txt",
            retrieval="pairs-query-netvlad10-percam-perloc.txt",
            results="pixloc_RobotCar_{part}.txt",
            global_descriptors="robotcar_ov-ref_tf-netvlad.h5",
            hloc_logs="RobotCar_hloc_superpoint+superglue_netvlad10.txt_logs.pkl",
        ),
        "condition",
        ("dawn", "dusk", "night", "night-rain", "overcast-summer", "overcast-winter", "rain", "snow", "sun"),
        keep_parent=True,
        evaluated=False,
    ),
}

ORIGINAL_NAMES = dict(zip(DATA_SETS, ("7Scenes", "Cambridge", "Aachen", "CMU", "RobotCar"), strict=True))
"""Names of the data sets' folders in the original's ``datasets/`` and ``outputs/hloc/``."""
DATASETS, DUMPS, RESULTS = Path("datasets"), Path("outputs/hloc"), Path("outputs/results")
"""Folders of the original, in the working directory."""

_IN_DATA_SET = ("query_images", "reference_images", "ground_truth", "truth_list")
_RESULTS = ("results",)


@dataclass(frozen=True)
class Paths:
    """Files of one part of a data set; None for files that the data set does not have."""

    dataset: Path
    query_images: Path
    reference_images: Path
    reference_sfm: Path
    query_list: Path
    retrieval: Path
    results: Path
    global_descriptors: Path | None
    hloc_logs: Path | None
    ground_truth: Path | None
    truth_list: Path | None


def paths_of(
    data_set: DataSet, part: str, dataset: Path, dumps: Path, eval_dir: Path, given: Mapping[str, Path | None]
) -> Paths:
    """Return the paths of a part; ``given`` ones replace the default, with ``{part}`` (or ``{scene}``) filled in."""
    found: dict[str, Path | None] = {}
    for item in fields(Layout):
        text: str = getattr(data_set.layout, item.name)
        root = dataset if item.name in _IN_DATA_SET else eval_dir if item.name in _RESULTS else dumps
        path = given.get(item.name)
        chosen = str(path) if path is not None else str(root / text) if text else ""
        for name in ("part", data_set.part_name or "part"):
            chosen = chosen.replace(f"{{{name}}}", part)
        found[item.name] = Path(chosen) if chosen else None
    return Paths(dataset=dataset, **found)  # type: ignore[arg-type]


def choose_parts(data_set: DataSet, words: Sequence[str] | None) -> tuple[str, ...]:
    """Return the parts that a user named; slices may be given as 2-6, lists also as [2, 3].

    Raises:
        SourceError: there is no such part.
    """
    if not words:
        return data_set.parts
    chosen: list[str] = []
    for word in re.findall(r"[^\s,\[\]]+", " ".join(words)):
        interval = re.fullmatch(r"(\d+)-(\d+)", word)
        if interval and data_set.part_name == "slice":
            chosen += [str(n) for n in range(int(interval[1]), int(interval[2]) + 1)]
        elif word in data_set.parts or (data_set.part_name == "slice" and word.isdigit()):
            chosen.append(word)
        else:
            known = ", ".join(filter(None, data_set.parts)) or "none, it is one piece"
            raise SourceError(f"This data set has no {data_set.part_name or 'part'} '{word}'; it has: {known}.")
    return tuple(dict.fromkeys(chosen))


def queries_of(name: str, part: str, paths: Paths) -> dict[str, Camera]:
    """Return queries with their cameras; for CMU and RobotCar they are composed if there is no list.

    Raises:
        SourceError: a list or the intrinsics are missing or damaged.
    """
    if name == "cmu" and not paths.query_list.is_file():
        return _cmu_queries(part, paths)
    if name == "robotcar" and not paths.query_list.is_file():
        return _robotcar_queries(part, paths)
    return read_queries(paths.query_list)


def _cmu_queries(part: str, paths: Paths) -> dict[str, Camera]:
    cameras = read_queries(paths.dataset / "intrinsics.txt")
    listed = paths.dataset / f"slice{part}" / f"test-images-slice{part}.txt"
    queries: dict[str, Camera] = {}
    for name in read_names(listed):
        camera = (name.split("_")[2:3] or [""])[0]
        if camera not in cameras:
            raise SourceError(f"'{listed}' names '{name}', whose camera '{camera}' is not in 'intrinsics.txt'.")
        queries[name] = cameras[camera]
    return queries


def _robotcar_queries(part: str, paths: Paths) -> dict[str, Camera]:
    cameras = {side: _robotcar_camera(paths.dataset / f"intrinsics/{side}_intrinsics.txt") for side in _SIDES}
    folder = paths.query_images / part
    queries = {
        str(path.relative_to(paths.query_images)): cameras[path.parent.name]
        for path in sorted(folder.glob("**/*.jpg"))
        if path.parent.name in cameras
    }
    if not queries:
        raise SourceError(f"There is neither a list '{paths.query_list}' nor an image below '{folder}'.")
    return queries


_SIDES = ("left", "right", "rear")


def _robotcar_camera(path: Path) -> Camera:
    values = dict(line.split()[:2] for line in read_lines(path) if len(line.split()) >= 2)
    try:
        fx, cx, cy = (float(values[key]) for key in ("fx", "cx", "cy"))
    except (KeyError, ValueError) as error:
        raise SourceError(f"'{path}' is not 'fx', 'fy', 'cx', 'cy' with a number each: {error}") from error
    return camera_from_parameters("SIMPLE_RADIAL", ROBOTCAR_SIZE, ROBOTCAR_SIZE, [fx, cx, cy, 0.0])


def read_names(path: Path) -> list[str]:
    """Return the first words of a list's lines."""
    return [line.split()[0] for line in read_lines(path) if line.strip() and not line.startswith("#")]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        return read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"'{path}' cannot be read: {error}") from error
