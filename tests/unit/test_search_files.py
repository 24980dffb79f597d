"""Files of questions and passages for searching: what is read, and what is refused in one line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.environments.search import read_corpus, read_questions
from actors.protocols import TaskError
from tests.unit.test_search import changed, opened


def test_a_category_of_its_own_goes_before_the_type(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda items: items[0].update(category="harbours"))
    assert [question.category for question in read_questions(str(path))[:2]] == ["harbours", "bridge"]


@pytest.mark.parametrize(
    "fields", [{"golden_answers": ["1968"]}, {"answers": "1968"}, {"answer": 1968, "answer_aliases": None}]
)
def test_right_answers_under_other_names(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "questions.jsonl"
    aliases = {"answer_aliases": ["in 1968", "1968"]}
    lines = [{"question": "When?", **fields}, {"question": "When?", **aliases, "answer": "1968"}]
    path.write_text("\ufeff" + "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    one, two = read_questions(str(path))
    assert (one.answers, two.answers) == (("1968",), ("1968", "in 1968"))


@pytest.mark.parametrize(
    ("end", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_json_lines_may_be_packed(tmp_path: Path, end: str, pack: Callable[[bytes], bytes]) -> None:
    questions, corpus = tmp_path / f"questions.jsonl.{end}", tmp_path / f"corpus.jsonl.{end}"
    questions.write_bytes(
        pack(b'{"question": "When?", "answer": "1968"}\n{"question": "Who?", "answer": "I"}\n')
    )
    corpus.write_bytes(pack(b'{"title": "Sea", "text": "Wet."}\n{"title": "Land", "text": "Dry."}\n'))
    assert [question.text for question in read_questions(str(questions))] == ["When?", "Who?"]
    assert [passage.title for passage in read_corpus(str(corpus))] == ["Sea", "Land"]


def test_a_long_text_becomes_passages_under_one_title(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    sentences = [f"Sentence {number} says a little about the sea." for number in range(80)]
    path.write_text(
        json.dumps({"title": "Sea", "text": " ".join(sentences)})
        + "\n"
        + json.dumps({"title": "Land", "text": "Dry."})
    )
    passages = read_corpus(str(path))
    assert len(passages) > 3 and all(len(passage.text) <= 1000 for passage in passages)
    assert [passage.title for passage in passages] == ["Sea"] * (len(passages) - 1) + ["Land"]
    assert " ".join(passage.text for passage in passages[:-1]) == " ".join(sentences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items.__setitem__(2, "x"), "item 2: Input should be an object"),
        (lambda items: items[2].pop("question"), r"item 2 \('s03'\): question: Field required"),
        (lambda items: items[2].pop("answer"), "answer: Field required"),
        (lambda items: items[2].update(answer=[]), "answer: Input should have at least one entry"),
        (lambda items: items[2].update(answer=None), "answer: Input should be a text or a number"),
        (lambda items: items[2].update(answer=["a", None]), "answer.1: Input should be a text or a number"),
        (lambda items: items[2].update(type=3), "type: Input should be a text that is not blank"),
        (lambda items: items[2].update(_id=None), "item 2: _id: Input should be a text or a number"),
        (
            lambda items: items.__delitem__(slice(3, 9)),
            "questions are for .*, and a task takes environment.search.objectives=2: lower it",
        ),
        (lambda items: items.clear(), "0 of its 0 questions are for train"),
    ],
)
def test_a_malformed_file_of_questions(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    refused(message, questions_path=str(changed(tmp_path, change)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", "[]", "c.json: Input should be an object"),
        ("c.json", "{}", "it has no passages: give environment.search.corpus_path the path of"),
        ("c.json", '{"Sea": 3}', "Sea: Input should be a text that is not blank"),
        ("c.json", '{"Sea": ["a", 3]}', "Sea.1: Input should be a valid string"),
        ("c.json", '{"title": "a"}\n{"title": "b"}', "Invalid JSON: trailing characters at line 2 column 1"),
        (
            "c.jsonl",
            '{"title": "a", "text": "b"}\n\n{"title": "b"}',
            "line 3: text: Field required",
        ),
        ("c.jsonl", '{"title": "a", "text": "b"}\n{"title', "line 2: Invalid JSON"),
    ],
)
def test_a_malformed_corpus(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    refused(message, corpus_path=str(tmp_path / name))


def test_a_missing_file(tmp_path: Path) -> None:
    refused(
        r"none.json: cannot be read \(No such file or directory\): give environment.search.questions_path",
        questions_path=str(tmp_path / "none.json"),
    )
    refused("environment.search.corpus_path is empty: give the path of a file of passages", corpus_path="")


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(TaskError, match=message) as error:
        opened(**settings)
    assert "\n" not in str(error.value)
