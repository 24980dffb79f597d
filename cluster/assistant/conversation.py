"""One conversation = one episode that does not end: it owns a memory, and learns when its context is full.

    say(text) --> room? else: flashcards of the context -> write -> context cleared (actors/memory/parametric.py) --> answer under theta + Delta

The parts are those of an episode: Agent, ParametricMemory, LiveActor. What differs: the user's text comes turn by turn; Delta can be switched off
for answers; a turn that fails or is cancelled leaves the conversation as it was before it; it can be saved and loaded.
Not for concurrent calls: whoever shares a conversation holds a lock around each of its coroutines.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from actors.episodes.episode import EpisodeSpec, LiveActor, derived_seed
from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory
from actors.text.split_text import split_text
from actors.types import (
    AdapterKey,
    FastWeights,
    FinishReason,
    Flashcard,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    SpanKind,
    Task,
    WriteExample,
    WriteRecord,
    WriteResult,
)
from cluster.assistant.memory_file import load_memory, save_memory
from cluster.assistant.values import Parts, Reply, SavedMemory

_LIVES = itertools.count(1)
"""Adapter names are never used twice in an engine: every life of every conversation of this process has another."""


class _Speaker:
    """actors.memory.base.Actor of a conversation. ``delta`` off: it answers as the base model does; it extracts and writes under Delta even then."""

    def __init__(self, parts: Parts, name: str) -> None:
        self.delta = True
        self.temperature = parts.opening.config.assistant.temperature
        self.last: tuple[int, int, FinishReason] = (
            0,
            0,
            "stop",
        )  # of what was sampled last: tokens of the prompt, of the reply, how it ended
        self.probe: Probe | None = None
        self._parts = parts
        self._name = name
        self._events = 0
        self._broken = False
        self._life, self._live = self._born()

    @property
    def version(self) -> PolicyVersion:
        return self._live.version

    @property
    def weights(self) -> FastWeights:
        return self._live.weights

    def revision_for(self, kind: SpanKind) -> int:
        return self.weights.revision if self.delta or kind == "extract" else 0

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        self._events += 1
        sampling = Sampling(
            self.temperature,
            max_tokens,
            derived_seed(self._parts.opening.config.seed, self._name, self._events),
            kind,
        )
        generation = await self._parts.policy.generate(
            prompt_ids, sampling, AdapterKey(self.version, self._life, self.revision_for(kind))
        )
        self.last = (len(prompt_ids), len(generation.token_ids), generation.finish_reason)
        return generation

    async def learn(self, examples: Sequence[WriteExample]) -> WriteResult:
        if self._broken:  # a write was cut off: the name of the revision after this one may be used already
            await self.become(self.weights, self.probe)
        self._broken = True
        result = await self._live.learn(examples)
        self._broken = False
        self.probe = result.probe or self.probe
        self._live.revisions.clear()  # nobody trains on a conversation, and it may be long
        return result

    async def become(self, weights: FastWeights, probe: Probe | None) -> None:
        """Go on under ``weights``, as another episode. Raises EngineError, ReceiptError, with all as it was."""
        life, live = self._born()
        if weights.revision > 0:
            try:
                await live.adopt(weights, probe)
            except BaseException:
                await live.close()
                raise
        before, self._life, self._live, self.probe, self._broken = self._live, life, live, probe, False
        live.revisions.clear()
        await before.close()

    async def close(self) -> None:
        await self._live.close()

    def _born(self) -> tuple[str, LiveActor]:
        life, config = f"{self._name}#{next(_LIVES)}", self._parts.opening.config
        task = Task(life, "conversation", {}, config.seed)
        spec = EpisodeSpec(
            task,
            life,
            config.assistant.temperature,
            config.sampling.max_answer_tokens,
            config.rollout.max_turns,
            config.seed,
        )
        return life, LiveActor(self._parts.policy, self._parts.writer, spec, self._parts.opening.basis.id)


class Conversation:
    """See the module's text. All coroutines raise EngineError, ReceiptError, WriterError."""

    def __init__(self, parts: Parts, name: str, system_prompt: str) -> None:
        self._parts = parts
        self._config = parts.opening.config
        self._speaker = _Speaker(parts, name)
        self._memory = ParametricMemory(self._config.memory, self._config.write)
        self._agent = Agent(self._speaker, parts.chat, system_prompt, "")

    # --- what it is ----------------------------------------------------------------------------------------------------------------------------

    @property
    def system_prompt(self) -> str:
        return self._agent.system_prompt

    @property
    def delta(self) -> bool:
        """Whether it answers under its fast weights."""
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
    def revision(self) -> int:
        """Of the fast weights; 0 before the first write."""
        return self._speaker.weights.revision

    @property
    def writes(self) -> tuple[WriteRecord, ...]:
        return tuple(self._agent.writes)

    @property
    def cards(self) -> tuple[Flashcard, ...]:
        """What it has written, oldest first."""
        return self._saved().cards

    @property
    def context_tokens(self) -> int:
        return len(self._agent.context)

    @property
    def unwritten_tokens(self) -> int:
        """Of the context: what would be lost if it were cleared now."""
        return len(self._agent.context.after_opening)

    def will_write(self, text: str) -> bool:
        """Whether ``text`` does not fit any more, so that it writes before it answers."""
        return self._memory.is_full(self._agent, len(self._parts.chat.user(text)))

    # --- what it does --------------------------------------------------------------------------------------------------------------------------

    async def say(self, text: str, max_tokens: int) -> Reply:
        """The agent's answer. A text longer than the context is read in pieces, the last of which is answered."""
        before = len(self._agent.writes)
        async with self._whole():
            *front, last = split_text(text, self._turn_tokens, self._memory.max_context_tokens)
            for piece in front:
                await self._memory.read(self._agent, piece)
            answer = await self._memory.answer(self._agent, last, max_tokens)
        return self._reply(answer, before)

    async def read(self, text: str) -> tuple[WriteRecord, ...]:
        """Take in what needs no answer; returns the writes that this took."""
        before = len(self._agent.writes)
        async with self._whole():
            await self._memory.read(self._agent, text)
        return tuple(self._agent.writes[before:])

    async def said(self, text: str) -> None:
        """Take ``text`` for a reply of the agent: of a conversation that began elsewhere."""
        chat = self._parts.chat
        async with self._whole():
            for piece in split_text(text, self._turn_tokens, self._memory.max_context_tokens):
                ids = chat.reply(piece)
                self._agent.context.observe(chat.assistant_open + ids + chat.assistant_close(ids))
                if self._memory.is_full(self._agent, 0):
                    await self._memory.relieve(self._agent, 0)

    async def ask(self, question: str, max_tokens: int) -> Reply:
        """The answer from a context of its own, which is forgotten: what the weights know, without the context's help."""
        before = len(self._agent.writes)
        async with self._whole():
            answer = await self._agent.aside(question, "act", max_tokens)
        return self._reply(answer, before)

    async def write(self) -> WriteRecord | None:
        """Write now, and clear the context. None where there is nothing in it."""
        if self._agent.context.is_fresh:
            return None
        async with self._whole():
            await self._memory.relieve(self._agent, 0)
        return self._agent.writes[-1]

    async def reset(self) -> None:
        """Another conversation: no Delta, no flashcards, an empty context."""
        nothing = FastWeights(self._parts.opening.basis.id, 0, {})
        await self._become(SavedMemory(nothing, self._parts.opening.system_prompt, (), (), None))

    def save(self, folder: Path, overwrite: bool) -> None:
        """See memory_file.py. Raises AssistantError."""
        save_memory(self._saved(), self._parts.opening, folder, overwrite)

    async def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote; what this conversation was is forgotten. Raises AssistantError too, with all as it was."""
        await self._become(load_memory(folder, self._parts.opening))

    async def close(self) -> None:
        """The engine forgets its Delta."""
        await self._speaker.close()

    # --- how -----------------------------------------------------------------------------------------------------------------------------------

    def _saved(self) -> SavedMemory:
        agent = self._agent
        return SavedMemory(
            self._speaker.weights,
            agent.system_prompt,
            agent.context.after_opening,
            tuple(agent.writes),
            self._speaker.probe,
        )

    async def _become(self, memory: SavedMemory) -> None:
        await self._speaker.become(memory.weights, memory.probe)
        self._agent = Agent(self._speaker, self._parts.chat, memory.system_prompt, "")
        self._agent.context.observe(memory.context_ids)
        self._agent.writes = list(memory.writes)

    def _turn_tokens(self, text: str) -> int:
        return len(self._parts.chat.user(text))

    def _reply(self, text: str, before: int) -> Reply:
        prompt_tokens, reply_tokens, reason = self._speaker.last
        return Reply(
            text,
            reason,
            self._speaker.revision_for("act"),
            prompt_tokens,
            reply_tokens,
            tuple(self._agent.writes[before:]),
        )

    @asynccontextmanager
    async def _whole(self) -> AsyncIterator[None]:
        """All of the block, or none of it: after a failure the context is what it was, or empty where it was written on the way."""
        agent, before, kept = self._agent, len(self._agent.writes), copy.deepcopy(self._agent.context)
        try:
            yield
        except BaseException:
            if len(agent.writes) == before:
                agent.context = kept
            else:
                agent.clear()
            raise
        finally:
            agent.segments.clear()
            agent.writes[before:] = [replace(record, examples=()) for record in agent.writes[before:]]
