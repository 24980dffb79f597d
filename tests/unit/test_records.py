"""Tasks from users' records: both file formats, what a session shows and scores, messages for bad files."""

from __future__ import annotations

import itertools
import json
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
    session = RecordsEnvironment.start(None, Task("t", "records", payload, 0))  # type: ignore[arg-type]  # it keeps nothing of the environment
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


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"texts": ["a"], "question": "q"}, "line 1: answer: Field required"),
        (
            {"texts": [], "question": "q", "answer": "a"},
            "line 1: texts: Input should have at least one entry",
        ),
        ({"texts": ["a", 3], "question": "q", "answer": "a"}, "line 1: texts.1: Input should be a text"),
        ({"texts": " ", "question": "q", "answer": "a"}, "line 1: texts: Input should be a text"),
        ({"texts": ["a"], "question": " ", "answer": "a"}, "line 1: question: Input should be a text"),
        (
            {"texts": ["a"], "question": "q", "answer": True},
            "line 1: answer: Input should be a text or a number",
        ),
        (["a"], "line 1: Input should be an object"),
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
