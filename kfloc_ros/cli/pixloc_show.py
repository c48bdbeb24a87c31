# SPDX-License-Identifier: Apache-2.0
"""``--show`` of ``kfloc pixloc run`` and ``localize``: confidences, alignments as pictures and animations, a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kfloc_ros.errors import FrameError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kfloc_ros.geometry.camera import Camera
    from kfloc_ros.pixloc.reference.losses import RobustLoss
    from kfloc_ros.pixloc.reference.two_view import AlignmentTrace
    from kfloc_ros.pixloc.reference.views import ReferenceScene
    from kfloc_ros.visualization.sheet import Sheet

MAX_PAGE_FRAMES = 50
"""Alignments in a page; each takes about 0.2 MB."""
FPS = 12.0


def add_show_arguments(parser: argparse._ActionsContainer) -> None:
    """Add --show and --codec."""
    parser.add_argument(
        "--show", type=Path, metavar="DIR",
        help="draw into this folder: the network's confidences, every alignment as a picture (start, end, reference) "
        "and as an animation, and alignment.html with its steps in 3-D",
    )  # fmt: skip
    parser.add_argument(
        "--codec", choices=("vp9", "mpeg4"), default="vp9",
        help="codec of the animations: vp9 plays in browsers; mpeg4 is written 30 times faster",
    )  # fmt: skip


class PixLocPictures:
    """Writer of the pictures of several alignments in one scene.

    Args:
        out: folder.
        title: title of the page.
        scene: points and images.
        images: folder of the references.
        loss: robust loss of the alignments.
        codec: codec of the animations.
    """

    def __init__(
        self, out: Path, title: str, scene: ReferenceScene, images: Path, loss: RobustLoss, codec: str = "vp9"
    ) -> None:
        from kfloc_ros.visualization.pixloc import PixLocPage
        from kfloc_ros.visualization.video import PictureSeries

        self._out, self._scene, self._images, self._codec = out, scene, images, codec
        self._page = PixLocPage(title, scene, loss)
        self._confidences = PictureSeries(out, "confidence", fps=5.0, codec=codec)
        self._sheet: Sheet | None = None
        self._references: dict[int, NDArray[np.uint8] | None] = {}
        self._count = 0
        self.written: list[str] = []
        """Description of the files written."""

    def add(
        self,
        name: str,
        image: NDArray[np.uint8],
        camera: Camera,
        trace: AlignmentTrace,
        views: tuple[int, ...],
        reason: str = "",
    ) -> None:
        """Draw the alignment of an image (H, W, 3) by its trace; one that did not start is left out."""
        from kfloc_ros.visualization.pixloc import AlignmentPictures, confidence_panels
        from kfloc_ros.visualization.sheet import Sheet
        from kfloc_ros.visualization.video import Video, write_picture

        if not trace.steps:
            return
        if self._sheet is None:
            self._sheet = Sheet(3, image.shape[1], image.shape[0])
        panels = confidence_panels(image, trace.confidences, trace.strides, trace.camera_scale)
        self._confidences.add(self._count, self._sheet.draw(name, panels))
        references = {k: self._reference(k) for k in views}
        first = next(((k, picture) for k, picture in references.items() if picture is not None), None)
        if first is not None:
            drawn = AlignmentPictures(image, camera, self._scene, trace, (first[1], first[0]))
            stem = name.replace("/", "_").rpartition(".")[0] or name
            write_picture(self._out / "alignment" / f"{stem}.png", drawn.ends())
            with Video(self._out / "alignment" / f"{stem}.mp4", FPS, self._codec) as video:
                for picture in drawn.animation():
                    video.add(picture)
            if self._count < MAX_PAGE_FRAMES:
                self._page.add(name, image, camera, trace, references, kept=drawn.kept(), reason=reason)
        self._count += 1

    def _reference(self, position: int) -> NDArray[np.uint8] | None:
        from kfloc_ros.files import inside
        from kfloc_ros.pixloc.hloc.run import read_image

        if position not in self._references:
            try:
                image = self._scene.images[position]
                self._references[position] = read_image(inside(self._images, image.name), image.camera)
            except (FrameError, SourceError):
                self._references[position] = None
        return self._references[position]

    def close(self) -> list[str]:
        """Finish the files; return their description."""
        self._confidences.close()
        written = list(self._confidences.written)
        if self._count:
            written.append(f"{self._out / 'alignment'}: {self._count} alignments, .png and .mp4")
            page = self._page.write(self._out / "alignment.html")
            written.append(f"{page}: {page.stat().st_size / 1e6:.1f} MB; open it in any browser")
        return written
