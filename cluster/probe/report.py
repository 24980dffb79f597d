"""A probe's report: terminal tables, Markdown, CSV (a line a point), JSON (every card), metrics, plots.

The cards of a seed share their writes, so they succeed or fail together. Intervals are 95 % bootstrap
intervals over seeds and the cards of each, never narrower than those of as many independent cards. Where
every seed has the same cards (a file), they are over cards, each averaged over its seeds: a card asked again
is no new evidence.

A write that was rolled back stays in. Its cell shows the state that was in force afterwards, how many writes
were rolled back, and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.measure.report import Document, Section, Table, interval_text, percent, save_document
from cluster.measure.rows import OUTCOMES
from cluster.measure.statistics import DIFFERENCE, SCORE, Bounds, Interval, mean, nested_interval
from cluster.probe.plots import save_plots
from cluster.probe.values import LEAKS, Card, CellRun, LeakKind, Point

_LEAK_NAMES: Mapping[LeakKind, str] = {
    "stranger": "strangers",
    "same_person": "same person",
    "other_card": "other cards",
}
HEADER = (
    *("cell", "loss", "reworded", "recall %", "reworded %"),
    *(f"{_LEAK_NAMES[kind]} %" for kind in LEAKS),
    *("damage", "KL", "replies", "KL", "CPU s/write", "writes"),
)
LEGEND = (
    "loss: nats per answer token, before→after the last write · "
    "recall: greedy answers that match exactly (plain EM) [95 % CI] · "
    "reworded: the same for paraphrases, which were not written · "
    "strangers, same person, other cards: the leak, the share of questions that get another question's "
    "written answer: those about people never told of, about other relations of people told of, and the "
    "cards' own (the untouched model: {untouched}) · "
    "damage: rise of the loss on unrelated text, nats per token, with KL(base || now); "
    "replies: the same for unrelated questions in the chat format · "
    "writes: accepted/empty/rolled back · "
    "against: the last cell minus (or divided by) the other, paired over cards; "
    "by seed: points of paraphrases (of the written questions, where cards have none) · "
    "intervals: over seeds and the cards of each; of three seeds or fewer they are too narrow"
)
FORGETTING = (
    *("cell", "after write", "cards", "newest %", "earlier %", "all %", "all, reworded %"),
    *(f"{_LEAK_NAMES[kind]} %" for kind in LEAKS),
    *("KL", "replies' KL", "rolled back"),
)
VERSUS = (
    *("against", "recall, points", "reworded, points", "by seed", "strangers, points"),
    *("KL, times", "replies' KL, times", "CPU, times"),
)
FIGURES: tuple[tuple[str, bool, Literal["em", "f1"]], ...] = (
    ("em_written", False, "em"),
    ("em_paraphrased", True, "em"),
    ("f1_written", False, "f1"),
    ("f1_paraphrased", True, "f1"),
)
_KINDS: tuple[Literal["text", "reply"], ...] = ("text", "reply")
_TEXT_FIGURES: tuple[tuple[Literal["text", "reply"], Literal["damage", "kl"]], ...] = (
    ("text", "damage"),
    ("text", "kl"),
    ("reply", "damage"),
    ("reply", "kl"),
)


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All cells on all seeds. ``cards``: by seed. ``samples`` and ``seed`` are the bootstrap's."""

    runs: tuple[CellRun, ...]
    cards: Mapping[int, tuple[Card, ...]]
    facts: Mapping[str, str]
    samples: int
    seed: int

    @property
    def by_label(self) -> dict[str, list[CellRun]]:
        """The runs of all seeds, by label."""
        cells: dict[str, list[CellRun]] = {}
        for run in self.runs:
            cells.setdefault(run.label, []).append(run)
        return cells

    def document(self, plots: Sequence[Path] = ()) -> Document:
        section = Section("", tables=tuple(self.tables()), notes=tuple(self.notes()), plots=tuple(plots))
        return Document("Write quality", self.facts, (section,))

    def tables(self) -> list[Table]:
        """The grid, and where there were several writes the forgetting curve."""
        cells = self.by_label
        grid = tuple(self._line(label, runs) for label, runs in cells.items())
        tables = [Table("Write quality", HEADER, grid)]
        if any(len(run.writes) > 1 for run in self.runs):
            lines = [line for label, runs in cells.items() for line in self._forgetting(label, runs)]
            tables.append(
                Table("Successive writes: what was written is asked again", FORGETTING, tuple(lines))
            )
        if len(cells) > 1:
            *others, last = cells
            versus = tuple(self._versus(others, last))
            tables.append(Table(f"{last}, against each other cell", VERSUS, versus))
        return tables

    def notes(self) -> list[str]:
        """What the figures mean, and why writes were not accepted."""
        reasons = [
            f"{run.label}, seed {run.seed}, write {number}: {line.outcome.replace('_', ' ')}: {line.reason}"
            for run in self.runs
            for number, line in enumerate(run.writes, start=1)
            if line.outcome != "accepted"
        ]
        return [LEGEND.format(untouched=self._untouched()), *reasons]

    def _untouched(self) -> str:
        """The shares of the untouched model, which says a card's answer by chance. All cells share it."""
        points = list({run.seed: run.after[0] for run in self.runs}.values())
        return f"{', '.join(percent(value, 0) for value in _leaks(points))} %"

    def _line(self, label: str, runs: Sequence[CellRun]) -> tuple[str, ...]:
        first, last = [run.after[0] for run in runs], [run.after[-1] for run in runs]
        writes = [line for run in runs for line in run.writes]
        losses = [
            f"{mean([p.loss(reworded) for p in first]):.2f}→{mean([p.loss(reworded) for p in last]):.2f}"
            for reworded in (False, True)
        ]
        recalls = [
            interval_text(self._interval(self._recalled(runs, reworded)), 0) for reworded in (False, True)
        ]
        leaks = [interval_text(self._interval(self._leaked(runs, kind)), 0) for kind in LEAKS]
        return (
            label,
            *losses,
            *recalls,
            *leaks,
            *(_short(mean([point.text(kind, figure) for point in last])) for kind, figure in _TEXT_FIGURES),
            f"{mean([line.cpu_s for line in writes]):.1f}",
            "/".join(str(sum(line.outcome == outcome for line in writes)) for outcome in OUTCOMES),
        )

    def _forgetting(self, label: str, runs: Sequence[CellRun]) -> Iterator[tuple[str, ...]]:
        for write in range(1, len(runs[0].after)):
            points = [run.after[write] for run in runs]
            refused = sum(run.writes[write - 1].outcome == "rolled_back" for run in runs)
            recalls = (
                *recall_by_age(points),
                *(
                    [em for point in points for em in point.recall(reworded, "em").values()]
                    for reworded in (False, True)
                ),
            )
            yield (
                label,
                str(write),
                str(sum(len(point.cards) for point in points)),
                *(percent(mean(values), 0) for values in recalls),
                *(percent(value, 0) for value in _leaks(points)),
                *(_short(mean([point.text(kind, "kl") for point in points])) for kind in _KINDS),
                str(refused),
            )

    def _versus(self, others: Sequence[str], last: str) -> Iterator[tuple[str, ...]]:
        """Paired over the cards of each seed."""
        cells = self.by_label
        for label in others:
            pair = [
                _less(self._recalled(cells[label], reworded), self._recalled(cells[last], reworded))
                for reworded in (False, True)
            ]
            shown = pair[1] if any(pair[1]) else pair[0]
            by_seed = [f"{100 * mean(list(cards.values())):+.0f}" for cards in shown if cards]
            times = [
                _ratio(
                    [mean([run.after[-1].text(kind, "kl") for run in cells[name]]) for name in (last, label)]
                )
                for kind in _KINDS
            ]
            seconds = [
                mean([line.cpu_s for run in cells[name] for line in run.writes]) for name in (last, label)
            ]
            strangers = [self._leaked(cells[name], "stranger") for name in (label, last)]
            yield (
                label,
                *(interval_text(self._interval(cards, DIFFERENCE), 0, sign="+") for cards in pair),
                ", ".join(by_seed),
                interval_text(self._interval(_less(*strangers), DIFFERENCE), 0, sign="+"),
                *times,
                _ratio(seconds),
            )

    def _recalled(self, runs: Sequence[CellRun], reworded: bool) -> list[dict[str, float]]:
        """EM after the last write, by seed, by the card's question."""
        points = [(self.cards[run.seed], run.after[-1]) for run in sorted(runs, key=lambda run: run.seed)]
        return [
            {cards[place].question: em for place, em in point.recall(reworded, "em").items()}
            for cards, point in points
        ]

    def _leaked(self, runs: Sequence[CellRun], kind: LeakKind) -> list[dict[str, float]]:
        """The leak after the last write, by seed, by question."""
        return [run.after[-1].leak(kind) for run in sorted(runs, key=lambda run: run.seed)]

    def _interval(self, by_seed: Sequence[Mapping[str, float]], bounds: Bounds = SCORE) -> Interval:
        if all(set(values) == set(by_seed[0]) for values in by_seed):
            by_seed = [{item: mean([values[item] for values in by_seed]) for item in by_seed[0]}]
        groups = [list(values.values()) for values in by_seed]
        return nested_interval(groups, self.samples, self.seed, bounds)


