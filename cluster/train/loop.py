"""The training loop.

           stream.take() ---- Batch ----> learner.step() ---- version n+1 ----> channel.publish()
             ^    |  gate: staleness                                                  |
             |    '--- fill: tasks, bounded by what will still be fresh               v  handle
   summaries |         |                                             roll: pause, drain, refresh, resume
             |         v                                                              |
          rollout workers (run through all of this, each on one version) <------------'

The groups themselves (tokens, fast weights) go from the workers' object store straight to the learner: here they are references.

Every wait, and who unblocks it:
    stream.take       a worker that finishes a group; a fleet that cannot be kept up (it raises here); train.group_timeout_s without any event;
                      then the learner's nodes having the groups, or learner.step_timeout_s
    learner.step      the learner, or learner.step_timeout_s
    channel.publish   the learner handing out its weights, or learner.step_timeout_s
    refreshing        in the background, awaited after the last step: each worker drains and loads under train.group_timeout_s + refresh deadline

With max_staleness 0 the stream issues nothing for the next step until a worker has the new version: strictly on-policy. With more, workers go on
under the old version while the learner computes and while other workers are refreshed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from actors.types import TrajectoryGroup
from cluster.fleet.broadcast import Channel, WeightSource
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import ElasticFleet
from cluster.fleet.stream import Batch, GroupStream
from cluster.runs.checkpoint import TrainState
from cluster.tracking.tracker import Tracker
from cluster.train.metrics import StepSeconds, StepSummary, step_metrics, summarize, worker_metrics
from configs.schema import TrainConfig
from learner.types import StepReport

if TYPE_CHECKING:
    from ray import ObjectRef


class Trainer(WeightSource, Protocol):
    """What the loop asks of the learner. Blocking calls with their own deadlines: the loop runs them in a thread."""

    def missing(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> list[int]:
        """Bring ``groups`` to the learner; the places of those that are lost, with the node that held them."""
        ...

    def step(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> StepReport: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoopParts:
    """What build.py wires together. ``on_step`` shows a step and what it was made of; ``on_checkpoint`` saves everything."""

    stream: GroupStream
    trainer: Trainer
    fleet: ElasticFleet
    channel: Channel
    tracker: Tracker
    on_step: Callable[[StepSummary, Batch], None]
    on_checkpoint: Callable[[TrainState], Awaitable[None]]


async def run_loop(parts: LoopParts, plan: TrainConfig, state: TrainState) -> TrainState:
    """Train from ``state`` to ``plan.steps``; returns the last state. The workers then serve its version.

    Cancelled (Ctrl-C, SIGTERM), it ends the learner step that is running, saves what no checkpoint holds yet, and goes on being cancelled.
    """
    stream, fleet, saved = parts.stream, parts.fleet, state.step

    async def missing(groups: Sequence[FinishedGroup]) -> list[int]:
        return await asyncio.to_thread(parts.trainer.missing, [group.content for group in groups])

    stream.deliver(missing)
    try:
        await fleet.start(stream)
        while state.step < plan.steps:
            state = await _one_step(parts, state)
            if state.step % plan.checkpoint_every == 0 or state.step == plan.steps:
                await parts.on_checkpoint(state)
                saved = state.step
        await fleet.finish()
        fleet.log_timeline(parts.tracker, state.step)
        stream.raise_failure()
        return state
    except asyncio.CancelledError as stop:
        state = stop.state if isinstance(stop, _StoppedAfterStep) else state
        if state.step > saved:
            await parts.on_checkpoint(state)
        raise asyncio.CancelledError from None
    finally:
        await fleet.close()
        await stream.close()


class _StoppedAfterStep(asyncio.CancelledError):
    """The loop was cancelled while the learner computed; ``state`` is what its step led to."""

    def __init__(self, state: TrainState) -> None:
        super().__init__()
        self.state = state


async def _one_step(parts: LoopParts, state: TrainState) -> TrainState:
    """Take a batch, learn, publish. The learner is never left in the middle: its weights would be of no known step."""
    began = time.monotonic()
    batch = await parts.stream.take()
    learning = asyncio.create_task(_learn(parts, state, batch, began))
    try:
        return await asyncio.shield(learning)
    except asyncio.CancelledError:
        raise _StoppedAfterStep(await learning) from None


async def _learn(parts: LoopParts, state: TrainState, batch: Batch, began: float) -> TrainState:
    stream, fleet, step = parts.stream, parts.fleet, state.step + 1
    taken = time.monotonic()
    fleet.log_timeline(
        parts.tracker, state.step
    )  # a step's time on a worker ends when the worker has its weights
    report = await asyncio.to_thread(parts.trainer.step, [group.content for group in batch.groups])
    stream.trained(batch)
    learned = time.monotonic()
    weights = await asyncio.to_thread(parts.channel.publish, parts.trainer)
    published = time.monotonic()
    fleet.begin(weights)
    seconds = StepSeconds(taken - began, learned - taken, published - learned, time.monotonic() - began)
    summary = summarize(step, report, batch, seconds)
    figures = (
        step_metrics(report, batch, seconds, stream.ledger)
        | worker_metrics(list(fleet.reports.values()))
        | fleet.metrics()
    )
    parts.tracker.log(figures, step)
    parts.on_step(summary, batch)
    rewards = (*state.rewards, summary.reward)
    return replace(state, step=step, version=report.version, ledger=stream.ledger.snapshot(), rewards=rewards)
