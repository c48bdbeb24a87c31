# SPDX-License-Identifier: Apache-2.0
"""Pictures of successive frames, as image files and as a video."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kfloc_ros.errors import DrawingError


def write_picture(path: Path, picture: NDArray[np.uint8]) -> Path:
    """Write an RGB picture (H, W, 3) as PNG, or in the format of the name's suffix.

    Raises:
        DrawingError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    done, data = cv2.imencode(path.suffix, np.ascontiguousarray(picture[..., ::-1]))
    if not done:
        raise DrawingError(f"The picture '{path}' cannot be encoded.")
    path.write_bytes(data.tobytes())
    return path


class PictureSeries:
    """Series of pictures: ``OUT/NAME/000123.png`` for every frame, and ``OUT/NAME.mp4`` if there are several.

    Args:
        out: folder.
        name: name of the series.
        pictures: also write single pictures; the only picture of a series is always written.
        video: write the video.
        fps: pictures per second.
        codec: codec of the video, see :data:`kfloc_ros.visualization.video.CODECS`.
    """

    def __init__(
        self, out: Path, name: str, *, pictures: bool = True, video: bool = True, fps: float = 10.0, codec: str = "vp9"
    ) -> None:
        self.out, self.name = out, name
        self.written: list[str] = []
        """Description of the files written."""
        self._pictures, self._with_video = pictures, video
        self._video = Video(out / f"{name}.mp4", fps, codec)
        self._first: tuple[Path, NDArray[np.uint8]] | None = None
        self._count = 0

    def add(self, index: int, picture: NDArray[np.uint8]) -> None:
        """Add the picture (H, W, 3) of a frame."""
        path = self.out / self.name / f"{index:06d}.png"
        self._count += 1
        if self._pictures:
            write_picture(path, picture)
        if self._count == 1:
            self._first = (path, picture)
            return
        if self._with_video:
            if self._first is not None:
                self._video.add(self._first[1])
            self._video.add(picture)
        self._first = None

    def close(self) -> None:
        """Finish the video."""
        self._video.close()
        alone = self._first
        if alone is not None and not self._pictures:
            write_picture(*alone)
        if alone is not None:
            self.written.append(f"{alone[0]}")
        elif self._pictures and self._count:
            self.written.append(f"{self.out / self.name}: {self._count} pictures")
        if self._video.count:
            self.written.append(f"{self._video.path}: {self._video.count} frames ({self._video.codec})")

    def __enter__(self) -> PictureSeries:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


CODECS = {"vp9": "vp09", "mpeg4": "mp4v"}
"""Names and FourCCs. VP9 also plays in browsers, but takes half a second per sheet to write. MPEG-4 part 2 takes a
thirtieth
of that, and plays in VLC and mpv. Wheels of OpenCV do not have H.264.
"""


class Video:
    """MP4 file to which pictures are added; its size is that of the first one.

    Args:
        path: path of the file; its folder is created.
        fps: pictures per second.
        codec: entry of ``CODECS`` to try first.
    """

    def __init__(self, path: Path, fps: float = 10.0, codec: str = "vp9") -> None:
        self.path, self._fps = path, fps
        self._codecs = sorted(CODECS, key=lambda name: name != codec)
        self.codec = ""
        """Codec of the file, once there is a picture."""
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
        self._size = (width - width % 2, height - height % 2)  # codecs use half the resolution for colours
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
            f"OpenCV has none of the codecs {', '.join(CODECS)}, so '{self.path}' cannot be written; use --no-video "
            "to write only pictures."
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
