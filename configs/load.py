"""YAML file and ``key=value`` arguments -> RunConfig, once.

    defaults of the schema  <-  file (only what differs)  <-  layers (a benchmark, a row)  <-  arguments, left to right  ->  frozen RunConfig

Keys are checked against the schema here; types, Literals and ``${...}`` by OmegaConf; bounds by the dataclasses. Whatever fails raises
``ConfigError`` with one line: the file or argument, the key, what is allowed.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.bounds import BoundError, shown
from configs.describe import describe, help_table, settings
from configs.schema import RunConfig

__all__ = ["ConfigError", "Layer", "describe", "help_table", "load_config", "to_yaml"]


class ConfigError(ValueError):
    """The configuration cannot be used; one line that says where, which key, and what is allowed."""


@dataclass(frozen=True, slots=True)
class _Assignment:
    """One leaf set by the user. ``source`` names the file or the argument in messages."""

    source: str
    key: str
    value: object


@dataclass(frozen=True, slots=True)
class Layer:
    """A file that is laid over the run's own. It may set what begins with one of ``allowed`` ("memory."), and is called ``kind`` in messages."""

    path: Path
    kind: str
    allowed: tuple[str, ...]


def load_config(path: Path | None, overrides: Sequence[str], layers: Sequence[Layer] = ()) -> RunConfig:
    """The configuration of one run from a YAML file (None: the defaults), layers and ``key=value`` overrides. Raises ConfigError."""
    assignments = [*_from_file(path)] if path is not None else []
    for layer in layers:
        assignments += _from_layer(layer)
    assignments += [_from_argument(argument) for argument in overrides]
    merged = _merge(assignments)
    for assignment in assignments:
        _check_resolves(merged, assignment)
    try:
        config = _construct(merged, "")
    except BoundError as error:
        raise ConfigError(f"{_blame(error, assignments, path)}{error}") from None
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: RunConfig) -> str:
    """``config`` in full as YAML that `load_config` reads back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


# --- where assignments come from -----------------------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> Iterator[_Assignment]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; shipped are {_shipped()}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        content = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: {', '.join(filter(None, (error.context, error.problem)))}"
        ) from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{path}: character {error.position + 1} is {error.character!r}; {error.reason}"
        ) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a nesting of thousands
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
    except OSError:
        raise ConfigError(
            f"{path}: holds no mapping; write 'section:' and indented 'key: value' lines"
        ) from None
    if not isinstance(content, DictConfig):
        raise ConfigError(
            f"{path}: holds a list, not a mapping; write 'section:' and indented 'key: value' lines"
        )
    yield from _leaves(str(path), "", OmegaConf.to_container(content, resolve=False))


def _from_layer(layer: Layer) -> Iterator[_Assignment]:
    for assignment in _from_file(layer.path):
        if not assignment.key.startswith(layer.allowed):
            allowed = ", ".join(
                f"{prefix}*" if prefix.endswith((".", "_")) else prefix for prefix in layer.allowed
            )
            raise ConfigError(
                f"{layer.path}: {assignment.key} is not a setting of a {layer.kind}, which may set {allowed} only"
            )
        yield assignment


def _leaves(source: str, prefix: str, content: Any) -> Iterator[_Assignment]:
    """The leaves of a nested mapping; a mapping stops being a section where its key is a setting or unknown."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if _in_section(key) and (value is None or isinstance(value, dict)):
            yield from _leaves(source, f"{key}.", value or {})
        else:
            _check_key(source, key)
            _check_texts(source, key, value)
            yield _Assignment(source, key, value)


def _from_argument(argument: str) -> _Assignment:
    key, equals, text = argument.partition("=")
    source = f"argument {argument!r}"
    if not equals:
        guess = _similar(key)
        raise ConfigError(f"{source}: write key=value{f', e.g. {guess[0]}=...' if guess else ''}")
    if (
        mapping := _mapping_of(key)
    ) is not None:  # environment.options.days=3 is environment.options={days: 3}
        return _Assignment(
            source, mapping, _nested(key.removeprefix(f"{mapping}."), _value(text, mapping, argument))
        )
    _check_key(source, key)
    if settings()[key].kind is str and text[:1] not in ("'", '"'):
        return _Assignment(
            source, key, text
        )  # as typed: a path may hold anything that YAML reads as something else
    if settings()[key].kind == tuple[str, ...] and (listed := re.fullmatch(r"\[([^\[\]]*)\]", text)):
        return _Assignment(
            source, key, [item.strip().strip("'\"") for item in listed[1].split(",") if item.strip()]
        )  # as typed, see _check_texts
    return _Assignment(source, key, _value(text, key, argument))


def _value(text: str, key: str, argument: str) -> object:
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError):
        raise ConfigError(
            f"argument {argument[:200]!r}: {text[:100]!r} cannot be read; {key} must be {settings()[key].allowed}"
        ) from None
    assert isinstance(value, dict)
    return value["value"]


