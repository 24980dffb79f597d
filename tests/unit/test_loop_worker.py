"""The rollout worker's gate: no episode sees two versions. Engine and writer are scripted here; the real ones are in tests/integration."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors import worker as worker_module
from actors.protocols import EngineError
from actors.rollout import RolloutRequest
from actors.types import PolicyVersion, TrajectoryGroup
from actors.worker import RolloutWorker, WorkerError, WorkerSpec
from configs.schema import MemoryConfig, RunConfig
from tests.unit.cluster_cases import group, settle, task_at


class Policy:
    def __init__(self) -> None:
        self.version: PolicyVersion = 0
        self.tensors: Mapping[str, torch.Tensor] = {}
        self.refused = False

    async def refresh(self, version: PolicyVersion, tensors: Mapping[str, torch.Tensor]) -> None:
        await asyncio.sleep(0.01)
        if self.refused:
            raise EngineError("names are missing")
        self.version, self.tensors = version, tensors

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace()

    def close(self) -> None: ...


class Writer:
    def refresh(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors


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

    def __init__(self, version: int, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        self.version = version
        self._tensors = tensors or {"w": torch.ones(2)}

    def fetch(self, timeout_s: float) -> Mapping[str, torch.Tensor]:
        return self._tensors


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, model_path: str = "unused") -> None:
        self.policy, self.writer = Policy(), Writer()
        self.rollout = Rollout(self.policy)
        parts: Any = (self.policy, self.writer, self.rollout)
        monkeypatch.setattr(worker_module, "_build", lambda spec: parts)
        self.worker = RolloutWorker(WorkerSpec("worker-7", RunConfig(), model_path, "unused", 0))

    def begin(self, position: int) -> asyncio.Task[TrajectoryGroup]:
        request = RolloutRequest(task_at(position), f"train-{position}", 2, MemoryConfig(), 1.0, 8, 0)
        return asyncio.create_task(self.worker.group(request))


def test_a_refresh_waits_for_the_running_groups_and_holds_back_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert bench.writer.tensors is bench.policy.tensors  # writer and engine have the same theta

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


def test_the_gate_opens_after_a_refused_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        bench = Bench(monkeypatch)
        bench.policy.refused = True
        bench.rollout.end.set()
        with pytest.raises(EngineError, match="names are missing"):
            await bench.worker.refresh(Weights(1), 5)
        assert (await asyncio.wait_for(bench.begin(0), 5)).policy_version == 0

    asyncio.run(body())


def test_trained_tensors_alone_are_completed_from_the_start_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def body() -> None:
        save_file({"frozen": torch.zeros(2), "trained": torch.zeros(2)}, tmp_path / "model.safetensors")
        bench = Bench(monkeypatch, str(tmp_path))
        weights = Weights(1, {"trained": torch.ones(2)})
        weights.complete = False
        await bench.worker.refresh(weights, 5)
        assert {name: tensor.tolist() for name, tensor in bench.policy.tensors.items()} == {"frozen": [0, 0], "trained": [1, 1]}

    asyncio.run(body())
