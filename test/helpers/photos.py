# SPDX-License-Identifier: Apache-2.0
"""Photos as phones write them: JPEG with EXIF's orientation and focal length."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np


def exif(orientation: int, focal_35mm: int, order: str = "<") -> bytes:
    more = 8 + 2 + 2 * 12 + 4
    tiff = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    tiff += struct.pack(f"{order}H", 2)
    tiff += struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    tiff += struct.pack(f"{order}HHII", 0x8769, 4, 1, more) + struct.pack(f"{order}I", 0)
    tiff += struct.pack(f"{order}H", 1) + struct.pack(f"{order}HHIHH", 0xA405, 3, 1, focal_35mm, 0) + b"\0\0\0\0"
    return b"Exif\0\0" + tiff


def photo(path: Path, rgb: np.ndarray, orientation: int = 1, focal_35mm: int = 0, order: str = "<") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(rgb[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 98])
    segment = exif(orientation, focal_35mm, order)
    path.write_bytes(
        data[:2].tobytes() + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:].tobytes()
    )
