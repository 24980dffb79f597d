"""Flashcards as text (TMEM, arXiv 2606.04536): the prompt that asks for cards, the parser, write examples.

Invariant: `parse_flashcards` never raises, whatever the model wrote. When it finds no card it says why. The
wording of the prompt is our own.
"""

from __future__ import annotations

import json
import math
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.text.chat_template import ChatFormat
from actors.types import Flashcard, WriteExample

MAX_SIDE_CHARACTERS = 2000  # a longer question or answer is no flashcard

_QUESTION_KEYS = ("instruction", "question")
_ANSWER_KEYS = ("output", "answer")
_MAX_NESTING = 64
_MAX_ARRAYS = 8
_ABOUT = (
    "The text above will be erased. "
    "Save its useful facts (who, what, when, where, likes, plans, lessons) as short questions and answers"
)
_ONCE = ", no duplicates."
_TWICE = ", each fact twice: two questions in different words, the same answer."
_TASK = "They should help with: {question}"
_EARLIER = "Already saved: {cards}"
_FORM = 'Write only a JSON list, [] if nothing is useful: [{"instruction": "question", "output": "answer"}]'


@dataclass(frozen=True, slots=True)
class ParsedFlashcards:
    """Cards read from a text.

    ``rejected`` counts the items of the array that gave no card. ``problem`` says why ``cards`` is empty or
    cut short; otherwise it is "".
    """

    cards: tuple[Flashcard, ...]
    rejected: int
    problem: str


def extraction_prompt(question: str, earlier: Sequence[Flashcard], wordings: int = 1) -> str:
    """The memory-writing prompt, a user turn after the context. A question-blind memory passes "".

    ``wordings``: how many differently worded questions it asks for on each fact, 1 or 2.
    """
    lines = [_ABOUT + (_ONCE if wordings == 1 else _TWICE)]
    if question:
        lines.append(_TASK.format(question=question))
    if earlier:
        lines.append(_EARLIER.format(cards=" ".join(f"{card.question} {card.answer}" for card in earlier)))
    return "\n".join([*lines, _FORM])


def render_flashcards(cards: Sequence[Flashcard]) -> str:
    """The text of an ideal extraction, for demonstrations. ``parse_flashcards`` reads the cards back."""
    return json.dumps(
        [{"instruction": card.question, "output": card.answer} for card in cards], ensure_ascii=False
    )


def write_example(
    card: Flashcard, system_prompt: str, chat: ChatFormat, behind: Sequence[Flashcard] = ()
) -> WriteExample:
    """The card in the form in which it will be asked: first, or behind other cards and their answers.

    prompt: system prompt, the other cards as finished turns, the question as a user turn; answer: the reply
    with its stop token. Only the answer is learnt.
    """
    prompt = chat.system(system_prompt)
    for other in behind:
        reply = chat.reply(other.answer)
        prompt += chat.user(other.question) + chat.assistant_open + reply + chat.assistant_close(reply)
    return WriteExample(
        prompt_ids=prompt + chat.user(card.question) + chat.assistant_open,
        answer_ids=chat.reply(card.answer),
    )


def write_examples(
    cards: Sequence[Flashcard],
    others: Sequence[Flashcard],
    system_prompt: str,
    chat: ChatFormat,
    depths: Sequence[int],
    max_tokens: int,
) -> tuple[WriteExample, ...]:
    """The examples of ``cards``: each in its plain form, then each behind N other cards, N of ``depths``.

    Why: a question that follows others in a conversation finds only what was learnt as deep. The cards in
    front come from ``cards`` and ``others``, and the same arguments always choose the same ones. None has
    the card's own question or answer: that would teach to say the last answer again. Where there are fewer
    than N, all of them stand in front. An example of more than ``max_tokens`` is left out.
    """
    known = list(dict.fromkeys([*cards, *others]))
    draw = random.Random(repr([(card.question, card.answer) for card in known]))
    examples = [write_example(card, system_prompt, chat) for card in cards]
    for card in cards if depths else ():
        choice = [o for o in known if o.question != card.question and o.answer != card.answer]
        for depth in sorted({min(depth, len(choice)) for depth in depths} - {0}):
            behind = _of_different_facts(draw.sample(choice, len(choice)))[:depth]
            examples.append(write_example(card, system_prompt, chat, behind))
    return tuple(example for example in examples if example_tokens(example) <= max_tokens)


