# SPDX-License-Identifier: Apache-2.0
"""Where networks run."""

from __future__ import annotations

import torch

from kfloc_ros.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The torch device of an option ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'.")
    return torch.device(name)
