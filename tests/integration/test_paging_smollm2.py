"""MemGPT's paging with SmolLM2-135M in the real engine.

Alert, flush and recursive summary happen in an episode, a call of the model is executed, and every segment is
what the engine was given.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from actors.engine.policy import VLLMPolicy
from actors.environments.recall import RecallEnvironment
from actors.episodes.episode import EpisodeSpec, LiveActor
from actors.episodes.rollout import WriteBatcher
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.memory.base import Agent
from actors.memory.paging import PagingMemory
from actors.memory.paging_tools import Call
from actors.text.chat_template import ChatFormat
from actors.text.retrieval import Embedder, load_embedder
from actors.types import AdapterKey, FastWeights, Generation, Probe, Sampling, Segment
from configs.schema import (
    EmbedderConfig,
    EngineConfig,
    FastWeightsConfig,
    MemoryConfig,
    ModelConfig,
    PagingConfig,
    RecallConfig,
)
from tests.unit.rollout_fakes import ScriptedWriter, run_episode

pytestmark = pytest.mark.engine_in_process
FACT = "My cat is called Zorro."
PAGING = PagingConfig(max_calls=1, max_call_tokens=24)
MEMORY = MemoryConfig(policy="paging", max_context_tokens=640, max_summary_tokens=32, paging=PAGING)
ENVIRONMENT = RecallEnvironment(
    RecallConfig(sessions=10, facts_per_session=2, questions=1, filler_sentences=5)
)
SPEC = EpisodeSpec(
    next(ENVIRONMENT.tasks("eval", 0, 0)), "e", temperature=0.0, max_answer_tokens=8, max_turns=3, seed=0
)


class _Recorder:
    """The engine, and what it was given."""

    def __init__(self, engine: VLLMPolicy) -> None:
        self.version = engine.version
        self.calls: list[tuple[tuple[int, ...], Generation]] = []
        self._engine = engine

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        generation = await self._engine.generate(prompt_ids, sampling, adapter)
        self.calls.append((tuple(prompt_ids), generation))
        return generation

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        raise AssertionError("paging writes no weights")

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        raise AssertionError("paging installs nothing")


@pytest.fixture(scope="module")
def engine(model_path: Path) -> Iterator[VLLMPolicy]:
    basis = compute_basis_from_checkpoint(
        model_path, FastWeightsConfig(last_layers=1, projections=("down_proj",)), seed=0
    )
    config = EngineConfig(slots=2, max_model_tokens=800, kv_cache_gib=0.25)
    policy = VLLMPolicy(model_path, ModelConfig(), config, basis, (2,), 0, threads=1, seed=0)
    yield policy
    policy.close()


def _embedder() -> Embedder:
    return load_embedder(EmbedderConfig())


def _check(
    segments: Sequence[Segment], calls: Sequence[tuple[tuple[int, ...], Generation]], chat: ChatFormat
) -> None:
    """Each sampled span stands behind the prompt that the engine was given; no prompt is over L_max."""
    held: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for segment in segments:
        ids = tuple(segment.token_ids.tolist())
        held.update((ids[: span.start], ids[span.start : span.end]) for span in segment.spans)
        assert segment.action_mask.any() and (segment.logprobs[segment.action_mask] <= 0).all()
    assert held == Counter((prompt, generation.token_ids) for prompt, generation in calls)
    assert all(len(prompt) <= MEMORY.max_context_tokens + len(chat.assistant_open) for prompt, _ in calls)


def test_an_episode_pages(engine: VLLMPolicy, chat: ChatFormat) -> None:
    recorder, memory = _Recorder(engine), PagingMemory(MEMORY, _embedder)
    trajectory = asyncio.run(
        run_episode(SPEC, ENVIRONMENT, recorder, WriteBatcher(ScriptedWriter()), chat, memory, "basis")
    )
    events = trajectory.memory_events
    _check(trajectory.segments, recorder.calls, chat)
    assert events["flushes"] >= 2 and events["warnings"] >= 2
    assert events.get("summaries", 0) + events.get("empty_summaries", 0) >= events["flushes"]
    written = [
        (chat.decode(prompt), chat.decode(generation.token_ids).strip())
        for prompt, generation in recorder.calls
    ]
    summaries = [(prompt, text) for prompt, text in written if "Write the new summary" in prompt]
    # the model's own summary, summarised again
    assert summaries[0][1] and summaries[0][1][:60] in summaries[1][0]
    sessions = SPEC.task.payload["sessions"]
    first = next(prompt for prompt, _ in written if "System alert" in prompt)
    assert sessions[0][:40] in first and sessions[0][:40] in summaries[0][0]
    asked, answered = written[-1]
    assert sessions[-1][:40] in asked and sessions[0] not in asked
    assert SPEC.task.payload["questions"][0]["question"] in asked
    answer = chat.decode(chat.encode(answered)[: SPEC.max_answer_tokens]).strip()
    assert trajectory.outcome.answers[0].prediction == answer
    assert {span.kind for segment in trajectory.segments for span in segment.spans} == {"act", "extract"}


def test_a_call_of_the_model_is_executed(engine: VLLMPolicy, chat: ChatFormat) -> None:
    """The turn shows the call, because SmolLM2-135M calls no tool by itself. Either search finds the fact."""
    recorder, memory = _Recorder(engine), PagingMemory(MEMORY, _embedder)
    actor = LiveActor(recorder, WriteBatcher(ScriptedWriter()), None, SPEC, "basis")
    agent = Agent(actor, chat, "You are helpful.", "What is the cat called?")

    async def story() -> None:
        await memory.read(agent, FACT)
        memory._of(agent)._storage.run(Call("archival_insert", {"text": FACT}, followed=False))
        request = 'Search your messages: reply with {"call": "recall_search", "query": "Zorro"}'
        await memory.answer(agent, request, SPEC.max_answer_tokens)

    asyncio.run(story())
    assert memory.events["recall_searches"] + memory.events["archival_searches"] >= 1
    assert f"Found 1, page 1 of 1:\n1. {FACT}" in chat.decode(recorder.calls[1][0])
    _check(agent.finish(), recorder.calls, chat)
