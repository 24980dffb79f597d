"""What happens at a checkpoint of the training loop: the step is saved, and every ``train.evaluate_every`` steps measured on held-out tasks.

    learner step --> hold the stream --> workers refreshed --> save --> evaluate --> note the score --> refresh again --> release the stream

An evaluated step is a barrier: no training episode runs beside the evaluation, and the second refresh leaves the workers as those of a resumed run
are (empty caches), so that training goes on the same, to the bit, whether the run was interrupted there or not.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from cluster.common.display import Display
from cluster.common.errors import ClusterError
from cluster.fleet.fleet import ElasticFleet
from cluster.fleet.stream import GroupStream
from cluster.measure.rows import EpisodeSource, EvaluationRow, RowResult, evaluate_row, row_metrics
from cluster.runs.checkpoint import TrainState, save_checkpoint, score_checkpoint
from cluster.tracking.tracker import Tracker
from cluster.train.prepare import Preparation
from configs.load import to_yaml

METRICS = "held_out"  # eval/held_out/f1 over the steps


class SavedLearner(Protocol):
    """What saving asks of the learner: blocking, with a deadline of its own."""

    def save(self, folder: str) -> None: ...


async def save_state(preparation: Preparation, learner: SavedLearner, state: TrainState) -> None:
    """A checkpoint of ``state``, ended once it is begun: who is cancelled meanwhile hears of it afterwards. Raises SaveError."""
    config = preparation.config
    write = save_checkpoint(
        preparation.run_dir,
        state,
        to_yaml(config),
        lambda folder: asyncio.to_thread(learner.save, str(folder)),
        config.train.keep_checkpoints,
    )
    saving = asyncio.create_task(write)
    try:
        await asyncio.shield(saving)
    except asyncio.CancelledError:
        await saving
        raise


class Keeper:
    """Saves the steps of a run and remembers how good they are.

    ``row`` is what the run trains (it gets a label for each evaluation), ``sources`` the workers that serve when they are asked for.
    """

    def __init__(
        self,
        preparation: Preparation,
        learner: SavedLearner,
        stream: GroupStream,
        fleet: ElasticFleet,
        tracker: Tracker,
        display: Display,
        row: EvaluationRow,
        sources: Callable[[], Sequence[EpisodeSource]],
    ) -> None:
        self._preparation, self._learner = preparation, learner
        self._stream, self._fleet = stream, fleet
        self._tracker, self._display = tracker, display
        self._row, self._sources = row, sources
        self._saved = -1

    def on_step(self, step: int) -> None:
        """Called before any worker can load the step's weights: none of them begins a training episode before it is evaluated."""
        if self._evaluates(step):
            self._stream.hold()

    async def on_checkpoint(self, state: TrainState) -> None:
        """Raises SaveError. Asked a second time for a step (the run was stopped while it was evaluated) it does nothing."""
        if state.step == self._saved:
            return
        self._saved = state.step
        await save_state(self._preparation, self._learner, state)
        if self._evaluates(state.step):
            await self._evaluate(state.step)

    def _evaluates(self, step: int) -> bool:
        every = self._preparation.config.train.evaluate_every
        return every > 0 and step % every == 0

    async def _evaluate(self, step: int) -> None:
        """A worker that is lost costs the step its score, not the run."""
        config = self._preparation.config
        tasks = self._preparation.eval_tasks[: config.train.evaluate_tasks]
        row = replace(self._row, label=f"{self._row.label} at step {step}")
        await self._fleet.finish()
        try:
            with self._display.counting(f"evaluate {row.label}", len(tasks)) as counter:
                result = await evaluate_row(row, tasks, self._sources(), config.engine.slots, counter.advance)
        except ClusterError as error:
            self._display.say(f"step {step} has no held-out score: {error}")
        else:
            self._note(step, result)
        await self._fleet.load_again()
        self._stream.release()

    def _note(self, step: int, result: RowResult) -> None:
        scores = [score for episode in result.episodes if math.isfinite(score := episode.mean("f1"))]
        self._tracker.log(row_metrics(result, METRICS), step)
        if not scores:
            why = result.failed[0] if result.failed else "no worker serves"
            self._display.say(f"step {step} has no held-out score: none of its episodes was finished ({why})")
            return
        f1, keep = sum(scores) / len(scores), self._preparation.config.train.keep_checkpoints
        best = score_checkpoint(self._preparation.run_dir, step, f1, len(scores), keep)
        failed = f", {len(result.failed)} episodes failed" if result.failed else ""
        self._display.say(
            f"step {step}: held-out F1 {100 * f1:.1f} % of {len(scores)} tasks{failed}{' (the best so far: kept)' if best else ''}"
        )
