# SPDX-License-Identifier: Apache-2.0
"""Options of the whole pipeline; the nodes offer each as a ROS parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kfloc_ros.config import option
from kfloc_ros.kfnet import kalman


@dataclass(frozen=True)
class LocalizerConfig:
    """Options of the whole pipeline."""

    FORMER: ClassVar[Mapping[str, str]] = {
        "first_fix": "It is called 'relocalize' now.",
        "alignment_heads": "Alignment heads did not improve recall and were removed; remove it.",
        "nis_mode": "The robust treatment of contradicting cells is the only one left; remove it.",
        "oflownet": "The flow network is used wherever the map was calibrated for it; remove it.",
    }
    """Former options, each with what to do."""

    device: str = option(
        "auto", "Where networks run: auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda")
    )
    filter: bool = option(True, "Carry the belief over scene coordinates from frame to frame.")
    pose_feedback: bool = option(True, "Correct the belief over scene coordinates by the refined poses.")
    refine: bool = option(True, "Align the coarse pose with the map's reference views.")
    tracking: bool = option(
        False, "While alignments from the predicted pose succeed, find a coarse pose only now and then, as a check."
    )
    tracking_check_period: int = option(
        10, "With tracking: every so many frames a coarse pose is found all the same.", low=2, high=1000
    )
    relocalize: bool = option(True, "Search the map's reference views when there is no pose to align from.")
    loaded_submaps: int = option(4, "Submaps of a place kept in memory (a place is several maps).", low=2, high=1000)
    num_references: int = option(3, "Reference views that a pose is aligned with.", low=1, high=20)
    max_gap_s: float = option(
        0.5, "A longer gap between frames resets the filter and the motion model.", low=0.01, high=60.0
    )
    nis_threshold: float = option(
        kalman.NIS_THRESHOLD_95,
        "Cells whose normalised innovation squared exceeds this contradict their prior.",
        low=0.1,
        high=1000.0,
    )
    max_repeat_s: float = option(
        1.0,
        "If the camera repeats one image, byte for byte, for longer than this, in seconds, the pose is LOST; 0: never. "
        "No sensor repeats its noise, but a simulated camera without noise does.",
        low=0.0,
        high=3600.0,
    )
    pnp_max_error_px: float = option(10.0, "Inlier threshold of the reprojection error in PnP.", low=0.5, high=100.0)
    pnp_min_inliers: int = option(40, "Fewer PnP inliers than this: no coarse pose.", low=6, high=100_000)
