"""A teacher: a model behind an OpenAI-compatible endpoint that writes a warm start's flashcards.

    Extraction (what was told, the memory-writing request) --> endpoint, or what it said before --> cards
        --> without those whose answer is not told, and those for which there is no room --> Flashcards

The teacher is asked with the very request that the policy gets. So it works for any environment, question-
blind or not, and with two wordings of each fact.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial

from actors.environments.judge.cached_endpoint import (
    NO_COST,
    CachedEndpoint,
    Cost,
    MalformedReplyError,
    Prompt,
    Role,
)
from actors.episodes.demonstration import Extraction
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import is_told, parse_flashcards, render_flashcards
from actors.types import Flashcard
from configs.schema import MemoryConfig, TeacherConfig, WriteConfig

_ROLE = Role("warm_start.teacher", "the teacher", "list of flashcards", "flashcards")
_SYSTEM = """You write flashcards. You are shown a text, and then a request for flashcards of it.
Take every answer from the text, in the text's own words and as short as can be: \
an answer with a word that is not in the text is thrown away.
A question must be clear without the text: it names whom and what it is about.
Reply with the JSON list and nothing else."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """What a teacher has given so far, in counts."""

    cards: int = 0  # taught
    ungrounded: int = 0  # dropped: their answer has a word that their text does not have
    without_room: int = 0  # dropped: beyond memory.max_extract_tokens
    cost: Cost = field(default=NO_COST)

    @property
    def dropped(self) -> int:
        return self.ungrounded + self.without_room

    def figures(self) -> Mapping[str, float]:
        """By name: counts, requests, tokens and dollars."""
        counts = {"cards": self.cards, "ungrounded": self.ungrounded, "without_room": self.without_room}
        costs = {item.name: getattr(self.cost, item.name) for item in fields(self.cost)}
        return {name: float(value) for name, value in (counts | costs).items()}


class Teacher:
    """Threads may ask it at once."""

    def __init__(
        self, config: TeacherConfig, memory: MemoryConfig, write: WriteConfig, chat: ChatFormat
    ) -> None:
        """Sends nothing yet. Raises TaskError for a url, a key or a cache folder that cannot be used."""
        self._endpoint = CachedEndpoint(config, _ROLE)
        self._most_cards = write.max_flashcards
        self._most_tokens = memory.max_extract_tokens
        self._chat = chat
        self._given = Teaching()
        self._lock = threading.Lock()

    @property
    def given(self) -> Teaching:
        """All so far."""
        with self._lock:
            return replace(self._given, cost=self._endpoint.spent)

    def require_listening(self) -> None:
        """Raise TaskError when nobody listens at its address and nothing was kept of an earlier run."""
        self._endpoint.require_listening()

    def cards_of(self, extraction: Extraction) -> tuple[Flashcard, ...] | None:
        """The cards to write of a context; None where all that the teacher gave was dropped.

        Blocks. Raises TaskError.
        """
        prompt = Prompt(_SYSTEM, f"{extraction.told}\n\n{extraction.request}", "JSON list")
        cards = self._endpoint.answer(prompt, partial(_cards_in, limit=self._most_cards)).value
        grounded = [card for card in cards if is_told(card.answer, extraction.told)]
        taught = list(grounded)
        while taught and len(self._chat.reply(render_flashcards(taught))) > self._most_tokens:
            taught.pop()
        with self._lock:
            self._given = replace(
                self._given,
                cards=self._given.cards + len(taught),
                ungrounded=self._given.ungrounded + len(cards) - len(grounded),
                without_room=self._given.without_room + len(grounded) - len(taught),
            )
        return None if cards and not taught else tuple(taught)


def _cards_in(reply: str, limit: int) -> tuple[Flashcard, ...]:
    parsed = parse_flashcards(reply, limit)
    if not parsed.cards and not parsed.says_none:
        raise MalformedReplyError(parsed.problem)
    return parsed.cards
