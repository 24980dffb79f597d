"""A memory that is tended in the terminal, and a chat that lives in a folder."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cluster.assistant.chat import Terminal
from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import AssistantError
from cluster.common.display import Display
from tests.unit.test_assistant import run
from tests.unit.test_tending import Bench, bench, chat, nora, opening

__all__ = ["bench", "chat", "nora", "opening"]  # fixtures


def terminal_of(bench: Bench, runner: asyncio.Runner) -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    talk = Conversation(bench.parts, "chat", bench.parts.opening.system_prompt)
    return Terminal(talk, bench.parts.opening, runner, Display(Console(file=out, width=80))), out


def test_a_chat_that_lives_in_a_folder_is_there_after_every_turn(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "nora"

    def on_disk() -> tuple[int, int]:
        content = json.loads((folder / "memory.json").read_text())
        return content["revision"], len(content["context_ids"])

    seen: list[tuple[int, int]] = []

    def lines() -> Iterator[str]:
        for line in ("Nora lives in Lisbon.", "/write", "/forget 1", "/correct 1 a cat", "/cards", "/new"):
            yield line
            seen.append(on_disk())

    class Source(io.StringIO):
        def __iter__(self) -> Iterator[str]:
            return lines()

    with asyncio.Runner() as runner:
        terminal, out = terminal_of(bench, runner)
        terminal.live_in(folder)
        assert on_disk() == (0, 0)
        terminal.converse(Source())
        text = out.getvalue()
        assert terminal.failures == 0, text
        assert seen[0][0] == 0 and seen[0][1] > 5
        assert seen[1:] == [(1, 0), (1, 0), (1, 0), (1, 0), (0, 0)]
        assert "  ~ 1 of 1 flashcard learnt " in text and "  ~ 1  What pet does Nora have? -> a cat" in text
        terminal, out = terminal_of(bench, runner)
        terminal.live_in(folder)
        assert f"loaded {folder}: 0 flashcards, revision 0" in out.getvalue()


def test_a_wrong_number_in_the_terminal_is_one_line(bench: Bench, tmp_path: Path) -> None:
    with asyncio.Runner() as runner:
        terminal, out = terminal_of(bench, runner)
        terminal.converse(io.StringIO("/forget\n/forget one\n/correct 1\n/forget 1\n"))
    assert terminal.failures == 4 and "error: there is no flashcard 1: there are none" in out.getvalue()


def test_a_folder_with_other_files_is_never_replaced(bench: Bench, tmp_path: Path) -> None:
    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        (tmp_path / "nora" / "thesis.txt").write_text("mine")
        with pytest.raises(AssistantError, match=r"holds 'thesis\.txt', which is no part of a memory"):
            talk.save(tmp_path / "nora", overwrite=True)
        assert (tmp_path / "nora" / "thesis.txt").read_text() == "mine"

    run(story())
