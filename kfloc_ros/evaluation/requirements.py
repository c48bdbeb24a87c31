# SPDX-License-Identifier: Apache-2.0
"""Requirements on a run, written as ``latency_ms.p95<=100``, for use in CI."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kfloc_ros.errors import ConfigError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"\s*([A-Za-z0-9_.]+)\s*(<=|>=|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Requirement:
    """Limit of one figure of ``summary.json``, named by its path."""

    path: str
    relation: str
    limit: float

    def failure(self, figures: Mapping[str, Any]) -> str:
        """Return the reason why figures do not meet the limit, or an empty string; a null figure does not meet it.

        Raises:
            ConfigError: there is no such figure.
        """
        value = figure(figures, self.path)
        if value is None:
            return f"{self.path} has no value, but must be {self.relation} {self.limit:g}."
        if _OPERATORS[self.relation](value, self.limit):
            return ""
        return f"{self.path} is {value:.6g}, but must be {self.relation} {self.limit:g}."


def parse_requirement(text: str) -> Requirement:
    """Read ``recall.5cm_5deg>=0.95``.

    Raises:
        ConfigError: the text does not have this form.
    """
    match = _FORM.fullmatch(text)
    try:
        if match is not None:
            return Requirement(match[1], match[2], float(match[3]))
    except ValueError:
        pass
    raise ConfigError(f"A requirement is written FIGURE<=NUMBER, such as latency_ms.p95<=100, not '{text}'.")


def figures_of(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float | None]:
    """Return every number of a summary by its path; null figures are None."""
    found: dict[str, float | None] = {}
    for key, value in summary.items():
        if isinstance(value, Mapping):
            found |= figures_of(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            found[prefix + key] = float(value)
        elif value is None or isinstance(value, int | float):
            found[prefix + key] = value
    return found


def figure(summary: Mapping[str, Any], path: str) -> float | None:
    """Return one number of a summary.

    Raises:
        ConfigError: there is no such figure; the message names similar ones.
    """
    figures = figures_of(summary)
    if path not in figures:
        import difflib

        near = difflib.get_close_matches(path, figures, n=3, cutoff=0.3)
        raise ConfigError(f"The summary has no figure '{path}'; similar: {', '.join(near) or 'none'}.")
    return figures[path]
