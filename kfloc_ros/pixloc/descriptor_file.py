# SPDX-License-Identifier: Apache-2.0
"""Global descriptors of images: hloc's HDF5 files where h5py is installed, or NumPy's and safetensors'."""

from __future__ import annotations

import importlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from kfloc_ros.errors import SourceError


def read_descriptors(path: Path) -> dict[str, NDArray[np.float64]]:
    """One vector an image, by its name.

    Raises:
        SourceError: missing, damaged, of an unknown kind, or h5py is needed and not installed.
    """
    if not path.is_file():
        raise SourceError(
            f"There are no global descriptors '{path}'; give them with --global-descriptors, or do without by "
            "do_pose_approximation=false."
        )
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as content:
                found: dict[str, Any] = {name: content[name] for name in content.files}
        elif path.suffix == ".safetensors":
            found = dict(load_file(path))
        elif path.suffix in (".h5", ".hdf5"):
            found = _read_hdf5(path)
        else:
            raise SourceError(f"Global descriptors are .h5, .npz or .safetensors, not '{path.name}'.")
    except (OSError, ValueError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
        raise SourceError(f"The global descriptors '{path}' cannot be read: {error}") from error
    return {name: np.asarray(vector, dtype=np.float64).reshape(-1) for name, vector in found.items()}


def _read_hdf5(path: Path) -> dict[str, Any]:
    """hloc keeps ``<image name>/global_descriptor``; names have slashes and thus folders."""
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise SourceError(
            f"Reading '{path.name}' needs h5py; install it with `pip install h5py`, or convert the file to .npz."
        ) from error
    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and name.rpartition("/")[2] == "global_descriptor":
            found[name.rpartition("/")[0]] = item[()]

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found
