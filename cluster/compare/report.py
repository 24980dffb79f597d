"""Pooled over seeds: what each stage scores, what training gained, and whether one kind of run gains more than another.

Intervals (paired bootstrap) and p (sign-flip test) are over different questions, seeds pooled: they say what other questions would do, not what
other seeds would. A question that several seeds ask (an environment with a fixed eval set) is one question, with the mean of its values. The gain of
each seed stands beside them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cluster.common.errors import CheckpointError
from cluster.compare.runs import Group
from cluster.measure.report import Table, decoding, interval_text, markdown_table, plain_json
from cluster.measure.statistics import (
    PairedDifference,
    Played,
    adjusted_p_values,
    bootstrap_interval,
    item_means,
    paired_by_item,
)
from cluster.train.scoreboard import ROW_ORDER

STAGES = ("runs", "stage", "tasks", "F1 % [95 % CI]", "EM % [95 % CI]", "failed")
GAINS = ("runs", "from", "to", "questions", "F1, points [95 % CI]", "p", "by seed")
VERSUS = ("gain of", "against that of", "since", "questions", "F1, points [95 % CI]", "p")
LEGEND = (
    "Intervals: bootstrap over different questions, seeds pooled; a question that several seeds ask counts once, with its mean. "
    "p: sign-flip test over the same, adjusted within its table (Holm)."
)
LAST = "after_rl"
STARTS = ("before", "after_warm_start", "memory_off")


@dataclass(frozen=True, slots=True)
class Gain:
    """What training added to a group since ``stage``; ``by_seed`` in the order of the group's runs, None where no task finished both stages."""

    name: str
    stage: str
    difference: PairedDifference
    by_seed: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Versus:
    """By how much the first group's gain exceeds the other's, on the tasks that both played.

    ``not_paired`` counts tasks of one seed and id that ask something else in the other group, as recall's do where environment.recall.* differs.
    """

    name: str
    other: str
    stage: str
    difference: PairedDifference
    not_paired: int


@dataclass(frozen=True, slots=True)
class Pool:
    """``samples`` and ``seed`` are the bootstrap's. p-values are adjusted within each table (Holm)."""

    groups: tuple[Group, ...]
    samples: int
    seed: int

    def gains(self) -> list[Gain]:
        return [self._gain(group, stage) for group in self.groups for stage in STARTS if group.has(stage)]

    def versus(self) -> list[Versus]:
        """The first group against each other, since the last stage before RL that both have."""
        first, *others = self.groups
        found = []
        for other in others:
            shared = [
                stage for stage in ("after_warm_start", "before") if first.has(stage) and other.has(stage)
            ]
            if shared:
                found.append(self._versus(first, other, shared[0]))
        return found

    def tables(self) -> list[Table]:
        how = ", ".join(
            sorted({decoding(group.runs[0].config.evaluation.temperature) for group in self.groups})
        )
        made = [Table(f"Held-out evaluation, all seeds, {how}", STAGES, tuple(self._stages()))]
        if gains := self.gains():
            cells = _cells([gain.difference for gain in gains])
            lines = [
                (gain.name, gain.stage, LAST, *figures, _by_seed(gain))
                for gain, figures in zip(gains, cells, strict=True)
            ]
            made.append(Table("What training gained", GAINS, tuple(lines)))
        if versus := self.versus():
            cells = _cells([one.difference for one in versus])
            told = [
                (one.name, one.other, one.stage, *figures) for one, figures in zip(versus, cells, strict=True)
            ]
            made.append(Table("Whether it gained more", VERSUS, tuple(told)))
        return made

    def notes(self) -> list[str]:
        """What the tables do not say of themselves, a line each."""
        found = [LEGEND]
        for group in self.groups:
            if len(set(group.models.values())) > 1:
                started = ", ".join(f"seed {seed}: {model}" for seed, model in group.models.items())
                found.append(f"{group.name}: its runs start from different models ({started}).")
        for one in self.versus():
            if one.not_paired:
                found.append(
                    f"{one.name} and {one.other}: {one.not_paired} task(s) of the same seed and id ask different things and are not paired; "
                    "compare runs of one environment."
                )
            elif one.difference.count == 0:
                found.append(
                    f"{one.name} and {one.other} share no finished task: their gains cannot be compared."
                )
        return found

    def _stages(self) -> Iterator[tuple[str, ...]]:
        for group in self.groups:
            name = f"{group.name} (seeds {', '.join(str(run.config.seed) for run in group.runs)})"
            for stage in ROW_ORDER:
                if group.has(stage):
                    scores = [group.scores(stage, one) for one in ("f1", "em")]
                    intervals = [
                        bootstrap_interval(list(item_means(one).values()), self.samples, self.seed)
                        for one in scores
                    ]
                    yield (
                        name,
                        stage,
                        _tasks(scores[0]),
                        *map(interval_text, intervals),
                        str(group.failed(stage)),
                    )

    def _gain(self, group: Group, stage: str) -> Gain:
        difference = paired_by_item(
            group.scores(stage, "f1"), group.scores(LAST, "f1"), self.samples, self.seed
        )
        gained = group.gained(stage, LAST, "f1")
        by_seed = [
            item_means({played: value for played, value in gained.items() if played[0] == run.config.seed})
            for run in group.runs
        ]
        return Gain(
            group.name,
            stage,
            difference,
            tuple(float(np.mean(list(one.values()))) if one else None for one in by_seed),
        )

    def _versus(self, first: Group, other: Group, stage: str) -> Versus:
        theirs, mine = (group.gained(stage, LAST, "f1") for group in (other, first))
        same_id = {played[:2] for played in mine} & {played[:2] for played in theirs}
        not_paired = len(same_id) - len(mine.keys() & theirs.keys())
        return Versus(
            first.name, other.name, stage, paired_by_item(theirs, mine, self.samples, self.seed), not_paired
        )


