"""Controls of the write: the same memory, with other cards than those that the agent extracted.

    control             answers of the cards    questions of the cards      what the row shows
    none                the agent's             the agent's                 the memory itself
    oracle              gold                    gold                        what write and asking allow
    other_cards         the agent's             about other people          what the questions decide
    oracle_other_cards  gold                    about other people          the same, with gold answers

A memory that is addressed by its questions keeps nothing under other questions: a score that stays is a
written answer that is given to any question. Controls are for evaluation only: a training refuses them, and
gold cards stand in the context as observed tokens, which nothing trains on. They are built by
actors/episodes/controls.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from actors.memory.base import Agent
from actors.text.flashcards import render_flashcards
from actors.types import Flashcard


class WriteControl:
    """No control: the agent's own cards are written. The controls below belong to one episode each."""

    async def extract(self, agent: Agent, max_tokens: int) -> str:
        """Return the text of an extraction. Its prompt is the last turn of the running context."""
        return await agent.reply("extract", max_tokens)

    def written(self, cards: Sequence[Flashcard]) -> tuple[Flashcard, ...]:
        """Return the cards that are written in place of the extracted ``cards``. They go into the log."""
        return tuple(cards)

    def extracted(self, cards: Sequence[Flashcard]) -> list[Flashcard]:
        """Return the extracted cards of the ``written`` ones, for the prompt of the next extraction."""
        return list(cards)


class GoldCards(WriteControl):
    """Gold cards of the text in the context are extracted, without a sample.

    ``gold``: from the text in the context to its cards.
    """

    def __init__(self, gold: Callable[[str], Sequence[Flashcard]]) -> None:
        self._gold = gold

    async def extract(self, agent: Agent, max_tokens: int) -> str:
        text = render_flashcards(self._gold(agent.chat.decode(agent.context.ids)))
        reply = agent.chat.reply(text)
        # observed, not acted: no segment may offer these tokens as the policy's own
        agent.context.observe(agent.chat.assistant_open + reply + agent.chat.assistant_close(reply))
        return text


class OtherQuestions(WriteControl):
    """Each card keeps its answer and gets another question. ``inner`` extracts.

    Invariant: one extracted question always becomes the same other question, so a card that is written again
    is the same card again.
    """

    def __init__(self, inner: WriteControl, questions: Sequence[str]) -> None:
        self._inner = inner
        self._questions = itertools.cycle(questions)
        self._others: dict[str, str] = {}
        self._extracted: dict[Flashcard, Flashcard] = {}

    async def extract(self, agent: Agent, max_tokens: int) -> str:
        return await self._inner.extract(agent, max_tokens)

    def written(self, cards: Sequence[Flashcard]) -> tuple[Flashcard, ...]:
        return tuple(map(self._under_another_question, cards))

    def extracted(self, cards: Sequence[Flashcard]) -> list[Flashcard]:
        return [self._extracted[card] for card in cards]

    def _under_another_question(self, card: Flashcard) -> Flashcard:
        if card.question not in self._others:
            self._others[card.question] = next(self._questions)
        other = Flashcard(self._others[card.question], card.answer)
        self._extracted[other] = card
        return other


OWN_CARDS = WriteControl()
"""The memory itself. It holds nothing, so episodes share it."""
