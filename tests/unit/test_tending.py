"""A memory that a person tends: listed, corrected, partly forgotten, written onto another model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from actors.episodes.rollout import WriteBatcher
from actors.text.chat_template import ChatFormat
from actors.types import Flashcard, WriteRequest
from cluster.assistant import tending_command
from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import AssistantError, Opening, Parts
from cluster.assistant.serve import build_app
from cluster.assistant.sessions import Sessions
from cluster.assistant.tending import Edits, card_lines, edit_memory
from cluster.cli import main
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import ModelConfig
from tests.unit.rollout_fakes import ScriptedWriter
from tests.unit.test_assistant import SETTINGS, Engine, basis, run, with_limits

HOME = Flashcard("Where does Nora live?", "Lisbon")
CITY = Flashcard("In which city does Nora live?", "Lisbon")
PET = Flashcard("What pet does Nora have?", "a parrot")
RIDDLE = Flashcard("What is Nora's riddle?", "the sea")


@pytest.fixture(scope="module")
def opening(tiny_model_path: Path) -> Opening:
    config = load_config(None, [f"model.name={tiny_model_path}", *SETTINGS, "write.max_flashcards=2"])
    model = resolve_model(ModelConfig(name=str(tiny_model_path)))
    return Opening("tiny", config, model, basis(), "Be brief.")


@pytest.fixture(scope="module")
def chat(tiny_model_path: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))


class Bench:
    """Parts on a scripted engine whose writer keeps what it was asked; ``answer`` is the writes' outcome."""

    def __init__(self, opening: Opening, chat: ChatFormat, cards: Sequence[Flashcard]) -> None:
        self.requests: list[WriteRequest] = []
        self.answer = "accepted"
        self.engine = Engine(chat, cards)
        writer = WriteBatcher(ScriptedWriter(self._outcome))
        self.parts = Parts(opening, self.engine, writer, chat, None, lambda: "")
        self.chat = chat

    def _outcome(self, request: WriteRequest) -> str:
        self.requests.append(request)
        return self.answer

    def taught(self) -> list[str]:
        """Of each write: what its examples ask and answer."""
        return [
            " ".join(self.chat.decode((*e.prompt_ids, *e.answer_ids)) for e in request.examples)
            for request in self.requests
        ]

    async def written(self, folder: Path) -> Conversation:
        """A conversation that has written its cards and was saved in ``folder``."""
        talk = Conversation(self.parts, "nora", "Be brief.")
        await talk.read("Nora lives in Lisbon.")
        await talk.write()
        talk.save(folder, overwrite=False)
        self.requests.clear()
        return talk


@pytest.fixture
def bench(opening: Opening, chat: ChatFormat) -> Bench:
    return Bench(opening, chat, (HOME, PET))


# --- corrections and forgetting -------------------------------------------------------------------------


def test_forgetting_writes_the_other_cards_anew_from_nothing_and_keeps_no_word_of_it(
    bench: Bench, tmp_path: Path
) -> None:
    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        assert "Lisbon" in (tmp_path / "nora" / "memory.json").read_text()
        rebuilt = await talk.tend(Edits(forget=(1,)))
        assert talk.cards == (PET,) and rebuilt.losses == (0.001,)
        (taught,) = bench.taught()
        assert "parrot" in taught and "Lisbon" not in taught
        assert bench.requests[0].weights.revision == 0, "no trace of the forgotten card is built on"
        assert len(bench.engine.installed) == 1, "the old Delta and the one in the making are released"
        talk.save(tmp_path / "nora", overwrite=True)
        assert "Lisbon" not in (tmp_path / "nora" / "memory.json").read_text()
        other = Conversation(bench.parts, "other", "s")
        await other.load(tmp_path / "nora")
        assert other.cards == (PET,)

    run(story())


def test_a_correction_keeps_the_question_and_the_order(bench: Bench, tmp_path: Path) -> None:
    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        await talk.tend(Edits(correct={1: "in  Porto\n"}))
        assert talk.cards == (Flashcard(HOME.question, "in Porto"), PET)
        (taught,) = bench.taught()
        assert "in Porto" in taught and "Lisbon" not in taught

    run(story())


def test_forgetting_all_leaves_no_delta(bench: Bench, tmp_path: Path) -> None:
    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        rebuilt = await talk.tend(Edits(forget=(1, 2)))
        assert (talk.revision, talk.cards, bench.engine.installed, bench.requests) == (0, (), {}, [])
        assert rebuilt.lines() == ["no flashcards remain: Delta is 0"]

    run(story())


