# SPDX-License-Identifier: Apache-2.0
"""Checks of a recording's images (exposure, blur, repeats), stamps and path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from kfloc_ros.errors import FrameError
from kfloc_ros.frames import FrameSource
from kfloc_ros.mapping.check_pairs import Pair, View

DARK, BRIGHT = 18.0, 238.0
"""Median grey value of an image, of 255."""
BLURRED = 0.10
"""Share of the gradients that survives a further blur by a pixel, below which an image counts as sharp."""
MANY = 0.5
NEIGHBOURS = 6
"""Neighbours that are read to see whether images repeat."""
SAME_GREY = 0.4
GAP_STEPS = 5.0
"""Steps of the usual length from which on a pause is a gap."""
LONGEST_GAP_S = 5.0
"""Longer pauses lie between recordings, and count as this much."""
MISSING = 0.3
FASTEST_HZ = 1000.0
"""No camera whose images make a map is faster: such stamps are no times in seconds."""
MAX_STAMPS = 20_000
PATH_FRAMES = 200
SEEN_AGAIN_SHARE = 0.1
"""Of the recording, that must lie between two frames of one place for it to be seen twice."""


@dataclass(frozen=True)
class ImageFacts:
    """What the images are like, as shares of those that were looked at."""

    dark: float
    bright: float
    blurred: float
    repeated: float
    at_rest: float
    """Share of the places at which a later image shows the same from the same place."""
    rate_hz: float
    """Images in a second; NaN if there is no pair of them."""
    features: float
    """Median number of features of an image."""
    depth_known: float
    """Median share of pixels with depth; NaN without depth."""
    usual_depth_m: float
    """Median depth of an image in the median; NaN without depth."""
    seen_twice: float
    """Share of the path that the camera passes again later; NaN without poses."""
    gaps: float
    """Number of pauses in the stamps, of five usual steps or more; the borders of recordings count."""
    longest_gap_s: float
    """NaN without a pause."""
    missing: float
    """Share of the frames that would lie in the pauses at the usual rate, borders of recordings apart."""

    def figures(self) -> dict[str, float]:
        """The facts by name, those that are unknown left out."""
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: round(float(value), 3) for name, value in known.items() if np.isfinite(value)}

    def faults(self) -> list[tuple[str, str, float]]:
        """(kind, sentence, share) of what makes mapping hard."""
        found = []
        for kind, share, what in (
            ("dark", self.dark, "nearly black"),
            ("bright", self.bright, "nearly white"),
            ("blur", self.blurred, "blurred"),
            ("repeated", self.repeated, "followed by the same image again"),
            ("rest", self.at_rest, "like those some frames later: the camera stands still"),
        ):
            if share > MANY:
                found.append((kind, f"Of the images looked at, {100 * share:.0f} % are {what}.", share))
        if self.rate_hz > FASTEST_HZ:
            text = (
                f"By the stamps, the camera took {self.rate_hz:.0f} images a second. They are no times of "
                "the images in seconds: neither the order nor the motion of the images can be told from them."
            )
            found.append(("stamps", text, self.rate_hz))
        elif self.missing > MISSING:
            several = "s" if self.gaps > 1 else ""
            text = (
                f"The recording has {self.gaps:.0f} gap{several}, the longest of {self.longest_gap_s:.1f} s: about "
                f"{100 * self.missing:.0f} % of the frames at its usual rate are missing."
            )
            found.append(("gaps", text, self.missing))
        return found


def image_facts(source: FrameSource, views: Sequence[View], pairs: Sequence[Pair], at_rest: float) -> ImageFacts:
    """Return what images are like, from those that were read and some of their neighbours; see :class:`ImageFacts`."""
    greys = [float(np.median(view.grey)) for view in views]
    steps = [(p.second.frame.stamp_ns - p.first.frame.stamp_ns) / (p.second.position - p.first.position) for p in pairs]
    period_ns = float(np.median(steps)) if steps else 0.0
    gaps, longest_s, missing = _gaps(source)
    depths = [v.frame.depth_m for v in views if v.frame.depth_m is not None]
    usual_m = [float(np.median(depth[depth > 0])) for depth in depths if (depth > 0).any()]
    return ImageFacts(
        dark=float(np.mean([grey < DARK for grey in greys])) if greys else 0.0,
        bright=float(np.mean([grey > BRIGHT for grey in greys])) if greys else 0.0,
        blurred=float(np.mean([sharpness(view) < BLURRED for view in views])) if views else 0.0,
        repeated=_repeated(source, views),
        at_rest=at_rest,
        rate_hz=1e9 / period_ns if period_ns > 0 else float("nan"),
        features=float(np.median([len(view.pixels) for view in views])) if views else 0.0,
        depth_known=float(np.median([(depth > 0).mean() for depth in depths])) if depths else float("nan"),
        usual_depth_m=float(np.median(usual_m)) if usual_m else float("nan"),
        seen_twice=_seen_twice(source),
        gaps=gaps,
        longest_gap_s=longest_s,
        missing=missing,
    )


def _gaps(source: FrameSource) -> tuple[float, float, float]:
    """Return the number of gaps, the longest in seconds, and the share of the frames that they lack."""
    count = min(len(source), MAX_STAMPS)
    stamps = np.array([source.stamp_ns(position) for position in range(count)], dtype=np.float64) * 1e-9
    steps = np.diff(stamps)
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    wide = steps > GAP_STEPS * usual
    if not usual > 0 or not wide.any():
        return 0.0, float("nan"), 0.0
    lacking = float((np.minimum(steps[wide], LONGEST_GAP_S) / usual - 1).sum())
    return float(wide.sum()), float(steps[wide].max()), lacking / (lacking + count)


def sharpness(view: View) -> float:
    """Share of an image's gradient energy that a blur by a pixel takes away: 0 for one that is blurred already."""
    grey = view.grey.astype(np.float32)
    energy = [
        float((cv2.Sobel(image, cv2.CV_32F, 1, 0) ** 2 + cv2.Sobel(image, cv2.CV_32F, 0, 1) ** 2).mean())
        for image in (grey, cv2.GaussianBlur(grey, (0, 0), 1.0))
    ]
    return 1 - energy[1] / energy[0] if energy[0] > 0 else 0.0


