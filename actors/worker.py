"""One rollout worker: engine, writer and the episodes of one process; and the thin Ray actor around it.

    group(request) ----gate----> Rollout.group        many at once, bounded by engine.slots
    refresh(weights): gate shut -> groups drain -> engine and writer load -> gate open

The invariant: no episode sees two policy versions. A refresh begins when the last group has ended and ends before the next begins.
Waits: ``group`` waits at the gate for a running refresh (which has deadlines of its own); ``refresh`` waits for the groups, each of which ends at the
latest with its episodes' deadlines, and says how many were left when ``drain_s`` passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import ray

from actors.types import PolicyVersion, TrajectoryGroup
from configs.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine import EngineStats, VLLMPolicy
    from actors.frozen_model import OwnedWeights
    from actors.rollout import Rollout, RolloutRequest

FETCH_S = 300.0


class WorkerError(RuntimeError):
    """The worker cannot go on: groups that do not drain, or weights that do not arrive. The message says which worker and what it waited for."""


class PublishedWeights(Protocol):
    """A version that the driver published: a handle, not the tensors."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def complete(self) -> bool:
        """Whether ``fetch`` gives every tensor; otherwise those that training changes, and the rest are the start checkpoint's."""
        ...

    def fetch(self, timeout_s: float) -> Mapping[str, Tensor]:
        """Tensors by Hugging Face name. Blocks at most ``timeout_s``."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is built from. ``model_path`` holds the weights of ``version``, ``basis_path`` the run's basis; both readable where it runs."""

    name: str
    config: RunConfig
    model_path: str
    basis_path: str
    version: PolicyVersion


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Counts since the worker started. ``drain_s`` and ``load_s`` are seconds of the last refresh: groups ending, weights loading."""

    name: str
    version: PolicyVersion
    groups: int
    running: int
    refreshes: int
    drain_s: float
    load_s: float
    engine: EngineStats


class RolloutWorker:
    """The logic, without Ray. The constructor blocks until the engine is up; raises EngineError, BasisError, TaskError."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._policy, self._owned, self._rollout = _build(spec)
        self._gate = asyncio.Event()
        self._gate.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0
        self._groups = 0
        self._refreshes = 0
        self._drain_s = 0.0
        self._load_s = 0.0

    async def group(self, request: RolloutRequest) -> TrajectoryGroup:
        """See Rollout.group; waits first while a refresh runs."""
        await self._gate.wait()
        self._running += 1
        self._idle.clear()
        try:
            return await self._rollout.group(request)
        finally:
            self._running -= 1
            self._groups += 1
            if self._running == 0:
                self._idle.set()

    async def refresh(self, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        """Serve ``weights.version`` from now on. Raises WorkerError, EngineError, WriterError; the gate opens again either way."""
        self._gate.clear()
        try:
            began = time.perf_counter()
            fetched = asyncio.create_task(asyncio.to_thread(self._fetch, weights))  # while the last groups end
            await self._drain(drain_s)
            tensors = await fetched
            drained = time.perf_counter()
            await self._policy.refresh(weights.version, tensors)
            self._owned.refresh(tensors)
            self._refreshes += 1
            self._drain_s, self._load_s = drained - began, time.perf_counter() - drained
            return self.report()
        finally:
            self._gate.set()

    def report(self) -> WorkerReport:
        return WorkerReport(
            name=self._spec.name,
            version=self._policy.version,
            groups=self._groups,
            running=self._running,
            refreshes=self._refreshes,
            drain_s=self._drain_s,
            load_s=self._load_s,
            engine=self._policy.stats(),
        )

    def close(self) -> None:
        self._policy.close()

    async def _drain(self, drain_s: float) -> None:
        try:
            await asyncio.wait_for(self._idle.wait(), drain_s)
        except TimeoutError:
            raise WorkerError(f"{self._spec.name}: {self._running} groups did not end within {drain_s:.0f} s before a refresh") from None

    def _fetch(self, weights: PublishedWeights) -> Mapping[str, Tensor]:
        """All tensors of the version, in their names on disk."""
        tensors = weights.fetch(FETCH_S)
        if weights.complete:
            return tensors
        return {**_checkpoint_tensors(Path(self._spec.model_path)), **tensors}


class _RolloutActor:
    """One-line methods over RolloutWorker. All are coroutines, so that they share one event loop and many groups run at once.

    The worker is built by ``start``, not by the constructor: what a constructor raises reaches the driver as a traceback in a string.
    """

    _worker: RolloutWorker

    async def start(self, spec: WorkerSpec) -> str:
        self._worker = await asyncio.to_thread(RolloutWorker, spec)
        return spec.name

    async def group(self, request: RolloutRequest) -> TrajectoryGroup:
        return await self._worker.group(request)

    async def refresh(self, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        return await self._worker.refresh(weights, drain_s)

    async def report(self) -> WorkerReport:
        return self._worker.report()

    async def close(self) -> None:
        self._worker.close()


RolloutActor = ray.remote(max_restarts=0)(_RolloutActor)


def _build(spec: WorkerSpec) -> tuple[VLLMPolicy, OwnedWeights, Rollout]:
    import torch
    from transformers import AutoTokenizer

    from actors.chat import ChatFormat
    from actors.engine import VLLMPolicy
    from actors.environments.build import build_environment
    from actors.fast_weights import load_basis
    from actors.frozen_model import OwnedWeights
    from actors.rollout import Rollout
    from actors.writer import BatchedWriter

    config = spec.config
    torch.set_num_threads(config.rollout.threads)
    chat = ChatFormat(AutoTokenizer.from_pretrained(spec.model_path))
    environment = build_environment(config.environment)
    basis = load_basis(Path(spec.basis_path))
    policy = VLLMPolicy(spec.model_path, config.model, config.engine, basis, chat.stop_token_ids, spec.version, config.rollout.threads, config.seed)
    owned = OwnedWeights.read(spec.model_path, config.model.dtype)
    writer = BatchedWriter(owned.model, basis, config.write)
    rollout = Rollout(policy, writer, environment, chat, config.write, config.rollout, config.engine.slots, basis.id, spec.name)
    return policy, owned, rollout


def _checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, mapped from disk rather than read."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
