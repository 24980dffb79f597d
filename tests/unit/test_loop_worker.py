"""The rollout worker's gate: no episode sees two versions. Engine and writer are scripted here."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors import worker as worker_module
from actors.episodes.group_summary import GroupSummary
from actors.episodes.rollout import SCORING_S, RolloutRequest
from actors.protocols import EngineError
from actors.types import PolicyVersion, TrajectoryGroup
from actors.worker import RolloutWorker, WorkerError, WorkerSpec
from cluster.fleet.remote_worker import EPISODE_GRACE_S, RemoteWorker, credits_per_worker
from cluster.measure.rows import EvaluationRow
from configs.schema import (
    EngineConfig,
    EvaluationConfig,
    MemoryConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
)
from tests.unit.cluster_cases import group, settle, task_at


class Policy:
    def __init__(self) -> None:
        self.version: PolicyVersion = 0
        self.tensors: Mapping[str, torch.Tensor] = {}
        self.complete = True
        self.refused = False
        self.failure = ""

    async def refresh(
        self, version: PolicyVersion, tensors: Mapping[str, torch.Tensor], complete: bool, in_flight: bool
    ) -> None:
        await asyncio.sleep(0.01)
        if self.refused:
            raise EngineError("names are missing")
        self.version, self.tensors, self.complete = version, tensors, complete

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace()

    def close(self) -> None: ...


class Rollout:
    """Plays until told to end; notes the policy's version at the start and at the end of each group."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.end = asyncio.Event()
        self.versions: list[tuple[int, int]] = []

    async def group(self, request: RolloutRequest) -> TrajectoryGroup:
        before = self.policy.version
        await self.end.wait()
        self.versions.append((before, self.policy.version))
        return group(request.task, before)


class Weights:
    complete = True
    transfer = ""

    def __init__(self, version: int, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.version = version
        self._tensors = tensors or {"w": torch.ones(2)}

    def fetch(self, timeout_s: float) -> Mapping[str, torch.Tensor]:
        return self._tensors

    def formed(self, received: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {f"formed.{name}": tensor for name, tensor in received.items()}


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, model_path: str = "unused") -> None:
        self.policy = Policy()
        self.rollout = Rollout(self.policy)
        parts: Any = (self.policy, self.rollout)
        monkeypatch.setattr(worker_module, "_build", lambda spec: parts)
        self.worker = RolloutWorker(WorkerSpec("worker-7", RunConfig(), model_path, "unused", 0))

    def begin(self, position: int) -> asyncio.Task[TrajectoryGroup]:
        request = RolloutRequest(task_at(position), f"train-{position}", 2, MemoryConfig(), 1.0, 8, 0)
        return asyncio.create_task(self.worker.group(request))


def test_what_an_environment_prepares_is_there_when_the_worker_is_up(
    monkeypatch: pytest.MonkeyPatch, tiny_model_path: Path
) -> None:
    made: list[str] = []

    class Engine(Policy):
        def __init__(self, *settings: object) -> None:
            super().__init__()
            made.append("engine")

        def writer(self, config: object) -> None: ...

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    module: Any = SimpleNamespace(VLLMPolicy=Engine)
    monkeypatch.setitem(sys.modules, "actors.engine.policy", module)
    monkeypatch.setattr("actors.fast_weights.basis.load_basis", lambda path: SimpleNamespace(id="basis"))
    monkeypatch.setattr(
        "actors.environments.build.build_environment",
        lambda *_: SimpleNamespace(prepare=lambda: made.append("index"), system_prompt=""),
    )
    RolloutWorker(WorkerSpec("worker-7", RunConfig(), str(tiny_model_path), "unused", 0))
    assert made == ["index", "engine"]


@pytest.mark.parametrize(("folder", "is_there"), [("driver", True), ("elsewhere", False)])
def test_a_worker_works_in_the_drivers_folder_where_its_node_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, is_there: bool
) -> None:
    """A command such as [python, my_agent.py] means the user's file, not one beside Ray."""
    (tmp_path / "driver").mkdir()
    monkeypatch.chdir(tmp_path)  # and back at the end
    monkeypatch.setattr(worker_module, "RolloutWorker", lambda spec: Path.cwd())
    actor = worker_module._RolloutActor()
    asyncio.run(actor.start(WorkerSpec("worker-0", RunConfig(), "", "", 0, str(tmp_path / folder))))
    assert Path.cwd() == (tmp_path / "driver" if is_there else tmp_path)


def test_late_verdicts_fail_their_episodes_before_the_driver_gives_up_the_worker() -> None:
    assert SCORING_S < EPISODE_GRACE_S


