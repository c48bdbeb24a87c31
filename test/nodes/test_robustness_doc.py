# SPDX-License-Identifier: Apache-2.0
"""docs/reference/robustness.md names a test for every fault: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[1] / "docs" / "reference" / "robustness.md"


def test_every_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(test_\w+)(?:::(test_\w+))?`", DOCUMENT.read_text(encoding="utf-8"))
    assert len(named) > 20
    for module, function in named:
        found = list(HERE.parent.rglob(f"{module}.py"))
        assert found, module
        assert f"def {function}(" in found[0].read_text(encoding="utf-8") if function else True, function
