"""One rollout worker: engine, writer and the episodes of one process; and the thin Ray actor around it.

    group(request) ----gate----> Rollout.group        many at once, bounded by engine.slots
    refresh(weights): gate shut -> groups drain -> engine and writer load -> gate open
                      a failed load breaks the worker: every later call raises WorkerError

Invariant: no episode sees two policy versions. A refresh begins when the last group has ended, and ends
before the next one begins. With ``rollout.refresh: in_flight`` there is no gate: episodes go on under the new
weights between two steps of the engine (actors/episodes/in_flight.py).

Every wait, and who ends it:
    group, at the gate          a running refresh, which has deadlines of its own
    drain and refresh, for      the deadlines of their episodes and scores; at the latest ``drain_s``
      the running groups
    refresh, for its weights    FETCH_S
    receive, for its peers      its own deadline; a refresh never waits for it
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import ray

from actors.episodes.group_summary import GroupSummary
from actors.episodes.recovery import Recovered, Recovery
from actors.peak_memory import PeakMemory, take_peak
from actors.types import PolicyVersion, TrajectoryGroup
from actors.weight_transfer import Receiver, Rendezvous
from configs.schema import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from actors.engine.policy import EngineStats, VLLMPolicy
    from actors.episodes.rollout import Rollout, RolloutRequest

FETCH_S = 300.0  # the longest wait for published weights
T = TypeVar("T")


class WorkerError(RuntimeError):
    """The worker cannot go on: groups do not drain, or weights do not load. The message says which worker."""


class PublishedWeights(Protocol):
    """A handle to a version that the driver published; it does not hold the tensors."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def complete(self) -> bool:
        """Whether ``fetch`` gives every tensor. Otherwise it gives those that training changes.

        The others are still what they were when the worker started.
        """
        ...

    @property
    def transfer(self) -> str:
        """The collective transfer that brought the tensors to the workers that took part; "": none."""
        ...

    def fetch(self, timeout_s: float) -> Mapping[str, Tensor]:
        """Tensors by Hugging Face name. Blocks at most ``timeout_s``."""
        ...

    def formed(self, received: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What ``fetch`` would return, from what ``transfer`` brought."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is built from. Both paths must be readable on its node.

    ``folder`` is the driver's: relative names in a user's commands and code mean it. "": where Ray is.
    """

    name: str
    config: RunConfig
    model_path: str  # a Hugging Face folder with the weights of ``version``
    basis_path: str
    version: PolicyVersion
    folder: str = ""


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Counts since the worker started, and the seconds of its last refresh."""

    name: str
    version: PolicyVersion
    groups: int
    running: int
    refreshes: int
    drain_s: float  # until the last group had ended; the weights travel meanwhile
    fetch_s: float  # the rest of the wait for the weights
    load_s: float  # the pause that a refresh costs
    engine: EngineStats


class RolloutWorker:
    """The worker without Ray.

    The constructor blocks until the engine is up. It raises EngineError, BasisError, TaskError.
    """

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
        self._receiver = Receiver()
        self._receiving = ThreadPoolExecutor(1, "weights")  # the loop's own threads may be busy for long

    async def group(self, request: RolloutRequest) -> TrajectoryGroup:
        """See Rollout.group. Waits first while a refresh runs.

        Once loading weights has failed or the engine is dead, every call raises WorkerError.
        """
        return await self._gated(lambda: self._rollout.group(request))

    async def recoverable_group(
        self, request: RolloutRequest, recovery: Recovery
    ) -> tuple[TrajectoryGroup, Recovered]:
        """As ``group``, see Rollout.recoverable_group."""
        return await self._gated(lambda: self._rollout.recoverable_group(request, recovery))

    async def _gated(self, play: Callable[[], Awaitable[T]]) -> T:
        # a loop: the next refresh may have shut the gate again before the waiters wake up
        while not self._gate.is_set():
            await self._gate.wait()
        self._check_whole()
        self._running += 1
        self._idle.clear()
        try:
            played = await play()
            # a dead engine failed these episodes: not data, but a reason to play them on another worker
            if self._policy.failure:
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

        In flight there is nothing to wait for. Raises WorkerError when the groups do not end within
        ``drain_s``; the worker then goes on as it was.
        """
        self._check_whole()
        if self._in_flight:
            return
        self._gate.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), drain_s)
        except TimeoutError:
            self._gate.set()
            raise WorkerError(
                f"{self._spec.name}: {self._running} groups did not end "
                f"within {drain_s:.0f} s before a refresh"
            ) from None
        except BaseException:  # cancelled
            self._gate.set()
            raise

    async def refresh(self, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        """Drain, then serve ``weights.version`` from now on. Raises WorkerError, EngineError.

        When groups do not end or the weights do not arrive, nothing has changed and the worker goes on. When
        loading fails, the worker is broken: it may hold half of one version and half of another.
        """
        self._check_whole()
        try:
            began = time.perf_counter()
            # the weights travel while the last groups end
            fetching = asyncio.create_task(asyncio.to_thread(self._fetch, weights))
            await self.drain(drain_s)
            drained = time.perf_counter()
            tensors = await fetching
            fetched = time.perf_counter()
            await self._load(weights, tensors)
            self._refreshes += 1
            self._drain_s, self._fetch_s = drained - began, fetched - drained
            self._load_s = time.perf_counter() - fetched
            return self.report()
        finally:
            self._gate.set()  # also when broken: the groups at the gate must raise, not wait

    async def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> None:
        """Take part in a collective transfer, beside the episodes. Its tensors wait for ``refresh``.

        Raises TransferError: the refresh then fetches them.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            self._receiving, self._receiver.receive, meeting, rank, transfer, deadline_s
        )

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

    def _fetch(self, weights: PublishedWeights) -> Mapping[str, Tensor]:
        """The tensors that were received already, or those of the object store."""
        received = self._receiver.take(weights.transfer)
        return weights.fetch(FETCH_S) if received is None else weights.formed(received)

    async def _load(self, weights: PublishedWeights, tensors: Mapping[str, Tensor]) -> None:
        try:
            await self._policy.refresh(weights.version, tensors, weights.complete, self._in_flight)
        except BaseException as error:  # also a cancelled call: the engine goes on loading without it
            self._broken = f"loading version {weights.version} failed ({type(error).__name__}: {error})"
            raise

    def _check_whole(self) -> None:
        if self._broken:
            raise WorkerError(
                f"{self._spec.name} serves nobody any more, {self._broken}: start another worker"
            )


