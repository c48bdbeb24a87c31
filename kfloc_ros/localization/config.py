# SPDX-License-Identifier: Apache-2.0
"""Options of the localizer; the nodes offer each as a ROS parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from kfloc_ros.config import option
from kfloc_ros.features.backbone import COARSE_STRIDE
from kfloc_ros.kfnet.fusion import NIS_THRESHOLD_95
from kfloc_ros.kfnet.pnp import PnpSettings
from kfloc_ros.maps.scene_map import SceneMap


@dataclass(frozen=True)
class LocalizerConfig:
    """Options of the localizer."""

    FORMER: ClassVar[Mapping[str, str]] = {
        "first_fix": "It is called 'relocalize' now.",
        "alignment_heads": "Alignment heads did not improve recall and were removed; remove it.",
        "nis_mode": "The robust treatment of contradicting cells is the only one left; remove it.",
        "oflownet": "The flow network is used wherever the map was calibrated for it; remove it.",
    }
    """Former options, each with the action to take."""

    device: str = option(
        "auto", "Device of the networks; auto takes a GPU if there is one.", choices=("auto", "cpu", "cuda")
    )
    runtime: str = option(
        "auto",
        "Run-time of the backbone on a CPU. torch: float32; auto: the fastest that is installed, measured once.",
        choices=("auto", "torch", "openvino", "onnxruntime"),
    )
    filter: bool = option(True, "Filter scene coordinates over time (Kalman filter along the optical flow).")
    alternate_cells: bool = option(
        True,
        "Measure half, later a quarter of the cells while refined poses confirm the filter; faster.",
    )
    pose_feedback: bool = option(True, "Correct the filter's scene coordinates by accepted refined poses.")
    recursion: str = option(
        "auto",
        "Recursion of the filter. robust: this package's; published: KFNet's Kalman update, reset only by a gap or a "
        "step back in time; published_nis: the same, with its NIS test on the output; auto: published for maps with "
        "converted KFNet weights, else robust.",
        choices=("auto", "robust", "published", "published_nis"),
    )
    refine: bool = option(True, "Refine the coarse pose by feature alignment with the map's reference views.")
    tracking: bool = option(
        False, "While alignments from the predicted pose succeed, compute a coarse pose only as a periodic check."
    )
    tracking_check_period: int = option(
        10, "With tracking: frames between two checks by a coarse pose.", low=2, high=1000
    )
    relocalize: bool = option(True, "Search the map if the alignment fails: near the last pose, or the whole of it.")
    max_speed_m_s: float = option(
        2.0, "Largest speed of the camera: what it can reach is searched first.", low=0.01, high=100.0
    )
    max_turn_deg_s: float = option(120.0, "Largest rate at which the camera turns.", low=1.0, high=3600.0)
    carry_s: float = option(
        5.0,
        "Longest time, in seconds, that this session's images carry a pose where the map shows too little; 0: never.",
        low=0.0,
        high=3600.0,
    )
    carry_sigma_m: float = option(
        0.25,
        "Standard deviation, in metres, up to which optical flow or the motion carries a pose on.",
        low=0.0,
        high=10.0,
    )
    loaded_submaps: int = option(4, "Submaps of a place (several maps) kept in memory.", low=2, high=1000)
    num_references: int = option(3, "Reference views used in each alignment.", low=1, high=20)
    max_gap_s: float = option(
        0.5, "Longest gap between frames; a longer one resets the filter and the motion model.", low=0.01, high=60.0
    )
    nis_threshold: float = option(
        NIS_THRESHOLD_95,
        "Limit of the normalised innovation squared (NIS); a cell above it contradicts its prior.",
        low=0.1,
        high=1000.0,
    )
    camera_check: str = option(
        "warn",
        "Check of the camera. warn: poses of one that does not fit are DEGRADED; correct: a fitted one replaces it "
        "(one process, one map).",
        choices=("off", "warn", "correct"),
    )
    calibration_error_percent: float = option(
        0.5,
        "Usual calibration error, in percent of the focal length, for covariances.",
        low=0.01,
        high=10.0,
    )
    wrong_camera_percent: float = option(
        5.0,
        "Share of runs with a wrong camera_info, in percent; poses that it may move far are DEGRADED until images "
        "exclude it.",
        low=0.0,
        high=50.0,
    )
    first_fix_agreement: int = option(
        2,
        "First poses after LOST that must agree before map -> odom moves, unless confidence is 0.7.",
        low=1,
        high=20,
    )
    rolling_shutter_readout_s: float = option(
        0.0,
        "Readout time of a rolling shutter, in seconds; 0: none.",
        low=0.0,
        high=0.2,
    )
    use_depth: bool = option(
        False,
        "Use depth images: they correct poses, and refuse those that they contradict.",
    )
    max_repeat_s: float = option(
        1.0,
        "Time, in seconds, after which a camera that repeats one image byte for byte is LOST; 0: never.",
        low=0.0,
        high=3600.0,
    )
    pnp_max_error_px: float = option(10.0, "Inlier threshold of the reprojection error in PnP.", low=0.5, high=100.0)
    pnp_min_inliers: int = option(40, "Smallest number of PnP inliers of a coarse pose.", low=6, high=100_000)


def pnp_settings(config: LocalizerConfig, stride: int, covariance_scale: float = 1.0) -> PnpSettings:
    """Return PnP settings for cells of ``stride`` pixels; thresholds in pixels scale with the stride."""
    larger = stride / COARSE_STRIDE
    return PnpSettings(
        max_error_px=larger * config.pnp_max_error_px,
        pixel_sigma_px=larger * PnpSettings().pixel_sigma_px,
        min_inliers=config.pnp_min_inliers,
        covariance_scale=covariance_scale,
    )


def recursion_of(scene_map: SceneMap, config: LocalizerConfig) -> str:
    """Return the recursion that the options name; for ``auto``, the one that the map's networks were trained for."""
    if config.recursion != "auto":
        return config.recursion
    return "published" if scene_map.kfnet is not None and scene_map.kfnet.converted else "robust"
