"""Flashcards as text (TMEM, arXiv 2606.04536): the prompt that asks for cards, the parser, write examples.

    reply --visible_reply--> what is said --strict scan--> cards
                                          --repair-------> cards that are nearly JSON, counted

Invariant: `parse_flashcards` never raises, whatever the model wrote, and invents no card. When it finds no
card it says why. The wording of the prompt is our own.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.text.chat_template import ChatFormat, Ids
from actors.text.nearly_json import Found, Value, objects
from actors.text.thoughts import visible_reply
from actors.types import Flashcard, WriteExample

MAX_SIDE_CHARACTERS = 2000  # a longer question or answer is no flashcard

_QUESTION_KEYS = ("instruction", "question")
_ANSWER_KEYS = ("output", "answer")
# As the repair reads them, in any capitalisation.
_OTHER_QUESTION_KEYS = (*_QUESTION_KEYS, "q", "front", "prompt")
_OTHER_ANSWER_KEYS = (*_ANSWER_KEYS, "a", "back", "response")
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
# A small model repeats the form instead of filling it.
_PLACEHOLDERS = frozenset({("question", "answer"), ("...", "..."), ("\u2026", "\u2026")})
_SAYS_NONE = "the JSON array is empty"
# Behind "[]": "[] if nothing is useful" is no answer, and an object may hold an empty list.
_SAYS_MORE = re.compile(r"""[ \t"'`]*[\w,}]""")


@dataclass(frozen=True, slots=True)
class ParsedFlashcards:
    """Cards read from a text.

    ``rejected`` counts the items of the array that gave no card. ``problem`` says why ``cards`` is empty or
    cut short; otherwise it is "". ``repaired``: so many of the cards were no JSON, or had other keys.
    """

    cards: tuple[Flashcard, ...]
    rejected: int
    problem: str
    repaired: int = 0

    @property
    def says_none(self) -> bool:
        """Whether the text says that there is nothing to write: it has an empty list."""
        return self.problem == _SAYS_NONE


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
    with its stop token, behind the end of the thought that a generation prompt opens. Only it is learnt.
    """
    turns: Ids = ()
    for other in behind:
        reply = chat.reply(other.answer)
        turns += chat.user(other.question) + chat.assistant_open + reply + chat.assistant_close(reply)
    system = chat.system(system_prompt)
    return WriteExample(
        prompt_ids=system + chat.join(system, turns + chat.user(card.question)) + chat.assistant_open,
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

    An array that breaks off gives its complete objects. Where no array has a card, all objects that are
    nearly JSON are read. Thoughts are left out, and so is an echo of the prompt.
    """
    text = visible_reply(text)
    first: ParsedFlashcards | None = None
    for array in _arrays(text):
        # "[note] [{...}]": the first bracket may open something else. Its problem is told if no card follows.
        if any(_card(item) is not None for item in array.items):
            return _parse_items(array, limit)
        parsed = _parse_items(array, limit)
        if array.ended and not array.items and not _SAYS_MORE.match(text, array.end):
            if first is None or not first.cards:
                return parsed
            break
        first = first or parsed
    repaired = _repaired(text, limit)
    if repaired.cards:
        return repaired
    return first or ParsedFlashcards((), 0, "no JSON array in the text")


def unused_items(text: str, cards: Sequence[Flashcard]) -> tuple[str, ...]:
    """The raw items of the arrays in ``text`` that became none of ``cards``, for people to read.

    Such an item is no card, a duplicate, or beyond the limit.
    """
    left = list(cards)
    unused: list[str] = []
    for array in _arrays(visible_reply(text)):
        for item in array.items:
            used = [card for card in _cards_of(item)[0] if card in left]
            for card in used:
                left.remove(card)
            if not used:
                unused.append(item)
    return tuple(unused)


def card_items(text: str) -> tuple[tuple[str, tuple[Flashcard, ...]], ...]:
    """The raw items of the arrays in ``text``, in order, and the cards that each gives.

    A card counts here also where ``parse_flashcards`` would not take it: again, or beyond the limit.
    """
    arrays = _arrays(visible_reply(text))
    return tuple((item, tuple(_cards_of(item)[0])) for array in arrays for item in array.items)


class _Collector:
    """Takes cards up to ``limit``, each question once."""

    def __init__(self, limit: int) -> None:
        self.cards: list[Flashcard] = []
        self.repaired = 0
        self.rejected = 0
        self._limit = limit
        self._seen: set[str] = set()

    def take(self, cards: Sequence[Flashcard], repaired: bool) -> None:
        """Take the cards of one item. An item that gives none is rejected."""
        new = 0
        for card in cards:
            key = " ".join(card.question.lower().split())
            if key not in self._seen and len(self.cards) < self._limit:
                self._seen.add(key)
                self.cards.append(card)
                new += 1
        self.repaired += new if repaired else 0
        self.rejected += not new

    def parsed(self, problem: str) -> ParsedFlashcards:
        return ParsedFlashcards(tuple(self.cards), self.rejected, problem, self.repaired)


