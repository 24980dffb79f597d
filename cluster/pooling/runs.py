"""Training runs read back and grouped: runs of one name are one group, told apart by their seeds.

runs/tmem-.../        name=tmem seed=0 --+
runs/tmem-.../        name=tmem seed=1 --+--> Group("tmem")        rows: before, after_warm_start, after_rl, by (seed, task)
runs/memory-off-.../  name=memory-off seed=0 --> Group("memory-off")
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.evaluate import RowResult, load_row
from cluster.run import ROW_ORDER
from cluster.tracking import flatten
from configs.load import load_config
from configs.schema import RunConfig

FREE = ("seed", "output_dir", "resume", "model.name", "tracking.", "ray.", "episodes.")
"""Settings that may differ inside a group: they change no result, or are what is varied (a seed may start from a policy of its own)."""

Task = tuple[int, str]
"""A seed and the task's id: two seeds may have the same task."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished training run. rows: by stage. rewards: mean reward of each step."""

    folder: Path
    config: RunConfig
    rows: Mapping[str, RowResult]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed only, by seed."""

    name: str
    runs: tuple[Run, ...]

    def scores(self, stage: str, score: str) -> dict[Task, float]:
        """Of every finished task of all seeds; empty where a run has not got that stage."""
        if any(stage not in run.rows for run in self.runs):
            return {}
        found = {(run.config.seed, one.task_id): one.mean(score) for run in self.runs for one in run.rows[stage].episodes}
        return {task: value for task, value in found.items() if math.isfinite(value)}

    def failed(self, stage: str) -> int:
        return sum(len(run.rows[stage].failed) for run in self.runs if stage in run.rows)


def load_groups(folders: Sequence[Path]) -> tuple[Group, ...]:
    """In the order of the folders. Raises CheckpointError: a folder without a finished run, two runs of one seed, or settings that differ."""
    runs: dict[str, list[Run]] = {}
    for folder in folders:
        run = _load(folder)
        runs.setdefault(run.config.name, []).append(run)
    groups = [Group(name, tuple(sorted(mine, key=lambda run: run.config.seed))) for name, mine in runs.items()]
    for group in groups:
        _check(group)
    return tuple(groups)


def _load(folder: Path) -> Run:
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"{folder}: holds no config.yaml; give the folders of training runs, e.g. runs/quickstart-20260101-120000")
    config = load_config(folder / "config.yaml", [])
    rows = {stage: load_row(path) for stage in ROW_ORDER if (path := folder / "evaluation" / f"{stage}.json").is_file()}
    if "after_rl" not in rows:
        raise CheckpointError(f"{folder}: its run has not finished (no evaluation/after_rl.json); go on with resume={folder}")
    report = folder / "report" / "report.json"
    try:
        rewards = tuple(float(reward) for reward in json.loads(report.read_text(encoding="utf-8"))["rewards"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{report}: cannot be read ({type(error).__name__}: {error}); go on with resume={folder}") from None
    return Run(folder, config, rows, rewards)


def _check(group: Group) -> None:
    first, *others = group.runs
    for run in others:
        if run.config.seed == first.config.seed or sum(other.config.seed == run.config.seed for other in others) > 1:
            raise CheckpointError(f"{run.folder}: is a second run of name={group.name} seed={run.config.seed}; leave one out, or name it otherwise")
        mine, theirs = flatten(run.config), flatten(first.config)
        changed = [key for key in mine if mine[key] != theirs.get(key) and not key.startswith(FREE)]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"{run.folder}: has {key}={mine[key]}, {first.folder} has {theirs.get(key)}: runs of one name may differ in their seed only; "
                "give each kind of run a name= of its own"
            )
