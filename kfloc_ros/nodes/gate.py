# SPDX-License-Identifier: Apache-2.0
"""Whether a node works: its lifecycle state, and the switch of ``~/enable``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Gate:
    """Set in the executor's thread, read in any."""

    active: bool = False
    """The lifecycle state is active."""
    enabled: bool = True
    """``~/enable`` has not switched the work off."""

    @property
    def is_open(self) -> bool:
        """Whether frames are worked on."""
        return self.active and self.enabled

    @property
    def closed_reason(self) -> str:
        """Why frames are not worked on, or empty."""
        if not self.active:
            return "the node is not active"
        return "" if self.enabled else "switched off by ~/enable"
