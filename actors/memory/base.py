"""How an agent reads, remembers and answers: one memory policy a file, all of them parts of the same episode loop.

play --text--> Memory.read / Memory.answer --> Agent: its running context, asides, segments, write log
                                                 |
                                                 +--sample, learn--> Actor (theta + Delta, or a demonstration)

Most policies keep one running context and only differ in what they do when it holds more than L_max tokens: they are a ``ContextMemory``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from actors.text.chat_template import ChatFormat, Ids
from actors.text.context import Context
from actors.text.split_text import split_text
from actors.types import (
    FastWeights,
    Generation,
    PolicyVersion,
    Segment,
    SpanKind,
    WriteExample,
    WriteRecord,
    WriteResult,
)


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
        self.context = self._fresh_context("")
        self.segments: list[Segment] = []
        self.writes: list[WriteRecord] = []

    async def reply(self, kind: SpanKind, max_tokens: int) -> str:
        """Sample the next reply, closed as the chat template closes it. Returns its text without the stop token."""
        self.context.observe(self.chat.assistant_open)
        generation = await self.actor.sample(self.context.ids, kind, max_tokens)
        self.context.act(generation, kind)
        self.context.observe(self.chat.assistant_close(generation.token_ids))
        return self.chat.decode(generation.token_ids)

    async def aside(self, prompt: str, kind: SpanKind, max_tokens: int) -> str:
        """Sample a reply to ``prompt`` in a context of its own, which is a segment like any other; the running context does not see it."""
        running, self.context = self.context, self._fresh_context("")
        self.context.observe(self.chat.user(prompt))
        try:
            return await self.reply(kind, max_tokens)
        finally:
            self._end_segment()
            self.context = running

    def clear(self, remembered: str = "") -> None:
        """End the segment and begin the next with the system prompt and, unless it is empty, ``remembered`` as a first user turn."""
        self._end_segment()
        self.context = self._fresh_context(remembered)

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

    def _fresh_context(self, remembered: str) -> Context:
        opening = self.chat.system(self.system_prompt)
        return Context(opening + self.chat.user(remembered) if remembered else opening)


class Memory(Protocol):
    """One episode's memory: built for it, so it may hold what it remembers. Single-use."""

    @property
    def events(self) -> Mapping[str, int]:
        """What it did so far, counted by names of its own; failures of the model to keep to a form above all."""
        ...

    async def read(self, agent: Agent, text: str) -> None:
        """Take in what needs no answer."""
        ...

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        """The agent's reply, at most ``max_tokens`` long, to a turn that wants one."""
        ...


class ContextMemory(ABC):
    """One running context that is relieved when it holds more than ``max_context_tokens`` (L_max).

    A turn that wants an answer is never cleared away unanswered: room is made before it. Any other may overfill the context, which is then relieved.
    A text longer than L_max comes in pieces that are not.
    """

    def __init__(self, max_context_tokens: int) -> None:
        self.max_context_tokens = max_context_tokens
        self.events: Counter[str] = Counter()

    async def read(self, agent: Agent, text: str) -> None:
        for turn in user_turns(text, agent.chat, self.max_context_tokens):
            agent.context.observe(turn)
            if self.is_full(agent, 0):
                await self.relieve(agent, 0)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        turn = agent.chat.user(text)
        if self.is_full(agent, len(turn)):
            await self.relieve(agent, len(turn))
        agent.context.observe(turn)
        return await agent.reply("act", max_tokens)

    def is_full(self, agent: Agent, incoming: int) -> bool:
        """The trigger (TMEM, arXiv 2606.04536): more than L_max tokens, and something there to be moved out."""
        return len(agent.context) + incoming > self.max_context_tokens and not agent.context.is_fresh

    @abstractmethod
    async def relieve(self, agent: Agent, incoming: int) -> None:
        """Make room: the context is over L_max, or would be with the ``incoming`` tokens of a turn that must be answered from the next context."""


def user_turns(text: str, chat: ChatFormat, limit: int) -> list[Ids]:
    """``text`` as one user turn, or, when that is over ``limit`` tokens, as several that are not: cut at lines, else sentences, else words.

    Nothing is lost but white space at the cuts.
    """
    return [chat.user(piece) for piece in split_text(text, lambda piece: len(chat.user(piece)), limit)]
