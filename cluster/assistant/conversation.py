"""One conversation is one episode that does not end: it owns a memory, and learns when its context is full.

    say(text) --> does it fit? --yes--> answer under theta + Delta
                      | no
                      v
                  flashcards of the context -> write -> clear the context   (actors/memory/parametric.py)

It is made of an episode's parts: Agent, ParametricMemory, LiveActor. Four things differ. The user's text
comes turn by turn. Delta can be switched off for answers. A turn that fails or is cancelled leaves the
conversation as it was. A conversation can be saved and loaded.

Not safe for concurrent calls: callers who share a conversation hold a lock around each of its coroutines.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.environments.base import TurnRole
from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory
from actors.memory.standing import standing_cards
from actors.protocols import EngineError, ReceiptError
from actors.text.chat_template import ChatFormat
from actors.text.context import Context
from actors.text.split_text import split_text
from actors.text.tools import Tool
from actors.types import AdapterKey, FastWeights, FinishReason, Flashcard, Probe, WriteRecord
from cluster.assistant.answering import Choice, Manner
from cluster.assistant.known import Known
from cluster.assistant.memory_file import SavedAdapter, SavedMemory, load_memory, save_memory
from cluster.assistant.opening import AssistantError, Parts
from cluster.assistant.speaker import Speaker
from cluster.assistant.tending import Edits, Rebuilt, losses_of, remaining, written_anew


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    ``writes`` came before it, to make room. ``prompt_tokens`` is the context it was sampled from.

    ``revision`` is that of the fast weights in force, 0 without Delta. ``choices`` are all that were asked
    for, the first of them this one; ``reply_tokens`` counts the tokens of all.
    """

    text: str
    finish_reason: FinishReason
    revision: int
    prompt_tokens: int
    reply_tokens: int
    writes: tuple[WriteRecord, ...]
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """Where a conversation stood: its context, its write log, and the Delta of that time."""

    chat: ChatFormat
    context: Context
    writes: tuple[WriteRecord, ...]
    weights: FastWeights
    probe: Probe | None


