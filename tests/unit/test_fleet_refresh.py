"""How new weights come to the workers of a running training: drained, in turn, the newest version."""

from __future__ import annotations

import asyncio

from actors.types import PolicyVersion
from actors.worker import WorkerReport
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.fleet import ElasticFleet, FleetPlan
from cluster.fleet.stream import GroupStream, StreamCalls, StreamPlan
from tests.unit.cluster_cases import settle, task_at
from tests.unit.loop_cases import Channel, Lab, Mortal


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


def test_a_worker_that_takes_new_weights_is_given_no_task_and_another_works_on() -> None:
    lab = Lab(2)
    first, second = lab.all.values()
    load, go_on = first.refresh, asyncio.Event()

    async def slow_load(weights: ObjectStoreWeights) -> WorkerReport:
        await go_on.wait()
        return await load(weights)

    async def body() -> None:
        plan = FleetPlan(lab.launch, lambda: 2, 0, 1, 60.0, lab.said.append, in_flight=False)
        fleet = ElasticFleet([first, second], plan, newest=None)
        stream_plan = StreamPlan(steps=1, per_step=3, max_staleness=1, credits=3, stall_s=5.0)
        stream = GroupStream(stream_plan, [first, second], 0, lab.ledger, StreamCalls(task_at))
        await fleet.start(stream)
        lab.trainer.version = 1
        fleet.begin(Channel().publish(lab.trainer))  # one at a time: the first loads, the second serves
        await settle()
        batch = await stream.take()
        assert (first.positions, second.positions) == ([], [0, 1, 2])
        assert {group.summary.policy_version for group in batch.groups} == {0}
        go_on.set()
        await fleet.finish()
        await fleet.close()
        await stream.close()

    first.refresh = slow_load  # type: ignore[method-assign]
    asyncio.run(asyncio.wait_for(body(), 20))
    assert first.version == second.version == 1


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
