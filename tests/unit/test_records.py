"""Tasks from users' records: both file formats, what a session shows and scores, messages for bad files."""

from __future__ import annotations

import bz2
import codecs
import gzip
import itertools
import json
import lzma
import os
import re
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from actors.environments.build import build_environment
from actors.environments.records import RecordsEnvironment, read_records
from actors.protocols import TaskError
from actors.types import Task
from configs.schema import EmbedderConfig, EnvironmentConfig, RecordsConfig

RECORDS: list[dict[str, Any]] = [
    {
        "texts": [f"Person {place} moved to town {place}.", "It rained."],
        "question": f"Where does person {place} live?",
        "answer": [f"town {place}"],
    }
    for place in range(10)
]


def _lines(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _table(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "records.parquet"
    parquet.write_table(pa.Table.from_pylist(records), path)
    return path


def _environment(path: Path) -> RecordsEnvironment:
    return RecordsEnvironment(RecordsConfig(path=str(path), eval_fraction=0.2))


def test_both_formats_give_the_same_tasks(tmp_path: Path) -> None:
    of_lines, of_table = _environment(_lines(tmp_path, RECORDS)), _environment(_table(tmp_path, RECORDS))
    for split, count in (("train", 12), ("eval", 2)):
        tasks = list(itertools.islice(of_lines.tasks(split, 3, 0), count))  # type: ignore[arg-type]
        assert tasks == list(itertools.islice(of_table.tasks(split, 3, 0), count))  # type: ignore[arg-type]
    assert len(list(of_lines.tasks("eval", 0, 0))) == 2
    assert next(of_lines.tasks("train", 3, 5)) == list(itertools.islice(of_lines.tasks("train", 3, 0), 6))[5]


def test_no_text_is_in_both_splits(tmp_path: Path) -> None:
    twice = [*RECORDS, *({**record, "question": "And again?"} for record in RECORDS)]
    environment = _environment(_lines(tmp_path, twice))
    held_out = {task.payload["texts"][0] for task in environment.tasks("eval", 0, 0)}
    trained = {task.payload["texts"][0] for task in itertools.islice(environment.tasks("train", 0, 0), 16)}
    assert len(held_out) == 2 and len(trained) == 8 and not held_out & trained


def test_a_session_reads_then_asks_and_the_best_right_answer_counts() -> None:
    payload = {
        "texts": ["one", "two"],
        "question": "Which?",
        "answers": ["the red house", "red"],
        "category": "colour",
    }
    nobody: Any = None  # a session keeps nothing of its environment
    session = RecordsEnvironment.start(nobody, Task("t", "records", payload, 0))
    turns = []
    while (observation := session.observe()) is not None:
        turns.append((observation.text, observation.wants_action))
        if observation.wants_action:
            session.act(" Red ")
    assert turns == [("one", False), ("two", False), ("Which?", True)]
    outcome = session.outcome()
    assert (
        outcome.reward == 1.0
        and outcome.answers[0].scores == {"f1": 1.0, "em": 1.0}
        and outcome.answers[0].category == "colour"
    )


def test_other_names_of_fields(tmp_path: Path) -> None:
    path = _lines(tmp_path, [{"context": "A text.", "q": "What?", "a": 3, "kind": "numbers"}])
    (record,) = read_records(
        RecordsConfig(
            path=str(path), texts_field="context", question_field="q", answer_field="a", category_field="kind"
        )
    )
    assert (record.texts, record.question, record.answers, record.category) == (
        ("A text.",),
        "What?",
        ("3",),
        "numbers",
    )


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Nora moved to Lisbon."}, {"type": "image"}]},
    {"role": "assistant", "content": None},
    {"role": "user", "content": "Where does Nora live?"},
]
QUESTION = "Where does Nora live?"
TOLD = ("[Instructions]\nBe brief.", "[User]\nNora moved to Lisbon.")


@pytest.mark.parametrize(
    ("record", "settings", "answers"),
    [
        ({"golden_answers": ["Lisbon", "Lisboa"]}, {}, ("Lisbon", "Lisboa")),
        ({"answers": {"text": ["Lisbon", "Lisbon"], "answer_start": [14, 14]}}, {}, ("Lisbon",)),
        ({"answers": {"text": ["Lisbon"]}}, {"answer_field": "answers.text"}, ("Lisbon",)),
        ({"answer": {"value": "Lisbon", "aliases": ["Lisboa"], "type": "x"}}, {}, ("Lisbon", "Lisboa")),
        ({"answer": "Lisbon", "answer_aliases": ["Lisboa", "Ulisipo"]}, {}, ("Lisbon", "Lisboa", "Ulisipo")),
        ({"answer": "Lisbon", "aliases": []}, {}, ("Lisbon",)),
        ({"out": {"best": [{"text": "Lisbon"}]}}, {"answer_field": "out.best.text"}, ("Lisbon",)),
        ({"a.b": "Lisbon", "a": {"b": "Oslo"}}, {"answer_field": "a.b"}, ("Lisbon",)),
        ({"answer": "Lisbon", "answerable": False}, {}, ()),
        ({"answers": {"text": [], "answer_start": []}}, {}, ()),
        ({"answer": None, "is_impossible": True}, {}, ()),
    ],
)
@pytest.mark.parametrize("write", [_lines, _table])
def test_right_answers_in_the_shapes_of_public_data(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, str], answers: tuple[str, ...], write: Any
) -> None:
    path = write(tmp_path, [{"texts": ["A text."], "question": "What?"} | record])
    (read,) = read_records(RecordsConfig(path=str(path), **settings))  # type: ignore[arg-type]
    assert (read.texts, read.question, read.answers) == (("A text.",), "What?", answers)