class Conversation:
    """Answers, reads, writes, saves and loads.

    All coroutines raise EngineError, ReceiptError, WriterError.
    """

    def __init__(self, parts: Parts, name: str, system_prompt: str) -> None:
        self._parts = parts
        config = parts.opening.config
        self._speaker = Speaker(parts, name)
        self._memory = ParametricMemory(config.memory, config.write, config.engine.max_model_tokens)
        self._agent = Agent(self._speaker, parts.chat, system_prompt, "")
        self._name, self._wordings = name, config.memory.wordings
        self._saved: SavedAdapter | None = None  # of the last save or load
        self.known = Known()

    # --- state ------------------------------------------------------------------------------------------

    @property
    def system_prompt(self) -> str:
        return self._agent.system_prompt

    @property
    def delta(self) -> bool:
        """True if answers are sampled under the fast weights."""
        return self._speaker.delta

    @delta.setter
    def delta(self, on: bool) -> None:
        self._speaker.delta = on

    @property
    def temperature(self) -> float:
        """Of answers and extractions; 0 is greedy."""
        return self._speaker.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._speaker.temperature = value

    @property
    def manner(self) -> Manner:
        """How answers are sampled, beside the temperature."""
        return self._speaker.manner

    @manner.setter
    def manner(self, manner: Manner) -> None:
        self._speaker.manner = manner

    @property
    def revision(self) -> int:
        """Of the fast weights; 0 before the first write."""
        return self._speaker.weights.revision

    @property
    def writes(self) -> tuple[WriteRecord, ...]:
        return tuple(self._agent.writes)

    @property
    def cards(self) -> tuple[Flashcard, ...]:
        """The flashcards in the weights that no later one answers anew, oldest first."""
        return tuple(standing_cards(self._agent.writes, self._wordings))

    @property
    def context_tokens(self) -> int:
        return len(self._agent.context)

    @property
    def thinks(self) -> bool:
        """True where every reply begins inside a thought."""
        return self._agent.chat.opens_thought

    @property
    def room(self) -> int:
        """The tokens that turns have in an empty context, before a write: what its opening leaves of them."""
        context = self._agent.context
        return self._memory.max_context_tokens - (len(context) - len(context.after_opening))

    @property
    def unwritten_tokens(self) -> int:
        """The context's tokens that would be lost if it were cleared now."""
        return len(self._agent.context.after_opening)

    def will_write(self, text: str) -> bool:
        """True if ``text`` does not fit into the context, so that a write must come before the answer."""
        return self._memory.is_full(self._agent, len(self._parts.chat.user(text)))

    # --- turns ------------------------------------------------------------------------------------------

    def tell_tools(self, tools: Sequence[Tool]) -> None:
        """Let the agent call ``tools``, and no others, from now on. Raises ChatTemplateError."""
        agent, chat = self._agent, self._parts.chat.with_tools(tools)
        if chat is agent.chat:
            return
        told, rest = agent.context.told, agent.context.after_opening
        agent.chat = chat
        agent.clear()  # the tools stand in the opening
        agent.context.observe(rest)
        agent.context.told = told

    async def say(self, text: str, max_tokens: int, role: TurnRole = "user") -> Reply:
        """Answer ``text``. A text longer than the context is read in pieces; the last piece is answered."""
        before = len(self._agent.writes)
        async with self.all_or_nothing(), self._turn_of(role):
            *front, last = self._pieces(text)
            for piece in front:
                await self._memory.read(self._agent, piece)
            await self._memory.answer(self._agent, last, max_tokens)
        return self._reply(before)

    async def read(self, text: str, role: TurnRole = "user") -> tuple[WriteRecord, ...]:
        """Read ``text`` without answering it; returns the writes that made room for it."""
        before = len(self._agent.writes)
        async with self.all_or_nothing(), self._turn_of(role):
            await self._memory.read(self._agent, text)
        return tuple(self._agent.writes[before:])

    async def said(self, text: str) -> None:
        """Put ``text`` into the context as the agent's own reply, for a conversation that began elsewhere."""
        chat = self._agent.chat
        async with self.all_or_nothing():
            for piece in self._pieces(text):
                ids = chat.reply(piece)
                self._agent.context.tell(chat.assistant_open + ids + chat.assistant_close(ids))
                if self._memory.is_full(self._agent, 0):
                    await self._memory.relieve(self._agent, 0)

    async def ask(self, question: str, max_tokens: int) -> Reply:
        """Answer from an empty context: what the weights alone know.

        The conversation's context does not change.
        """
        before = len(self._agent.writes)
        async with self.all_or_nothing():
            await self._agent.aside(question, "act", max_tokens)
        return self._reply(before)

    async def write(self) -> WriteRecord | None:
        """Write the context into the weights and clear it. Returns None if the context is empty."""
        if self._agent.context.is_fresh:
            return None
        async with self.all_or_nothing():
            await self._memory.relieve(self._agent, 0)
        return self._agent.writes[-1]

    async def reset(self) -> None:
        """Start anew: no Delta, no flashcards, an empty context."""
        opening = self._parts.opening
        zero = FastWeights(opening.basis.id, 0, {})
        await self._become(SavedMemory(zero, opening.system_prompt, (), (), None))
        self.known = Known()

    def save(self, folder: Path, overwrite: bool) -> None:
        """Save the conversation, see memory_file.py. Raises AssistantError.

        The adapter is written where it has changed since the last save there: most turns write nothing.
        """
        earlier, self._saved = self._saved, None  # what a save that fails leaves is not known
        self._saved = save_memory(self._state(), self._parts.opening, folder, overwrite, earlier)

    async def load(self, folder: Path) -> None:
        """Replace this conversation by the one in ``folder``.

        Raises AssistantError too, ForeignMemory for one of another model; then nothing changed.
        """
        memory = load_memory(folder, self._parts.opening)
        await self._become(memory)
        with suppress(OSError):
            self._saved = SavedAdapter.of(folder, memory.weights)

    async def tend(self, edits: Edits) -> Rebuilt:
        """Correct and forget flashcards: Delta is rebuilt from those that remain.

        Raises AssistantError too; then nothing changed.
        """
        memory, before = self._state(), self.cards
        cards = edits.applied(before)
        if cards == before:
            raise AssistantError("nothing changes: the flashcards say that already")
        return await self.rebuild(memory, before, cards)

    async def rebuild(
        self, memory: SavedMemory, before: Sequence[Flashcard], cards: tuple[Flashcard, ...]
    ) -> Rebuilt:
        """Continue with ``memory``, and with a Delta that is made of ``cards`` alone, and not of ``before``.

        It is made under an episode of its own: if anything fails, this conversation stays as it is. Raises
        AssistantError too.
        """
        parts, started = self._parts, time.perf_counter()
        speaker = Speaker(parts, self._name)
        try:
            writes = await written_anew(cards, memory.system_prompt, parts, self._memory, speaker)
            adapter = AdapterKey(speaker.version, speaker.episode_id, speaker.weights.revision)
            losses = await losses_of(cards, memory.system_prompt, parts, adapter)
            await self._become(replace(memory, weights=speaker.weights, writes=writes, probe=speaker.probe))
        finally:
            await speaker.close()
        return Rebuilt(cards, losses, time.perf_counter() - started, remaining(before, cards, memory.context))

    async def close(self) -> None:
        """Release the adapter in the engine."""
        await self._speaker.close()

    def standing(self) -> Standing:
        """Where the conversation stands now, for ``return_to``."""
        agent, speaker = self._agent, self._speaker
        context, writes = copy.deepcopy(agent.context), tuple(agent.writes)
        return Standing(agent.chat, context, writes, speaker.weights, speaker.probe)

    async def return_to(self, standing: Standing) -> None:
        """Go back to where the conversation stood. If the engine fails, nothing has changed."""
        now = self._speaker.weights
        if now is not standing.weights and (now.revision, standing.weights.revision) != (0, 0):
            await self._speaker.become(standing.weights, standing.probe)
        agent = self._agent
        agent.chat, agent.context = standing.chat, copy.deepcopy(standing.context)
        agent.writes = [*standing.writes]

    # --- helpers ----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _turn_of(self, role: TurnRole) -> AsyncIterator[None]:
        self._agent.turn_role = role
        try:
            yield
        finally:
            self._agent.turn_role = "user"

    async def _undo(self, standing: Standing) -> None:
        try:
            await self.return_to(standing)
        except (EngineError, ReceiptError):  # the engine is dead: the writes stay, what was read is in them
            self._agent.clear()

    def _state(self) -> SavedMemory:
        agent, speaker = self._agent, self._speaker
        unwritten = agent.context.after_opening
        return SavedMemory(
            speaker.weights,
            agent.system_prompt,
            unwritten,
            tuple(agent.writes),
            speaker.probe,
            self._parts.chat.decode(unwritten),
            self._wordings,
        )

    async def _become(self, memory: SavedMemory) -> None:
        await self._speaker.become(memory.weights, memory.probe)
        self._agent = Agent(self._speaker, self._parts.chat, memory.system_prompt, "")
        self._agent.context.tell(memory.context_ids)
        self._agent.writes = list(memory.writes)
        self.known = Known(from_the_beginning=False)

    def _pieces(self, text: str) -> list[str]:
        """``text`` in pieces that fit into the context as user turns."""
        chat = self._parts.chat
        return split_text(text, lambda piece: len(chat.user(piece)), self._memory.max_context_tokens)

    def _reply(self, before: int) -> Reply:
        prompt_tokens, choices = self._speaker.last_answer
        writes = tuple(self._agent.writes[before:])
        revision = self._speaker.revision_for("act")
        tokens = sum(len(choice.generation.token_ids) for choice in choices)
        first = choices[0]
        return Reply(first.text, first.finish_reason, revision, prompt_tokens, tokens, writes, choices)

    @asynccontextmanager
    async def all_or_nothing(self) -> AsyncIterator[None]:
        """Undo all of the block's changes if it fails or is cancelled, its writes too. It may be nested."""
        agent, before, standing = self._agent, len(self._agent.writes), self.standing()
        try:
            yield
        except BaseException:
            await _to_its_end(self._undo(standing))
            raise
        finally:
            agent.segments.clear()
            # Delta itself is kept, so nobody replays these writes: drop their token ids.
            agent.writes[before:] = [
                replace(record, examples=(), preserved=()) for record in agent.writes[before:]
            ]


async def _to_its_end(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await ``coroutine`` even where the caller is cancelled again: half an undoing would be worse."""
    task = asyncio.ensure_future(coroutine)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()
