# SPDX-License-Identifier: Apache-2.0
"""Interface of Embree: the face that a ray hits, and the free distance along a ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.simulation.faces import Face

Array = NDArray[np.float32]


class RayCaster:
    """Caster of rays at a set of faces.

    Args:
        faces: the faces.

    Raises:
        SourceError: Embree is not installed.
    """

    def __init__(self, faces: Sequence[Face]) -> None:
        try:
            from embreex.mesh_construction import TriangleMesh
            from embreex.rtcore_scene import EmbreeScene
        except ImportError as error:
            raise SourceError(
                "The simulated room needs the Embree ray caster; install it with `pip install embreex`."
            ) from error
        triangles = [face.triangles() for face in faces]
        self._face_of = np.repeat(np.arange(len(faces)), [len(t) for t in triangles]).astype(np.int32)
        self._scene = EmbreeScene()
        TriangleMesh(self._scene, np.concatenate(triangles).astype(np.float32))

    def hit_face(self, origin: NDArray[np.float64], directions: Array) -> NDArray[np.int32]:
        """Return the index of the face that each ray (n, 3) from ``origin`` (3,) hits first; -1 for none."""
        origins = np.broadcast_to(origin.astype(np.float32), directions.shape)
        triangle = self._scene.run(np.ascontiguousarray(origins), np.ascontiguousarray(directions, np.float32))
        return np.where(triangle >= 0, self._face_of[triangle], -1).astype(np.int32)

    def distance(self, origins: Array, directions: Array, reach_m: float) -> Array:
        """Return the distance along unit rays (n, 3) from ``origins`` (n, 3) to the first face, at most ``reach_m``."""
        limits = np.full(len(origins), reach_m, np.float32)
        result = self._scene.run(origins, directions, dists=limits, output=1)
        return np.where(result["primID"] >= 0, result["tfar"], np.float32(reach_m)).astype(np.float32)
