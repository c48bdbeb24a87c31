# SPDX-License-Identifier: Apache-2.0
"""Containers, continuous integration, rosdep keys and the security policy agree with the package."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfloc_ros.nodes.topic_table import published_by

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments; continued lines are joined."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_dockerfiles_are_well_formed_and_run_without_privileges(path: Path) -> None:
    found = instructions(path)
    assert {word for word, _ in found} <= INSTRUCTIONS
    words = [word for word, _ in found]
    assert words.index("SHELL") < words.index("RUN"), "pipes fail where their first command does"
    assert [rest for word, rest in found if word == "USER"][-1] not in ("root", "0")
    base = next(rest for word, rest in found if word == "FROM")
    assert ":" in base and not base.endswith(":latest")
    for word, rest in found:
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
            assert rest.index("apt-get update") < rest.index("apt-get install")
        if word == "COPY":
            sources = [item for item in rest.split()[:-1] if not item.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest
        for name in re.findall(r"requirements/[\w.]+", rest):
            assert (ROOT / name).is_file(), name


def test_the_devcontainer_builds_a_dockerfile_that_there_is() -> None:
    given = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    assert (ROOT / ".devcontainer" / given["build"]["dockerfile"]).resolve() in DOCKERFILES
    assert given["remoteUser"] in (ROOT / "docker" / "bare.Dockerfile").read_text(encoding="utf-8")


def test_continuous_integration_runs_the_targets_and_the_wheels_that_there_are() -> None:
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = {name for step in steps for name in re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))}
    assert called and called - {"g"} <= targets
    matrix = workflow["jobs"]["wheels"]["strategy"]["matrix"]
    distributions = {*matrix["ros"], *(item["ros"] for item in matrix["include"])}
    assert distributions == {"kilted", "jazzy"}
    assert any(name.endswith("-arm") for name in workflow["jobs"]["installation"]["strategy"]["matrix"]["machine"])
    for step in steps:
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_rosdep_has_a_key_for_each_package_of_pip_that_is_needed_beside_an_installation() -> None:
    keys = yaml.safe_load((ROOT / "rosdep.yaml").read_text(encoding="utf-8"))
    given = {rule["pip"]["packages"][0] for key in keys.values() for rule in key.values() if isinstance(rule, dict)}
    text = (ROOT / "requirements" / "with_ros.txt").read_text(encoding="utf-8")
    needed = {name for name in re.findall(r"^([a-z-]+)>=", text, re.MULTILINE) if name not in ("embreex", "numba")}
    assert needed <= given
    assert all({"debian", "ubuntu"} <= set(rules) for rules in keys.values())


def test_the_policy_allows_what_the_node_publishes_and_hears() -> None:
    profile = ElementTree.parse(ROOT / "config/sros2/policy.xml").getroot().find(".//profile[@node='localizer']")
    assert profile is not None

    def allowed(kind: str, mode: str) -> set[str]:
        return {str(item.text) for item in profile.iterfind(f"{kind}[@{mode}='ALLOW']/*")}

    of_rclpy = {"/rosout", "/parameter_events", "~/transition_event"}
    assert allowed("topics", "publish") == set(published_by("localizer")) | of_rclpy
    interface = (ROOT / "docs" / "ros_interface.md").read_text(encoding="utf-8")
    inputs = re.findall(r"^\| `([^`]+)` \|", interface.partition("### In\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert set(inputs) <= allowed("topics", "subscribe")
    services = re.findall(
        r"^\| `([^`]+)` \|", interface.partition("## Services\n")[2].partition("\n\n|")[2][:2000], re.MULTILINE
    )
    assert {name for name in services if name.startswith("~/")} <= allowed("services", "reply") | {"~/localize"}
