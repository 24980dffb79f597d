"""A user's file of demonstrations: its lines, and its turns beside a teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.environments.records import RecordsEnvironment
from actors.episodes.demonstration import demonstrate, gold_cards
from actors.episodes.written_demonstrations import WrittenDemonstrations
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from cluster.train.demonstrations import Demonstrations, require_sources
from configs.schema import MemoryConfig, RunConfig, WriteConfig
from tests.unit.endpoint_server import Server
from tests.unit.test_demonstration import ENVIRONMENT, TASKS, WINDOW
from tests.unit.test_demonstrations import (
    CARD,
    PLACES,
    _cards,
    _config,
    _demonstrations,
    _file,
    _taught_by,
    _teach,
    config,
    serve,
)

__all__ = ["config", "serve"]  # fixtures


def _written(path: str, **memory: Any) -> WrittenDemonstrations:
    return WrittenDemonstrations(path, MemoryConfig(**memory), WriteConfig(), "Be brief.")


def test_a_line_has_the_form_of_an_episode(tmp_path: Path, chat: ChatFormat) -> None:
    task, memory = TASKS[0], MemoryConfig(max_context_tokens=50)
    first = demonstrate(
        task, ENVIRONMENT, gold_cards(ENVIRONMENT, task, memory), chat, memory, WriteConfig(), WINDOW
    )[0]
    session, asked = task.payload["sessions"][0], task.payload["questions"]
    line = {
        "told": session,
        "cards": [{"instruction": c.question, "output": c.answer} for c in _cards(chat, first)],
        "questions": [{"question": q["question"], "answer": q["answer"]} for q in asked],
        "system_prompt": ENVIRONMENT.system_prompt,
    }
    written = _written(_file(tmp_path, line), max_context_tokens=50)
    segments = written.segments(written.lines[0], chat, WINDOW)
    assert segments[0].token_ids.tolist() == first.token_ids.tolist()
    assert segments[0].action_mask.tolist() == first.action_mask.tolist()
    assert [chat.decode(s.token_ids[s.action_mask]) for s in segments[1:]] == [q["answer"] for q in asked]


def test_texts_and_messages_are_told_as_turns(tmp_path: Path, chat: ChatFormat) -> None:
    messages = [
        {"role": "user", "content": "I live in Lisbon."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": [{"type": "text", "text": "And I bake."}]},
    ]
    asked = [{"question": "What do I do?", "answer": "bake"}]
    line = {"messages": messages, "cards": [CARD], "questions": asked}
    path = _file(tmp_path, line, "", {"told": "Rain.", "cards": []})
    written = _written(path, question_blind=True)
    cards, answer = written.segments(written.lines[0], chat, WINDOW)
    *seen, request, taught = [(turn.role, turn.text) for turn in chat.turns(cards.token_ids.tolist())]
    expected = [
        ("system", "Be brief."),
        ("user", "I live in Lisbon."),
        ("assistant", "Noted."),
        ("user", "And I bake."),
    ]
    assert seen == expected and "They should help with" not in request[1]
    assert taught == ("assistant", '[{"instruction": "Where does Nora live?", "output": "Lisbon"}]')
    turns = [(turn.role, turn.text) for turn in chat.turns(answer.token_ids.tolist())]
    assert turns == [*expected, ("user", "What do I do?"), ("assistant", "bake")]
    assert [line.place for line in written.lines] == ["line 1", "line 3"]
    (nothing,) = written.segments(written.lines[1], chat, WINDOW)
    assert chat.decode(nothing.token_ids[nothing.action_mask]) == "[]"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"cards": []}, "told: Field required"),
        ({"told": "Nora."}, "cards: Field required"),
        ({"told": " ", "cards": []}, "told: Input should be a text, a list of texts, or chat messages"),
        ({"told": [], "cards": []}, "told: Input should have at least one text"),
        ({"told": [{"role": "tool", "content": "x"}], "cards": []}, "told: A message's role is 'tool'"),
        ({"told": "Nora.", "cards": [{"question": "Who?"}]}, "cards.0.answer: Field required"),
        ({"told": "Nora.", "cards": [], "question": []}, "question: Extra inputs are not permitted"),
        ({"told": "Lisbon.", "cards": [CARD, CARD]}, "cards.1: its question stands twice"),
        ({"told": "Nora.", "cards": [CARD | {"answer": "x" * 2001}]}, "cards.0: .*2000 characters a side"),
        ({"told": "Nora.", "cards": [CARD]}, r"cards.0: its answer 'Lisbon' has a word .*memory\.grounded"),
        ('{"told": "Nora."', "EOF while parsing an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, problem: str) -> None:
    path = _file(tmp_path, {"told": "Nora.", "cards": []}, line)
    with pytest.raises(TaskError, match=rf"shown\.jsonl: line 2: .*{problem}") as caught:
        _written(path, grounded=True)
    assert "\n" not in str(caught.value)


def test_a_line_without_room_is_named_before_a_run_starts(
    tmp_path: Path, config: RunConfig, chat: ChatFormat
) -> None:
    environment = RecordsEnvironment(config.environment.records)
    for line, problem in (
        ({"told": "Nora. " * 9000, "cards": [CARD]}, r"engine\.max_model_tokens\): split it into lines"),
        ({"told": "Nora.", "cards": [CARD | {"answer": "one two " * 20}]}, r"memory\.max_extract_tokens"),
    ):
        path = _file(tmp_path, {"told": "Nora.", "cards": []}, line)
        with pytest.raises(TaskError, match=rf"shown\.jsonl: line 2: .*{problem}"):
            settings = [f"warm_start.demonstrations={path}", "memory.max_extract_tokens=32"]
            require_sources(_config(tmp_path, *settings), environment, chat)
    with pytest.raises(TaskError, match=r"shown\.jsonl: it has no demonstrations"):
        _written(_file(tmp_path, ""))
    with pytest.raises(TaskError, match=r"nowhere\.jsonl: cannot be read"):
        _written(str(tmp_path / "nowhere.jsonl"))


def test_a_file_and_a_teacher_take_turns_and_every_line_is_seen(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path, chat: ChatFormat
) -> None:
    lines = [{"told": f"Omar has {count} cats.", "cards": [CARD | {"answer": count}]} for count in range(4)]
    path = _file(tmp_path, *lines)
    alone = _demonstrations(_config(tmp_path, f"warm_start.demonstrations={path}"), model_path)
    taught = [card.answer for segment in alone.of_step(0) for card in _cards(chat, segment)]
    assert sorted(taught) == ["0", "1", "2", "3"]
    again = [card.answer for segment in alone.of_step(1) for card in _cards(chat, segment)]
    assert sorted(again) == sorted(taught)
    server = serve(_teach(str))
    both = _demonstrations(_taught_by(server, tmp_path, f"warm_start.demonstrations={path}"), model_path)
    answers = [card.answer for segment in both.of_step(0) for card in _cards(chat, segment)]
    assert [answer in PLACES for answer in answers] == [False, True, False, True]


def test_an_environment_is_prepared_before_a_teacher_sees_its_episodes(
    serve: Callable[..., Server], tmp_path: Path, config: RunConfig, model_path: Path
) -> None:
    class Slow(RecordsEnvironment):
        prepared = 0

        def prepare(self) -> None:
            self.prepared += 1

    config = _taught_by(serve(_teach(str)), tmp_path)
    environment = Slow(config.environment.records)
    demonstrations = Demonstrations(config, environment, model_path)
    assert environment.prepared == 0  # not on the loop that builds it
    demonstrations.of_step(0)
    demonstrations.of_step(1)
    assert environment.prepared == 1
