"""Workers are lost in stages without a stream: others take their places, and their tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from actors.types import PolicyVersion, Task, TrajectoryGroup
from cluster.common.errors import FleetError, StartupError, WorkerDied, WorkerLost
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.seats import Crew, FleetPool
from cluster.measure.rows import EvaluationRow, RowResult, evaluate_row
from configs.schema import MemoryConfig
from tests.unit.cluster_cases import group, task_at
from tests.unit.loop_cases import Worker

ROW = EvaluationRow("TMEM before", MemoryConfig(), 0)


class Player(Worker):
    """Plays episodes; dies at a task when ``dies`` says so, and in its start, or in a refresh."""

    def __init__(self, name: str, dies: Callable[[str, int], bool]) -> None:
        super().__init__(name)
        self.dead, self.starts, self.played = False, True, list[int]()
        self.loads_again = True
        self._dies = dies

    async def ready(self) -> None:
        if not self.starts:
            raise self.gone("starting")

    async def episode(self, position: int, task: Task, row: EvaluationRow) -> TrajectoryGroup:
        await asyncio.sleep(0)
        self.dead = self.dead or self._dies(self.name, position)
        self.check()
        self.played.append(position)
        return group(task, self.version, finished=1)

    def check(self) -> None:
        if self.dead:
            raise self.gone("a task")

    def kill(self) -> None:
        self.dead = True

    def gone(self, doing: str) -> WorkerDied:
        return WorkerDied(f"{self.name} died during {doing}: SIGKILL", self.name)


class Stage:
    """Two workers, and the way to start more."""

    def __init__(self, dies: Callable[[str, int], bool] = lambda name, position: False) -> None:
        self.all: list[Player] = []
        self.said: list[str] = []
        self.pauses: list[float] = []
        self.newest: ObjectStoreWeights | None = None
        self.starts: Callable[[str], bool] = lambda name: True
        self._dies = dies
        self.crew = Crew(
            [self.launch(), self.launch()], self.launch, lambda: self.newest, self.said.append, self._pause
        )

    def launch(self) -> Player:
        player = Player(f"worker-{len(self.all)}", self._dies)
        player.starts = self.starts(player.name)
        self.all.append(player)
        return player

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def evaluate(self, tasks: int = 6) -> RowResult:
        row = evaluate_row(ROW, [task_at(each) for each in range(tasks)], self.crew.seats, 2, lambda: None)
        return asyncio.run(asyncio.wait_for(row, 20))


def test_an_evaluation_goes_on_with_another_worker_that_has_the_newest_weights() -> None:
    stage = Stage(dies=lambda name, position: name == "worker-0" and position < 2)
    stage.newest = weights(3)
    result = stage.evaluate()
    assert len(result.episodes) == 6 and result.failed == ()
    assert [worker.name for worker in stage.crew.workers] == ["worker-2", "worker-1"]
    assert stage.all[2].version == 3 and {0, 1} <= {*stage.all[2].played} and stage.crew.lost == 1
    lost = (
        "worker-0 is lost (worker-0 died during a task: SIGKILL): a new worker takes its place, and its tasks"
    )
    assert stage.said == [lost, "worker-2 serves"]  # once, for both of its lanes


def test_a_task_that_takes_its_workers_with_it_is_a_failed_episode_and_others_are_played() -> None:
    stage = Stage(dies=lambda name, position: position == 3)
    stage.newest = weights(2)
    result = stage.evaluate()
    assert len(result.episodes) == 5 and stage.crew.lost == 3
    (failed,) = result.failed
    assert failed.startswith("worker: worker-") and "died during a task" in failed
    assert result.policy_version == 2


def test_replacements_that_die_too_get_longer_pauses_and_end_the_stage_with_the_cause() -> None:
    stage = Stage(dies=lambda name, position: name == "worker-0")
    stage.starts = lambda name: False
    stage.crew.workers.pop()  # one seat
    with pytest.raises(FleetError, match=r"^4 rollout workers died and no .*: worker-4 died"):
        stage.evaluate()
    assert stage.pauses == [0, 1, 2]


def test_a_worker_that_is_lost_while_it_loads_is_replaced_by_one_that_has_loaded() -> None:
    stage = Stage()
    stage.all[1].dead = True
    stage.newest = weights(1)
    asyncio.run(stage.crew.load(stage.newest))
    assert [(worker.name, worker.version) for worker in stage.crew.workers] == [
        ("worker-0", 1),
        ("worker-2", 1),
    ]


def test_workers_that_cannot_load_end_the_stage_with_the_cause() -> None:
    stage = Stage()
    stage.starts, stage.newest = lambda name: False, weights(1)
    for worker in stage.all:
        worker.dead = True
    with pytest.raises(FleetError, match="rollout workers died and no episode arrived"):
        asyncio.run(stage.crew.load(stage.newest))


@pytest.mark.parametrize("deaths", [1, 5])
def test_a_worker_whose_process_dies_in_the_start_is_started_again_a_few_times(deaths: int) -> None:
    stage = Stage()
    stage.all[0].starts = False
    stage.starts = lambda name: int(name[-1]) > deaths
    start = stage.crew.start(all_up)
    if deaths == 1:
        asyncio.run(start)
        assert [worker.name for worker in stage.crew.workers] == ["worker-2", "worker-1"]
    else:
        with pytest.raises(StartupError, match="5 rollout workers died and no episode arrived"):
            asyncio.run(start)


def test_a_start_that_fails_for_another_reason_is_not_repeated() -> None:
    async def refuse(workers: Sequence[Player]) -> None:
        raise StartupError("the model is too large") from WorkerLost("worker-0 failed in starting")

    stage = Stage()
    with pytest.raises(StartupError, match=r"^the model is too large$"):
        asyncio.run(stage.crew.start(refuse))
    assert len(stage.all) == 2


def test_an_evaluated_step_goes_on_with_the_fleets_other_workers() -> None:
    """The fleet starts a new one meanwhile; where no other serves, the evaluation waits for it."""

    async def body(count: int) -> tuple[RowResult, list[Player]]:
        launched: list[Player] = []

        def launch(name: str) -> Player:
            launched.append(Player(name, lambda name, position: False))
            return launched[-1]

        first = [Player(f"worker-{n}", lambda name, position: name == "worker-0") for n in range(count)]
        plan = FleetPlan(launch, lambda: count, 0, 1, 60.0, lambda text: None, in_flight=False)
        fleet = ElasticFleet(first, plan, newest=weights(0))
        stream: Any = Stream()
        await fleet.start(stream)
        seats = FleetPool(fleet, 0).seats
        result = await evaluate_row(ROW, [task_at(n) for n in range(4)], seats, 1, lambda: None)
        await fleet.finish()
        await fleet.close()
        return result, launched

    for count in (1, 2):
        result, launched = asyncio.run(asyncio.wait_for(body(count), 20))
        assert len(result.episodes) == 4 and result.failed == ()
        assert [worker.name for worker in launched] == [f"worker-{count}"]


class Stream:
    """What a fleet tells its stream."""

    has_failed = False

    def add(self, worker: Worker, version: PolicyVersion) -> None: ...

    def remove(self, worker: str) -> None: ...


async def all_up(workers: Sequence[Player]) -> None:
    for worker in workers:
        try:
            await worker.ready()
        except WorkerDied as error:
            raise StartupError(str(error)) from error


def weights(version: PolicyVersion) -> ObjectStoreWeights:
    nothing: Any = None
    return ObjectStoreWeights(version, True, nothing)
