"""What an evaluation compares: rows x benchmarks x seeds, each combination a cell with its own configuration.

    base file  <-  benchmark file  <-  row file  <-  swept settings  <-  arguments    (later wins)

A row file sets the memory and how it writes. A benchmark file sets the tasks and the room that they need.
Both may be the user's own. The base decides the scale for every row: model, L_max, token limits, and T where
the row's source does not define it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.common.arguments import require_distinct
from configs.load import ConfigError, Layer, load_config
from configs.memory import CARD_WRITING, SUMMARIZING
from configs.reference import settings
from configs.schema import RunConfig
from configs.shipped import shipped

ROW_SETTINGS = ("memory.", "write.", "fast_weights.")
BENCHMARK_SETTINGS = (
    "environment.",
    "sampling.",
    "rollout.",
    "engine.",
    "evaluation.tasks",
    "evaluation.temperature",
    "memory.max_",
)
WRITING = ("raw", "summary_write", "implications", "parametric", "hybrid", "custom")
"""Memory policies whose fast weights may differ from 0."""

TASKS = ("environment.name", "environment.conversation.format")  # settings that make another benchmark
OWN = "config"  # the row with the configuration's own memory
BASELINE = "truncation"
L_MAX_KEY = "memory.max_context_tokens"
L_MAX = "L_max"  # the paper's name of this setting, for labels and plots
_LIST = re.compile(r",(?![^\[]*\])")  # commas outside brackets


@dataclass(frozen=True, slots=True)
class Request:
    """The arguments of ``evaluate``. ``rows`` and ``benchmarks``: names of shipped files, or user files."""

    config: Path
    overrides: tuple[str, ...]
    checkpoint: Path | None
    rows: tuple[str, ...]
    benchmarks: tuple[str, ...]
    seeds: tuple[int, ...]
    baseline: str
    sweep: tuple[str, ...]
    resume: str


@dataclass(frozen=True, slots=True)
class Variant:
    """A row, and the swept settings that distinguish it from the row's other variants."""

    row: str
    swept: tuple[tuple[str, str], ...]

    @property
    def label(self) -> str:
        names = {key: L_MAX if key == L_MAX_KEY else key.rpartition(".")[2] for key, _ in self.swept}
        return " ".join([self.row, *(f"{names[key]}={value}" for key, value in self.swept)])


@dataclass(frozen=True, slots=True)
class Cell:
    """One row on one benchmark with one seed: the unit that is run, saved and resumed."""

    benchmark: str
    variant: Variant
    config: RunConfig

    @property
    def key(self) -> str:
        """Unique in its plan (checked there); the name of its file."""
        return f"{slug(self.benchmark)}--{slug(self.variant.label)}--seed{self.config.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All cells, by benchmark, then row, then seed. ``base``: the configuration without benchmark and row."""

    base: RunConfig
    cells: tuple[Cell, ...]
    baselines: tuple[tuple[str, str], ...]  # (label, label of its baseline)

    @property
    def benchmarks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.benchmark for cell in self.cells))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.variant.label for cell in self.cells))


@dataclass(frozen=True, slots=True)
class _Part:
    """A row or a benchmark: a file laid over the base, or arguments in its place."""

    name: str
    layers: tuple[Layer, ...]
    arguments: tuple[str, ...]


def plan_cells(request: Request) -> Plan:
    """Read the files and build every cell. Raises ConfigError, one line, for a mistake in the request."""
    _check_overrides(request)
    first = _benchmarks(request)[0]
    base = load_config(request.config, request.overrides, first.layers)
    require_distinct(request.sweep)
    sweep = [_swept(argument, request) for argument in request.sweep]
    rows = _rows(request, base)
    cells: list[Cell] = []
    for benchmark in _benchmarks(request):
        for row in rows:
            for variant in _variants(row, benchmark, request, sweep):
                config = _load(request, benchmark, row, variant.swept)
                name, seeds = benchmark.name or config.environment.label, request.seeds or (base.seed,)
                cells += [Cell(name, variant, replace(config, seed=seed)) for seed in seeds]
    _check_unique([cell.key for cell in cells])
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    return Plan(base, tuple(cells), tuple(_baselines(variants, _baseline(request, base))))


def slug(text: str) -> str:
    """``text`` in characters that a file's name and an MLflow metric allow."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")


# --- rows, benchmarks, sweeps -----------------------------------------------------------------------------


def _rows(request: Request, base: RunConfig) -> list[_Part]:
    if request.rows:
        return [_row(name, base) for name in request.rows]
    own = _row(OWN, base)
    if base.memory.policy == BASELINE or not base.evaluation.memory_off_row:
        return [own]
    return [_Part(BASELINE, (), (f"memory.policy={BASELINE}",)), own]


def _row(name: str, base: RunConfig) -> _Part:
    return _Part(base.memory.policy, (), ()) if name == OWN else _part(name, "rows", "row", ROW_SETTINGS)


def _benchmarks(request: Request) -> list[_Part]:
    """The named ones, or the base's own environment under its name."""
    named = [_part(name, "benchmarks", "benchmark", BENCHMARK_SETTINGS) for name in request.benchmarks]
    return named or [_Part("", (), ())]


