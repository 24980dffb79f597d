"""A memory that another model made: ``engram memory --model`` replaces it, all else leaves it as it is."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from actors.episodes.rollout import WriteBatcher
from actors.text.chat_template import ChatFormat
from cluster.assistant import chat as chat_module
from cluster.assistant import opening as opening_module
from cluster.assistant import tending_command
from cluster.assistant.conversation import Conversation
from cluster.assistant.memory_file import ForeignMemory, load_memory
from cluster.assistant.opening import AssistantError, Opening, Parts
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
from cluster.cli import main
from tests.unit.rollout_fakes import ScriptedWriter
from tests.unit.test_assistant import basis, run, with_limits
from tests.unit.test_tending import HOME, PET, RIDDLE, Bench, changed, chat, opening
from tests.unit.test_tending_chat import terminal_of

__all__ = ["chat", "opening"]  # fixtures


def newer(opening: Opening) -> Opening:
    return replace(opening, title="newer", basis=basis(1.0), model=replace(opening.model, fingerprint="f"))


def on_another_basis(opening: Opening) -> Opening:
    return replace(opening, basis=basis(1.0))


def trained_on(opening: Opening) -> Opening:
    """The same run, with a newer checkpoint."""
    return replace(opening, model=replace(opening.model, fingerprint="f"))


FOREIGN = pytest.mark.parametrize(
    ("other", "reason"),
    [
        (newer, "it is a memory of the model 'tiny', whose weights are not those of 'newer'; "),
        (trained_on, "it is a memory of earlier weights of the model 'tiny'; "),
        (on_another_basis, "it is on the basis "),
    ],
)


@pytest.fixture
def nora(opening: Opening, chat: ChatFormat, tmp_path: Path) -> Path:
    """A memory with two cards and a few words that are not written yet."""

    async def story() -> None:
        talk = await Bench(opening, chat, (HOME, RIDDLE)).written(tmp_path / "nora")
        await talk.read("She likes figs.")
        talk.save(tmp_path / "nora", overwrite=True)

    run(story())
    return tmp_path / "nora"


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """What is in a folder, and by which inodes: a folder that was saved again has others."""
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def is_refusal(text: str, folder: Path, reason: str) -> bool:
    command = f"`engram memory {folder} --model "
    return f"{folder}: {reason}" in text and command in text and "\n" not in text.strip()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, opening: Opening, chat: ChatFormat) -> Callable[..., list[str]]:
    """Lets the commands open one opening, on a scripted engine; returns the engines that were started."""

    def open_as(found: Opening) -> list[str]:
        started: list[str] = []

        def prepare(model: str, config: Path | None, settings: Sequence[str], allow_code: bool) -> Opening:
            return found

        @contextmanager
        def parts_of(wanted: Opening, slots: int) -> Iterator[Parts]:
            started.append(wanted.title)
            parts = Bench(wanted, chat, (PET,)).parts
            yield replace(parts, writer=WriteBatcher(ScriptedWriter()))

        for module in (opening_module, tending_command):
            monkeypatch.setattr(module, "prepare_opening", prepare)
        for module in (chat_module, tending_command):
            monkeypatch.setattr(module, "parts_of", parts_of)
        return started

    return open_as


@FOREIGN
def test_chat_refuses_it_before_an_engine_starts_and_names_the_cure(
    nora: Path,
    opening: Opening,
    opened: Callable[[Opening], list[str]],
    other: Callable[[Opening], Opening],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started, before = opened(other(opening)), files(nora)
    assert main(["chat", "any", "--memory", str(nora)]) == 2
    assert is_refusal(capsys.readouterr().err, nora, reason)
    assert started == [] and files(nora) == before


@FOREIGN
def test_load_in_a_chat_refuses_it_and_the_conversation_stays(
    nora: Path, opening: Opening, chat: ChatFormat, other: Callable[[Opening], Opening], reason: str
) -> None:
    bench = Bench(other(opening), chat, (PET,))
    with asyncio.Runner() as runner:
        terminal, out = terminal_of(bench, runner)
        terminal.converse(io.StringIO(f"/tell Nora has a parrot.\n/write\n/load {nora}\n/cards\n"))
    said = " ".join(out.getvalue().replace("\n", " ").split())
    assert terminal.failures == 1 and reason.strip() in said and bench.requests[1:] == []
    assert said.endswith("1 What pet does Nora have? -> a parrot")


@FOREIGN
def test_a_server_refuses_it_and_leaves_it_as_it_is(
    nora: Path, opening: Opening, chat: ChatFormat, other: Callable[[Opening], Opening], reason: str
) -> None:
    parts = with_limits(Bench(other(opening), chat, ()).parts, save_dir=str(nora.parent))
    before = files(nora)
    body = {
        "model": parts.opening.title,
        "messages": [{"role": "user", "content": "?"}],
        "conversation": "nora",
    }
    with TestClient(build_app(parts, Sessions(parts, 2), ""), base_url="http://localhost") as client:
        url = "/v1/conversations/nora"
        refused = [
            client.post("/v1/chat/completions", json=body),
            client.get(url),
            client.get(f"{url}/memory"),
            client.patch(f"{url}/memory", json={"forget": [1]}),
        ]
        assert client.post("/v1/chat/completions", json=body | {"conversation": "omar"}).status_code == 200
    assert [answer.status_code for answer in refused] == [409] * 4
    assert {answer.json()["error"]["code"] for answer in refused} == {"foreign_memory"}
    assert all(is_refusal(answer.json()["error"]["message"], nora, reason) for answer in refused)
    assert files(nora) == before


def test_memory_without_model_refuses_a_model_that_was_trained_on(
    nora: Path,
    opening: Opening,
    opened: Callable[[Opening], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    started, before = opened(trained_on(opening)), files(nora)
    assert main(["memory", str(nora), "--forget", "1"]) == 2
    assert is_refusal(capsys.readouterr().err, nora, "it is a memory of earlier weights of the model 'tiny'")
    assert started == [] and files(nora) == before


def test_memory_with_model_writes_it_anew_and_says_what_did_not_take(
    nora: Path,
    opening: Opening,
    opened: Callable[[Opening], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    was = load_memory(nora, opening)
    opened(newer(opening))
    assert main(["memory", str(nora), "--model", "newer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("whose weights are not those of 'newer': its flashcards were written anew")
    assert lines[2].startswith("1 of 2 flashcards learnt ")
    assert lines[3:] == [
        "1 did not take, by their loss:",
        "    1.50  What is Nora's riddle? -> the sea",
        f"{nora}: saved",
    ]
    now = load_memory(nora, newer(opening))
    assert (now.cards, now.context_ids, now.weights.revision) == (was.cards, was.context_ids, 1)
    with pytest.raises(ForeignMemory):
        load_memory(nora, opening)


@pytest.mark.parametrize(
    ("changes", "other", "kept"),
    [
        ({"context": "in other tokens"}, newer, False),  # another tokenizer's
        ({"context": "in other tokens"}, on_another_basis, True),  # the weights know what the tokens mean
        ({"context": ""}, on_another_basis, True),  # saved by an older version, which kept no text
    ],
)
def test_what_is_not_written_yet_is_left_out_and_counted_for_another_tokenizer_alone(
    nora: Path,
    opening: Opening,
    opened: Callable[[Opening], list[str]],
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    other: Callable[[Opening], Opening],
    kept: bool,
) -> None:
    ids = load_memory(nora, opening).context_ids
    changed(nora, **changes)
    opened(other(opening))
    assert main(["memory", str(nora), "--model", "m"]) == 0
    said = f"{len(ids)} tokens of context are another tokenizer's: left out"
    assert (said in capsys.readouterr().out) == (not kept)
    assert load_memory(nora, other(opening)).context_ids == (ids if kept else ())


@pytest.mark.parametrize("other", [newer, on_another_basis])
def test_what_does_not_fit_the_window_is_refused_by_the_name_of_its_setting_and_not_dropped(
    nora: Path,
    opening: Opening,
    chat: ChatFormat,
    opened: Callable[[Opening], list[str]],
    capsys: pytest.CaptureFixture[str],
    other: Callable[[Opening], Opening],
) -> None:
    ids = load_memory(nora, opening).context_ids * 200
    changed(nora, context_ids=ids, context=chat.decode(ids))
    before = files(nora)
    opened(other(opening))
    assert main(["memory", str(nora), "--model", "m"]) == 2
    fits = f"has a text of {len(ids)} tokens, which does not fit into engine.max_model_tokens=1500"
    assert f"{nora}: {fits}; set a larger one" in capsys.readouterr().err
    assert files(nora) == before


# --- what is no memory's place ----------------------------------------------------------------------------


def test_load_never_replaces_the_memory_that_a_chat_lives_in(
    nora: Path, opening: Opening, chat: ChatFormat, tmp_path: Path
) -> None:
    home, bench = tmp_path / "home", Bench(opening, chat, (PET,))
    with asyncio.Runner() as runner:
        terminal, out = terminal_of(bench, runner)
        terminal.live_in(home)
        terminal.converse(io.StringIO(f"/tell Nora has a parrot.\n/write\n/load {nora}\n"))
    said = " ".join(out.getvalue().replace("\n", " ").split())
    assert terminal.failures == 1 and "/load would replace the memory that lives in" in said
    assert load_memory(home, opening).cards == (PET,)


def test_a_file_of_that_name_is_refused_and_stays(
    opening: Opening,
    opened: Callable[[Opening], list[str]],
    chat: ChatFormat,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started, notes = opened(opening), tmp_path / "notes"
    notes.write_text("mine")
    assert main(["chat", "any", "--memory", str(notes)]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: {notes}: cannot be written (it is a file, and no folder)"
    )
    talk = Conversation(Bench(opening, chat, ()).parts, "a", "s")
    for overwrite in (True, False):
        with pytest.raises(AssistantError, match="it is a file, and no folder"):
            talk.save(notes, overwrite)
    parts = with_limits(talk._parts, save_dir=str(tmp_path))
    with TestClient(build_app(parts, Sessions(parts, 2), ""), base_url="http://localhost") as client:
        assert client.delete("/v1/conversations/notes").status_code == 500
    assert notes.read_text() == "mine" and started == []
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_the_working_directory_is_shown_and_never_replaced(
    nora: Path,
    opening: Opening,
    opened: Callable[[Opening], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started, before = opened(opening), files(nora)
    monkeypatch.chdir(nora)
    assert main(["memory", "."]) == 0
    assert capsys.readouterr().out.startswith(".: 2 flashcards in revision 1")
    for words in (
        ["memory", ".", "--forget", "1"],
        ["chat", "any", "--memory", "."],
        ["memory", "..", "--forget", "1"],
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: .") and error.count("\n") == 1
        assert "it is the working directory" in error or words[1] == ".."
    assert started == [] and files(nora) == before


def test_a_link_to_a_folder_stays_a_link(
    nora: Path, opening: Opening, chat: ChatFormat, tmp_path: Path
) -> None:
    link = tmp_path / "ada"
    link.symlink_to(nora)
    bench = Bench(opening, chat, (PET,))
    with asyncio.Runner() as runner:
        terminal, _ = terminal_of(bench, runner)
        terminal.live_in(link)
        terminal.converse(io.StringIO("/forget 1\n/forget 1\n"))
    assert terminal.failures == 0 and link.is_symlink() and load_memory(nora, opening).cards == ()
    assert {path.name for path in tmp_path.iterdir()} == {"ada", "nora"}
