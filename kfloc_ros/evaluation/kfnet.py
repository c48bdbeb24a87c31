# SPDX-License-Identifier: Apache-2.0
"""Evaluation of KFNet's networks on a folder in KFNet's format, against its labels: the original's ``eval`` scripts.

An error is the distance of a cell's point to its label. A frame's error is the median over its labelled cells. The
figures are median, mean and standard deviation of the frames' errors, as the original prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kfloc_ros.datasets.images import read_image, usual_size
from kfloc_ros.datasets.kfnet import recordings_of
from kfloc_ros.errors import SourceError, WeightsError
from kfloc_ros.kfnet.filter import SceneCoordinateFilter
from kfloc_ros.kfnet.fusion import Filtered, FilterSettings, Prior, warp
from kfloc_ros.kfnet.reference.files import STRIDE, read_label, read_list, write_coordinates, write_flow
from kfloc_ros.kfnet.reference.networks import ReferenceNetworks
from kfloc_ros.kfnet.reference.oflownet import ReferenceOFlowNet
from kfloc_ros.kfnet.reference.scoordnet import ReferenceSCoordNet
from kfloc_ros.kfnet.reference.weights import OFLOWNET, SCOORDNET, Imported
from kfloc_ros.types import SceneCoordinates

NEAR_M = 0.02
"""Largest error of a cell that counts as accurate."""
NIS_BAND = (0.0157, 2.706)
"""10 % and 90 % point of the chi-square distribution with one degree of freedom."""
PERIOD_NS = 33_000_000
"""Time between two frames of a sequence, since the folder has no times."""
LABEL_MARGIN_PX = 2
"""Columns that KFNet cuts from either side of Cambridge's images."""


@dataclass(frozen=True)
class Figures:
    """Errors of one kind of scene coordinates over all frames."""

    frames: int
    median_cm: float
    mean_cm: float
    std_cm: float
    near: float
    """Mean share of a frame's cells whose error is below 2 cm."""
    sigma_cm: float
    """Median of the frames' median sigmas."""


@dataclass
class FrameErrors:
    """Collector of one kind of scene coordinates' errors, frame by frame."""

    medians_m: list[float] = field(default_factory=list)
    near: list[float] = field(default_factory=list)
    sigmas_m: list[float] = field(default_factory=list)

    def add(self, mean: torch.Tensor, variance: torch.Tensor, use: torch.Tensor, truth: torch.Tensor) -> None:
        """Add the cells (h, w) of a frame that ``use`` names; a frame without any is left out.

        Args:
            mean: (3, h, w) metres.
            variance: (h, w) square metres.
            use: (h, w) bool.
            truth: (3, h, w) metres.
        """
        if not bool(use.any()):
            return
        errors = (mean - truth).norm(dim=0)[use].double().cpu().numpy()
        self.medians_m.append(float(np.median(errors)))
        self.near.append(float((errors < NEAR_M).mean()))
        self.sigmas_m.append(float(np.median(variance[use].double().sqrt().cpu().numpy())))

    def figures(self) -> Figures:
        """Return the figures.

        Raises:
            SourceError: no frame had a labelled cell.
        """
        if not self.medians_m:
            raise SourceError("No image of the folder has a labelled cell to compare with; check label_list.txt.")
        cm = 100.0 * np.array(self.medians_m)
        return Figures(
            len(cm),
            float(np.median(cm)),
            float(cm.mean()),
            float(cm.std()),
            float(np.mean(self.near)),
            100.0 * float(np.median(self.sigmas_m)),
        )