def _part(name: str, folder: str, kind: str, allowed: tuple[str, ...]) -> _Part:
    files = shipped(folder)
    if name in files:
        return _Part(name, (Layer(files[name], kind, allowed),), ())
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        own = f", {OWN} (the configuration's own memory)" if kind == "row" else ""
        there = f"shipped are {', '.join(files)}{own}"
        raise ConfigError(f"--{folder} {name}: no such {kind}; {there}; or give a YAML file")
    return _Part(path.stem, (Layer(path, kind, allowed),), ())


def _variants(
    row: _Part, benchmark: _Part, request: Request, sweep: Sequence[tuple[str, list[str]]]
) -> list[Variant]:
    """One for each combination of the swept settings that this row's memory uses.

    A setting that it ignores would run the same cell again under another name.
    """
    if not sweep:
        return [Variant(row.name, ())]
    policy = _load(request, benchmark, row, ()).memory.policy
    axes = [[(key, value) for value in values] for key, values in sweep if _matters(key, policy)]
    return [Variant(row.name, combination) for combination in itertools.product(*axes)]


def _matters(key: str, policy: str) -> bool:
    if policy == "custom":  # it gets every setting, and only its author knows which it uses
        return True
    if key.startswith(("write.", "fast_weights.")):
        return policy in WRITING
    if key == L_MAX_KEY:
        return policy != "full"
    if key == "memory.max_summary_tokens":
        return policy in SUMMARIZING
    if key == "memory.control":
        return policy in CARD_WRITING
    sections = {"memory.paging.": "paging", "memory.notes.": "notes"}
    return all(policy == owner for prefix, owner in sections.items() if key.startswith(prefix))


def _swept(argument: str, request: Request) -> tuple[str, list[str]]:
    key, equals, text = argument.partition("=")
    values = [value.strip() for value in _LIST.split(text)]
    if not equals or not all(values):
        raise ConfigError(f"--sweep {argument}: write key=value,value, e.g. fast_weights.basis=svd,random")
    if not key.startswith(ROW_SETTINGS) or key == "memory.policy":
        allowed = "memory.* (without memory.policy), write.* and fast_weights.*"
        raise ConfigError(f"--sweep {argument}: {key} cannot be swept; you can sweep {allowed}")
    if key not in settings():
        load_config(request.config, [argument])  # its message guesses the right name
    if any(override.startswith(f"{key}=") for override in request.overrides):
        raise ConfigError(f"--sweep {argument}: {key} is also given as an argument; leave one out")
    return key, values


def _load(request: Request, benchmark: _Part, row: _Part, swept: Sequence[tuple[str, str]]) -> RunConfig:
    arguments = [*(f"{key}={value}" for key, value in swept), *request.overrides, *row.arguments]
    return load_config(request.config, arguments, [*benchmark.layers, *row.layers])


# --- checks and baselines ---------------------------------------------------------------------------------


def _check_overrides(request: Request) -> None:
    for override in request.overrides:
        key = override.partition("=")[0]
        problem = ""
        if key == "memory.policy" and request.rows:
            problem = "with --rows it would turn every row into the same memory"
        elif key in TASKS and request.benchmarks:
            problem = "with --benchmarks it would turn every benchmark into the same tasks"
        elif key == "seed" and request.seeds:
            problem = "--seeds is given too"
        if problem:
            raise ConfigError(f"argument {override!r}: {problem}; leave one of the two out")


def _check_unique(keys: Sequence[str]) -> None:
    """Refuse keys that differ only by case or punctuation.

    A worker's names keep letters and digits alone, and a file system may ignore case.
    """
    plain = [re.sub("[^a-z0-9]+", "-", key.lower()) for key in keys]
    twice = next((key for key, name in zip(keys, plain, strict=True) if plain.count(name) > 1), None)
    if twice is not None:
        row = twice.split("--")[1]
        options = "--rows, --benchmarks, --seeds or --sweep"
        raise ConfigError(f"{options} name {row!r} twice (cell {twice}); each needs its own name")


def _baseline(request: Request, base: RunConfig) -> str:
    """The wanted baseline's name in the tables: a row ``config`` has that of its memory."""
    named = request.baseline == OWN and (OWN in request.rows or not request.rows)
    return base.memory.policy if named else request.baseline


def _baselines(variants: Sequence[Variant], wanted: str) -> list[tuple[str, str]]:
    """Each variant's label with its baseline's.

    It is the variant with exactly the wanted label, or the baseline row's variant of the same settings.
    """
    name = wanted or BASELINE
    exact = next((variant for variant in variants if variant.label == name), None)
    candidates = [exact] if exact is not None else [variant for variant in variants if variant.row == name]
    if wanted and not candidates:
        there = ", ".join(variant.label for variant in variants)
        raise ConfigError(f"--baseline {wanted}: no such row here; there are {there}")
    pairs = []
    for variant in variants:
        fits = [
            other
            for other in candidates
            if other is exact or (other.row != variant.row and set(other.swept) <= set(variant.swept))
        ]
        pairs += [(variant.label, other.label) for other in fits if other != variant]
    return pairs
