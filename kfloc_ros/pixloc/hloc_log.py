# SPDX-License-Identifier: Apache-2.0
"""Logs of hloc (``*_logs.pkl``), of 2021 and of today: which images and points a query was matched with, and its pose.

The files are pickles, and are read without unpickling them: see ``inert_pickle``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import SourceError
from kfloc_ros.geometry.lie import Matrix, inverse_pose, make_pose, quaternion_to_matrix
from kfloc_ros.pixloc.inert_pickle import read_inert


@dataclass(frozen=True, eq=False)
class HlocQuery:
    """What a log says of one query."""

    database_ids: tuple[int, ...]
    """COLMAP ids of the images that it was matched with, best retrieved first."""
    T_map_camera: Matrix | None
    """Its PnP pose; None where PnP failed."""
    num_inliers: int
    point_ids: NDArray[np.int64]
    """(M,) COLMAP id of the 3-D point of every match."""
    inliers: NDArray[np.bool_]
    """(M,)"""
    seen_in: tuple[tuple[int, ...], ...]
    """(M,) positions in ``database_ids`` of the images that the match came from; empty where the log has none."""

    def inlier_counts(self) -> dict[int, int]:
        """Inliers of every database image that has any, by its id."""
        counts: Counter[int] = Counter()
        for inlier, positions in zip(self.inliers, self.seen_in, strict=False):
            if inlier:
                counts.update(self.database_ids[position] for position in positions)
        return dict(counts)


def read_hloc_log(path: Path) -> dict[str, HlocQuery]:
    """Every query of a log.

    Raises:
        SourceError: missing, damaged, or not a log.
    """
    try:
        content = read_inert(path.read_bytes())
    except OSError as error:
        raise SourceError(f"The log '{path}' cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise SourceError(f"The log '{path}' is damaged or not hloc's: {error}") from error
    queries = content.get("loc") if isinstance(content, Mapping) else None
    if not isinstance(queries, Mapping):
        raise SourceError(f"'{path}' is not a log of hloc: it has no entry 'loc'.")
    found: dict[str, HlocQuery] = {}
    for name, entry in queries.items():
        try:
            found[str(name)] = _query(entry)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise SourceError(f"The log '{path}' cannot be understood at query '{name}': {error!r}") from error
    return found


def _query(entry: Mapping[str, Any]) -> HlocQuery:
    ids = entry.get("db", entry.get("db_ids", ()))
    if entry.get("log_clusters"):  # matched cluster by cluster: the best one counts
        best = entry.get("best_cluster")
        entry = entry["log_clusters"][0 if best is None else best]
        ids = entry.get("cluster_ids", entry.get("db", ids))
    result = entry.get("PnP_ret") or {}  # None where today's PnP fails
    pose = _pose(result)
    count = len(entry.get("points3D_ids", ()))
    mask = result.get("inliers", result.get("inlier_mask"))
    inliers = np.zeros(count, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    matches = entry.get("keypoint_index_to_db", ((), ()))[1]
    point_ids = [m[0] for m in matches] if len(matches) else entry.get("points3D_ids", ())
    point_ids = np.array([int(ident) for ident in point_ids], dtype=np.int64)
    if mask is None and len(inliers) != len(point_ids):
        inliers = np.zeros(len(point_ids), dtype=bool)
    if len(inliers) != len(point_ids):
        raise ValueError(f"{len(inliers)} inlier flags for {len(point_ids)} matches")
    database_ids = tuple(int(ident) for ident in ids)
    seen_in = tuple(tuple(int(position) for position in m[1]) for m in matches)
    if any(not 0 <= position < len(database_ids) for positions in seen_in for position in positions):
        raise ValueError("a match names a database image that the query has not")
    number = int(result.get("num_inliers", int(inliers.sum())))
    return HlocQuery(database_ids, pose, number, point_ids, inliers, seen_in)


def _pose(result: Mapping[str, Any]) -> Matrix | None:
    if not result or not result.get("success", True):
        return None
    if "qvec" in result:
        w, x, y, z = (float(value) for value in result["qvec"])
        t = result["tvec"]
    else:
        state = result["cam_from_world"].state
        x, y, z, w = (float(value) for value in state["rotation"].state["quat"])
        t = state["translation"]
    return inverse_pose(make_pose(quaternion_to_matrix([x, y, z, w]), np.asarray(t, dtype=np.float64).reshape(3)))
