# SPDX-License-Identifier: Apache-2.0
"""PixLoc's training data: MegaDepth and CMU, and one's own in their layouts, a file of poses and points a scene.

``kfloc pixloc preprocess`` writes ``.npz`` files; the original's pickles are read, too, without unpickling them: see
``inert_pickle``. A folder DIR holds, as the original's data path:

| | MegaDepth | CMU Extended Seasons |
|---|---|---|
| one scene | ``megadepth_pixloc_training/SCENE.npz`` | ``cmu_pixloc_training/sliceN.npz`` |
| images | ``megadepth/Undistorted_SfM/SCENE/images/`` | ``CMU/sliceN/database/`` and ``CMU/sliceN/query/`` |
| trained on | ``train_scenes.txt``, else all but the validation's | slices 8-12 and 22-25 |
| validated on | ``valid_scenes.txt``, else the last scenes | slices 6, 13 and 21 |

The two lists lie beside the scenes: the names of scenes, one a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.datasets.images import read_image
from kfloc_ros.errors import FrameError, SourceError
from kfloc_ros.files import inside, read_bytes
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose
from kfloc_ros.pixloc.hloc.inert_pickle import read_inert
from kfloc_ros.training.pixloc_samples import PairRule, Pairs, make_pair, show
from kfloc_ros.training.preprocess import read_scene

KINDS = {"megadepth": "megadepth_pixloc_training", "cmu": "cmu_pixloc_training"}
"""Names of the data sets, and the folder of each one's pickles."""
CMU_TRAINING = (8, 9, 10, 11, 12, 22, 23, 24, 25)
CMU_VALIDATION = (6, 13, 21)
MAX_PAIRS = 20_000
"""Of a scene; more are thinned out."""
TRIES = 30

CMU_CAMERAS = {
    "c0": Camera(1024, 768, 868.993378, 866.063001, 525.442323, 419.542529,
                 "plumb_bob", (-0.399431, 0.188924, 0.000153, 0.000571, 0.0)),
    "c1": Camera(1024, 768, 873.382641, 876.489513, 528.824138, 396.772397,
                 "plumb_bob", (-0.397066, 0.181925, 0.000176, -0.000579, 0.0)),
}  # fmt: skip
"""The car's two cameras, which images name as the third part of theirs; the centre of the first pixel is (0, 0)."""


@dataclass(frozen=True, eq=False)
class View:
    """One image of a scene."""

    path: Path
    camera: CameraTensor | None
    """None where the size of the image completes it."""
    K: NDArray[np.float64] | None
    turns: int
    """Quarter turns, counter-clockwise, that bring the image upright; camera and pose are of the upright one."""
    T_camera_world: Matrix


@dataclass(frozen=True, eq=False)
class Scene:
    """Scene of a preprocessed training file."""

    queries: Sequence[View]
    references: Sequence[View]
    points: NDArray[np.float64]
    """(P, 3) world frame."""
    observed: Sequence[NDArray[np.int64]]
    """Rows of ``points`` that each reference sees."""
    pairs: NDArray[np.int64]
    """(M, 2) query and reference."""


@dataclass(frozen=True, eq=False)
class PreprocessedParts:
    """Training and validation."""

    training: PreprocessedSamples
    held_out: PreprocessedSamples | None


