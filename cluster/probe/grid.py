"""The grid: which settings differ from cell to cell. They come from the command line or from a study file.

--cell write.optimizer=adam write.learning_rate=1e-3         one more cell: settings that belong together
--sweep write.epochs=5,10,20 fast_weights.basis=svd,random   every value with every other, for each --cell

Any write.* and fast_weights.* may differ, and what the writes train on: supervision=raw.

A study is one figure in one YAML file. The command line's own arguments win over it.

    cards: recall:12
    seeds: [0, 1, 2]
    writes: 1                                  # optional, as are each_step and sweep
    cells:
      - write.optimizer=sgd write.epochs=5     # settings that belong together
    sweep: [write.learning_rate=5e-4,2e-3]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, NonNegativeInt, PositiveInt
from pydantic_core import PydanticCustomError

from cluster.common.arguments import require_distinct
from cluster.probe.values import SUPERVISIONS, Cell, ProbeError, Supervision
from configs import yaml_scalars
from configs.files import FileError, parse_json
from configs.load import ConfigError, load_config
from configs.schema import RunConfig
from configs.shipped import shipped

SECTIONS = ("write.", "fast_weights.", "supervision=")


def load_grid(
    path: Path, overrides: Sequence[str], cells: Sequence[Sequence[str]], sweeps: Sequence[str]
) -> tuple[RunConfig, tuple[Cell, ...]]:
    """The base configuration, and a checked configuration for each cell of the grid. Raises ConfigError."""
    base = load_config(path, overrides)
    for argument in (*itertools.chain.from_iterable(cells), *sweeps):
        if not argument.startswith(SECTIONS):
            raise ConfigError(
                f"argument {argument!r}: a probe's cells differ in write.*, fast_weights.* and supervision; "
                "set it for all of them before --sweep"
            )
    require_distinct(sweeps)
    axes = [[f"{key}={value}" for value in values] for key, values in map(_axis, sweeps)]
    grid: dict[tuple[str, ...], Cell] = {}
    for together in cells or [()]:
        for values in itertools.product(*axes):
            settings = (*together, *values)
            own = [setting for setting in settings if not setting.startswith("supervision=")]
            config = load_config(path, [*overrides, *own])
            grid[settings] = Cell(settings, config.fast_weights, config.write, _supervision(settings))
    for left, right in itertools.combinations(grid.values(), 2):
        differ = left.fast_weights != right.fast_weights or left.write != right.write
        if not differ and left.supervision == right.supervision:
            raise ConfigError(
                f"the cells '{left.label}' and '{right.label}' are the same settings, and would count twice: "
                "leave one out"
            )
    return base, tuple(grid.values())


def _supervision(settings: Sequence[str]) -> Supervision:
    named = [setting.partition("=")[2] for setting in settings if setting.startswith("supervision=")]
    wanted = named[-1] if named else "flashcards"
    for supervision in SUPERVISIONS:
        if wanted == supervision:
            return supervision
    raise ConfigError(f"argument 'supervision={wanted}': must be one of {', '.join(SUPERVISIONS)}")


def _axis(argument: str) -> tuple[str, list[str]]:
    key, equals, text = argument.partition("=")
    values = [value for value in _split(text) if value]
    if not equals or not values:
        raise ConfigError(f"argument {argument!r}: write --sweep key=value1,value2")
    return key, values


def _split(text: str) -> list[str]:
    """Split at the commas outside of brackets: "[a,b],[c]" are two values."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


# --- study files ------------------------------------------------------------------------------------------


def _each_once(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """A repeated seed's cards would count twice and make intervals too narrow."""
    if len(set(seeds)) < len(seeds):
        raise PydanticCustomError("seeds", "Input should have each seed once")
    return seeds or (0,)


def _words(cell: object) -> tuple[str, ...]:
    if not isinstance(cell, str):
        raise PydanticCustomError("cell", "Input should be a text of key=value settings")
    return tuple(cell.split())


@dataclass(frozen=True, slots=True)
class Study:
    """The content of a study's file. "" and () leave a value to the command line."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    cards: str = ""
    seeds: Annotated[tuple[NonNegativeInt, ...], AfterValidator(_each_once)] = (0,)
    writes: PositiveInt = 1
    each_step: bool = False
    cells: tuple[Annotated[tuple[str, ...], BeforeValidator(_words)], ...] = ()
    sweep: tuple[str, ...] = ()
    # of all cells, in front of the command line's: what the study does not inherit from the configuration
    settings: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()


def load_study(name: str) -> Study:
    """Read a shipped study by name, or a file. Raises ProbeError: file, key, what is allowed."""
    path = shipped("studies").get(name, Path(name))
    try:
        data = yaml_scalars.values(yaml_scalars.parse(path.read_text(encoding="utf-8")))
        return parse_json(json.dumps(data, default=str), Study)
    except FileNotFoundError:
        names = ", ".join(shipped("studies"))
        raise ProbeError(f"--study {name}: no such file; shipped are {names}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"--study {name}: cannot be read ({error})") from None
    except FileError as error:
        keys = ", ".join(field.name for field in fields(Study))
        raise ProbeError(f"--study {name}: {error}; its keys are {keys}") from None
    # A number of thousands of digits is a ValueError, a nesting of thousands a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ProbeError(f"--study {name}: is not YAML that can be read ({reason})") from None
