"""Saves steps of the training loop, and measures them on held-out tasks every ``train.evaluate_every`` steps.

    learner step --> hold the stream --> workers refreshed --> save --> evaluate --> save the score
                 --> refresh again --> release the stream

An evaluated step is a barrier: no training episode runs beside the evaluation. The second refresh leaves
the workers as those of a resumed run are, with empty caches. So training goes on the same, to the bit,
whether the run was interrupted there or not.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, Protocol

from actors.types import PolicyVersion
from cluster.common.errors import ClusterError
from cluster.fleet.fleet import ElasticFleet
from cluster.fleet.seats import FleetPool
from cluster.fleet.stream import GroupStream
from cluster.measure.row_metrics import row_metrics, summary_metrics
from cluster.measure.rows import RowResult, evaluate_row, primary_score
from cluster.measure.scores import mean_text
from cluster.runs.checkpoint import TrainState, save_checkpoint, score_checkpoint
from cluster.train.prepare import RunFolder, RunSpec
from cluster.train.scoreboard import Observers, evaluation_rows
from configs.load import to_yaml
from configs.schema import RunConfig

METRICS = "held_out"  # eval/held_out/f1 over the steps


class SavedLearner(Protocol):
    """What saving asks of the learner."""

    def save(self, folder: str) -> None:
        """Blocks, with a deadline of its own."""
        ...


async def save_state(folder: RunFolder, config: RunConfig, learner: SavedLearner, state: TrainState) -> None:
    """Save a checkpoint of ``state``; a caller that is cancelled meanwhile is cancelled afterwards.

    Raises SaveError.
    """
    saving = asyncio.create_task(
        save_checkpoint(
            folder.path,
            state,
            to_yaml(config),
            lambda target: asyncio.to_thread(learner.save, str(target)),
            config.train.keep_checkpoints,
            folder.in_use,
        )
    )
    try:
        await asyncio.shield(saving)
    except asyncio.CancelledError:
        await saving
        raise
    finally:
        folder.saved()


class StepCheckpoints:
    """Saves the steps of a run, and scores those that are due."""

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        learner: SavedLearner,
        stream: GroupStream,
        fleet: ElasticFleet[Any],
        observers: Observers,
    ) -> None:
        self._spec, self._folder = spec, folder
        self._learner, self._stream, self._fleet = learner, stream, fleet
        self._observers = observers
        self._saved = -1

    def on_step(self, step: int) -> None:
        """Hold the stream before a step that is evaluated.

        Called before any worker can load the step's weights: none begins a training episode with them.
        """
        if self._is_evaluated(step):
            self._stream.hold()

    def go_back(self) -> None:
        """The run goes back to a checkpoint: later steps are saved again."""
        self._saved = -1

    async def on_checkpoint(self, state: TrainState) -> None:
        """Save ``state``, and evaluate it if that is due. Raises SaveError.

        A second call for a step does nothing: the run was stopped while it evaluated that step. A run that is
        told to stop saves and evaluates no more.
        """
        if state.step == self._saved:
            return
        self._saved = state.step
        await save_state(self._folder, self._spec.config, self._learner, state)
        task = asyncio.current_task()
        is_stopping = task is not None and task.cancelling() > 0
        if self._is_evaluated(state.step) and not is_stopping:
            await self._evaluate(state.step, state.version)

    def _is_evaluated(self, step: int) -> bool:
        every = self._spec.config.train.evaluate_every
        return every > 0 and step % every == 0

    async def _evaluate(self, step: int, version: PolicyVersion) -> None:
        """Measure the step. A fleet that cannot be kept up costs the step its score first."""
        config, display = self._spec.config, self._observers.display
        tasks = self._spec.eval_tasks[: config.train.evaluate_tasks]
        row = evaluation_rows(config)["after_rl"]
        row = replace(row, label=f"{row.label} at step {step}")
        await self._stream.settled()  # in_flight refreshes leave groups of the last step running
        await self._fleet.finish()
        try:
            with display.counting(f"evaluate {row.label}", len(tasks)) as counter:
                seats = FleetPool(self._fleet, version).seats
                watched = self._observers.recorder.watch(seats, config, step)
                result = await evaluate_row(row, tasks, watched, config.engine.slots, counter.advance)
        except ClusterError as error:
            display.say(f"step {step} has no held-out score: {error}")
        else:
            self._save_score(step, result)
        await self._fleet.load_again()
        self._stream.release()

    def _save_score(self, step: int, result: RowResult) -> None:
        say, keep = self._observers.display.say, self._spec.config.train.keep_checkpoints
        name = primary_score(result.episodes)
        scores = result.values(name)
        figures = row_metrics(result, METRICS)
        if step < self._spec.config.train.steps:  # else the row after RL follows, over all tasks
            figures |= summary_metrics(result)
        self._observers.tracker.log(figures, step)
        if not scores:
            why = result.failed[0] if result.failed else "no worker serves"
            say(f"step {step} has no held-out score: none of its episodes was finished ({why})")
            return
        mean = sum(scores) / len(scores)
        folder = self._folder
        best = score_checkpoint(folder.path, step, name, mean, len(scores), keep, folder.in_use)
        folder.saved()
        failed = f", {len(result.failed)} episodes failed" if result.failed else ""
        kept = " (the best so far: kept)" if best else ""
        say(f"step {step}: held-out {mean_text(name, mean)} of {len(scores)} tasks{failed}{kept}")