def _repeated(source: FrameSource, views: Sequence[View]) -> float:
    """Share of some images that are the same as the next one."""
    chosen = [view for view in views if view.position + 1 < len(source)]
    chosen = chosen[:: max(len(chosen) // NEIGHBOURS, 1)][:NEIGHBOURS]
    known = {view.position: view for view in views}
    same = []
    for view in chosen:
        following = known.get(view.position + 1)
        if following is not None:
            grey = following.grey
        else:
            frame = source.read(view.position + 1)
            if frame is None:
                continue
            grey = cv2.cvtColor(frame.image, cv2.COLOR_RGB2GRAY)
            if grey.shape != view.grey.shape:
                grey = cv2.resize(grey, view.grey.shape[::-1], interpolation=cv2.INTER_AREA)
        same.append(float(np.abs(grey.astype(np.int16) - view.grey).mean()) < SAME_GREY)
    return float(np.mean(same)) if same else 0.0


def _seen_twice(source: FrameSource) -> float:
    """Share of the path near which, and looking the same way, the camera is again at another time."""
    positions = np.unique(np.linspace(0, len(source) - 1, min(PATH_FRAMES, len(source))).astype(int)).tolist()
    poses = []
    for position in positions:
        try:
            poses.append(source.pose(position))
        except FrameError:
            poses.append(None)
    places = np.array([T[:3, 3] for T in poses if T is not None]).reshape(-1, 3)
    views = np.array([T[:3, 2] for T in poses if T is not None]).reshape(-1, 3)
    times = np.array([p for p, T in zip(positions, poses, strict=True) if T is not None])
    if len(places) < 20:
        return float("nan")
    extent = float(np.linalg.norm(places.max(0) - places.min(0)))
    near = np.linalg.norm(places[:, None] - places[None], axis=2) < 0.15 * extent
    alike = views @ views.T > np.cos(np.radians(30))
    later = np.abs(times[:, None] - times[None]) > SEEN_AGAIN_SHARE * len(source)
    return float((near & alike & later).any(1).mean())
