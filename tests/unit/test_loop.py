"""The training loop over scripted parts: versions, staleness, checkpoints, and every failure ends it.

The real parts are in tests/integration.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.types import PolicyVersion, WriteOutcome
from actors.worker import WorkerReport
from cluster.common.errors import CheckpointError, SaveError, WorkerLost
from cluster.fleet.broadcast import ObjectStoreWeights
from cluster.fleet.fleet import FleetPlan
from cluster.fleet.ledger import Ledger, LedgerSnapshot
from cluster.fleet.stream import Batch
from cluster.runs.checkpoint import START, TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from cluster.runs.resume import find_checkpoint
from cluster.train.idle_steps import IdleSteps
from cluster.train.loop import run_loop
from cluster.train.metrics import StepSeconds, StepSummary, step_line, summarize
from configs.schema import TrainConfig
from learner.types import LearnerError
from tests.unit.cluster_cases import finished_group, group, task_at, trajectory
from tests.unit.loop_cases import Lab, Recorder, Trainer, Worker, wire


class Bench:
    """A loop over scripted parts. Checkpoints hold the trainer's version as the learner's file."""

    def __init__(self, folder: Path, plan: TrainConfig, state: TrainState = START, workers: int = 2) -> None:
        self.folder, self.plan, self.state = folder, plan, state
        self.workers = [Worker(f"worker-{number}", state.version) for number in range(workers)]
        self.trainer, self.tracker = Trainer(state.version), Recorder()
        self.summaries: list[StepSummary] = []
        self.on_summary: Callable[[StepSummary], None] = lambda summary: None
        self.ledger = Ledger(state.ledger)

    def run(self) -> TrainState:
        async def checkpoint(state: TrainState) -> None:
            async def save(target: Path) -> None:
                target.mkdir()
                (target / "version").write_text(str(self.trainer.version))

            await save_checkpoint(self.folder, state, "name: test\n", save, self.plan.keep_checkpoints)

        async def body() -> TrainState:
            count = len(self.workers)
            at_once = count if self.plan.max_staleness == 0 else max(1, count // 2)
            fleet_plan: FleetPlan[Worker] = FleetPlan(
                None, lambda: count, self.state.version, at_once, 60.0, lambda text: None, in_flight=False
            )
            parts = wire(
                self.workers,
                fleet_plan,
                self.trainer,
                self.tracker,
                self.ledger,
                self.plan,
                self.state,
                self.show,
                checkpoint,
            )
            return await asyncio.wait_for(run_loop(parts, self.plan, self.state), 20)

        return asyncio.run(body())

    def show(self, summary: StepSummary, batch: Batch) -> None:
        assert len(batch.groups) == len(batch.staleness)
        self.summaries.append(summary)
        self.on_summary(summary)


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_every_step_makes_a_version_that_all_workers_end_on(tmp_path: Path, max_staleness: int) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=5, tasks_per_step=3, group_size=2, max_staleness=max_staleness))
    state = bench.run()
    assert (state.step, state.version) == (5, 5)
    assert [worker.version for worker in bench.workers] == [5, 5]
    assert [summary.version for summary in bench.summaries] == [1, 2, 3, 4, 5]
    assert all(metrics["staleness/max"] <= max_staleness for metrics in bench.tracker.steps.values())
    assert bench.ledger.balanced
    assert bench.ledger.in_flight == 0
    assert bench.ledger.settled["trained"] == 15
    assert len(state.rewards) == 5


def test_on_policy_trains_on_every_task_once_in_order(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=3, tasks_per_step=2, group_size=2, max_staleness=0))
    bench.run()
    assert bench.trainer.batches == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert all(metrics["staleness/mean"] == 0 for metrics in bench.tracker.steps.values())


def test_metrics_have_the_sections_of_the_dashboard(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=3, tasks_per_step=2, group_size=2, max_staleness=0))
    bench.run()
    sections = {name.partition("/")[0] for name in bench.tracker.steps[3]}
    assert sections == {
        "Summary",
        "reward",
        "learner",
        "rollout",
        "staleness",
        "sync",
        "fast_weights",
        "timing_s",
        "timeline",
        "perf",
        "fleet",
    }
    assert bench.tracker.steps[3]["reward/mean"] == pytest.approx(0.05)
    assert bench.tracker.steps[3]["perf/engine_busy_fraction"] == 0.75


def test_each_step_has_a_timeline_whose_views_sum_to_1(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=3, tasks_per_step=2, group_size=2, max_staleness=0))
    bench.run()
    assert sorted(bench.tracker.steps) == [1, 2, 3]
    for figures in bench.tracker.steps.values():
        assert figures["timeline/worker_act"] == 0.75 and figures["timeline/worker_idle"] == 0.25
        for view in ("worker", "episode", "learner"):
            shares = [value for name, value in figures.items() if name.startswith(f"timeline/{view}_")]
            assert sum(shares) == pytest.approx(1.0)


def test_two_and_two_resumed_steps_are_four_steps(tmp_path: Path) -> None:
    plan = TrainConfig(steps=4, tasks_per_step=2, group_size=2, max_staleness=0, checkpoint_every=2)
    whole = Bench(tmp_path / "whole", plan)
    whole.run()
    first = Bench(tmp_path / "halves", replace(plan, steps=2))
    first.run()
    checkpoint = load_checkpoint(list_checkpoints(tmp_path / "halves")[-1])
    assert (checkpoint.learner / "version").read_text() == "2"
    second = Bench(tmp_path / "halves", plan, checkpoint.state)
    last = second.run()
    assert first.trainer.batches + second.trainer.batches == whole.trainer.batches
    ends = [load_checkpoint(list_checkpoints(tmp_path / name)[-1]).state for name in ("whole", "halves")]
    assert ends[0] == ends[1] == last


def test_a_resumed_run_issues_again_what_was_in_flight(tmp_path: Path) -> None:
    ledger = LedgerSnapshot(next_position=6, pending=(3, 5), settled={"trained": 4})
    bench = Bench(
        tmp_path,
        TrainConfig(steps=4, tasks_per_step=2, group_size=2, max_staleness=0),
        replace(START, step=2, version=2, ledger=ledger),
    )
    bench.run()
    assert bench.trainer.batches == [["t3", "t5"], ["t6", "t7"]]
    assert bench.ledger.issued == 8


def test_a_failing_learner_ends_the_loop_with_balanced_books(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path, TrainConfig(steps=4, tasks_per_step=2, group_size=2, max_staleness=1, checkpoint_every=1)
    )
    bench.trainer.fail_at = 2
    with pytest.raises(LearnerError, match="rank's process died"):
        bench.run()
    assert bench.ledger.balanced
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001", "step-000002"]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_failing_refresh_ends_the_loop(tmp_path: Path, max_staleness: int) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=4, tasks_per_step=2, group_size=2, max_staleness=max_staleness))
    bench.workers[1].refused = WorkerLost("worker-1 died during the refresh to version 1")
    with pytest.raises(WorkerLost, match="worker-1 died during the refresh"):
        bench.run()
    assert bench.ledger.balanced


def test_a_slow_worker_skips_versions_and_the_others_go_on(tmp_path: Path) -> None:
    bench = Bench(
        tmp_path, TrainConfig(steps=6, tasks_per_step=2, group_size=2, max_staleness=2), workers=4
    )  # two at once
    served: dict[str, list[PolicyVersion]] = {worker.name: [] for worker in bench.workers}
    hurried = asyncio.Event()

    class Slow(Worker):
        async def refresh(self, weights: ObjectStoreWeights) -> WorkerReport:
            await hurried.wait()
            return await super().refresh(weights)

    bench.workers[1] = Slow("worker-1")
    for worker in bench.workers:
        worker.on_refresh = served[worker.name].append
    bench.on_summary = lambda summary: hurried.set() if summary.step == 5 else None
    state = bench.run()
    assert state.version == 6 and [worker.version for worker in bench.workers] == [6, 6, 6, 6]
    assert len(served["worker-0"]) >= 3, "it was refreshed while the other one was not"
    assert len(served["worker-1"]) < len(served["worker-0"]) and served["worker-1"][-1] == 6
    assert bench.ledger.balanced


@pytest.mark.parametrize("said", [True, False])
def test_a_step_without_signal_is_said(said: bool) -> None:
    batch = Batch((0,), (finished_group(group(task_at(0), 0, rewards=(1.0, 1.0))),), (0,), 0)
    trainer = Trainer()
    trainer.idle = {1} if said else set()
    summary = summarize(1, trainer.step([]), batch, StepSeconds(1.0, 1.0, 1.0, 3.0))
    assert summary.without_signal is said
    assert ("no signal, so no optimizer step" in step_line(summary)) is said


def _step_of(writes: Sequence[WriteOutcome], without_signal: bool = False) -> StepSummary:
    """A step of two siblings that made ``writes`` each."""
    siblings = tuple(trajectory(task_at(0), 0, 0.25, writes) for _ in range(2))
    batch = Batch((0,), (finished_group(replace(group(task_at(0), 0), trajectories=siblings)),), (0,), 0)
    trainer = Trainer()
    trainer.idle = {1} if without_signal else set()
    return summarize(1, trainer.step([]), batch, StepSeconds(1.0, 1.0, 1.0, 4.0))


def test_extractions_without_a_card_are_no_writes() -> None:
    line = step_line(_step_of(["accepted", "empty", "empty", "rolled_back"]))
    assert "0.50 writes/s  4 without a card" in line
    assert "without a card" not in step_line(_step_of(["accepted"]))


def test_steps_in_a_row_that_taught_nothing_are_said_once_with_the_ways_out() -> None:
    said: list[str] = []
    idle = IdleSteps(said.append)
    for without_signal in (True, True, False, True, True):
        idle.after_step(_step_of(["empty"], without_signal))
    assert not said
    for _ in range(3):
        idle.after_step(_step_of(["empty"], without_signal=True))
    (line,) = said
    assert "3 steps in a row taught nothing" in line and "2 extractions gave no flashcard" in line
    assert "reward 0.250" in line and "resume=" in line and "sampling.temperature" in line


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_step_without_signal_counts_and_is_not_published(tmp_path: Path, max_staleness: int) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=6, tasks_per_step=2, group_size=2, max_staleness=max_staleness))
    bench.trainer.idle = {1, 3, 4, 6}
    served: list[PolicyVersion] = []
    bench.workers[0].on_refresh = served.append
    state = bench.run()
    assert (state.step, state.version, len(state.rewards)) == (6, 2, 6)
    assert [summary.version for summary in bench.summaries] == [0, 1, 1, 1, 2, 2]
    assert served == [1, 2] and [worker.version for worker in bench.workers] == [2, 2]
    steps = bench.tracker.steps.values()
    assert [figures["learner/optimizer_steps"] for figures in steps] == [0, 1, 0, 0, 1, 0]
    assert all(figures["staleness/max"] <= max_staleness for figures in steps)
    assert bench.ledger.settled["trained"] == 12 and bench.ledger.balanced


def test_an_evaluated_step_without_signal_is_a_barrier_all_the_same(tmp_path: Path) -> None:
    """The workers load the same version again: no episode in flight runs beside the evaluation."""
    every = {"checkpoint_every": 2, "evaluate_every": 2}
    plan = TrainConfig(steps=4, tasks_per_step=2, group_size=2, max_staleness=2, **every)
    bench = Bench(tmp_path, plan)
    bench.trainer.idle = {2, 3, 4}
    for worker in bench.workers:
        worker.loads_again = True
    served: list[PolicyVersion] = []
    bench.workers[0].on_refresh = served.append
    assert bench.run().version == 1
    assert served == [1, 1, 1]  # of the steps 1, 2 and 4


def test_what_breaks_in_the_last_rollout_ends_the_run(tmp_path: Path) -> None:
    """No worker serves then, and none is starting: the loop must not wait for one."""
    bench = Bench(tmp_path, TrainConfig(steps=1, tasks_per_step=2, group_size=2))
    for worker in bench.workers:
        worker.refused = RuntimeError("a fault of our own")
    with pytest.raises(RuntimeError, match="a fault of our own"):
        bench.run()


def test_no_steps_is_a_run_too(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TrainConfig(steps=0, tasks_per_step=2, group_size=2))
    assert bench.run() == START
    assert bench.ledger.issued == 0


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


# --- checkpoints on disk -----------------------------------------------------------------------------------


async def _save(folder: Path, step: int, keep: int = 2, broken: bool = False) -> None:
    async def learner(target: Path) -> None:
        target.mkdir()
        if broken:
            raise LearnerError("disk full")

    await save_checkpoint(folder, replace(START, step=step), "name: test\n", learner, keep)


def test_only_the_newest_checkpoints_are_kept_and_a_broken_one_is_never_seen(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        asyncio.run(_save(tmp_path, step))
    reason = r"^step 4 could not be saved in \S+ \(\d+ MiB free\): disk full; earlier checkpoints are whole$"
    with pytest.raises(SaveError, match=reason):
        asyncio.run(_save(tmp_path, 4, broken=True))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000003"]


def test_naming_the_runs_folder_points_to_its_checkpoint(tmp_path: Path) -> None:
    asyncio.run(_save(tmp_path / "run", 7))
    with pytest.raises(CheckpointError, match=r"is no checkpoint: .* did you mean .*step-000007\?"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"format": "engram-run-1", "step": 1}'])
def test_a_damaged_state_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be used"):
        load_checkpoint(tmp_path)
