"""Settings of nested dataclasses by dotted path: list them, parse them from text, and change them all at once."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from moe.model.config import ConfigError

Config = TypeVar("Config")
NONE_WORDS = ("none", "null")


class Setting(NamedTuple):
    """kind: the field's annotation. value: as it stands."""

    kind: Any
    value: Any

    @property
    def expected(self) -> str:
        """What may be given, as a fragment of a sentence."""
        return describe(self.kind)

    @property
    def text(self) -> str:
        """The value as `--set` takes it; equal values have equal texts (1 and 1.0 where a number is expected)."""
        if isinstance(self.value, tuple):
            return ",".join(self.value)
        if self.value is None or isinstance(self.value, bool):
            return str(self.value).lower()
        is_number = isinstance(self.value, int) and float in (self.kind, *get_args(self.kind))
        return str(float(self.value) if is_number else self.value)


def settings(config: Any) -> dict[str, Setting]:
    """Every setting of a nested dataclass by dotted path, in the order of the fields."""
    return {path: setting for path, setting in _walk(config) if not dataclasses.is_dataclass(setting.kind)}


def parse_changes(config: Any, assignments: Iterable[str]) -> dict[str, Any]:
    """The typed values of texts such as "optimizer.learning_rate=1e-3", for `vary`.

    A tuple is given with commas ("data.paths=a.txt,b"; empty for none); None as "none" or "null".

    Raises:
        ConfigError: no "=", an unknown or ambiguous path, a value of the wrong type, or a path given twice.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals:
            raise ConfigError(f"--set {assignment}: give PATH=VALUE, such as optimizer.learning_rate=1e-3")
        setting = _find(config, path)
        if dataclasses.is_dataclass(setting.kind):
            inside = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(setting.kind))
            raise ConfigError(f"{path} is a group of settings: set one of {inside}")
        if path in changes:
            raise ConfigError(f"{path} is given twice, the second time as {text.strip()!r}: give it once")
        changes[path] = _parse(path, setting.kind, text.strip())
    return changes


def vary(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy in which the settings, or whole groups, at these dotted paths have new values.

    All change at once, so that settings which only work together need no order; every `__post_init__` checks again.

    Raises:
        ConfigError: an unknown path, or a value of the wrong type.
    """
    inside: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        check(path, _find(config, path).kind, value)
        name, _, rest = path.partition(".")
        inside.setdefault(name, {})[rest] = value
    new = {}
    for name, within in inside.items():
        if "" in within and len(within) > 1:
            raise ConfigError(f"{name} is given as a whole and in parts: give one or the other")
        new[name] = within[""] if "" in within else vary(getattr(config, name), within)
    return dataclasses.replace(config, **new)  # type: ignore[type-var]


def check(path: str, kind: Any, value: Any) -> None:
    """Raises ConfigError where `value` is not of the annotated kind. An int serves as a float."""
    if not _fits(kind, value):
        raise ConfigError(f"{path}={value!r}: give {describe(kind)}")


def describe(kind: Any) -> str:
    """An annotation in words: "a whole number or none"."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list with commas, each {describe(get_args(kind)[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}
    return words.get(kind) or f"one {kind.__name__}"


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    kinds = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        path, value = prefix + field.name, getattr(config, field.name)
        yield path, Setting(kinds[field.name], value)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, path + ".")


def _find(config: Any, path: str) -> Setting:
    known = dict(_walk(config))
    if path not in known:
        nearest = _nearest(path, list(known))
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"the groups are {', '.join(_groups(known))}"
        raise ConfigError(f"there is no setting {path!r}: {hint} (--show lists all)")
    return known[path]


def _groups(known: Mapping[str, Setting]) -> list[str]:
    return [path for path, setting in known.items() if dataclasses.is_dataclass(setting.kind)]


def _nearest(path: str, known: list[str]) -> list[str]:
    """Known paths with the same last name; failing that, with one spelt like it; failing that, spelt like the path."""
    last = path.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for candidate in known:
        by_last.setdefault(candidate.rpartition(".")[2], []).append(candidate)
    if last in by_last:
        return by_last[last]
    alike = [found for name in get_close_matches(last, by_last, n=3, cutoff=0.7) for found in by_last[name]]
    return alike[:3] or get_close_matches(path, known, n=3, cutoff=0.7)


def _fits(kind: Any, value: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(option, value) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(get_args(kind)[0], item) for item in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def _parse(path: str, kind: Any, text: str) -> Any:
    """The first reading of `text` that fits the kind."""
    for value in _readings(kind, text):
        if _fits(kind, value):
            return value
    raise ConfigError(f"{path}={text!r}: give {describe(kind)}")


def _readings(kind: Any, text: str) -> Iterator[Any]:
    """What `text` may stand for: None comes before the text "none"."""
    if get_origin(kind) in (Union, UnionType):
        for option in sorted(get_args(kind), key=lambda option: option is not NoneType):
            yield from _readings(option, text)
    elif get_origin(kind) is tuple:
        yield tuple(part.strip() for part in text.split(",") if part.strip())
    elif get_origin(kind) is Literal:
        yield from (option for option in get_args(kind) if str(option) == text)
    elif kind is NoneType:
        yield from [None] if text.lower() in NONE_WORDS else []
    elif kind is bool:
        yield {"true": True, "false": False}.get(text.lower())
    elif kind in (int, float):
        try:
            yield kind(text)
        except ValueError:
            return
    else:
        yield text
