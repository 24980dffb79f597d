"""The text of notes (A-MEM, arXiv 2502.12110): prompts that write, link and evolve them, and their parsers.

Invariant: the parsers never raise, whatever the model wrote. What is wrong is None, empty or counted.
The wording of the prompts is ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MAX_ITEMS = 12  # keywords or tags of a note
_MAX_CHARACTERS = 400  # of a context, and a quarter of it of a keyword: beyond that the model only runs on
_STRING = r'"(?:[^"\\]|\\.)*"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_LIST = re.compile(rf'\[(?:[^\[\]{{}}"]|{_STRING})*', re.DOTALL)
_ID = re.compile(r'"id"\s*:\s*')
_NUMBER = re.compile(r'"?[a-zA-Z #]*(\d{1,9})')  # of a note: 3, "3", "Note 3"
_EMPTY = re.compile(r"\[\s*\]")
# control characters, and lone surrogates, which no tokenizer can encode
_BLANK = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
# keywords come last: a small model likes to go on with this list until it is cut off
_WRITE = (
    'Write a JSON object about the text above, with the keys "context" (one sentence that sums it up), '
    '"tags" (its topics, three at most) and "keywords" (the names, places and things in it, six at most).'
)
_CONNECT = (
    "Which earlier notes belong with the new note? Write them as a JSON list of objects with "
    '"id", "context" and "tags", with context and tags brought up to date by the new note.'
)
_RECALL = "Your notes on what you have read:"


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the model says about a note. Each part may be empty."""

    keywords: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    context: str = ""  # one sentence


@dataclass(frozen=True, slots=True)
class Note:
    """A text that was read, and what the model says about it. Links go both ways.

    ``number`` counts from 1 in the order of reading, so it is the note's time as well as its name.
    """

    number: int
    content: str
    attributes: Attributes
    links: tuple[int, ...] = ()

    @property
    def embedded(self) -> str:
        """The text that the note is found by."""
        said = self.attributes
        parts = (said.context, ", ".join(said.keywords), ", ".join(said.tags), self.content)
        return "\n".join(filter(None, parts))


@dataclass(frozen=True, slots=True)
class Mention:
    """An earlier note that the model links to a new one, with new tags and context. Either may be empty."""

    number: int
    tags: tuple[str, ...]
    context: str


def writing_prompt(content: str) -> str:
    """Return the prompt that asks for the attributes of a note."""
    return f"{content}\n\n{_WRITE}"


def connecting_prompt(new: str, neighbours: Sequence[str]) -> str:
    """Return the prompt that asks for links from the note ``new`` to ``neighbours``, and for their updates.

    All notes are given in the form of ``as_json``.
    """
    listed = "\n".join(neighbours)
    return f"Earlier notes:\n{listed}\n\nNew note:\n{new}\n\n{_CONNECT}"


def as_json(note: Note, content: str) -> str:
    """Return the note in the form of the answer, with ``content`` in the place of its content.

    A small model goes on with the form that it sees.
    """
    said = note.attributes
    return json.dumps(
        {"id": note.number, "context": said.context, "tags": list(said.tags), "text": content},
        ensure_ascii=False,
    )


def render(note: Note, content: str) -> str:
    """Return the note as the agent sees it when it answers, with ``content`` in the place of its content."""
    said = note.attributes
    lists = (("keywords", ", ".join(said.keywords)), ("tags", ", ".join(said.tags)))
    about = " ".join(filter(None, (said.context, *(f"({name}: {items})" for name, items in lists if items))))
    return "\n".join(filter(None, (f"Note {note.number}: {about}".rstrip(": "), content)))


def recollection(notes: Mapping[int, str]) -> str:
    """Return the turn that opens a context: rendered notes, in the order of their numbers."""
    return "\n\n".join([_RECALL, *(notes[number] for number in sorted(notes))])


def exchange(text: str, reply: str) -> str:
    """Return an answered turn as the content of a note."""
    return f"{text}\nYou answered: {reply}"


def parse_attributes(text: str) -> Attributes:
    """Return every attribute that ``text`` has as JSON, also when the object around it is broken."""
    return Attributes(_texts(text, "keywords"), _texts(text, "tags"), _sentence(text))


def parse_mentions(text: str) -> tuple[Mention, ...] | None:
    """Return the notes that ``text`` names by "id", each once, also when the list around them is broken.

    An empty list names no note. None means that the answer is not in the form, or names no note by number.
    """
    parts = _ID.split(text)[1:]
    mentions: dict[int, Mention] = {}
    for part in parts:
        if match := _NUMBER.match(part):
            number = int(match[1])
            mentions.setdefault(number, Mention(number, _texts(part, "tags"), _sentence(part)))
    return tuple(mentions.values()) if mentions or (not parts and _EMPTY.search(text)) else None


def _value(text: str, key: str) -> str:
    """Return what follows ``"key":`` in ``text``, to the end of the text."""
    match = re.search(rf'"{key}"\s*:\s*', text)
    return text[match.end() :] if match else ""


def _texts(text: str, key: str) -> tuple[str, ...]:
    """Return the strings of the list under ``key``, or of one string with commas; cleaned, each once."""
    value = _value(text, key)
    items: list[str] = []
    if listed := _LIST.match(value):
        items = [_clean(string) for string in _STRINGS.findall(listed[0])]
    elif string := _STRINGS.match(value):
        items = _clean(string[0]).split(",")
    kept = [
        item.strip() for item in items if any(map(str.isalnum, item)) and len(item) <= _MAX_CHARACTERS // 4
    ]
    return tuple(dict.fromkeys(kept))[:_MAX_ITEMS]


def _sentence(text: str) -> str:
    match = _STRINGS.match(_value(text, "context"))
    sentence = _clean(match[0]) if match else ""
    return sentence if any(map(str.isalnum, sentence)) and len(sentence) <= _MAX_CHARACTERS else ""


def _clean(string: str) -> str:
    """Return the text of a JSON string on one line."""
    try:
        text = str(json.loads(string, strict=False))
    except ValueError:  # an escape that JSON does not know
        text = string[1:-1]
    return _BLANK.sub(" ", text).strip()