def open_output(folder: Path) -> None:
    """Make the folder and try to write in it: where that fails, a person wants to know before the tables. Raises CheckpointError."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def save_pool(pool: Pool, folder: Path) -> list[Path]:
    """pool.md, pool.json and reward.png; returns their paths. Raises CheckpointError."""
    markdown, data, plot = folder / "pool.md", folder / "pool.json", folder / "reward.png"
    lines = ["# Runs, pooled over seeds", ""]
    for table in pool.tables():
        lines += [f"## {table.title}", "", *markdown_table(table.header, table.rows), ""]
    lines += [
        *(f"- {note}" for note in pool.notes()),
        "",
        "## Runs",
        "",
        *(f"- {run.folder}" for group in pool.groups for run in group.runs),
    ]
    found: dict[str, Sequence[Gain | Versus]] = {"gains": pool.gains(), "versus": pool.versus()}
    content = {
        key: [{**asdict(one), "difference": plain_json(asdict(one.difference))} for one in ones]
        for key, ones in found.items()
    }
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
        data.write_text(
            json.dumps({**content, "notes": pool.notes()}, indent=1, allow_nan=False), encoding="utf-8"
        )
        _save_plot(pool.groups, plot)
    return [markdown, data, plot]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise CheckpointError(
            f"{folder}: cannot be written ({reason}); name another folder with --output"
        ) from None


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


def _tasks(scores: Mapping[Played, float]) -> str:
    items = len(item_means(scores))
    return f"{len(scores)} of {items} questions" if items != len(scores) else str(items)


def _cells(differences: Sequence[PairedDifference]) -> list[tuple[str, str, str]]:
    """Questions, points with interval, adjusted p, of each comparison of a table."""
    return [
        (str(d.count), f"{100 * d.mean:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]", f"{p:.4f}")
        if d.count
        else ("0", "-", "-")
        for d, p in zip(differences, adjusted_p_values(differences), strict=True)
    ]


def _by_seed(gain: Gain) -> str:
    return ", ".join("-" if one is None else f"{100 * one:+.1f}" for one in gain.by_seed)
