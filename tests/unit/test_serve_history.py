"""A history that comes again: known, edited, or another one; and the conversations that are saved."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import Parts
from cluster.assistant.sessions import Sessions
from tests.unit.test_serve import (
    CARD,
    CHAT,
    Engine,
    body,
    chat,
    engine,
    limited,
    opening,
    parts,
    said,
    serving,
)

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_known_history_without_a_name_is_not_read_again(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:
        engine.text = "First."
        first = said(client, body("old " * 180))["engram"]
        engine.text = "Second."
        second = said(client, body("old " * 180, says("First."), "And?"))["engram"]
        assert first["new"] and first["writes"] and not second["new"] and second["writes"] == []
        assert second["revision"] == first["revision"]
        other = said(client, body("old " * 180, says("Other."), "And?"))["engram"]
        assert other["new"] and other["writes"]
        assert client.get("/health").json()["conversations"] == 0
        assert client.get("/v1/conversations").json()["data"] == []


def test_an_edited_history_goes_back_with_the_delta_of_that_time(parts: Parts, engine: Engine) -> None:
    with serving(parts) as client:

        def turn(*messages: Any) -> dict[str, Any]:
            return said(client, body(*messages, conversation="a"))["engram"]

        engine.text = "One."
        turn("Nora lives in Lisbon.")
        engine.text = "Two."
        written = turn("Nora lives in Lisbon.", says("One."), "old " * 180)
        assert written["revision"] > 0 and len(engine.installed) == 1
        engine.text = "Three."
        edited = turn("Nora lives in Lisbon.", says("One."), "Where?")
        assert edited["revision"] == 0 and engine.installed == {}
        assert "Lisbon" in engine.asked and "old" not in engine.asked
        again = turn("Nora lives in Lisbon.", says("One."), "Where?")
        assert again["revision"] == 0 and engine.asked.count("Where?") == 1
        turn("And?")  # a client that sends its new turns alone
        assert engine.asked.count("Where?") == 1 and "Three." in engine.asked
        assert client.get("/v1/conversations").json()["data"] == [{"id": "a", "in_memory": True}]
        foreign = client.post(CHAT, json=body("Hello.", says("Hi."), "And?", conversation="a"))
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (409, "history_conflict")


def test_an_edited_history_is_refused_where_that_is_wanted(parts: Parts) -> None:
    with serving(limited(parts, edited_history="refuse")) as client:
        said(client, body("Nora lives in Lisbon.", conversation="a"))
        said(client, body("Nora lives in Lisbon.", says("under 0"), "Where?", conversation="a"))
        again = client.post(
            CHAT, json=body("Nora lives in Lisbon.", says("under 0"), "Why?", conversation="a")
        )
    assert again.status_code == 409 and "assistant.edited_history=return" in again.json()["error"]["message"]


def test_where_edits_are_refused_a_request_that_names_nothing_begins_anew(
    parts: Parts, engine: Engine
) -> None:
    with serving(limited(parts, edited_history="refuse")) as client:
        for text, messages, new in (
            ("Lisbon.", ["Where?"], True),
            ("High up.", ["Where?", says("Lisbon."), "Where there?"], False),
            ("By the river.", ["Where?", says("Lisbon."), "Where there?"], True),  # the newest turn again
            ("Why?", ["Where?", says("Lisbon."), "Thanks."], True),  # another branch
            ("Long.", ["Where?", says("Lisbon."), "Where there?", says("High up."), "How long?"], False),
        ):
            engine.text = text
            assert said(client, body(*messages))["engram"]["new"] is new, messages


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_who_only_looks_saves_nothing_and_waits_no_longer_than_others(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        await asyncio.sleep(60)

    kept = limited(parts, save_dir=str(tmp_path), request_timeout_s=0.5)
    with serving(kept) as client:
        said(client, body("old " * 180, conversation="a"))
    before = files_of(tmp_path)
    for route in ("/v1/conversations/a", "/v1/conversations/a/memory"):
        with serving(kept) as client:
            assert client.get(route).json()["id"] == "a"
            assert client.get(route.replace("/a", "/b")).status_code == 404
        assert files_of(tmp_path) == before
        with monkeypatch.context() as patched, serving(kept) as client:
            patched.setattr(Conversation, "load", never)
            assert client.get(route).json()["error"]["code"] == "timeout"


def test_looking_for_a_conversation_does_not_begin_one(parts: Parts, tmp_path: Path) -> None:
    async def story() -> None:
        sessions = Sessions(limited(parts, save_dir=str(tmp_path)), 2)
        async with sessions.turn("a", None, looks_only=True):  # as if it was deleted since it was seen
            pass
        assert sessions.look("a") is None and sessions.names() == {}

    asyncio.run(story())


def test_conversations_are_listed_read_and_deleted_on_the_disk_too(parts: Parts, tmp_path: Path) -> None:
    kept = limited(parts, save_dir=str(tmp_path))
    with serving(kept) as client:
        said(client, body("old " * 180, conversation="a"))
    with serving(kept) as client:
        url = "/v1/conversations"
        assert client.get(url).json()["data"] == [{"id": "a", "in_memory": False}]
        assert client.get(f"{url}/b").status_code == 404
        assert client.get(f"{url}/a").json()["writes"][0]["flashcards"] == [
            {"question": CARD.question, "answer": CARD.answer}
        ]
        # Its lines are forgotten: the history of a client is believed.
        said(client, body("old " * 180, says("under 1"), "And?", conversation="a"))
        assert client.delete(f"{url}/a").json()["deleted"] and not (tmp_path / "a").exists()
        assert client.get(url).json()["data"] == []