class _RolloutActor:
    """One-line methods over RolloutWorker: coroutines, so that many groups run at once on one event loop.

    ``start`` builds the worker, not the constructor: an error of a constructor reaches the driver only as a
    traceback in a string.
    """

    _worker: RolloutWorker

    async def start(self, spec: WorkerSpec) -> str:
        if spec.folder and Path(spec.folder).is_dir():  # on another node it may not be there
            os.chdir(spec.folder)
        self._worker = await asyncio.to_thread(RolloutWorker, spec)
        return spec.name

    @ray.method(num_returns=2)
    async def group(self, request: RolloutRequest) -> tuple[GroupSummary, TrajectoryGroup]:
        """Return two objects, both owned by the caller: the summary, which it reads, and the group.

        The group stays in this node's object store until the learner fetches it.
        """
        group = await self._worker.group(request)
        return GroupSummary.of(group), group

    @ray.method(num_returns=2)
    async def recoverable_group(
        self, request: RolloutRequest, recovery: Recovery
    ) -> tuple[GroupSummary, TrajectoryGroup]:
        """As ``group``. The summary also counts the episodes that a lost worker had begun."""
        group, recovered = await self._worker.recoverable_group(request, recovery)
        return GroupSummary.of(group, recovered), group

    async def drain(self, drain_s: float) -> None:
        await self._worker.drain(drain_s)

    async def refresh(self, weights: PublishedWeights, drain_s: float) -> WorkerReport:
        return await self._worker.refresh(weights, drain_s)

    async def receive(self, meeting: Rendezvous, rank: int, transfer: str, deadline_s: float) -> None:
        await self._worker.receive(meeting, rank, transfer, deadline_s)

    async def report(self) -> WorkerReport:
        return self._worker.report()

    async def measure(self) -> PeakMemory:
        """Return the most memory that this process held since the last call."""
        return await asyncio.to_thread(take_peak)  # it collects garbage first

    async def close(self) -> None:
        self._worker.close()


RolloutActor = ray.remote(max_restarts=0)(_RolloutActor)


def _build(spec: WorkerSpec) -> tuple[VLLMPolicy, Rollout]:
    import torch

    from actors.engine.policy import VLLMPolicy
    from actors.environments.base import prepare
    from actors.environments.build import build_environment
    from actors.episodes.preservation import preservation
    from actors.episodes.rollout import Rollout
    from actors.fast_weights.basis import load_basis
    from actors.memory.build import surroundings
    from actors.text.chat_template import open_chat
    from configs.curriculum import stages

    config = spec.config
    torch.set_num_threads(config.rollout.threads)
    chat = open_chat(spec.model_path, config.model)
    environment = build_environment(config.environment, config.embedder)
    of_stages = [
        environment
        if stage.environment == config.environment
        else build_environment(stage.environment, config.embedder)
        for stage in stages(config)
    ]
    # here, not in the first episode: that would stop the other episodes, and count against its deadline
    for built in {id(each): each for each in (environment, *of_stages)}.values():
        prepare(built)
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
        # It asks the policy itself: the log of an episode holds only what the episode sampled.
        preservation(policy, environment, chat, environment.system_prompt, config),
        of_stages,
    )
    return policy, rollout
