"""Parametric memory: flashcards of the full context are written into the fast weights and the context is cleared.

Method: TMEM, arXiv 2606.04536. Rows: TMEM, and question-blind, where the memory-writing prompt leaves the question out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from actors.chat import ChatFormat
from actors.flashcards import ParsedFlashcards, extraction_prompt, parse_flashcards, write_example
from actors.memory.base import Agent
from actors.types import Flashcard, WriteExample, WriteRecord
from configs.schema import MemoryConfig, WriteConfig


class ParametricMemory:
    """Invariant: a relief ends with one more write record and an empty context, whatever the model wrote."""

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        self.max_context_tokens = config.max_context_tokens
        self._config = config
        self._write = write

    async def relieve(self, agent: Agent, incoming: int) -> None:
        agent.context.observe(agent.chat.user(self._prompt(agent)))
        text = await agent.reply("extract", self._config.max_extract_tokens)
        agent.clear()  # before the write: the segment was sampled under the revision that the write replaces
        parsed = parse_flashcards(text, self._write.max_flashcards)
        cards, examples = self._examples(agent, parsed.cards)
        too_long = len(parsed.cards) - len(cards)
        if examples:
            rehearsed = self._examples(agent, self._to_rehearse(agent, cards))[1]
            agent.writes.append(await _written(agent, text, cards, examples + rehearsed, parsed.rejected + too_long))
        else:
            reason = parsed.problem or f"all {too_long} flashcards are over write.max_example_tokens={self._write.max_example_tokens}"
            agent.writes.append(_empty(agent, text, parsed, too_long, reason))

    def _prompt(self, agent: Agent) -> str:
        question = "" if self._config.question_blind else agent.question
        return extraction_prompt(question, _newest(_known(agent), agent.chat, self._config.max_extract_tokens))

    def _to_rehearse(self, agent: Agent, cards: Sequence[Flashcard]) -> list[Flashcard]:
        """The newest earlier flashcards that this write trains again, unless the same question is answered anew."""
        if self._write.rehearsal == 0:
            return []
        asked = {card.question for card in cards}
        return [card for card in _known(agent) if card.question not in asked][-self._write.rehearsal :]

    def _examples(self, agent: Agent, cards: Iterable[Flashcard]) -> tuple[tuple[Flashcard, ...], tuple[WriteExample, ...]]:
        pairs = [(card, write_example(card, agent.system_prompt, agent.chat)) for card in cards]
        fitting = [pair for pair in pairs if len(pair[1].prompt_ids) + len(pair[1].answer_ids) <= self._write.max_example_tokens]
        return tuple(card for card, _ in fitting), tuple(example for _, example in fitting)


def _known(agent: Agent) -> list[Flashcard]:
    """What the episode has written so far, oldest first; of several cards with one question the newest alone."""
    latest: dict[str, Flashcard] = {}
    for card in (card for record in agent.writes if record.outcome == "accepted" for card in record.flashcards):
        latest.pop(card.question, None)  # a question answered anew moves to the end
        latest[card.question] = card
    return list(latest.values())


async def _written(agent: Agent, text: str, cards: tuple[Flashcard, ...], examples: tuple[WriteExample, ...], rejected: int) -> WriteRecord:
    result = await agent.actor.learn(examples)
    return WriteRecord(
        revision=agent.actor.weights.revision,
        flashcards=cards,
        extraction=text,
        rejected_flashcards=rejected,
        prompt_tokens=sum(len(example.prompt_ids) for example in examples),
        answer_tokens=sum(len(example.answer_ids) for example in examples),
        loss_before=result.loss_before,
        loss_after=result.loss_after,
        steps=result.steps,
        seconds=result.seconds,
        outcome=result.outcome,
        reason=result.reason,
    )


def _empty(agent: Agent, text: str, parsed: ParsedFlashcards, too_long: int, reason: str) -> WriteRecord:
    return WriteRecord(
        revision=agent.actor.weights.revision,
        flashcards=(),
        extraction=text,
        rejected_flashcards=parsed.rejected + too_long,
        prompt_tokens=0,
        answer_tokens=0,
        loss_before=math.nan,  # nothing was written, so there is no loss; an average that forgets this shows it
        loss_after=math.nan,
        steps=0,
        seconds=0.0,
        outcome="empty",
        reason=reason,
    )


def _newest(cards: Sequence[Flashcard], chat: ChatFormat, limit: int) -> list[Flashcard]:
    """The newest cards that take at most ``limit`` tokens in the prompt: a long episode's cards would fill the window otherwise."""
    kept: list[Flashcard] = []
    for card in reversed(cards):
        limit -= len(chat.encode(f"{card.question} {card.answer}")) + 1
        if limit < 0:
            break
        kept.append(card)
    return kept[::-1]
