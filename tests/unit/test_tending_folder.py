"""``engram memory`` as the README gives it, and for all conversations of a server at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import main
from tests.unit.test_assistant import run
from tests.unit.test_docs import COMMANDS
from tests.unit.test_tending import Bench, bench, changed, chat, cut, on_fakes, opening, saved

__all__ = ["bench", "chat", "on_fakes", "opening"]  # fixtures


def test_the_commands_of_the_readme_do_what_they_say(
    on_fakes: list[str], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "ada", tmp_path / "conversations" / "omar"):
        run(saved(bench, folder))
        writes = json.loads((folder / "memory.json").read_text())["writes"]
        cards = [{"question": f"Question {n}?", "answer": f"answer {n}"} for n in range(1, 7)]
        changed(folder, writes=[{**writes[0], "flashcards": cards}])
    monkeypatch.chdir(tmp_path)
    commands = [words for doc, words in COMMANDS if doc == "README.md" and words[0] == "memory"]
    assert len(commands) >= 5
    for words in commands:
        assert main(words) == 0, words
    for folder in (tmp_path / "ada", tmp_path / "conversations" / "omar"):
        assert json.loads((folder / "memory.json").read_text())["model"] == on_fakes[-1] != "tiny"


def test_one_command_moves_all_conversations_of_a_server_and_the_same_again_moves_the_rest(
    on_fakes: list[str], bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "saved"
    for name in ("ada", "nora", "omar", "zoe"):
        run(saved(bench, root / name))
    run(saved(bench, root / "long"))
    changed(root / "long", context_ids=[1] * 2000)  # does not fit into the engine's window
    cut(root / "omar")
    (root / "zoe").rename(root / ".zoe.old")  # a server was killed between two renames

    def said(*words: str, status: int = 0) -> list[str]:
        assert main(["memory", str(root), *words]) == status
        return capsys.readouterr().out.splitlines()

    def models() -> list[str]:
        folders = [root / name for name in ("ada", "nora", "zoe", "long")]
        return [json.loads((folder / "memory.json").read_text())["model"] for folder in folders]

    listed = said()
    assert listed[:2] == [f"{root}: 5 saved conversations", "ada: 2 flashcards in revision 1, of tiny"]
    assert [line.startswith("error: ") for line in listed[2:]] == [False, False, True, False]
    assert listed[-1] == "zoe: 2 flashcards in revision 1, of tiny"  # where its save was cut off
    lines = said("--model", "newer", status=1)
    assert models() == ["newer", "newer", "newer", "tiny"] and on_fakes == ["newer"]
    assert lines[1] == "loading newer ..." and lines.count("loading newer ...") == 1
    reports = [line.partition(" flashcards learnt")[0] for line in lines if "flashcards learnt" in line]
    assert reports == [f"{name}: 2 of 2" for name in ("ada", "nora", "zoe")]
    faults = [line for line in lines if line.startswith("error: ")]
    assert "omar" in faults[0] and "memory.json cannot be used" in faults[0]
    assert "long: has a text of 2000 tokens" in faults[1]
    assert lines[-2:] == [
        f"{root}: 3 of 5 conversations moved to newer",
        "2 failed, and stay as they were",
    ]
    changed(root / "long", context_ids=[])
    again = said("--model", "newer", status=1)
    assert models() == ["newer"] * 4 and again[-2:] == [
        "3 were on this model already",
        "1 failed, and stay as they were",
    ]
    assert main(["memory", str(root), "--forget", "1"]) == 2
    assert f"holds 5 conversations; name one of them, e.g. {root}/ada" in capsys.readouterr().err


def test_a_save_that_was_cut_off_is_found_where_it_is_the_only_one(
    on_fakes: list[str], bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "saved"
    run(saved(bench, root / "zoe"))
    (root / "zoe").rename(root / ".zoe.old")
    assert main(["memory", str(root)]) == 0
    assert "zoe: 2 flashcards" in capsys.readouterr().out
    assert main(["memory", str(root), "--model", "newer"]) == 0
    assert json.loads((root / "zoe" / "memory.json").read_text())["model"] == "newer"
