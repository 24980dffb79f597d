"""A note as text (A-MEM, arXiv 2502.12110): the prompts that write, link and evolve notes, and parsers that forgive.

Invariant: the parsers never raise, whatever the model wrote; what is wrong is None, empty or counted. The wording is our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MAX_ITEMS = 12  # keywords or tags of a note
_MAX_CHARACTERS = 400  # of a context; a longer one, or a keyword of that kind, is the model running on
_STRING = r'"(?:[^"\\]|\\.)*"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_LIST = re.compile(rf'\[(?:[^\[\]{{}}"]|{_STRING})*', re.DOTALL)
_OBJECTS = re.compile(rf'\{{(?:[^{{}}"]|{_STRING})*\}}', re.DOTALL)
_NAME = re.compile(r'"?[a-zA-Z #]*(\d{1,9})')  # of a note: 3, "3", "Note 3"
_NUMBERS = re.compile(r"-?\d{1,9}")
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")  # control characters, and lone surrogates, which no tokenizer can encode
_WRITE = (
    'Write a JSON object about the text above, with the keys "context" (one sentence that sums it up), '
    '"keywords" (the names, places and things in it) and "tags" (its topics).'
)
_CONNECT = (
    'Write a JSON object with the keys "links" (a list with the numbers of the earlier notes that belong with the new note) and "updates" (a list '
    'with an object for each earlier note that the new note changes, with its number as "note", its new "tags" and its new "context").'
)
_RECALL = "Your notes on what you have read:"


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the model says of a note: keywords and tags (each perhaps empty) and one sentence of context (perhaps empty)."""

    keywords: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    context: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    """``number`` counts from 1 in the order in which the texts were read: it is the note's time as well as its name. Links go both ways."""

    number: int
    content: str
    attributes: Attributes
    links: tuple[int, ...] = ()

    @property
    def embedded(self) -> str:
        """The text that the note is found by."""
        said = self.attributes
        return "\n".join(filter(None, (said.context, ", ".join(said.keywords), ", ".join(said.tags), self.content)))


@dataclass(frozen=True, slots=True)
class Update:
    """What shall change of a note: new tags, a new context sentence, or both (at least one is not empty)."""

    number: int
    tags: tuple[str, ...]
    context: str


@dataclass(frozen=True, slots=True)
class Connections:
    """What the model says of a new note's neighbours. ``refused`` counts its updates that name no note or nothing to change."""

    links: tuple[int, ...]
    updates: tuple[Update, ...]
    refused: int


def writing_prompt(content: str) -> str:
    """Asks for the attributes of a note."""
    return f"{content}\n\n{_WRITE}"


def connecting_prompt(new: str, neighbours: Sequence[str]) -> str:
    """Asks which of the rendered ``neighbours`` the rendered note ``new`` belongs with, and which of them it changes."""
    listed = "\n".join(neighbours)
    return f"Earlier notes:\n{listed}\n\nNew note:\n{new}\n\n{_CONNECT}"


def render(note: Note, content: str) -> str:
    """The note as the model sees it, with ``content`` of its content."""
    said = note.attributes
    lists = (("keywords", ", ".join(said.keywords)), ("tags", ", ".join(said.tags)))
    about = " ".join(filter(None, (said.context, *(f"({name}: {items})" for name, items in lists if items))))
    return "\n".join(filter(None, (f"Note {note.number}: {about}".rstrip(": "), content)))


def recollection(notes: Mapping[int, str]) -> str:
    """Rendered notes, by their numbers, as the turn that opens a context."""
    return "\n\n".join([_RECALL, *(notes[number] for number in sorted(notes))])


def exchange(text: str, reply: str) -> str:
    """A turn that was answered, as the content of a note."""
    return f"{text}\nYou answered: {reply}"


def parse_attributes(text: str) -> Attributes:
    """Every attribute that stands in ``text`` in the form of JSON, also when the object around it is broken or breaks off."""
    return Attributes(_texts(text, "keywords"), _texts(text, "tags"), _sentence(text))


def parse_connections(text: str) -> Connections | None:
    """None when ``text`` names neither links nor updates in the form of JSON."""
    links, updates = _value(text, "links"), _value(text, "updates")
    if links is None and updates is None:
        return None
    listed = re.split(r'\]|"updates"', links or "")[0]
    numbers = [int(number) for number in _NUMBERS.findall(listed)]
    parsed = [_update(item) for item in _OBJECTS.findall(updates or "")]
    kept = tuple(update for update in parsed if update is not None)
    return Connections(tuple(dict.fromkeys(numbers)), kept, len(parsed) - len(kept))


def _update(item: str) -> Update | None:
    number = _NAME.match(_value(item, "note") or "")
    tags, context = _texts(item, "tags"), _sentence(item)
    return Update(int(number[1]), tags, context) if number and (tags or context) else None


def _value(text: str, key: str) -> str | None:
    """What follows ``"key":`` in ``text``, to the end of the text."""
    found = re.search(rf'"{key}"\s*:\s*', text)
    return None if found is None else text[found.end() :]


def _texts(text: str, key: str) -> tuple[str, ...]:
    """The strings of the list under ``key``, or of one string with commas; cleaned, each once."""
    value = _value(text, key) or ""
    listed = _LIST.match(value)
    one = _STRINGS.match(value)
    items = [_clean(item) for item in _STRINGS.findall(listed[0])] if listed else _clean(one[0]).split(",") if one else []
    kept = [item.strip() for item in items if any(map(str.isalnum, item)) and len(item) <= _MAX_CHARACTERS // 4]
    return tuple(dict.fromkeys(kept))[:_MAX_ITEMS]


def _sentence(text: str) -> str:
    found = _STRINGS.match(_value(text, "context") or "")
    sentence = _clean(found[0]) if found else ""
    return sentence if any(map(str.isalnum, sentence)) and len(sentence) <= _MAX_CHARACTERS else ""


def _clean(string: str) -> str:
    """The text of a JSON string on one line."""
    try:
        text = str(json.loads(string, strict=False))
    except ValueError:  # an escape that JSON does not know
        text = string[1:-1]
    return _BLANK.sub(" ", text).strip()
