"""What happens when the context is full: one policy a file, all of them parts of the same episode loop.

run_episode --observes--> Agent.context        when it holds more than max_context_tokens:
                              ^  |
                              |  v
               Memory.relieve(agent, incoming)  --extract, write--> Actor (theta + Delta, or a demonstration)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from actors.chat import ChatFormat, Ids
from actors.context import Context
from actors.types import FastWeights, Generation, PolicyVersion, Segment, SpanKind, WriteExample, WriteRecord, WriteResult

_BREAKS = (re.compile(r"(?<=\n)"), re.compile(r"(?<=[.!?]\s)"), re.compile(r"(?<=\s)"))


class Actor(Protocol):
    """Who samples and learns in an episode."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def weights(self) -> FastWeights:
        """The revision in force."""
        ...

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        """Continue ``prompt_ids`` under ``weights``."""
        ...

    async def learn(self, examples: Sequence[WriteExample]) -> WriteResult:
        """Write ``examples`` (at least one) into the fast weights; ``weights`` moves on when the result is accepted."""
        ...


class Agent:
    """One episode's agent: its running context, the segments behind it, and its write log. Single-use."""

    def __init__(self, actor: Actor, chat: ChatFormat, system_prompt: str, question: str) -> None:
        self.actor = actor
        self.chat = chat
        self.system_prompt = system_prompt
        self.question = question
        self.context = self._fresh_context()
        self.segments: list[Segment] = []
        self.writes: list[WriteRecord] = []

    async def reply(self, kind: SpanKind, max_tokens: int) -> str:
        """Sample the next reply, closed as the chat template closes it. Returns its text without the stop token."""
        self.context.observe(self.chat.assistant_open)
        generation = await self.actor.sample(self.context.ids, kind, max_tokens)
        self.context.act(generation, kind)
        self.context.observe(self.chat.assistant_close(generation.token_ids))
        return self.chat.decode(generation.token_ids)

    def clear(self) -> None:
        """End the segment and begin the next with the system prompt alone."""
        self._end_segment()
        self.context = self._fresh_context()

    def truncate(self, limit: int) -> None:
        """End the segment and begin the next with the newest tokens of this one, ``limit`` in all."""
        kept = self.context.truncated(limit)
        self._end_segment()
        self.context = kept

    def finish(self) -> tuple[Segment, ...]:
        """End the last segment. Segments in which nothing was sampled hold nothing to learn from and are left out."""
        self.clear()
        return tuple(self.segments)

    def _end_segment(self) -> None:
        if self.context.has_actions:
            self.segments.append(self.context.close(self.actor.version, self.actor.weights.revision))

    def _fresh_context(self) -> Context:
        return Context(self.chat.system(self.system_prompt))


class Memory(Protocol):
    """Stateless: what it must remember of an episode stands in the agent's write log."""

    @property
    def max_context_tokens(self) -> int:
        """L_max."""
        ...

    async def relieve(self, agent: Agent, incoming: int) -> None:
        """Make room: the context is over L_max, or would be with the ``incoming`` tokens of a turn that must be answered from the next context."""
        ...


def is_full(agent: Agent, memory: Memory, incoming: int) -> bool:
    """The trigger (TMEM, arXiv 2606.04536): more than L_max tokens, and something there to be moved out."""
    return len(agent.context) + incoming > memory.max_context_tokens and not agent.context.is_fresh


def user_turns(text: str, chat: ChatFormat, limit: int) -> list[Ids]:
    """``text`` as one user turn, or, when that is over ``limit`` tokens, as several that are not: cut at lines, else sentences, else words.

    Nothing is lost but white space at the cuts.
    """
    return [chat.user(piece) for piece in split_text(text, lambda piece: len(chat.user(piece)), limit)]


def split_text(text: str, measure: Callable[[str], int], limit: int) -> list[str]:
    """Pieces of at most ``limit`` by ``measure`` (a single character may exceed it) that join to ``text``."""
    if len(text) <= 1 or measure(text) <= limit:
        return [text]
    parts: list[str] = []
    for pattern in _BREAKS:
        parts = [part for part in pattern.split(text) if part]
        if len(parts) > 1:
            break
    else:
        parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    frame = measure("")
    packs: list[str] = []
    room = -1
    for part in parts:
        size = measure(part) - frame
        if room < size:
            packs.append("")
            room = limit - frame
        packs[-1] += part
        room -= size
    if len(packs) == 1:  # the parts' sizes do not add up to the whole's: halve, so that the recursion ends
        packs = ["".join(parts[: len(parts) // 2]), "".join(parts[len(parts) // 2 :])]
    return [piece for pack in packs for piece in split_text(pack, measure, limit)]
