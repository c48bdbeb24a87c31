# SPDX-License-Identifier: Apache-2.0
"""Outcomes of treated frames: which wrong poses are claimed, as figures and as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kfloc_ros.errors import SourceError
from kfloc_ros.evaluation.metrics import auroc
from kfloc_ros.types import TrackingState

MAX_M, MAX_DEG, MAX_NEES = 0.10, 5.0, 50.0
"""Errors above which a pose is wrong."""


@dataclass(frozen=True)
class Outcome:
    """Result of one frame."""

    scene: str
    treatment: str
    group: str
    mode: str
    """``single`` or ``stream``."""
    frame: int
    state: str
    said: str
    """Reason of the state, or the sentence on the camera."""
    has_pose: bool
    """False if no pose is right."""
    error_m: float | None
    error_deg: float | None
    nees: float | None
    sigma_m: float | None
    inside_sigma: float | None
    """Share of the six axes with an error inside one sigma."""
    total_ms: float
    confidence: float | None
    evidence: Mapping[str, float]
    since: int = 0
    """Frames of the stream since the treatment began."""

    @property
    def is_wrong(self) -> bool:
        """True if there is a pose, and it is wrong."""
        if self.error_m is None or self.error_deg is None:
            return False
        far = self.error_m > MAX_M or self.error_deg > MAX_DEG or (self.nees is not None and self.nees > MAX_NEES)
        return far or not self.has_pose

    @property
    def is_right(self) -> bool:
        """True if there is a pose within 10 cm and 5 deg of the truth."""
        if self.error_m is None or self.error_deg is None:
            return False
        return self.has_pose and self.error_m < MAX_M and self.error_deg < MAX_DEG

    @property
    def false_ok(self) -> bool:
        """True if a wrong pose is claimed without a word."""
        return self.state == TrackingState.TRACKING.value and not self.said and self.is_wrong


def load(path: Path) -> list[Outcome]:
    """Return the outcomes in a JSON file of this benchmark."""
    try:
        return [Outcome(**outcome) for outcome in json.loads(path.read_text())["outcomes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not a result of this benchmark ({error}); give another --json FILE.") from error


def save(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the summary and every outcome as JSON; a broken run leaves the file as it was."""
    text = json.dumps({**summarize(outcomes), "outcomes": [asdict(outcome) for outcome in outcomes]})
    (part := path.with_suffix(".part")).write_text(text)
    part.replace(path)


def summarize(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Return the figures over all scenes and treatments."""
    treated = [o for o in outcomes if o.group != "clean"]
    clean = [o for o in outcomes if o.group == "clean"]
    medians = {s: _median(o.nees for o in clean if o.scene == s) for s in dict.fromkeys(o.scene for o in outcomes)}
    known = [m for m in medians.values() if m is not None]
    inside = [o.inside_sigma for o in clean if o.inside_sigma is not None]
    return {
        "frames": len(outcomes),
        "treated_frames": len(treated),
        "false_ok_share": _share(o.false_ok for o in treated),
        "clean_tracking_share": _share(o.state == TrackingState.TRACKING.value for o in clean),
        "worst_median_nees": max(known, key=lambda m: abs(np.log(m / 5.35))) if known else None,
        "median_nees": medians,
        "clean_inside_one_sigma": float(np.mean(inside)) if inside else None,
        "median_ms": _median(o.total_ms for o in clean),
        **_areas([o for o in outcomes if o.error_m is not None]),
    }


def _areas(posed: Sequence[Outcome]) -> dict[str, float | None]:
    """Return how well confidence and standard deviation tell right poses from wrong ones."""
    right = np.array([o.is_right for o in posed], dtype=bool)
    confidence = np.array([o.confidence if o.confidence is not None else 0.0 for o in posed])
    sigma = np.array([o.sigma_m if o.sigma_m is not None else np.inf for o in posed])
    return {"confidence_auroc": auroc(confidence, right), "sigma_auroc": auroc(-sigma, right)}


def table(outcomes: Sequence[Outcome], scenes: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return rows and header: a row for each treatment, and a column for each scene."""
    header = ["treatment", "frames", "TRACKING, silent %", "false ok %"]
    header += [f"{scene}: false ok % / err cm / NEES" for scene in scenes]
    rows = []
    for treatment in dict.fromkeys(o.treatment for o in outcomes):
        mine = [o for o in outcomes if o.treatment == treatment]
        silent = _share(o.state == TrackingState.TRACKING.value and not o.said for o in mine)
        row = [treatment, str(len(mine)), f"{100 * silent:.0f}", f"{100 * _share(o.false_ok for o in mine):.0f}"]
        for scene in scenes:
            here = [o for o in mine if o.scene == scene]
            error, nees = _median(o.error_m for o in here), _median(o.nees for o in here)
            figures = [f"{100 * _share(o.false_ok for o in here):.0f}"]
            figures += ["-" if error is None else f"{100 * error:.1f}", "-" if nees is None else f"{nees:.1f}"]
            row.append(" / ".join(figures))
        rows.append(row)
    return rows, header


def _share(values: Iterable[bool]) -> float:
    chosen = list(values)
    return sum(chosen) / len(chosen) if chosen else 0.0


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None
