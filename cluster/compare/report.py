"""Training runs pooled over seeds: what each stage scores, what training gained, and which kind gained more.

The run is the unit of a claim about training: interval and p of a gain are over seeds. Beside them stand the
gain of each seed, and an interval over questions, which says what other questions would do to these same
runs. A question that several seeds ask (an environment with a fixed eval set) is one question, with the mean
of its values.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.common.display import Display
from cluster.common.errors import CheckpointError
from cluster.compare.runs import Group
from cluster.measure.report import (
    Curve,
    Document,
    Panel,
    Section,
    Table,
    decoding,
    p_text,
    running_mean,
    save_document,
    save_plot,
    show,
)
from cluster.measure.rows import EpisodeScore, has_own_reward, primary_score
from cluster.measure.scores import F1, REWARD, label, score_text, unit
from cluster.measure.statistics import (
    FEWEST_SEEDS,
    MOST_SEEDS,
    POWER,
    PairedDifference,
    Played,
    adjusted_p_values,
    item_means,
    mean_interval,
    over_seeds,
    paired_by_item,
    seed_means,
    seeds_needed,
    smallest_gain,
    spread_over_seeds,
)
from cluster.train.report import STAGES

GAIN_HEADER = ("runs", "from", "to")
VERSUS_HEADER = ("gain of", "against that of", "since")
LEGEND = (
    "Intervals and p of changes: t over the seeds' means, and never surer than over questions; "
    f"below {FEWEST_SEEDS} seeds there are none. Holm p: adjusted within its table. "
    "Over questions: for other questions to the same runs; so are the intervals of stages. "
    "A question that several seeds ask counts once, with its mean."
)
ALPHAS = (0.05, 0.01)
PLANNED_GAINS = (2, 5, 10)  # points
POWER_HEADER = (
    "change",
    "seeds",
    "spread, points",
    "these seeds find",
    *(f"seeds for +{gain}" for gain in PLANNED_GAINS),
)
POWER_LEGEND = (
    "Spread: standard deviation over seeds. These seeds find: the gain in points that the t test over as "
    f"many finds with {100 * POWER:.0f} % power, two-sided, at p < {ALPHAS[0]} / p < {ALPHAS[1]}. Seeds for "
    "+5: as many find a gain of 5 points. A spread of few seeds is uncertain itself: of three, its 95 % "
    "interval goes from half to six times."
)
LAST = "after_rl"
STARTS = ("before", "after_warm_start", "memory_off")
LATEST_STARTS = ("after_warm_start", "before")  # where RL began


@dataclass(frozen=True, slots=True)
class Change:
    """One change, over both units. ``by_seed``: its mean in each run, None where no task can be compared."""

    over_seeds: PairedDifference
    spread: float  # the standard deviation over the seeds; NaN below two
    over_questions: PairedDifference
    by_seed: tuple[float | None, ...]

    @staticmethod
    def of(before: Mapping[Played, float], after: Mapping[Played, float], seeds: Sequence[int]) -> Change:
        differences = {played: after[played] - before[played] for played in after if played in before}
        questions, means = paired_by_item(before, after), seed_means(differences)
        by_seed = tuple(means.get(seed) for seed in seeds)
        return Change(over_seeds(means, questions), spread_over_seeds(means), questions, by_seed)


@dataclass(frozen=True, slots=True)
class Gain:
    """What training added to a group since ``stage``, over the group's runs."""

    name: str
    stage: str
    change: Change


@dataclass(frozen=True, slots=True)
class Versus:
    """By how much the first group's gain exceeds the other's, on the tasks that both played.

    Seeds are paired: both play the same tasks of a seed. ``change.by_seed``: the seeds that both have.
    ``not_paired`` counts tasks of one seed and id that ask something else in the other group, as recall's
    tasks do where environment.recall.* differs.
    """

    name: str
    other: str
    stage: str
    change: Change
    not_paired: int


