"""Conversations without an engine.

What a failed turn leaves behind; how memories are kept apart, saved and refused; the terminal. The endpoint
is in test_serve.py.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.episodes.rollout import WriteBatcher
from actors.fast_weights.basis import make_basis
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.text.chat_template import ChatFormat
from actors.text.flashcards import render_flashcards
from actors.types import AdapterKey, FastWeights, Flashcard, Generation, Probe, Sampling
from cluster.assistant.conversation import Conversation
from cluster.assistant.opening import AssistantError, Opening, Parts
from cluster.assistant.sessions import BusyError, Sessions
from configs.load import load_config
from configs.models import resolve_model
from configs.schema import AssistantConfig, ModelConfig
from tests.unit.rollout_fakes import MODULE, ScriptedPolicy, ScriptedWriter, sampled

CARD = Flashcard("Who lives in Lisbon?", "Nora")
SETTINGS = ("memory.max_context_tokens=60", "engine.max_model_tokens=1500", "sampling.max_answer_tokens=8")


@pytest.fixture(scope="module")
def opening(tiny_model_path: Path) -> Opening:
    config = load_config(None, [f"model.name={tiny_model_path}", *SETTINGS])
    return Opening(
        "tiny", config, resolve_model(ModelConfig(name=str(tiny_model_path))), basis(), "Be brief."
    )


@pytest.fixture(scope="module")
def chat(tiny_model_path: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat(AutoTokenizer.from_pretrained(tiny_model_path))


def basis(first: float = 0.0) -> Basis:
    return make_basis("random", {MODULE: torch.arange(6.0).reshape(2, 3) + first}, {MODULE: 4}, False)


class Engine(ScriptedPolicy):
    """Answers with the revision that it acts under; ``broken`` makes the next install or answer fail."""

    def __init__(self, chat: ChatFormat, cards: Sequence[Flashcard] = (CARD,)) -> None:
        self.broken = ""
        self._decode = chat.decode

        def script(prompt: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
            if self.broken == sampling.kind:
                raise EngineError("the engine is ill")
            text = render_flashcards(cards) if sampling.kind == "extract" else f"under {adapter.revision}"
            return sampled(chat.reply(text))

        super().__init__(script)

    async def score(self, token_ids: Sequence[int], adapter: AdapterKey) -> list[float]:
        """All is known, except what has "riddle" in it."""
        assert adapter.revision == 0 or adapter.name in self.installed
        return [-1.5 if "riddle" in self._decode(token_ids) else -0.001] * (len(token_ids) - 1)

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        await super().install(key, weights, probe)
        if self.broken == "install":
            self.installed.pop(key.name)
            self.released.append(key.name)
            raise EngineError("no slot")


@pytest.fixture
def engine(chat: ChatFormat) -> Engine:
    return Engine(chat)


@pytest.fixture
def parts(opening: Opening, engine: Engine, chat: ChatFormat) -> Parts:
    return parts_with(opening, engine, chat)


def parts_with(opening: Opening, engine: Engine, chat: ChatFormat) -> Parts:
    return Parts(opening, engine, WriteBatcher(ScriptedWriter()), chat, None, lambda: "")


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(story)


def talk_of(parts: Parts) -> Conversation:
    return Conversation(parts, "a", parts.opening.system_prompt)


# --- the conversation -----------------------------------------------------------------------------------


def test_it_answers_from_its_context_and_writes_when_that_is_full(parts: Parts, engine: Engine) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        first = await talk.say("Nora lives in Lisbon, and she likes it.", 8)
        assert (first.text, first.writes) == ("under 0", ())
        assert not talk.will_write("Where does she live? Say it in one word, please.")
        while not talk.will_write("And who is that?"):
            await talk.say("Go on.", 8)
        reply = await talk.say("And who is that?", 8)
        assert [record.outcome for record in reply.writes] == ["accepted"]
        assert (reply.revision, reply.text) == (1, "under 1")
        assert talk.cards == (CARD,) and talk.writes[0].examples == ()
        talk.delta = False
        assert (await talk.say("Again?", 8)).text == "under 0" and talk.revision == 1
        # Delta is off for answers alone: a write continues from the last revision.
        record = await talk.write()
        assert record is not None and record.revision == 2
        assert [call[2].revision for call in engine.calls if call[1].kind == "extract"] == [0, 1]
        await talk.close()
        assert engine.installed == {}

    run(story())


def test_a_text_longer_than_the_context_is_written_in_pieces_and_its_end_is_answered(
    parts: Parts, chat: ChatFormat, engine: Engine
) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        text = " ".join(f"Person {number} lives in house {number}." for number in range(40))
        reply = await talk.say(text, 8)
        assert len(reply.writes) > 2 and reply.text == f"under {len(reply.writes)}"
        assert "house 39" in chat.decode(engine.calls[-1][0])

    run(story())


@pytest.mark.parametrize("broken", ["act", "extract", "install"])
def test_a_turn_that_fails_never_was_and_the_next_one_succeeds(
    parts: Parts, engine: Engine, broken: str
) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        await talk.say("Nora lives in Lisbon.", 8)
        await talk.write()
        await talk.read("She likes figs, and she has a brother.")
        before = (talk.context_tokens, talk.revision, talk.writes)
        engine.broken = broken
        with pytest.raises(EngineError):
            await (talk.say("And?", 8) if broken == "act" else talk.write())
        assert (talk.context_tokens, talk.revision, talk.writes) == before
        engine.broken = ""
        assert (await talk.say("And?", 8)).text == "under 1"
        record = await talk.write()
        # Its adapter has a new name: the fake engine refuses the name of the broken write.
        assert record is not None and record.revision == 2

    run(story())


def test_a_question_from_an_empty_context_leaves_no_trace(
    parts: Parts, chat: ChatFormat, engine: Engine
) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        await talk.say("Nora lives in Lisbon.", 8)
        before = talk.context_tokens
        await talk.ask("Who?", 8)
        assert talk.context_tokens == before and "Lisbon" not in chat.decode(engine.calls[-1][0])

    run(story())


# --- on disk --------------------------------------------------------------------------------------------


def test_a_saved_memory_goes_on_where_it_was(
    parts: Parts, opening: Opening, chat: ChatFormat, tmp_path: Path
) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        await talk.say("Nora lives in Lisbon.", 8)
        await talk.write()
        await talk.read("She likes figs.")
        talk.save(tmp_path / "nora", overwrite=False)
        with pytest.raises(AssistantError, match="already holds something"):
            talk.save(tmp_path / "nora", overwrite=False)
        other_engine = Engine(chat)
        other = talk_of(parts_with(opening, other_engine, chat))
        await other.load(tmp_path / "nora")
        saved = (talk.revision, talk.context_tokens, talk.cards)
        assert (other.revision, other.context_tokens, other.cards) == saved
        (weights,) = other_engine.installed.values()
        assert weights.b[MODULE].tolist() == [[1.0, 1.0]] * 4
        assert (await other.say("And?", 8)).text == "under 1"
        await other.reset()
        assert (other.revision, other.cards, other.unwritten_tokens, other_engine.installed) == (0, (), 0, {})

    run(story())


def test_an_empty_write_has_no_losses_and_can_be_saved(
    opening: Opening, chat: ChatFormat, tmp_path: Path
) -> None:
    async def story() -> None:
        talk = talk_of(parts_with(opening, Engine(chat, cards=()), chat))
        await talk.read("Nora lives in Lisbon.")
        record = await talk.write()
        assert record is not None and math.isnan(record.loss_before)
        talk.save(tmp_path / "nothing", overwrite=False)
        assert (
            json.loads((tmp_path / "nothing" / "memory.json").read_text())["writes"][0]["loss_before"] is None
        )
        await talk.load(tmp_path / "nothing")
        (loaded,) = talk.writes
        assert (loaded.outcome, loaded.reason) == ("empty", record.reason) and math.isnan(loaded.loss_after)

    run(story())


def _without_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _changed(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "memory.json").read_text())
        (folder / "memory.json").write_text(json.dumps({**content, **changes}))

    return change


def _cut(folder: Path) -> None:
    text = (folder / "memory.json").read_text()
    (folder / "memory.json").write_text(text[: len(text) // 2])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_without_adapter, "cannot be read as an adapter"),
        (_cut, "memory.json cannot be used: Invalid JSON"),
        (_changed(format="other"), "memory.json cannot be used: format: Input should be 'engram-memory-1'"),
        (_changed(revision=7), "is of revision 7, the adapter of 1"),
        (_changed(context_ids=[1, 10**6]), "context_ids: expected token ids, 0 to 49151"),
        (_changed(context_ids=[1] * 5000), "has a text of 5000 tokens, which does not fit into engine.max"),
        (
            _changed(probe=[{"token_ids": [1], "before": [0.0], "after": [0.0]}]),
            "probe: expected a finite log-prob",
        ),
        (_changed(writes=[{}]), "writes.0.revision: Field required"),
    ],
)
def test_a_memory_that_cannot_be_loaded_is_one_line_and_changes_nothing(
    parts: Parts, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        await talk.say("Nora lives in Lisbon.", 8)
        await talk.write()
        talk.save(tmp_path / "m", overwrite=False)
        damage(tmp_path / "m")
        with pytest.raises(AssistantError) as caught:
            await talk.load(tmp_path / "m")
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        assert (await talk.say("Who?", 8)).text == "under 1"

    run(story())


def test_an_adapter_of_another_basis_is_refused_without_memory_json_too(
    parts: Parts, opening: Opening, tmp_path: Path
) -> None:
    async def story() -> None:
        talk = talk_of(parts)
        await talk.read("Nora lives in Lisbon.")
        await talk.write()
        talk.save(tmp_path / "m", overwrite=False)
        (tmp_path / "m" / "memory.json").unlink()
        await talk.load(tmp_path / "m")
        assert talk.revision == 1 and talk.cards == ()
        other = talk_of(replace(parts, opening=replace(opening, basis=basis(first=1.0))))
        with pytest.raises(AssistantError, match="is not that of basis"):
            await other.load(tmp_path / "m")

    run(story())


# --- many of them ---------------------------------------------------------------------------------------


def with_limits(parts: Parts, **limits: Any) -> Parts:
    config = replace(parts.opening.config, assistant=AssistantConfig(**limits))
    return replace(parts, opening=replace(parts.opening, config=config))


def test_the_longest_idle_is_put_away_saved_and_found_again(parts: Parts, tmp_path: Path) -> None:
    async def story() -> None:
        sessions = Sessions(with_limits(parts, max_conversations=2, save_dir=str(tmp_path)), slots=2)
        for name in ("a", "b", "a", "c"):
            async with sessions.turn(name, None) as (talk, _):
                await talk.read(f"This is {name}.")
        assert sessions.look("b") is None and sessions.look("a") is not None
        assert (tmp_path / "b" / "memory.json").exists()
        async with sessions.turn("b", None) as (talk, new):
            assert not new and talk.unwritten_tokens > 0
        assert sessions.look("c") is not None and sessions.look("a") is None
        assert await sessions.close() == [] and {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}

    run(story())


def test_a_turn_is_never_interrupted_to_make_room_and_a_failed_first_turn_leaves_nothing(
    parts: Parts,
) -> None:
    async def story() -> None:
        sessions = Sessions(with_limits(parts, max_conversations=1), slots=2)
        async with sessions.turn("a", None):
            with pytest.raises(BusyError, match="all 1 conversations"):
                async with sessions.turn("b", None):
                    pass
            with pytest.raises(BusyError, match="in the middle of a turn"):
                await sessions.forget("a")
        async with sessions.turn("b", None):
            # "a" is idle now. Without a folder to save it in, it is dropped.
            assert sessions.look("a") is None
        with pytest.raises(RuntimeError, match="broke"):
            async with sessions.turn("c", None):
                raise RuntimeError("broke")
        assert len(sessions) == 0
        async with sessions.turn(None, None) as (_, new):
            assert new
        assert len(sessions) == 0

    run(story())


def test_any_request_puts_idle_conversations_away(parts: Parts) -> None:
    async def story() -> None:
        sessions = Sessions(with_limits(parts, idle_s=0.01), slots=2)
        async with sessions.turn("a", None):
            pass
        await asyncio.sleep(0.02)
        async with sessions.turn("b", None):
            assert sessions.look("a") is None

    run(story())
