"""Parametric memory: flashcards of a full context are written into the fast weights, the context is cleared.

Method: TMEM, arXiv 2606.04536. The rows "TMEM" and "question-blind" (the prompt leaves the question out), and
the row "hybrid" (TMEM's write and MemAgent's summary at once).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from actors.memory.base import Agent, ContextMemory
from actors.memory.controls import OWN_CARDS, WriteControl
from actors.memory.summary import Summary
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import (
    example_tokens,
    extraction_prompt,
    parse_flashcards,
    write_example,
    write_examples,
)
from actors.types import Flashcard
from configs.schema import MemoryConfig, WriteConfig


class Flashcards:
    """Turns a full context into a write: extraction, parsing, examples of new and rehearsed cards."""

    def __init__(self, config: MemoryConfig, write: WriteConfig, control: WriteControl = OWN_CARDS) -> None:
        self._config = config
        self._write = write
        self._control = control

    async def extract(self, agent: Agent) -> str:
        """Ask for flashcards at the end of the running context. Return the agent's text as it is."""
        agent.context.observe(agent.chat.user(self._prompt(agent)))
        return await self._control.extract(agent, self._config.max_extract_tokens)

    async def write(self, agent: Agent, text: str) -> None:
        """Write the flashcards in ``text``. Adds exactly one record to the agent's write log."""
        limit = self._write.max_example_tokens
        parsed = parse_flashcards(text, self._write.max_flashcards)
        written = self._control.written(parsed.cards)
        cards = tuple(card for card in written if self._fits(agent, card))
        too_long = len(parsed.cards) - len(cards)
        rejected = parsed.rejected + too_long
        if not cards:
            over = f"all {too_long} flashcards are over write.max_example_tokens={limit}"
            agent.skip_write(text, rejected, parsed.problem or over)
            return
        earlier = _not_outdated(self._written(agent), cards, self._config.wordings)
        rehearsed = earlier[max(0, len(earlier) - self._write.rehearsal) :]
        system_prompt, chat, depths = agent.system_prompt, agent.chat, self._write.depths
        examples = write_examples([*cards, *rehearsed], earlier, system_prompt, chat, depths, limit)
        await agent.write(text, cards, examples, rejected)

    def _prompt(self, agent: Agent) -> str:
        question = "" if self._config.question_blind else agent.question
        earlier = self._control.extracted(self._written(agent))
        shown = _newest(earlier, agent.chat, self._config.max_extract_tokens)
        return extraction_prompt(question, shown, self._config.wordings)

    def _fits(self, agent: Agent, card: Flashcard) -> bool:
        example = write_example(card, agent.system_prompt, agent.chat)
        return example_tokens(example) <= self._write.max_example_tokens

    def _written(self, agent: Agent) -> list[Flashcard]:
        """Return the cards that the episode has written and not answered anew since, oldest first."""
        written: list[Flashcard] = []
        for record in agent.writes:
            if record.outcome == "accepted":
                kept = _not_outdated(written, record.flashcards, self._config.wordings)
                written = [*kept, *record.flashcards]
        return written


class ParametricMemory(ContextMemory):
    """The rows "TMEM" and "question-blind".

    Invariant: a relief ends with one more write record and an empty context, whatever the model wrote.
    With T the identity (write.epochs=0) nothing can move out of the context, so it is truncated: then the
    agent is the truncation agent, to the token.
    """

    def __init__(self, config: MemoryConfig, write: WriteConfig, control: WriteControl = OWN_CARDS) -> None:
        super().__init__(config.max_context_tokens)
        self._flashcards = None if write.epochs == 0 else Flashcards(config, write, control)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        if self._flashcards is None:
            self.events["truncations"] += 1
            agent.truncate(self.max_context_tokens - incoming)
            return
        text = await self._flashcards.extract(agent)
        agent.clear()  # before the write: the segment was sampled under the revision that the write replaces
        await self._flashcards.write(agent, text)


class HybridMemory(ContextMemory):
    """The row "hybrid": a full context becomes a new summary and a write, and is cleared.

    The summary is written first. So with T the identity (write.epochs=0), where no flashcards are asked for,
    the agent is the summary agent, to the token.
    """

    def __init__(self, config: MemoryConfig, write: WriteConfig, control: WriteControl = OWN_CARDS) -> None:
        super().__init__(config.max_context_tokens)
        self._summary = Summary(config)
        self._flashcards = None if write.epochs == 0 else Flashcards(config, write, control)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        self.events[await self._summary.rewrite(agent)] += 1
        if self._flashcards is None:
            agent.clear(self._summary.remembered)
            return
        text = await self._flashcards.extract(agent)
        agent.clear(self._summary.remembered)
        await self._flashcards.write(agent, text)


def _not_outdated(earlier: Sequence[Flashcard], cards: Sequence[Flashcard], wordings: int) -> list[Flashcard]:
    """Return the ``earlier`` cards whose question ``cards`` do not answer anew.

    With two wordings of each fact, a new answer to one of them outdates the other too: the neighbour with
    the same old answer.
    """
    anew = {card.question: card.answer for card in cards}
    outdated = {card.question for card in earlier if card.question in anew}
    if wordings > 1:
        changed = {card for card in earlier if anew.get(card.question, card.answer) != card.answer}
        for one, next_one in pairwise(earlier):
            if one.answer == next_one.answer and (one in changed or next_one in changed):
                outdated |= {one.question, next_one.question}
    return [card for card in earlier if card.question not in outdated]


def _newest(cards: Sequence[Flashcard], chat: ChatFormat, limit: int) -> list[Flashcard]:
    """Return the newest cards that take at most ``limit`` tokens in the prompt.

    Without this bound the cards of a long episode would fill the window.
    """
    kept: list[Flashcard] = []
    for card in reversed(cards):
        limit -= len(chat.encode(f"{card.question} {card.answer}")) + 1
        if limit < 0:
            break
        kept.append(card)
    return kept[::-1]
