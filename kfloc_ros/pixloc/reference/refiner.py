# SPDX-License-Identifier: Apache-2.0
"""Refiner of the reference family: aligns an image with cached features of several reference images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from kfloc_ros.errors import ConfigError, MapError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.camera_tensor import CameraTensor
from kfloc_ros.geometry.lie import Matrix, inverse_pose
from kfloc_ros.geometry.tensors import Pose
from kfloc_ros.pixloc.reference.cost import FeatureCost, FeatureMap, NormalEquations, Score, pose_covariance, score_of
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.model import PixLocModel, extract
from kfloc_ros.pixloc.reference.solver import Method, SolverSettings, from_recentred, minimize, recentre
from kfloc_ros.pixloc.reference.two_view import AlignmentTrace, LevelObserver, in_world
from kfloc_ros.pixloc.reference.unet import FeaturePyramid
from kfloc_ros.pixloc.reference.views import ReferenceScene, ViewFeatures, ViewSettings, ViewStore, fingerprint_of


@dataclass(frozen=True)
class ReferenceRefinerSettings:
    """Settings of the reference family's refinement; the names are the original's.

    Raises:
        ConfigError: a number is out of its range.
    """

    num_dbs: int = 5
    """Largest number of reference images used."""
    num_iters: int = 100
    """Largest number of LM iterations a level."""
    pad: int = 2
    multiscale: tuple[int, ...] = (1,)
    """Image scales in turn: (4, 1) first aligns images a quarter as large."""
    layer_indices: tuple[int, ...] = ()
    """Levels to use, 0 being the finest; empty: all."""
    average_observations: bool = False
    """One residual per point with the mean of its reference features, instead of one per point and image."""
    min_track_length: int = 3
    min_points_opt: int = 10
    method: Method = Method.FIXED
    stop_period: int = 10
    legacy: bool = False
    """Reproduce the original's numbers where this implementation improves on them."""
    min_score: float = 0.0
    """Smallest accepted success score."""
    loss: str = ""
    """Robust loss; empty: the model's."""
    jacobi_scaling: bool | None = None
    """None: as the model was trained."""
    normalize_features: bool | None = None
    """Features of unit length; None: as the model was trained."""
    cubic: bool = False
    """Interpolate feature maps by cubic convolution, not bilinearly."""
    use_confidences: bool = True
    """Weigh residuals by the network's confidences."""
    stop_step_m: float = 5e-3
    stop_step_deg: float = 0.05
    stop_gradient: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.num_dbs, self.num_iters, self.min_track_length, self.min_points_opt) < 1 or self.pad < 1:
            raise ConfigError("num_dbs, num_iters, pad, min_track_length and min_points_opt must be 1 or more.")
        if not self.multiscale or min(self.multiscale) < 1 or (self.layer_indices and min(self.layer_indices) < 0):
            raise ConfigError("multiscale takes factors of 1 or more, and layer_indices levels from 0 on.")
        if self.loss:
            RobustLoss.parse(self.loss)


@dataclass(frozen=True, eq=False)
class Refinement:
    """Result for one image."""

    success: bool
    reason: str
    """Reason of a failure; empty on success."""
    T_map_camera: Matrix | None
    """Refined pose (4, 4); None if the alignment could not run."""
    T_map_camera_init: Matrix
    covariance: Matrix | None
    """(6, 6) in the order of ``PoseWithCovariance``."""
    score: Score
    iterations: tuple[int, ...]
    """Iterations of every image scale and level, in the order run."""
    point_count: int
    views: tuple[int, ...]
    """Positions of the reference images used."""


@dataclass(frozen=True, eq=False)
class _References:
    """Points of all chosen images, with their features at every level."""

    points: torch.Tensor
    rows: torch.Tensor
    features: tuple[torch.Tensor, ...]
    confidences: tuple[torch.Tensor, ...]


class ImagePyramids:
    """Features of one image by image scale, extracted when first asked for and then kept."""

    def __init__(self, model: PixLocModel, settings: ViewSettings, image: NDArray[np.uint8]) -> None:
        self._model, self._settings, self.image = model, settings, image
        self._at: dict[int, tuple[FeaturePyramid, float]] = {}

    def at(self, image_scale: int) -> tuple[FeaturePyramid, float]:
        """Return the features at an image scale, and the scale of their camera."""
        if image_scale not in self._at:
            prepared = self._settings.size.prepare(self.image, image_scale)
            self._at[image_scale] = extract(self._model, prepared.pixels, half=self._settings.half), prepared.scale
        return self._at[image_scale]


