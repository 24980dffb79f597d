"""Data sets of the hub where a setting names a file, from folders that the package datasets wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.environments.build import build_environment
from actors.environments.conversation_files import read_longmemeval
from actors.environments.hub_data import local_copy
from actors.environments.records import read_records
from actors.environments.rubric import read_rubric_items
from actors.environments.search import read_corpus, read_questions
from actors.protocols import TaskError
from configs.load import load_config
from configs.schema import EmbedderConfig, RecordsConfig

datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")

DATA = Path("tests/data")
RECORDS = [
    {"context": [f"Nora has moved to {place}."], "question": "Where is Nora?", "answers": {"text": [place]}}
    for place in ("Lisbon", "Oslo", "Cairo")
]


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    local_copy.cache_clear()


def _saved(folder: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return f"hub:{folder}"


def test_records_come_from_a_data_set_and_its_splits(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(RECORDS[:2]), "test": datasets.Dataset.from_list(RECORDS)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    records = read_records(RecordsConfig(path=f"hub:{tmp_path / 'saved'}@test"))
    assert [record.answers for record in records] == [("Lisbon",), ("Oslo",), ("Cairo",)]
    assert records[0].texts == ("Nora has moved to Lisbon.",)
    assert len(read_records(RecordsConfig(path=f"hub:{tmp_path / 'saved'}"))) == 2
    with pytest.raises(TaskError, match=r"@dev: has no split 'dev': write @ and one of train, test"):
        read_records(RecordsConfig(path=f"hub:{tmp_path / 'saved'}@dev"))
    environment = ["environment.name=records", f"environment.records.path=hub:{tmp_path / 'saved'}@test"]
    built = build_environment(load_config(None, environment).environment, EmbedderConfig())
    assert len(list(built.tasks("eval", 0, 0))) == 1


def test_a_folder_of_parquet_files_as_the_hub_has_them(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(RECORDS).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    path = f"hub:{tmp_path / 'repository'}"
    assert len(read_records(RecordsConfig(path=path))) == 3
    (copy,) = (tmp_path / "cache" / "datasets").iterdir()
    before = copy.stat().st_mtime_ns
    local_copy.cache_clear()
    assert len(read_records(RecordsConfig(path=path))) == 3
    assert [file.stat().st_mtime_ns for file in copy.parent.iterdir()] == [before]  # written once


def test_every_reader_of_files_reads_data_sets(tmp_path: Path) -> None:
    file = DATA / "longmemeval_sample.json"
    items = json.loads(file.read_text(encoding="utf-8"))
    for item in items:
        item["answer"] = str(item["answer"])  # a column has one type
    path = _saved(tmp_path / "longmemeval", items)
    talks, expected = read_longmemeval(path), read_longmemeval(str(file))
    assert [talk.questions for talk in talks] == [talk.questions for talk in expected]
    assert [list(talk.sessions()) for talk in talks] == [list(talk.sessions()) for talk in expected]
    lines = (DATA / "rubric_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rubric = _saved(tmp_path / "rubric", [json.loads(line) for line in lines if line.strip()])
    assert read_rubric_items(rubric) == read_rubric_items(str(DATA / "rubric_sample.jsonl"))
    questions = _saved(tmp_path / "questions", [{"question": "Who?", "answer": "Nora"}])
    assert [question.answers for question in read_questions(questions)] == [("Nora",)]
    corpus = _saved(tmp_path / "corpus", [{"title": "Nora", "text": "Nora bakes."}])
    assert [passage.title for passage in read_corpus(corpus)] == ["Nora"]


def test_sound_and_pictures_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bytes_of = {"bytes": b"no picture", "path": None}
    rows = datasets.Dataset.from_list(
        [{**record, "photo": bytes_of, "voice": bytes_of} for record in RECORDS]
    )
    rows = rows.cast_column("photo", datasets.Image()).cast_column("voice", datasets.Audio())
    rows.save_to_disk(str(tmp_path / "saved"))
    path = f"hub:{tmp_path / 'saved'}"
    records = read_records(RecordsConfig(path=path))
    assert [record.answers for record in records] == [("Lisbon",), ("Oslo",), ("Cairo",)]
    assert f"{path}: columns of sound or pictures are left out: photo, voice" in caplog.text


def test_a_row_that_cannot_be_read_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _saved(tmp_path / "saved", RECORDS)
    real = datasets.load_from_disk

    def broken(folder: str) -> Any:
        def fails(batch: Any) -> Any:  # runs where a row is read
            raise OSError("the shard is\n damaged")

        rows = real(folder)
        rows.set_transform(fails)
        return rows

    monkeypatch.setattr(datasets, "load_from_disk", broken)
    with pytest.raises(TaskError) as caught:
        read_records(RecordsConfig(path=path))
    assert str(caught.value) == f"{path}: datasets cannot read row 1 (the shard is damaged)"
    assert list((tmp_path / "cache" / "datasets").iterdir()) == []


def test_why_a_file_of_a_data_set_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.json").write_text('{"question": "Who?"}\n{"question": ', encoding="utf-8")
    with pytest.raises(TaskError, match=r"while generating the dataset: .*JSON") as caught:
        read_records(RecordsConfig(path=f"hub:{tmp_path / 'mine'}"))
    assert "\n" not in str(caught.value)


def test_a_harness_takes_its_tasks_from_a_data_set(tmp_path: Path) -> None:
    settings = [
        "environment.name=harness",
        "environment.harness.command=[true]",
        f"environment.harness.tasks={_saved(tmp_path / 'saved', RECORDS)}",
    ]
    built = build_environment(load_config(None, settings).environment, EmbedderConfig())
    assert len(list(built.tasks("eval", 0, 0))) == 1


def test_a_bad_row_is_named_as_a_line(tmp_path: Path) -> None:
    path = _saved(tmp_path / "saved", [*RECORDS, RECORDS[0] | {"question": " "}])
    with pytest.raises(TaskError, match=rf"^{path}: line 4: question: Input should be a text that is not"):
        read_records(RecordsConfig(path=path))


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("", f"{tmp_path / 'empty'}", f"{tmp_path / 'nowhere'}"):
        with pytest.raises(TaskError, match=r"^hub:.*hub:FOLDER$") as caught:
            read_records(RecordsConfig(path=f"hub:{name}"))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"needs the package datasets, .* install the extra hub"):
        read_records(RecordsConfig(path="hub:org/name"))