@pytest.mark.parametrize(
    ("record", "settings", "texts"),
    [
        ({"messages": MESSAGES}, {}, TOLD),
        ({"prompt": MESSAGES, "texts": "A text."}, {}, ("A text.", *TOLD)),
        ({"chat": MESSAGES[:2], "question": "Where does Nora live?"}, {"texts_field": "chat"}, TOLD),
        (
            {"ctx": {"sentences": [["A. ", "B."], ["C."]]}, "query": "Where does Nora live?"},
            {"texts_field": "ctx.sentences"},
            ("A. B.", "C."),
        ),
        (
            {"contexts": [{"title": "t", "text": "A."}, {"text": "B."}], "query": "Where does Nora live?"},
            {},
            ("A.", "B."),
        ),
        (
            {"context": [["Ed Wood", ["He directs.", "He acts."]], ["Oslo", []]], "query": QUESTION},
            {},
            ("Ed Wood\nHe directs. He acts.", "Oslo"),
        ),
        (
            {
                "context": {"title": ["Ed Wood"], "sentences": [["He directs.", " He acts."]]},
                "query": QUESTION,
            },
            {},
            ("Ed Wood\nHe directs. He acts.",),
        ),
        (
            {"context": [["Ed Wood", ["He directs.", " He acts."]]], "query": QUESTION},
            {},
            ("Ed Wood\nHe directs. He acts.",),
        ),
        (
            {"paragraphs": [{"paragraph_text": "A."}], "q": {"text": "Where does Nora live?"}},
            {"question_field": "q.text"},
            ("A.",),
        ),
    ],
)
def test_texts_and_questions_in_the_shapes_of_public_data(
    tmp_path: Path, record: dict[str, Any], settings: dict[str, str], texts: tuple[str, ...]
) -> None:
    path = _lines(tmp_path, [{"answer": "Lisbon"} | record])
    (read,) = read_records(RecordsConfig(path=str(path), **settings))  # type: ignore[arg-type]
    assert (read.texts, read.question, read.answers) == (texts, "Where does Nora live?", ("Lisbon",))


@pytest.mark.parametrize("write", [_lines, _table])
@pytest.mark.parametrize(
    ("given", "answer"), [(3.0, "3"), (1e3, "1000"), (2.5, "2.5"), (-4.0, "-4"), (1e300, "1e+300")]
)
def test_a_whole_number_is_a_text_without_a_point(
    tmp_path: Path, write: Any, given: float, answer: str
) -> None:
    path = write(tmp_path, [{"texts": "A text.", "question": "How many?", "answer": given}])
    (record,) = read_records(RecordsConfig(path=str(path)))
    assert record.answers == (answer,)


def test_where_the_texts_do_not_tell_it_is_right_to_say_so(tmp_path: Path) -> None:
    unknown = [{**record, "answerable": False} for record in RECORDS[:9]]
    environment = _environment(_lines(tmp_path, [*unknown, RECORDS[9]]))
    assert environment.system_prompt.endswith('answer "Not mentioned".')
    assert "Not mentioned" not in _environment(_lines(tmp_path, RECORDS)).system_prompt
    task = next(task for task in environment.tasks("train", 0, 0) if not task.payload["answers"])
    for said, score in (("This is not mentioned.", 1.0), ("town 3", 0.0), ("", 0.0)):
        session = environment.start(task)
        session.act(said)
        outcome = session.outcome()
        assert (outcome.reward, outcome.answers[0].gold) == (score, ("Not mentioned",))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = _lines(tmp_path, RECORDS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_records(RecordsConfig(path=str(path)))) == len(RECORDS)