class LabelledFolder:
    """Images of a folder in KFNet's format and the true scene coordinates of their cells.

    Args:
        root: folder with ``image_list.txt`` and ``label_list.txt``.
        size: width and height of the networks' images; None: the images' own.

    Raises:
        SourceError: a list is missing, or the lists differ in length.
        FrameError: no image can be read.
    """

    def __init__(self, root: Path, size: tuple[int, int] | None = None) -> None:
        self._images = read_list(root / "image_list.txt")
        self._labels = read_list(root / "label_list.txt")
        if len(self._labels) != len(self._images):
            raise SourceError(
                f"'{root / 'label_list.txt'}' names {len(self._labels)} files for {len(self._images)} images."
            )
        self._stored = usual_size(self._images)
        self.size = size or self._stored
        """Width and height of the images as the networks take them."""
        self._margin = LABEL_MARGIN_PX if self._stored == (self.size[0] + 2 * LABEL_MARGIN_PX, self.size[1]) else 0
        if self._stored != self.size and not self._margin:
            raise SourceError(
                f"The images of '{root}' are {self._stored[0]}x{self._stored[1]}, and the scene's are "
                f"{self.size[0]}x{self.size[1]}; leave out --scene, or name another."
            )
        self.sequences = recordings_of(self._images)
        """Number of each image's recording."""

    def __len__(self) -> int:
        return len(self._images)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Return image i, (H, W, 3) RGB.

        Raises:
            FrameError: it cannot be read, or has another size.
        """
        image = read_image(self._images[i], self._stored)
        return np.ascontiguousarray(image[:, self._margin : image.shape[1] - self._margin])

    def truth(self, i: int, device: torch.device) -> SceneCoordinates:
        """Return the true scene coordinates of the cells of image i, without variance.

        Raises:
            FrameError: the label cannot be read, or does not have the size of the image.
        """
        label = read_label(self._labels[i], *self.size)
        step = STRIDE // label.stride
        points = torch.from_numpy(np.ascontiguousarray(label.points[::step, ::step])).to(device).permute(2, 0, 1)
        mask = torch.from_numpy(np.ascontiguousarray(label.mask[::step, ::step])).to(device)
        return SceneCoordinates(points, torch.zeros_like(points[0]), mask, STRIDE)


class ScoordnetEvaluation:
    """SCoordNet alone: writes ``coord_<i>.npy`` of its measurements."""

    def __init__(self, network: ReferenceSCoordNet) -> None:
        self._network = network
        self._measured = FrameErrors()

    def run(self, folder: LabelledFolder, out: Path) -> Iterator[int]:
        """Evaluate every image; yields its number when it is done."""
        device = self._network.T_network_map.device
        for i in range(len(folder)):
            measured, truth = self._network.measure(folder.image(i)), folder.truth(i, device)
            write_coordinates(out, i, measured)
            self._measured.add(measured.mean, measured.variance, measured.valid & truth.valid, truth.mean)
            yield i

    def figures(self) -> dict[str, Figures]:
        """Return the figures by the original's names."""
        return {"d_m": self._measured.figures()}


class OflownetEvaluation:
    """OFlowNet alone, on consecutive images: true coordinates carried along the flow from the image before.

    Writes ``<i>_<i - 1>_flow.npy``. Pairs across a border of sequences are left out.
    """

    def __init__(self, network: ReferenceOFlowNet) -> None:
        self._network = network
        self._carried = FrameErrors()

    @torch.inference_mode()
    def run(self, folder: LabelledFolder, out: Path) -> Iterator[int]:
        """Evaluate every pair; yields the number of its later image when it is done."""
        device = next(self._network.parameters()).device
        before: tuple[torch.Tensor, SceneCoordinates] | None = None
        for i in range(len(folder)):
            features, truth = _flow_features(self._network, folder.image(i), device), folder.truth(i, device)
            if before is not None and folder.sequences[i] == folder.sequences[i - 1]:
                flow = self._network.flow(features, before[0])
                prior = warp(before[1], flow, 1.0, 0.0, blend_sigma=True)
                write_flow(out, i, i - 1, flow.offset, prior.variance)
                self._carried.add(prior.mean, prior.variance, prior.valid & truth.valid, truth.mean)
            before = features, truth
            yield i

    def figures(self) -> dict[str, Figures]:
        """Return the figures by the original's names."""
        return {"d_t": self._carried.figures()}


