"""The training loop.

           stream.take() ---- Batch ----> learner.step() ---- version n+1 ----> channel.publish()
             ^    |  gate: staleness                                                  |
             |    '--- fill: tasks, bounded by what will still be fresh               v  handle
   summaries |         |                                   roll: pause, drain, refresh, resume
             |         v                                                              |
          rollout workers (run through all of this, each on one version) <------------'

The groups themselves (tokens, fast weights) go from the workers' object store straight to the learner: here
they are references.

Every wait, and who unblocks it:
    stream.take       a worker that finishes a group; a fleet that cannot be kept up (it raises here);
                      train.group_timeout_s without any event; then the learner's nodes having the groups, or
                      learner.step_timeout_s
    learner.step      the learner, or learner.step_timeout_s
    channel.publish   the learner handing out its weights, or learner.step_timeout_s; a broadcast before that,
                      or its own deadline (fleet/collective.py)
    refreshing        in the background, awaited after the last step: each worker drains and loads under
                      train.group_timeout_s and the refresh deadline

A batch without any signal moves no weights: the step counts, but there is no new version to publish (an
evaluated step publishes the same one again).

With max_staleness 0 the stream issues nothing for the next step until a worker has the new version:
strictly on-policy. With more, workers go on under the old version while the learner computes and while
other workers are refreshed.

A lost learner starts again from the last checkpoint, and the steps since then are made again. The workers
end their groups meanwhile. They load the restored weights before they get a task.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from actors.types import PolicyVersion, TrajectoryGroup
from cluster.common.errors import WeightsLost
from cluster.fleet.broadcast import Channel, WeightSource
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import ElasticFleet
from cluster.fleet.stream import Batch, GroupStream
from cluster.runs.checkpoint import TrainState
from cluster.tracking.tracker import Tracker
from cluster.train.curriculum import Curriculum
from cluster.train.metrics import (
    StepSeconds,
    StepSummary,
    step_metrics,
    summarize,
    worker_metrics,
    worker_timeline,
)
from configs.schema import TrainConfig
from learner.types import LearnerLost, StepReport

if TYPE_CHECKING:
    from ray import ObjectRef


class Trainer(WeightSource, Protocol):
    """What the loop asks of the learner: blocking calls with their own deadlines, run in a thread."""

    def missing(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> list[int]:
        """Bring ``groups`` to the learner. Returns the places of those that were lost with their node."""
        ...

    def step(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> StepReport: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoopParts:
    """What build.py wires together.

    ``on_step`` shows a step and what it was made of; ``on_checkpoint`` saves everything. ``recover`` brings a
    lost learner back: given where the run stood, it returns where it stands, and the version of that
    checkpoint when it was saved. None: a lost learner ends the run.
    """

    stream: GroupStream
    trainer: Trainer
    fleet: ElasticFleet[Any]
    channel: Channel
    tracker: Tracker
    curriculum: Curriculum
    on_step: Callable[[StepSummary, Batch], None]
    on_checkpoint: Callable[[TrainState], Awaitable[None]]
    recover: Callable[[LearnerLost, TrainState], Awaitable[tuple[TrainState, PolicyVersion]]] | None = None


@dataclass(slots=True)
class _Progress:
    """Where the loop stands: ``state`` after the last step, and the step of the last checkpoint."""

    state: TrainState
    saved: int


def delivery(trainer: Trainer) -> Callable[[Sequence[FinishedGroup]], Awaitable[list[int]]]:
    """The stream's way to bring a batch to the trainer (StreamCalls.missing)."""

    async def missing(groups: Sequence[FinishedGroup]) -> list[int]:
        return await asyncio.to_thread(trainer.missing, [group.content for group in groups])

    return missing


async def run_loop(parts: LoopParts, plan: TrainConfig, state: TrainState) -> TrainState:
    """Train from ``state`` to ``plan.steps``. Returns the last state; the workers then serve its version.

    Cancelled (Ctrl-C, SIGTERM), it ends the learner step that is running, saves what no checkpoint holds
    yet, and goes on being cancelled.
    """
    stream, fleet, progress = parts.stream, parts.fleet, _Progress(state, saved=state.step)
    try:
        await fleet.start(stream)
        while True:
            try:
                if progress.state.step >= plan.steps:
                    await fleet.finish()
                    break
                await _one_step(parts, plan, progress)
                step = progress.state.step
                if step % plan.checkpoint_every == 0 or step == plan.steps:
                    await parts.on_checkpoint(progress.state)
                    progress.saved = step
            except (LearnerLost, WeightsLost) as error:
                progress.saved = progress.state.step  # without a learner there is nothing to save
                unless_stopped(error)
                await _start_again(parts, plan, progress, as_learner_lost(error))
        _log_worker_timeline(parts, progress.state.step)
        stream.raise_failure()
        return progress.state
    except asyncio.CancelledError:
        if progress.state.step > progress.saved:
            with suppress(LearnerLost):  # a signal that ends the driver often ends the ranks too
                await parts.on_checkpoint(progress.state)
        raise
    finally:
        await fleet.close()
        await stream.close()


