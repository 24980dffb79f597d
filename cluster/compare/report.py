"""Training runs pooled over seeds: what each stage scores, what training gained, and which kind gained more.

Intervals (paired bootstrap) and p (sign-flip test) are over different questions, seeds pooled. They say what
other questions would do, not what other seeds would. A question that several seeds ask (an environment with a
fixed eval set) is one question, with the mean of its values. The gain of each seed stands beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.common.errors import CheckpointError
from cluster.compare.runs import Group
from cluster.measure.report import (
    Curve,
    Document,
    Panel,
    Section,
    Table,
    decoding,
    interval_text,
    running_mean,
    save_document,
    save_plot,
)
from cluster.measure.statistics import (
    PairedDifference,
    Played,
    adjusted_p_values,
    bootstrap_interval,
    item_means,
    paired_by_item,
)
from cluster.train.report import STAGES

STAGE_HEADER = ("runs", "stage", "tasks", "F1 % [95 % CI]", "EM % [95 % CI]", "failed")
GAIN_HEADER = ("runs", "from", "to", "questions", "F1, points [95 % CI]", "p", "by seed")
VERSUS_HEADER = ("gain of", "against that of", "since", "questions", "F1, points [95 % CI]", "p")
LEGEND = (
    "Intervals: bootstrap over different questions, seeds pooled; a question that several seeds ask counts "
    "once, with its mean. p: sign-flip test over the same, adjusted within its table (Holm)."
)
LAST = "after_rl"
STARTS = ("before", "after_warm_start", "memory_off")
LATEST_STARTS = ("after_warm_start", "before")  # where RL began


@dataclass(frozen=True, slots=True)
class Gain:
    """What training added to a group since ``stage``.

    ``by_seed`` is in the order of the group's runs, None where no task finished both stages.
    """

    name: str
    stage: str
    difference: PairedDifference
    by_seed: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class Versus:
    """By how much the first group's gain exceeds the other's, on the tasks that both played.

    ``not_paired`` counts tasks of one seed and id that ask something else in the other group, as recall's
    tasks do where environment.recall.* differs.
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
    gains: tuple[Gain, ...]
    versus: tuple[Versus, ...]
    samples: int
    seed: int

    def document(self, plots: Sequence[Path] = ()) -> Document:
        folders = {group.name: ", ".join(str(run.folder) for run in group.runs) for group in self.groups}
        section = Section("", tables=tuple(self.tables()), notes=tuple(self.notes()), plots=tuple(plots))
        return Document("Runs, pooled over seeds", folders, (section,))

    def tables(self) -> Iterator[Table]:
        temperatures = {group.runs[0].config.evaluation.temperature for group in self.groups}
        how = ", ".join(sorted(map(decoding, temperatures)))
        yield Table(f"Held-out evaluation, all seeds, {how}", STAGE_HEADER, tuple(self._stages()))
        if self.gains:
            cells = _cells([gain.difference for gain in self.gains])
            gains = [
                (gain.name, gain.stage, LAST, *figures, _by_seed(gain))
                for gain, figures in zip(self.gains, cells, strict=True)
            ]
            yield Table("What training gained", GAIN_HEADER, tuple(gains))
        if self.versus:
            cells = _cells([versus.difference for versus in self.versus])
            lines = [
                (versus.name, versus.other, versus.stage, *figures)
                for versus, figures in zip(self.versus, cells, strict=True)
            ]
            yield Table("Whether it gained more", VERSUS_HEADER, tuple(lines))

    def notes(self) -> Iterator[str]:
        """What the tables do not say of themselves, a line each."""
        yield LEGEND
        for group in self.groups:
            if len(set(group.models.values())) > 1:
                starts = ", ".join(f"seed {seed}: {model}" for seed, model in group.models.items())
                yield f"{group.name}: its runs start from different models ({starts})."
        for versus in self.versus:
            names = f"{versus.name} and {versus.other}"
            if versus.not_paired:
                tasks = f"{versus.not_paired} task(s) of the same seed and id ask different things"
                yield f"{names}: {tasks} and are not paired; compare runs of one environment."
            elif versus.difference.count == 0:
                yield f"{names} share no finished task: their gains cannot be compared."

    def _stages(self) -> Iterator[tuple[str, ...]]:
        for group in self.groups:
            name = f"{group.name} (seeds {', '.join(str(run.config.seed) for run in group.runs)})"
            for stage in STAGES:
                if group.has(stage):
                    by_score = [group.scores(stage, score) for score in ("f1", "em")]
                    intervals = [
                        bootstrap_interval(list(item_means(scores).values()), self.samples, self.seed)
                        for scores in by_score
                    ]
                    texts = map(interval_text, intervals)
                    yield (name, stage, _tasks(by_score[0]), *texts, str(group.failed(stage)))