@dataclass(frozen=True, slots=True)
class Pool:
    """p-values are adjusted within each table (Holm)."""

    groups: tuple[Group, ...]
    gains: tuple[Gain, ...]
    versus: tuple[Versus, ...]
    score: str = F1  # by which stages are compared

    def document(self, plots: Sequence[Path] = ()) -> Document:
        folders = {group.name: ", ".join(str(run.folder) for run in group.runs) for group in self.groups}
        section = Section("", tables=tuple(self.tables()), notes=tuple(self.notes()), plots=tuple(plots))
        return Document("Runs, pooled over seeds", folders, (section,))

    def tables(self) -> Iterator[Table]:
        temperatures = {group.runs[0].config.evaluation.temperature for group in self.groups}
        how = ", ".join(sorted(map(decoding, temperatures)))
        titles = (f"{label(score)}{unit(score)} [95 % CI]" for score in self._scores)
        header = ("runs", "stage", "tasks", *titles, "failed")
        yield Table(f"Held-out evaluation, all seeds, {how}", header, tuple(self._stages()))
        if self.gains:
            cells = _cells([gain.change for gain in self.gains], self.score)
            gains = [
                (gain.name, gain.stage, LAST, *figures)
                for gain, figures in zip(self.gains, cells, strict=True)
            ]
            yield Table("What training gained", (*GAIN_HEADER, *_changes(self.score)), tuple(gains))
        if self.versus:
            cells = _cells([versus.change for versus in self.versus], self.score)
            lines = [
                (versus.name, versus.other, versus.stage, *figures)
                for versus, figures in zip(self.versus, cells, strict=True)
            ]
            yield Table("Whether it gained more", (*VERSUS_HEADER, *_changes(self.score)), tuple(lines))
        if power := tuple(self._power()):
            yield Table("How many seeds a gain needs", POWER_HEADER, power, POWER_LEGEND)

    def notes(self) -> Iterator[str]:
        """What the tables do not say of themselves, a line each."""
        yield LEGEND
        for group in self.groups:
            if len(group.runs) < FEWEST_SEEDS:
                few = f"{len(group.runs)} seed(s) tell nothing of other seeds"
                yield f"{group.name}: {few}: no interval and no p; train {FEWEST_SEEDS} seeds or more."
            if len(set(group.models.values())) > 1:
                starts = ", ".join(f"seed {seed}: {model}" for seed, model in group.models.items())
                yield f"{group.name}: its runs start from different models ({starts})."
        for versus in self.versus:
            names = f"{versus.name} and {versus.other}"
            if versus.not_paired:
                tasks = f"{versus.not_paired} task(s) of the same seed and id ask different things"
                yield f"{names}: {tasks} and are not paired; compare runs of one environment."
            elif versus.change.over_questions.count == 0:
                yield f"{names} share no finished task: their gains cannot be compared."

    def _power(self) -> Iterator[tuple[str, ...]]:
        """A line for each change whose seeds have a spread; none for a reward, which has no points."""
        if self.score == REWARD:
            return
        changes = [(f"{gain.name} since {gain.stage}", gain.change) for gain in self.gains]
        changes += [(f"{one.name} against {one.other}", one.change) for one in self.versus]
        for name, change in changes:
            spread, seeds = change.spread, change.over_seeds.count
            if spread > 0 and seeds >= FEWEST_SEEDS:  # not where it is NaN
                found = [f"{100 * smallest_gain(spread, seeds, alpha):.1f}" for alpha in ALPHAS]
                needed = [
                    " / ".join(seeds_text(seeds_needed(gain / 100, spread, alpha)) for alpha in ALPHAS)
                    for gain in PLANNED_GAINS
                ]
                yield (name, str(seeds), f"{100 * spread:.1f}", " / ".join(found), *needed)

    def _stages(self) -> Iterator[tuple[str, ...]]:
        for group in self.groups:
            name = f"{group.name} (seeds {', '.join(str(run.config.seed) for run in group.runs)})"
            for stage in STAGES:
                if group.has(stage):
                    by_score = {score: group.scores(stage, score) for score in self._scores}
                    texts = [
                        score_text(score, mean_interval(list(item_means(values).values())))
                        for score, values in by_score.items()
                    ]
                    yield (name, stage, _tasks(by_score[self.score]), *texts, str(group.failed(stage)))

    @property
    def _scores(self) -> tuple[str, ...]:
        """The columns: F1 and EM where there are answers, the reward where it is not F1 itself."""
        if self.score == REWARD:
            return (REWARD,)
        return (F1, "em", REWARD) if has_own_reward(_episodes(self.groups)) else (F1, "em")


def pool_groups(groups: tuple[Group, ...]) -> Pool:
    """Compare each group's stages, and the first group with each other since the last stage before RL."""
    score = primary_score(_episodes(groups))
    gains = [_gain(group, stage, score) for group in groups for stage in STARTS if group.has(stage)]
    first, *others = groups
    versus = []
    for other in others:
        shared = [stage for stage in LATEST_STARTS if first.has(stage) and other.has(stage)]
        if shared:
            versus.append(_versus(first, other, shared[0], score))
    return Pool(groups, tuple(gains), tuple(versus), score)


def _episodes(groups: Sequence[Group]) -> Iterator[EpisodeScore]:
    for group in groups:
        for run in group.runs:
            for row in run.rows.values():
                yield from row.episodes


