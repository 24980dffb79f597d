"""One rollout worker: engine, writer and the episodes of one process; and the thin Ray actor around it.

    group(request) ----gate----> Rollout.group        many at once, bounded by engine.slots
    refresh(weights): gate shut -> groups drain -> engine and writer load -> gate open; a failed load breaks the worker, and all who ask hear of it

The invariant: no episode sees two policy versions. A refresh begins when the last group has ended and ends before the next begins. With
``rollout.refresh: in_flight`` there is no gate: episodes go on under the new weights between two steps of the engine (actors/episodes/in_flight.py).
Waits: ``group`` waits at the gate for a running refresh (which has deadlines of its own); ``refresh`` waits for the groups, each of which ends at the
latest with the deadlines of its episodes and of their scoring, and says how many were left when ``drain_s`` passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import ray

from actors.episodes.group_summary import GroupSummary
from actors.episodes.recovery import Recovered, Recovery
from actors.peak_memory import PeakMemory, take_peak
from actors.types import PolicyVersion, TrajectoryGroup
from configs.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine.policy import EngineStats, VLLMPolicy
    from actors.episodes.rollout import Rollout, RolloutRequest

FETCH_S = 300.0
T = TypeVar("T")


class WorkerError(RuntimeError):
    """The worker cannot go on: groups that do not drain, or weights that do not arrive. The message says which worker and what it waited for."""


class PublishedWeights(Protocol):
    """A version that the driver published: a handle, not the tensors."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def complete(self) -> bool:
        """Whether ``fetch`` gives every tensor; otherwise those that training changes: the others are what they were when the worker started."""
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
    """Counts since the worker started. The seconds are the last refresh's: groups ending, then the wait for weights not there yet, then loading.

    ``load_s`` is the pause that a refresh costs; the weights travel while the groups end, and only what is left of the way counts as ``fetch_s``.
    """

    name: str
    version: PolicyVersion
    groups: int
    running: int
    refreshes: int
    drain_s: float
    fetch_s: float
    load_s: float
    engine: EngineStats


