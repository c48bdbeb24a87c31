# SPDX-License-Identifier: Apache-2.0
"""Plays a bag over DDS to the live nodes, records what they answer, and evaluates it.

The nodes run as processes of their own, and so does the agent that plays and records: the process
that calls :func:`run_replay` never imports rclpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfloc_ros.replay.offline import run_offline
    from kfloc_ros.replay.recording import ReplayConfig
    from kfloc_ros.replay.session import run_replay

__all__ = ["ReplayConfig", "run_offline", "run_replay"]
_MODULES = {"ReplayConfig": "recording", "run_offline": "offline", "run_replay": "session"}


def __getattr__(name: str) -> Any:
    # Late, because every process of a replay also comes through here and must not load torch first.
    if name in _MODULES:
        return getattr(importlib.import_module(f"kfloc_ros.replay.{_MODULES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