def _less(
    before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]
) -> list[dict[str, float]]:
    """``after`` minus ``before``, by seed, by question."""
    pairs = zip(before, after, strict=True)
    return [{question: new[question] - old[question] for question in new} for old, new in pairs]


def _leaks(points: Sequence[Point]) -> list[float]:
    """The share of each kind over all questions of ``points``; NaN where none was asked."""
    return [mean([leaked for point in points for leaked in point.leak(kind).values()]) for kind in LEAKS]


def recall_by_age(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """EM of the written questions: the cards of each point's own write, and those of the writes before."""
    newest = [card.written.em for point in points for card in point.cards if card.write == point.write]
    return newest, [card.written.em for point in points for card in point.cards if card.write < point.write]


def figures(point: Point) -> dict[str, float]:
    """The point in single numbers; NaN where there is nothing to average."""
    recalled = {name: mean(list(point.recall(reworded, score).values())) for name, reworded, score in FIGURES}
    leaks = {f"leak_{kind}": share for kind, share in zip(LEAKS, _leaks([point]), strict=True)}
    texts = {f"{figure}_{kind}": point.text(kind, figure) for kind, figure in _TEXT_FIGURES}
    losses = {"loss_written": point.loss(False), "loss_paraphrased": point.loss(True)}
    return {**losses, **recalled, **leaks, **texts}


def metrics(run: CellRun) -> list[tuple[dict[str, float], int]]:
    """For the tracker, with their step: after each write, and after each optimizer step (over all writes)."""
    key = "".join(char if char.isalnum() or char in "_-. " else "_" for char in run.label)
    ends = [(f"probe/{key}/seed_{run.seed}", point, point.write) for point in run.after]
    inside = [
        (f"probe_steps/{key}/seed_{run.seed}", point, step) for step, point in enumerate(run.steps, start=1)
    ]
    points = [
        (
            {f"{name}/{figure}": value for figure, value in figures(point).items() if math.isfinite(value)},
            step,
        )
        for name, point, step in (*ends, *inside)
    ]
    refused = float(sum(line.outcome == "rolled_back" for line in run.writes))
    return [*points, ({f"probe/{key}/seed_{run.seed}/writes_rolled_back": refused}, len(run.writes))]


def save_report(report: ProbeReport, folder: Path) -> list[Path]:
    """Write report.md, report.csv, report.json and the plots; return their paths. Raises OSError."""
    plots = save_plots(report.by_label, folder)
    data = {"facts": report.facts, "runs": report.runs}
    return [*save_document(report.document(plots), folder, data, list(_csv_lines(report.runs))), *plots]


def _csv_lines(runs: Sequence[CellRun]) -> Iterator[dict[str, Any]]:
    """A line a point; ``outcome`` is that of the point's write."""
    for run in runs:
        for phase, points in (("after", run.after), ("step", run.steps)):
            for point in points:
                outcome = run.writes[point.write - 1].outcome if point.write else ""
                where = {"cell": run.label, "seed": run.seed, "phase": phase}
                state = {"write": point.write, "step": point.step, "outcome": outcome}
                yield {**where, **state, "cards": len(point.cards), **figures(point)}


def _ratio(pair: Sequence[float]) -> str:
    above, below = pair
    return f"{above / below:.2f}" if below > 0 and math.isfinite(above / below) else "-"


def _short(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}" if math.isfinite(value) else "-"  # + 0.0: no "-0.000"