def test_what_still_tells_a_forgotten_answer_is_named(
    opening: Opening, chat: ChatFormat, tmp_path: Path
) -> None:
    async def story() -> None:
        talk = await Bench(opening, chat, (HOME, CITY)).written(tmp_path / "nora")
        await talk.read("Nora is back in Lisbon.")
        first, second = (await talk.tend(Edits(forget=(1,)))).remaining
        assert first == "note: 'Lisbon' is still the answer of flashcard 1"
        assert second.startswith("note: 'Lisbon' also stands in what is not written yet")
        assert talk.unwritten_tokens > 0

    run(story())


def test_more_cards_than_an_extraction_may_have_are_several_writes_and_an_old_answer_is_none_of_them(
    opening: Opening, chat: ChatFormat, tmp_path: Path
) -> None:
    async def story() -> None:
        bench = Bench(opening, chat, (HOME, PET))
        talk = await bench.written(tmp_path / "nora")
        moved = Bench(opening, chat, (Flashcard(HOME.question, "Oslo"), RIDDLE))
        later = Conversation(moved.parts, "later", "Be brief.")
        await later.load(tmp_path / "nora")
        await later.read("She has moved.")
        await later.write()
        assert [card.answer for card in later.cards] == ["a parrot", "Oslo", "the sea"]
        moved.requests.clear()
        rebuilt = await later.tend(Edits(correct={3: "a riddle"}))
        assert ["parrot" in text for text in moved.taught()] == [True, False]
        assert "Lisbon" not in " ".join(moved.taught()) and later.revision == 2
        assert rebuilt.lines()[:3] == [
            f"2 of 3 flashcards learnt (a loss of at most 0.01 nats a token) in {rebuilt.seconds:.1f} s",
            "1 did not take, by their loss:",
            "    1.50  What is Nora's riddle? -> a riddle",
        ]
        await talk.close()

    run(story())


@pytest.mark.parametrize("broken", ["rolled_back", "install", "score"])
def test_a_rebuild_that_fails_changes_nothing(
    bench: Bench, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(ids: Sequence[int], adapter: object) -> list[float]:
        raise AssistantError("no score")

    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        before = (talk.cards, talk.revision, talk.context_tokens, list(bench.engine.installed))
        if broken == "rolled_back":
            bench.answer = broken
        elif broken == "install":
            bench.engine.broken = broken
        else:
            monkeypatch.setattr(bench.engine, "score", refuse)
        with pytest.raises((AssistantError, RuntimeError)):
            await talk.tend(Edits(forget=(1,)))
        bench.engine.broken = ""
        assert before == (talk.cards, talk.revision, talk.context_tokens, list(bench.engine.installed))
        assert (await talk.say("Who?", 8)).text == "under 1"

    run(story())


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (Edits(forget=(3,)), "there is no flashcard 3: there are 1 to 2"),
        (Edits(correct={0: "x"}), "there is no flashcard 0: there are 1 to 2"),
        (Edits((1,), {1: "x"}), "flashcard 1 is to be forgotten and corrected: choose one"),
        (Edits(correct={1: " \x1b "}), "flashcard 1: an answer has 1 to 2000 characters"),
        (Edits(correct={2: "a parrot"}), "nothing changes: the flashcards say that already"),
    ],
)
def test_an_edit_that_cannot_be_made_is_one_line(
    bench: Bench, tmp_path: Path, edits: Edits, expected: str
) -> None:
    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        with pytest.raises(AssistantError, match="^" + expected.replace("(", r"\(") + "$"):
            await talk.tend(edits)
        assert bench.requests == []

    run(story())


