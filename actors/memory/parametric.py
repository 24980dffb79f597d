"""Parametric memory: flashcards of the full context are written into the fast weights and the context is cleared.

Method: TMEM, arXiv 2606.04536. Rows: TMEM, and question-blind, where the memory-writing prompt leaves the question out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actors.memory.base import Agent, ContextMemory
from actors.memory.write_log import record_nothing, record_write
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import extraction_prompt, parse_flashcards, write_example
from actors.types import Flashcard, WriteExample
from configs.schema import MemoryConfig, WriteConfig


class ParametricMemory(ContextMemory):
    """Invariant: a relief ends with one more write record and an empty context, whatever the model wrote.

    With T the identity (write.epochs=0) nothing can be moved out of the context, so it is truncated: Delta = 0 is the truncation agent, to
    the token.
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


class Flashcards:
    """From a full context to a write: extraction at its end, parsing, and the examples of the write with those rehearsed."""

    def __init__(self, config: MemoryConfig, write: WriteConfig) -> None:
        self._config = config
        self._write = write

    async def extract(self, agent: Agent) -> str:
        """The agent's flashcards as it wrote them, at the end of the running context."""
        agent.context.observe(agent.chat.user(self._prompt(agent)))
        return await agent.reply("extract", self._config.max_extract_tokens)

    async def write(self, agent: Agent, text: str) -> None:
        """Exactly one more record in the agent's write log."""
        parsed = parse_flashcards(text, self._write.max_flashcards)
        cards, examples = self._examples(agent, parsed.cards)
        too_long = len(parsed.cards) - len(cards)
        if examples:
            rehearsed = self._examples(agent, self._to_rehearse(agent, cards))[1]
            await record_write(agent, text, cards, examples + rehearsed, parsed.rejected + too_long)
        else:
            reason = (
                parsed.problem
                or f"all {too_long} flashcards are over write.max_example_tokens={self._write.max_example_tokens}"
            )
            record_nothing(agent, text, parsed.rejected + too_long, reason)

    def _prompt(self, agent: Agent) -> str:
        question = "" if self._config.question_blind else agent.question
        return extraction_prompt(
            question, _newest(_known(agent), agent.chat, self._config.max_extract_tokens)
        )

    def _to_rehearse(self, agent: Agent, cards: Sequence[Flashcard]) -> list[Flashcard]:
        """The newest earlier flashcards that this write trains again, unless the same question is answered anew."""
        if self._write.rehearsal == 0:
            return []
        asked = {card.question for card in cards}
        return [card for card in _known(agent) if card.question not in asked][-self._write.rehearsal :]

    def _examples(
        self, agent: Agent, cards: Iterable[Flashcard]
    ) -> tuple[tuple[Flashcard, ...], tuple[WriteExample, ...]]:
        pairs = [(card, write_example(card, agent.system_prompt, agent.chat)) for card in cards]
        fitting = [
            pair
            for pair in pairs
            if len(pair[1].prompt_ids) + len(pair[1].answer_ids) <= self._write.max_example_tokens
        ]
        return tuple(card for card, _ in fitting), tuple(example for _, example in fitting)


def _known(agent: Agent) -> list[Flashcard]:
    """What the episode has written so far, oldest first; of several cards with one question the newest alone."""
    latest: dict[str, Flashcard] = {}
    for card in (
        card for record in agent.writes if record.outcome == "accepted" for card in record.flashcards
    ):
        latest.pop(card.question, None)  # a question answered anew moves to the end
        latest[card.question] = card
    return list(latest.values())


def _newest(cards: Sequence[Flashcard], chat: ChatFormat, limit: int) -> list[Flashcard]:
    """The newest cards that take at most ``limit`` tokens in the prompt: a long episode's cards would fill the window otherwise."""
    kept: list[Flashcard] = []
    for card in reversed(cards):
        limit -= len(chat.encode(f"{card.question} {card.answer}")) + 1
        if limit < 0:
            break
        kept.append(card)
    return kept[::-1]
