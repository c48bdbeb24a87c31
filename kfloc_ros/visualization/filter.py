# SPDX-License-Identifier: Apache-2.0
"""Sheets of the filter's state in one frame: noise, NIS, flow, scene coordinates, reliability."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.kfnet.flow import Flow
from kfloc_ros.kfnet.fusion import Filtered
from kfloc_ros.localization.results import CoarseResult
from kfloc_ros.types import Frame, SceneCoordinates
from kfloc_ros.visualization.cells import (
    RELIABILITY,
    SIGMA,
    Scale,
    coordinates_picture,
    flow_picture,
    nis_picture,
    nis_scale,
    reliability_picture,
    sigma_picture,
    trusted_flow,
)
from kfloc_ros.visualization.sheet import ARROW_LENGTHENING, SEPARATOR, Arrows, Panel, panel_of

ARROW_STEP_CELLS = 4
MIN_ARROW_PX = 1.0
"""Shortest arrow to draw, in pixels."""
FRESH = "the filter was reset in this frame"


def caption(source: str, frame: Frame, coarse: CoarseResult) -> str:
    """Return one line about a frame: the filter's result and the coarse pose."""
    report, pose = coarse.filter, coarse.pose
    parts = [f"{source}, frame {frame.index}"]
    if report.reset_reason:
        parts.append(f"reset: {report.reset_reason}")
    else:
        parts.append(
            f"prior in {report.prior_ratio:.0%} of the cells, mean NIS {report.nis_mean:.1f} (consistent: 3), "
            f"{report.rejected_ratio:.0%} rejected"
        )
    parts.append(
        f"coarse pose: {pose.inlier_count} inliers ({pose.inlier_ratio:.0%})"
        if pose.success
        else f"no pose: {pose.reason}"
    )
    return SEPARATOR.join(parts)


def filter_panels(frame: Frame, coarse: CoarseResult, nis_threshold: float, noise: Scale = SIGMA) -> list[Panel]:
    """Return six panels: the image, measurement, NIS; flow, process, posterior; noise on a scale of its own."""
    filtered = coarse.filtered or Filtered(_posterior(coarse), coarse.filter)
    measurement, prior, posterior = coarse.measurement, filtered.prior, filtered.posterior
    both = None if prior is None or measurement is None else prior.valid & measurement.valid
    process = None if prior is None else sigma_picture("", prior.process_variance, prior.valid, noise)
    measured = None if measurement is None else sigma_picture("", measurement.variance, measurement.valid, noise)
    return [
        Panel("image", frame.image),
        panel_of("measurement noise (SCoordNet)", measured, noise, "not known"),
        panel_of(
            "NIS: red contradicts the prior",
            nis_picture(filtered.nis, both, nis_threshold),
            nis_scale(nis_threshold),
            FRESH,
        ),
        flow_panel(frame, filtered.flow, posterior.stride),
        panel_of("process noise of the prediction", process, noise, FRESH),
        panel_of("posterior noise", sigma_picture("", posterior.variance, posterior.valid, noise), noise, ""),
    ]


def flow_panels(frame: Frame, coarse: CoarseResult) -> list[Panel]:
    """Return two panels: the flow of the cells as arrows over the image, and as colours."""
    flow = coarse.filtered.flow if coarse.filtered is not None else None
    stride, offset = _posterior(coarse).stride, _posterior(coarse).pixel_offset
    arrows = None if flow is None else flow_arrows(flow, stride, offset)
    return [
        Panel(
            f"motion since the previous frame, {ARROW_LENGTHENING:g} times as long", faded(frame.image), arrows=arrows
        ),
        flow_panel(frame, flow, stride),
    ]


def flow_panel(frame: Frame, flow: Flow | None, stride: int) -> Panel:
    """Return a panel of the flow in colours, suppressed where uncertain."""
    picture = flow_picture(flow)
    title = "backward flow"
    if flow is not None:
        length = np.hypot(*flow.offset.cpu().float().numpy())[trusted_flow(flow)] * stride
        title += f": median {np.median(length):.1f} px" if len(length) else ""
        title += f", {1 - trusted_flow(flow).mean():.0%} uncertain (grey)"
    return Panel(title, None if picture is None else picture.rgb, wheel=True, nothing=FRESH)


def flow_arrows(flow: Flow, stride: int, pixel_offset: float) -> Arrows:
    """Return the forward motion at every fourth cell with trusted flow: from its previous to its current position."""
    trusted = trusted_flow(flow)
    offset = flow.offset.detach().cpu().double().numpy() * stride
    rows, columns = np.meshgrid(
        np.arange(1, trusted.shape[0], ARROW_STEP_CELLS),
        np.arange(1, trusted.shape[1], ARROW_STEP_CELLS),
        indexing="ij",
    )
    cells = np.stack([rows, columns], axis=-1).reshape(-1, 2)
    vectors = offset[:, cells[:, 0], cells[:, 1]].T
    keep = trusted[cells[:, 0], cells[:, 1]] & (np.linalg.norm(vectors, axis=1) >= MIN_ARROW_PX)
    places = cells[:, ::-1] * float(stride) + pixel_offset
    return Arrows(places[keep] + vectors[keep], -vectors[keep])


def cell_panels(
    frame: Frame,
    coarse: CoarseResult,
    bounds_m: Sequence[Sequence[float]],
    from_above: NDArray[np.uint8],
    noise: Scale = SIGMA,
) -> list[Panel]:
    """Return four panels: the image, its scene coordinates, their noise, and all scene coordinates so far from
    above.
    """
    posterior = _posterior(coarse)
    return [
        Panel("image", frame.image),
        Panel("scene coordinates: x, y, z as red, green, blue", coordinates_picture(posterior, bounds_m).rgb),
        Panel("all frames so far, from above", from_above),
        panel_of("posterior noise", sigma_picture("", posterior.variance, posterior.valid, noise), noise, ""),
    ]


def confidence_panels(frame: Frame, coarse: CoarseResult) -> list[Panel]:
    """Return two panels: the image, and the reliability of its features."""
    picture = reliability_picture(coarse.features.reliability[0])
    height, width = frame.image.shape[:2]
    smooth = cv2.resize(picture.rgb, (width, height), interpolation=cv2.INTER_LINEAR)
    grey = frame.image.mean(axis=2, keepdims=True)
    mixed = np.clip(0.65 * smooth + 0.35 * grey, 0, 255).astype(np.uint8)
    mean = float(coarse.features.reliability[0].mean())
    return [Panel("image", frame.image), Panel(f"reliability of the features, mean {mean:.2f}", mixed, RELIABILITY)]


def faded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a paler image, so that drawings over it stand out."""
    return np.asarray(255 - 0.55 * (255.0 - image), dtype=np.uint8)


def _posterior(coarse: CoarseResult) -> SceneCoordinates:
    assert coarse.scene_coordinates is not None  # the stages run in this process
    return coarse.scene_coordinates
