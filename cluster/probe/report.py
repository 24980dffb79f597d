"""A probe for people and machines: terminal tables, Markdown, CSV (a line a point), JSON (every card), metrics, plots.

The cards of a seed share their writes, so they succeed or fail together: intervals are 95 % bootstrap intervals over seeds and the cards of each.
Where every seed has the same cards (a file), they are over cards, each averaged over its seeds: a card asked again is no new evidence. A write
that was rolled back stays in: its cell shows the state that was in force afterwards, how many were rolled back, and why.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.measure.report import Table, markdown_table
from cluster.measure.statistics import Interval, nested_interval
from cluster.probe.plots import save_plots
from cluster.probe.values import Card, CellRun, Point

HEADER = (
    "cell",
    "loss",
    "reworded",
    "recall %",
    "reworded %",
    "damage",
    "KL",
    "replies",
    "KL",
    "s/write",
    "writes",
)
LEGEND = (
    "loss: nats per answer token, before→after the last write · recall: greedy answers that match exactly (plain EM) [95 % CI] · reworded: the same "
    "for paraphrases, which were not written · damage: rise of the loss on unrelated text, nats per token, with KL(base || now); replies: the same "
    "for unrelated questions in the chat format · writes: accepted/empty/rolled back · against: the last cell minus (or divided by) "
    "the other, paired over cards; by seed: points of paraphrases (of the written questions, where cards have none) · intervals: over seeds and "
    "the cards of each; of three seeds or fewer they are too narrow"
)
FORGETTING = (
    "cell",
    "after write",
    "cards",
    "newest %",
    "earlier %",
    "all %",
    "all, reworded %",
    "damage",
    "KL",
    "rolled back",
)
VERSUS = (
    "against",
    "recall, points",
    "reworded, points",
    "by seed",
    "KL, times",
    "replies' KL, times",
    "time, times",
)
FIGURES: tuple[tuple[str, bool, Literal["em", "f1"]], ...] = (
    ("em_written", False, "em"),
    ("em_paraphrased", True, "em"),
    ("f1_written", False, "f1"),
    ("f1_paraphrased", True, "f1"),
)


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All cells on all seeds, cell by cell. ``cards``: by seed. ``facts``: what was probed. ``samples``, ``seed``: bootstrap."""

    runs: tuple[CellRun, ...]
    cards: Mapping[int, tuple[Card, ...]]
    facts: Mapping[str, str]
    samples: int
    seed: int

    @property
    def by_label(self) -> dict[str, list[CellRun]]:
        """By label, the runs of all seeds."""
        found: dict[str, list[CellRun]] = {}
        for run in self.runs:
            found.setdefault(run.label, []).append(run)
        return found

    def tables(self) -> list[Table]:
        """The grid, and where there were several writes the forgetting curve."""
        made = [
            Table(
                "Write quality",
                HEADER,
                tuple(self._line(label, runs) for label, runs in self.by_label.items()),
            )
        ]
        if any(len(run.writes) > 1 for run in self.runs):
            lines = [line for label, runs in self.by_label.items() for line in self._forgetting(label, runs)]
            made.append(Table("Successive writes: what was written is asked again", FORGETTING, tuple(lines)))
        if len(self.by_label) > 1:
            *others, last = self.by_label
            made.append(Table(f"{last}, against each other cell", VERSUS, tuple(self._versus(others, last))))
        return made

    def notes(self) -> list[str]:
        """What the figures mean, and each reason for which writes were rolled back."""
        reasons = [
            f"{run.label}, seed {run.seed}, write {number}: {line.outcome.replace('_', ' ')}: {line.reason}"
            for run in self.runs
            for number, line in enumerate(run.writes, start=1)
            if line.outcome != "accepted"
        ]
        return [LEGEND, *reasons]

    def _line(self, label: str, runs: Sequence[CellRun]) -> tuple[str, ...]:
        first, last = [run.after[0] for run in runs], [run.after[-1] for run in runs]
        writes = [line for run in runs for line in run.writes]
        outcomes = [
            sum(line.outcome == outcome for line in writes)
            for outcome in ("accepted", "empty", "rolled_back")
        ]
        return (
            label,
            f"{_loss(first, False):.2f}→{_loss(last, False):.2f}",
            f"{_loss(first, True):.2f}→{_loss(last, True):.2f}",
            self._percent(runs, False),
            self._percent(runs, True),
            *(_short(_mean([point.text(kind, figure) for point in last])) for kind, figure in _TEXT_FIGURES),
            f"{_mean([line.seconds for line in writes]):.1f}",
            "/".join(map(str, outcomes)),
        )

    def _forgetting(self, label: str, runs: Sequence[CellRun]) -> Iterator[tuple[str, ...]]:
        for write in range(1, len(runs[0].after)):
            points = [run.after[write] for run in runs]
            newest, earlier = recall_by_age(points)
            refused = sum(run.writes[write - 1].outcome == "rolled_back" for run in runs)
            yield (
                label,
                str(write),
                str(sum(len(point.cards) for point in points)),
                _bare(newest),
                _bare(earlier),
                _bare(_pooled(points, False, "em")),
                _bare(_pooled(points, True, "em")),
                _short(_mean([point.text("text", "damage") for point in points])),
                _short(_mean([point.text("text", "kl") for point in points])),
                str(refused),
            )

    def _versus(self, others: Sequence[str], last: str) -> Iterator[tuple[str, ...]]:
        """Paired over the cards of each seed."""
        for label in others:
            pair = [
                self._differences(self.by_label[label], self.by_label[last], paraphrased)
                for paraphrased in (False, True)
            ]
            by_seed = [
                f"{100 * _mean(list(cards.values())):+.0f}"
                for cards in (pair[1] if any(pair[1]) else pair[0])
                if cards
            ]
            times = [
                _ratio(
                    _mean([run.after[-1].text(kind, "kl") for run in self.by_label[name]])
                    for name in (last, label)
                )
                for kind in _KINDS
            ]
            seconds = _ratio(
                _mean([line.seconds for run in self.by_label[name] for line in run.writes])
                for name in (last, label)
            )
            yield (
                label,
                *(_span(self._interval(cards)) for cards in pair),
                ", ".join(by_seed),
                *times,
                seconds,
            )

    def _differences(
        self, theirs: Sequence[CellRun], mine: Sequence[CellRun], paraphrased: bool
    ) -> list[dict[Card, float]]:
        """By seed, by card: EM of mine minus theirs."""
        pairs = zip(self._recalled(theirs, paraphrased), self._recalled(mine, paraphrased), strict=True)
        return [{card: after[card] - before[card] for card in after} for before, after in pairs]

    def _recalled(self, runs: Sequence[CellRun], paraphrased: bool) -> list[dict[Card, float]]:
        """By seed, by card: EM after the last write."""
        points = [(self.cards[run.seed], run.after[-1]) for run in sorted(runs, key=lambda run: run.seed)]
        return [
            {cards[place]: em for place, em in point.recall(paraphrased, "em").items()}
            for cards, point in points
        ]

    def _interval(self, by_seed: Sequence[Mapping[Card, float]]) -> Interval:
        if all(set(cards) == set(by_seed[0]) for cards in by_seed):
            by_seed = [{card: _mean([cards[card] for cards in by_seed]) for card in by_seed[0]}]
        return nested_interval([list(cards.values()) for cards in by_seed], self.samples, self.seed)

    def _percent(self, runs: Sequence[CellRun], paraphrased: bool) -> str:
        interval = self._interval(self._recalled(runs, paraphrased))
        return (
            "-"
            if interval.count == 0
            else f"{100 * interval.mean:.0f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
        )


