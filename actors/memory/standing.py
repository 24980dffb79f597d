"""The flashcards that are in the weights and have no newer answer. The time grows as the write log does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from actors.types import Flashcard, WriteRecord


class StandingCards:
    """The cards that ``writes`` have written and not answered anew since.

    With two wordings of each fact, a new answer to one of them outdates the other too: the neighbour with
    the same old answer.
    """

    def __init__(self, writes: Sequence[WriteRecord], wordings: int) -> None:
        self._paired = wordings > 1
        self._written: list[Flashcard] = []
        self._standing: list[int] = []  # places in _written, ascending
        self._places: dict[str, list[int]] = {}  # those of a question's standing cards
        for record in writes:
            if record.outcome == "accepted":
                self.outdate(record.flashcards)
                self._add(record.flashcards)

    def cards(self) -> list[Flashcard]:
        """Return them, oldest first."""
        return [self._written[place] for place in self._standing]

    def outdate(self, cards: Sequence[Flashcard]) -> None:
        """Drop those whose question ``cards`` answer anew."""
        anew = {card.question: card.answer for card in cards if card.question in self._places}
        outdated = {*anew}
        if self._paired:
            for question, answer in anew.items():
                for place in self._places[question]:
                    if self._written[place].answer != answer:
                        outdated |= self._pair_of(place)
        for question in outdated:
            for place in self._places.pop(question):
                del self._standing[bisect_left(self._standing, place)]

    def _pair_of(self, place: int) -> set[str]:
        """The questions of the card at ``place`` and of its neighbours with the same answer."""
        at, answer = bisect_left(self._standing, place), self._written[place].answer
        near = [self._written[other] for other in self._standing[max(at - 1, 0) : at + 2]]
        return {card.question for card in near if card.answer == answer}

    def _add(self, cards: Sequence[Flashcard]) -> None:
        for card in cards:
            self._places.setdefault(card.question, []).append(len(self._written))
            self._standing.append(len(self._written))
            self._written.append(card)


def standing_cards(writes: Sequence[WriteRecord], wordings: int) -> list[Flashcard]:
    """Return the cards that ``writes`` have written and not answered anew since, oldest first."""
    return StandingCards(writes, wordings).cards()
