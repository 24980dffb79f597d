"""The grid: which settings differ from cell to cell. Any write.* or fast_weights.* may, and what the writes train on: supervision=raw.

--cell write.optimizer=adam write.learning_rate=1e-3      one more column of settings that belong together (several --cell: one after the other)
--sweep write.epochs=5,10,20 fast_weights.basis=svd,random     every value with every other, for each --cell
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from cluster.probe.values import SUPERVISIONS, Cell, Supervision
from configs.load import ConfigError, load_config
from configs.schema import RunConfig

SECTIONS = ("write.", "fast_weights.", "supervision=")


def load_grid(
    path: Path, overrides: Sequence[str], cells: Sequence[Sequence[str]], sweeps: Sequence[str]
) -> tuple[RunConfig, tuple[Cell, ...]]:
    """The base configuration and the grid over it, every cell checked as a configuration of its own. Raises ConfigError."""
    base = load_config(path, overrides)
    for argument in (*itertools.chain.from_iterable(cells), *sweeps):
        if not argument.startswith(SECTIONS):
            raise ConfigError(
                f"argument {argument!r}: a probe's cells differ in write.*, fast_weights.* and supervision; set it for all of them before --sweep"
            )
    axes = [[f"{key}={value}" for value in values] for key, values in map(_axis, sweeps)]
    grid: dict[tuple[str, ...], Cell] = {}
    for own in cells or [()]:
        for chosen in itertools.product(*axes):
            settings = (*own, *chosen)
            config = load_config(
                path, [*overrides, *(one for one in settings if not one.startswith("supervision="))]
            )
            grid[settings] = Cell(settings, config.fast_weights, config.write, _supervision(settings))
    for one, other in itertools.combinations(grid.values(), 2):
        if (one.fast_weights, one.write, one.supervision) == (
            other.fast_weights,
            other.write,
            other.supervision,
        ):
            raise ConfigError(
                f"the cells '{one.label}' and '{other.label}' are the same settings, and would count twice: leave one out"
            )
    return base, tuple(grid.values())


def _supervision(settings: Sequence[str]) -> Supervision:
    named = [setting.partition("=")[2] for setting in settings if setting.startswith("supervision=")] or [
        "flashcards"
    ]
    for known in SUPERVISIONS:
        if named[-1] == known:
            return known
    raise ConfigError(f"argument 'supervision={named[-1]}': must be one of {', '.join(SUPERVISIONS)}")


def _axis(argument: str) -> tuple[str, list[str]]:
    key, equals, text = argument.partition("=")
    values = [value for value in _split(text) if value]
    if not equals or not values:
        raise ConfigError(f"argument {argument!r}: write --sweep key=value1,value2")
    return key, values


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket: "[a,b],[c]" are two values."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[{") - (char in "]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]
