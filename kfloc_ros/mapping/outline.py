# SPDX-License-Identifier: Apache-2.0
"""What a map and a place of several have in common for those who only show them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from kfloc_ros.geometry.camera import Camera
from kfloc_ros.pixloc.references import ReferenceViews


class MapOutline(Protocol):
    """Where something is and what it looks like from afar."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def frame_id(self) -> str:
        """TF frame of all poses."""
        ...

    @property
    def camera(self) -> Camera:
        """The pinhole camera that images are brought to."""
        ...

    @property
    def references(self) -> ReferenceViews:
        """Views with points; of a place a few points each, without features."""
        ...

    @property
    def path(self) -> Path | None:
        """Its folder, if it has one."""
        ...
