"""Workers die, hang, come and go while the loop trains: no task is lost, no newcomer serves old weights."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from cluster.common.errors import ClusterError, FleetError, StreamError, WorkerLost
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.ledger import MOST_LOSSES, ledger_line
from cluster.fleet.stream import GroupStream, StreamCalls, StreamPlan
from cluster.runs.checkpoint import START, TrainState
from cluster.train.loop import run_loop
from tests.unit.cluster_cases import task_at
from tests.unit.loop_cases import Channel, Lab, Mortal, wire


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
