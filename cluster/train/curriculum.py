"""Which stage of the curriculum a run trains in: its tasks, and when it moves on.

    task_at(position) --> a task of the stage in force, marked with the stage --> stream, workers
    after_step(figures) --> the stage's metric over its last steps, its number of steps --> the next stage

A figure counts where the whole batch was of the stage: with staleness the first batches after a move still
hold groups of the stage before. ``progress`` stands in the checkpoint, so a resumed run goes on in its stage.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from actors.types import Task
from cluster.runs.checkpoint import StageProgress
from configs.curriculum import Stage

TaskAt = Callable[[int], Task]
_START = StageProgress()


class Curriculum:
    """The training tasks of a run, by position: ``tasks``, or ``of_stages`` where there are stages."""

    def __init__(
        self,
        tasks: TaskAt,
        stages: Sequence[Stage] = (),
        of_stages: Sequence[TaskAt] = (),
        progress: StageProgress = _START,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.progress = progress
        self._tasks, self._stages, self._of_stages, self._say = tasks, stages, of_stages, say
        self._issued: dict[int, int] = {}  # the stage of each position that was issued
        self._warned = False
        if stages:
            say(f"curriculum: {self._name()}, after {progress.steps} of its steps")

    def task_at(self, position: int) -> Task:
        """The task at a position. One that is issued again is of the stage that is in force then."""
        if not self._stages:
            return self._tasks(position)
        stage = self._issued[position] = self.progress.stage
        return replace(self._of_stages[stage](position), stage=stage + 1)

    def after_step(
        self, step: int, figures: Mapping[str, float], positions: Sequence[int]
    ) -> dict[str, float]:
        """Count a step, and move on where the stage has ended. Return the figures of the stage it was of."""
        if not self._stages:
            return {}
        of_stage = [self._issued.pop(position) == self.progress.stage for position in positions]
        now, stage = self.progress, self._stages[self.progress.stage]
        seen = now.figures
        if stage.metric in figures and all(of_stage):
            seen = (*seen, figures[stage.metric])[-stage.window :]
        elif stage.metric and all(of_stage):
            self._warn(stage.metric, figures)
        self.progress = replace(now, steps=now.steps + 1, figures=seen)
        shown = {"stage": now.stage + 1, "steps": now.steps + 1, "tasks_of_stage": sum(of_stage)}
        self._move(step)
        return {f"curriculum/{name}": float(value) for name, value in shown.items()}

    def _move(self, step: int) -> None:
        if why := self._reason():
            self.progress = StageProgress(self.progress.stage + 1)
            self._warned = False
            self._say(f"curriculum: {self._name()} from step {step + 1} on: {why}")

    def _reason(self) -> str:
        """Why the stage has ended; "" where it has not, or is the last."""
        now, stage = self.progress, self._stages[self.progress.stage]
        if now.stage + 1 == len(self._stages):
            return ""
        if stage.metric and len(now.figures) == stage.window:
            mean = sum(now.figures) / stage.window
            if stage.is_reached(mean):
                return f"{stage.metric} was {mean:.4g} over its last {stage.window} step(s)"
        return f"it had its {stage.steps} steps" if stage.steps and now.steps >= stage.steps else ""

    def _name(self) -> str:
        place = self.progress.stage
        return f"stage {place + 1} of {len(self._stages)} ({self._stages[place].changes})"

    def _warn(self, metric: str, figures: Mapping[str, float]) -> None:
        if not self._warned:
            self._warned = True
            similar = difflib.get_close_matches(metric, figures, n=3, cutoff=0.5)
            hint = f"; similar are {', '.join(similar)}" if similar else ""
            self._say(f"curriculum: this step has no figure {metric}, so it cannot end the stage{hint}")
