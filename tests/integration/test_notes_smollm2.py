"""Linked notes (A-MEM) with SmolLM2-135M: it writes, links and changes notes, and answers from them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.engine.policy import VLLMPolicy
from actors.episodes.episode import EpisodeSpec, LiveActor
from actors.fast_weights.basis import compute_basis_from_checkpoint
from actors.memory.base import Agent
from actors.memory.notes import NotesMemory
from actors.text.chat_template import ChatFormat
from actors.text.retrieval import load_embedder
from actors.types import Segment, Task, WriteRequest, WriteResult
from configs.schema import (
    EmbedderConfig,
    EngineConfig,
    FastWeightsConfig,
    MemoryConfig,
    ModelConfig,
    NotesConfig,
)

pytestmark = pytest.mark.engine_in_process
TOLD = (
    "Ida: I adopted a grey cat from the shelter in Porto. I named her Pepper.",
    "Tomas: My bakery in Lisbon opens on Friday.\nIda: Congratulations!",
    "Ida: Pepper the cat broke her leg, so we went to the vet.",
)
QUESTION = "What is the name of Ida's cat?"


class _NoWriter:
    async def write(self, request: WriteRequest) -> WriteResult:
        raise AssertionError("notes write no weights")


@pytest.fixture(scope="module")
def policy(model_path: Path, chat: ChatFormat) -> Iterator[VLLMPolicy]:
    config = EngineConfig(slots=4, max_model_tokens=1024, kv_cache_gib=0.25)
    basis = compute_basis_from_checkpoint(
        model_path, FastWeightsConfig(last_layers=1, projections=("down_proj",)), seed=0
    )
    policy = VLLMPolicy(model_path, ModelConfig(), config, basis, chat.stop_token_ids, 0, threads=1, seed=0)
    yield policy
    policy.close()


async def _episode(policy: VLLMPolicy, chat: ChatFormat, seed: int) -> tuple[NotesMemory, Agent]:
    """Greedy for seed 0, else sampled."""
    spec = EpisodeSpec(Task("t", "e", {}, seed), f"e{seed}", 0.0 if seed == 0 else 0.7, 16, 1, seed)
    agent = Agent(
        LiveActor(policy, _NoWriter(), None, spec, "basis"), chat, "Answer in a few words.", QUESTION
    )
    notes = NotesConfig(max_note_tokens=72, retrieved=1)
    config = MemoryConfig(policy="notes", max_context_tokens=512, notes=notes)
    memory = NotesMemory(config, lambda: load_embedder(EmbedderConfig()))
    for text in TOLD:
        await memory.read(agent, text)
        assert agent.context.ids == chat.system("Answer in a few words.")
    await memory.answer(agent, QUESTION, 16)
    agent.finish()
    return memory, agent


def test_the_model_writes_links_and_changes_notes_and_answers_from_them(
    policy: VLLMPolicy, chat: ChatFormat
) -> None:
    async def story() -> list[tuple[NotesMemory, Agent]]:
        return list(await asyncio.gather(*(_episode(policy, chat, seed) for seed in range(4))))

    total: Counter[str] = Counter()
    for memory, agent in asyncio.run(story()):
        events = memory.events
        total += events
        assert events["notes"] == len(TOLD) == len(memory._notes)
        assert [segment.spans[0].kind for segment in agent.segments] == ["extract"] * 5 + ["act"]
        for segment in agent.segments:
            _is_one_reply(segment, 16 if segment.spans[0].kind == "act" else 72)
        prompt = _prompt(agent.segments[-1], chat)
        assert events["retrieved"] == 1 and "Pepper" in prompt
        assert prompt.index("Note ") < prompt.index(QUESTION)
        links = {note.number: set(note.links) for note in memory._notes}
        # both ways
        assert all(number in links[other] for number, others in links.items() for other in others)
        shown = {note.number for note in memory._notes if f"Note {note.number}" in prompt}
        # the nearest note and its links: all of it fits
        assert any(shown == {number, *links[number]} for number in shown)
        assert events["linked"] == len(shown) - 1
        assert all(note.attributes.context in prompt for note in memory._notes if note.number in shown)
        for segment in agent.segments:
            print(chat.decode(segment.token_ids[segment.action_mask]))  # shown when this test fails
    print(dict(total))
    # a model of 135M keeps to the form often, not always; what it misses is counted
    assert total["plain_notes"] <= total["notes"] // 2
    assert total["malformed_links"] <= 4
    assert total["links"] > 0 and total["linked"] > 0 and total["evolved"] > 0


def _is_one_reply(segment: Segment, most: int) -> None:
    """One stretch of sampled tokens with their log-probs, behind a prompt that has none."""
    (span,) = segment.spans
    assert 0 < span.end - span.start <= most
    assert segment.action_mask.sum() == span.end - span.start
    assert (segment.logprobs[segment.action_mask] <= 0).all()
    assert (segment.logprobs[~segment.action_mask] == 0).all()
    assert segment.revision == 0


def _prompt(segment: Segment, chat: ChatFormat) -> str:
    return chat.decode(segment.token_ids[: segment.spans[0].start])
