# SPDX-License-Identifier: Apache-2.0
"""Limits on the memory of this process, for tests of files that ask for too much."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """Return the most memory that this process has held since it was last reset."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak() -> int:
    """Reset the peak to the memory held now, and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()
