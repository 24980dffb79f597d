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
_ID = re.compile(r'"id"\s*:\s*')
_NUMBER = re.compile(r'"?[a-zA-Z #]*(\d{1,9})')  # of a note: 3, "3", "Note 3"
_EMPTY = re.compile(r"\[\s*\]")
_BLANK = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+"
)  # control characters, and lone surrogates, which no tokenizer can encode
_WRITE = (
    'Write a JSON object about the text above, with the keys "context" (one sentence that sums it up), "tags" (its topics, three at most) and '
    '"keywords" (the names, places and things in it, six at most).'  # last: a small model likes to go on with this list until it is cut off
)
_CONNECT = (
    'Which earlier notes belong with the new note? Write them as a JSON list of objects with "id", "context" and "tags", '
    "with context and tags brought up to date by the new note."
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
        return "\n".join(
            filter(None, (said.context, ", ".join(said.keywords), ", ".join(said.tags), self.content))
        )


@dataclass(frozen=True, slots=True)
class Mention:
    """A note that the model names as belonging with a new one, with what it says of it now: tags and a context, either of them perhaps empty."""

    number: int
    tags: tuple[str, ...]
    context: str


def writing_prompt(content: str) -> str:
    """Asks for the attributes of a note."""
    return f"{content}\n\n{_WRITE}"


def connecting_prompt(new: str, neighbours: Sequence[str]) -> str:
    """Asks which of the ``neighbours`` the note ``new`` belongs with, and what is to be said of them now. All are given by `as_json`."""
    listed = "\n".join(neighbours)
    return f"Earlier notes:\n{listed}\n\nNew note:\n{new}\n\n{_CONNECT}"


def as_json(note: Note, content: str) -> str:
    """The note with ``content`` of its content, in the form of the answer: a small model goes on with the form that it sees."""
    said = note.attributes
    return json.dumps(
        {"id": note.number, "context": said.context, "tags": list(said.tags), "text": content},
        ensure_ascii=False,
    )


def render(note: Note, content: str) -> str:
    """The note as a turn is answered from it, with ``content`` of its content."""
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


def parse_mentions(text: str) -> tuple[Mention, ...] | None:
    """The notes that ``text`` names by "id", each once, also when the list around them is broken or breaks off.

    An empty list names none. None is an answer that is not in the form, or names notes by something else than their numbers.
    """
    parts = _ID.split(text)[1:]
    mentions: dict[int, Mention] = {}
    for part in parts:
        if found := _NUMBER.match(part):
            number = int(found[1])
            mentions.setdefault(number, Mention(number, _texts(part, "tags"), _sentence(part)))
    return tuple(mentions.values()) if mentions or (not parts and _EMPTY.search(text)) else None


def _value(text: str, key: str) -> str | None:
    """What follows ``"key":`` in ``text``, to the end of the text."""
    found = re.search(rf'"{key}"\s*:\s*', text)
    return None if found is None else text[found.end() :]


def _texts(text: str, key: str) -> tuple[str, ...]:
    """The strings of the list under ``key``, or of one string with commas; cleaned, each once."""
    value = _value(text, key) or ""
    listed = _LIST.match(value)
    one = _STRINGS.match(value)
    items = (
        [_clean(item) for item in _STRINGS.findall(listed[0])]
        if listed
        else _clean(one[0]).split(",")
        if one
        else []
    )
    kept = [
        item.strip() for item in items if any(map(str.isalnum, item)) and len(item) <= _MAX_CHARACTERS // 4
    ]
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