class PreprocessedSamples:
    """Draws pairs of one of the data sets' parts; the k-th sample is always the same.

    Args:
        scenes: at least one, each with pairs.
        name: of the part, for messages.
        rule: for pairs; its distance does not count, since the data say which views overlap.
        seed: of everything that is drawn.
    """

    def __init__(self, scenes: Sequence[Scene], name: str, rule: PairRule, seed: int) -> None:
        self._scenes, self._name, self._rule, self._seed = scenes, name, rule, seed

    def __len__(self) -> int:
        return sum(len(scene.pairs) for scene in self._scenes)

    def __getitem__(self, number: int) -> Pairs:
        """One pair, as a batch of one; every scene is as likely as any other.

        Raises:
            SourceError: an image cannot be read, or no crops of two views have enough in common.
        """
        rng = np.random.default_rng((self._seed, number))
        for _ in range(TRIES):
            scene = self._scenes[int(rng.integers(len(self._scenes)))]
            q, r = scene.pairs[int(rng.integers(len(scene.pairs)))]
            query, reference = scene.queries[q], scene.references[r]
            T = reference.T_camera_world
            points = scene.points[scene.observed[r]] @ T[:3, :3].T + T[:3, 3]
            shown = [self._shown(view, rng) for view in (reference, query)]
            T_true = query.T_camera_world @ inverse_pose(T)
            found = make_pair(shown[0], shown[1], points, T_true, self._rule, rng)
            if found is not None:
                return found
        raise SourceError(
            f"'{self._name}' has hardly a pair of views whose crops see the same: none of {TRIES} shares "
            f"{self._rule.min_overlap:.0%} of its points. Crop less, or lower min_overlap."
        )

    def _shown(self, view: View, rng: np.random.Generator) -> Any:
        try:
            pixels = read_image(view.path)
        except FrameError as error:
            raise SourceError(f"The image '{view.path}' is missing or damaged. {error}") from error
        image = np.ascontiguousarray(np.rot90(pixels, view.turns))
        camera = view.camera
        if camera is None:
            assert view.K is not None
            height, width = image.shape[:2]
            K = view.K
            camera = CameraTensor.from_camera(
                Camera(width, height, float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2]))
            )
        return show(image, camera, self._rule, rng)


