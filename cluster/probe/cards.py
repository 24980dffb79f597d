"""The cards of a probe: a user's file, or facts made up from the recall environment's words with wordings of their own.

A file is JSON (a list) or JSONL of {"question", "answer"[, "paraphrases": [...]][, "telling"]}; "instruction" and "output" are read as flashcards
have them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.environments.base import Split
from actors.environments.recall_words import PEOPLE, RELATIONS
from cluster.probe.values import Card, ProbeError

_QUESTION_KEYS, _ANSWER_KEYS = ("question", "instruction"), ("answer", "output")
_FORM = '{"question": "...", "answer": "...", "paraphrases": ["..."]}'

PARAPHRASES = {
    "home": ("In which city does {name} live now?", "Name the place that {name} calls home."),
    "job": ("What kind of work does {name} do?", "Tell me {name}'s profession."),
    "pet": ("What animal does {name} keep?", "Name the pet that {name} looks after."),
    "birthday": ("On which day was {name} born?", "Tell me the date of {name}'s birthday."),
    "instrument": ("Which instrument does {name} practice?", "Name the instrument that {name} plays."),
    "dish": ("Which food does {name} like best?", "Tell me the dish that {name} loves."),
    "purchase": ("Which thing did {name} get at the shop?", "Name the item that {name} bought."),
    "holiday": ("To which country did {name} travel?", "Tell me where {name} spent the holidays."),
    "hobby": ("What does {name} do at the weekend?", "Name the thing that {name} does for fun."),
}
"""By relation: wordings that neither a telling nor a question of the environment uses. They are asked, never written."""


def cards_of(source: str, seed: int) -> tuple[Card, ...]:
    """``source``: a file, "recall:N" (held-out words) or "recall:train:N" (the words of training). A file's order is shuffled by seeds above 0.

    Raises ProbeError.
    """
    if not source.startswith("recall:"):
        cards = read_cards(Path(source))
        return cards if seed == 0 else tuple(random.Random(f"probe/{seed}").sample(cards, len(cards)))
    *middle, count = source.removeprefix("recall:").split(":")
    if middle not in ([], ["train"], ["eval"]) or not count.isdecimal() or int(count) < 1:
        raise ProbeError(
            f"--cards {source}: write recall:N, or recall:train:N to tune on other words, with N of 1 or more"
        )
    return recall_cards(int(count), "train" if middle == ["train"] else "eval", seed)


def recall_cards(count: int, split: Split, seed: int) -> tuple[Card, ...]:
    """``count`` facts, each a person and a relation, so no question has two answers. Answers repeat only when a relation's are used up."""
    pairs = list(itertools.product(PEOPLE[split], RELATIONS))
    if count > len(pairs):
        raise ProbeError(
            f"--cards asks for {count} facts, the {split} words make {len(pairs)}: lower it, or give a file"
        )
    rng, telling = (
        random.Random(f"probe/recall/{split}/{seed}"),
        random.Random(f"probe/recall/{split}/{seed}/telling"),
    )
    used: set[str] = set()
    cards = []
    for person, relation in rng.sample(pairs, count):
        values = relation.values[split]
        value = rng.choice([value for value in values if value not in used] or values)
        used.add(value)
        wordings = (*relation.questions, *PARAPHRASES[relation.name])
        question, *others = (wording.format(name=person) for wording in wordings)
        cards.append(
            Card(
                question,
                value,
                tuple(others),
                telling.choice(relation.tellings).format(name=person, value=value),
            )
        )
    return tuple(cards)


def read_cards(path: Path) -> tuple[Card, ...]:
    """Raises ProbeError with file, line or item, field and cure. A question that comes twice is refused: it would have two answers."""
    cards: dict[str, Card] = {}
    for where, item in _items(path):
        card = _card(where, item)
        if card.question in cards:
            raise ProbeError(
                f"{where}: the question {card.question!r} was there before; leave one of the two out"
            )
        cards[card.question] = card
    if not cards:
        raise ProbeError(f"{path}: holds no card; give one {_FORM} a line")
    return tuple(cards.values())


def _items(path: Path) -> Iterator[tuple[str, Any]]:
    """Each item with its place for messages."""
    text = read_text(path, "--cards")
    if text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            raise ProbeError(
                f"{path}, line {error.lineno}: is not JSON ({error.msg}); give a list, or one object a line"
            ) from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # a number of thousands of digits; a nesting of thousands
            raise ProbeError(f"{path}: cannot be read ({error}); give a list, or one object a line") from None
        yield from ((f"{path}, item {number}", item) for number, item in enumerate(items, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise ProbeError(
                f"{path}, line {number}: is not JSON ({error.msg}); each line must be {_FORM}"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ProbeError(
                f"{path}, line {number}: cannot be read ({error}); each line must be {_FORM}"
            ) from None


def _card(where: str, item: Any) -> Card:
    if not isinstance(item, dict):
        raise ProbeError(f"{where}: is a {type(item).__name__}, not an object; write {_FORM}")
    paraphrases = item.get("paraphrases", [])
    if not isinstance(paraphrases, list):
        raise ProbeError(
            f"{where}: 'paraphrases' is a {type(paraphrases).__name__}; it must be a list of texts"
        )
    others = tuple(_text(where, f"paraphrases[{number}]", text) for number, text in enumerate(paraphrases))
    telling = _text(where, "telling", item["telling"]) if "telling" in item else ""
    return Card(_side(where, item, _QUESTION_KEYS), _side(where, item, _ANSWER_KEYS), others, telling)


def _side(where: str, item: dict[str, Any], keys: tuple[str, str]) -> str:
    for key in keys:
        if key in item:
            return _text(where, key, item[key])
    raise ProbeError(f"{where}: has neither {keys[0]!r} nor {keys[1]!r}; write {_FORM}")


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool) or not str(value).strip():
        raise ProbeError(f"{where}: {field!r} is {value!r}; it must be a text that is not empty")
    return str(value).strip()


def read_text(path: Path, argument: str) -> str:
    """A UTF-8 file. Raises ProbeError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ProbeError(f"{argument} {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ProbeError(
            f"{argument} {path}: is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ProbeError(f"{argument} {path}: cannot be read ({error.strerror})") from None
