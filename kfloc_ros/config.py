# SPDX-License-Identifier: Apache-2.0
"""Configuration: frozen dataclasses whose fields carry text, range, and whether they may change while running.

The field definition is the single source of an option: the ROS parameter descriptor, the command-line help, the
documentation table and the validation are generated from it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from kfloc_ros.errors import ConfigError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Option:
    """Definition of one configuration value, read from a dataclass field made with :func:`option`."""

    name: str
    kind: type
    default: Any
    text: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    live: bool

    def check(self, value: Any) -> Any:
        """Return ``value`` in this option's type.

        Raises:
            ConfigError: wrong type, outside the range, or not one of the choices.
        """
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            raise ConfigError(f"'{self.name}' must be of type {self.kind.__name__}, got {value!r}.")
        if self.kind in (int, float) and isinstance(value, (int, float)):
            low, high = self.low, self.high
            if not ((low is None or value >= low) and (high is None or value <= high)):
                raise ConfigError(f"'{self.name}' must lie in [{low}, {high}], got {value!r}.")
        if self.choices and value not in self.choices:
            raise ConfigError(f"'{self.name}' must be one of {', '.join(self.choices)}, got {value!r}.")
        return value


def option(
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """Return a dataclass field that is a user option.

    Args:
        default: default value.
        text: meaning, for help and documentation.
        low, high: limits of a number, both included.
        choices: allowed values of a string.
        live: true if the value may change while running.
    """
    return dataclasses.field(
        default=default, metadata={"text": text, "low": low, "high": high, "choices": choices, "live": live}
    )


def options_of(config_type: type) -> Iterator[Option]:
    """Yield the options of a configuration dataclass, in order."""
    kinds = typing.get_type_hints(config_type)
    for item in dataclasses.fields(config_type):
        meta = item.metadata
        yield Option(
            name=item.name,
            kind=kinds[item.name],
            default=item.default,
            text=meta["text"],
            low=meta["low"],
            high=meta["high"],
            choices=meta["choices"],
            live=meta["live"],
        )


def build_config(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make a configuration from a mapping, with every value checked.

    Raises:
        ConfigError: a key is unknown (the nearest known one is named) or a value does not fit.
    """
    options = {item.name: item for item in options_of(config_type)}
    for key in values:
        if key not in options:
            if key in (former := getattr(config_type, "FORMER", {})):
                raise ConfigError(f"There is no option '{key}' any more. {former[key]}")
            import difflib

            near = difflib.get_close_matches(key, options, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(options)}."
            raise ConfigError(f"Unknown option '{key}'.{hint}")
    return config_type(**{key: options[key].check(value) for key, value in values.items()})


def parse_overrides(config_type: type, words: Sequence[str]) -> dict[str, Any]:
    """Return values of ``key=value`` words, read as the option's type; :func:`build_config` checks names and ranges.

    Raises:
        ConfigError: a word has no '=', or its value cannot be read as the option's type.
    """
    kinds = {item.name: item.kind for item in options_of(config_type)}
    values: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator:
            raise ConfigError(f"Options are written key=value, got '{word}'.")
        kind = kinds.get(key, str)
        try:
            if kind is bool:
                values[key] = {"true": True, "false": False}[text.lower()]
            elif kind is int:
                values[key] = int(text.replace("_", ""))
            else:
                values[key] = float(text) if kind is float else text
        except (ValueError, KeyError) as error:
            raise ConfigError(f"'{key}' must be of type {kind.__name__}, got '{text}'.") from error
    return values


@dataclass(frozen=True)
class Sets:
    """Rule of a key of another program's configuration: it sets options of this package."""

    options: Callable[[Any], Mapping[str, Any]]

    @classmethod
    def one(cls, name: str) -> Sets:
        """Return the rule of a key that sets one option to its own value."""
        return cls(lambda value: {name: value})


@dataclass(frozen=True)
class Fixed:
    """Rule of a key that may only have the values that are built in."""

    values: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Idle:
    """Rule of a key that makes no difference here."""

    reason: str


Rule = Sets | Fixed | Idle


@dataclass(frozen=True)
class Translated:
    """A configuration in this package's words."""

    words: tuple[str, ...]
    """``key=value``"""
    notes: tuple[str, ...]
    """Keys that make no difference here, and why."""


def translate_keys(content: Mapping[str, Any], sections: Sequence[str], rules: Mapping[str, Rule]) -> Translated:
    """Return a configuration of another program's, of this package's, or of both, as words.

    Args:
        content: as YAML has it; nested below the sections, or dotted keys.
        sections: first parts of the other program's keys.
        rules: of its keys.

    Raises:
        ConfigError: a key is unknown, or may not have its value; the reason is said.
    """
    words, notes = list[str](), list[str]()
    for key, value in _flat(content):
        if key.partition(".")[0] in sections:
            rule = rules.get(key)
            if rule is None:
                import difflib

                near = difflib.get_close_matches(key, rules, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else "."
                raise ConfigError(f"The configuration has an unknown key '{key}'{hint}")
        else:
            rule = Sets.one(key)
        if isinstance(rule, Sets):
            words += [f"{name}={_text(item)}" for name, item in rule.options(value).items()]
        elif isinstance(rule, Idle):
            notes.append(f"{key}: {rule.reason}")
        elif value not in rule.values:
            raise ConfigError(f"{key}={value} is not taken: {rule.reason}.")
    return Translated(tuple(words), tuple(notes))


def read_word(word: str, sections: Sequence[str]) -> Mapping[str, Any]:
    """Return a word of a command, such as ``train.lr=1e-5`` or ``batch=2``, as a configuration.

    Raises:
        ConfigError: it has no '=', or its value cannot be read.
    """
    import yaml

    key, separator, text = word.partition("=")
    if not separator:
        raise ConfigError(f"Options are written key=value, got '{word}'.")
    if key.partition(".")[0] not in sections:
        return {key: text}
    try:
        return {key: yaml.safe_load(text)}
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of '{word}' cannot be read: {error}") from error


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}.") if value else [(name, value)]
        else:
            found.append((name, value))
    return found


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
