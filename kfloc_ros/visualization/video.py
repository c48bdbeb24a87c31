# SPDX-License-Identifier: Apache-2.0
"""Videos through OpenCV's writer."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import DrawingError

CODECS = {"vp9": "vp09", "mpeg4": "mp4v"}
"""Names and FourCCs. VP9 plays in browsers, too, but takes half a second a sheet to write; MPEG-4 part 2 takes a
thirtieth of that, and plays in VLC and mpv. Wheels of OpenCV lack H.264."""


class Video:
    """An MP4 file that pictures are added to; its size is that of the first one.

    Args:
        path: of the file; its folder is made.
        fps: pictures per second.
        codec: of ``CODECS``, to be tried first.
    """

    def __init__(self, path: Path, fps: float = 10.0, codec: str = "vp9") -> None:
        self.path, self._fps = path, fps
        self._codecs = sorted(CODECS, key=lambda name: name != codec)
        self.codec = ""
        """What the file is encoded with, once there is a picture."""
        self.count = 0
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append an RGB picture (H, W, 3); one of another size than the first is scaled.

        Raises:
            DrawingError: no codec works, or the file cannot be written.
        """
        if self._writer is None:
            self._open(picture)
        assert self._writer is not None
        if picture.shape[1::-1] != self._size:
            picture = np.asarray(cv2.resize(picture, self._size, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        self._writer.write(np.ascontiguousarray(picture[..., ::-1]))
        self.count += 1

    def _open(self, picture: NDArray[np.uint8]) -> None:
        height, width = picture.shape[:2]
        self._size = (width - width % 2, height - height % 2)  # codecs halve the colours
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("wb").close()
        except OSError as error:
            raise DrawingError(f"The video '{self.path}' cannot be written: {error.strerror}.") from error
        for codec in self._codecs:
            writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter.fourcc(*CODECS[codec]), self._fps, self._size)
            if writer.isOpened():
                self._writer, self.codec = writer, codec
                return
            writer.release()
        self.path.unlink(missing_ok=True)
        raise DrawingError(
            f"OpenCV has none of the codecs {', '.join(CODECS)}, so '{self.path}' cannot be made; "
            "ask for pictures alone with --no-video."
        )

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
