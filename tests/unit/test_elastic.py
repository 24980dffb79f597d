"""Workers die, hang, come and go while the loop trains: no task is lost, no newcomer serves old weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.types import PolicyVersion, TrajectoryGroup
from actors.worker import WorkerReport
from cluster.common.errors import ClusterError, FleetError, StreamError, WorkerLost
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import MOST_LOSSES, Ledger, LedgerSnapshot, ledger_line
from cluster.fleet.stream import GroupStream, StreamCalls, StreamPlan
from cluster.runs.checkpoint import START, TrainState
from cluster.runs.wanted_workers import ScaleError, WantedWorkers, ask_for, newest_run, read_wanted, scheduled
from cluster.train.loop import run_loop
from configs.schema import TrainConfig
from learner.types import StepReport
from tests.unit.cluster_cases import settle, task_at
from tests.unit.loop_cases import Channel, Recorder, Trainer, Worker, wire


class Mortal(Worker):
    """Dies when ``dies`` says so of a task's position; then every call fails."""

    def __init__(self, name: str, version: PolicyVersion, dies: Callable[[str, int], bool]) -> None:
        super().__init__(name, version)
        self.dead = self.killed = self.hung = False
        self.gone = asyncio.Event()
        self.start_fails = self.asked = False
        self.served: list[tuple[PolicyVersion, int]] = []
        self._dies = dies

    async def ready(self) -> None:
        await asyncio.sleep(0.01)
        if self.start_fails:
            raise WorkerLost(f"{self.name} died during starting: out of memory")

    async def play(self, position: int) -> PolicyVersion:
        version = self.version
        self.served.append((version, position))
        await (self.gone.wait() if self.hung else asyncio.sleep(0.001))
        self.dead = self.dead or self._dies(self.name, position)
        self.check()
        return version

    async def report(self) -> WorkerReport:
        if self.hung and self.asked:
            await self.gone.wait()
        self.asked = True  # the first call is the fleet's own, before the loop begins
        self.check()
        return await super().report()

    def kill(self) -> None:
        self.dead = self.killed = True
        self.gone.set()
        self.gate.set()

    def check(self) -> None:
        if self.dead:
            raise WorkerLost(f"{self.name} died during a task: SIGKILL")


class Lab:
    """A run of the loop whose fleet can launch."""

    def __init__(
        self,
        workers: int,
        steps: int = 6,
        staleness: int = 1,
        dies: Callable[[str, int], bool] = lambda name, position: False,
    ) -> None:
        self.dies, self.wanted, self.said = dies, workers, list[str]()
        self.all: dict[str, Mortal] = {}
        self.plan = TrainConfig(
            steps=steps, tasks_per_step=2, group_size=2, max_staleness=staleness, checkpoint_every=100
        )
        self.trainer, self.tracker, self.ledger = Trainer(), Recorder(), Ledger(LedgerSnapshot())
        self.saved: list[TrainState] = []
        self.settled: set[str] = set()
        self.health_s = 60.0
        self.prepare: Callable[[Mortal], None] = lambda worker: None
        self.in_flight = False
        self.on_step: Callable[[int], None] = lambda step: None
        step = self.trainer.step

        def unhurried(groups: Sequence[TrajectoryGroup]) -> StepReport:
            time.sleep(0.01)  # so that a worker is not always between two versions
            return step(groups)

        self.trainer.step = unhurried  # type: ignore[method-assign]
        for number in range(workers):
            self.launch(f"worker-{number}")

    def launch(self, name: str) -> Mortal:
        worker = self.all[name] = Mortal(name, 0, self.dies)
        self.prepare(worker)
        return worker

    async def run(self) -> TrainState:
        async def save(state: TrainState) -> None:
            self.saved.append(state)

        parts = wire(
            list(self.all.values()),
            FleetPlan(
                self.launch, lambda: self.wanted, 0, 2, self.health_s, self.said.append, self.in_flight
            ),
            self.trainer,
            self.tracker,
            self.ledger,
            self.plan,
            START,
            lambda summary, batch: self.on_step(summary.step),
            save,
        )
        self.fleet, self.stream = parts.fleet, parts.stream
        return await asyncio.wait_for(run_loop(parts, self.plan, START), 20)

    def serving(self) -> set[str]:
        """Those that serve, or are taking newer weights."""
        return {
            name
            for name, member in self.fleet.state.members.items()
            if member.state in ("healthy", "suspect", "refreshing")
        }