def test_a_refresh_waits_for_the_running_groups_and_holds_back_new_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        early = [bench.begin(0), bench.begin(1)]
        await settle()
        refreshing = asyncio.create_task(bench.worker.refresh(Weights(1), 5))
        await settle()
        late = bench.begin(2)
        await settle()
        assert bench.worker.report().running == 2
        assert bench.policy.version == 0
        bench.rollout.end.set()
        report = await refreshing
        results = await asyncio.gather(*early, late)
        assert [result.policy_version for result in results] == [0, 0, 1]
        assert bench.rollout.versions == [(0, 0), (0, 0), (1, 1)]
        assert (report.version, report.refreshes) == (1, 1)

    asyncio.run(body())


def test_a_drained_worker_starts_no_group_before_its_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        early = bench.begin(0)
        await settle()
        draining = asyncio.create_task(bench.worker.drain(5))
        await settle()
        assert not draining.done()
        bench.rollout.end.set()
        await draining
        late = bench.begin(1)
        await settle()
        assert early.done() and not late.done()
        await bench.worker.refresh(Weights(1), 5)
        assert (await late).policy_version == 1

    asyncio.run(body())


def test_a_worker_that_cannot_be_drained_goes_on_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        running = bench.begin(0)
        await settle()
        with pytest.raises(WorkerError, match="worker-7: 1 groups did not end within 0 s"):
            await bench.worker.drain(0.02)
        bench.rollout.end.set()
        await asyncio.wait_for(asyncio.gather(running, bench.begin(1)), 5)

    asyncio.run(body())


def test_a_worker_whose_engine_died_gives_its_groups_back_and_serves_nobody_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        running = bench.begin(0)
        await settle()
        bench.policy.failure = "MemoryError: cannot allocate"
        bench.rollout.end.set()
        reason = r"worker-7 serves nobody any more, its engine is dead.*cannot allocate"
        with pytest.raises(WorkerError, match=reason):
            await running
        with pytest.raises(WorkerError, match="start another worker"):
            await bench.begin(1)

    asyncio.run(body())


def test_groups_that_do_not_end_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        running = bench.begin(0)
        await settle()
        with pytest.raises(WorkerError, match="worker-7: 1 groups did not end within 0 s"):
            await bench.worker.refresh(Weights(1), 0.02)
        bench.rollout.end.set()
        await running
        assert bench.policy.version == 0

    asyncio.run(body())


def test_a_worker_whose_loading_failed_serves_nobody_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold a mixture of two versions. Groups that waited at the gate fail, and so do later calls."""

    async def body() -> None:
        bench = Bench(monkeypatch)
        bench.policy.refused = True
        bench.rollout.end.set()
        refreshing = asyncio.create_task(bench.worker.refresh(Weights(1), 5))
        await settle()
        waiting = bench.begin(0)
        with pytest.raises(EngineError, match="names are missing"):
            await refreshing
        bench.policy.refused = False
        reason = "loading version 1 failed .EngineError: names are missing."
        broken = f"worker-7 serves nobody any more, {reason}: start another worker"
        for work in (waiting, bench.begin(1), bench.worker.refresh(Weights(2), 5)):
            with pytest.raises(WorkerError, match=broken):
                await asyncio.wait_for(work, 5)
        assert bench.rollout.versions == []

    asyncio.run(body())


def test_a_refresh_cut_short_while_loading_breaks_the_worker_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        bench.rollout.end.set()
        loading = asyncio.Event()

        async def refresh(
            version: PolicyVersion, tensors: Mapping[str, torch.Tensor], complete: bool, in_flight: bool
        ) -> None:
            loading.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(bench.policy, "refresh", refresh)
        refreshing = asyncio.create_task(bench.worker.refresh(Weights(1), 5))
        await loading.wait()
        refreshing.cancel()
        with pytest.raises(WorkerError, match=r"loading version 1 failed .CancelledError"):
            await asyncio.wait_for(bench.begin(0), 5)

    asyncio.run(body())


def test_weights_that_do_not_arrive_leave_the_worker_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Weights):
        def fetch(self, timeout_s: float) -> Mapping[str, torch.Tensor]:
            raise TimeoutError("the owner of the object is gone")

    async def body() -> None:
        bench = Bench(monkeypatch)
        bench.rollout.end.set()
        with pytest.raises(TimeoutError, match="the owner"):
            await bench.worker.refresh(Lost(1), 5)
        assert (await asyncio.wait_for(bench.begin(0), 5)).policy_version == 0
        assert (await bench.worker.refresh(Weights(1), 5)).version == 1

    asyncio.run(body())


@pytest.mark.parametrize("complete", [True, False])
def test_the_engine_is_given_what_was_published_and_told_whether_it_is_all(
    monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        weights = Weights(1, {"trained": torch.ones(2)})
        weights.complete = complete
        await bench.worker.refresh(weights, 5)
        assert bench.policy.complete is complete and list(bench.policy.tensors) == ["trained"]

    asyncio.run(body())


def test_the_report_tells_the_drain_from_the_wait_for_weights_and_from_the_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights are fetched while groups end: only the rest of that time counts as fetching."""

    class Slow(Weights):
        def __init__(self, version: int) -> None:
            super().__init__(version)
            self.arrived = threading.Event()

        def fetch(self, timeout_s: float) -> Mapping[str, torch.Tensor]:
            time.sleep(0.2)
            self.arrived.set()
            return super().fetch(timeout_s)

    async def body() -> None:
        bench = Bench(monkeypatch)
        idle = await bench.worker.refresh(Slow(1), 5)
        assert idle.drain_s < idle.fetch_s and idle.load_s > 0.0
        running, weights = bench.begin(0), Slow(2)
        await settle()
        refreshing = asyncio.create_task(bench.worker.refresh(weights, 5))
        await asyncio.to_thread(weights.arrived.wait, 5)
        bench.rollout.end.set()
        busy = await refreshing
        await running
        assert busy.fetch_s < busy.drain_s and busy.drain_s > 0.15

    asyncio.run(body())


