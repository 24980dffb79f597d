"""How an agent reads, remembers and answers. Each memory policy is one file, and plugs into the same loop.

play --text--> Memory.read / Memory.answer --> Agent: running context, asides, segments, write log
                                                 |
                                                 +--sample, learn--> Actor (theta + Delta, or a demonstration)

Most policies keep one running context. They differ in what they do when it holds more than L_max tokens: they
are a ``ContextMemory``. The simplest one, ``TruncationMemory``, only drops tokens; it stands here too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Literal, Protocol

from actors.text.chat_template import ChatFormat, Ids
from actors.text.context import Context
from actors.text.split_text import split_text
from actors.types import (
    FastWeights,
    FinishReason,
    Flashcard,
    Generation,
    PolicyVersion,
    Segment,
    SpanKind,
    WriteExample,
    WriteRecord,
    WriteRequest,
    WriteResult,
)


class Actor(Protocol):
    """Samples and learns for one episode."""

    @property
    def version(self) -> PolicyVersion: ...

    @property
    def weights(self) -> FastWeights:
        """The revision in force."""
        ...

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        """Continue ``prompt_ids`` under ``weights``."""
        ...

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        """Write ``examples`` (at least one) into the fast weights. An accepted result changes ``weights``.

        ``cards``: all of the episode so far, the new ones included; none where a memory writes other text.
        Also returns the request that was made.
        """
        ...


class Agent:
    """One episode's agent: its running context, its finished segments, and its write log. Single-use."""

    def __init__(self, actor: Actor, chat: ChatFormat, system_prompt: str, question: str) -> None:
        self.actor = actor
        self.chat = chat
        self.system_prompt = system_prompt
        self.question = question
        self.turn_tells = True  # whether a turn that wants an answer also tells something to remember
        self.turn_stop: tuple[str, ...] = ()  # texts that end the answer to the turn
        # of the last answer: how it ended, the tokens of its context, and its own
        self.last_act: tuple[FinishReason, int, int] = ("stop", 0, 0)
        self.turn_role: Literal["user", "tool", "assistant"] = "user"  # whose turn is read or answered now
        self.context = self._fresh_context("")
        self.segments: list[Segment] = []
        self.writes: list[WriteRecord] = []

    def turn(self, text: str) -> Ids:
        """``text`` of the environment as a whole turn: a user's, a tool's, or a reply that nobody sampled."""
        if self.turn_role == "assistant":
            ids = self.chat.reply(text)
            return self.chat.assistant_open + ids + self.chat.assistant_close(ids)
        return self.chat.result(text) if self.turn_role == "tool" else self.chat.user(text)

    async def reply(self, kind: SpanKind, max_tokens: int) -> str:
        """Sample the next reply and close it as the chat template does.

        Returns what it says: its text without the stop token and without thoughts.
        """
        self.context.observe(self.chat.assistant_open)
        prompt = self.context.ids
        generation = await self.actor.sample(prompt, kind, max_tokens)
        text = self.chat.said(generation.token_ids)
        if kind == "act":
            generation, text = ended_at(self.turn_stop, generation, text, self.chat.said)
            self.last_act = (generation.finish_reason, len(prompt), len(generation.token_ids))
        self.context.act(generation, kind)
        self.context.observe(self.chat.assistant_close(generation.token_ids))
        return text

    async def aside(self, prompt: str, kind: SpanKind, max_tokens: int) -> str:
        """Sample a reply to ``prompt`` in a context of its own. The running context does not see it.

        The aside is a segment like any other, so it is trained on.
        """
        running, self.context = self.context, self._fresh_context("")
        self.context.observe(self.chat.user(prompt))
        try:
            return await self.reply(kind, max_tokens)
        finally:
            self._end_segment()
            self.context = running

    async def write(
        self,
        text: str,
        cards: Sequence[Flashcard],
        examples: Sequence[WriteExample],
        rejected: int,
        repaired: int = 0,
    ) -> None:
        """Write ``examples`` (at least one) into the fast weights and log it.

        ``text`` is what the agent said for this write. ``rejected`` counts its unusable flashcards,
        ``repaired`` those that were nearly JSON.
        """
        earlier = (record.flashcards for record in self.writes if record.outcome == "accepted")
        known = {card.question: card for card in (*chain.from_iterable(earlier), *cards)}
        request, result = await self.actor.learn(examples, [*known.values()])
        self._log(text, cards, request, rejected, repaired, result)

    def skip_write(self, text: str, rejected: int, reason: str, repaired: int = 0) -> None:
        """Log a write that did not happen, for ``reason``."""
        # NaN, not 0: an average that forgets to leave empty writes out shows it
        nothing = WriteResult(self.actor.weights, None, math.nan, math.nan, 0, 0.0, "empty", reason)
        self._log(text, (), WriteRequest("", self.actor.weights, ()), rejected, repaired, nothing)

    def clear(self, remembered: str = "") -> None:
        """End the segment. The next one begins with the system prompt and ``remembered`` as a user turn.

        An empty ``remembered`` adds no turn.
        """
        self._end_segment()
        self.context = self._fresh_context(remembered)

    def truncate(self, limit: int) -> None:
        """End the segment. The next one begins with the newest tokens of this one, ``limit`` in all."""
        kept = self.context.truncated(limit)
        self._end_segment()
        self.context = kept

    def finish(self) -> tuple[Segment, ...]:
        """End the last segment. Segments without a sampled token teach nothing and are left out."""
        self.clear()
        return tuple(self.segments)

    def _log(
        self,
        text: str,
        cards: Sequence[Flashcard],
        request: WriteRequest,
        rejected: int,
        repaired: int,
        result: WriteResult,
    ) -> None:
        record = WriteRecord(
            revision=self.actor.weights.revision,
            examples=request.examples,
            flashcards=tuple(cards),
            extraction=text,
            rejected_flashcards=rejected,
            prompt_tokens=sum(len(example.prompt_ids) for example in request.examples),
            answer_tokens=sum(len(example.answer_ids) for example in request.examples),
            loss_before=result.loss_before,
            loss_after=result.loss_after,
            steps=result.steps,
            seconds=result.seconds,
            outcome=result.outcome,
            reason=result.reason,
            preserved=request.preserved,
            seed=request.seed,
            preserved_kl=result.preserved_kl,
            repaired_flashcards=repaired,
            preserved_used=result.preserved_used,
            shared=result.shared,
        )
        self.writes.append(record)

    def _end_segment(self) -> None:
        if self.context.has_actions:
            self.segments.append(self.context.close(self.actor.version, self.actor.weights.revision))

    def _fresh_context(self, remembered: str) -> Context:
        if remembered:
            return Context(self.chat.opening(self.system_prompt, remembered))
        system = self.chat.system(self.system_prompt)
        return Context(system, self.chat.opened_by(system))