def test_tasks_of_a_lost_worker_go_to_others_and_a_replacement_serves_current_weights_only() -> None:
    lab = Lab(2, steps=8, staleness=0, dies=lambda name, position: name == "worker-0" and position == 5)
    state = asyncio.run(lab.run())
    assert state.step == 8 and lab.ledger.balanced
    assert lab.ledger.settled["trained"] == 16 and lab.ledger.reissued >= 1
    trained = [task for batch in lab.trainer.batches for task in batch]
    assert sorted(trained) == sorted(f"t{position}" for position in range(16))
    assert lab.all["worker-0"].killed and "worker-2" in lab.all
    # version 2 was current when the worker died
    assert all(version >= 2 for version, _ in lab.all["worker-2"].served)
    assert lab.tracker.steps[8]["fleet/lost"] == lab.tracker.steps[8]["fleet/replaced"] == 1
    assert any("worker-0 is lost" in line and "SIGKILL" in line for line in lab.said)
    books = ledger_line(lab.ledger)
    assert "re-issued after a loss" in books and "NOT BALANCE" not in books


def test_the_only_worker_may_die_and_the_run_goes_on() -> None:
    lab = Lab(1, steps=4, dies=lambda name, position: name == "worker-0" and position == 3)
    assert asyncio.run(lab.run()).step == 4
    assert lab.ledger.balanced and lab.serving() == {"worker-1"}


def test_a_task_that_takes_its_workers_with_it_is_given_up() -> None:
    lab = Lab(2, steps=6, dies=lambda name, position: position == 4)
    assert asyncio.run(lab.run()).step == 6
    given_up = lab.ledger.settled["failed"]  # a task that ran beside it each time cannot be told from it
    assert 1 <= given_up <= 2 and lab.ledger.failures["worker"] == given_up and lab.ledger.balanced
    assert len([name for name, worker in lab.all.items() if worker.killed]) >= MOST_LOSSES
    assert "t4" not in {task for batch in lab.trainer.batches for task in batch}


def test_workers_that_die_as_fast_as_they_start_end_the_run_with_the_cause() -> None:
    lab = Lab(1, dies=lambda name, position: name == "worker-0")
    lab.prepare = lambda worker: setattr(worker, "start_fails", True)
    reason = r"rollout workers died and no group arrived in between.*worker-3: .*out of memory"
    with pytest.raises(FleetError, match=reason):
        asyncio.run(lab.run())
    assert lab.ledger.balanced


def test_a_worker_that_hangs_is_found_by_its_health_checks() -> None:
    """It hangs in the middle of its groups, which have a later deadline."""
    lab = Lab(2, steps=6)
    lab.health_s = 0.2
    lab.all["worker-0"].hung = True
    assert asyncio.run(lab.run()).step == 6
    assert lab.all["worker-0"].killed and lab.ledger.reissued >= 1 and lab.ledger.balanced
    assert any("did not answer two health checks" in line for line in lab.said)


def test_more_and_fewer_workers_while_training() -> None:
    lab = Lab(1, steps=100_000)
    lab.plan = replace(lab.plan, tasks_per_step=8)  # enough for all of them to have something to do

    async def body() -> None:
        running = asyncio.create_task(lab.run())
        for wanted in (4, 2):
            lab.wanted = wanted
            await asyncio.sleep(0.1)
            while (
                len(lab.serving()) != wanted
                or lab.fleet.state.counts()["draining"]
                or not all(worker.served for worker in lab.all.values())
            ):
                assert not running.done()
                await asyncio.sleep(0.01)
            lab.settled = lab.serving()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(body(), 20))
    assert len(lab.settled) == 2 and lab.fleet.state.lost == 0
    assert {name for name, worker in lab.all.items() if worker.killed} == set(lab.all) - lab.settled
    assert lab.ledger.balanced


def test_a_worker_ends_its_groups_before_it_loads_new_weights() -> None:
    """``Worker.refresh`` itself refuses to load while a group runs."""
    lab = Lab(1, steps=4, staleness=1)
    worker, waits = lab.all["worker-0"], list[int]()
    drain = worker.drain

    async def slow(position: int) -> PolicyVersion:
        version = worker.version
        await asyncio.sleep(0.05)
        assert worker.version == version
        return version

    async def observed() -> None:
        waits.append(worker.running)
        await drain()

    worker.play, worker.drain = slow, observed  # type: ignore[method-assign]
    assert asyncio.run(lab.run()).step == 4
    assert max(waits) > 0, "no refresh met a running group"
    assert lab.ledger.balanced


def test_a_worker_with_long_groups_loads_the_version_that_is_newest_when_they_end() -> None:
    lab = Lab(2, steps=5, staleness=4)
    slow, loaded = lab.all["worker-1"], list[PolicyVersion]()
    slow.on_refresh = loaded.append

    async def long(position: int) -> PolicyVersion:
        version = slow.version
        while lab.trainer.version < 3:
            await asyncio.sleep(0.001)
        return version

    slow.play = long  # type: ignore[method-assign]
    assert asyncio.run(lab.run()).step == 5
    # Version 3 may not be published yet when the groups see it; version 1 was when the drain began.
    assert loaded[0] >= 2 and loaded[-1] == 5


