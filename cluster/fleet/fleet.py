"""The rollout workers of a running training: refreshed, watched, replaced, added and removed while the loop goes on.

    begin(weights) --> each healthy worker in turn: pause, drain, refresh, resume          (rolling: the others work on; in flight: all do)
    lost(name)     --> kill it; its tasks go to others; a new one: start, refresh to the newest weights, only then serve
    wanted()       --> more workers are started, or the newest are drained and ended

The states and what follows from them are fleet_state.py's; this file does it with real workers. Every wait has a deadline of the worker's own calls;
a failure of the watch itself reaches the loop through the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from actors.types import PolicyVersion
from actors.worker import WorkerReport
from cluster.common.errors import ClusterError, FleetError
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.contract import GroupSource
from cluster.fleet.state import FleetState
from cluster.fleet.stream import GroupStream
from cluster.fleet.worker_timeline import worker_timeline
from cluster.tracking.tracker import Tracker


class ElasticWorker(GroupSource, Protocol):
    """A rollout worker as the fleet sees it. All raise ClusterError when it is lost or late."""

    async def ready(self) -> None:
        """Until it is up."""
        ...

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        """Drain, load, go on."""
        ...

    async def report(self) -> WorkerReport: ...

    def kill(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class FleetPlan:
    """``launch`` starts a worker of that name, without waiting (None: a lost worker ends the run). ``wanted`` says after each step and each second
    how many there should be. ``version`` is what a worker serves that was just started; ``at_once`` how many refresh together, ``in_flight`` whether
    they go on with their groups meanwhile."""

    launch: Callable[[str], ElasticWorker] | None
    wanted: Callable[[], int]
    version: PolicyVersion
    at_once: int
    health_s: float
    say: Callable[[str], None]
    in_flight: bool


class ElasticFleet:
    """Built with the workers that are up, all at ``newest`` or, when that is None, at the plan's version; lives on one asyncio loop."""

    def __init__(
        self, workers: Sequence[ElasticWorker], plan: FleetPlan, newest: ObjectStoreWeights | None
    ) -> None:
        self.state = FleetState(len(workers))
        self._plan = plan
        self._workers = {worker.name: worker for worker in workers}
        self._turn = asyncio.Semaphore(plan.at_once)
        self._newest = newest
        self._background: set[asyncio.Task[None]] = set()
        self._rolls: dict[str, asyncio.Task[None]] = {}
        self.reports: dict[str, WorkerReport] = {}  # of each worker's last refresh
        self._counted: dict[str, WorkerReport] = {}
        for name in self._workers:
            self.state.launch(name)
            self.state.ready(name)
            self.state.refreshed(name, plan.version if newest is None else newest.version)

    async def start(self, stream: GroupStream) -> None:
        """The stream gives tasks to these workers from now on, and says which it lost. Raises ClusterError."""
        self._stream = stream
        stream.listen(self.lost, self.state.progress)
        reports = await asyncio.gather(*(worker.report() for worker in self._workers.values()))
        self._counted = {report.name: report for report in reports}
        self._spawn(self._watch)

    def log_timeline(self, tracker: Tracker, step: int) -> None:
        """Where the workers' time went up to their last refresh, since the call before. Nothing without a refresh in between."""
        timeline, self._counted = worker_timeline(self._counted, self.reports), self._counted | self.reports
        if timeline:
            tracker.log(timeline, step)

    def metrics(self) -> dict[str, float]:
        """Workers wanted, serving (or about to, with newer weights), and over the whole run lost and replaced."""
        counts, state = self.state.counts(), self.state
        serving = counts["healthy"] + counts["suspect"] + counts["refreshing"]
        figures = {"wanted": state.target, "serving": serving, "lost": state.lost, "replaced": state.replaced}
        return {f"fleet/{name}": float(value) for name, value in figures.items()}

    def begin(self, weights: ObjectStoreWeights) -> None:
        """Roll ``weights`` out in the background."""
        self._newest = weights
        for name in list(self._workers):
            self._roll_out(name)

    async def finish(self) -> None:
        """Until every worker that serves has the newest version, or is lost; where none is left, until a new one serves: an evaluation may follow.

        Raises nothing: failures have been handed to the stream, and a start has its own deadline.
        """
        while rolls := [roll for roll in self._rolls.values() if not roll.done()]:
            await asyncio.gather(*rolls, return_exceptions=True)
        while not self.workers and self.state.counts() & Counter(("starting", "refreshing")):
            await asyncio.sleep(0.1)

    async def load_again(self) -> None:
        """Every worker that serves loads the newest weights once more: its caches are then those of one that has just started with them."""
        if self._newest is not None:
            self.begin(self._newest)
        await self.finish()

    async def close(self) -> None:
        """Stop watching and refreshing. The workers stay up."""
        tasks = [*self._background, *self._rolls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def workers(self) -> tuple[ElasticWorker, ...]:
        """Those that serve now."""
        return tuple(
            worker
            for name, worker in self._workers.items()
            if self.state.members[name].state in ("healthy", "suspect")
        )

    def lost(self, name: str, error: Exception) -> None:
        """A call to ``name`` failed: it is ended, its tasks have gone back, and another takes its place."""
        if not self.state.lose(name, str(error)):
            return
        worker = self._workers.pop(name)
        self.reports.pop(name, None)
        self._counted.pop(name, None)
        self._stream.remove(name)
        worker.kill()
        if self._plan.launch is None:
            self._stream.fail(error)
        elif self.state.hopeless:
            causes = "; ".join(self.state.reasons()[-3:])
            self._stream.fail(
                FleetError(
                    f"{self.state.lost} rollout workers died and no group arrived in between, so no more are started: {causes}"
                )
            )
        else:
            self._plan.say(
                f"{name} is lost ({error}): its tasks go to others, and a new worker takes its place"
            )
            self._reconcile()

    def _reconcile(self) -> None:
        change = self.state.plan()
        for _ in range(change.launch):
            name = self.state.next_name()
            self.state.launch(name)
            self._spawn(self._bring_up, name)
        for name in change.drain:
            if (
                name not in self._rolls or self._rolls[name].done()
            ):  # one that awaits its refresh is drained in its place
                self._end(name)

    def _end(self, name: str) -> None:
        self.state.drain(name)
        self._spawn(self._drain, name)

    async def _bring_up(self, name: str) -> None:
        """Start, load the newest weights (and those that came meanwhile), then serve."""
        assert self._plan.launch is not None, "a fleet that cannot launch never wants more workers"
        worker = self._workers[name] = self._plan.launch(name)
        try:
            await worker.ready()
            self.state.ready(name)
            served: ObjectStoreWeights | None = None
            while self._newest is not served:
                served = self._newest
                assert served is not None
                report = await worker.refresh(served)
                if self._workers.get(name) is not worker:  # a health check declared it lost meanwhile
                    return
                self.reports[name] = report
        except ClusterError as error:
            self.lost(name, error)
            return
        version = self._plan.version if served is None else served.version
        self.state.refreshed(name, version)
        self._stream.add(worker, version)
        self._plan.say(f"{name} serves version {version}")
        self._reconcile()  # fewer may be wanted by now

    async def _drain(self, name: str) -> None:
        """End ``name`` once it has no group left."""
        self._stream.pause(name)
        await self._stream.drained(name)
        worker = self._workers.pop(name, None)
        if worker is not None and self.state.lose(name, "no longer wanted"):
            self._stream.remove(name)
            worker.kill()
            self._plan.say(f"{name} has ended: {self.state.target} workers are wanted")

    def _roll_out(self, name: str) -> None:
        """Starting and draining workers are left alone: the first take the newest weights before they serve, the second end."""
        running = name in self._rolls and not self._rolls[name].done()
        if not running and self.state.members[name].state in ("healthy", "suspect"):
            self._rolls[name] = asyncio.create_task(self._guarded(self._roll, self._workers[name]))

    async def _roll(self, worker: ElasticWorker) -> None:
        """The version is chosen after the drain: no old one is kept for a worker with long episodes, and none is loaded that is old already."""
        served: ObjectStoreWeights | None = None
        while self._newest is not served and worker.name in self._workers:
            async with self._turn:
                if self.state.members[worker.name].state not in ("healthy", "suspect"):
                    return
                if worker.name in self.state.plan().drain:
                    self._end(worker.name)
                    return
                try:
                    served = await self._refresh(worker)
                except ClusterError as error:
                    self.lost(worker.name, error)
                    return

    async def _refresh(self, worker: ElasticWorker) -> ObjectStoreWeights:
        self.state.refresh(worker.name)
        began = time.monotonic()
        if not self._plan.in_flight:
            self._stream.pause(worker.name)
            await self._stream.drained(worker.name)
        waited = time.monotonic() - began
        weights = self._newest
        assert weights is not None, "begin was called"
        if worker.name not in self._workers:
            return weights  # it was lost while its groups ended
        report = await worker.refresh(weights)
        if worker.name in self._workers:
            self.reports[worker.name] = replace(report, drain_s=waited + report.drain_s)
            self.state.refreshed(worker.name, weights.version)
            self._stream.resume(worker.name, weights.version)
        return weights

    async def _watch(self) -> None:
        """Each second: is another number of workers wanted? Each ``health_s``: does everyone answer?"""
        checked = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            wanted = self._plan.wanted()
            if wanted != self.state.target and self._plan.launch is not None:
                self._plan.say(f"{wanted} rollout workers are wanted, there were {self.state.target}")
                self.state.target = wanted
                self._reconcile()
            if time.monotonic() - checked >= self._plan.health_s:
                up = [
                    worker
                    for name, worker in self._workers.items()
                    if self.state.members[name].state != "starting"
                ]
                await asyncio.gather(*(self._check(worker) for worker in up))
                checked = time.monotonic()

    async def _check(self, worker: ElasticWorker) -> None:
        try:
            await asyncio.wait_for(worker.report(), self._plan.health_s)
        except (ClusterError, TimeoutError) as error:
            if worker.name in self._workers and self.state.missed(worker.name):
                late = isinstance(error, TimeoutError)
                reason = (
                    f"{worker.name} did not answer two health checks of {self._plan.health_s:g} s"
                    if late
                    else str(error)
                )
                self.lost(worker.name, ClusterError(reason))
        else:
            if worker.name in self._workers:
                self.state.answered(worker.name)

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: str) -> None:
        task = asyncio.create_task(self._guarded(work, *arguments))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _guarded(
        self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: str | ElasticWorker
    ) -> None:
        try:
            await work(
                *arguments
            )  # called here: a coroutine made by the caller would never be awaited when its task is cancelled before it starts
        except Exception as error:  # noqa: BLE001  a background failure of any kind must reach the loop, not die with its task
            self._stream.fail(error)
