"""Conversations that a server keeps on disk: saved after every turn, bounded, deleted, whole after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from actors.types import FastWeights
from cluster.assistant.memory_file import SavedAdapter, SavedMemory, load_memory, save_memory
from cluster.assistant.opening import Opening, Parts
from cluster.assistant.saved import FullError, SavedConversations
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
from configs.schema import AssistantConfig
from tests.unit.killed import killed_at
from tests.unit.rollout_fakes import MODULE
from tests.unit.test_assistant import chat, engine, opening, parts, run, with_limits

__all__ = ["chat", "engine", "opening", "parts"]  # fixtures

LOCAL = "http://localhost"


def body(conversation: str) -> dict[str, object]:
    told = [{"role": "user", "content": "Nora lives in Lisbon."}]
    return {"model": "tiny", "messages": told, "conversation": conversation}


async def told(sessions: Sessions, name: str) -> None:
    async with sessions.turn(name, None) as (talk, _):
        await talk.read("Nora lives in Lisbon.")


def test_a_turn_without_a_write_replaces_one_small_file(parts: Parts, tmp_path: Path) -> None:
    async def story() -> None:
        sessions = Sessions(with_limits(parts, save_dir=str(tmp_path)), slots=2)
        await told(sessions, "a")
        adapter, first = tmp_path / "a" / "adapter_model.safetensors", (tmp_path / "a" / "memory.json").stat()
        inode = adapter.stat().st_ino
        await told(sessions, "a")
        assert (
            adapter.stat().st_ino == inode and (tmp_path / "a" / "memory.json").stat().st_ino != first.st_ino
        )
        async with sessions.turn("a", None) as (talk, _):
            await talk.write()
        assert adapter.stat().st_ino != inode, "the write's adapter is saved with its turn"

    run(story())


def test_an_adapter_that_another_process_has_changed_is_written_again(parts: Parts, tmp_path: Path) -> None:
    """As after ``engram memory`` on a conversation that a server has open: the server's stands, whole."""

    async def story() -> None:
        sessions = Sessions(with_limits(parts, save_dir=str(tmp_path)), slots=2)
        await told(sessions, "a")
        save_memory(memory_of(parts.opening, 5, "other"), parts.opening, tmp_path / "a", overwrite=True)
        await told(sessions, "a")
        memory = load_memory(tmp_path / "a", parts.opening)
        assert memory.weights.revision == 0 and "Lisbon" in memory.context

    run(story())


def test_a_full_folder_refuses_new_conversations_and_keeps_the_old_ones(parts: Parts, tmp_path: Path) -> None:
    async def story() -> None:
        limited = with_limits(parts, save_dir=str(tmp_path), max_saved=2)
        sessions = Sessions(limited, slots=2)
        for name in ("a", "b", "a"):
            await told(sessions, name)
        with pytest.raises(FullError, match=r"c: 2 conversations are saved \(assistant\.max_saved=2\)"):
            await told(sessions, "c")
        async with sessions.turn(None, None):  # it is never saved
            pass
        assert await sessions.forget("b") and {path.name for path in tmp_path.iterdir()} == {"a"}
        await told(sessions, "c")
        small = Sessions(with_limits(parts, save_dir=str(tmp_path), max_saved_mib=1e-4), slots=2)
        with pytest.raises(FullError, match=r"MiB are saved \(assistant\.max_saved_mib=0\.0001\)"):
            await told(small, "d")
        await told(small, "a")

    run(story())


def test_delete_deletes_what_killed_saves_left_too(parts: Parts, tmp_path: Path) -> None:
    async def story() -> None:
        sessions = Sessions(with_limits(parts, save_dir=str(tmp_path)), slots=2)
        await told(sessions, "a")
        for leftover in (".a.partial", ".a.old"):
            (tmp_path / leftover).mkdir()
            (tmp_path / leftover / "memory.json").write_text("Lisbon")
        assert await sessions.forget("a") and list(tmp_path.iterdir()) == []
        assert not await sessions.forget("a")

    run(story())


def test_a_turn_that_the_disk_refuses_is_answered_counted_and_saved_later(
    parts: Parts, tmp_path: Path
) -> None:
    limited = with_limits(parts, save_dir=str(tmp_path / "saved"), idle_s=0.001)
    (tmp_path / "saved").write_text("a file where the folder should be")
    sessions = Sessions(limited, 2)
    with TestClient(build_app(limited, sessions, ""), base_url=LOCAL) as client:
        assert client.post("/v1/chat/completions", json=body(conversation="a")).status_code == 200
        assert client.get("/health").json()["unsaved"] == 1
        assert client.post("/v1/chat/completions", json=body(conversation="b")).status_code == 200
        (tmp_path / "saved").unlink()
        assert client.post("/v1/chat/completions", json=body(conversation="b")).status_code == 200
        held = client.get("/v1/conversations").json()["data"]
        assert {"id": "a", "in_memory": False} in held, "it was idle, and could be put away"
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"a", "b"}


def test_a_full_folder_is_an_error_of_its_own(parts: Parts, tmp_path: Path) -> None:
    limited = with_limits(parts, save_dir=str(tmp_path), max_saved=1)
    with TestClient(build_app(limited, Sessions(limited, 2), ""), base_url=LOCAL) as client:
        assert client.post("/v1/chat/completions", json=body(conversation="a")).status_code == 200
        refused = client.post("/v1/chat/completions", json=body(conversation="b"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "no_room_for_conversations")


def test_a_kill_during_a_save_or_a_deletion_tears_no_conversation(
    parts: Parts, opening: Opening, tmp_path: Path
) -> None:
    """Turns come with and without new weights. Whatever was killed, the next server finds a whole turn."""
    root = tmp_path / "saved"
    store = SavedConversations(AssistantConfig(save_dir=str(root)))
    folder = root / "nora"
    first, second = memory_of(opening, 1, "one"), memory_of(opening, 2, "two")

    def turns(earlier: SavedAdapter) -> None:
        save_memory(first, opening, folder, overwrite=True, earlier=earlier)
        save_memory(second, opening, folder, overwrite=True)

    at = 1
    while True:
        shutil.rmtree(root, ignore_errors=True)
        earlier = save_memory(first, opening, folder, overwrite=True)
        if not killed_at(root, lambda earlier=earlier: turns(earlier), at):
            break
        found = store.find("nora")
        assert found is not None, f"lost at operation {at}"
        memory = load_memory(found, opening)
        assert memory.context in ("one", "two")
        assert memory.weights.revision == (1 if memory.context == "one" else 2)
        save_memory(second, opening, folder, overwrite=True)  # nothing that was left stands in its way
        at += 1
    assert at > 8, "the killer saw the save's operations"
    at = 1
    while killed_at(root, lambda: [store.delete("nora"), None][1], at):
        assert store.find("nora") is None or load_memory(folder, opening).context == "two"
        at += 1
    assert at > 2 and store.find("nora") is None


def memory_of(opening: Opening, revision: int, context: str) -> SavedMemory:
    matrix = np.full((4, 2), revision, dtype=np.float32)
    weights = FastWeights(opening.basis.id, revision, {MODULE: matrix})
    return SavedMemory(weights, "s", (1, 2, 3), (), None, context)
