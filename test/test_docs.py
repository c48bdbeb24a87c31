# SPDX-License-Identifier: Apache-2.0
"""The documents: the example runs, links lead somewhere, the layers are those tested, the reading path stays short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
READING_PATH = (
    "README.md", "docs/quickstart.md", "docs/installation.md", "docs/ros_interface.md", "docs/maps.md",
    "docs/relocalization.md", "docs/places.md", "docs/troubleshooting.md", "docs/architecture.md",
)  # fmt: skip
MAX_WORDS = 12_000
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", ".github/**/*.md", "docs/**/*.md", "maps/*.md", "kfloc_ros/**/*.md", "benchmarks/**/*.md")
    for path in ROOT.glob(pattern)
)


def between(path: Path, name: str) -> str:
    """The text of a document between two comments that carry a name."""
    match = re.search(rf"<!-- {name}: begin -->(.*?)<!-- {name}: end -->", path.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None, f"{path} has no '<!-- {name}: begin -->' and '<!-- {name}: end -->'"
    return match[1]


def prose(text: str) -> str:
    """A document without its code, where brackets are no links and # is no heading."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        earlier = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{earlier}" if earlier else slug)
    return set(found)


@pytest.mark.thorough
def test_the_example_of_poses_and_cameras_runs() -> None:
    code = re.search(r"```python\n(.*?)```", between(ROOT / "docs/reference/pixloc.md", "geometry"), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_the_example_of_the_readme_runs() -> None:
    code = re.search(r"```python\n(.*?)```", between(README, "example"), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TRACKING") >= 8 and "deviation" in done.stdout, done.stdout


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        if not linked.is_relative_to(ROOT) or not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def test_the_reading_path_is_whole_and_read_in_an_hour() -> None:
    assert set(READING_PATH) <= set(DOCUMENTS)
    words = {name: len((ROOT / name).read_text(encoding="utf-8").split()) for name in READING_PATH}
    assert sum(words.values()) <= MAX_WORDS, words


def test_the_layers_are_those_that_imports_are_tested_against() -> None:
    tree = ast.parse((ROOT / "test" / "test_package.py").read_text(encoding="utf-8"))
    (layers,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    cells = re.findall(r"^\| *(`[^|]*`) *\|", between(ROOT / "docs" / "architecture.md", "layers"), re.MULTILINE)
    assert [" ".join(name.rstrip("/") for name in re.findall(r"`([^`]+)`", cell)) for cell in cells] == list(layers)
