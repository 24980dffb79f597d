"""A policy and a writer that are scripted by functions, for tests of the episode loop around them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import numpy as np

from actors.environments.base import Environment
from actors.episodes.episode import EpisodeSpec, play_episode, score_episode
from actors.episodes.hosted_session import HostedSession
from actors.memory.base import Memory
from actors.memory.build import Surroundings
from actors.protocols import AsyncWriter, Policy
from actors.speech import Decoding, Heard, Spoken
from actors.text.chat_template import ChatFormat
from actors.text.retrieval import Embedder
from actors.types import (
    AdapterKey,
    FastWeights,
    Generation,
    Probe,
    Sampling,
    Trajectory,
    WriteRequest,
    WriteResult,
)


def _no_embedder() -> Embedder:
    raise AssertionError("this test has no embedder")


SURROUNDINGS = Surroundings(window_tokens=4096, answer_tokens=64, embedder=_no_embedder)
MODULE = "model.layers.5.mlp.down_proj"


async def run_episode(
    spec: EpisodeSpec,
    environment: Environment,
    policy: Policy,
    writer: AsyncWriter,
    chat: ChatFormat,
    memory: Memory,
    basis_id: str,
) -> Trajectory:
    """Play and score one episode, without slots and deadlines."""
    session = HostedSession(environment, spec.task, limit_s=30)
    try:
        return await score_episode(
            await play_episode(spec, session, policy, writer, chat, memory, basis_id, None)
        )
    finally:
        await session.close()


class ScriptedPolicy:
    """A Policy whose replies come from ``script(prompt_ids, sampling, adapter)``.

    It records every call, and refuses adapters that are not installed.
    """

    def __init__(
        self, script: Callable[[Sequence[int], Sampling, AdapterKey], Generation], delay_s: float = 0.0
    ) -> None:
        self.version = 3
        self.calls: list[tuple[tuple[int, ...], Sampling, AdapterKey]] = []
        self.installed: dict[str, FastWeights] = {}
        self.probes: list[Probe | None] = []  # of each install
        self.released: list[str] = []
        self.decodings: list[Decoding] = []  # of each reply that was spoken
        self.step_s = 0.0  # of a token that is spoken
        self.running = 0
        self.most_running = 0
        self._script = script
        self._delay_s = delay_s

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        assert adapter.revision == 0 or adapter.name in self.installed, f"{adapter.name} is not installed"
        self.calls.append((tuple(prompt_ids), sampling, adapter))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self._delay_s)
            return self._script(prompt_ids, sampling, adapter)
        finally:
            self.running -= 1

    async def speak(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        adapter: AdapterKey,
        decoding: Decoding,
        heard: Heard,
    ) -> Spoken:
        generation = await self.generate(prompt_ids, sampling, adapter)
        self.decodings.append(decoding)
        ids, logprobs = generation.token_ids, generation.logprobs
        for end in range(1, len(ids) + 1):
            await asyncio.sleep(self.step_s)
            if heard(ids[:end]):
                return Spoken(Generation(ids[:end], logprobs[:end], "stop"))
        return Spoken(generation)

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        assert key.name not in self.installed and key.name not in self.released, f"{key.name} is reused"
        self.probes.append(probe)
        self.installed[key.name] = weights

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        for key in keys:
            self.installed.pop(key.name, None)
            self.released.append(key.name)


class ScriptedWriter:
    """A FastWeightWriter whose outcomes come from ``script(request)``.

    An accepted write is a matrix filled with the revision's number.
    """

    def __init__(self, script: Callable[[WriteRequest], str] = lambda request: "accepted") -> None:
        self.batches: list[list[WriteRequest]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._script = script

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        assert self.gate.wait(timeout=10), "the test forgot to open the writer's gate"
        self.batches.append(list(requests))
        return [self._result(request) for request in requests]

    def _result(self, request: WriteRequest) -> WriteResult:
        outcome = self._script(request)
        if outcome == "rolled_back":
            return WriteResult(
                request.weights, None, 2.0, 9.0, 1, 0.01, "rolled_back", "the loss rose from 2.0 to 9.0"
            )
        assert outcome == "accepted"
        revision = request.weights.revision + 1
        weights = FastWeights(
            request.weights.basis_id, revision, {MODULE: np.full((4, 2), revision, dtype=np.float32)}
        )
        return WriteResult(weights, Probe((1, 2), (-2.0,), (-1.0,)), 2.0, 1.0, 5, 0.01, "accepted", "")


def sampled(ids: Sequence[int], finish: str = "stop") -> Generation:
    return Generation(
        tuple(ids),
        tuple(-0.1 * (place + 1) for place in range(len(ids))),
        "stop" if finish == "stop" else "length",
    )