def example_tokens(example: WriteExample) -> int:
    """Tokens of prompt and answer, as ``write.max_example_tokens`` counts them."""
    return len(example.prompt_ids) + len(example.answer_ids)


def _of_different_facts(cards: Sequence[Flashcard]) -> list[Flashcard]:
    """``cards``, first those whose answer is new: the same answer again may be the same fact, reworded."""
    first: dict[str, Flashcard] = {}
    for card in cards:
        first.setdefault(card.answer, card)
    again = [card for card in cards if first[card.answer] is not card]
    return [*first.values(), *again]


def parse_flashcards(text: str, limit: int) -> ParsedFlashcards:
    """At most ``limit`` cards of the first JSON array in ``text`` that has cards or is complete and empty.

    An array that breaks off gives its complete objects.
    """
    first: ParsedFlashcards | None = None
    for items, ended in _arrays(text):
        parsed = _parse_items(items, ended, limit)
        if parsed.cards or (ended and not items):
            return parsed
        # "[note] [{...}]": the first bracket may open something else. Its problem is told if no card follows.
        first = first or parsed
    return first or ParsedFlashcards((), 0, "no JSON array in the text")


def unused_items(text: str, cards: Sequence[Flashcard]) -> tuple[str, ...]:
    """The raw items of the arrays in ``text`` that became none of ``cards``, for people to read.

    Such an item is no card, a duplicate, or beyond the limit.
    """
    left = list(cards)
    unused: list[str] = []
    for items, _ in _arrays(text):
        for item in items:
            card = _card(item)
            if card in left:
                left.remove(card)
            else:
                unused.append(item)
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


def _arrays(text: str) -> Iterator[tuple[list[str], bool]]:
    """(raw items, array is closed) of the arrays in ``text``, left to right, at most ``_MAX_ARRAYS``."""
    start = text.find("[")
    for _ in range(_MAX_ARRAYS):
        if start < 0:
            return
        items, end, ended = _array_items(text, start)
        yield items, ended
        start = text.find("[", end)


def _array_items(text: str, start: int) -> tuple[list[str], int, bool]:
    """Scan the array that opens at ``start``: (raw top-level items, end of the scan, array is closed).

    It counts brackets and skips strings. A recursive parser could run out of stack; this scan cannot, and it
    keeps the items before a broken one.
    """
    items: list[str] = []
    depth, item_start, in_string, escaped = 0, start + 1, False, False
    place = start
    for place in range(start, len(text)):
        char = text[place]
        if in_string:
            # An escaped quote does not end the string, and an escaped backslash escapes nothing.
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
    # The text broke off after a whole object, before the next comma.
    if not ended and depth == 1 and last.endswith("}"):
        items.append(last)
    return [item.strip() for item in items if item.strip()], place + 1, ended


def _card(item: str) -> Flashcard | None:
    # json.loads is recursive and reads numbers of any length: no deep and no huge item may reach it.
    nesting = max(item.count("["), item.count("{"))
    if not item.startswith("{") or len(item) > 4 * MAX_SIDE_CHARACTERS or nesting > _MAX_NESTING:
        return None
    try:
        value = json.loads(item, strict=False)  # a model breaks lines inside strings
    except ValueError:
        return None
    question, answer = _side(value, _QUESTION_KEYS), _side(value, _ANSWER_KEYS)
    return Flashcard(question, answer) if question and answer else None


def _side(value: dict[str, object], keys: Sequence[str]) -> str:
    for key in keys:
        side = value.get(key)
        is_number = isinstance(side, (int, float)) and not isinstance(side, bool) and math.isfinite(side)
        if isinstance(side, str) or is_number:
            text = _clean(str(side))
            return text if len(text) <= MAX_SIDE_CHARACTERS else ""
    return ""


def _clean(text: str) -> str:
    """Make it one line, without control characters and lone surrogates: no tokenizer encodes a surrogate."""
    kept = "".join(char if unicodedata.category(char) not in ("Cc", "Cs") else " " for char in text)
    return " ".join(kept.split())