def as_learner_lost(error: LearnerLost | WeightsLost) -> LearnerLost:
    """Weights are lost with the node of rank 0, whether or not the learner was asked since."""
    return error if isinstance(error, LearnerLost) else LearnerLost(str(error))


def unless_stopped(error: Exception) -> None:
    """Go on being cancelled where the learner was lost on the way: a stop is not undone by a restart."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError from error


async def _one_step(parts: LoopParts, plan: TrainConfig, progress: _Progress) -> None:
    """Take a batch, learn, publish."""
    began = time.monotonic()
    batch = await parts.stream.take()
    learning = asyncio.create_task(_learn(parts, plan, progress, batch, began))
    try:
        await asyncio.shield(learning)
    except asyncio.CancelledError:
        # The learner is never left in the middle of a step: its weights would belong to no known step.
        await learning
        raise


async def _start_again(parts: LoopParts, plan: TrainConfig, progress: _Progress, error: LearnerLost) -> None:
    """Bring the learner back, and go on from its last checkpoint. Raises LearnerError."""
    if parts.recover is None:
        raise error
    stream, fleet = parts.stream, parts.fleet
    stream.hold()
    while True:
        try:
            state, saved_version = await parts.recover(error, progress.state)
            progress.state, progress.saved = state, state.step  # a second loss counts on from here
            weights = await asyncio.to_thread(parts.channel.publish, parts.trainer)
            break
        except LearnerLost as again:  # while it handed out its weights
            error = again
    await stream.settled()
    stream.rewind(state.ledger, saved_version, state.version, plan.steps - state.step)
    parts.curriculum.progress = state.curriculum
    fleet.begin(weights)
    await fleet.finish()
    stream.release()


async def _learn(
    parts: LoopParts, plan: TrainConfig, progress: _Progress, batch: Batch, began: float
) -> None:
    """Train on ``batch``, begin the rollout of the new version, and log. Moves ``progress.state`` on."""
    stream, fleet, state = parts.stream, parts.fleet, progress.state
    step = state.step + 1
    taken = time.monotonic()
    _log_worker_timeline(parts, state.step)  # a step's time on a worker ends when the worker has its weights
    report = await asyncio.to_thread(parts.trainer.step, [group.content for group in batch.groups])
    stream.trained(batch, report.version)
    learned = time.monotonic()
    weights = None
    evaluated = plan.evaluate_every > 0 and step % plan.evaluate_every == 0
    # Without a signal the workers have these weights. But an evaluated step is a barrier, whatever it learnt.
    if report.version != state.version or evaluated:
        weights = await asyncio.to_thread(parts.channel.publish, parts.trainer)
    published = time.monotonic()
    if weights is not None:
        fleet.begin(weights)
    seconds = StepSeconds(taken - began, learned - taken, published - learned, time.monotonic() - began)
    summary = summarize(step, report, batch, seconds)
    figures = step_metrics(report, batch, seconds, stream.ledger, state.learner_restarts)
    figures |= worker_metrics(list(fleet.reports.values())) | fleet.metrics() | parts.channel.metrics()
    # No wait since ``begin``: no task of the next step was issued yet.
    figures |= parts.curriculum.after_step(step, figures, batch.positions)
    parts.tracker.log(figures, step)
    parts.on_step(summary, batch)
    progress.state = replace(
        state,
        step=step,
        version=report.version,
        ledger=stream.ledger.snapshot(),
        rewards=(*state.rewards, summary.reward),
        curriculum=parts.curriculum.progress,
    )


def _log_worker_timeline(parts: LoopParts, step: int) -> None:
    """Log where the workers' time went since the last call; nothing without a refresh in between."""
    if figures := worker_timeline(parts.fleet.phase_seconds()):
        parts.tracker.log(figures, step)
