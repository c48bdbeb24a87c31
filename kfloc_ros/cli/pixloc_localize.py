# SPDX-License-Identifier: Apache-2.0
"""``kfloc pixloc localize``: pose of a single image in a map or a COLMAP model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kfloc_ros.geometry.camera import Camera
    from kfloc_ros.types import Matrix

DESCRIPTION = """\
Localize one image, print its pose as 'name qw qx qy qz tx ty tz' (world to camera, as in PixLoc's result files), and
draw the map's points over the image.

DIR is a map of `kfloc map build`, or a COLMAP model (cameras, images, points3D as .bin or .txt) together with --images
and --weights. With a COLMAP model, PixLoc's own network aligns the image, starting at the most similar images.
"""

EPILOG = """\
examples:
  kfloc pixloc localize photo.jpg --map maps/kitchen --camera PINHOLE 640 480 525 525 320 240
  kfloc pixloc localize photo.jpg --map sparse/0 --images images --weights pixloc_megadepth.safetensors --cache f.st
"""


def add_parser(actions: Any) -> None:
    """Register ``kfloc pixloc localize``."""
    parser = actions.add_parser(
        "localize",
        help="localize one image in a map",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    parser.add_argument("--map", required=True, metavar="DIR", help="map folder or name, or folder of a COLMAP model")
    parser.add_argument(
        "--camera", nargs="+", metavar="WORD",
        help="COLMAP's camera model, width, height and parameters (default: the map's camera, if the aspect fits)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default: IMAGE_pose.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write pose, covariance and score to this file")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the networks")
    group = parser.add_argument_group("with a COLMAP model")
    group.add_argument("--images", type=Path, metavar="DIR", help="folder of the model's images")
    group.add_argument("--weights", type=Path, metavar="FILE", help="PixLoc model; or experiment=NAME")
    group.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="file of the references' features, for further images; none: no file (default: below ~/.cache/kfloc_ros)",
    )
    group.add_argument(
        "--tries", type=int, default=3, metavar="N", help="number of similar images to start from (default: 3)"
    )
    add_show_arguments(group)
    parser.set_defaults(run_action=run)


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


def run(args: argparse.Namespace) -> int:
    """Run ``kfloc pixloc localize``; return 1 if no pose was found."""
    from kfloc_ros.cli.train_run import experiment_weights
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.pixloc.hloc.run import read_image

    image = read_image(args.image)
    experiments = [word.partition("=")[2] for word in args.overrides if word.startswith("experiment=")]
    if experiments:
        if args.weights is not None:
            raise ConfigError("--weights and experiment=NAME both give weights; omit one of them.")
        args.weights = experiment_weights(experiments[-1])
        args.overrides = [word for word in args.overrides if not word.startswith("experiment=")]
    if args.weights is None:
        if args.show is not None:
            raise ConfigError("--show is of PixLoc's network; `kfloc show html` and `alignment` draw those of a map.")
        if args.overrides:
            raise ConfigError(f"Options such as '{args.overrides[0]}' apply only to a COLMAP model with --weights.")
        answer = _in_map(args, image)
    else:
        answer = _in_model(args, image)
    print(answer.text)
    if answer.picture is not None:
        import cv2

        out = args.out or args.image.with_name(f"{args.image.stem}_pose.png")
        if not cv2.imwrite(str(out), answer.picture[..., ::-1]):
            raise ConfigError(f"The picture '{out}' cannot be written.")
        print(f"picture: {out}")
    if args.json is not None:
        args.json.write_text(json.dumps(answer.values, indent=1) + "\n")
    return 0 if answer.values["T_map_camera"] is not None else 1


class _Answer:
    """Result to print, draw and write."""

    def __init__(
        self, name: str, T: Matrix | None, words: str, picture: NDArray[np.uint8] | None, **values: Any
    ) -> None:
        from kfloc_ros.pixloc.hloc.files import pose_line

        self.text = words if T is None else f"{pose_line(name, T)}\n{words}"
        self.picture = picture
        self.values = {"T_map_camera": None if T is None else T.tolist(), **values}


def _camera(args: argparse.Namespace, image: NDArray[np.uint8], of_map: Camera) -> Camera:
    """Return the image's camera from --camera, or the map's camera if the aspect ratio is the same."""
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.geometry.colmap import camera_from_parameters

    height, width = image.shape[:2]
    if args.camera:
        try:
            model, w, h, *parameters = args.camera
            camera = camera_from_parameters(model, int(w), int(h), [float(p) for p in parameters])
        except ValueError as error:
            raise ConfigError(f"--camera takes MODEL width height and numbers: {error}") from error
        if (camera.width, camera.height) != (width, height):
            raise ConfigError(f"--camera is {camera.width}x{camera.height}, but the image is {width}x{height}.")
        return camera
    if abs(width / height - of_map.width / of_map.height) > 0.01:
        raise ConfigError(
            f"The image is {width}x{height} and the map's camera {of_map.width}x{of_map.height}, so the cameras "
            "differ; give the image's camera with --camera MODEL width height parameters."
        )
    print("camera: assumed to be the map's; --camera gives another one", file=sys.stderr)
    return of_map.scaled_to(width, height)


def _in_map(args: argparse.Namespace, image: NDArray[np.uint8]) -> _Answer:
    """Localize in a map: coarse pose or relocalization, then alignment."""
    import numpy as np

    from kfloc_ros.device import choose_device
    from kfloc_ros.geometry.camera import ImageAdapter
    from kfloc_ros.localization.config import LocalizerConfig
    from kfloc_ros.localization.localizer import Localizer
    from kfloc_ros.maps.format import resolve_map
    from kfloc_ros.maps.scene_map import SceneMap
    from kfloc_ros.types import Frame, PoseEstimate, TrackingState
    from kfloc_ros.visualization.overlay import OverlayPainter

    device = choose_device(args.device)
    scene_map = SceneMap.load(resolve_map(args.map))
    adapter = ImageAdapter(_camera(args, image, scene_map.camera), scene_map.camera)
    adapted = adapter(image)
    localizer = Localizer(scene_map, LocalizerConfig(device=str(device)))
    estimate = localizer.process(Frame(adapted, scene_map.camera, stamp_ns=1, name=args.image.name)).estimate
    painter = OverlayPainter(scene_map.references, scene_map.camera)
    pictures = [painter.paint(adapted, estimate)]
    coarse = estimate.coarse
    if coarse is not None and coarse.success and estimate.alignment is not None:
        start = PoseEstimate(1, TrackingState.DEGRADED, "before the alignment", T_map_camera=coarse.T_map_camera)
        pictures.insert(0, painter.paint(adapted, start))
    cost = estimate.alignment.final_cost if estimate.alignment is not None else None
    words = f"{estimate.state.value}{': ' + estimate.reason if estimate.reason else ''}"
    covariance = None if estimate.covariance is None else estimate.covariance.tolist()
    return _Answer(
        args.image.name, estimate.T_map_camera, words, np.concatenate(pictures, axis=1),
        state=estimate.state.value, reason=estimate.reason, covariance=covariance,
        alignment_cost=cost if cost is not None and np.isfinite(cost) else None,
    )  # fmt: skip


class _Bars:
    """Progress bars, one for each kind of work that is reported in turn."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._what = ""

    def __call__(self, done: int, total: int, what: str) -> None:
        from kfloc_ros.cli.tables import progress_bar

        if not total:
            return
        if self._bar is None or what != self._what or done < self._bar.n:
            self.__exit__()
            self._bar, self._what = progress_bar(total=total, desc=what, unit="image"), what
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _in_model(args: argparse.Namespace, image: NDArray[np.uint8]) -> _Answer:
    """Localize in a COLMAP model by PixLoc's network."""
    import numpy as np

    from kfloc_ros.cli.show_alignment import PixLocPictures
    from kfloc_ros.device import choose_device
    from kfloc_ros.errors import ConfigError
    from kfloc_ros.pixloc.hloc.options import run_options
    from kfloc_ros.pixloc.hloc.run import PictureLocalizer, default_cache, view_settings
    from kfloc_ros.pixloc.reference.checkpoint import load_weights
    from kfloc_ros.pixloc.reference.losses import RobustLoss
    from kfloc_ros.pixloc.reference.two_view import AlignmentTrace
    from kfloc_ros.pixloc.reference.views import read_scene
    from kfloc_ros.visualization.alignment import draw_moved_points

    if args.images is None:
        raise ConfigError("--weights requires --images, the folder of the COLMAP model's images.")
    if args.tries < 1:
        raise ConfigError(f"--tries takes 1 or more, got {args.tries}.")
    options = run_options("7scenes", from_poses=False, words=["precision=auto", *args.overrides])
    model, scene = load_weights(args.weights).to(choose_device(args.device)), read_scene(Path(args.map))
    camera = _camera(args, image, scene.images[0].camera)
    cache = args.cache or default_cache(scene, model, view_settings(options, choose_device(args.device)))
    with _Bars() as bars:
        localizer = PictureLocalizer(
            model, scene, args.images, options, cache=None if str(cache) == "none" else cache, on_progress=bars
        )
        traces = [AlignmentTrace() for _ in range(args.tries)]
        observer = traces.__getitem__ if args.show is not None else None
        results = list(localizer.localize(image, camera, tries=args.tries, observer=observer))
    best = max(results, key=lambda r: (r.success, r.score.value))
    if args.show is not None:
        loss = RobustLoss.parse(options.settings().loss or model.config.loss)
        pictures = PixLocPictures(args.show, f"{args.image.name} in {args.map}", scene, args.images, loss, args.codec)
        pictures.add(args.image.name, image, camera, traces[results.index(best)], best.views, best.reason)
        print("\n".join(pictures.close()))
    rows = np.unique(np.concatenate([scene.images[k].point_rows for k in best.views]))
    picture = draw_moved_points(image, camera, scene.points[rows], best.T_map_camera_init, best.T_map_camera)
    names = [scene.images[k].name for k in best.views]
    words = f"score {best.score.value:.2f} with {best.point_count} points of {', '.join(names)}"
    words = words if best.success else f"not aligned: {best.reason}"
    covariance = None if best.covariance is None else best.covariance.tolist()
    return _Answer(
        args.image.name, best.T_map_camera if best.success else None, words, picture,
        reason=best.reason, score=best.score.value, covariance=covariance, references=names,
    )  # fmt: skip
