"""A study: cards, seeds, writes and grid of a probe in one YAML file, so that a figure is one command. The command line's own arguments win.

cards: recall:12
seeds: [0, 1, 2]
writes: 1                                  # optional, as are each_step and sweep
cells:
  - write.optimizer=sgd write.epochs=5     # settings that belong together
sweep: [write.learning_rate=5e-4,2e-3]
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from cluster.probe.values import ProbeError
from configs.shipped import shipped


@dataclass(frozen=True, slots=True)
class Study:
    """What a study's file says; "" and () are what it leaves to the command line."""

    cards: str = ""
    seeds: tuple[int, ...] = (0,)
    writes: int = 1
    each_step: bool = False
    cells: tuple[tuple[str, ...], ...] = ()
    sweep: tuple[str, ...] = ()


def load_study(name: str) -> Study:
    """A shipped study by name, or a file. Raises ProbeError: file, key, what is allowed."""
    path = shipped("studies").get(name, Path(name))
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProbeError(
            f"--study {name}: no such file; shipped are {', '.join(shipped('studies'))}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(f"--study {name}: cannot be read ({error})") from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # the last two: 2024-13-01 is taken for a date; a nesting of thousands
        raise ProbeError(
            f"--study {name}: is not YAML that can be read ({' '.join(str(error).split())[:200]})"
        ) from None
    known = [field.name for field in fields(Study)]
    if not isinstance(data, dict) or set(data) - set(known):
        wrong = sorted(map(str, set(data) - set(known))) if isinstance(data, dict) else type(data).__name__
        raise ProbeError(f"--study {name}: {wrong} is not allowed; its keys are {', '.join(known)}")
    return Study(
        cards=_of(name, data, "cards", str, ""),
        seeds=tuple(_each(name, data, "seeds", int) or (0,)),
        writes=_of(name, data, "writes", int, 1),
        each_step=_of(name, data, "each_step", bool, False),
        cells=tuple(tuple(cell.split()) for cell in _each(name, data, "cells", str)),
        sweep=tuple(_each(name, data, "sweep", str)),
    )


def _of(name: str, data: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = data.get(key, default)
    small = kind is int and isinstance(value, int) and value < 1
    if not isinstance(value, kind) or small or (kind is int and isinstance(value, bool)):
        raise ProbeError(
            f"--study {name}: {key}={value!r} is not allowed; it must be a {kind.__name__}{' of 1 or more' if kind is int else ''}"
        )
    return value


def _each(name: str, data: dict[str, Any], key: str, kind: type) -> list[Any]:
    """Numbers are seeds: the cards of one that is there twice would count twice, and its interval be narrower than it is."""
    values = data.get(key, [])
    right = isinstance(values, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )
    if not right or (kind is int and (len(set(values)) < len(values) or min(values, default=0) < 0)):
        allowed = "int of 0 or more, each once" if kind is int else kind.__name__
        raise ProbeError(f"--study {name}: {key}={values!r} is not allowed; it must be a list of {allowed}")
    return values
