# SPDX-License-Identifier: Apache-2.0
"""The kinds of SOURCE: what each holds, how it is recognised, how it is opened (its module is loaded only then)."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kfloc_ros.datasets.scenes import split_part
from kfloc_ros.errors import SourceError
from kfloc_ros.frames import FrameSource

MANY = 5000
"""Entries of a folder that are looked at for a name that was meant."""


@dataclass(frozen=True)
class SourceKind:
    """One kind of SOURCE."""

    text: str
    """What it holds, for help."""
    open: Callable[[str, str, bool], FrameSource]
    """From path, which poses, and whether depth is to be read."""
    recognise: Callable[[Path], bool]
    """Whether a path looks like one, by names of files alone."""


def _seven_scenes(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.seven_scenes import SevenScenes, seven_scenes

    root, part = split_part(path)
    if part:
        return seven_scenes(root, part, poses=poses, depth=depth)
    return SevenScenes(root, poses=poses, depth=depth)


def _twelve_scenes(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.twelve_scenes import TwelveScenes

    return TwelveScenes(*split_part(path), depth=depth)


def _cambridge(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.cambridge import Cambridge

    return Cambridge(*split_part(path))


def _deeploc(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.cambridge import DeepLoc

    return DeepLoc(*split_part(path))


def _kfnet(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.kfnet import KfnetFolder

    return KfnetFolder(Path(path), depth=depth)


def _colmap(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.colmap import ColmapModel

    return ColmapModel(Path(path))


def _tum(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.tum import TumSequence

    return TumSequence(Path(path), depth=depth)


def _openloris(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.tum import OpenLorisSequence

    return OpenLorisSequence(Path(path), depth=depth)


def _euroc(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.capture import EurocSequence

    folder, camera = _choice(path, "sensor")
    return EurocSequence(folder, camera or "cam0")


def _rio10(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.seven_scenes import Rio10Sequence

    return Rio10Sequence(Path(path), depth=depth)


def _indoor6(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.scannet import Indoor6Scene, indoor6_part

    return Indoor6Scene(*indoor6_part(path))


def _capture(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.capture import CaptureSession

    text, sensor = _choice(path, "sensor")
    name = str(text).removesuffix("@queries")
    return CaptureSession(Path(name), sensor, queries=name != str(text), depth=depth)


def _choice(path: str, word: str) -> tuple[Path, str]:
    """Return folder and choice of ``PATH?word=choice``.

    Raises:
        SourceError: what follows the path is another word.
    """
    folder, mark, text = path.partition("?")
    name, _, value = text.partition("=")
    if mark and (name != word or not value):
        raise SourceError(f"After the path '{folder}' comes ?{word}=NAME; '{text}' is not of that form.")
    return Path(folder), value


def _transforms(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.transforms import TransformsFile

    return TransformsFile(Path(path), depth=depth)


def _scannet(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.scannet import ScanNetFolder

    return ScanNetFolder(Path(path), depth=depth)


def _bag(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.ros_bag import RosBag, split_words

    folder, words = split_words(path)
    return RosBag(folder, words, depth=depth)


def _images(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.pictures import ImageFolder

    return ImageFolder(Path(path))


def _video(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.datasets.pictures import open_video

    return open_video(path)


def _sim(path: str, poses: str, depth: bool) -> FrameSource:
    from kfloc_ros.simulation.building import building_source
    from kfloc_ros.simulation.source import SimulatedSource

    return building_source(path) if path.startswith("building") else SimulatedSource.from_name(path)


def _has(*names: str) -> Callable[[Path], bool]:
    """Whether a folder has all of these, each a pattern of names."""
    return lambda root: root.is_dir() and all(any(root.glob(name)) for name in names)


def _is_colmap(root: Path) -> bool:
    from kfloc_ros.datasets.colmap import find_model

    try:
        find_model(root)
    except SourceError as error:
        return "several" in str(error)
    return True


def _is_seven_scenes(root: Path) -> bool:
    found = _has("frame-*.color.*")(root) or _has("seq-*/frame-*.color.*")(root)
    return found and not _is_rio10(root)


def _is_rio10(root: Path) -> bool:
    return _has("frame-*.rendered.depth.png")(root)


def _is_image_folder(root: Path) -> bool:
    from kfloc_ros.datasets.pictures import has_image_files

    return has_image_files(root) and not (
        _is_seven_scenes(root) or _is_rio10(root) or (root / "image_list.txt").is_file()
    )


def _is_video(path: Path) -> bool:
    from kfloc_ros.datasets.pictures import VIDEO_ENDINGS

    return path.is_file() and path.suffix.lower() in VIDEO_ENDINGS


def _is_transforms(path: Path) -> bool:
    return path.suffix == ".json" if path.is_file() else (path / "transforms.json").is_file()


def _is_bag(path: Path) -> bool:
    return path.suffix in (".bag", ".mcap", ".db3") or any(_has(n)(path) for n in ("metadata.yaml", "*.mcap", "*.db3"))


KINDS = {
    "7scenes": SourceKind(
        "a folder with frame-000000.color.png|jpg, .depth.png, .pose.txt (or one seq-* folder in it); "
        "DIR@train and DIR@test are a scene's official split",
        _seven_scenes,
        _is_seven_scenes,
    ),
    "kfnet": SourceKind(
        "a folder with image_list.txt and, for maps, label_list.txt, as the original KFNet takes it",
        _kfnet,
        _has("image_list.txt"),
    ),
    "12scenes": SourceKind(
        "a scene's folder with info.txt, split.txt and data/; @train or @test for a part of its split",
        _twelve_scenes,
        _has("info.txt", "split.txt", "data"),
    ),
    "cambridge": SourceKind(
        "a scene's folder with dataset_train.txt and dataset_test.txt; @train or @test for one of them",
        _cambridge,
        _has("dataset_train.txt", "dataset_test.txt"),
    ),
    "deeploc": SourceKind(
        "a folder with train/ and test/, each with poses.txt and LeftImages/, and camera.txt; @train or @test for one",
        _deeploc,
        _has("train/poses.txt", "test/poses.txt"),
    ),
    "colmap": SourceKind("a folder with a COLMAP model and its images", _colmap, _is_colmap),
    "tum": SourceKind(
        "a TUM RGB-D sequence: rgb.txt, depth.txt, groundtruth.txt", _tum, _has("rgb.txt", "groundtruth.txt")
    ),
    "openloris": SourceKind(
        "an OpenLORIS-Scene sequence: color.txt, aligned_depth.txt, groundtruth.txt, sensors.yaml, trans_matrix.yaml",
        _openloris,
        _has("color.txt", "sensors.yaml"),
    ),
    "euroc": SourceKind(
        "a EuRoC sequence with mav0/; DIR?sensor=cam1 for another camera than cam0",
        _euroc,
        lambda root: _has("mav0/cam0")(root) or _has("cam0/data.csv")(root),
    ),
    "rio10": SourceKind(
        "a RIO10 sequence with frame-000000.color.jpg, .pose.txt, .rendered.depth.png, and intrinsics.txt above it",
        _rio10,
        _is_rio10,
    ),
    "indoor6": SourceKind(
        "an Indoor-6 scene with images/*.color.jpg, .pose.txt, .intrinsics.txt; @train, @val or @test for its split",
        _indoor6,
        _has("images/*.intrinsics.txt"),
    ),
    "capture": SourceKind(
        "a session of LaMAR or CroCoDL with sensors.txt, images.txt and raw_data/; DIR@queries for queries.txt; "
        "DIR?sensor=ID if there are several cameras",
        _capture,
        _has("sensors.txt", "images.txt"),
    ),
    "transforms": SourceKind(
        "a transforms.json of nerfstudio or instant-ngp, or its folder", _transforms, _is_transforms
    ),
    "scannet": SourceKind("a folder with color/, depth/, pose/ and intrinsic/", _scannet, _has("color", "pose")),
    "bag": SourceKind(
        "a rosbag2 folder or rosbag1 file; where it has several topics, PATH?image=/a&pose=/b (or pose=tf)",
        _bag,
        _is_bag,
    ),
    "images": SourceKind(
        "a folder of images without poses, sub-folders included (find poses with --sfm), and camera.txt if the camera "
        "is known",
        _images,
        _is_image_folder,
    ),
    "video": SourceKind("a video, or FILE?every=N for every N-th frame, without poses as images", _video, _is_video),
    "sim": SourceKind(
        "the rendered room of the demo: sim:map, sim:localize, or the shorter sim:map-quick, sim:localize-quick; "
        "a building of ten rooms like it: sim:building-K to map room K, sim:building-K-localize, and through its doors "
        "sim:building-walk-K-L. Other light and content of the demo's room: sim:localize?light=evening&moved=0.3, "
        "with light (day, evening, night), moved, exchanged, dirt (0 to 1), people, exposure (stops), change (seed)",
        _sim,
        lambda path: False,
    ),
}
"""Prefix of a SOURCE and its kind."""


def detect_kind(path: str) -> str:
    """Return the kind of the files at a path.

    Raises:
        SourceError: nothing is there, or the files fit no kind or several.
    """
    folder = Path(path) if Path(path).exists() else split_part(path.partition("?")[0])[0]
    if not folder.exists():
        raise SourceError(_missing(path, folder))
    found = _kinds_of(folder)
    if len(found) == 1:
        return found[0]
    if found:
        choices = ", ".join(f"{name}:{path}" for name in found)
        raise SourceError(f"'{path}' can be read as several kinds of SOURCE; name one: {choices}.")
    inside = [child.name for child in _listed(folder) if _kinds_of(child)]
    if inside and all(_are_photos(folder / name) for name in inside):
        return "images"
    hint = f"Did you mean '{folder / inside[0]}'? " if inside else ""
    raise SourceError(
        f"The kind of '{path}' is not recognised. {hint}Name the kind as KIND:PATH; `kfloc sources` lists the kinds "
        "and the files that each expects."
    )


def _are_photos(folder: Path) -> bool:
    from kfloc_ros.datasets.pictures import has_photos_only

    return has_photos_only(folder) and _kinds_of(folder) == ["images"]


def _kinds_of(path: Path) -> list[str]:
    return [name for name, kind in KINDS.items() if kind.recognise(path)]


def _listed(folder: Path, most: int = 50) -> list[Path]:
    """Return the first entries of a folder, by name; empty for a file or an unreadable folder."""
    try:
        return sorted(itertools.islice(folder.iterdir(), MANY))[:most]
    except OSError:
        return []


def _missing(path: str, folder: Path) -> str:
    """Return the sentence for a path that does not exist, with the likely correction."""
    prefix, separator, rest = path.partition(":")
    if separator and prefix not in KINDS and "/" not in prefix:
        near = difflib.get_close_matches(prefix.lower(), KINDS, n=1)
        hint = (
            f"Did you mean '{near[0]}:{rest}'?"
            if near
            else f"A SOURCE is written KIND:PATH; kinds: {', '.join(KINDS)}."
        )
        return f"There is no kind of SOURCE '{prefix}'. {hint} `kfloc sources` lists the kinds."
    near = difflib.get_close_matches(folder.name, [child.name for child in _listed(folder.parent, MANY)], n=1)
    hint = f"Did you mean '{folder.parent / near[0]}'? " if near else ""
    return (
        f"There is nothing at '{folder}'. {hint}A SOURCE is written KIND:PATH or PATH; `kfloc sources` lists the kinds."
    )
