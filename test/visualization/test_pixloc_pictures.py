# SPDX-License-Identifier: Apache-2.0
"""Pictures of the published PixLoc: confidences, steps of an alignment, and the page with them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from kfloc_ros.errors import DrawingError
from kfloc_ros.geometry.camera import Camera
from kfloc_ros.geometry.lie import inverse_pose, make_pose
from kfloc_ros.pixloc.reference.losses import RobustLoss
from kfloc_ros.pixloc.reference.two_view import AlignmentTrace, TraceStep
from kfloc_ros.pixloc.reference.views import ReferenceImage, ReferenceScene
from kfloc_ros.visualization.alignment import project_points
from kfloc_ros.visualization.pixloc import HELD_PICTURES, AlignmentPictures, PixLocPage, confidence_panels

CAMERA = Camera(160, 120, 120.0, 120.0, 79.5, 59.5, "plumb_bob", (-0.1, 0.01, 0.0, 0.0, 0.0))
LOSS = RobustLoss.parse("scaled_barron(0, 0.1)")


@pytest.fixture
def scene() -> ReferenceScene:
    rng = np.random.default_rng(0)
    points = np.c_[rng.uniform([-1, -0.7], [1, 0.7], (60, 2)), np.full(60, 2.5)]
    images = tuple(
        ReferenceImage(f"{k}.png", CAMERA, inverse_pose(make_pose(np.eye(3), [0.1 * k, 0, 0])), np.arange(40 + 20 * k))
        for k in range(2)
    )
    return ReferenceScene(points, np.arange(60), np.full(60, 3), images)


@pytest.fixture
def trace(scene: ReferenceScene) -> AlignmentTrace:
    """Ten steps from 0.2 m beside the end, at two levels; the cost falls."""
    made = AlignmentTrace()
    rows = np.concatenate([image.point_rows for image in scene.images])
    for k in range(10):
        T = make_pose(np.eye(3), [0.2 * (1 - k / 9), 0.0, 0.0])
        costs = np.full(len(rows), 0.06 * (1 - k / 12), np.float32)
        costs[5] = np.nan
        made.steps.append(TraceStep(T, 1, 16 if k < 5 else 4, rows, costs))
    return made


def image(value: int) -> np.ndarray:
    return np.full((CAMERA.height, CAMERA.width, 3), value, np.uint8)


def test_confidences_lie_over_their_pixels() -> None:
    """A sure cell of each level covers its own pixels of the image, whose network image is half as large."""
    fine, coarse = torch.full((1, 1, 60, 80), 0.01), torch.full((1, 1, 15, 20), 0.01)
    fine[0, 0, 30:34, 40:44] = 0.9
    coarse[0, 0, 8, 10] = 0.9
    panels = confidence_panels(image(0), [fine, coarse], [1, 4], 0.5)
    assert [panel.title.split(":")[0] for panel in panels] == [
        "image", "confidence, 1 px a cell", "confidence, 4 px a cell", "confidence, all levels"
    ]  # fmt: skip
    for panel, (u, v) in zip(panels[1:], ((84, 64), (80, 64), (81, 64)), strict=True):
        assert panel.rgb is not None
        red = panel.rgb[..., 0].astype(int) - panel.rgb[..., 2]
        assert red[v, u] > red[10, 10] + 40


def test_an_animation_moves_points_and_ends_where_the_alignment_does(
    scene: ReferenceScene, trace: AlignmentTrace
) -> None:
    drawn = AlignmentPictures(image(120), CAMERA, scene, trace, (image(60), 0))
    kept = drawn.kept()
    assert kept[0] == 0 and kept[-1] == 9
    pictures = list(drawn.animation())
    assert len(pictures) == len(kept) + HELD_PICTURES and len({p.shape for p in pictures}) == 1
    assert (pictures[0] != pictures[-1]).any() and (pictures[-1] == pictures[-2]).all()
    still = AlignmentTrace()
    still.steps = [trace.steps[-1]] * 30
    assert AlignmentPictures(image(120), CAMERA, scene, still, (image(60), 0)).kept() == [0, 29]
    ends = drawn.ends()
    assert ends.shape[1] > pictures[0].shape[1]
    with pytest.raises(DrawingError, match="did not start"):
        AlignmentPictures(image(120), CAMERA, scene, AlignmentTrace(), (image(60), 0))


def test_the_page_holds_steps_and_a_byte_for_every_point(
    scene: ReferenceScene, trace: AlignmentTrace, tmp_path: Path
) -> None:
    page = PixLocPage("one <b>", scene, LOSS)
    with pytest.raises(DrawingError, match="no alignment"):
        page.write(tmp_path / "none.html")
    page.add("q.png", image(120), CAMERA, trace, {1: image(200), 0: None}, kept=[0, 4, 9], truth=np.eye(4))
    text = page.write(tmp_path / "page.html").read_text()
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found.group(1))
    (frame,) = data["frames"]
    assert [step["stride"] for step in frame["steps"]] == [16, 16, 4]
    assert frame["steps"][0]["error_cm"] == pytest.approx(20) and frame["steps"][-1]["cm"] == 0
    assert frame["references"] == [1, 0] and frame["camera"][6:8] == [-0.1, 0.01]
    residuals = np.frombuffer(base64.b64decode(frame["residuals"][0]), np.uint8)
    assert len(residuals) == 60 + 40
    worst = float(LOSS.value(torch.tensor(2.0)))
    assert np.median(residuals) == pytest.approx(200 * 0.06 / worst, abs=1)
    assert data["up"] == [0, -1.0, 0]
    assert cv2.imdecode(np.frombuffer(base64.b64decode(frame["image"]), np.uint8), 1).shape == (120, 160, 3)
    colours = np.frombuffer(base64.b64decode(data["scene"]["colours"]), np.uint8)
    assert len(colours) % 3 == 0 and (colours == 200).all()  # of the one reference that is at hand


def test_points_out_of_view_have_no_pixels() -> None:
    points = np.array([[0.0, 0.0, 2.0], [0.0, 0.0, -2.0], [50.0, 0.0, 2.0]])
    pixels = project_points(CAMERA, points, np.eye(4))
    assert pixels[0] == pytest.approx([79.5, 59.5]) and np.isnan(pixels[1:]).all()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Chromium is not installed; it opens the page")
def test_a_browser_opens_the_json_of_the_original_viewer(
    scene: ReferenceScene, trace: AlignmentTrace, tmp_path: Path
) -> None:
    page = PixLocPage("own", scene, LOSS)
    page.add("q.png", image(120), CAMERA, trace, {0: image(60)}, kept=[0, 9])
    text = page.write(tmp_path / "page.html").read_text()
    corners = [[-0.7, -0.5], [0.7, -0.5], [0.7, 0.5], [-0.7, 0.5], [-0.7, -0.5], [0.0, -0.9], [0.7, -0.5]]
    poses = [[[1.0, 0.0, 0.0, 0.0], [0.1 * k, 0.0, 0.0]] for k in range(4)]
    dump = {
        "p3d": {"xyz": scene.points.tolist(), "colors": [[200, 100, 50]] * len(scene.points)},
        "T": {"query": poses, "refs": poses[:1]}, "camera": {"query": corners, "refs": [corners]},
        "image": {"query": "query.jpg", "refs": ["ref0.jpg"]}, "p2d": {"query": [[0.5, 0.5]], "refs": [[]]},
    }  # fmt: skip
    give = f"""<script>
const files = new DataTransfer();
files.items.add(new File([JSON.stringify({json.dumps(dump)})], "dump.json"));
document.getElementById("files").files = files.files;
document.getElementById("files").dispatchEvent(new Event("change"));
</script></body>"""
    (tmp_path / "given.html").write_text(text.replace("</body>", give))
    flags = ("--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--dump-dom")
    words = ("--virtual-time-budget=8000", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr")
    done = subprocess.run(
        ["chromium", *flags, *words, (tmp_path / "given.html").as_uri()],
        capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert not re.search(r"CONSOLE.*(Error|error)", done.stderr), done.stderr
    assert "<title>PixLoc's dump</title>" in done.stdout and 'data-ready="yes"' in done.stdout
    assert "3 of 3" in done.stdout  # its four steps
