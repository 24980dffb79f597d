"""Read training runs back and group them. Runs of one name are one group; their seeds differ.

runs/tmem-.../        name=tmem seed=0 --+
runs/tmem-.../        name=tmem seed=1 --+--> Group("tmem")    rows by stage: before, ..., after_rl
runs/memory-off-.../  name=memory-off seed=0 --> Group("memory-off")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from cluster.common.errors import CheckpointError
from cluster.measure.rows import RowResult, load_row
from cluster.measure.statistics import Played
from cluster.train.report import STAGES
from configs.files import FileError, read_json
from configs.load import flatten, load_config
from configs.schema import RunConfig

FREE = (
    "seed",
    "model.name",
    "model.date",
    "output_dir",
    "resume",
    "tracking.",
    "store.",
    "ray.",
    "episodes.",
)
"""Settings that may differ inside a group: the varied ones, and those that change no result."""

MAY_DIFFER = (
    "seed, model.name (the policy that a seed starts from), model.date (the day on which a run began) "
    "and what changes no result: output_dir, resume, tracking.*, store.*, ray.*, episodes.*"
)
"""FREE in words."""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished training run. ``rows``: by stage. ``rewards``: the mean reward of each step."""

    folder: Path
    config: RunConfig
    rows: Mapping[str, RowResult]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in nothing but FREE, by seed."""

    name: str
    runs: tuple[Run, ...]

    def has(self, stage: str) -> bool:
        """True when every run measured that stage, if only with failed episodes."""
        return all(stage in run.rows for run in self.runs)

    def scores(self, stage: str, score: str) -> dict[Played, float]:
        """The score of every finished task of all seeds. Raises KeyError where a run has no such stage."""
        means = {
            (run.config.seed, episode.task_id, episode.item): episode.mean(score)
            for run in self.runs
            for episode in run.rows[stage].episodes
        }
        return {played: value for played, value in means.items() if math.isfinite(value)}

    def gained(self, since: str, until: str, score: str) -> dict[Played, float]:
        """The difference of every task that both stages finished."""
        before, after = self.scores(since, score), self.scores(until, score)
        return {played: after[played] - before[played] for played in after if played in before}

    @property
    def models(self) -> dict[int, str]:
        """The model that each run started from, by seed."""
        return {run.config.seed: run.config.model.name for run in self.runs}

    def failed(self, stage: str) -> int:
        return sum(len(run.rows[stage].failed) for run in self.runs if stage in run.rows)


@dataclass(frozen=True, slots=True)
class _Report:
    """The part of report.json that ``compare`` reads."""

    rewards: tuple[float, ...]


def load_groups(folders: Sequence[Path]) -> tuple[Group, ...]:
    """Read the runs and group them, in the order of the folders.

    Raises CheckpointError: a folder without a finished run, two runs of one seed, or settings that differ.
    """
    by_name: dict[str, list[Run]] = {}
    for folder in folders:
        run = _load(folder)
        by_name.setdefault(run.config.name, []).append(run)
    groups = [
        Group(name, tuple(sorted(runs, key=lambda run: run.config.seed))) for name, runs in by_name.items()
    ]
    for group in groups:
        _check(group)
    return tuple(groups)


def _load(folder: Path) -> Run:
    if not (folder / "config.yaml").is_file():
        cure = "give the folders of training runs, e.g. runs/quickstart-20260101-120000"
        raise CheckpointError(f"{folder}: holds no config.yaml; {cure}")
    config = load_config(folder / "config.yaml", [])
    rows = {
        stage: load_row(path)
        for stage in STAGES
        if (path := folder / "evaluation" / f"{stage}.json").is_file()
    }
    if "after_rl" not in rows:
        missing = "its run has not finished (no evaluation/after_rl.json)"
        raise CheckpointError(f"{folder}: {missing}; go on with resume={folder}")
    try:
        report = read_json(folder / "report" / "report.json", _Report)
    except FileNotFoundError:
        missing = "its run has not finished (no report/report.json)"
        raise CheckpointError(f"{folder}: {missing}; go on with resume={folder}") from None
    except FileError as error:
        raise CheckpointError(f"{error}; go on with resume={folder}") from None
    return Run(folder, config, rows, report.rewards)


def _check(group: Group) -> None:
    """Raises CheckpointError. The runs are in the order of their seeds."""
    first = group.runs[0]
    expected = flatten(first.config)
    for before, run in pairwise(group.runs):
        if run.config.seed == before.config.seed:
            second = f"is a second run of name={group.name} seed={run.config.seed}"
            raise CheckpointError(f"{run.folder}: {second}; leave one out, or name it otherwise")
        settings = flatten(run.config)
        changed = [key for key in settings if settings[key] != expected.get(key) and not key.startswith(FREE)]
        if changed:
            key = changed[0]
            differs = f"has {key}={settings[key]}, {first.folder} has {expected.get(key)}"
            cure = "give each kind of run its own name="
            raise CheckpointError(
                f"{run.folder}: {differs}: {cure}; runs of one name may differ in nothing but {MAY_DIFFER}"
            )
