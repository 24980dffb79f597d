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

import copy
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from actors.episodes.episode import EpisodeSpec, LiveActor, derived_seed
from actors.memory.base import Agent
from actors.memory.parametric import ParametricMemory, standing_cards
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
    WriteRequest,
    WriteResult,
)
from cluster.assistant.memory_file import SavedAdapter, SavedMemory, load_memory, save_memory
from cluster.assistant.opening import AssistantError, Parts
from cluster.assistant.tending import NO_EDITS, Edits, Rebuilt, can_read, losses_of, remaining, written_anew

# Numbers the episodes of this process, so that an adapter's name is never used twice in an engine.
_EPISODE_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    ``writes`` came before it, to make room. ``prompt_tokens`` is the context it was sampled from.

    ``revision`` is that of the fast weights in force, 0 without Delta.
    """

    text: str
    finish_reason: FinishReason
    revision: int
    prompt_tokens: int
    reply_tokens: int
    writes: tuple[WriteRecord, ...]


class _Speaker:
    """The conversation's actors.memory.base.Actor.

    With ``delta`` off it answers as the base model does. It extracts and writes under Delta even then.
    """

    def __init__(self, parts: Parts, name: str) -> None:
        self.delta = True
        self.temperature = parts.opening.config.assistant.temperature
        # Of the last sample: tokens of the prompt, tokens of the reply, and how it ended.
        self.last_sample: tuple[int, int, FinishReason] = (0, 0, "stop")
        self.probe: Probe | None = None
        self._parts = parts
        self._name = name
        self._samples = 0
        self._write_cut_off = False
        self.episode_id, self._live = self._new_episode()

    @property
    def version(self) -> PolicyVersion:
        return self._live.version

    @property
    def weights(self) -> FastWeights:
        return self._live.weights

    def revision_for(self, kind: SpanKind) -> int:
        return self.weights.revision if self.delta or kind == "extract" else 0

    async def sample(self, prompt_ids: Sequence[int], kind: SpanKind, max_tokens: int) -> Generation:
        self._samples += 1
        seed = derived_seed(self._parts.opening.config.seed, self._name, self._samples)
        sampling = Sampling(self.temperature, max_tokens, seed, kind)
        adapter = AdapterKey(self.version, self.episode_id, self.revision_for(kind))
        generation = await self._parts.policy.generate(prompt_ids, sampling, adapter)
        self.last_sample = (len(prompt_ids), len(generation.token_ids), generation.finish_reason)
        return generation

    async def learn(
        self, examples: Sequence[WriteExample], cards: Sequence[Flashcard]
    ) -> tuple[WriteRequest, WriteResult]:
        if self._write_cut_off:
            # The engine may have the next revision's name already: go on under a new episode's names.
            await self.become(self.weights, self.probe)
        self._write_cut_off = True
        request, result = await self._live.learn(examples, cards)
        self._write_cut_off = False
        self.probe = result.probe or self.probe
        # Nobody trains on a conversation, and it may be long: keep no old revisions.
        self._live.revisions.clear()
        return request, result

    async def become(self, weights: FastWeights, probe: Probe | None) -> None:
        """Continue under ``weights`` as a new episode.

        Raises EngineError or ReceiptError; then nothing changed.
        """
        episode_id, live = self._new_episode()
        if weights.revision > 0:
            try:
                await live.adopt(weights, probe)
            except BaseException:
                await live.close()
                raise
        live.revisions.clear()
        before = self._live
        self.episode_id, self._live, self.probe, self._write_cut_off = episode_id, live, probe, False
        await before.close()

    async def close(self) -> None:
        await self._live.close()

    def _new_episode(self) -> tuple[str, LiveActor]:
        parts, config = self._parts, self._parts.opening.config
        episode_id = f"{self._name}#{next(_EPISODE_NUMBERS)}"
        spec = EpisodeSpec(
            Task(episode_id, "conversation", {}, config.seed),
            episode_id,
            config.assistant.temperature,
            config.sampling.max_answer_tokens,
            config.rollout.max_turns,
            config.seed,
        )
        return episode_id, LiveActor(
            parts.policy, parts.writer, parts.preservation, spec, parts.opening.basis.id
        )


class Conversation:
    """Answers, reads, writes, saves and loads.

    All coroutines raise EngineError, ReceiptError, WriterError.
    """

    def __init__(self, parts: Parts, name: str, system_prompt: str) -> None:
        self._parts = parts
        config = parts.opening.config
        self._speaker = _Speaker(parts, name)
        self._memory = ParametricMemory(config.memory, config.write, config.engine.max_model_tokens)
        self._agent = Agent(self._speaker, parts.chat, system_prompt, "")
        self._name, self._wordings = name, config.memory.wordings
        self._saved: SavedAdapter | None = None  # of the last save or load

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
    def unwritten_tokens(self) -> int:
        """The context's tokens that would be lost if it were cleared now."""
        return len(self._agent.context.after_opening)

    def will_write(self, text: str) -> bool:
        """True if ``text`` does not fit into the context, so that a write must come before the answer."""
        return self._memory.is_full(self._agent, len(self._parts.chat.user(text)))

    # --- turns ------------------------------------------------------------------------------------------

    async def say(self, text: str, max_tokens: int) -> Reply:
        """Answer ``text``. A text longer than the context is read in pieces; the last piece is answered."""
        before = len(self._agent.writes)
        async with self._all_or_nothing():
            *front, last = self._pieces(text)
            for piece in front:
                await self._memory.read(self._agent, piece)
            answer = await self._memory.answer(self._agent, last, max_tokens)
        return self._reply(answer, before)

    async def read(self, text: str) -> tuple[WriteRecord, ...]:
        """Read ``text`` without answering it; returns the writes that made room for it."""
        before = len(self._agent.writes)
        async with self._all_or_nothing():
            await self._memory.read(self._agent, text)
        return tuple(self._agent.writes[before:])

    async def said(self, text: str) -> None:
        """Put ``text`` into the context as the agent's own reply, for a conversation that began elsewhere."""
        chat = self._parts.chat
        async with self._all_or_nothing():
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
        async with self._all_or_nothing():
            answer = await self._agent.aside(question, "act", max_tokens)
        return self._reply(answer, before)

    async def write(self) -> WriteRecord | None:
        """Write the context into the weights and clear it. Returns None if the context is empty."""
        if self._agent.context.is_fresh:
            return None
        async with self._all_or_nothing():
            await self._memory.relieve(self._agent, 0)
        return self._agent.writes[-1]

    async def reset(self) -> None:
        """Start anew: no Delta, no flashcards, an empty context."""
        opening = self._parts.opening
        zero = FastWeights(opening.basis.id, 0, {})
        await self._become(SavedMemory(zero, opening.system_prompt, (), (), None))

    def save(self, folder: Path, overwrite: bool) -> None:
        """Save the conversation, see memory_file.py. Raises AssistantError.

        The adapter is written where it has changed since the last save there: most turns write nothing.
        """
        earlier, self._saved = self._saved, None  # what a save that fails leaves is not known
        self._saved = save_memory(self._state(), self._parts.opening, folder, overwrite, earlier)

    async def load(self, folder: Path, edits: Edits = NO_EDITS) -> Rebuilt | None:
        """Replace this conversation by the one in ``folder``, with ``edits`` of its flashcards.

        Its Delta is loaded if it is one of this model and no card changes: then returns None. Otherwise the
        cards are written anew. Raises AssistantError too; then nothing changed.
        """
        memory, foreign = load_memory(folder, self._parts.opening)
        cards = edits.applied(memory.cards)
        if foreign or cards != memory.cards:
            return await self._rebuild(memory, cards, foreign)
        await self._become(memory)
        with suppress(OSError):
            self._saved = SavedAdapter.of(folder, memory.weights)
        return None

    async def tend(self, edits: Edits) -> Rebuilt:
        """Correct and forget flashcards: Delta is rebuilt from those that remain.

        Raises AssistantError too; then nothing changed.
        """
        memory = self._state()
        cards = edits.applied(memory.cards)
        if cards == memory.cards:
            raise AssistantError("nothing changes: the flashcards say that already")
        return await self._rebuild(memory, cards, "")

    async def close(self) -> None:
        """Release the adapter in the engine."""
        await self._speaker.close()

    # --- helpers ----------------------------------------------------------------------------------------

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

    async def _rebuild(self, memory: SavedMemory, cards: tuple[Flashcard, ...], reason: str) -> Rebuilt:
        """Continue with ``memory``, and with a Delta that is made of ``cards`` alone.

        It is made under an episode of its own, so that a failure leaves this conversation as it is.
        """
        parts, started = self._parts, time.perf_counter()
        keeps = not reason or can_read(memory, parts)
        context_ids, context = (memory.context_ids, memory.context) if keeps else ((), "")
        speaker = _Speaker(parts, self._name)
        try:
            writes = await written_anew(cards, memory.system_prompt, parts, self._memory, speaker)
            adapter = AdapterKey(speaker.version, speaker.episode_id, speaker.weights.revision)
            losses = await losses_of(cards, memory.system_prompt, parts, adapter)
            weights, probe = speaker.weights, speaker.probe
            await self._become(
                replace(memory, weights=weights, context_ids=context_ids, writes=writes, probe=probe)
            )
        finally:
            await speaker.close()
        left_out = len(memory.context_ids) - len(context_ids)
        notes = remaining(memory.cards, cards, context)
        return Rebuilt(cards, losses, time.perf_counter() - started, reason, left_out, notes)

    async def _become(self, memory: SavedMemory) -> None:
        await self._speaker.become(memory.weights, memory.probe)
        self._agent = Agent(self._speaker, self._parts.chat, memory.system_prompt, "")
        self._agent.context.tell(memory.context_ids)
        self._agent.writes = list(memory.writes)

    def _pieces(self, text: str) -> list[str]:
        """``text`` in pieces that fit into the context as user turns."""
        chat = self._parts.chat
        return split_text(text, lambda piece: len(chat.user(piece)), self._memory.max_context_tokens)

    def _reply(self, text: str, before: int) -> Reply:
        prompt_tokens, reply_tokens, reason = self._speaker.last_sample
        writes = tuple(self._agent.writes[before:])
        revision = self._speaker.revision_for("act")
        return Reply(text, reason, revision, prompt_tokens, reply_tokens, writes)

    @asynccontextmanager
    async def _all_or_nothing(self) -> AsyncIterator[None]:
        """Undo the block's changes to the context if it fails.

        If the block had written before it failed, the context is cleared instead: its old part is in the
        weights.
        """
        agent, before, context = self._agent, len(self._agent.writes), copy.deepcopy(self._agent.context)
        try:
            yield
        except BaseException:
            if len(agent.writes) == before:
                agent.context = context
            else:
                agent.clear()
            raise
        finally:
            agent.segments.clear()
            # Delta itself is kept, so nobody replays these writes: drop their token ids.
            agent.writes[before:] = [
                replace(record, examples=(), preserved=()) for record in agent.writes[before:]
            ]
