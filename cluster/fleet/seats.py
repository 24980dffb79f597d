"""Lets a stage without a stream outlive its workers: the start, an evaluation, the warm start.

    lane --> Seat.episode --> its worker
                 lost: the pool fills the seat again, and the task is played once more
    Pool: Crew, between RL stages: a new worker, after a pause, with the newest weights
          FleetPool, in the RL stage: the fleet replaces the worker, and another that serves has the seat

A task that has lost as many workers as the ledger allows is a failed episode, which is counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from actors.types import FailedEpisode, PolicyVersion, Task, TrajectoryGroup
from cluster.common.errors import FleetError, StartupError, WorkerDied, WorkerLost
from cluster.common.patience import backoff_s
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.fleet import ElasticFleet, ElasticWorker
from cluster.fleet.ledger import MOST_LOSSES
from cluster.measure.rows import EpisodeSource, EvaluationRow


class StageWorker(ElasticWorker, EpisodeSource, Protocol):
    """A rollout worker as the stages see it."""


Worker = TypeVar("Worker", bound=StageWorker)


class Pool(Protocol):
    """Who fills the seats."""

    @property
    def version(self) -> PolicyVersion:
        """What the workers serve."""
        ...

    def at(self, place: int) -> EpisodeSource: ...

    async def replace(self, worker: Any, error: WorkerLost) -> None:
        """Fill the seats of ``worker`` again. Raises ClusterError where that is hopeless."""
        ...

    def progress(self) -> None:
        """An episode arrived."""
        ...


class Seat:
    """A worker's place in an evaluation (measure.rows.EpisodeSource)."""

    def __init__(self, pool: Pool, place: int) -> None:
        self._pool, self._place = pool, place

    @property
    def name(self) -> str:
        return self._pool.at(self._place).name

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        """Play one episode of ``task``, on another worker where one is lost. Raises ClusterError."""
        losses = 0
        while True:
            worker = self._pool.at(self._place)
            try:
                group = await worker.episode(position, task, row)
            except WorkerLost as error:
                losses += 1
                await self._pool.replace(worker, error)
                if losses == MOST_LOSSES:
                    failed = FailedEpisode(task.id, f"{task.id}.lost", "worker", str(error))
                    return TrajectoryGroup(task, self._pool.version, (), (failed,), worker.name)
            else:
                self._pool.progress()
                return group


class Crew(Generic[Worker]):
    """The workers of a run while no fleet has them.

    ``launch`` starts one more, without waiting; ``newest`` are the weights that it loads, if there are any
    since the start. Losses without an episode in between are bounded.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        launch: Callable[[], Worker],
        newest: Callable[[], ObjectStoreWeights | None],
        say: Callable[[str], None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.workers = list(workers)
        self.lost = 0
        self._launch, self._newest, self._say, self._pause = launch, newest, say, pause
        self._in_a_row = 0
        self._replacing: dict[str, asyncio.Task[None]] = {}

    @property
    def seats(self) -> tuple[Seat, ...]:
        return tuple(Seat(self, place) for place in range(len(self.workers)))

    @property
    def version(self) -> PolicyVersion:
        newest = self._newest()
        return 0 if newest is None else newest.version

    def at(self, place: int) -> Worker:
        return self.workers[place]

    def progress(self) -> None:
        self._in_a_row = 0

    def adopt(self, workers: Sequence[Worker]) -> None:
        """Take over the workers that a fleet leaves."""
        self.workers = list(workers)

    async def start(self, all_ready: Callable[[Sequence[Worker]], Awaitable[None]]) -> None:
        """Wait until all are up; one whose process died on the way is started again. Raises StartupError."""
        while True:
            try:
                await all_ready(self.workers)
            except StartupError as error:
                died = error.__cause__
                if not isinstance(died, WorkerDied):
                    raise
                names = [worker.name for worker in self.workers]
                place = names.index(died.whom)
                try:
                    self._end(self.workers[place], str(died))
                except FleetError as hopeless:
                    raise StartupError(str(hopeless)) from died
                await self._pause(backoff_s(self._in_a_row))
                self.workers[place] = self._launch()
            else:
                self._in_a_row = 0
                return

    async def load(self, weights: ObjectStoreWeights) -> None:
        """Let every worker load ``weights``, which are the newest. Raises FleetError."""

        async def load(worker: Worker) -> None:
            try:
                await worker.refresh(weights)
            except WorkerLost as error:
                await self.replace(worker, error)

        try:
            async with asyncio.TaskGroup() as loads:
                for worker in self.workers:
                    loads.create_task(load(worker))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def replace(self, worker: Worker, error: WorkerLost) -> None:
        """Start another in its place; lanes that lost the same worker wait for the same one."""
        task = self._replacing.get(worker.name)
        if task is None:
            place = self.workers.index(worker)
            task = self._replacing[worker.name] = asyncio.create_task(self._replace(place, str(error)))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Start nothing more. The workers stay as they are."""
        for task in self._replacing.values():
            task.cancel()
        await asyncio.gather(*self._replacing.values(), return_exceptions=True)

    async def _replace(self, place: int, reason: str) -> None:
        """Start others until one is up. Until then the lost one keeps the place: lanes that ask it wait."""
        worker = self.workers[place]
        while True:
            self._end(worker, reason)
            await self._pause(backoff_s(self._in_a_row))
            worker = self._launch()
            try:
                await worker.ready()
                if (newest := self._newest()) is not None:
                    await worker.refresh(newest)
            except WorkerLost as error:
                reason = str(error)
            else:
                self.workers[place] = worker
                self._say(f"{worker.name} serves")
                return

    def _end(self, worker: Worker, reason: str) -> None:
        """End a lost worker. Raises FleetError where too many are lost in a row."""
        worker.kill()
        self.lost += 1
        self._in_a_row += 1
        if self._in_a_row > max(3, 2 * len(self.workers)):
            raise FleetError(
                f"{self._in_a_row} rollout workers died and no episode arrived in between, "
                f"so no more are started: {worker.name}: {reason}"
            )
        self._say(f"{worker.name} is lost ({reason}): a new worker takes its place, and its tasks")


class FleetPool(Generic[Worker]):
    """The seats of an evaluation in the RL stage: the workers that ``fleet`` has now, or will have."""

    def __init__(self, fleet: ElasticFleet[Worker], version: PolicyVersion) -> None:
        self._fleet, self.version = fleet, version
        self._workers = list(fleet.workers)

    @property
    def seats(self) -> tuple[Seat, ...]:
        return tuple(Seat(self, place) for place in range(len(self._workers)))

    def at(self, place: int) -> Worker:
        return self._workers[place]

    def progress(self) -> None:
        self._fleet.state.progress()

    async def replace(self, worker: Worker, error: WorkerLost) -> None:
        """The fleet starts another; until that serves, those that are left share the seats."""
        self._fleet.lost(worker.name, error)
        await self._fleet.finish()
        serving = self._fleet.workers
        if not serving:
            raise error
        for place, seated in enumerate(self._workers):
            if seated is worker:
                self._workers[place] = serving[place % len(serving)]
