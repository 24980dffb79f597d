"""Flashcards as text: the memory-writing prompt, a parser that forgives, and the training example of one card (TMEM, arXiv 2606.04536).

Invariant: `parse_flashcards` never raises, whatever the model wrote, and says what was wrong when nothing could be used. The prompt's wording is our
own.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from actors.text.chat_template import ChatFormat
from actors.types import Flashcard, WriteExample

MAX_SIDE_CHARACTERS = 2000
"""A question or an answer longer than this is no flashcard."""

_QUESTION_KEYS = ("instruction", "question")
_ANSWER_KEYS = ("output", "answer")
_MAX_NESTING = 64
_MAX_ARRAYS = 8
_ABOUT = (
    "The text above will be erased. "
    "Save its useful facts (who, what, when, where, likes, plans, lessons) as short questions and answers, no duplicates."
)
_TASK = "They should help with: {question}"
_EARLIER = "Already saved: {cards}"
_FORM = 'Write only a JSON list, [] if nothing is useful: [{"instruction": "question", "output": "answer"}]'


@dataclass(frozen=True, slots=True)
class ParsedFlashcards:
    """``rejected`` counts the items of the array that were no usable card; ``problem`` is "" or says why ``cards`` is empty or cut short."""

    cards: tuple[Flashcard, ...]
    rejected: int
    problem: str


def extraction_prompt(question: str, earlier: Sequence[Flashcard]) -> str:
    """The memory-writing prompt, a user turn after the context. An empty ``question`` is left out (question-blind)."""
    lines = [_ABOUT]
    if question:
        lines.append(_TASK.format(question=question))
    if earlier:
        lines.append(_EARLIER.format(cards=" ".join(f"{card.question} {card.answer}" for card in earlier)))
    return "\n".join([*lines, _FORM])


def render_flashcards(cards: Sequence[Flashcard]) -> str:
    """The canonical text of an extraction: what a demonstration writes. ``parse_flashcards`` gives the cards back."""
    return json.dumps(
        [{"instruction": card.question, "output": card.answer} for card in cards], ensure_ascii=False
    )


def write_example(card: Flashcard, system_prompt: str, chat: ChatFormat) -> WriteExample:
    """The card as it will be asked: system prompt, question as a user turn, answer as the reply with its stop token."""
    return WriteExample(
        prompt_ids=chat.system(system_prompt) + chat.user(card.question) + chat.assistant_open,
        answer_ids=chat.reply(card.answer),
    )


def parse_flashcards(text: str, limit: int) -> ParsedFlashcards:
    """At most ``limit`` cards of the first JSON array in ``text`` that is one; of an array that breaks off, its complete objects."""
    first: ParsedFlashcards | None = None
    start = text.find("[")
    for _ in range(_MAX_ARRAYS):
        if start < 0:
            break
        items, end, ended = _array_items(text, start)
        parsed = _parse_items(items, ended, limit)
        if parsed.cards or (ended and not items):
            return parsed
        first = first or parsed  # "[note] [{...}]": the first bracket need not open the array that was meant
        start = text.find("[", end)
    return first or ParsedFlashcards((), 0, "no JSON array in the text")


def unused_items(text: str, cards: Sequence[Flashcard]) -> tuple[str, ...]:
    """The raw items of the arrays in ``text`` that became none of ``cards``: no card at all, one twice, or one too many. For people to read."""
    left = list(cards)
    unused: list[str] = []
    start = text.find("[")
    for _ in range(_MAX_ARRAYS):
        if start < 0:
            break
        items, end, _ = _array_items(text, start)
        for item in items:
            card = _card(item)
            if card in left:
                left.remove(card)
            else:
                unused.append(item)
        start = text.find("[", end)
    return tuple(unused)


def _parse_items(items: Sequence[str], ended: bool, limit: int) -> ParsedFlashcards:
    cards: list[Flashcard] = []
    seen: set[str] = set()
    rejected = 0
    for item in items:
        card = _card(item)
        key = "" if card is None else " ".join(card.question.lower().split())
        if card is None or key in seen or len(cards) == limit:
            rejected += 1
            continue
        seen.add(key)
        cards.append(card)
    return ParsedFlashcards(tuple(cards), rejected, _problem(len(items), len(cards), ended))


def _problem(items: int, cards: int, ended: bool) -> str:
    if not ended:
        return "the JSON array breaks off"
    if items == 0:
        return "the JSON array is empty"
    return "" if cards else f"none of the array's {items} items is a question with an answer"


def _array_items(text: str, start: int) -> tuple[list[str], int, bool]:
    """The raw texts of the top-level items of the array that opens at ``start``, where the scan ended, and whether that was its closing bracket.

    A scan that counts brackets and knows strings; unlike a recursive parser it cannot run out of stack and finds items before a broken one.
    """
    items: list[str] = []
    depth, item_start, in_string, escaped = 0, start + 1, False, False
    place = start
    for place in range(start, len(text)):
        char = text[place]
        if in_string:
            in_string, escaped = (escaped or char != '"'), (char == "\\" and not escaped)
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        if not in_string and (depth == 0 or (depth == 1 and char == ",")):
            items.append(text[item_start:place])
            item_start = place + 1
        if depth == 0:
            break
    ended = depth == 0
    last = text[item_start:].strip()
    if not ended and depth == 1 and last.endswith("}"):
        items.append(last)
    return [item.strip() for item in items if item.strip()], place + 1, ended


def _card(item: str) -> Flashcard | None:
    if (
        not item.startswith("{")
        or len(item) > 4 * MAX_SIDE_CHARACTERS
        or max(item.count("["), item.count("{")) > _MAX_NESTING
    ):
        return None
    try:
        value = json.loads(item, strict=False)
    except ValueError:
        return None
    question, answer = _side(value, _QUESTION_KEYS), _side(value, _ANSWER_KEYS)
    return Flashcard(question, answer) if question and answer else None


def _side(value: dict[str, object], keys: Sequence[str]) -> str:
    for key in keys:
        side = value.get(key)
        if isinstance(side, str) or (
            isinstance(side, (int, float)) and not isinstance(side, bool) and math.isfinite(side)
        ):
            text = _clean(str(side))
            return text if len(text) <= MAX_SIDE_CHARACTERS else ""
    return ""


def _clean(text: str) -> str:
    """One line without control characters and lone surrogates (which no tokenizer can encode)."""
    kept = "".join(char if unicodedata.category(char) not in ("Cc", "Cs") else " " for char in text)
    return " ".join(kept.split())
