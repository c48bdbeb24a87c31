# SPDX-License-Identifier: Apache-2.0
"""What is done when the GPU's memory runs out: ``device: auto`` goes on on the CPU, ``device: cuda`` says so."""

from __future__ import annotations

import torch

from kfloc_ros.errors import KflocError
from kfloc_ros.nodes.parameter_server import ParameterServer


class GpuMemoryError(KflocError):
    """The GPU's memory ran out."""


def explained(error: Exception, parameters: ParameterServer) -> Exception:
    """What to report instead of an error that a stage raised; the error itself if it is of another kind.

    Where the choice of the device was ours, ``device`` becomes ``cpu`` at the next turn of the executor, and with it
    the application is made anew. Where the user chose, nothing is changed: the next frame tries again.
    """
    if not isinstance(error, torch.cuda.OutOfMemoryError):
        return error
    torch.cuda.empty_cache()
    if parameters.localizer.device == "auto":
        parameters.ask("device", "cpu")
        return GpuMemoryError(
            "The GPU's memory ran out. From now on device is 'cpu', where a frame takes longer; "
            "set it to 'auto' again when there is memory."
        )
    return GpuMemoryError(
        "The GPU's memory ran out, and device is 'cuda'. Make room on the GPU, or set device to 'cpu'; with 'auto' "
        "this would have been done by itself."
    )
