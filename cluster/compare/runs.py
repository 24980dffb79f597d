"""Training runs read back and grouped: runs of one name are one group, told apart by their seeds.

runs/tmem-.../        name=tmem seed=0 --+
runs/tmem-.../        name=tmem seed=1 --+--> Group("tmem")        rows: before, after_warm_start, after_rl, by (seed, task, item)
runs/memory-off-.../  name=memory-off seed=0 --> Group("memory-off")
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.common.errors import CheckpointError
from cluster.measure.rows import RowResult, load_row
from cluster.measure.statistics import Played
from cluster.train.scoreboard import ROW_ORDER
from configs.load import flatten, load_config
from configs.schema import RunConfig

FREE = ("seed", "model.name", "output_dir", "resume", "tracking.", "ray.", "episodes.")
"""Settings that may differ inside a group: what is varied (a seed may start from a policy of its own), and what changes no result."""

MAY_DIFFER = "seed, model.name (the policy that a seed starts from) and what changes no result: output_dir, resume, tracking.*, ray.*, episodes.*"
"""FREE in words."""


@dataclass(frozen=True, slots=True)
class Run:
    """One finished training run. rows: by stage. rewards: mean reward of each step."""

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
        """Every run has got that stage, if only with failed episodes."""
        return all(stage in run.rows for run in self.runs)

    def scores(self, stage: str, score: str) -> dict[Played, float]:
        """Of every finished task of all seeds. Raises KeyError where a run has not got that stage."""
        found = {
            (run.config.seed, one.task_id, one.item): one.mean(score)
            for run in self.runs
            for one in run.rows[stage].episodes
        }
        return {played: value for played, value in found.items() if math.isfinite(value)}

    def gained(self, since: str, until: str, score: str) -> dict[Played, float]:
        """The difference of each task that both stages finished."""
        before, after = self.scores(since, score), self.scores(until, score)
        return {played: after[played] - before[played] for played in after if played in before}

    @property
    def models(self) -> dict[int, str]:
        """By seed: what each run started from."""
        return {run.config.seed: run.config.model.name for run in self.runs}

    def failed(self, stage: str) -> int:
        return sum(len(run.rows[stage].failed) for run in self.runs if stage in run.rows)


def load_groups(folders: Sequence[Path]) -> tuple[Group, ...]:
    """In the order of the folders. Raises CheckpointError: a folder without a finished run, two runs of one seed, or settings that differ."""
    runs: dict[str, list[Run]] = {}
    for folder in folders:
        run = _load(folder)
        runs.setdefault(run.config.name, []).append(run)
    groups = [
        Group(name, tuple(sorted(mine, key=lambda run: run.config.seed))) for name, mine in runs.items()
    ]
    for group in groups:
        _check(group)
    return tuple(groups)


def _load(folder: Path) -> Run:
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder}: holds no config.yaml; give the folders of training runs, e.g. runs/quickstart-20260101-120000"
        )
    config = load_config(folder / "config.yaml", [])
    rows = {
        stage: load_row(path)
        for stage in ROW_ORDER
        if (path := folder / "evaluation" / f"{stage}.json").is_file()
    }
    if "after_rl" not in rows:
        raise CheckpointError(
            f"{folder}: its run has not finished (no evaluation/after_rl.json); go on with resume={folder}"
        )
    report = folder / "report" / "report.json"
    try:
        rewards = tuple(float(reward) for reward in json.loads(report.read_text(encoding="utf-8"))["rewards"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{report}: cannot be read ({type(error).__name__}: {error}); go on with resume={folder}"
        ) from None
    return Run(folder, config, rows, rewards)


def _check(group: Group) -> None:
    first, *others = group.runs
    for run in others:
        if (
            run.config.seed == first.config.seed
            or sum(other.config.seed == run.config.seed for other in others) > 1
        ):
            raise CheckpointError(
                f"{run.folder}: is a second run of name={group.name} seed={run.config.seed}; leave one out, or name it otherwise"
            )
        mine, theirs = flatten(run.config), flatten(first.config)
        changed = [key for key in mine if mine[key] != theirs.get(key) and not key.startswith(FREE)]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"{run.folder}: has {key}={mine[key]}, {first.folder} has {theirs.get(key)}: give each kind of run a name= of its own; "
                f"runs of one name may differ in nothing but {MAY_DIFFER}"
            )
