"""Files are whole or absent; JSON that is read has the expected shape or is refused in one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs import files
from configs.files import FileError, Measured, dump_json, new_folder, parse_json, read_json, write_text


@dataclass(frozen=True)
class Point:
    name: str
    place: tuple[int, ...]
    weight: float = 1.0


def test_a_value_comes_back_as_it_was(tmp_path: Path) -> None:
    path, point = tmp_path / "point.json", Point("a", (1, 2), 0.5)
    write_text(path, dump_json(point))
    assert read_json(path, Point) == point


def test_numbers_that_are_not_finite_become_null() -> None:
    assert json.loads(dump_json({"loss": math.nan, "best": math.inf, "f1": 0.5})) == {
        "loss": None,
        "best": None,
        "f1": 0.5,
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"name": "a", "place": [1, "2"]}', "place.1: Input should be a valid integer"),
        ('{"name": "a"}', "place: Field required"),
        ('{"name": 3, "place": 4}', "(and 1 more)"),
        ("[]", "Input should be an object"),
        ("{", "Invalid JSON"),
        (b"\xff\xfe{}", "Invalid JSON"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, content: str | bytes, said: str) -> None:
    path = tmp_path / "point.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError) as caught:
        read_json(path, Point)
    assert str(caught.value).startswith(f"{path} cannot be used: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", Point)
    with pytest.raises(FileError, match="valid integer"):
        parse_json('{"name": "a", "place": [true]}', Point)


@pytest.mark.parametrize("breaks", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    path = tmp_path / "state.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if breaks == "fsync" else (Path, "replace", full)))
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_folder_takes_its_name_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    with new_folder(tmp_path / "made") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "made").exists()
    assert (tmp_path / "made" / "a").read_text() == "1" and [path.name for path in synced[1:2]] == ["a"]

    with pytest.raises(RuntimeError), new_folder(tmp_path / "failed"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@dataclass(frozen=True)
class Scores:
    values: Mapping[str, Measured]
    mean: Measured


def test_nan_is_null_in_the_file_and_nan_again_when_it_is_read(tmp_path: Path) -> None:
    text = dump_json(Scores({"f1": 0.5, "em": math.nan}, math.inf))
    assert json.loads(text, parse_constant=pytest.fail) == {"values": {"f1": 0.5, "em": None}, "mean": None}
    scores = parse_json(text, Scores)
    assert scores.values["f1"] == 0.5
    assert math.isnan(scores.values["em"]) and math.isnan(scores.mean)
    with pytest.raises(FileError, match=r"mean: Input should be a valid number"):
        parse_json('{"values": {}, "mean": "0.5"}', Scores)
