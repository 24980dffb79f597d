"""Parametric memory: flashcards of a full context are written into the fast weights, the context is cleared.

Method: TMEM, arXiv 2606.04536. The rows "TMEM" and "question-blind" (the prompt leaves the question out), and
the row "hybrid" (TMEM's write and MemAgent's summary at once).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actors.memory.base import Agent, ContextMemory
from actors.memory.summary import Summary
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import extraction_prompt, parse_flashcards, write_example
from actors.types import Flashcard, WriteExample
from configs.schema import MemoryConfig, WriteConfig


class Flashcards:
    """Turns a full context into a write: extraction, parsing, examples of new and rehearsed cards."""

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        self._config = config
        self._write = write

    async def extract(self, agent: Agent) -> str:
        """Ask for flashcards at the end of the running context. Return the agent's text as it is."""
        agent.context.observe(agent.chat.user(self._prompt(agent)))
        return await agent.reply("extract", self._config.max_extract_tokens)

    async def write(self, agent: Agent, text: str) -> None:
        """Write the flashcards in ``text``. Adds exactly one record to the agent's write log."""
        parsed = parse_flashcards(text, self._write.max_flashcards)
        cards, examples = self._examples(agent, parsed.cards)
        too_long = len(parsed.cards) - len(cards)
        rejected = parsed.rejected + too_long
        if examples:
            _, rehearsed = self._examples(agent, self._to_rehearse(agent, cards))
            await agent.write(text, cards, examples + rehearsed, rejected)
        else:
            limit = self._write.max_example_tokens
            over = f"all {too_long} flashcards are over write.max_example_tokens={limit}"
            agent.skip_write(text, rejected, parsed.problem or over)

    def _prompt(self, agent: Agent) -> str:
        question = "" if self._config.question_blind else agent.question
        shown = _newest(_written_cards(agent), agent.chat, self._config.max_extract_tokens)
        return extraction_prompt(question, shown)

    def _to_rehearse(self, agent: Agent, cards: Sequence[Flashcard]) -> list[Flashcard]:
        """Return the newest ``write.rehearsal`` earlier cards.

        Cards whose question is answered anew by ``cards`` are left out: they are outdated.
        """
        if self._write.rehearsal == 0:
            return []
        asked = {card.question for card in cards}
        earlier = [card for card in _written_cards(agent) if card.question not in asked]
        return earlier[-self._write.rehearsal :]

    def _examples(
        self, agent: Agent, cards: Iterable[Flashcard]
    ) -> tuple[tuple[Flashcard, ...], tuple[WriteExample, ...]]:
        """Return the cards that fit into ``write.max_example_tokens``, and their examples."""
        fitting: list[Flashcard] = []
        examples: list[WriteExample] = []
        for card in cards:
            example = write_example(card, agent.system_prompt, agent.chat)
            if len(example.prompt_ids) + len(example.answer_ids) <= self._write.max_example_tokens:
                fitting.append(card)
                examples.append(example)
        return tuple(fitting), tuple(examples)


class ParametricMemory(ContextMemory):
    """The rows "TMEM" and "question-blind".

    Invariant: a relief ends with one more write record and an empty context, whatever the model wrote.
    With T the identity (write.epochs=0) nothing can move out of the context, so it is truncated: then the
    agent is the truncation agent, to the token.
    """

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._flashcards = None if write.epochs == 0 else Flashcards(config, write)

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

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        super().__init__(config.max_context_tokens)
        self._summary = Summary(config)
        self._flashcards = None if write.epochs == 0 else Flashcards(config, write)

    async def relieve(self, agent: Agent, incoming: int) -> None:
        self.events[await self._summary.rewrite(agent)] += 1
        if self._flashcards is None:
            agent.clear(self._summary.remembered)
            return
        text = await self._flashcards.extract(agent)
        agent.clear(self._summary.remembered)
        await self._flashcards.write(agent, text)


def _written_cards(agent: Agent) -> list[Flashcard]:
    """Return the cards that the episode has written, oldest first; per question only the newest card."""
    latest: dict[str, Flashcard] = {}
    for record in agent.writes:
        if record.outcome != "accepted":
            continue
        for card in record.flashcards:
            latest.pop(card.question, None)  # a question answered anew moves to the end
            latest[card.question] = card
    return list(latest.values())


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
