"""The assistant in the terminal: scripts of commands, what is shown, mistakes before an engine starts."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from actors.episodes.rollout import WriteBatcher
from actors.text.chat_template import ChatFormat
from actors.types import WriteRequest
from cluster.assistant.chat import Terminal, _shown
from cluster.assistant.conversation import Conversation, Reply
from cluster.assistant.opening import Opening, Parts
from cluster.cli import main
from cluster.common.display import Display
from tests.unit.rollout_fakes import ScriptedWriter
from tests.unit.test_assistant import Engine, chat, engine, opening, parts, parts_with, run, talk_of

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures


def transcript(parts: Parts, *lines: str) -> tuple[str, int]:
    out = io.StringIO()
    with asyncio.Runner() as runner:
        terminal = Terminal(talk_of(parts), parts.opening, runner, Display(Console(file=out, width=200)))
        terminal.converse(io.StringIO("\n".join(lines)))
    return out.getvalue(), terminal.failures


def test_a_script_talks_writes_compares_saves_and_loads(parts: Parts, tmp_path: Path) -> None:
    folder = tmp_path / "nora"
    text, failures = transcript(
        parts,
        "Nora lives in Lisbon.",
        "/tell She likes figs.",
        "/write",
        "/cards",
        "/compare Who?",
        "/delta off",
        "Who?",
        f"/save {folder}",
        "/new",
        f"/load {folder}",
        "/quit",
        "x",
    )
    assert failures == 0, text
    shown = [
        "agent> under 0",
        "  ~ wrote 1 flashcard into revision 1: loss 2.00 -> 1.00 nats a token in 5 steps, 0.0 s; "
        "the context is empty now",
        "  ~   Who lives in Lisbon? -> Nora",
        "  ~ without Delta: under 0",
        "  ~ with Delta   : under 1",
        f"  ~ loaded {folder}: 1 flashcard, revision 1",
    ]
    places = [text.find(line) for line in shown]
    assert -1 not in places and places == sorted(places), text
    assert text.rstrip().endswith("you> /quit")


def test_what_cannot_be_done_is_one_line_and_the_conversation_goes_on(
    parts: Parts, engine: Engine, tmp_path: Path
) -> None:
    text, failures = transcript(
        parts, "/foo", "/write", "/delta perhaps", f"/load {tmp_path}/none", "/read none.txt", "/save", "Who?"
    )
    assert failures == 6 and text.count("error: ") == 6 and "Traceback" not in text
    assert text.rstrip().endswith("agent> under 0")


def test_an_answer_that_was_cut_says_how_to_get_longer_ones() -> None:
    cut = Reply("Once upon", "length", revision=0, prompt_tokens=5, reply_tokens=8, writes=())
    assert _shown(cut, 8) == (
        "Once upon (cut off at 8 tokens; for longer answers start with a larger "
        "sampling.max_answer_tokens, e.g. sampling.max_answer_tokens=256)"
    )
    assert "engine.max_model_tokens" in _shown(cut, 64)
    assert _shown(replace(cut, finish_reason="stop"), 8) == "Once upon"


def test_a_model_that_writes_no_flashcards_is_shown_as_such(opening: Opening, chat: ChatFormat) -> None:
    text, failures = transcript(
        parts_with(opening, Engine(chat, cards=()), chat), "Nora lives in Lisbon.", "/write"
    )
    shown = "nothing written: the JSON array is empty; asked for flashcards the agent said: []"
    assert failures == 0 and shown in text


def test_a_write_request_reaches_the_writer_with_the_conversations_own_weights(
    opening: Opening, engine: Engine, chat: ChatFormat
) -> None:
    seen: list[WriteRequest] = []
    writer = ScriptedWriter(lambda request: seen.append(request) or "accepted")

    async def story() -> None:
        parts = Parts(opening, engine, WriteBatcher(writer), chat, None, lambda: "")
        nora, omar = Conversation(parts, "nora", "s"), Conversation(parts, "omar", "s")
        for talk in (nora, nora, omar):
            await talk.read("Nora lives in Lisbon.")
            await talk.write()
        assert [request.weights.revision for request in seen] == [0, 1, 0]
        assert len(engine.installed) == 2

    run(story())


@pytest.mark.parametrize("command", ["chat", "serve", "memory", "export"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"  engram {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chat", "./nowhere"], "model './nowhere' is no folder here"),
        (["chat", "write.epochs=0"], "write.epochs=0 writes nothing"),
        (["chat", "memory.policy=full"], "a conversation needs memory.policy=parametric"),
        (["chat", "model.name=x"], "name the model without it, e.g. chat x"),
        (["serve", "writ.epochs=1"], "writ.epochs' is no setting; did you mean write.epochs"),
        (
            ["export", "configs", "somewhere"],
            "configs: is no run, checkpoint, saved conversation or episode's record",
        ),
    ],
)
def test_a_mistake_is_one_line_before_an_engine_starts(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
