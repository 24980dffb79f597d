"""Keeps the rollout workers of a running training refreshed, watched and as many as wanted.

    begin(weights) --> each healthy worker in turn: pause, drain, refresh, resume   (the others work on)
    lost(name)     --> kill it; others get its tasks; a new worker starts, loads the newest weights, serves
    wanted()       --> more workers are started, or the newest are drained and ended

state.py holds the states and what follows from them; this file does it with real workers. A worker drains
itself (actors/worker.py): it starts no group until it has the new weights. The stream only stops giving it
tasks. Each wait has a deadline of the worker's own calls. A failure of the watch itself reaches the loop
through the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from actors.engine.step_loop import PHASES
from actors.types import PolicyVersion
from actors.worker import WorkerReport
from cluster.common.errors import ClusterError, FleetError, WeightsLost
from cluster.common.patience import backoff_s, within
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.contract import GroupSource
from cluster.fleet.state import SERVING, FleetState
from cluster.fleet.stream import GroupStream


class ElasticWorker(GroupSource, Protocol):
    """A rollout worker as the fleet sees it. All calls raise ClusterError when it is lost or late."""

    async def ready(self) -> None:
        """Wait until it is up."""
        ...

    async def drain(self) -> None:
        """Wait until its groups have ended. It starts none until ``refresh``."""
        ...

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        """Load ``weights`` and go on."""
        ...

    async def report(self) -> WorkerReport: ...

    def kill(self) -> None: ...


Worker = TypeVar("Worker", bound=ElasticWorker)


@dataclass(frozen=True, slots=True, eq=False)
class FleetPlan(Generic[Worker]):
    """``launch`` starts a worker of that name, without waiting (None: a lost worker ends the run).

    ``wanted`` says each second how many there should be. ``version`` is what a newly started worker serves.
    ``at_once`` bounds how many refresh together; ``in_flight``: they go on with their groups meanwhile.
    """

    launch: Callable[[str], Worker] | None
    wanted: Callable[[], int]
    version: PolicyVersion
    at_once: int
    health_s: float
    say: Callable[[str], None]
    in_flight: bool


class ElasticFleet(Generic[Worker]):
    """The workers of a run, on one asyncio loop.

    It is built with workers that are up, all at ``newest`` or, when that is None, at the plan's version.
    """

    def __init__(
        self, workers: Sequence[Worker], plan: FleetPlan[Worker], newest: ObjectStoreWeights | None
    ) -> None:
        self.state = FleetState(len(workers))
        self._plan = plan
        self._workers = {worker.name: worker for worker in workers}
        self._turn = asyncio.Semaphore(plan.at_once)
        self._newest = newest
        self._published = asyncio.Event()  # cleared while the newest weights are lost
        self._published.set()
        self._background: set[asyncio.Task[None]] = set()
        self._rolls: dict[str, asyncio.Task[None]] = {}
        self.reports: dict[str, WorkerReport] = {}  # of each worker's last refresh
        self._counted: dict[str, WorkerReport] = {}  # what ``phase_seconds`` has counted up to
        for name in self._workers:
            self.state.launch(name)
            self.state.ready(name)
            self.state.refreshed(name, plan.version if newest is None else newest.version)

    async def start(self, stream: GroupStream) -> None:
        """Watch the workers, to which ``stream`` gives tasks. One that died before is replaced.

        The stream was built with ``lost`` and ``state.progress`` among its calls.
        """
        self._stream = stream
        await asyncio.gather(*(self._count(worker) for worker in list(self._workers.values())))
        self._spawn(self._watch)

    def phase_seconds(self) -> dict[str, float]:
        """Seconds of the workers' step threads by phase, up to their last refresh, since the call before.

        All 0 without a refresh in between.
        """
        seconds = phase_seconds(self._counted, self.reports)
        self._counted = self._counted | self.reports
        return seconds

    def metrics(self) -> dict[str, float]:
        """Workers that are wanted, that serve or refresh, and that were lost and replaced in this run."""
        counts, state = self.state.counts(), self.state
        serving = counts["healthy"] + counts["suspect"] + counts["refreshing"]
        figures = {"wanted": state.target, "serving": serving, "lost": state.lost, "replaced": state.replaced}
        return {f"fleet/{name}": float(value) for name, value in figures.items()}

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers that serve now."""
        return tuple(worker for name, worker in self._workers.items() if self._serves(name))

    def begin(self, weights: ObjectStoreWeights) -> None:
        """Roll ``weights`` out in the background."""
        self._newest = weights
        self._published.set()
        for name in list(self._workers):
            self._roll_out(name)

    async def finish(self) -> None:
        """Wait until every worker that serves has the newest version, or is lost.

        Where none is left, wait until a new one serves: an evaluation may follow. Raises WeightsLost. Other
        failures have been handed to the stream, which ends the wait, and a start has its own deadline.
        """
        while rolls := [roll for roll in self._rolls.values() if not roll.done()]:
            await asyncio.wait(rolls, timeout=0.1)
            if not self._published.is_set():
                assert self._newest is not None
                raise WeightsLost(self._newest.version)
        while not self.workers and self.state.counts() & Counter(("starting", "refreshing")):
            if self._stream.has_failed:
                return
            await asyncio.sleep(0.1)

    async def load_again(self) -> None:
        """Load the newest weights once more everywhere: the workers' caches are then those of a new start."""
        if self._newest is not None:
            self.begin(self._newest)
        await self.finish()

    async def close(self) -> None:
        """Stop watching and refreshing. The workers stay up."""
        tasks = [*self._background, *self._rolls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _count(self, worker: Worker) -> None:
        try:
            self._counted[worker.name] = await worker.report()
        except ClusterError as error:
            self.lost(worker.name, error)

    def _wait_for_weights(self, error: WeightsLost) -> None:
        """The workers are whole, but there is nothing to load.

        They wait for ``begin``, or for ``close``: the main loop is told, and publishes again or ends.
        """
        if self._newest is not None and error.version == self._newest.version:
            self._published.clear()
            self._stream.fail(error)

    # --- lost, missing and surplus workers ----------------------------------------------------------------

    def lost(self, name: str, error: Exception) -> None:
        """A call to ``name`` failed: end it and start another. Its tasks have gone back to the stream."""
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
                    f"{self.state.lost} rollout workers died and no group arrived in between, "
                    f"so no more are started: {causes}"
                )
            )
        else:
            self._plan.say(
                f"{name} is lost ({error}): its tasks go to others, and a new worker takes its place"
            )
            self._reconcile()

    def _reconcile(self) -> None:
        """Start what is missing, end what is too many."""
        change = self.state.plan()
        for _ in range(change.launch):
            name = self.state.next_name()
            self.state.launch(name)
            self._spawn(self._bring_up, name)
        for name in change.drain:
            if name not in self._rolls or self._rolls[name].done():  # else its roll ends it in its turn
                self._end(name)

    async def _bring_up(self, name: str) -> None:
        """Start a worker, after a pause where others died, load the newest weights, then let it serve.

        Weights that come meanwhile are loaded too.
        """
        assert self._plan.launch is not None, "a fleet that cannot launch never wants more workers"
        await asyncio.sleep(backoff_s(self.state.losses_in_a_row))
        worker = self._workers[name] = self._plan.launch(name)
        try:
            await worker.ready()
            self.state.ready(name)
            served: ObjectStoreWeights | None = None
            while self._newest is not served:
                await self._published.wait()
                served = self._newest
                assert served is not None
                try:
                    report = await worker.refresh(served)
                except WeightsLost as error:
                    self._wait_for_weights(error)
                    served = None
                    continue
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

    def _end(self, name: str) -> None:
        self.state.drain(name)
        self._spawn(self._end_when_delivered, name)

    async def _end_when_delivered(self, name: str) -> None:
        """End a worker that is no longer wanted, once its last group has arrived here."""
        self._stream.pause(name)
        await self._stream.delivered(name)
        worker = self._workers.pop(name, None)
        if worker is not None and self.state.lose(name, "no longer wanted"):
            self._stream.remove(name)
            worker.kill()
            self._plan.say(f"{name} has ended: {self.state.target} workers are wanted")

    # --- new weights --------------------------------------------------------------------------------------

    def _roll_out(self, name: str) -> None:
        """Refresh a worker that serves. A starting worker takes the newest weights anyway."""
        running = name in self._rolls and not self._rolls[name].done()
        if not running and self._serves(name):
            self._rolls[name] = asyncio.create_task(self._guarded(self._roll, name))

    async def _roll(self, name: str) -> None:
        """Refresh a worker in its turn, until it serves the newest version."""
        served: ObjectStoreWeights | None = None
        while self._newest is not served and name in self._workers:
            async with self._turn:
                if not self._serves(name):
                    return
                if name in self.state.plan().drain:
                    self._end(name)
                    return
                try:
                    served = await self._refresh(self._workers[name])
                except WeightsLost as error:
                    self.state.unrefreshed(name)
                    self._wait_for_weights(error)
                except ClusterError as error:
                    self.lost(name, error)
                    return
            await self._published.wait()

    async def _refresh(self, worker: Worker) -> ObjectStoreWeights:
        """Bring the newest weights to a worker. Returns them."""
        self.state.refresh(worker.name)
        began = time.monotonic()
        if not self._plan.in_flight:
            self._stream.pause(worker.name)
            # A task that was issued just before may reach the worker after the drain. It waits at the gate
            # there and runs under the new version: fresher than it was issued for.
            await worker.drain()
        drain_s = time.monotonic() - began
        # Chosen after the drain: a worker with long episodes keeps no old version alive, and loads none.
        weights = self._newest
        assert weights is not None, "begin was called"
        if worker.name not in self._workers:
            return weights  # it was lost while its groups ended
        report = await worker.refresh(weights)
        if worker.name in self._workers:
            self.reports[worker.name] = replace(report, drain_s=drain_s + report.drain_s)
            self.state.refreshed(worker.name, weights.version)
            self._stream.resume(worker.name, weights.version)
        return weights

    # --- the watch ----------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Ask each second how many workers are wanted, and each ``health_s`` whether every worker answers."""
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

    async def _check(self, worker: Worker) -> None:
        """Ask a worker for its report. It is lost when two checks in a row fail."""
        try:
            await within(self._plan.health_s, worker.report())
        except (ClusterError, TimeoutError) as error:
            if worker.name in self._workers and self.state.missed(worker.name):
                late = f"{worker.name} did not answer two health checks of {self._plan.health_s:g} s"
                self.lost(worker.name, ClusterError(late if isinstance(error, TimeoutError) else str(error)))
        else:
            if worker.name in self._workers:
                self.state.answered(worker.name)

    def _serves(self, name: str) -> bool:
        return self.state.members[name].state in SERVING

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *names: str) -> None:
        task = asyncio.create_task(self._guarded(work, *names))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _guarded(self, work: Callable[..., Coroutine[Any, Any, None]], *names: str) -> None:
        # ``work`` is called here, not by the caller: the coroutine of a task that is cancelled before it
        # starts would never be awaited.
        try:
            await work(*names)
        except Exception as error:  # noqa: BLE001  any background failure must reach the loop
            self._stream.fail(error)


def phase_seconds(before: Mapping[str, WorkerReport], after: Mapping[str, WorkerReport]) -> dict[str, float]:
    """Seconds of the workers' step threads by phase, between two reports of each worker.

    A worker that is new or was replaced counts from its start.
    """
    spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for name, report in after.items():
        earlier = before[name].engine.seconds if name in before else {}
        restarted = any(seconds > report.engine.seconds.get(phase, 0.0) for phase, seconds in earlier.items())
        for phase, seconds in report.engine.seconds.items():
            spent[phase] += seconds if restarted else seconds - earlier.get(phase, 0.0)
    return spent
