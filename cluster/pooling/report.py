"""Pooled over seeds: what each stage scores, what training gained, and whether one kind of run gains more than another.

Intervals and p are of a paired bootstrap over tasks, those of all seeds together: they say what other tasks would do, not what other seeds would. The
gain of each seed stands beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cluster.bench.values import Table
from cluster.pooling.runs import Group
from cluster.run import ROW_ORDER
from cluster.statistics import PairedDifference, bootstrap_interval, holm, paired_difference
from cluster.tables import interval_text, markdown_table, plain_json

STAGES = ("runs", "stage", "tasks", "F1 % [95 % CI]", "EM % [95 % CI]", "failed")
GAINS = ("runs", "from", "to", "F1, points [95 % CI]", "p", "by seed")
VERSUS = ("gain of", "against that of", "since", "F1, points [95 % CI]", "p")
LAST = "after_rl"
STARTS = ("before", "after_warm_start", "memory_off")


@dataclass(frozen=True, slots=True)
class Gain:
    """What training added to a group since ``stage``; ``by_seed`` in the order of the group's runs."""

    name: str
    stage: str
    difference: PairedDifference
    by_seed: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Versus:
    """By how much the first group's gain exceeds the other's, on the tasks that both played."""

    name: str
    other: str
    stage: str
    difference: PairedDifference


@dataclass(frozen=True, slots=True)
class Pool:
    """``samples`` and ``seed`` are the bootstrap's. p-values are adjusted within each table (Holm)."""

    groups: tuple[Group, ...]
    samples: int
    seed: int

    def gains(self) -> list[Gain]:
        return [self._gain(group, stage) for group in self.groups for stage in STARTS if group.scores(stage, "f1")]

    def versus(self) -> list[Versus]:
        """The first group against each other, since the last stage before RL that both have."""
        first, *others = self.groups
        found = []
        for other in others:
            shared = [stage for stage in ("after_warm_start", "before") if first.scores(stage, "f1") and other.scores(stage, "f1")]
            if shared:
                found.append(self._versus(first, other, shared[0]))
        return found

    def tables(self) -> list[Table]:
        made = [Table("Held-out evaluation, all seeds", STAGES, tuple(self._stages()))]
        if gains := self.gains():
            adjusted = holm([gain.difference.p_value for gain in gains])
            lines = [
                (gain.name, gain.stage, LAST, _points(gain.difference), f"{p:.4f}", ", ".join(f"{100 * one:+.1f}" for one in gain.by_seed))
                for gain, p in zip(gains, adjusted, strict=True)
            ]
            made.append(Table("What training gained", GAINS, tuple(lines)))
        if versus := self.versus():
            adjusted = holm([one.difference.p_value for one in versus])
            told = [(one.name, one.other, one.stage, _points(one.difference), f"{p:.4f}") for one, p in zip(versus, adjusted, strict=True)]
            made.append(Table("Whether it gained more", VERSUS, tuple(told)))
        return made

    def _stages(self) -> Iterator[tuple[str, ...]]:
        for group in self.groups:
            name = f"{group.name} (seeds {', '.join(str(run.config.seed) for run in group.runs)})"
            for stage in ROW_ORDER:
                if scores := group.scores(stage, "f1"):
                    intervals = [bootstrap_interval(list(group.scores(stage, one).values()), self.samples, self.seed) for one in ("f1", "em")]
                    yield (name, stage, str(len(scores)), *map(interval_text, intervals), str(group.failed(stage)))

    def _gain(self, group: Group, stage: str) -> Gain:
        before, after = group.scores(stage, "f1"), group.scores(LAST, "f1")
        shared = [task for task in before if task in after]
        difference = paired_difference([before[task] for task in shared], [after[task] for task in shared], self.samples, self.seed)
        mine = [[after[task] - before[task] for task in shared if task[0] == run.config.seed] for run in group.runs]
        return Gain(group.name, stage, difference, tuple(float(np.mean(one)) if one else float("nan") for one in mine))

    def _versus(self, first: Group, other: Group, stage: str) -> Versus:
        sides = [(group.scores(stage, "f1"), group.scores(LAST, "f1")) for group in (other, first)]
        shared = [task for task in sides[0][0] if all(task in scores for side in sides for scores in side)]
        theirs, mine = ([after[task] - before[task] for task in shared] for before, after in sides)
        return Versus(first.name, other.name, stage, paired_difference(theirs, mine, self.samples, self.seed))


def save_pool(pool: Pool, folder: Path) -> list[Path]:
    """pool.md, pool.json and reward.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data, plot = folder / "pool.md", folder / "pool.json", folder / "reward.png"
    lines = ["# Runs, pooled over seeds", ""]
    for table in pool.tables():
        lines += [f"## {table.title}", "", *markdown_table(table.header, table.rows), ""]
    markdown.write_text("\n".join([*lines, *(f"- {run.folder}" for group in pool.groups for run in group.runs)]) + "\n", encoding="utf-8")
    found: dict[str, Sequence[Gain | Versus]] = {"gains": pool.gains(), "versus": pool.versus()}
    content = {key: [{**asdict(one), "difference": plain_json(asdict(one.difference))} for one in ones] for key, ones in found.items()}
    data.write_text(json.dumps(content, indent=1), encoding="utf-8")
    _save_plot(pool.groups, plot)
    return [markdown, data, plot]


def _save_plot(groups: Sequence[Group], path: Path) -> None:
    """Reward by step, running mean over ten: thin lines are seeds, the thick one is their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, group in enumerate(groups):
        curves = [_smooth(run.rewards) for run in group.runs]
        for curve in curves if len(curves) > 1 else []:
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{number % 10}", linewidth=0.6, alpha=0.5)
        mean = [float(np.mean(step)) for step in zip(*curves, strict=False)]
        axes.plot(range(1, len(mean) + 1), mean, color=f"C{number % 10}", linewidth=2, label=group.name)
    axes.set(xlabel="training step", ylabel="reward, mean of the last 10 steps")
    axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    figure.savefig(path)


def _smooth(rewards: Sequence[float]) -> list[float]:
    return [sum(rewards[max(0, step - 10) : step]) / min(step, 10) for step in range(1, len(rewards) + 1)]


def _points(difference: PairedDifference) -> str:
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]" if difference.count else "-"
