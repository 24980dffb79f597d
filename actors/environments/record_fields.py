"""Finds texts, question and right answers in a record, in the shapes that public data sets have.

    golden_answers            a list of right answers (FlashRAG)
    answers                   {"text": ["Lisbon"], "answer_start": [4]} (SQuAD; without any: not answerable)
    answer                    {"value": "Lisbon", "aliases": ["Lisboa"]} (TriviaQA)
    aliases, answer_aliases   more right answers
    messages, prompt          [{"role": "user", "content": ...}, ...]: told in turn, and the last one is asked
    context                   [{"title": ..., "text": ...}, ...]; context.sentences: lists of sentences
                              [["Ed Wood (film)", ["sentence", ...]], ...] (HotpotQA, 2WikiMultihopQA), or
                              {"title": [...], "sentences": [[...], ...]} (the same on the hub)
    answerable: false, is_impossible: true    the texts do not tell the answer

A configured name is looked up as it stands, then as a path. The other names are tried where the setting has
its default. A field of none of these shapes comes back as it is, for the reader to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.environments.data_file import message_text
from configs.schema import RecordsConfig

KNOWN: Mapping[str, Sequence[str]] = {
    "texts": ("texts", "context", "contexts", "passages", "paragraphs"),
    "question": ("question", "query", "messages", "prompt"),
    "answer": ("answer", "golden_answers", "answers"),
}
"""What is tried in turn for a setting that has its default."""

_ALIASES = ("aliases", "answer_aliases")
_TEXT_KEYS = ("text", "content", "paragraph_text")
_ANSWER_KEYS = ("text", "value", "aliases", "content")
_LABELS = {"system": "[Instructions]", "user": "[User]", "assistant": "[Assistant]"}
_MISSING = object()

Found = tuple[dict[str, Any], dict[str, str]]


def found_in(record: Mapping[str, Any], config: RecordsConfig) -> Found:
    """(the values by "texts", "question", "answers", "category"; the names that they have in the record).

    What is missing has no value. ``answers`` is None where the texts do not tell the answer.
    """
    question_name, question = _find(record, config.question_field)
    texts_name, texts = _find(record, config.texts_field)
    answer_name, answers = _find(record, config.answer_field)
    told: list[Any] = []
    if _is_conversation(question):
        *earlier, last = question
        told, question = _texts(earlier), message_text(last["content"]) if last["role"] == "user" else None
    values = {"question": question, "texts": told if texts is _MISSING and told else _and(texts, told)}
    # null alone says nothing: a value may have been lost
    right = _MISSING if answers is None else _right(answers)
    values["answers"] = None if _is_unanswerable(record, answers) else right
    names = {"question": question_name, "texts": texts_name, "answers": answer_name}
    for alias in _ALIASES:
        if values["answers"] not in (None, _MISSING) and record.get(alias) is not None:
            values["answers"] = [*_listed(values["answers"]), *_listed(_right(record[alias]))]
    if config.category_field:
        names["category"] = config.category_field
        values["category"] = _at(record, config.category_field)
    return {key: value for key, value in values.items() if value is not _MISSING}, names


def columns_of(config: RecordsConfig) -> set[str]:
    """The columns that ``found_in`` may look at."""
    fields = (config.texts_field, config.question_field, config.answer_field, config.category_field)
    known = {name for names in KNOWN.values() for name in names}
    own = {part for name in fields for part in (name, name.partition(".")[0])}
    return known | own | {*_ALIASES, "answerable", "is_impossible"}


def _find(record: Mapping[str, Any], name: str) -> tuple[str, Any]:
    """(name, value) of the first of the names that may stand for ``name``, and is not null."""
    for each in KNOWN.get(name, (name,)):
        if (value := _at(record, each)) is not _MISSING and value is not None:
            return each, value
    return name, _at(record, name)


def _at(value: Any, name: str) -> Any:
    """The field ``name``. A dot goes inside an object, or inside each object of a list."""
    if isinstance(value, Mapping):
        if name in value:
            return value[name]
        first, dot, rest = name.partition(".")
        return _at(value[first], rest) if dot and first in value else _MISSING
    if isinstance(value, list) and value:
        inner = [_at(item, name) for item in value]
        return _MISSING if _MISSING in inner else inner
    return _MISSING


def _is_unanswerable(record: Mapping[str, Any], answers: Any) -> bool:
    is_squads = isinstance(answers, Mapping) and "answer_start" in answers and not answers.get("text")
    return record.get("answerable") is False or record.get("is_impossible") is True or is_squads


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_message(item) for item in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _and(texts: Any, told: list[Any]) -> Any:
    if texts is _MISSING or not told:
        return _texts(texts)
    return [*_listed(_texts(texts)), *told]


def _texts(value: Any) -> Any:
    match value:
        case {"title": [*titles], "sentences": [*bodies]} if len(titles) == len(bodies):
            value = [list(pair) for pair in zip(titles, bodies, strict=True)]
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return [_paragraph(item) for item in value]
    if isinstance(value, list):
        # a turn in which nothing was said is left out
        said = (item for item in value if not _is_message(item) or str(message_text(item["content"])).strip())
        return [_text(item) for item in said]
    return _text(value)


def _paragraph(parts: list[Any]) -> Any:
    """Sentences as one text, a title as its first line; ``parts`` where they are neither."""
    match parts:
        case [str(title), [*sentences]] if all(isinstance(sentence, str) for sentence in sentences):
            return f"{title}\n{_joined(sentences)}".strip()
    return _joined(parts) if all(isinstance(part, str) for part in parts) else parts


def _joined(sentences: list[str]) -> str:
    """Some data sets keep the blank between two sentences, and some do not."""
    spaced = any(sentence != sentence.strip() for sentence in sentences)
    return "".join(sentences) if spaced else " ".join(sentences)


def _text(value: Any) -> Any:
    if _is_message(value):
        return f"{_LABELS.get(value['role'], '[Assistant]')}\n{message_text(value['content'])}"
    if isinstance(value, Mapping):
        return next((value[key] for key in _TEXT_KEYS if key in value), value)
    return value


def _right(value: Any) -> Any:
    """The right answers in ``value``: a list of them, or one."""
    if isinstance(value, Mapping):
        inner = [_right(value[key]) for key in _ANSWER_KEYS if value.get(key) is not None]
        return [part for each in inner for part in _listed(each)] if inner else value
    if isinstance(value, list):
        return [part for item in value for part in _listed(_right(item))]
    return value


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
