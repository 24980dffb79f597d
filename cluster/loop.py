"""The training loop.

           stream.take() ---- Batch ----> learner.step() ---- version n+1 ----> channel.publish()
             ^    |  gate: staleness                                                  |
             |    '--- fill: tasks, bounded by what will still be fresh               v  handle
   summaries |         |                                             roll: pause, drain, refresh, resume
             |         v                                                              |
          rollout workers (run through all of this, each on one version) <------------'

The groups themselves (tokens, fast weights) go from the workers' object store straight to the learner: here they are references.

Every wait, and who unblocks it:
    stream.take       a worker that finishes a group; a worker or refresh that fails (it raises here); train.group_timeout_s without any event
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
from cluster.broadcast import Channel, WeightSource
from cluster.checkpoint import TrainState
from cluster.metrics import StepSeconds, StepSummary, step_metrics, summarize, worker_metrics
from cluster.refresh import RefreshableSource, Refresher
from cluster.stream import Batch, GroupStream
from cluster.tracking import Tracker
from configs.schema import TrainConfig
from learner.types import StepReport

if TYPE_CHECKING:
    from ray import ObjectRef


class Trainer(WeightSource, Protocol):
    """What the loop asks of the learner. Blocking calls with their own deadlines: the loop runs them in a thread."""

    def step(self, groups: Sequence[ObjectRef[TrajectoryGroup]]) -> StepReport: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoopParts:
    """What build.py wires together. ``on_step`` shows a step to the user; ``on_checkpoint`` saves everything."""

    stream: GroupStream
    trainer: Trainer
    workers: Sequence[RefreshableSource]
    channel: Channel
    tracker: Tracker
    on_step: Callable[[StepSummary], None]
    on_checkpoint: Callable[[TrainState], Awaitable[None]]


async def run_loop(parts: LoopParts, plan: TrainConfig, state: TrainState) -> TrainState:
    """Train from ``state`` to ``plan.steps``; returns the last state. The workers then serve its version."""
    stream = parts.stream
    at_once = len(parts.workers) if plan.max_staleness == 0 else max(1, len(parts.workers) // 2)
    refresher = Refresher(parts.workers, stream, at_once)
    try:
        await refresher.start()
        for step in range(state.step + 1, plan.steps + 1):
            began = time.monotonic()
            batch: Batch = await stream.take()
            taken = time.monotonic()
            refresher.log_timeline(parts.tracker, step - 1)  # a step's time on a worker ends when the worker has its weights
            report = await asyncio.to_thread(parts.trainer.step, [group.content for group in batch.groups])
            learned = time.monotonic()
            weights = await asyncio.to_thread(parts.channel.publish, parts.trainer)
            published = time.monotonic()
            refresher.begin(weights)
            seconds = StepSeconds(taken - began, learned - taken, published - learned, time.monotonic() - began)
            summary = summarize(step, report, batch, seconds)
            figures = step_metrics(report, batch, seconds, stream.ledger) | worker_metrics(list(refresher.reports.values()))
            parts.tracker.log(figures, step)
            parts.on_step(summary)
            del batch  # its groups leave the object store while the next ones come
            rewards = (*state.rewards, summary.reward)
            state = replace(state, step=step, version=report.version, ledger=stream.ledger.snapshot(), rewards=rewards)
            if step % plan.checkpoint_every == 0 or step == plan.steps:
                await parts.on_checkpoint(state)
        await refresher.finish()
        refresher.log_timeline(parts.tracker, state.step)
        stream.raise_failure()
        return state
    finally:
        refresher.cancel()
        await stream.close()