def open_preprocessed(
    kind: str,
    root: Path,
    rule: PairRule,
    seed: int,
    share: float,
    chosen: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> PreprocessedParts:
    """Both parts of a data set.

    Args:
        kind: one of ``KINDS``.
        root: see above.
        rule: for pairs.
        seed: of pairs.
        share: of the scenes that are held out where no list says which.
        chosen: names of the scenes to train and to validate on; none: those that the data say.

    Raises:
        SourceError: nothing is there, a pickle is damaged or of another kind, or it holds no pairs.
    """
    folder = root / KINDS[kind]
    names = sorted({path.stem for ending in ("npz", "pkl") for path in folder.glob(f"[!.]*.{ending}")})
    if not names:
        raise SourceError(
            f"'{folder}' holds no scenes (.npz or .pkl); `kfloc pixloc preprocess {kind} {root}` makes them."
        )
    if missing := [name for part in chosen for name in part if name not in names]:
        raise SourceError(f"'{folder}' has no scene '{missing[0]}'; it holds {', '.join(names[:10])}.")
    training, held_out = _cmu_parts(names) if kind == "cmu" else _megadepth_parts(folder, names, share)
    training, held_out = list(chosen[0]) or training, list(chosen[1]) or held_out
    training = [name for name in training if name not in held_out or name in chosen[0]]
    read = _read_cmu if kind == "cmu" else _read_megadepth

    def samples(part: Sequence[str], name: str) -> PreprocessedSamples | None:
        scenes = [read(root, scene, rule, seed) for scene in part]
        scenes = [scene for scene in scenes if len(scene.pairs)]
        return PreprocessedSamples(scenes, f"{folder} ({name})", rule, seed) if scenes else None

    found = samples(training, "training")
    if found is None:
        raise SourceError(
            f"'{folder}' holds no scene to train on with pairs of views that share {rule.min_overlap:.0%}: looked at "
            f"{', '.join(training[:5]) or 'none'}{' and others' if len(training) > 5 else ''}."
        )
    return PreprocessedParts(found, samples(held_out, "validation"))


def _cmu_parts(names: Sequence[str]) -> tuple[list[str], list[str]]:
    training, held_out = (
        [f"slice{k}" for k in part if f"slice{k}" in names] for part in (CMU_TRAINING, CMU_VALIDATION)
    )
    return training, held_out


def _megadepth_parts(folder: Path, names: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    listed = [_listed(folder / file, names) for file in ("train_scenes.txt", "valid_scenes.txt")]
    held_out = listed[1]
    if held_out is None:
        rest = listed[0] if listed[0] is not None else names
        held_out = [name for name in names if name not in rest] or list(names[len(names) - round(share * len(names)) :])
    return [name for name in listed[0] or names if name not in held_out], held_out


def _listed(path: Path, names: Sequence[str]) -> list[str] | None:
    """The scenes of a list that there are; None without a list."""
    if not path.is_file():
        return None
    return [name for name in path.read_text(encoding="utf-8").split() if name in names]


def _read_megadepth(root: Path, name: str, rule: PairRule, seed: int) -> Scene:
    path = _scene_file(root / KINDS["megadepth"], name)
    images = root / "megadepth" / "Undistorted_SfM" / name / "images"
    content = _content(path)
    try:
        views = [
            View(inside(images, str(image)), None, _matrix(K, (3, 3)), int(turns), _pose(pose))
            for image, K, turns, pose in zip(
                content["image_names"], content["intrinsics"], content["rotations"], content["poses"], strict=True
            )
        ]
        # the overlap of (i, j) is the share of the points of i that j sees, and i is the reference
        pairs = _pairs(_matrix(content["overlap_matrix"], (len(views), len(views))), rule, seed)[:, ::-1]
        return _scene(content, views, views, pairs)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _misfit(path, error) from error


def _read_cmu(root: Path, name: str, rule: PairRule, seed: int) -> Scene:
    path = _scene_file(root / KINDS["cmu"], name)
    content = _content(path)

    def views(kind: str, folder: str) -> list[View]:
        found = []
        for image, pose in zip(content[f"{kind}_image_names"], content[f"{kind}_poses"], strict=True):
            camera = CMU_CAMERAS[Path(str(image)).name.split("_")[2]]
            place = inside(root / "CMU" / name / folder, str(image))
            found.append(View(place, CameraTensor.from_camera(camera), None, 0, _pose(pose)))
        return found

    try:
        queries, references = views("query", "query"), views("ref", "database")
        shape = (len(queries), len(references))
        overlap = _matrix(content["query_overlap_matrix"], shape)
        distances_m = _matrix(content["query_to_ref_distance_matrix"], shape)
        near = (distances_m >= rule.min_baseline_m) & (distances_m < rule.max_baseline_m)
        pairs = _pairs(np.where(near, overlap, -1.0), rule, seed)
        return _scene(content, queries, references, pairs)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _misfit(path, error) from error


def _scene_file(folder: Path, name: str) -> Path:
    own = folder / f"{name}.npz"
    return own if own.is_file() else folder / f"{name}.pkl"


def _content(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        try:
            return read_scene(path)
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            raise SourceError(f"The scene '{path}' is damaged: {error}; remove it and preprocess again.") from error
    try:
        content = read_inert(read_bytes(path))
    except OSError as error:
        raise SourceError(f"The scene '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise SourceError(
            f"The scene '{path}' is damaged, or holds more than the numbers and names that PixLoc's preprocessing "
            f"writes, and nothing is unpickled here: {error}"
        ) from error
    if not isinstance(content, Mapping):
        raise SourceError(f"'{path}' is no scene of PixLoc's preprocessing: it holds no dictionary.")
    return content


def _misfit(path: Path, error: Exception) -> SourceError:
    return SourceError(f"'{path}' is no scene of PixLoc's preprocessing of this data set: {error!r}.")


def _scene(
    content: Mapping[str, Any], queries: Sequence[View], references: Sequence[View], pairs: NDArray[np.int64]
) -> Scene:
    points = np.asarray(content["points3D"], dtype=np.float64)
    observed = [np.asarray(rows, dtype=np.int64) for rows in content["p3D_observed"]]
    if points.ndim != 2 or points.shape[1] != 3 or len(observed) != len(references):
        raise ValueError("points and views do not belong together")
    if any(len(rows) and not (rows.min() >= 0 and rows.max() < len(points)) for rows in observed):
        raise ValueError("a view sees a point that there is not")
    return Scene(queries, references, points, observed, pairs)


def _pairs(overlap: NDArray[np.float64], rule: PairRule, seed: int) -> NDArray[np.int64]:
    pairs = np.argwhere((overlap > rule.min_overlap) & (overlap <= rule.max_overlap))
    if len(pairs) > MAX_PAIRS:
        pairs = pairs[np.sort(np.random.default_rng(seed).choice(len(pairs), MAX_PAIRS, replace=False))]
    return pairs


def _matrix(values: Any, shape: tuple[int, int]) -> NDArray[np.float64]:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.shape != shape:
        raise ValueError(f"a matrix of {matrix.shape} where {shape} belongs")
    return matrix


def _pose(pose: Any) -> Matrix:
    R, t = pose
    return make_pose(_matrix(R, (3, 3)), np.asarray(t, dtype=np.float64).reshape(3))