@pytest.mark.parametrize("write", [_lines, _table])
@pytest.mark.parametrize("answer", [float("nan"), [1.5, float("nan")], float("inf")])
def test_an_answer_that_is_no_number_is_refused(tmp_path: Path, write: Any, answer: Any) -> None:
    path = write(tmp_path, [{"texts": ["a"], "question": "q", "answer": answer}])
    with pytest.raises(
        TaskError, match=r"(line 1|row 0): answer(\.1)?: Input should be a text or a number, not"
    ):
        _environment(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"texts": ["a"], "question": "q", "golden_answers": []},
            "line 1: golden_answers: Input should have at least",
        ),
        (
            {"texts": ["a"], "question": "q", "answer": {"x": 1}},
            "line 1: answer: Input should be a text or a number",
        ),
        (
            {"texts": ["a"], "messages": MESSAGES[:3], "answer": "a"},
            "line 1: messages: Input should be a text",
        ),
        ({"texts": ["a"], "question": "q", "answer": None}, "line 1: answer: Field required"),
        ({"texts": ["a"], "question": "q"}, "line 1: answer: Field required"),
        (
            {"texts": [], "question": "q", "answer": "a"},
            "line 1: texts: Input should have at least one entry",
        ),
        ({"texts": ["a", 3], "question": "q", "answer": "a"}, "line 1: texts.1: Input should be a text"),
        (
            {"context": [["Ed Wood", ["He acts.", 3]]], "question": "q", "answer": "a"},
            "line 1: context.0: Input should be a text",
        ),
        ({"texts": " ", "question": "q", "answer": "a"}, "line 1: texts: Input should be a text"),
        ({"texts": ["a"], "question": " ", "answer": "a"}, "line 1: question: Input should be a text"),
        (
            {"texts": ["a"], "question": "q", "answer": True},
            "line 1: answer: Input should be a text or a number",
        ),
        (["a"], "item 0: Input should be an object"),
    ],
)
def test_a_bad_record_is_named(record: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=rf"records\.jsonl: {said}"):
        _environment(_lines(tmp_path, [record]))


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and no more")
    with pytest.raises(TaskError, match=r"broken\.parquet: not a Parquet file"):
        _environment(broken)
    with pytest.raises(TaskError, match=r"missing\.parquet: cannot be read .*environment\.records\.path"):
        _environment(tmp_path / "missing.parquet")
    with pytest.raises(TaskError, match="it has no records"):
        _environment(_lines(tmp_path, []))
    with pytest.raises(TaskError, match="none can be held out"):
        _environment(_lines(tmp_path, RECORDS[:1]))
    without = _table(tmp_path, [{"texts": ["a"], "question": "q"}])
    with pytest.raises(TaskError, match="row 0: answer: Field required"):
        _environment(without)


def test_the_config_builds_it(tmp_path: Path) -> None:
    config = EnvironmentConfig(name="records", records=RecordsConfig(path=str(_lines(tmp_path, RECORDS))))
    assert build_environment(config, EmbedderConfig()).name == "records"
    with pytest.raises(
        ValueError, match=r"records\.path='a\.csv' is not allowed: it must be a \.jsonl or \.parquet file"
    ):
        EnvironmentConfig(name="records", records=RecordsConfig(path="a.csv"))


def test_a_json_list_and_packed_files_give_the_same_tasks(tmp_path: Path) -> None:
    lines = _lines(tmp_path, RECORDS)
    wanted = list(itertools.islice(_environment(lines).tasks("train", 3, 0), 12))
    compact = json.dumps(RECORDS).encode()
    spread = codecs.BOM_UTF8 + json.dumps(RECORDS, indent=1).replace("\n", "\r\n").encode()
    table = _table(tmp_path, RECORDS).read_bytes()
    contents = [compact, spread, table, gzip.compress(lines.read_bytes()), bz2.compress(compact)]
    contents += [lzma.compress(lines.read_bytes())]
    for number, content in enumerate(contents):
        path = tmp_path / f"file-{number}"  # what a file is called says nothing
        path.write_bytes(content)
        assert list(itertools.islice(_environment(path).tasks("train", 3, 0), 12)) == wanted, number


@pytest.mark.timeout(120)
def test_a_pipe_gives_its_lines_once(tmp_path: Path) -> None:
    lines, pipe = _lines(tmp_path, RECORDS), tmp_path / "pipe"
    wanted = list(itertools.islice(_environment(lines).tasks("train", 3, 0), 12))
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(lines.read_bytes(),), daemon=True)
    writer.start()
    assert list(itertools.islice(_environment(pipe).tasks("train", 3, 0), 12)) == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            json.dumps([*RECORDS, {"texts": "Hm.", "answer": "x"}]).encode(),
            "item 10: question: Field required",
        ),
        (b'[{"question": ', "item 0: not JSON"),
        (b"[1, 2]", "item 0: Input should be an object"),
        (
            gzip.compress(b'{"question": "?"}\n' * 99, mtime=0)[:-9],
            "cannot be read (Compressed file ended before",
        ),
        (b"\x1f\x8b\x08\x00garbage", "cannot be read ("),
        (b"PK\x03\x04rest", "it is a zip archive (or a spreadsheet): unpack it"),
        ("[]".encode("utf-16"), "it is UTF-16: save it as UTF-8; environment.records.path wants a file of"),
        (b"[]", "it has no records"),
    ],
)
def test_a_list_and_a_packed_file_that_are_damaged_are_said_in_one_line(
    content: bytes, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "records.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=rf"^{re.escape(str(path))}: {re.escape(said)}") as raised:
        _environment(path)
    assert "\n" not in str(raised.value)
