"""A lost learner comes back from its last checkpoint, and the run goes on with the same workers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.types import PolicyVersion, Task, TrajectoryGroup
from actors.worker import WorkerReport
from cluster.common.errors import SaveError, WeightsLost
from cluster.common.patience import backoff_s
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.contract import FinishedGroup
from cluster.fleet.fleet import FleetPlan
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import GroupStream, StreamCalls, StreamPlan
from cluster.runs.checkpoint import START, Checkpoint, TrainState, load_checkpoint, save_checkpoint
from cluster.train.learner_recovery import LearnerRecovery
from cluster.train.loop import run_loop
from configs.schema import TrainConfig
from learner.types import LearnerError, LearnerLost, StepReport, UnreadableError
from tests.unit.cluster_cases import ScriptedWorker, settle, task_at
from tests.unit.loop_cases import Recorder, Trainer, Worker, wire

DIED = "learner step: a rank's process died"


class Learner(Trainer):
    """Numbers versions as the learner's group does, and dies when ``dies`` says so of the calls so far."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.restarts, self.lost_versions = 0, list[tuple[str | None, int]](), 0
        self.deadly: set[int] = set()  # calls of ``step``, from 1 on
        self.failures: list[Exception] = []  # of the next restarts
        self.publish_fails = False
        self.dying: Callable[[], None] = lambda: None

    def step(self, groups: Sequence[TrajectoryGroup]) -> StepReport:
        self.steps += 1
        if self.steps in self.deadly:
            self.dying()
            raise LearnerLost(DIED)
        return super().step(groups)

    def weights_ref(self, trainable_only: bool) -> Any:
        if self.publish_fails:
            self.publish_fails = False
            raise LearnerLost("learner weights: a rank's process died")
        return super().weights_ref(trainable_only)

    def restart(self, folder: str | None, lost_versions: int) -> None:
        self.restarts.append((folder and Path(folder).parent.name, lost_versions))
        if self.failures:
            raise self.failures.pop(0)
        saved = int((Path(folder) / "steps").read_text()) if folder else 0
        self.version, self.lost_versions = saved + lost_versions, lost_versions


