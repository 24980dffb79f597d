"""YAML file and ``key=value`` arguments -> RunConfig, once.

    schema's defaults  <-  file (what differs)  <-  layers (a benchmark, a row)  <-  arguments, left to right

Keys are checked here against the schema, types and ``${...}`` by OmegaConf, bounds by the dataclasses.
Whatever fails raises ``ConfigError`` with one line: the file or argument, the key, what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs import yaml_scalars
from configs.bounds import HIDDEN, BoundError, ConfigError, shown
from configs.reference import absent, settings
from configs.schema import EnvironmentConfig, RunConfig
from configs.shipped import hint

__all__ = [
    "ConfigError",
    "Layer",
    "environment_with",
    "flatten",
    "load_config",
    "to_yaml",
    "with_environment",
]
_NUMBERS = (int, float, tuple[int, ...], tuple[float, ...])
_LEADING_ZERO = re.compile(r"\s*[-+]?0[0-9_]")
_WRITE_A_MAPPING = "write 'section:' and indented 'key: value' lines"


@dataclass(frozen=True, slots=True)
class _Assignment:
    """One leaf set by the user. ``source`` names the file or the argument in messages."""

    source: str
    key: str
    value: object


@dataclass(frozen=True, slots=True)
class Layer:
    """A file that is laid over the run's own.

    It may set keys that begin with one of ``allowed`` ("memory."). Messages call it ``kind`` ("row").
    """

    path: Path
    kind: str
    allowed: tuple[str, ...]


def load_config(path: Path | None, overrides: Sequence[str], layers: Sequence[Layer] = ()) -> RunConfig:
    """The configuration of one run. ``path`` is a YAML file, None the defaults. Raises ConfigError."""
    assignments = [*_from_file(path)] if path is not None else []
    for layer in layers:
        assignments += _from_layer(layer)
    assignments += [_from_argument(argument) for argument in overrides]
    values = _typed_values(assignments)
    try:
        config: RunConfig = _build(RunConfig(), "", values)
    except BoundError as error:
        raise ConfigError(f"{_blame(error, assignments, path)}{error}") from None
    _check_mix(config)
    if config.curriculum.is_on:
        from configs.curriculum import stages  # it needs this module

        stages(config)
    return config


def with_environment(config: RunConfig, settings: Mapping[str, object], source: str) -> RunConfig:
    """``config`` with ``settings`` of ``environment.*`` laid over its own. Raises ConfigError."""
    try:
        changed = replace(config, environment=environment_with(config.environment, settings, source))
        _check_mix(changed)
    except BoundError as error:
        raise ConfigError(f"{source}: {error}") from None
    return changed


def environment_with(
    environment: EnvironmentConfig, settings: Mapping[str, object], source: str
) -> EnvironmentConfig:
    """``environment`` with ``settings`` of ``environment.*`` laid over its own. Raises ConfigError."""
    own = environment.options
    options = [_Assignment(source, "environment.options", own)] if own else []  # merged, not replaced
    assignments = [*options, *_leaves(source, "environment.", settings)]
    try:
        changed: EnvironmentConfig = _build(environment, "environment.", _typed_values(assignments))
    except BoundError as error:
        raise ConfigError(f"{source}: {error}") from None
    return changed


def _check_mix(config: RunConfig) -> None:
    if config.environment.mix:
        from configs.mixture import check_mix  # it needs this module

        check_mix(config)


def to_yaml(config: RunConfig) -> str:
    """All of ``config`` as YAML. `load_config` reads it back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


# --- where assignments come from ----------------------------------------------------------------------------