class KfnetEvaluation:
    """Both networks with the published recursion, which starts anew with every sequence.

    Writes ``coord_<i>.npy`` of the posterior.

    Args:
        scoordnet: measurement network.
        oflownet: process network.
        nis_test: emit the measurement where it contradicts the prior.
    """

    def __init__(self, scoordnet: ReferenceSCoordNet, oflownet: ReferenceOFlowNet, *, nis_test: bool = False) -> None:
        self._scoordnet, self._oflownet = scoordnet, oflownet
        units = ReferenceNetworks(scoordnet, oflownet).process_scale
        self._filter = SceneCoordinateFilter(
            FilterSettings.published(process_scale=units, nis_test=nis_test), oflownet.flow
        )
        self._errors = {name: FrameErrors() for name in ("d_m", "d_t", "d_kf")}
        self._inside = self._tested = 0

    @torch.inference_mode()
    def run(self, folder: LabelledFolder, out: Path) -> Iterator[int]:
        """Evaluate every image; yields its number when it is done."""
        device = self._scoordnet.T_network_map.device
        for i in range(len(folder)):
            if i and folder.sequences[i] != folder.sequences[i - 1]:
                self._filter.reset("another sequence")
            image, truth = folder.image(i), folder.truth(i, device)
            measured = self._scoordnet.measure(image)
            filtered = self._filter.step(PERIOD_NS * i, _flow_features(self._oflownet, image, device), measured)
            write_coordinates(out, i, filtered.posterior)
            self._add(measured, filtered, truth)
            yield i

    def _add(self, measured: SceneCoordinates, filtered: Filtered, truth: SceneCoordinates) -> None:
        posterior, known = filtered.posterior, truth.valid
        self._errors["d_m"].add(measured.mean, measured.variance, measured.valid & known, truth.mean)
        self._errors["d_kf"].add(posterior.mean, posterior.variance, posterior.valid & known, truth.mean)
        if filtered.prior is not None:
            prior = filtered.prior
            self._errors["d_t"].add(prior.mean, prior.variance, prior.valid & known, truth.mean)
            inside, tested = inside_band(prior, measured, known)
            self._inside, self._tested = self._inside + inside, self._tested + tested

    def figures(self) -> dict[str, Figures]:
        """Return the figures by the original's names: measurement, prior, posterior."""
        found = {name: errors for name, errors in self._errors.items() if errors.medians_m or name != "d_t"}
        return {name: errors.figures() for name, errors in found.items()}

    @property
    def nis_share(self) -> float:
        """Share of the axes' NIS within the band of 80 %; NaN if no frame had a prior."""
        return self._inside / self._tested if self._tested else float("nan")


def inside_band(prior: Prior, measured: SceneCoordinates, known: torch.Tensor) -> tuple[int, int]:
    """Return how many axes' NIS lie in the band of 80 %, and their number, over labelled cells with a prior."""
    use = prior.valid & measured.valid & known
    nis = (measured.mean - prior.mean).square() / (prior.variance + measured.variance)
    inside = ((nis > NIS_BAND[0]) & (nis < NIS_BAND[1]))[:, use]
    return int(inside.sum()), inside.numel()


def _flow_features(network: ReferenceOFlowNet, image: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float()
    features: torch.Tensor = network.features(pixels)[0]
    return features


Evaluation = ScoordnetEvaluation | OflownetEvaluation | KfnetEvaluation


def evaluation_of(stage: str, networks: Imported, size: tuple[int, int], *, nis_test: bool = False) -> Evaluation:
    """Return the evaluation of a stage: ``scoordnet``, ``oflownet`` or ``kfnet``.

    Raises:
        WeightsError: a network is missing, or was trained on images of another size.
    """
    for name, network in ((SCOORDNET, networks.scoordnet), (OFLOWNET, networks.oflownet)):
        if network is None and stage in (name, "kfnet"):
            raise WeightsError(f"`kfloc kfnet eval {stage}` needs weights of {name}; name their file with --model.")
    if stage == OFLOWNET:
        assert networks.oflownet is not None
        return OflownetEvaluation(networks.oflownet)
    scoordnet = networks.scoordnet
    assert scoordnet is not None
    if scoordnet.image_size not in (None, size):
        trained = scoordnet.image_size
        raise WeightsError(
            f"SCoordNet was trained on images of {trained[0]}x{trained[1]} pixels, and the folder's have "
            f"{size[0]}x{size[1]}."
        )
    if stage == SCOORDNET:
        return ScoordnetEvaluation(scoordnet)
    assert networks.oflownet is not None
    return KfnetEvaluation(scoordnet, networks.oflownet, nis_test=nis_test)


def report_of(evaluation: Evaluation) -> dict[str, Any]:
    """Return the figures as plain numbers, for ``evaluation.json``."""
    report: dict[str, Any] = {name: vars(figures) for name, figures in evaluation.figures().items()}
    if isinstance(evaluation, KfnetEvaluation) and evaluation.nis_share == evaluation.nis_share:
        report["nis_share"] = evaluation.nis_share
    return report