class Handle:
    """Stands for the worker's process; keeps what it is asked for."""

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.start = SimpleNamespace(remote=lambda spec: None)
        self.group = SimpleNamespace(remote=self._ask)

    def _ask(self, request: RolloutRequest) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
        """The summary and the group, as futures in the place of Ray's references."""
        self.requests.append(request)
        loop, content = asyncio.get_running_loop(), group(request.task, version=0)
        summary_ref, content_ref = loop.create_future(), loop.create_future()
        summary_ref.set_result(GroupSummary.of(content))
        content_ref.set_result(content)
        return summary_ref, content_ref


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_held_out_episodes_have_the_evaluations_temperature(temperature: float) -> None:
    config = RunConfig(evaluation=EvaluationConfig(temperature=temperature))

    async def body() -> list[RolloutRequest]:
        handle = Handle()
        worker = RemoteWorker(WorkerSpec("worker-0", config, "", "", 0), handle, journal=None)
        await worker.episode(3, task_at(3), EvaluationRow("before", config.memory, seed=1))
        return handle.requests

    (request,) = asyncio.run(body())
    assert (request.temperature, request.group_size, request.group_id) == (temperature, 1, "before-3")
    assert request.answer_temperature is None, "training's own"


def test_training_samples_answers_at_their_own_temperature() -> None:
    async def body() -> list[RolloutRequest]:
        handle = Handle()
        config = RunConfig(sampling=SamplingConfig(answer_temperature=0.0))
        worker = RemoteWorker(WorkerSpec("worker-0", config, "", "", 0), handle, journal=None)
        await worker.group(3, task_at(3))
        return handle.requests

    (request,) = asyncio.run(body())
    assert (request.temperature, request.answer_temperature) == (1.0, 0.0)


def test_a_groups_seed_follows_from_the_runs_seed_and_its_position_whichever_worker_plays_it() -> None:
    async def seeds(seed: int, name: str) -> list[int]:
        handle = Handle()
        worker = RemoteWorker(WorkerSpec(name, RunConfig(seed=seed), "", "", 0), handle, journal=None)
        for position in (3, 4):
            assert (await worker.group(position, task_at(position))).summary.task_id == f"t{position}"
        assert [request.group_id for request in handle.requests] == ["train-3", "train-4"]
        return [request.seed for request in handle.requests]

    async def body() -> None:
        first = await seeds(0, "worker-0")
        assert first == await seeds(0, "worker-1")
        assert len({*first, *await seeds(1, "worker-0")}) == 4

    asyncio.run(body())


@pytest.mark.parametrize(("slots", "group_size", "expected"), [(8, 4, 2), (5, 2, 3), (1, 4, 1)])
def test_a_worker_has_groups_enough_to_fill_its_slots(slots: int, group_size: int, expected: int) -> None:
    engine, train = EngineConfig(slots=slots), TrainConfig(group_size=group_size)
    assert credits_per_worker(RunConfig(engine=engine, train=train)) == expected