class RolloutWorker:
    """The logic, without Ray. The constructor blocks until the engine is up; raises EngineError, BasisError, TaskError."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._policy, self._rollout = _build(spec)
        self._gate = asyncio.Event()
        self._gate.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = 0
        self._groups = 0
        self._refreshes = 0
        self._drain_s = self._fetch_s = self._load_s = 0.0
        self._broken = ""
        self._in_flight = spec.config.rollout.refresh == "in_flight"

    async def group(self, request: RolloutRequest) -> TrajectoryGroup:
        """See Rollout.group; waits first while a refresh runs. Raises WorkerError for good once loading weights has failed, or the engine is dead."""
        return await self._gated(lambda: self._rollout.group(request))

    async def recoverable_group(
        self, request: RolloutRequest, recovery: Recovery
    ) -> tuple[TrajectoryGroup, Recovered]:
        """As ``group``, see Rollout.recoverable_group."""
        return await self._gated(lambda: self._rollout.recoverable_group(request, recovery))

    async def _gated(self, play: Callable[[], Awaitable[T]]) -> T:
        while (
            not self._gate.is_set()
        ):  # not once: the next refresh may have shut it before those who waited wake up
            await self._gate.wait()
        self._check_whole()
        self._running += 1
        self._idle.clear()
        try:
            played = await play()
            if (
                self._policy.failure
            ):  # its episodes' failures are the worker's own: another worker may play them
                self._broken = f"its engine is dead ({self._policy.failure})"
                self._check_whole()
            return played
        finally:
            self._running -= 1
            self._groups += 1
            if self._running == 0:
                self._idle.set()

    async def drain(self, drain_s: float) -> None:
        """Wait until the running groups have ended, and start none before ``refresh`` is over.

        In flight there is nothing to wait for. Raises WorkerError when the groups do not end within ``drain_s``;
        the worker then goes on as it was.
        """
        self._check_whole()
        if self._in_flight:
            return
        self._gate.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), drain_s)
        except BaseException as error:
            self._gate.set()
            if isinstance(error, TimeoutError):
                raise WorkerError(
                    f"{self._spec.name}: {self._running} groups did not end within {drain_s:.0f} s before a refresh"
                ) from None
            raise

    async def refresh(self, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        """Serve ``weights.version`` from now on; drain first. Raises WorkerError, EngineError.

        When groups do not end or the weights do not arrive, nothing was touched and the worker goes on as it was. When loading fails it serves nobody
        any more: what it holds may be half of one version and half of another.
        """
        self._check_whole()
        try:
            began = time.perf_counter()
            fetching = asyncio.create_task(
                asyncio.to_thread(weights.fetch, FETCH_S)
            )  # while the last groups end
            await self.drain(drain_s)
            drained = time.perf_counter()
            tensors = await fetching
            fetched = time.perf_counter()
            await self._load(weights, tensors)
            self._refreshes += 1
            self._drain_s, self._fetch_s, self._load_s = (
                drained - began,
                fetched - drained,
                time.perf_counter() - fetched,
            )
            return self.report()
        finally:
            self._gate.set()  # also when broken: who waits there must hear of it

    def report(self) -> WorkerReport:
        return WorkerReport(
            name=self._spec.name,
            version=self._policy.version,
            groups=self._groups,
            running=self._running,
            refreshes=self._refreshes,
            drain_s=self._drain_s,
            fetch_s=self._fetch_s,
            load_s=self._load_s,
            engine=self._policy.stats(),
        )

    def close(self) -> None:
        self._policy.close()

    async def _load(self, weights: PublishedWeights, tensors: Mapping[str, Tensor]) -> None:
        try:
            await self._policy.refresh(weights.version, tensors, weights.complete, self._in_flight)
        except BaseException as error:  # a cancelled call as well: the engine goes on loading without us
            self._broken = f"loading version {weights.version} failed ({type(error).__name__}: {error})"
            raise

    def _check_whole(self) -> None:
        if self._broken:
            raise WorkerError(
                f"{self._spec.name} serves nobody any more, {self._broken}: start another worker"
            )


class _RolloutActor:
    """One-line methods over RolloutWorker. All are coroutines, so that they share one event loop and many groups run at once.

    The worker is built by ``start``, not by the constructor: what a constructor raises reaches the driver as a traceback in a string.
    """

    _worker: RolloutWorker

    async def start(self, spec: WorkerSpec) -> str:
        self._worker = await asyncio.to_thread(RolloutWorker, spec)
        return spec.name

    @ray.method(num_returns=2)
    async def group(self, request: RolloutRequest) -> tuple[GroupSummary, TrajectoryGroup]:
        """Two results, both owned by the caller: it looks at the first, the second waits in this node's object store for the learner."""
        group = await self._worker.group(request)
        return GroupSummary.of(group), group

    @ray.method(num_returns=2)
    async def recoverable_group(
        self, request: RolloutRequest, recovery: Recovery
    ) -> tuple[GroupSummary, TrajectoryGroup]:
        """As ``group``; the summary says what became of the episodes that a lost worker had begun."""
        group, recovered = await self._worker.recoverable_group(request, recovery)
        return replace(GroupSummary.of(group), recovered=recovered), group

    async def drain(self, drain_s: float) -> None:
        await self._worker.drain(drain_s)

    async def refresh(self, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        return await self._worker.refresh(weights, drain_s)

    async def report(self) -> WorkerReport:
        return self._worker.report()

    async def measure(self) -> PeakMemory:
        """The most memory that this process held since the last call."""
        return await asyncio.to_thread(take_peak)  # it collects garbage first

    async def close(self) -> None:
        self._worker.close()


RolloutActor = ray.remote(max_restarts=0)(_RolloutActor)


def _build(spec: WorkerSpec) -> tuple[VLLMPolicy, Rollout]:
    import torch
    from transformers import AutoTokenizer

    from actors.engine.policy import VLLMPolicy
    from actors.environments.base import prepare
    from actors.environments.build import build_environment
    from actors.episodes.rollout import Rollout
    from actors.fast_weights.basis import load_basis
    from actors.memory.build import surroundings
    from actors.text.chat_template import ChatFormat

    config = spec.config
    torch.set_num_threads(config.rollout.threads)
    chat = ChatFormat(AutoTokenizer.from_pretrained(spec.model_path))
    environment = build_environment(config.environment, config.embedder)
    prepare(
        environment
    )  # here, and not in the first episode: that would stop the others, and count against its deadline
    basis = load_basis(Path(spec.basis_path))
    policy = VLLMPolicy(
        spec.model_path,
        config.model,
        config.engine,
        basis,
        chat.stop_token_ids,
        spec.version,
        config.rollout.threads,
        config.seed,
    )
    around = surroundings(config.engine.max_model_tokens, config.sampling.max_answer_tokens, config.embedder)
    writer = policy.writer(config.write)
    rollout = Rollout(
        policy,
        writer,
        environment,
        chat,
        config.write,
        config.rollout,
        config.engine.slots,
        around,
        basis.id,
        spec.name,
    )
    return policy, rollout