def _from_file(path: Path) -> Iterator[_Assignment]:
    content = _parse_yaml(path, _read_text(path))
    if content is None:
        return
    if not isinstance(content, dict):
        held = "a list, not a mapping" if isinstance(content, list) else "no mapping"
        raise ConfigError(f"{path}: holds {held}; {_WRITE_A_MAPPING}")
    yield from _leaves(str(path), "", content)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{hint(path.stem)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _parse_yaml(path: Path, text: str) -> object:
    try:
        return yaml_scalars.parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{path}{where}: {what}") from None
    except yaml.reader.ReaderError as error:
        place = f"character {error.position + 1} is {error.character!r}"
        raise ConfigError(f"{path}: {place}; {error.reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    except (ValueError, TypeError, RecursionError) as error:  # thousands of digits, or of levels
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None


def _from_layer(layer: Layer) -> Iterator[_Assignment]:
    """What the file sets. One that names an environment begins without the run's mix and reward weights."""
    assignments = [*_from_file(layer.path)]
    if any(assignment.key == "environment.name" for assignment in assignments):
        yield _Assignment(str(layer.path), "environment.mix", [])
        yield _Assignment(str(layer.path), "environment.reward_weights", {})
    for assignment in assignments:
        if not assignment.key.startswith(layer.allowed):
            patterns = (f"{key}*" if key.endswith((".", "_")) else key for key in layer.allowed)
            problem = f"{assignment.key} is not a setting of a {layer.kind}"
            raise ConfigError(f"{layer.path}: {problem}, which may set {', '.join(patterns)} only")
        yield assignment


def _leaves(source: str, prefix: str, content: Any) -> Iterator[_Assignment]:
    """The leaves of a nested mapping. A mapping whose key is a setting, or unknown, is a leaf itself."""
    for name, value in content.items():
        key = f"{prefix}{yaml_scalars.texts(name)}"
        if _in_section(key) and (value is None or isinstance(value, dict)):
            yield from _leaves(source, f"{key}.", value or {})
        else:
            _check_key(source, key)
            yield _Assignment(source, key, _as_written(value, key))


def _from_argument(argument: str) -> _Assignment:
    key, equals, text = argument.partition("=")
    source = f"argument {argument!r}"
    if not equals:
        guess = _similar(key)
        raise ConfigError(f"{source}: write key=value{f', e.g. {guess[0]}=...' if guess else ''}")
    mapping = _mapping_around(key)
    if mapping is not None:  # environment.options.days=3 is environment.options={days: 3}
        inner = _nested(key.removeprefix(f"{mapping}."), _value(text, mapping, argument))
        return _Assignment(source, mapping, inner)
    _check_key(source, key)
    # Text is taken as typed: YAML would read a path such as {a} or [a as something else.
    kind = settings()[key].kind
    if kind is str and text[:1] not in ("'", '"'):
        return _Assignment(source, key, text)
    if kind == tuple[str, ...] and (listed := re.fullmatch(r"\[([^\[\]]*)\]", text)):
        items = [item.strip() for item in listed[1].split(",") if item.strip()]
        # a quoted text may hold a comma: that list is YAML's
        if not any(item.startswith(("'", '"')) for item in items):
            return _Assignment(source, key, items)
    return _Assignment(source, key, _value(text, key, argument))


def _value(text: str, key: str, argument: str) -> object:
    try:
        return _as_written(yaml_scalars.parse(text), key)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        problem = f"{text[:100]!r} cannot be read; {key} must be {settings()[key].allowed}"
        raise ConfigError(f"argument {argument[:200]!r}: {problem}") from None


def _as_written(value: Any, key: str) -> object:
    """``value`` of a parsed file, as the setting takes it: a text stays as it was written."""
    is_text = settings()[key].kind in (str, tuple[str, ...])
    return yaml_scalars.texts(value) if is_text else yaml_scalars.values(value)


def _mapping_around(key: str) -> str | None:
    """The setting that is a mapping and holds ``key``: environment.options for environment.options.days."""
    mappings = (known for known, setting in settings().items() if isinstance(setting.default, dict))
    return next((known for known in mappings if key.startswith(f"{known}.")), None)


def _nested(key: str, value: object) -> dict[str, object]:
    *sections, name = key.split(".")
    nested = {name: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


# --- checks -------------------------------------------------------------------------------------------------


def _in_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in settings())


def _check_key(source: str, key: str) -> None:
    if key in settings():
        return
    if _in_section(key):
        inside = [known for known in settings() if known.startswith(f"{key}.")]
        raise ConfigError(f"{source}: {key} is a section, not a setting; set one of {', '.join(inside)}")
    guesses = " or ".join(_similar(key))
    hint = absent(key) or (f"did you mean {guesses}?" if guesses else "--settings lists all of them")
    raise ConfigError(f"{source}: {shown(key)} is no setting; {hint}")


def _similar(key: str) -> list[str]:
    """Settings like ``key``: by the whole key, and by its last name, since the section may be wrong."""
    key = key.lstrip("-+").replace("-", "_")
    name = key.rpartition(".")[2]
    by_name = [known for known in settings() if known.rpartition(".")[2] == name]
    close = difflib.get_close_matches(key, settings(), n=1, cutoff=0.75)
    similar = list(dict.fromkeys([*close, *by_name]))[:3]
    return similar or difflib.get_close_matches(key, settings(), n=1, cutoff=0.5)


# --- values of the schema's types ---------------------------------------------------------------------------


def _typed_values(assignments: Sequence[_Assignment]) -> dict[str, object]:
    """The final value of each assigned key, converted to its setting's type. Raises ConfigError."""
    values: dict[str, object] = {}
    for assignment in assignments:
        key, value = assignment.key, _typed(assignment)
        earlier = values.get(key)
        if value and isinstance(value, dict) and isinstance(earlier, dict):  # merged; an empty one clears
            value = OmegaConf.to_container(OmegaConf.merge(earlier, value), resolve=False)
        values[key] = value
    if any(_needs_others(assignment.value) for assignment in assignments):
        values |= _resolved(assignments)
    return values


def _typed(assignment: _Assignment) -> object:
    """The value as its setting's type. A value that refers to others is checked and left as it is."""
    value, kind = assignment.value, settings()[assignment.key].kind
    items = value if isinstance(value, list) else [value]
    if kind in _NUMBERS and any(isinstance(item, str) and _LEADING_ZERO.match(item) for item in items):
        problem = f"{assignment.key}={shown(value)} is not allowed: write it without the leading zero"
        raise ConfigError(f"{assignment.source}: {problem}, which may mean base 8 or 10")
    if value == MISSING:  # OmegaConf's mark for "not given"
        raise _refused(assignment)
    if type(value) is kind:  # nearly every value; the merge below takes a millisecond
        return value
    try:
        merged = OmegaConf.merge(_leaf(kind), {"value": value})
    except (OmegaConfBaseException, ValueError, TypeError):
        raise _refused(assignment) from None
    return value if _needs_others(value) else OmegaConf.to_object(merged).value  # type: ignore[union-attr]


@cache
def _leaf(kind: Any) -> DictConfig:
    """A configuration of one setting, ``value``, that takes what ``kind`` allows."""
    leaf: DictConfig = OmegaConf.structured(make_dataclass("Leaf", [("value", kind)]))
    return leaf


def _needs_others(value: object) -> bool:
    """True for a reference ``${...}`` and for a missing item, anywhere in ``value``."""
    if isinstance(value, str):
        return "${" in value or value == MISSING
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_needs_others, items))