def test_a_refresh_reports_its_drain_and_phase_seconds_are_counted_once() -> None:
    lab = Lab(1)
    worker = lab.all["worker-0"]

    async def slow(position: int) -> PolicyVersion:
        await asyncio.sleep(0.05)
        return worker.version

    worker.play = slow  # type: ignore[method-assign]

    async def body() -> list[dict[str, float]]:
        plan = FleetPlan(lab.launch, lambda: 1, 0, 1, 60.0, lab.said.append, in_flight=False)
        fleet = ElasticFleet([worker], plan, newest=None)
        stream = GroupStream(StreamPlan(1, 2, 1, 2, 5.0), [worker], 0, lab.ledger, StreamCalls(task_at))
        await fleet.start(stream)
        taking = asyncio.create_task(stream.take())
        await settle()
        lab.trainer.version = 1
        fleet.begin(Channel().publish(lab.trainer))
        await fleet.finish()
        assert fleet.reports["worker-0"].drain_s > 0.03 + 0.1  # the worker itself reports 0.1 s
        counts = [fleet.phase_seconds(), fleet.phase_seconds()]
        await taking
        await fleet.close()
        await stream.close()
        return counts

    first, second = asyncio.run(body())
    assert (first["act"], first["idle"]) == (3.0, 1.0) and set(second.values()) == {0.0}


def test_the_newest_version_is_loaded_again_on_demand() -> None:
    """After an evaluation: so a worker's caches are those of a worker that has just started with it."""
    lab, loaded = Lab(1), list[PolicyVersion]()
    worker = lab.all["worker-0"]

    async def refresh(weights: ObjectStoreWeights) -> WorkerReport:
        loaded.append(weights.version)
        return await worker.report()

    async def body() -> None:
        plan = FleetPlan(lab.launch, lambda: 1, 0, 1, 60.0, lab.said.append, in_flight=False)
        fleet = ElasticFleet([worker], plan, newest=None)
        stream = GroupStream(StreamPlan(0, 2, 1, 2, 5.0), [worker], 0, lab.ledger, StreamCalls(task_at))
        await fleet.start(stream)
        await fleet.load_again()
        assert loaded == [], "nothing was published yet"
        lab.trainer.version = 1
        fleet.begin(Channel().publish(lab.trainer))
        await fleet.finish()
        await fleet.load_again()
        await fleet.close()

    worker.refresh = refresh  # type: ignore[method-assign]
    asyncio.run(asyncio.wait_for(body(), 20))
    assert loaded == [1, 1]


def test_no_more_than_the_planned_number_of_workers_refresh_at_once() -> None:
    lab = Lab(5, steps=4)  # two at once
    refreshing, together = set[str](), list[int]()

    def observe(worker: Mortal) -> None:
        refresh = worker.refresh

        async def observed(weights: ObjectStoreWeights) -> WorkerReport:
            refreshing.add(worker.name)
            together.append(len(refreshing))
            await asyncio.sleep(0.005)
            report = await refresh(weights)
            refreshing.discard(worker.name)
            return report

        worker.refresh = observed  # type: ignore[method-assign]

    for worker in lab.all.values():
        observe(worker)
    assert asyncio.run(lab.run()).step == 4
    assert max(together) == 2


def test_in_flight_a_worker_takes_new_weights_while_its_groups_run() -> None:
    """The third group ends only under version 1. A worker that drains first would never load it."""
    lab = Lab(1, steps=4, staleness=1)
    worker = lab.all["worker-0"]
    lab.in_flight = worker.in_flight = True

    async def long(position: int) -> PolicyVersion:
        while position == 2 and worker.version < 1:
            await asyncio.sleep(0.001)
        return worker.version

    worker.play = long  # type: ignore[method-assign]
    assert asyncio.run(lab.run()).step == 4
    assert lab.ledger.balanced and lab.ledger.settled["trained"] == 8


def test_a_fleet_that_is_lost_at_the_very_end_is_replaced_before_the_run_goes_on_to_evaluate() -> None:
    lab = Lab(1, steps=3)

    def on_step(step: int) -> None:
        if step == 3:
            lab.all["worker-0"].refused = WorkerLost("worker-0 died during the refresh to version 3: SIGKILL")

    lab.on_step = on_step
    assert asyncio.run(lab.run()).step == 3
    assert [(worker.name, lab.all[worker.name].version) for worker in lab.fleet.workers] == [("worker-1", 3)]


