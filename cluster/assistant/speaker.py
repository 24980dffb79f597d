"""Samples and writes for one conversation: the Actor of its agent (actors/memory/base.py).

Each start, load or return begins a new episode: an adapter's name is never used twice in an engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from actors.episodes.episode import EpisodeSpec, LiveActor, derived_seed
from actors.types import (
    AdapterKey,
    FastWeights,
    Flashcard,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    SpanKind,
    Task,
    WriteExample,
    WriteRequest,
    WriteResult,
)
from cluster.assistant.answering import Choice, Manner, answers
from cluster.assistant.opening import Parts

# Numbers the episodes of this process.
_EPISODE_NUMBERS = itertools.count(1)


class Speaker:
    """The conversation's actors.memory.base.Actor.

    With ``delta`` off it answers as the base model does. It extracts and writes under Delta even then.
    """

    def __init__(self, parts: Parts, name: str) -> None:
        self.delta = True
        self.temperature = parts.opening.config.assistant.temperature
        self.manner = Manner()
        # Of the last answer: tokens of its prompt, and the replies.
        self.last_answer: tuple[int, tuple[Choice, ...]] = (0, ())
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
        policy, chat = self._parts.policy, self._parts.chat
        if kind == "extract":
            return await policy.generate(prompt_ids, sampling, adapter)
        choices = await answers(policy, chat.said, prompt_ids, sampling, adapter, self.manner)
        self.last_answer = (len(prompt_ids), choices)
        return choices[0].generation

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