def _mapping_of(key: str) -> str | None:
    """The setting that is a mapping and has ``key`` inside it."""
    return next(
        (
            known
            for known, setting in settings().items()
            if isinstance(setting.default, dict) and key.startswith(f"{known}.")
        ),
        None,
    )


def _nested(key: str, value: object) -> dict[str, object]:
    *sections, name = key.split(".")
    nested = {name: value}
    for section in reversed(sections):
        nested = {section: nested}
    return nested


# --- checks --------------------------------------------------------------------------------------------------------------------------------------


def _check_texts(source: str, key: str, value: object) -> None:
    """YAML reads 10:4 as a number in base 60, so a text that looks like one must be quoted in a file."""
    if (
        settings()[key].kind == tuple[str, ...]
        and isinstance(value, list)
        and not all(isinstance(item, str) for item in value)
    ):
        number = next(item for item in value if not isinstance(item, str))
        raise ConfigError(
            f'{source}: {key} has {number}, which YAML read as no text: quote each item, e.g. ["10:4"]'
        )


def _in_section(key: str) -> bool:
    return any(known.startswith(f"{key}.") for known in settings())


def _check_key(source: str, key: str) -> None:
    if key in settings():
        return
    if _in_section(key):
        inside = [known for known in settings() if known.startswith(f"{key}.")]
        raise ConfigError(f"{source}: {key} is a section, not a setting; set one of {', '.join(inside)}")
    guesses = _similar(key)
    hint = f"did you mean {' or '.join(guesses)}?" if guesses else "run with --help for all settings"
    raise ConfigError(f"{source}: {shown(key)} is no setting; {hint}")


def _similar(key: str) -> list[str]:
    """Known keys like ``key``: by the whole dotted key, and by the last name alone where the section was left out or mistaken."""
    key = key.lstrip("-+").replace("-", "_")
    by_name = [known for known in settings() if known.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, settings(), n=1, cutoff=0.75)
    return list(dict.fromkeys([*close, *by_name]))[:3] or difflib.get_close_matches(
        key, settings(), n=1, cutoff=0.5
    )


def _merge(assignments: Sequence[_Assignment]) -> Any:
    schema = OmegaConf.structured(RunConfig)
    for assignment in assignments:
        if assignment.value == MISSING:  # merging it would keep the value below, silently
            raise _refused(assignment)
    try:
        return OmegaConf.merge(schema, *map(_overlay, assignments))
    except (OmegaConfBaseException, ValueError):
        # Which leaf was it? OmegaConf names none inside a list, so each is tried alone.
        for assignment in assignments:
            try:
                OmegaConf.merge(schema, _overlay(assignment))
            except (OmegaConfBaseException, ValueError):
                raise _refused(assignment) from None
        raise


def _overlay(assignment: _Assignment) -> DictConfig:
    overlay = OmegaConf.create(_nested(assignment.key, assignment.value))
    assert isinstance(overlay, DictConfig)
    return overlay


def _check_resolves(merged: Any, assignment: _Assignment) -> None:
    """References ``${...}`` resolve, and no item of a list is missing."""
    try:
        value = OmegaConf.select(merged, assignment.key)
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{assignment.source}: {assignment.key}={assignment.value}: {_one_line(error)}"
        ) from None


def _refused(assignment: _Assignment) -> ConfigError:
    allowed = settings()[assignment.key].allowed
    return ConfigError(
        f"{assignment.source}: {assignment.key}={shown(assignment.value)} is not allowed: it must be {allowed}"
    )


def _construct(node: Any, prefix: str) -> object:
    """The frozen dataclass of ``node``; its sections first, so that a bound's error can be given the section it happened in."""
    for name, child in node.items():
        if isinstance(child, DictConfig):
            _construct(child, f"{prefix}{name}.")
    try:
        return OmegaConf.to_object(node)
    except BoundError as error:
        raise BoundError(f"{prefix}{error.key}", error.value, error.bound) from None


def _blame(error: BoundError, assignments: Sequence[_Assignment], path: Path | None) -> str:
    """Who set the value out of bounds: its own assignment, else (a bound over two settings) the last one that the message names."""
    own = [assignment for assignment in assignments if assignment.key == error.key]
    named = [assignment for assignment in assignments if assignment.key in error.bound]
    for assignment in reversed(own or named):
        return f"{assignment.source}: "
    return f"{path}: " if path is not None else ""


# --- small things --------------------------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    # A value is final: "${" in it is text, not a reference to resolve again. OmegaConf's escape: \${, and \\ for a backslash before it.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _shipped() -> str:
    here = Path(__file__).parent
    return ", ".join(sorted(f"{here.name}/{file.name}" for file in here.glob("*.yaml")))


def _one_line(error: object) -> str:
    return " ".join(str(error).split("\n    full_key", 1)[0].split())


def flatten(config: object, prefix: str = "") -> dict[str, str]:
    """A nested dataclass as dotted keys: {"train.steps": "200", ...}."""
    flat: dict[str, str] = {}
    for field in fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, field.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = str(value)
    return flat
