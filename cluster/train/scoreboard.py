"""Measures the rows of a run's final table on held-out tasks, and keeps them in its folder.

    memory off | TMEM before --> [warm start --> TMEM after warm start] --> RL --> TMEM after RL
               --> its controls: gold cards, other cards --> table

A row is saved when it is measured: a resumed run shows the rows from before it was interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from actors.episodes.controls import missing_for_control
from cluster.common.display import Display
from cluster.common.errors import CheckpointError
from cluster.inspection.recorder import EpisodeRecorder
from cluster.measure.report import show
from cluster.measure.row_metrics import row_metrics, summary_metrics
from cluster.measure.rows import EpisodeSource, EvaluationRow, RowResult, evaluate_row, load_row, save_row
from cluster.runs.checkpoint import TrainState
from cluster.tracking.tracker import Tracker
from cluster.train.prepare import RunFolder, RunSpec
from cluster.train.report import STAGES, save_report, training_report
from configs.memory import CARD_WRITING
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
_TRAINED: Mapping[Literal["none", "shuffled_rewards", "supervised"], str] = {
    "none": "RL",
    "shuffled_rewards": "RL, rewards shuffled",
    "supervised": "more supervised steps",
}
_CONTROL_LABELS: Mapping[Literal["oracle", "other_cards"], str] = {
    "oracle": "oracle: gold cards",
    "other_cards": "control: other cards",
}


EVALUATE = "evaluate"
"""The kind of work of a row, for the time that a run has left (Display.expect)."""


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
        "after_rl": f"{name} after {_TRAINED[config.train.control]}",
    }
    rows = {key: EvaluationRow(label, config.memory, config.seed) for key, label in labels.items()}
    if config.evaluation.memory_off_row and config.memory.policy != "truncation":
        memory_off = replace(config.memory, policy="truncation")
        rows["memory_off"] = EvaluationRow("memory off", memory_off, config.seed)
    if config.evaluation.control_rows and config.memory.policy in CARD_WRITING:
        for control, label in _CONTROL_LABELS.items():
            rows[control] = EvaluationRow(label, replace(config.memory, control=control), config.seed)
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class Scoreboard:
    """The rows of a run."""

    spec: RunSpec
    folder: RunFolder
    observers: Observers

    async def measure(self, key: str, step: int, workers: Sequence[EpisodeSource]) -> None:
        """Evaluate a row now, unless it was measured before or is not wanted.

        A control that the environment cannot make is left out, and said.
        """
        config, tasks, display = self.spec.config, self.spec.eval_tasks, self.observers.display
        row = evaluation_rows(config).get(key)
        if row is None or self._row(key) is not None:
            return
        if missing := missing_for_control(row.memory, self.spec.environment):
            display.say(
                f"no row {row.label!r}: the environment {self.spec.environment.name} has no {missing}"
            )
            return
        wanted = config.evaluation.tasks
        if len(tasks) < wanted:
            display.say(
                f"the held-out split has {len(tasks)} tasks, fewer than evaluation.tasks={wanted}: "
                "all are used"
            )
        with display.counting(f"evaluate {row.label}", len(tasks), EVALUATE) as counter:
            watched = self.observers.recorder.watch(workers, config, step)
            result = await evaluate_row(row, tasks, watched, config.engine.slots, counter.advance)
        save_row(result, self.folder.row(key))
        self.folder.saved()
        figures = row_metrics(result, key)
        first = "after_warm_start" if config.warm_start.steps > 0 else "before"
        if key in (first, "after_rl"):  # what RL begins with, and what it made of it
            figures |= summary_metrics(result)
        self.observers.tracker.log(figures, step)

    def ahead(self, keys: Sequence[str]) -> int:
        """The episodes of those rows of ``keys`` that ``measure`` would play."""
        rows = evaluation_rows(self.spec.config)
        played = [
            key
            for key in keys
            if key in rows
            and not self.folder.row(key).exists()
            and not missing_for_control(rows[key].memory, self.spec.environment)
        ]
        return len(played) * len(self.spec.eval_tasks)

    def _row(self, key: str) -> RowResult | None:
        """The row as it was saved; None where there is none, or a damaged one, which is said."""
        file = self.folder.row(key)
        try:
            return load_row(file) if file.exists() else None
        except CheckpointError as error:
            self.observers.display.say(f"warning: the row is left out: {error}")
            return None

    def forget(self, *keys: str) -> None:
        """Drop rows that were measured before this run was resumed to go further."""
        for key in keys:
            self.folder.row(key).unlink(missing_ok=True)

    def report(self, state: TrainState) -> None:
        """Show the table and what it means; save and track the same."""
        config, display = self.spec.config, self.observers.display
        rows = {stage: row for stage in STAGES if (row := self._row(stage)) is not None}
        temperature = config.evaluation.temperature
        report = training_report(rows, state.rewards, temperature, state.learner_restarts)
        show(report.document(), display)
        for path in save_report(report, self.folder.report):
            self.observers.tracker.artifact(path)
        display.say(f"report:  {self.folder.report}")
        display.say(f"metrics: {self.observers.tracker.location}")
