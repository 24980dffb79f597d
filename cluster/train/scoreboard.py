"""Measures the rows of a run's final table on held-out tasks, and keeps them in its folder.

    memory off | TMEM before --> [warm start --> TMEM after warm start] --> RL --> TMEM after RL --> table

A row is saved when it is measured: a resumed run shows the rows from before it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.common.display import Display
from cluster.inspection.recorder import EpisodeRecorder
from cluster.measure.report import HEADER, LEGEND, MOST_CATEGORIES, Report, rich_table, save_report
from cluster.measure.rows import (
    EpisodeSource,
    EvaluationRow,
    RowResult,
    evaluate_row,
    load_row,
    row_metrics,
    save_row,
)
from cluster.tracking.tracker import Tracker
from cluster.train.prepare import RunFolder, RunSpec
from configs.schema import MemoryPolicy, RunConfig

_MEMORY_NAMES: Mapping[MemoryPolicy, str] = {
    "full": "full context",
    "truncation": "no memory",
    "paging": "MemGPT",
    "summary": "MemAgent",
    "state": "MEM1",
    "notes": "A-MEM",
    "raw": "raw writes",
    "summary_write": "summary SFT",
    "implications": "SEAL",
    "parametric": "TMEM",
    "hybrid": "summary + TMEM",
    "custom": "custom memory",
}
ROW_ORDER = ("memory_off", "before", "after_warm_start", "after_rl")
_COMPARED = (
    ("before", "after_rl"),
    ("after_warm_start", "after_rl"),
    ("memory_off", "after_rl"),
    ("memory_off", "before"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Observers:
    """What is told of a run: its figures, the person at the terminal, and some of its episodes."""

    tracker: Tracker
    display: Display
    recorder: EpisodeRecorder


def evaluation_rows(config: RunConfig) -> dict[str, EvaluationRow]:
    """The rows that a run can have, by key (the name of the row's file and of its metrics)."""
    name = _MEMORY_NAMES[config.memory.policy]
    if config.memory.policy == "parametric" and config.memory.question_blind:
        name = f"{name}, question-blind"
    labels = {
        "before": f"{name} before",
        "after_warm_start": f"{name} after warm start",
        "after_rl": f"{name} after RL",
    }
    rows = {key: EvaluationRow(label, config.memory, config.seed) for key, label in labels.items()}
    if config.evaluation.memory_off_row and config.memory.policy != "truncation":
        memory_off = replace(config.memory, policy="truncation")
        rows["memory_off"] = EvaluationRow("memory off", memory_off, config.seed)
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Scoreboard:
    """The rows of a run."""

    spec: RunSpec
    folder: RunFolder
    observers: Observers

    async def measure(self, key: str, step: int, workers: Sequence[EpisodeSource]) -> None:
        """Evaluate a row now, unless it was measured before or is not wanted."""
        config, tasks, display = self.spec.config, self.spec.eval_tasks, self.observers.display
        row = evaluation_rows(config).get(key)
        if row is None or self.folder.row(key).exists():
            return
        wanted = config.evaluation.tasks
        if len(tasks) < wanted:
            display.say(
                f"the held-out split has {len(tasks)} tasks, fewer than evaluation.tasks={wanted}: "
                "all are used"
            )
        with display.counting(f"evaluate {row.label}", len(tasks)) as counter:
            watched = self.observers.recorder.watch(workers, config, step)
            result = await evaluate_row(row, tasks, watched, config.engine.slots, counter.advance)
        save_row(result, self.folder.row(key))
        self.observers.tracker.log(row_metrics(result, key), step)

    def forget(self, key: str) -> None:
        """Drop a row that was measured before this run was resumed to go further."""
        self.folder.row(key).unlink(missing_ok=True)

    def report(self, rewards: tuple[float, ...]) -> None:
        """Show the table and what it means; save and track the same."""
        config, display = self.spec.config, self.observers.display
        files = {key: self.folder.row(key) for key in ROW_ORDER}
        rows = {key: load_row(file) for key, file in files.items() if file.exists()}
        report = Report(
            tuple(rows.values()),
            rewards,
            config.evaluation.bootstrap_samples,
            config.seed,
            config.evaluation.temperature,
        )
        pairs = [(before, after) for before, after in _COMPARED if before in rows and after in rows]
        comparisons = report.comparisons([(rows[before].label, rows[after].label) for before, after in pairs])
        display.console.print(rich_table(report.title, HEADER, report.cells()))
        display.say(LEGEND)
        header, by_category = report.category_cells("f1")
        if 0 < len(by_category) <= MOST_CATEGORIES:
            display.console.print(rich_table("By category", header, by_category))
        for comparison in comparisons:
            display.say(comparison.sentence)
        _show_failures(display, list(rows.values()))
        for path in save_report(report, comparisons, self.folder.report):
            self.observers.tracker.artifact(path)
        display.say(f"report:  {self.folder.report}")
        display.say(f"metrics: {self.observers.tracker.location}")


def _show_failures(display: Display, rows: Sequence[RowResult]) -> None:
    for row in rows:
        for message in sorted(set(row.failed))[:3]:
            display.say(f"{row.label}: {row.failed.count(message)} episode(s) failed: {message}")
