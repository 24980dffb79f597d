"""The context that is cut to its newest tokens, and texts that come in pieces."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.memory.base import Agent, TruncationMemory, turns_of
from actors.memory.build import build_memory
from actors.memory.parametric import ParametricMemory
from actors.text.chat_template import ChatFormat
from actors.text.split_text import split_text
from configs.schema import MemoryConfig, WriteConfig
from tests.unit.rollout_fakes import SURROUNDINGS
from tests.unit.test_memory import _Actor, _agent


def test_truncation_keeps_the_system_prompt_and_the_newest_tokens(chat: ChatFormat) -> None:
    agent = _agent(chat, _Actor(chat, ["Noted."]))
    asyncio.run(agent.reply("act", 8))
    agent.context.tell(chat.user("The train left on time."))
    before = agent.context.ids
    limit = len(before) - 5
    asyncio.run(TruncationMemory(limit).relieve(agent, 4))
    opening = chat.system("Be brief.")
    assert agent.context.ids[: len(opening)] == opening
    assert len(agent.context) + 4 == limit
    assert agent.context.ids[len(opening) :] == before[len(before) - (limit - 4 - len(opening)) :]
    (segment,) = agent.segments
    assert segment.token_ids.tolist() == list(before)
    assert not agent.context.has_actions  # the reply in what was kept is not trained on twice
    assert agent.writes == []


def test_the_trigger_needs_something_to_move_out(chat: ChatFormat) -> None:
    memory = build_memory(MemoryConfig(max_context_tokens=40), WriteConfig(), SURROUNDINGS)
    agent = Agent(_Actor(chat, []), chat, "Be brief.", "")
    assert not memory.is_full(agent, 1000)
    agent.context.observe([5] * (40 - len(agent.context)))
    assert not memory.is_full(agent, 0) and memory.is_full(agent, 1)
    agent.context.observe([5])
    assert memory.is_full(agent, 0)


def test_a_long_observation_comes_in_turns_that_fit(chat: ChatFormat) -> None:
    text = "\n".join(
        f"Ida: this is line {i}. It has two sentences, and a {'very ' * (i % 7)}long end!" for i in range(60)
    )
    turns = turns_of(text, chat.user, 64)
    assert all(len(turn) <= 64 for turn in turns)
    assert len(turns) < 1.5 * len(chat.encode(text)) / 50  # and they are well filled
    frame = chat.user("")
    bare = "".join(chat.decode(turn).removeprefix(chat.decode(frame[:3])) for turn in turns)
    assert bare.split() == text.split()
    assert turns_of("Short.", chat.user, 64) == [chat.user("Short.")]


@settings(deadline=None)
@given(st.text(alphabet="ab.\n é", max_size=200) | st.text(max_size=60), st.integers(0, 30))
def test_splitting_loses_nothing_and_ends(text: str, limit: int) -> None:
    def measure(piece: str) -> int:
        return 3 + len(piece.encode())  # a frame, and characters of unequal weight

    pieces = split_text(text, measure, limit)
    assert "".join(pieces) == text
    assert all(measure(piece) <= limit or len(piece) <= 1 for piece in pieces)


def test_the_factory_knows_both_policies() -> None:
    assert isinstance(
        build_memory(MemoryConfig(policy="parametric"), WriteConfig(), SURROUNDINGS), ParametricMemory
    )
    assert isinstance(
        build_memory(MemoryConfig(policy="truncation"), WriteConfig(), SURROUNDINGS), TruncationMemory
    )