def changed(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "memory.json").read_text())
    (folder / "memory.json").write_text(json.dumps({**content, **changes}))


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def on_fakes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``engram memory`` with a scripted engine; returns the models that were opened."""
    opened: list[str] = []

    def prepare(model: str, config: Path | None, settings: Sequence[str], allow_code: bool) -> Opening:
        opened.append(model)
        return (
            bench.parts.opening
            if model == "tiny"
            else replace(
                bench.parts.opening, title=model, model=replace(bench.parts.opening.model, fingerprint="f")
            )
        )

    @contextmanager
    def fake_parts(opening: Opening, slots: int) -> Iterator[Parts]:
        yield replace(bench.parts, opening=opening, writer=WriteBatcher(ScriptedWriter(bench._outcome)))

    monkeypatch.setattr(tending_command, "prepare_opening", prepare)
    monkeypatch.setattr(tending_command, "parts_of", fake_parts)
    return opened


@pytest.fixture
def nora(bench: Bench, tmp_path: Path) -> Path:
    run(saved(bench, tmp_path / "nora"))
    return tmp_path / "nora"


async def saved(bench: Bench, folder: Path) -> None:
    await bench.written(folder)


def test_the_command_lists_corrects_forgets_and_writes_onto_another_model(
    nora: Path, on_fakes: list[str], bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> list[str]:
        assert main(["memory", str(nora), *words]) == 0
        return capsys.readouterr().out.splitlines()

    listed = [f"{nora}: 2 flashcards in revision 1", "model: tiny"]
    cards = ["1  Where does Nora live? -> Lisbon", "2  What pet does Nora have? -> a parrot"]
    assert said() == [*listed, *cards] and on_fakes == []
    lines = said("--correct", "1=in Porto = Oporto", "--forget", "2")
    assert lines[0] == "loading tiny ..." and lines[1].startswith("1 of 1 flashcard learnt ")
    assert lines[2] == f"{nora}: saved"
    assert said()[2:] == ["1  Where does Nora live? -> in Porto = Oporto"]
    lines = said("--model", "newer")
    assert lines[1] == (
        "it is a memory of the model 'tiny', whose weights are not those of 'newer': "
        "its flashcards were written anew"
    )
    assert lines[2].startswith("1 of 1 flashcard learnt ")
    assert on_fakes == ["tiny", "newer"] and said()[1] == "model: newer"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--forget", "7"], "there is no flashcard 7: there are 1 to 2"),
        (["--correct", "1=a", "--correct", "1=b"], "--correct 1=b: flashcard 1 is corrected twice"),
        (["--correct", "Porto"], "--correct Porto: must be N=ANSWER, e.g. --correct '3=in Porto'"),
        (["--model", "tiny"], "nothing changes: it says that already, on this model"),
        (["write.epochs=3"], "settings are for --correct, --forget and --model"),
    ],
)
def test_a_mistake_is_one_line_and_the_folder_stays(
    nora: Path, on_fakes: list[str], words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (nora / "memory.json").read_bytes()
    assert main(["memory", str(nora), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert (nora / "memory.json").read_bytes() == before


def cut(folder: Path) -> None:
    text = (folder / "memory.json").read_text()
    (folder / "memory.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "memory.json cannot be used: Invalid JSON"),
        (lambda folder: changed(folder, writes=[{}]), "writes.0.revision: Field required"),
        (lambda folder: (folder / "memory.json").unlink(), "has no memory.json, so nobody knows"),
        (lambda folder: (folder / "memory.json").write_bytes(b"\xff"), "memory.json cannot be used"),
    ],
)
def test_a_damaged_folder_is_one_line(
    nora: Path, damage: Callable[[Path], None], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(nora)
    for words in ([], ["--forget", "1"]):
        assert main(["memory", str(nora), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and expected in error
    assert main(["memory", str(nora / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_long_list_is_read_at_80_columns_and_without_escape_sequences() -> None:
    long = Flashcard("Which of the " + "very " * 20 + "long words?", "\x1b[2J" + "none " * 30)
    lines = card_lines([HOME] * 9 + [long], 80)
    assert lines[0] == " 1  Where does Nora live? -> Lisbon" and max(map(len, lines)) <= 80
    assert all(line.startswith("    ") for line in lines[10:]) and "\x1b" not in "".join(lines)


def test_a_route_can_tend_a_conversation(bench: Bench, tmp_path: Path) -> None:
    async def story() -> None:
        talk = await bench.written(tmp_path / "nora")
        for wrong in (None, {}, {"forget": [True]}, {"correct": {"x": "y"}}, {"forget": [1], "all": True}):
            with pytest.raises(AssistantError, match="the body must be like"):
                await edit_memory(talk, wrong)
        with pytest.raises(AssistantError, match="a flashcard is corrected twice"):
            await edit_memory(talk, {"correct": {"1": "Porto", "01": "Oslo"}})
        assert await edit_memory(talk, {"forget": [1], "correct": {"2": "a cat"}}) == {
            "revision": 1,
            "unwritten_tokens": 0,
            "flashcards": [{"number": 1, "question": PET.question, "answer": "a cat"}],
            "losses": [0.001],
            "learnt": 1,
            "notes": [],
        }

    run(story())


def test_a_server_lists_and_tends_a_memory_and_saves_it(nora: Path, bench: Bench) -> None:
    kept = with_limits(bench.parts, save_dir=str(nora.parent))
    with TestClient(build_app(kept, Sessions(kept, 2), ""), base_url="http://localhost") as client:
        url = "/v1/conversations/nora/memory"
        assert [card["answer"] for card in client.get(url).json()["flashcards"]] == ["Lisbon", "a parrot"]
        tended = client.patch(url, json={"forget": [1]}).json()
        assert (tended["id"], tended["learnt"], tended["revision"]) == ("nora", 1, 1)
        assert "Lisbon" not in (nora / "memory.json").read_text()
        assert client.patch(url, json={"forget": [9]}).json()["error"]["message"].startswith("there is no")
        assert client.patch(url, json={"forget": [9]}).status_code == 400
        for verb in (client.get, lambda url: client.patch(url, json={"forget": [1]})):
            assert verb("/v1/conversations/omar/memory").status_code == 404