class Player(Worker):
    """Notes groups that it was given for weights that were lost."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.least, self.outdated = 0, list[int]()
        self.lost: set[PolicyVersion] = set()  # weights that no longer exist

    async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
        self.refused = WeightsLost(weights.version) if weights.version in self.lost else None
        return await super().refresh(weights)

    async def group(self, position: int, task: Task) -> FinishedGroup:
        if self.version < self.least:
            self.outdated.append(position)
        return await super().group(position, task)


class Bench:
    """A loop whose workers outlive its learner."""

    def __init__(self, folder: Path, plan: TrainConfig, workers: int = 1) -> None:
        self.folder, self.plan = folder, plan
        self.learner, self.tracker, self.said = Learner(), Recorder(), list[str]()
        self.workers = [Player(f"worker-{number}") for number in range(workers)]
        self.ledger = Ledger(LedgerSnapshot())
        self.staleness: list[int] = []
        self.stood: list[int] = []  # the step at each loss
        self.in_flight = False

    def recovery(self, start: Checkpoint | None = None) -> LearnerRecovery:
        retries = self.plan.learner_retries
        return LearnerRecovery(self.learner, self.folder, start, retries, self.said.append, lambda _: None)

    def run(self) -> TrainState:
        recovery = self.recovery()

        async def recover(error: LearnerLost, state: TrainState) -> tuple[TrainState, PolicyVersion]:
            self.stood.append(state.step)
            restored, saved = recovery.restart(error, state)
            for worker in self.workers:
                worker.least = restored.version
            return restored, saved

        async def checkpoint(state: TrainState) -> None:
            await save(self.folder, state, self.learner)

        async def body() -> TrainState:
            self.loop, self.main = asyncio.get_running_loop(), asyncio.current_task()
            fleet_plan: FleetPlan[Worker] = FleetPlan(
                None, lambda: len(self.workers), 0, 1, 60.0, self.said.append, self.in_flight
            )
            parts = wire(
                self.workers,
                fleet_plan,
                self.learner,
                self.tracker,
                self.ledger,
                self.plan,
                START,
                lambda summary, batch: self.staleness.extend(batch.staleness),
                checkpoint,
            )
            return await asyncio.wait_for(run_loop(replace(parts, recover=recover), self.plan, START), 20)

        return asyncio.run(body())


async def save(folder: Path, state: TrainState, learner: Learner) -> None:
    async def write(target: Path) -> None:
        target.mkdir()
        (target / "steps").write_text(str(learner.version - learner.lost_versions))

    await save_checkpoint(folder, state, "name: test\n", write, keep=9)


def plan(**values: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "tasks_per_step": 2, "group_size": 2, "checkpoint_every": 2} | values)


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_the_steps_since_the_checkpoint_are_made_again_by_the_same_workers(
    tmp_path: Path, max_staleness: int
) -> None:
    bench = Bench(tmp_path, plan(max_staleness=max_staleness))
    bench.learner.deadly = {4}  # steps 1 to 3 are made, 2 is saved: 3 is made again
    state = bench.run()
    assert (state.step, len(state.rewards), state.learner_restarts) == (4, 4, 1)
    assert bench.learner.restarts == [("step-000002", 2)]
    # Steps 1, 2 and 3 had the versions 1 to 3. The restored weights are version 4, then two steps follow.
    assert (state.version, state.lost_versions, bench.workers[0].version) == (6, 2, 6)
    assert bench.ledger.balanced and bench.ledger.settled == {"trained": 8} and not bench.ledger.in_flight
    trained = sorted(
        task for batch in bench.learner.batches[:2] + bench.learner.batches[-2:] for task in batch
    )
    assert trained == sorted({f"t{position}" for position in range(8)})
    assert max(bench.staleness) <= max_staleness
    assert bench.tracker.steps[2]["learner/restarts"] == 0 and bench.tracker.steps[4]["learner/restarts"] == 1
    (said,) = bench.said
    assert said.startswith(f"the learner is lost ({DIED}): it starts again from {tmp_path}/checkpoints/step")
    assert "(restart 1 of 2 there), and the steps since then are made again" in said


def test_no_worker_gets_a_task_before_it_has_the_restored_weights(tmp_path: Path) -> None:
    """They load one after the other."""
    bench = Bench(tmp_path, plan(max_staleness=1, steps=6, checkpoint_every=100), workers=3)
    bench.learner.deadly = {4}
    assert bench.run().step == 6
    assert [worker.outdated for worker in bench.workers] == [[], [], []]


def test_without_a_checkpoint_it_begins_again_with_the_first_weights(tmp_path: Path) -> None:
    bench = Bench(tmp_path, plan(checkpoint_every=100))
    bench.learner.deadly = {3}
    state = bench.run()
    assert bench.learner.restarts == [(None, 3)] and (state.step, state.version) == (4, 7)
    assert "starts again from the weights that the run began with" in bench.said[0]


def test_a_stop_that_ends_the_learner_too_is_a_stop(tmp_path: Path) -> None:
    """Slurm and systemd send SIGTERM to every process of a job."""
    bench = Bench(tmp_path, plan(checkpoint_every=100))

    def stop() -> None:
        assert bench.main is not None
        bench.loop.call_soon_threadsafe(bench.main.cancel)
        time.sleep(0.1)

    bench.learner.deadly, bench.learner.dying = {3}, stop
    with pytest.raises(asyncio.CancelledError):
        bench.run()
    assert bench.learner.restarts == [] and bench.learner.steps == 3


def test_the_loop_goes_on_when_the_weights_do_not_come_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, plan())
    bench.learner.publish_fails = True
    state = bench.run()
    assert (state.step, state.learner_restarts) == (4, 1) and bench.ledger.settled == {"trained": 8}


def test_a_second_loss_on_the_way_back_is_counted_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, plan())
    bench.learner.deadly = {4}
    bench.learner.dying = lambda: setattr(bench.learner, "publish_fails", True)
    state = bench.run()
    assert len(bench.learner.restarts) == 2 and (state.step, state.learner_restarts) == (4, 2)
    assert bench.stood == [3, 2]  # the second time it is at the checkpoint: no progress goes back twice
    assert bench.ledger.settled == {"trained": 8} and bench.ledger.balanced


@pytest.mark.parametrize("in_flight", [False, True])
def test_weights_lost_with_their_node_are_published_again_and_no_worker_is_blamed(
    tmp_path: Path, in_flight: bool
) -> None:
    bench = Bench(tmp_path, plan(max_staleness=1), workers=2)
    bench.in_flight = in_flight
    for worker in bench.workers:
        worker.lost, worker.in_flight = {2}, in_flight
    state = bench.run()
    assert (state.step, state.learner_restarts) == (4, 1) and len(bench.learner.restarts) == 1
    assert "the weights of version 2 were lost with the learner's node" in bench.said[0]
    assert not any("worker-" in line for line in bench.said) and bench.ledger.balanced
    assert {worker.version for worker in bench.workers} == {state.version}


def test_retries_are_bounded_where_no_checkpoint_comes_and_begin_anew_behind_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path, plan(learner_retries=1, steps=6))
    bench.learner.deadly = {2, 6}  # one loss before the first checkpoint, one behind it
    assert bench.run().learner_restarts == 2
    again = Bench(tmp_path / "again", plan(learner_retries=1))
    again.learner.deadly = {1, 2}
    with pytest.raises(
        LearnerError, match=r"died \(after 1 restart\(s\) there\); .*train.learner_retries"
    ) as end:
        again.run()
    assert not isinstance(end.value, LearnerLost) and again.ledger.balanced
    none = Bench(tmp_path / "none", plan(learner_retries=0))
    none.learner.deadly = {1}
    with pytest.raises(LearnerError, match=f"^{DIED}; mend the cause"):
        none.run()
    assert none.learner.restarts == []


# --- what it starts from ------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_loaded_is_passed_over_and_a_failed_start_is_repeated(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, plan())
    recovery = bench.recovery()
    for step in (1, 2):
        bench.learner.version = step
        asyncio.run(save(tmp_path, replace(START, step=step, version=step), bench.learner))
    bench.learner.version = 5
    bench.learner.failures = [UnreadableError("learner.json: damaged"), LearnerLost("learner start: died")]
    state, saved = recovery.restart(LearnerLost(DIED), replace(START, step=5, tracking_run_id="run"))
    assert [folder for folder, _ in bench.learner.restarts] == ["step-000002", "step-000001", "step-000001"]
    assert (state.step, state.version, saved, state.tracking_run_id) == (1, 6, 1, "run")
    assert "step-000002 cannot be loaded: learner.json: damaged" in bench.said[1]


def test_a_run_that_went_back_to_an_earlier_step_never_jumps_to_a_later_checkpoint(tmp_path: Path) -> None:
    bench = Bench(tmp_path, plan())
    for step in (2, 4):
        bench.learner.version = step
        asyncio.run(save(tmp_path, replace(START, step=step, version=step), bench.learner))
    start = load_checkpoint(tmp_path / "checkpoints" / "step-000002")
    recovery, bench.learner.version = bench.recovery(start), 3
    assert recovery.restart(LearnerLost(DIED), start.state)[0].step == 2
    bench.learner.version = 5
    asyncio.run(save(tmp_path, replace(START, step=3, version=5, lost_versions=2), bench.learner))
    state, _ = recovery.restart(LearnerLost(DIED), start.state)
    assert (state.step, state.version) == (3, 6)


def test_a_learner_lost_in_a_save_is_no_full_disk(tmp_path: Path) -> None:
    async def lose(target: Path) -> None:
        raise LearnerLost(DIED)

    async def refuse(target: Path) -> None:
        raise LearnerError("learner/model: cannot be written")

    with pytest.raises(LearnerLost):
        asyncio.run(save_checkpoint(tmp_path, replace(START, step=1), "name: test\n", lose, 2))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    with pytest.raises(SaveError):
        asyncio.run(save_checkpoint(tmp_path, replace(START, step=1), "name: test\n", refuse, 2))


# --- which groups stay --------------------------------------------------------------------------------------


def test_finished_groups_near_the_checkpoint_stay_once_and_the_others_are_issued_again() -> None:
    async def body() -> None:
        worker = ScriptedWorker("w")
        calls = StreamCalls(task_at)
        built = StreamPlan(steps=9, per_step=2, max_staleness=1, credits=8, stall_s=5.0)
        stream = GroupStream(built, [worker], 0, Ledger(LedgerSnapshot()), calls)
        taking = asyncio.create_task(stream.take())
        await settle()
        books = stream.ledger.snapshot()  # a checkpoint: t0 to t3 are in flight, version 0
        assert worker.open == [0, 1, 2, 3]
        for position in (0, 1):
            worker.finish(position)
        stream.trained(await taking, 1)
        worker.version = 3  # two steps on the way that is lost: too far
        worker.finish(2)
        worker.version = 1
        worker.finish(3)
        await settle()
        stream.hold()
        await stream.settled()
        stream.rewind(books, saved=0, version=2, steps=9)
        stream.resume("w", 2)
        stream.release()
        await settle()
        # t3 is one step from the checkpoint and stays; t2, and t0 and t1 whose training is lost, run again.
        assert worker.open == [0, 1, 2] and stream.ledger.in_flight == 4
        taking = asyncio.create_task(stream.take())
        worker.version = 2
        worker.finish(0)
        batch = await taking
        assert batch.positions == (0, 3) and batch.staleness == (0, 1)
        for position in (1, 2):
            worker.finish(position)
        await settle()
        stream.hold()
        # The same checkpoint again, while the learner has the batch: t3 does not stay a second time.
        for position in worker.open:
            worker.finish(position)
        await stream.settled()
        stream.rewind(books, saved=0, version=3, steps=9)
        kept = [entry.position for entry in stream._ready]
        assert kept == [0, 1, 2] and {entry.version for entry in stream._ready} == {3}
        assert stream.ledger.balanced and stream.ledger.in_flight == 3
        assert stream.ledger.snapshot().pending == (0, 1, 2, 3)
        await stream.close()

    asyncio.run(body())


def test_failures_that_happened_stay_counted_when_the_books_go_back() -> None:
    ledger = Ledger(LedgerSnapshot())
    for _ in range(3):
        ledger.issue()
    books = ledger.snapshot()
    ledger.settle(0, "trained")
    ledger.give_back(1)
    ledger.count_failures(["environment"])
    ledger.rewind(books)
    assert (ledger.issued, ledger.reissued, ledger.failures) == (0, 1, {"environment": 1})
    assert ledger.adopt(5) and not ledger.adopt(5)
    assert [ledger.issue() for _ in range(6)] == [0, 1, 2, 3, 4, 6] and ledger.balanced


def test_the_pauses_grow_to_a_minute() -> None:
    assert [backoff_s(failures) for failures in (0, 1, 2, 3, 4, 50)] == [0, 0, 1, 2, 4, 60]