def _gain(group: Group, stage: str, score: str) -> Gain:
    seeds = [run.config.seed for run in group.runs]
    return Gain(group.name, stage, Change.of(group.scores(stage, score), group.scores(LAST, score), seeds))


def _versus(first: Group, other: Group, stage: str, score: str) -> Versus:
    gained, against = (group.gained(stage, LAST, score) for group in (first, other))
    same_id = {played[:2] for played in gained} & {played[:2] for played in against}
    paired = gained.keys() & against.keys()
    seeds = sorted({seed for seed, _, _ in paired})
    change = Change.of(against, gained, seeds)
    return Versus(first.name, other.name, stage, change, len(same_id) - len(paired))


def open_output(folder: Path) -> None:
    """Make the folder and try to write in it, before the user sees any table. Raises CheckpointError."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def show_compared(groups: tuple[Group, ...], folder: Path, display: Display) -> None:
    """Print the tables, and save them with the plots in ``folder``. Raises CheckpointError."""
    pool = pool_groups(groups)
    show(pool.document(), display)
    for path in save_pool(pool, folder):
        display.say(f"saved: {path}")


def save_pool(pool: Pool, folder: Path) -> list[Path]:
    """Write compare.md, compare.json, reward.png, gains.png; return their paths. Raises CheckpointError."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plots = [_save_rewards(pool.groups, folder / "reward.png"), *_save_gains(pool, folder / "gains.png")]
        document = pool.document(plots)
        data = {"gains": pool.gains, "versus": pool.versus, "notes": list(pool.notes())}
        return [*save_document(document, folder, data, name="compare"), *plots]


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


def _save_gains(pool: Pool, path: Path) -> list[Path]:
    """What each group gained since its RL began: the mean over seeds, with its interval, and each seed.

    No plot where no group has a gain.
    """
    begun = {group.name: next((s for s in LATEST_STARTS if group.has(s)), "") for group in pool.groups}
    gains = [gain for gain in pool.gains if begun[gain.name] == gain.stage and gain.change.over_seeds.count]
    if not gains:
        return []
    factor, points = (1, "") if pool.score == REWARD else (100, ", points")
    curves = []
    for place, gain in enumerate(gains):
        over = gain.change.over_seeds
        seeds = [factor * mean for mean in gain.change.by_seed if mean is not None]
        label_ = "" if place else "a seed"
        curves.append(Curve([place + 0.15] * len(seeds), seeds, 1, label_, "crosses"))
        spans = [(factor * over.low, factor * over.high)] if np.isfinite(over.low) else []
        label_ = "" if place else "mean over seeds, with 95 % interval from three seeds on"
        curves.append(Curve([place], [factor * over.mean], 0, label_, "points", spans))
    curves.append(Curve([-0.3, len(gains) - 0.7], [0, 0], 2, style="dashed"))
    ticks = {place: f"{gain.name}\nsince {gain.stage}" for place, gain in enumerate(gains)}
    panel = Panel("", f"gain in {label(pool.score)}{points}", tuple(curves), ticks=ticks)
    return [save_plot([panel], path)]


def seeds_text(seeds: int | None) -> str:
    return f"> {MOST_SEEDS}" if seeds is None else str(seeds)


# --- cells of the tables ----------------------------------------------------------------------------------


def _tasks(scores: Mapping[Played, float]) -> str:
    items = len(item_means(scores))
    return f"{len(scores)} of {items} questions" if items != len(scores) else str(items)


def _changes(score: str) -> tuple[str, ...]:
    """The header of ``_cells``."""
    points = "" if score == REWARD else ", points"
    change = f"{label(score)}{points} [95 % CI]"
    return ("seeds", change, "p", "Holm p", "by seed", "questions", "over questions")


def _cells(changes: Sequence[Change], score: str) -> Iterator[tuple[str, ...]]:
    """The cells under ``_changes``."""
    adjusted = adjusted_p_values([change.over_seeds for change in changes])

    def shown(mean: float | None) -> str:
        if mean is None:
            return "-"
        return f"{mean:+.3f}" if score == REWARD else f"{100 * mean:+.1f}"

    for change, holm_p in zip(changes, adjusted, strict=True):
        seeds, questions = change.over_seeds, change.over_questions
        yield (
            str(seeds.count),
            score_text(score, seeds, sign="+"),
            p_text(seeds.p_value),
            p_text(holm_p),
            ", ".join(map(shown, change.by_seed)) or "-",
            str(questions.count),
            score_text(score, questions, sign="+"),
        )
