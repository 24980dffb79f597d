"""New weights to the workers while they work: each drains and goes to the newest version when its turn comes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from actors.worker import WorkerReport
from cluster.broadcast import ObjectStoreWeights
from cluster.lanes import GroupSource
from cluster.metrics import worker_timeline
from cluster.stream import GroupStream
from cluster.tracking import Tracker


class RefreshableSource(GroupSource, Protocol):
    """A rollout worker as the loop sees it."""

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        """Drain, load, go on. Raises ClusterError when the worker is lost or late."""
        ...

    async def report(self) -> WorkerReport: ...


class Refresher:
    """Rolling refresh in the background: whenever its turn comes, a worker drains and goes to the newest version, past those it missed.

    The version is chosen after the drain: no old one is kept in memory for a worker with long episodes, and none is loaded that is old already.
    A failure reaches the loop through the stream.
    """

    def __init__(self, workers: Sequence[RefreshableSource], stream: GroupStream, at_once: int) -> None:
        self._workers, self._stream, self._turn = workers, stream, asyncio.Semaphore(at_once)
        self._newest: ObjectStoreWeights | None = None
        self._rolls: dict[str, asyncio.Task[None]] = {}
        self.reports: dict[str, WorkerReport] = {}  # of each worker's last refresh
        self._counted: dict[str, WorkerReport] = {}

    async def start(self) -> None:
        """The workers' timeline begins here. Raises ClusterError."""
        reports = await asyncio.gather(*(worker.report() for worker in self._workers))
        self._counted = {report.name: report for report in reports}

    def log_timeline(self, tracker: Tracker, step: int) -> None:
        """Where the workers' time went up to their last refresh, since the call before. Nothing without a refresh in between."""
        timeline, self._counted = worker_timeline(self._counted, self.reports), self._counted | self.reports
        if timeline:
            tracker.log(timeline, step)

    def begin(self, weights: ObjectStoreWeights) -> None:
        self._newest = weights
        for worker in self._workers:
            if worker.name not in self._rolls or self._rolls[worker.name].done():
                self._rolls[worker.name] = asyncio.create_task(self._roll(worker))

    async def finish(self) -> None:
        """Until every worker serves the newest version, or its failure has been handed to the stream."""
        await asyncio.gather(*self._rolls.values())

    def cancel(self) -> None:
        for roll in self._rolls.values():
            roll.cancel()

    async def _roll(self, worker: RefreshableSource) -> None:
        served: ObjectStoreWeights | None = None
        while (weights := self._newest) is not None and weights is not served:
            async with self._turn:
                try:
                    served = await self._refresh(worker)
                except Exception as error:  # noqa: BLE001  a background failure of any kind must reach the loop, not die with its task
                    self._stream.fail(error)
                    return

    async def _refresh(self, worker: RefreshableSource) -> ObjectStoreWeights | None:
        self._stream.pause(worker.name)
        began = time.monotonic()
        await self._stream.drained(worker.name)
        waited = time.monotonic() - began
        weights = self._newest
        assert weights is not None, "begin was called"
        report = await worker.refresh(weights)
        self.reports[worker.name] = replace(report, drain_s=waited + report.drain_s)
        self._stream.resume(worker.name, weights.version)
        return weights
