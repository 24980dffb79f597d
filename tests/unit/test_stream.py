"""The stream's promises: nothing stale is trained on, nothing is lost, nothing hangs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.episodes.group_summary import GroupSummary
from cluster.common.errors import StreamError, WorkerLost
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.ledger import MOST_LOSSES, Ledger, LedgerSnapshot
from cluster.fleet.stream import GroupStream, StreamCalls, StreamPlan
from tests.unit.cluster_cases import ScriptedWorker, settle, task_at

TASKS_ONLY = StreamCalls(task_at)


def stream_of(workers: list[ScriptedWorker], calls: StreamCalls = TASKS_ONLY, **plan: float) -> GroupStream:
    values = {"steps": 100, "per_step": 2, "max_staleness": 0, "credits": 4, "stall_s": 5.0} | plan
    built = StreamPlan(
        int(values["steps"]),
        int(values["per_step"]),
        int(values["max_staleness"]),
        int(values["credits"]),
        values["stall_s"],
    )
    return GroupStream(built, workers, 0, Ledger(LedgerSnapshot()), calls)


def test_on_policy_issues_nothing_while_the_learner_computes() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker])
        taking = asyncio.create_task(stream.take())
        await settle()
        assert worker.asked == [0, 1]
        worker.finish(1)
        worker.finish(0)
        batch = await taking
        assert [group.summary.task_id for group in batch.groups] == ["t0", "t1"]  # in task order
        assert batch.staleness == (0, 0)
        await settle()
        assert worker.asked == [0, 1]
        worker.version = 1
        stream.resume("w", 1)
        await settle()
        assert worker.asked == [0, 1, 2, 3]
        await stream.close()
        assert stream.ledger.balanced

    asyncio.run(body())


def test_workers_go_on_during_learning_when_staleness_allows() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker], max_staleness=1)
        taking = asyncio.create_task(stream.take())
        await settle()
        assert worker.asked == [0, 1, 2, 3]
        for position in (0, 1):
            worker.finish(position)
        await taking
        await settle()
        assert worker.open == [2, 3]  # consumed at staleness 1; two more would be at 2
        await stream.close()

    asyncio.run(body())


def test_a_stale_group_is_dropped_counted_and_replaced() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker], max_staleness=1, per_step=1, credits=2)
        worker.version = (
            -1
        )  # it samples under an older version than the stream believes: the gate must see it
        taking = asyncio.create_task(stream.take())
        await settle()
        worker.finish(0)
        assert (await taking).staleness == (1,)
        taking = asyncio.create_task(stream.take())
        await settle()
        worker.finish(1)  # now two versions behind
        await settle()
        assert not taking.done()
        assert stream.ledger.settled["stale"] == 1
        worker.version = 1
        stream.resume("w", 1)
        await settle()
        worker.finish(2)
        batch = await taking
        assert batch.dropped == 1
        assert batch.staleness == (0,)
        await stream.close()
        assert stream.ledger.balanced

    asyncio.run(body())


def test_a_group_without_two_finished_siblings_is_replaced() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        seen: list[tuple[str, int]] = []

        def on_failures(summary: GroupSummary) -> None:
            seen.append((summary.task_id, len(summary.failed)))

        stream = stream_of([worker], StreamCalls(task_at, on_failures=on_failures))
        taking = asyncio.create_task(stream.take())
        await settle()
        worker.finish(0, finished=1, failed=1)
        await settle()
        assert worker.asked == [0, 1, 2]
        worker.finish(1)
        worker.finish(2, finished=2, failed=1)
        batch = await taking
        assert [group.summary.task_id for group in batch.groups] == ["t1", "t2"]
        assert stream.ledger.settled["failed"] == 1
        assert stream.ledger.failures["engine"] == 2
        assert seen == [("t0", 1), ("t2", 1)]  # of every group with failures, also of one that is not used
        await stream.close()

    asyncio.run(body())


def test_hopeless_failures_end_the_run_with_their_message() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker], per_step=1)
        taking = asyncio.create_task(stream.take())
        for position in range(3):
            await settle()
            worker.finish(position, finished=0, failed=2)
        with pytest.raises(StreamError, match=r"last 3 groups .*engine: out of memory \(6 episodes\)"):
            await asyncio.wait_for(taking, 5)
        await stream.close()
        assert stream.ledger.balanced

    asyncio.run(body())


def test_one_good_group_resets_the_count_of_hopeless_ones() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker], per_step=2)
        taking = asyncio.create_task(stream.take())
        await settle()
        for position, finished in enumerate([0, 0, 2, 0, 0]):
            worker.finish(position, finished=finished, failed=2)
            await settle()
        assert not taking.done()
        worker.finish(5)
        assert len((await taking).groups) == 2
        await stream.close()

    asyncio.run(body())


def test_a_lost_worker_reaches_the_loop_and_the_ledger_still_balances() -> None:
    async def body() -> None:
        workers = [ScriptedWorker("w0"), ScriptedWorker("w1")]
        stream = stream_of(workers)
        taking = asyncio.create_task(stream.take())
        await settle()
        assert workers[0].open == [0]  # the least loaded worker gets the next task
        assert workers[1].open == [1]
        workers[1].break_down(1, WorkerLost("w1 died during task t1"))
        with pytest.raises(WorkerLost, match="w1 died"):
            await asyncio.wait_for(taking, 5)
        await stream.close()
        assert stream.ledger.balanced
        assert stream.ledger.settled["abandoned"] == 2

    asyncio.run(body())


def test_a_stall_names_whom_it_waited_for() -> None:
    async def body() -> None:
        stream = stream_of([ScriptedWorker("w0")], stall_s=0.05)
        with pytest.raises(StreamError, match=r"waited for w0 \(2 groups\)"):
            await stream.take()
        await stream.close()

    asyncio.run(body())


def test_a_failed_refresh_reaches_the_loop() -> None:
    async def body() -> None:
        stream = stream_of([ScriptedWorker("w0")])
        taking = asyncio.create_task(stream.take())
        await settle()
        stream.pause("w0")
        stream.fail(WorkerLost("w0 did not finish the refresh to version 1 within 5 s"))
        with pytest.raises(WorkerLost, match="refresh to version 1"):
            await asyncio.wait_for(taking, 5)
        await stream.close()

    asyncio.run(body())


def test_a_paused_worker_gets_nothing_and_the_other_goes_on() -> None:
    async def body() -> None:
        workers = [ScriptedWorker("w0"), ScriptedWorker("w1")]
        stream = stream_of(workers, per_step=4)
        stream.pause("w0")
        taking = asyncio.create_task(stream.take())
        await settle()
        assert workers[0].asked == []
        assert workers[1].asked == [0, 1, 2, 3]
        taking.cancel()
        await stream.close()

    asyncio.run(body())


def test_a_held_stream_issues_nothing_whichever_worker_comes_until_it_is_released() -> None:
    async def body() -> None:
        first, second = ScriptedWorker("w0"), ScriptedWorker("w1")
        stream = stream_of([first])
        stream.hold()
        taking = asyncio.create_task(stream.take())
        await settle()
        stream.resume("w0", 0)
        stream.add(second, 0)
        await settle()
        assert first.asked == second.asked == []
        stream.release()
        await settle()
        assert sorted(first.asked + second.asked) == [0, 1]
        taking.cancel()
        await stream.close()

    asyncio.run(body())


def test_nothing_is_issued_beyond_the_last_step() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker], steps=1, max_staleness=3, credits=8)
        taking = asyncio.create_task(stream.take())
        await settle()
        assert worker.asked == [0, 1]
        worker.finish(0)
        worker.finish(1)
        await taking
        await settle()
        assert worker.open == []
        await stream.close()

    asyncio.run(body())


def test_equally_loaded_workers_take_turns() -> None:
    async def body() -> None:
        workers = [ScriptedWorker(f"w{number}") for number in range(3)]
        stream = stream_of(workers, per_step=7)
        taking = asyncio.create_task(stream.take())
        await settle()
        assert [worker.asked for worker in workers] == [[0, 3, 6], [1, 4], [2, 5]]
        taking.cancel()
        await stream.close()

    asyncio.run(body())


def test_a_paused_worker_is_drained_once_its_last_group_has_ended() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        stream = stream_of([worker])
        await asyncio.wait_for(stream.delivered("w"), 5)  # nothing was issued yet
        taking = asyncio.create_task(stream.take())
        await settle()
        stream.pause("w")
        draining = asyncio.create_task(stream.delivered("w"))
        worker.finish(0)
        await settle()
        assert not draining.done()
        worker.finish(1)
        await asyncio.wait_for(draining, 5)
        await taking
        await stream.close()

    asyncio.run(body())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    workers=st.integers(1, 3),
)
def test_any_interleaving_keeps_the_bound_and_the_balance(
    seed: int, per_step: int, max_staleness: int, workers: int
) -> None:
    """Workers finish, fail and refresh in random order. Every batch is fresh, no task is trained twice."""

    async def body() -> None:
        rng = random.Random(seed)
        crew = [ScriptedWorker(f"w{number}") for number in range(workers)]
        stream = stream_of(
            crew, per_step=per_step, max_staleness=max_staleness, steps=6, credits=rng.randint(1, 4)
        )
        trained: list[str] = []
        failed_last = False  # never twice in a row: that is another test's subject
        for version in range(6):
            taking = asyncio.create_task(stream.take())
            while not taking.done():
                await settle()
                waiting = [(worker, position) for worker in crew for position in worker.open]
                if waiting:
                    worker, position = rng.choice(waiting)
                    failed_last = not failed_last and rng.random() < 0.2
                    worker.finish(position, finished=1 if failed_last else 2)
                assert stream.ledger.balanced
                behind = [worker for worker in crew if worker.version < version and not worker.open]
                for worker in behind:
                    worker.version = version
                    stream.resume(worker.name, version)
            batch = await taking
            assert len(batch.groups) == per_step
            assert all(
                version - group.summary.policy_version == age <= max_staleness
                for group, age in zip(batch.groups, batch.staleness, strict=True)
            )
            trained += [group.summary.task_id for group in batch.groups]
        assert len(trained) == len(set(trained)) == 6 * per_step
        await stream.close()
        assert stream.ledger.balanced
        assert stream.ledger.in_flight == 0

    asyncio.run(body())


def test_a_finished_group_whose_content_is_lost_is_issued_again_and_replaced() -> None:
    """As when a node dies with groups that wait in it for the learner."""

    async def body() -> None:
        worker, asked = ScriptedWorker("w"), list[list[str]]()

        async def missing(groups: Sequence[FinishedGroup]) -> list[int]:
            asked.append([group.summary.task_id for group in groups])
            return [0, 2] if len(asked) == 1 else []

        stream = stream_of([worker], StreamCalls(task_at, missing), steps=1, per_step=3)
        taking = asyncio.create_task(stream.take())
        await settle()
        for position in (0, 1, 2):
            worker.finish(position)
        await settle()
        assert worker.open == [0, 2] and stream.ledger.in_flight == 3 and stream.ledger.balanced
        worker.finish(2)
        worker.finish(0)
        batch = await taking
        assert [group.summary.task_id for group in batch.groups] == ["t0", "t1", "t2"]
        assert stream.ledger.in_flight == 3, "nothing was learned from them yet"
        stream.trained(batch, 1)
        assert asked == [["t0", "t1", "t2"], ["t1", "t2", "t0"]]
        ledger = stream.ledger
        assert (ledger.issued, ledger.reissued, ledger.in_flight) == (3, 2, 0)
        assert ledger.settled["trained"] == 3 and ledger.balanced
        await stream.close()

    asyncio.run(asyncio.wait_for(body(), 10))


def test_a_group_that_is_lost_each_time_it_is_finished_ends_as_failed() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")

        async def missing(groups: Sequence[FinishedGroup]) -> list[int]:
            return [0] if groups[0].summary.task_id == "t0" else []

        stream = stream_of([worker], StreamCalls(task_at, missing), steps=1, per_step=1)
        taking = asyncio.create_task(stream.take())
        for _ in range(MOST_LOSSES):
            await settle()
            worker.finish(0)
        await settle()
        worker.finish(1)
        batch = await taking
        assert [group.summary.task_id for group in batch.groups] == ["t1"]
        await stream.close()  # before the learner's step on it
        assert dict(stream.ledger.settled) == {"failed": 1, "abandoned": 1} and stream.ledger.balanced

    asyncio.run(asyncio.wait_for(body(), 10))