def _resolved(assignments: Sequence[_Assignment]) -> dict[str, object]:
    """All values, with their references resolved.

    This merges the whole schema, which takes ten times as long as a load without references.
    """
    overlays = [OmegaConf.create(_nested(assignment.key, assignment.value)) for assignment in assignments]
    merged = OmegaConf.merge(OmegaConf.structured(RunConfig), *overlays)
    values: dict[str, object] = {}
    for assignment in assignments:
        try:
            value = OmegaConf.select(merged, assignment.key)
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                value = OmegaConf.to_object(value)
        except OmegaConfBaseException as error:
            place = f"{assignment.source}: {assignment.key}={assignment.value}"
            raise ConfigError(f"{place}: {_one_line(error)}") from None
        values[assignment.key] = value
    return values


def _refused(assignment: _Assignment) -> ConfigError:
    value, allowed = shown(assignment.value), settings()[assignment.key].allowed
    keys = assignment.value if isinstance(assignment.value, dict) else ()
    cure = next((f"; write its key {key} in quotes" for key in keys if not isinstance(key, str)), "")
    problem = f"{assignment.key}={value} is not allowed: it must be {allowed}{cure}"
    return ConfigError(f"{assignment.source}: {problem}")


def _build(section: Any, prefix: str, values: Mapping[str, object]) -> Any:
    """``section``, a frozen dataclass, with ``values`` in place of its own. Inner sections come first."""
    changed: dict[str, object] = {}
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        new = _build(value, f"{key}.", values) if is_dataclass(value) else values.get(key, value)
        if new is not value:
            changed[field.name] = new
    try:
        return replace(section, **changed) if changed else section
    except BoundError as error:  # its key begins at the section
        raise BoundError(f"{prefix}{error.key}", error.value, error.bound) from None


def _blame(error: BoundError, assignments: Sequence[_Assignment], path: Path | None) -> str:
    """The source of the value that is out of bounds, for the start of a message.

    It is the key's own assignment. For a bound over two settings it may be the other setting, which the
    message names.
    """
    own = [assignment for assignment in assignments if assignment.key == error.key]
    named = [assignment for assignment in assignments if assignment.key in error.bound]
    if own or named:
        source = (own or named)[-1].source
        is_secret = error.value == HIDDEN and source.startswith("argument ")
        return f"argument {error.key}: " if is_secret else f"{source}: "  # the word itself holds the secret
    return f"{path}: " if path is not None else ""


# --- small things -------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    # A value is final: "${" in it is text, not a reference to resolve again. OmegaConf's escape is a
    # backslash before it; a backslash that stands there already is doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _one_line(error: object) -> str:
    return " ".join(str(error).split("\n    full_key", 1)[0].split())


def flatten(config: object, prefix: str = "") -> dict[str, str]:
    """A nested dataclass as dotted keys: {"train.steps": "200", ...}."""
    flat: dict[str, str] = {}
    for field in fields(config):  # type: ignore[arg-type]
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        flat |= flatten(value, f"{key}.") if is_dataclass(value) else {key: str(value)}
    return flat