def test_without_a_way_to_launch_a_lost_worker_ends_the_run() -> None:
    lab = Lab(1, dies=lambda name, position: True)

    async def body() -> None:
        async def save(state: TrainState) -> None: ...

        no_launch: FleetPlan[Mortal] = FleetPlan(
            None, lambda: 1, 0, 1, 60.0, lab.said.append, in_flight=False
        )
        workers = list(lab.all.values())
        parts = wire(
            workers,
            no_launch,
            lab.trainer,
            lab.tracker,
            lab.ledger,
            lab.plan,
            START,
            lambda summary, batch: None,
            save,
        )
        await run_loop(parts, lab.plan, START)

    with pytest.raises((ClusterError, StreamError), match="SIGKILL"):
        asyncio.run(asyncio.wait_for(body(), 10))
    assert lab.ledger.balanced


def test_a_cancelled_run_ends_its_learner_step_and_saves_it() -> None:
    lab = Lab(1, steps=1000)
    learning, cancelled = asyncio.Event(), []
    step = lab.trainer.step

    async def body() -> None:
        loop = asyncio.get_running_loop()

        def slow(groups: list[object]) -> object:
            if lab.trainer.version == 3:
                loop.call_soon_threadsafe(learning.set)
                time.sleep(0.3)
            return step(groups)  # type: ignore[arg-type]

        lab.trainer.step = slow  # type: ignore[assignment, method-assign]
        running = asyncio.create_task(lab.run())
        await learning.wait()
        running.cancel()
        cancelled.append((await asyncio.gather(running, return_exceptions=True))[0])

    asyncio.run(asyncio.wait_for(body(), 20))
    assert isinstance(cancelled[0], asyncio.CancelledError)
    (saved,) = lab.saved
    assert (saved.step, saved.version, len(saved.rewards)) == (4, 4, 4) and lab.trainer.version == 4
    assert lab.ledger.balanced


def test_the_last_step_is_saved_whatever_the_interval() -> None:
    lab = Lab(1, steps=3)  # train.checkpoint_every is 100
    state = asyncio.run(lab.run())
    assert lab.saved == [state] and state.step == 3


def test_a_run_cancelled_after_a_checkpoint_saves_no_step_twice() -> None:
    lab = Lab(1, steps=1000)
    lab.plan = replace(lab.plan, checkpoint_every=1)
    worker = lab.all["worker-0"]
    waiting = asyncio.Event()

    async def end_with_the_third_batch(position: int) -> PolicyVersion:
        if position >= 6:
            waiting.set()
            await asyncio.Event().wait()
        return worker.version

    async def body() -> None:
        running = asyncio.create_task(lab.run())
        await waiting.wait()
        while len(lab.saved) < 3:
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    worker.play = end_with_the_third_batch  # type: ignore[method-assign]
    asyncio.run(asyncio.wait_for(body(), 20))
    assert [state.step for state in lab.saved] == [1, 2, 3]


def test_the_number_of_workers_follows_config_schedule_and_person(tmp_path: Path) -> None:
    assert [scheduled(2, ("10:4", "5:3"), step) for step in (0, 5, 9, 10, 50)] == [2, 3, 3, 4, 4]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: x\n")
    wanted = WantedWorkers(2, ("10:4",), tmp_path / "run")
    assert wanted() == 2
    wanted.step = 10
    assert wanted() == 4
    ask_for(newest_run(tmp_path), 7)
    assert wanted() == read_wanted(tmp_path / "run") == 7
    for damaged in ("{", "[]", '{"workers": 0}', '{"workers": true}', '{"workers": "7"}'):
        (tmp_path / "run" / "workers.json").write_text(damaged)
        assert wanted() == 4, damaged


def test_asking_for_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match="is no run folder"):
        ask_for(tmp_path, 2)
    with pytest.raises(ScaleError, match="0 workers is not allowed"):
        ask_for(tmp_path, 0)
    with pytest.raises(ScaleError, match="holds no run: give the run's folder with --run"):
        newest_run(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_fleet_that_is_closed_at_once_leaves_nothing_unawaited() -> None:
    lab = Lab(2)

    async def closed_at_once() -> None:
        workers = list(lab.all.values())
        fleet = ElasticFleet(
            workers,
            FleetPlan(lab.launch, lambda: 2, 0, 2, 60.0, lab.said.append, in_flight=False),
            newest=None,
        )
        stream_plan = StreamPlan(1, 2, 1, 2, 5.0)
        await fleet.start(GroupStream(stream_plan, workers, 0, lab.ledger, StreamCalls(task_at)))
        fleet.begin(Channel().publish(lab.trainer))
        await fleet.close()  # the watch and both refreshes are cancelled before they begin

    asyncio.run(closed_at_once())
    assert lab.trainer.version == 0 and all(worker.version == 0 for worker in lab.all.values())