class ReferenceRefiner:
    """Aligner of images with a map's reference images.

    Args:
        model: in evaluation mode; everything runs on its device.
        scene: points and images.
        store: cached features of the scene's images, by the same model.
        settings: settings of the refinement.

    Raises:
        MapError: the cached features are of another model, or of other image scales.
        ConfigError: the model does not have a level.
    """

    def __init__(
        self,
        model: PixLocModel,
        scene: ReferenceScene,
        store: ViewStore,
        settings: ReferenceRefinerSettings | None = None,
    ) -> None:
        self.model, self.scene = model, scene
        self.settings = settings = settings or ReferenceRefinerSettings()
        self.device = next(model.parameters()).device
        self.store = store.to(self.device)
        if store.fingerprint != fingerprint_of(model):
            raise MapError("The cached reference features were extracted by another model; extract them again.")
        if missing := set(settings.multiscale) - set(store.settings.image_scales):
            raise MapError(f"There are no cached reference features for the image scales {sorted(missing)}.")
        levels = len(model.config.extractor.strides)
        self.levels = settings.layer_indices or tuple(range(levels))
        if max(self.levels) >= levels:
            raise ConfigError(f"The model has levels 0 to {levels - 1}, got layer_indices {settings.layer_indices}.")
        self.solver = SolverSettings(
            method=settings.method,
            num_iters=settings.num_iters,
            loss=RobustLoss.parse(settings.loss or model.config.loss),
            jacobi_scaling=_or(settings.jacobi_scaling, model.config.jacobi_scaling),
            stop_period=settings.stop_period,
            stop_step_m=settings.stop_step_m,
            stop_step_deg=settings.stop_step_deg,
            stop_gradient=settings.stop_gradient,
            legacy=settings.legacy,
        )
        self.normalizes = _or(settings.normalize_features, model.config.normalize_features)
        self._points = torch.from_numpy(scene.points).to(self.device)
        self._long_tracks = torch.from_numpy(scene.track_lengths >= settings.min_track_length).to(self.device)

    @torch.inference_mode()
    def refine(
        self,
        image: NDArray[np.uint8] | ImagePyramids,
        camera: Camera,
        T_map_camera: Matrix,
        views: Sequence[int],
        *,
        only_rows: NDArray[np.int64] | Mapping[int, NDArray[np.int64]] | None = None,
        observer: LevelObserver | None = None,
    ) -> Refinement:
        """Refine the pose of one image; a failure is a result with its reason, not an error.

        Args:
            image: (H, W, 3) RGB, or its features from :meth:`describe`, if it is aligned more than once.
            camera: camera of the image, any model.
            T_map_camera: pose to start from, (4, 4).
            views: positions of reference images, best first; the first ``num_dbs`` are used.
            only_rows: rows of the scene's points to use, such as those that were matched, for all images or for each by
                its position (default: all).
            observer: called after every iteration; its poses are T_camera_map. An :class:`AlignmentTrace` keeps all.
        """
        chosen = tuple(dict.fromkeys(views))[: self.settings.num_dbs]
        run = _Query(self, chosen, T_map_camera, observer)
        described = image if isinstance(image, ImagePyramids) else self.describe(image)
        for scale in self.settings.multiscale:
            views_at = {v: self.store.views[v, scale] for v in chosen if (v, scale) in self.store.views}
            references = self._assemble(views_at, only_rows)
            count = len(references.points)
            if count < self.settings.min_points_opt:
                few = f"only {count} points of the {len(chosen)} reference images can be used at image scale {scale}"
                hint = "; a larger resize, or a smaller pad or multiscale, leaves more" if not count else ""
                return run.failed(few + hint, count)
            pyramid, image_scale = described.at(scale)
            if not self.settings.use_confidences:
                pyramid = replace(pyramid, confidences=tuple(map(torch.ones_like, pyramid.confidences)))
            if isinstance(observer, AlignmentTrace):
                T_now = run.T.inv().matrix_numpy()[0]
                observer.begin(T_now, scale, image_scale, pyramid, references.rows)
            scaled = CameraTensor.from_camera(camera).scale(image_scale).to(self.device)[None]
            if reason := run.align(pyramid, scaled, references):
                return run.failed(reason, count)
        return run.finished()

    def describe(self, image: NDArray[np.uint8]) -> ImagePyramids:
        """Return the features of an image (H, W, 3), extracted when they are needed."""
        return ImagePyramids(self.model, self.store.settings, image)

    def _assemble(
        self,
        views: Mapping[int, ViewFeatures],
        only_rows: NDArray[np.int64] | Mapping[int, NDArray[np.int64]] | None,
    ) -> _References:
        """Return features of the usable points of several images, concatenated or averaged."""
        kept = []
        for position, view in views.items():
            wanted = only_rows.get(position, _NO_ROWS) if isinstance(only_rows, Mapping) else only_rows
            usable = self._long_tracks if wanted is None else self._long_tracks & self._listed(wanted)
            kept.append((view, usable[view.rows]))
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        rows = torch.cat([empty, *(view.rows[keep] for view, keep in kept)])
        features, confidences = [], []
        for level in range(len(self.model.config.extractor.strides)):
            dim = self.model.config.extractor.output_dim[level]
            none = torch.zeros(0, dim, device=self.device)
            features.append(torch.cat([none, *(view.features[level][keep].float() for view, keep in kept)]))
            confidence = torch.cat([none[:, 0], *(view.confidences[level][keep].float() for view, keep in kept)])
            confidences.append(confidence if self.settings.use_confidences else torch.ones_like(confidence))
        if not self.settings.average_observations:
            return _References(self._points[rows], rows, tuple(features), tuple(confidences))
        unique, group = torch.unique(rows, return_inverse=True)
        pairs = [_averaged(f, c, group, len(unique)) for f, c in zip(features, confidences, strict=True)]
        return _References(self._points[unique], unique, tuple(f for f, _ in pairs), tuple(c for _, c in pairs))

    def _listed(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Return (P,) bool: the points of some rows."""
        listed = torch.zeros_like(self._long_tracks)
        listed[torch.from_numpy(rows).to(self.device)] = True
        return listed


def _or(given: bool | None, trained: bool) -> bool:
    return trained if given is None else given


_NO_ROWS: NDArray[np.int64] = np.zeros(0, dtype=np.int64)


def _averaged(
    features: torch.Tensor, confidence: torch.Tensor, group: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each group's mean feature, weighted by confidence, and mean confidence."""
    weight = features.new_zeros(count).index_add(0, group, confidence)
    total = features.new_zeros(count, features.shape[1]).index_add(0, group, features * confidence[:, None])
    number = features.new_zeros(count).index_add(0, group, torch.ones_like(confidence))
    return total / weight.clamp(min=1e-12)[:, None], weight / number.clamp(min=1)


class _Query:
    """Alignment of one image, through image scales and levels."""

    def __init__(
        self, refiner: ReferenceRefiner, views: tuple[int, ...], T_map_camera: Matrix, observer: LevelObserver | None
    ) -> None:
        self.refiner, self.views, self.start, self.observer = refiner, views, T_map_camera, observer
        self.T = Pose.from_4x4mat(inverse_pose(T_map_camera)).to(refiner.device)[None]
        self.iterations: list[int] = []
        self.end: NormalEquations | None = None
        self.point_count = 0
        self.last_level = 0

    def align(self, pyramid: FeaturePyramid, camera: CameraTensor, references: _References) -> str:
        """Align through the levels, coarse to fine; return the reason of a failure, or an empty string."""
        model, solver = self.refiner.model, self.refiner.solver
        local = recentre(references.points[None], self.T)
        T = local.T
        self.point_count = len(references.points)
        for level in sorted(self.refiner.levels, reverse=True):
            query, features = pyramid.features[level], references.features[level]
            if self.refiner.normalizes:
                query, features = F.normalize(query, dim=1), F.normalize(features, dim=-1)
            cost = FeatureCost(
                query=FeatureMap.with_confidence(query, pyramid.confidences[level], cubic=self.refiner.settings.cubic),
                camera=camera.scale(1.0 / pyramid.strides[level]),
                points=local.points,
                features=features[None],
                confidence=references.confidences[level][None],
                pad=self.refiner.settings.pad,
                legacy=solver.legacy,
            )
            tell = None if self.observer is None else in_world(self.observer, level, local.origin)
            result = minimize(cost, T, solver, model.damping(level).double(), tell)
            self.iterations.append(result.iterations)
            if bool(result.failed[0]):
                return f"too few reference points stayed in view at stride {pyramid.strides[level]}"
            T = result.T
            self.end, self.last_level = cost.linearize(T, solver.loss), level
        self.T = from_recentred(T, local.origin)
        return ""

    def failed(self, reason: str, count: int) -> Refinement:
        return Refinement(
            False, reason, None, self.start, None, Score(0.0, 0.0, 0.0), tuple(self.iterations), count, self.views
        )

    def finished(self) -> Refinement:
        settings = self.refiner.settings
        assert self.end is not None
        if isinstance(self.observer, AlignmentTrace):
            self.observer.end(self.last_level, self.end)
        score = score_of(self.end, self.refiner.solver.loss, self.point_count)
        covariance = pose_covariance(self.end, self.T)
        T_map_camera = self.T.inv().matrix_numpy()[0]
        reason = ""
        if score.value < settings.min_score:
            reason = f"the alignment scores {score.value:.2f}, less than {settings.min_score:.2f}"
        return Refinement(
            not reason, reason, T_map_camera, self.start, covariance, score, tuple(self.iterations),
            self.point_count, self.views,
        )  # fmt: skip