def pool_groups(groups: tuple[Group, ...], samples: int, seed: int) -> Pool:
    """Compare each group's stages, and the first group with each other since the last stage before RL."""
    gains = [_gain(group, stage, samples, seed) for group in groups for stage in STARTS if group.has(stage)]
    first, *others = groups
    versus = []
    for other in others:
        shared = [stage for stage in LATEST_STARTS if first.has(stage) and other.has(stage)]
        if shared:
            versus.append(_versus(first, other, shared[0], samples, seed))
    return Pool(groups, tuple(gains), tuple(versus), samples, seed)


def _gain(group: Group, stage: str, samples: int, seed: int) -> Gain:
    gained = group.gained(stage, LAST, "f1")
    by_seed = [
        item_means({played: value for played, value in gained.items() if played[0] == run.config.seed})
        for run in group.runs
    ]
    return Gain(
        group.name,
        stage,
        paired_by_item(group.scores(stage, "f1"), group.scores(LAST, "f1"), samples, seed),
        tuple(float(np.mean(list(items.values()))) if items else None for items in by_seed),
    )


def _versus(first: Group, other: Group, stage: str, samples: int, seed: int) -> Versus:
    gained, against = (group.gained(stage, LAST, "f1") for group in (first, other))
    same_id = {played[:2] for played in gained} & {played[:2] for played in against}
    not_paired = len(same_id) - len(gained.keys() & against.keys())
    difference = paired_by_item(against, gained, samples, seed)
    return Versus(first.name, other.name, stage, difference, not_paired)


def open_output(folder: Path) -> None:
    """Make the folder and try to write in it, before the user sees any table. Raises CheckpointError."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def save_pool(pool: Pool, folder: Path) -> list[Path]:
    """Write pool.md, pool.json and reward.png; return their paths. Raises CheckpointError."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plot = _save_rewards(pool.groups, folder / "reward.png")
        document = pool.document([plot])
        data = {"gains": pool.gains, "versus": pool.versus, "notes": list(pool.notes())}
        return [*save_document(document, folder, data, name="pool"), plot]


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or error
        cure = "name another folder with --output"
        raise CheckpointError(f"{folder}: cannot be written ({reason}); {cure}") from None


def _save_rewards(groups: Sequence[Group], path: Path) -> Path:
    """Reward by step, running mean over ten: thin lines are seeds, the thick one is their mean."""
    curves = []
    for series, group in enumerate(groups):
        seeds = [running_mean(run.rewards) for run in group.runs]
        if len(seeds) > 1:
            curves += [Curve(range(1, len(rewards) + 1), rewards, series, style="thin") for rewards in seeds]
        mean = [float(np.mean(step)) for step in zip(*seeds, strict=False)]
        curves.append(Curve(range(1, len(mean) + 1), mean, series, group.name))
    panel = Panel("training step", "reward, mean of the last 10 steps", tuple(curves), steps=True)
    return save_plot([panel], path)


# --- cells of the tables ----------------------------------------------------------------------------------


def _tasks(scores: Mapping[Played, float]) -> str:
    items = len(item_means(scores))
    return f"{len(scores)} of {items} questions" if items != len(scores) else str(items)


def _cells(differences: Sequence[PairedDifference]) -> list[tuple[str, str, str]]:
    """Questions, points with interval, and adjusted p of each comparison of a table."""
    return [
        (str(d.count), interval_text(d, sign="+"), f"{p:.4f}" if d.count else "-")
        for d, p in zip(differences, adjusted_p_values(differences), strict=True)
    ]


def _by_seed(gain: Gain) -> str:
    return ", ".join("-" if value is None else f"{100 * value:+.1f}" for value in gain.by_seed)
