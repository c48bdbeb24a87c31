# SPDX-License-Identifier: Apache-2.0
"""Pays for what only the first frame costs before there is a first frame."""

from __future__ import annotations

import numpy as np

from kfloc_ros.localizer_config import LocalizerConfig
from kfloc_ros.mapping.place import AnyMap
from kfloc_ros.place_localizer import localizer_for
from kfloc_ros.types import Frame


def warm_up(scene_map: AnyMap, config: LocalizerConfig) -> None:
    """Run a frame of noise through a localizer that is then thrown away.

    The first pass of a network chooses and compiles its kernels, which takes several times as long as a
    frame and is remembered by the process. A localizer of its own, so that nothing is carried over.
    """
    camera = scene_map.camera
    image = np.random.default_rng(0).integers(0, 256, (camera.height, camera.width, 3), dtype=np.uint8)
    localizer = localizer_for(scene_map, config)
    for stamp_ns in (1, 2):  # the second frame has a prior, if the first one found anything
        localizer.process(Frame(image=image, camera=camera, stamp_ns=stamp_ns))
