"""The cards that stand: what each later write outdates, and in a time that grows as the log does."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.memory.standing import StandingCards, standing_cards
from actors.types import Flashcard, WriteOutcome, WriteRecord
from cluster.assistant.tending import Edits, remaining

CARDS = st.builds(Flashcard, st.sampled_from("abcde"), st.sampled_from("xyz"))
WRITES = st.lists(st.tuples(st.lists(CARDS, max_size=4), st.booleans()), max_size=8)


def record(cards: Sequence[Flashcard], accepted: bool = True) -> WriteRecord:
    outcome: WriteOutcome = "accepted" if accepted else "rolled_back"
    return WriteRecord(1, (), tuple(cards), "", 0, 0, 0, math.nan, math.nan, 0, 0.0, outcome, "")


def not_outdated(earlier: list[Flashcard], cards: Sequence[Flashcard], wordings: int) -> list[Flashcard]:
    """The definition: a card goes where its question is answered anew, or where its twin's answer changes."""
    anew = {card.question: card.answer for card in cards}
    gone = {card.question for card in earlier if card.question in anew}
    if wordings > 1:
        changed = {card for card in earlier if anew.get(card.question, card.answer) != card.answer}
        for one, two in pairwise(earlier):
            if one.answer == two.answer and (one in changed or two in changed):
                gone |= {one.question, two.question}
    return [card for card in earlier if card.question not in gone]


@pytest.mark.parametrize("wordings", [1, 2])
@given(writes=WRITES, more=st.lists(CARDS, max_size=3))
def test_it_is_what_the_definition_says(
    wordings: int, writes: list[tuple[list[Flashcard], bool]], more: list[Flashcard]
) -> None:
    expected: list[Flashcard] = []
    for cards, accepted in writes:
        if accepted:
            expected = [*not_outdated(expected, cards, wordings), *cards]
    log = [record(cards, accepted) for cards, accepted in writes]
    assert standing_cards(log, wordings) == expected
    standing = StandingCards(log, wordings)
    standing.outdate(more)
    assert standing.cards() == not_outdated(expected, more, wordings)


def test_a_long_memory_is_listed_and_tended_in_time_by_its_length() -> None:
    """20 000 writes, each of which answers an earlier question anew; then half of the cards are forgotten."""

    def card(number: int, answer: str) -> Flashcard:
        return Flashcard(f"question {number}?", f"{answer} {number}")

    log = [record([card(n, "old"), card(n // 2, "new")]) for n in range(20_000)]
    began = time.process_time()
    cards = standing_cards(log, 2)
    half = tuple(range(1, len(cards), 2))
    kept = Edits(forget=half).applied(cards)
    assert remaining(cards, kept, "") == ()
    assert time.process_time() - began < 5  # by the square of its length: a minute
    assert (len(cards), len(kept)) == (20_000, 10_000)