def _parse_items(array: _Array, limit: int) -> ParsedFlashcards:
    collector = _Collector(limit)
    for item in array.items:
        collector.take(*_cards_of(item))
    return collector.parsed(_problem(len(array.items), len(collector.cards), array.ended))


def _repaired(text: str, limit: int) -> ParsedFlashcards:
    """The cards of all objects in ``text`` that are nearly JSON. An object that breaks off is no item."""
    collector, cut = _Collector(limit), False
    for found in objects(text):
        cut = cut or found.cut
        if not found.cut:
            collector.take(_cards_in([found]), repaired=True)
    return collector.parsed("the JSON array breaks off" if cut else "")


def _cards_of(item: str) -> tuple[list[Flashcard], bool]:
    """(the cards of an array's item, they were repaired). Several where a comma is missing."""
    card = _card(item)
    if card is not None or not item.startswith("{"):
        return ([] if card is None else [card]), False
    return _cards_in(objects(item)), True


def _cards_in(found: Iterable[Found]) -> list[Flashcard]:
    cards = (_other_card(each.value) for each in found if each.value is not None)
    return [card for card in cards if card is not None]


def _problem(items: int, cards: int, ended: bool) -> str:
    if not ended:
        return "the JSON array breaks off"
    if items == 0:
        return _SAYS_NONE
    return "" if cards else f"none of the array's {items} items is a question with an answer"


@dataclass(frozen=True, slots=True)
class _Array:
    """The raw items of an array, where its text ends, and whether it is closed."""

    items: list[str]
    end: int
    ended: bool


def _arrays(text: str) -> Iterator[_Array]:
    """The arrays in ``text``, left to right, at most ``_MAX_ARRAYS``."""
    start = text.find("[")
    for _ in range(_MAX_ARRAYS):
        if start < 0:
            return
        array = _array_at(text, start)
        yield array
        start = text.find("[", array.end)


def _array_at(text: str, start: int) -> _Array:
    """Scan the array that opens at ``start``.

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
    return _Array([item.strip() for item in items if item.strip()], place + 1, ended)


def _card(item: str) -> Flashcard | None:
    # json.loads is recursive and reads numbers of any length: no deep and no huge item may reach it.
    nesting = max(item.count("["), item.count("{"))
    if not item.startswith("{") or len(item) > 4 * MAX_SIDE_CHARACTERS or nesting > _MAX_NESTING:
        return None
    try:
        # strict=False: a model breaks lines inside strings
        # numbers as they were written: 12.50 is a price
        value = json.loads(
            item, strict=False, object_pairs_hook=_each_key_once, parse_float=str, parse_int=str
        )
    except ValueError:
        return None
    return _flashcard(_side(value, _QUESTION_KEYS), _side(value, _ANSWER_KEYS))


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """With a key twice, a question could get another question's answer."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def _other_card(value: Mapping[str, Value]) -> Flashcard | None:
    """A card under the keys that models also use; its answer may be a list."""
    by_name: dict[str, str] = {}
    for key, side in value.items():
        name = key.strip().lower()
        if name in by_name:
            return None
        by_name[name] = _side_text(side)
    question, answer = (
        next((by_name[key] for key in keys if key in by_name), "")
        for keys in (_OTHER_QUESTION_KEYS, _OTHER_ANSWER_KEYS)
    )
    return _flashcard(question, answer)


def _side_text(side: Value) -> str:
    listed = side if isinstance(side, list) else [side]
    texts = [clean(text) for text in listed if isinstance(text, str)]
    text = ", ".join(texts) if len(texts) == len(listed) and all(texts) else ""
    return text if len(text) <= MAX_SIDE_CHARACTERS else ""


def _flashcard(question: str, answer: str) -> Flashcard | None:
    is_echo = (question.lower(), answer.lower()) in _PLACEHOLDERS
    return Flashcard(question, answer) if question and answer and not is_echo else None


def _side(value: dict[str, object], keys: Sequence[str]) -> str:
    for key in keys:
        side = value.get(key)
        if isinstance(side, str):
            text = clean(side)
            return text if len(text) <= MAX_SIDE_CHARACTERS else ""
    return ""


def clean(text: str) -> str:
    """Make it one line, without control characters and lone surrogates: no tokenizer encodes a surrogate."""
    kept = "".join(char if unicodedata.category(char) not in ("Cc", "Cs") else " " for char in text)
    return " ".join(kept.split())


def is_told(answer: str, told: str) -> bool:
    """Whether all words of ``answer`` are among those of ``told``.

    Chinese, Japanese or Thai puts no blanks between words, so there a word may stand within a longer run.
    """
    words = set(_words(told))
    return all(word in words or (not word.isascii() and word in told.casefold()) for word in _words(answer))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
