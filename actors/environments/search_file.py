"""The files of multi-objective search, read and checked: questions with short answers, and the passages to search.

Questions: HotpotQA's JSON list ({question, answer, _id, type, ...}, arXiv 1809.09600), or JSON lines of {question, answer[, category, id]}.
Passages: a JSON object of title to sentences (or one text), or JSON lines of {title, text}. A name that ends in .jsonl means JSON lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from actors.environments.fields import Field, Source
from actors.protocols import TaskError
from actors.text.split_text import split_text

_PASSAGE_CHARACTERS = 1000
"""About 250 tokens. A longer text becomes several passages, so that a turn with the results of a search is bounded; our choice."""


@dataclass(frozen=True, slots=True)
class SearchQuestion:
    """``answers`` are all right, at least one. ``key`` decides the side of the split: the file's id, else the text."""

    key: str
    text: str
    answers: tuple[str, ...]
    category: str


@dataclass(frozen=True, slots=True)
class Passage:
    title: str
    text: str


def read_questions(path: str) -> list[SearchQuestion]:
    """In the file's order. Raises TaskError."""
    source = Source(
        path,
        "environment.search.questions_path",
        "a file of questions (HotpotQA's JSON list, or JSON lines in a .jsonl file)",
    )
    items = source.json_lines() if _is_lines(path) else source.json_list("questions")
    return [_question(item) for item in items]


def read_corpus(path: str) -> list[Passage]:
    """In the file's order, at least one. Raises TaskError."""
    source = Source(
        path,
        "environment.search.corpus_path",
        "a file of passages (a JSON object of title to sentences, or JSON lines in a .jsonl file)",
    )
    texts = _texts_of_lines(source) if _is_lines(path) else _texts_of_object(source)
    passages = [
        Passage(title, piece.strip())
        for title, text in texts
        for piece in split_text(text, len, _PASSAGE_CHARACTERS)
    ]
    if not passages:
        raise TaskError(f"{path}: it has no passage: give {source.setting} the path of {source.what}")
    return passages


def _is_lines(path: str) -> bool:
    return path.endswith(".jsonl")


def _question(item: Field) -> SearchQuestion:
    text = item["question"].text().strip()
    answer = item["answer"]
    answers = (
        [part.scalar() for part in answer.items()] if isinstance(answer.value, list) else [answer.scalar()]
    )
    if not answers:
        raise answer.error("at least one answer")
    key = item.either(("_id", "id"), text).scalar()
    category = item.either(("category", "type"), "search").text()
    return SearchQuestion(key, text, tuple(answers), category)


def _texts_of_lines(source: Source) -> Iterator[tuple[str, str]]:
    for item in source.json_lines():
        yield item["title"].text(), item["text"].text()


def _texts_of_object(source: Source) -> Iterator[tuple[str, str]]:
    corpus = Field(source.path, "the file", source.json())
    for title, value in corpus.object().items():
        text = Field(source.path, f"title {title!r}", value)
        sentences = (
            [sentence.text(may_be_blank=True).strip() for sentence in text.items()]
            if isinstance(value, list)
            else [text.text()]
        )
        yield title, " ".join(sentence for sentence in sentences if sentence)