class Memory(Protocol):
    """The memory of one episode. Single-use: an object holds what its episode remembers."""

    @property
    def events(self) -> Mapping[str, int]:
        """Counts of what the memory did, by names of its own, e.g. answers that did not keep to a form."""
        ...

    async def read(self, agent: Agent, text: str) -> None:
        """Take in a text that needs no answer."""
        ...

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        """Return the agent's reply to ``text``, at most ``max_tokens`` tokens long."""
        ...


class ContextMemory(ABC):
    """One running context that is relieved when it holds more than ``max_context_tokens`` (L_max).

    A turn that needs an answer is never cleared before the answer: room is made first. A text that is only
    read may overfill the context, which is then relieved. A text longer than L_max is read in pieces.

    A context in which nothing was told holds questions and own answers: nothing is moved out of it.
    """

    def __init__(self, max_context_tokens: int) -> None:
        self.max_context_tokens = max_context_tokens
        self.events: Counter[str] = Counter()

    async def read(self, agent: Agent, text: str) -> None:
        for turn in turns_of(text, agent.turn, self.max_context_tokens):
            await self.take_in(agent, turn)

    async def take_in(self, agent: Agent, turn: Ids) -> None:
        """Append a turn that tells something, and relieve a context that it overfills."""
        agent.context.tell(turn)
        if self.is_full(agent, 0):
            await self.relieve(agent, 0)

    async def answer(self, agent: Agent, text: str, max_tokens: int) -> str:
        turn = agent.turn(text)
        if self.is_full(agent, len(turn)):
            await self.relieve(agent, len(turn))
        if agent.turn_tells:
            agent.context.tell(turn)
        else:
            agent.context.observe(turn)
        return await agent.reply("act", max_tokens)

    def is_full(self, agent: Agent, incoming: int) -> bool:
        """Return whether the trigger fires: more than L_max tokens, and something there to move out."""
        return len(agent.context) + incoming > self.max_context_tokens and not agent.context.is_fresh

    def cleared_without_news(self, agent: Agent, remembered: str = "") -> bool:
        """Clear and count a context in which nothing was told. Returns False where something was."""
        if agent.context.told:
            return False
        self.events["cleared_without_news"] += 1
        agent.clear(remembered)
        return True

    @abstractmethod
    async def relieve(self, agent: Agent, incoming: int) -> None:
        """Make room in a context that is over L_max, or would be with a turn of ``incoming`` tokens.

        That turn is answered from the context which this method leaves.
        """


class TruncationMemory(ContextMemory):
    """The row "truncation"; with the engine's window as the limit also the row "full context".

    Keeps the system prompt and drops the oldest tokens. What remains opens a new segment, because a segment
    is always what the engine saw.
    """

    async def relieve(self, agent: Agent, incoming: int) -> None:
        self.events["truncations"] += 1
        agent.truncate(self.max_context_tokens - incoming)


def ended_at(
    stop: Sequence[str], generation: Generation, text: str, said: Callable[[Sequence[int]], str]
) -> tuple[Generation, str]:
    """Cut what was sampled behind the first of the ``stop`` texts in what it says, and ``text`` before it.

    The engine knows no stop texts, it gives ids for ids. The beginning of a sample is itself a sample of the
    policy, so what is kept is trained as it was sampled. What is cut off has cost its time.
    """
    if not any(end in text for end in stop):
        return generation, text

    def has_ended(tokens: int) -> bool:
        beginning = said(generation.token_ids[:tokens])
        return any(end in beginning for end in stop)

    kept = bisect_left(range(len(generation.token_ids)), True, key=has_ended)
    ids, logprobs, versions = generation.token_ids, generation.logprobs, generation.versions
    before = min(text.find(end) for end in stop if end in text)
    return Generation(ids[:kept], logprobs[:kept], "stop", versions[:kept]), text[:before]


def turns_of(text: str, turn: Callable[[str], Ids], limit: int) -> list[Ids]:
    """Return ``text`` as turns of at most ``limit`` tokens each. ``turn`` makes one of a piece.

    Cuts at lines, else at sentences, else at words. Only white space at the cuts is lost.
    """
    return [turn(piece) for piece in split_text(text, lambda piece: len(turn(piece)), limit)]
