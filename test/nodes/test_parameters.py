# SPDX-License-Identifier: Apache-2.0
"""The parameter table, and that the files made from it are up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kfloc_ros.errors import ConfigError
from kfloc_ros.nodes.parameters import build_configs, parameter_table, render_markdown, render_yaml

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_shipped_parameter_file_is_up_to_date() -> None:
    text = (REPOSITORY / "config" / "localizer.yaml").read_text()
    assert text == render_yaml(), "run: python -m kfloc_ros.nodes.parameters --yaml > config/localizer.yaml"


def test_the_documented_table_is_up_to_date() -> None:
    text = (REPOSITORY / "docs" / "ros_interface.md").read_text()
    assert render_markdown() in text, "put the output of python -m kfloc_ros.nodes.parameters --markdown there"


def test_the_shipped_file_means_the_defaults() -> None:
    values = yaml.safe_load(render_yaml())["/**"]["ros__parameters"]
    assert build_configs(values) == build_configs({})
    assert values.keys() == parameter_table().keys()


def test_every_parameter_is_explained_and_every_number_has_a_range() -> None:
    for name, row in parameter_table().items():
        assert row.option.text.endswith("."), name
        if row.option.kind in (int, float):
            assert row.option.low is not None and row.option.high is not None, name


def test_values_reach_the_configuration_they_belong_to() -> None:
    node, localizer = build_configs({"map": "kitchen", "filter": False, "max_age_s": 2})
    assert (node.map, node.max_age_s, localizer.filter) == ("kitchen", 2.0, False)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mapp": "kitchen"}, "Did you mean 'map'"),
        ({"xyzzy": 1}, "Known: map,"),
        ({"max_age_s": -1.0}, "lie in"),
        ({"map": 3}, "type str"),
        ({"filter": 1}, "type bool"),
        ({"device": "tpu"}, "one of"),
        ({"transform_rate_hz": 1e-300}, r"must be 0 or lie in \[0.1"),
        ({"transform_rate_hz": float("nan")}, "lie in"),
        ({"base_frame": "base\nlink"}, "printable"),
        ({"odom_frame": "odom\ud800"}, "printable"),
    ],
)
def test_misspelt_and_unfit_values_are_refused_in_words(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_configs(values)