_KINDS: tuple[Literal["text", "reply"], ...] = ("text", "reply")
_TEXT_FIGURES: tuple[tuple[Literal["text", "reply"], Literal["damage", "kl"]], ...] = (
    ("text", "damage"),
    ("text", "kl"),
    ("reply", "damage"),
    ("reply", "kl"),
)


def recall_by_age(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """EM of the written questions: the cards of each point's own write, and those of the writes before."""
    newest = [card.written.em for point in points for card in point.cards if card.write == point.write]
    return newest, [card.written.em for point in points for card in point.cards if card.write < point.write]


def figures(point: Point) -> dict[str, float]:
    """The point in single numbers; NaN where there is nothing to average."""
    recalled = {
        name: _mean(list(point.recall(paraphrased, score).values())) for name, paraphrased, score in FIGURES
    }
    texts = {f"{figure}_{kind}": point.text(kind, figure) for kind, figure in _TEXT_FIGURES}
    return {"loss_written": point.loss(False), "loss_paraphrased": point.loss(True), **recalled, **texts}


def metrics(run: CellRun) -> list[tuple[dict[str, float], int]]:
    """For the tracker, with the step they belong to: after each write, and after each optimizer step (counted over all writes)."""
    key = "".join(char if char.isalnum() or char in "_-. " else "_" for char in run.label)
    ends = [(f"probe/{key}/seed_{run.seed}", point, point.write) for point in run.after]
    inside = [
        (f"probe_steps/{key}/seed_{run.seed}", point, step) for step, point in enumerate(run.steps, start=1)
    ]
    found = [
        (
            {f"{name}/{figure}": value for figure, value in figures(point).items() if math.isfinite(value)},
            step,
        )
        for name, point, step in (*ends, *inside)
    ]
    refused = float(sum(line.outcome == "rolled_back" for line in run.writes))
    return [*found, ({f"probe/{key}/seed_{run.seed}/writes_rolled_back": refused}, len(run.writes))]


def save_report(report: ProbeReport, folder: Path) -> list[Path]:
    """report.md, report.csv, report.json and the plots; returns their paths."""
    plots = save_plots(report.by_label, folder)
    markdown, table, data = folder / "report.md", folder / "report.csv", folder / "report.json"
    markdown.write_text(_markdown(report, plots), encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        lines = list(_csv_lines(report.runs))
        writer.writerow(lines[0])
        writer.writerows(line.values() for line in lines)
    content = {"facts": dict(report.facts), "runs": [_no_nan(run.to_json()) for run in report.runs]}
    data.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return [markdown, table, data, *plots]


def _csv_lines(runs: Sequence[CellRun]) -> Iterator[dict[str, Any]]:
    """A line a point; ``outcome`` is that of the write which the point belongs to."""
    for run in runs:
        for phase, points in (("after", run.after), ("step", run.steps)):
            for point in points:
                outcome = run.writes[point.write - 1].outcome if point.write else ""
                where = {
                    "cell": run.label,
                    "seed": run.seed,
                    "phase": phase,
                    "write": point.write,
                    "step": point.step,
                }
                yield {**where, "outcome": outcome, "cards": len(point.cards), **figures(point)}


def _markdown(report: ProbeReport, plots: Sequence[Path]) -> str:
    lines = ["# Write quality", "", *(f"- {key}: {value}" for key, value in report.facts.items())]
    for table in report.tables():
        lines += ["", f"## {table.title}", "", *markdown_table(table.header, table.rows)]
    lines += [
        "",
        *(f"- {note}" for note in report.notes()),
        "",
        *(f"![{plot.stem}]({plot.name})" for plot in plots),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _loss(points: Sequence[Point], paraphrased: bool) -> float:
    return _mean([point.loss(paraphrased) for point in points])


def _pooled(points: Sequence[Point], paraphrased: bool, score: Literal["em", "f1"]) -> list[float]:
    return [value for point in points for value in point.recall(paraphrased, score).values()]


def _span(points: Interval) -> str:
    return (
        f"{100 * points.mean:+.0f} [{100 * points.low:+.0f}, {100 * points.high:+.0f}]"
        if points.count
        else "-"
    )


def _ratio(pair: Iterable[float]) -> str:
    mine, theirs = pair
    return f"{mine / theirs:.2f}" if theirs > 0 and math.isfinite(mine / theirs) else "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _bare(values: Sequence[float]) -> str:
    return f"{100 * _mean(values):.0f}" if values else "-"


def _short(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}" if math.isfinite(value) else "-"  # + 0.0: no "-0.000"


def _no_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _no_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
