"""The training loop.

           stream.take() ---- Batch ----> learner.step() ---- version n+1 ----> channel.publish()
             ^    |  gate: staleness                                                  |
             |    '--- fill: tasks, bounded by what will still be fresh               v  handle
      groups |         |                                             roll: pause, drain, refresh, resume
             |         v                                                              |
          rollout workers (run through all of this, each on one version) <------------'

Every wait, and who unblocks it:
    stream.take       a worker that finishes a group; a worker or refresh that fails (it raises here); train.group_timeout_s without any event
    learner.step      the learner, or learner.step_timeout_s
    channel.publish   the learner handing out its weights, or learner.step_timeout_s
    refreshing        the roll of the version before: each worker drains and loads under train.group_timeout_s + refresh deadline

With max_staleness 0 the stream issues nothing for the next step until a worker has the new version: strictly on-policy. With more, workers go on
under the old version while the learner computes and while other workers are refreshed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from actors.types import TrajectoryGroup
from actors.worker import WorkerReport
from cluster.broadcast import Channel, ObjectStoreWeights, WeightSource
from cluster.checkpoint import TrainState
from cluster.metrics import StepSeconds, StepSummary, step_metrics, summarize, worker_metrics
from cluster.stream import Batch, GroupSource, GroupStream
from cluster.tracking import Tracker
from configs.schema import TrainConfig
from learner.types import StepReport


class Trainer(WeightSource, Protocol):
    """What the loop asks of the learner. Blocking calls with their own deadlines: the loop runs them in a thread."""

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport: ...


class RefreshableSource(GroupSource, Protocol):
    """A rollout worker as the loop sees it."""

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        """Drain, load, go on. Raises ClusterError when the worker is lost or late."""
        ...


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


class Refresher:
    """Rolling refresh in the background, one version at a time. A failure reaches the loop through the stream."""

    def __init__(self, workers: Sequence[RefreshableSource], stream: GroupStream, at_once: int) -> None:
        self._workers, self._stream, self._limit = workers, stream, asyncio.Semaphore(at_once)
        self._running: asyncio.Task[None] | None = None
        self.reports: dict[str, WorkerReport] = {}  # of each worker's last refresh

    def begin(self, weights: ObjectStoreWeights) -> None:
        assert self._running is None, "finish the roll of the version before first"
        self._running = asyncio.create_task(self._roll(weights))

    async def finish(self) -> None:
        """Wait for the roll that began last. Its own failure has been handed to the stream and is raised by ``take``."""
        if self._running is not None:
            await self._running
            self._running = None

    def cancel(self) -> None:
        if self._running is not None:
            self._running.cancel()

    async def _roll(self, weights: ObjectStoreWeights) -> None:
        results = await asyncio.gather(*(self._one(worker, weights) for worker in self._workers), return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                self._stream.fail(result)

    async def _one(self, worker: RefreshableSource, weights: ObjectStoreWeights) -> None:
        async with self._limit:
            self._stream.pause(worker.name)
            self.reports[worker.name] = await worker.refresh(weights)
            self._stream.resume(worker.name, weights.version)


async def run_loop(parts: LoopParts, plan: TrainConfig, state: TrainState) -> TrainState:
    """Train from ``state`` to ``plan.steps``; returns the last state. The workers then serve its version."""
    stream = parts.stream
    at_once = len(parts.workers) if plan.max_staleness == 0 else max(1, len(parts.workers) // 2)
    refresher = Refresher(parts.workers, stream, at_once)
    try:
        for step in range(state.step + 1, plan.steps + 1):
            began = time.monotonic()
            batch: Batch = await stream.take()
            taken = time.monotonic()
            report = await asyncio.to_thread(parts.trainer.step, batch.groups)
            learned = time.monotonic()
            weights = await asyncio.to_thread(parts.channel.publish, parts.trainer)
            published = time.monotonic()
            await refresher.finish()
            refresher.begin(weights)
            seconds = StepSeconds(taken - began, learned - taken, published - learned, time.monotonic() - began)
            summary = summarize(step, report, batch, seconds)
            figures = step_metrics(report, batch, seconds, stream.ledger) | worker_metrics(list(refresher.reports.values()))
            parts.tracker.log(figures, step)
            parts.on_step(summary)
            rewards = (*state.rewards, summary.reward)
            state = replace(state, step=step, version=report.version, ledger=stream.ledger.snapshot(), rewards=rewards)
            if step % plan.checkpoint_every == 0 or step == plan.steps:
                await parts.on_checkpoint(state)
        await refresher.finish()
        stream.raise_failure()
        return state
    finally:
        refresher.cancel()
        await stream.close()
