"""The file of an episode's record: a wrong value is refused by its field; ``engram inspect`` shows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import cli
from cluster.inspection.page import render
from cluster.inspection.record import FOLDER, EpisodeRecord, RecordError, load, save
from tests.unit.test_docs import COMMANDS
from tests.unit.test_inspection import ORIGIN, chat, play, record, run_dir, well_formed

__all__ = ["chat", "play", "record", "run_dir"]  # fixtures


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (
            ("segments", 0, "passages", 1, "end"),
            10**6,
            "segments.0.passages.1: [{start}, 1000000) is outside",
        ),
        (("segments", 0, "passages", 1, "start"), -1, "segments.0.passages.1: [-1, "),
        (("writes", 1, "after"), 9, "writes.1.after: there is no segment 9"),
        (("writes", 1, "log", "steps"), "4", "writes.1.log.steps: Input should be a valid integer"),
        (("writes", 1, "log", "loss_after"), "x", "writes.1.log.loss_after: Input should be a valid number"),
        (("outcome", "reward"), None, "outcome.reward: Input should be a valid number"),
        (("stop_reason",), "x", "stop_reason: Input should be 'done' or 'max_turns'"),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(
    whole: Path, tmp_path: Path, path: tuple[str | int, ...], value: object, says: str
) -> None:
    content = json.loads(whole.read_text())
    parent = content
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    start = content["segments"][0]["passages"][1]["start"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(RecordError) as refused:
        load(tmp_path / "x.json")
    assert str(refused.value).startswith(f"{tmp_path / 'x.json'}: {says.format(start=start)}")


@pytest.fixture(scope="module")
def whole(record: EpisodeRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(record, tmp_path_factory.mktemp("whole"))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_record_with_one_wrong_value_is_refused_by_its_field_or_harmless(
    whole: Path, data: st.DataObject
) -> None:
    content = json.loads(whole.read_text())
    parent, name = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(node := parent[name], dict | list) and node:
        parent, name = (
            node,
            data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node)))),
        )
    parent[name] = data.draw(st.sampled_from([None, -7, 2.5, "", "x", [], {}, True, 10**9]))
    path = whole.with_name("changed.json")
    path.write_text(json.dumps(content))
    try:
        changed = load(path)
    except RecordError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        well_formed(render(changed, ()))


def test_the_commands_of_the_readme_show_episodes(
    run_dir: Path, record: EpisodeRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(replace(record, episode_id="train-6.1", origin=replace(ORIGIN, step=14)), run_dir / FOLDER)
    monkeypatch.chdir(run_dir)
    named = [words for doc, words in COMMANDS if doc == "README.md" and words[0] == "inspect"]
    commands = [words for words in named if "--compare" not in words]  # this one loads a model
    assert len(commands) >= 4
    places = {"runs/quickstart-...": str(run_dir), "recall-eval-0-0": record.task_id}
    for words in commands:
        assert cli.main([places.get(word, word) for word in words]) == 0, words
    well_formed((run_dir / "e.html").read_text())
