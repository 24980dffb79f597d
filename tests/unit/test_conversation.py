"""LoCoMo from a file: what is told, asked and scored, and one clear line for each fault of the file."""

from __future__ import annotations

import codecs
import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.environments.build import build_environment
from actors.environments.conversation import ConversationEnvironment
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import Task
from configs.schema import ConversationConfig, EmbedderConfig, EnvironmentConfig

SAMPLE = Path(__file__).parents[1] / "data" / "locomo_sample.json"


def _environment(**settings: Any) -> ConversationEnvironment:
    return ConversationEnvironment(ConversationConfig(path=str(SAMPLE), **settings))


def _task(conversation: str, *questions: int) -> Task:
    return Task("t", "conversation", {"conversation": conversation, "questions": list(questions)}, 0)


def _told(environment: ConversationEnvironment, task: Task) -> list[str]:
    session = environment.start(task)
    texts = []
    while (observation := session.observe()) is not None:
        if observation.wants_action:
            session.act("")
        else:
            texts.append(observation.text)
    return texts


def test_sessions_are_told_in_order_under_their_dates_with_captions() -> None:
    first, second = _told(_environment(), _task("harbour", 0))
    assert first.splitlines() == [
        "[9:15 am on 3 March, 2024]",
        "Ida: I signed the lease for the boathouse yesterday!",
        "Tomas: Lovely. My sister Vilma could paint the doors.",
        "Ida: Look at it. [shares an image: a red wooden boathouse by the water]",
    ]
    assert second.startswith("[6:40 pm on 17 March, 2024]\nTomas: Vilma")


def test_a_long_session_comes_in_pieces_of_whole_turns(tmp_path: Path) -> None:
    items = json.loads(SAMPLE.read_text())
    lines = [f"turn {i} " + "word " * 60 for i in range(30)]
    items[0]["conversation"]["session_1"] = [{"speaker": "Ida", "text": line} for line in lines]
    path = tmp_path / "long.json"
    path.write_text(json.dumps(items))
    pieces = _told(ConversationEnvironment(ConversationConfig(path=str(path))), _task("harbour", 0))[:-1]
    assert len(pieces) > 3 and all(len(piece) < 2400 for piece in pieces)
    assert all(piece.startswith("[9:15 am on 3 March, 2024]\n") for piece in pieces)
    assert [line for piece in pieces for line in piece.splitlines()[1:]] == [f"Ida: {line}" for line in lines]


@pytest.mark.parametrize(
    ("question", "limit", "dates"),
    [(0, 1, ["3 March"]), (1, 1, ["17 March"]), (1, 2, ["3 March", "17 March"]), (0, 5, ["3 March"])],
)
def test_max_sessions_keeps_the_last_ones_up_to_the_evidence(
    question: int, limit: int, dates: list[str]
) -> None:
    texts = _told(_environment(max_sessions=limit), _task("harbour", question))
    assert len(texts) == len(dates) and all(date in text for date, text in zip(dates, texts, strict=True))


def test_evidence_from_no_session_of_the_file_leaves_the_last_ones(tmp_path: Path) -> None:
    items = json.loads(SAMPLE.read_text())
    items[0]["qa"][0]["evidence"] = ["D0:1"]
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps(items))
    config = ConversationConfig(path=str(path), max_sessions=1)
    (text,) = _told(ConversationEnvironment(config), _task("harbour", 0))
    assert "17 March" in text


@pytest.mark.parametrize(
    ("question", "answer", "scores"),
    [
        (0, "2 March", {"em": 0.0, "official_f1": 0.8, "plain_f1": 0.8}),
        (1, "door, jar of honey", {"em": 0.0, "official_f1": 1.0, "plain_f1": 0.6666}),
        (2, "2", {"em": 1.0, "official_f1": 1.0, "plain_f1": 1.0}),
        (3, "Probably not", {"em": 0.0, "official_f1": 1.0, "plain_f1": 0.5}),
        (4, "It is not mentioned.", {"em": 1.0, "official_f1": 1.0, "plain_f1": 1.0}),
        (4, "a lease", {"em": 0.0, "official_f1": 0.0, "plain_f1": 0.0}),
    ],
)
@pytest.mark.parametrize("scorer", ["official", "plain"])
def test_both_scorers_are_reported_and_one_is_the_reward(
    scorer: str, question: int, answer: str, scores: dict[str, float]
) -> None:
    session = _environment(scorer=scorer).start(_task("harbour", question))
    session.act(answer)
    outcome = session.outcome()
    (scored,) = outcome.answers
    assert scored.scores == pytest.approx({**scores, "f1": scores[f"{scorer}_f1"]}, abs=1e-4)
    assert outcome.reward == scored.scores["f1"]
    assert scored.category == ("temporal", "multi-hop", "single-hop", "open-domain", "adversarial")[question]


def test_several_questions_share_an_episode_and_the_missing_answer_scores_0() -> None:
    session = _environment(questions_per_episode=2).start(_task("harbour", 2, 4))
    assert session.question == "How many jars will Ida bring? What did Tomas sign?"
    session.act("2")
    assert session.outcome().reward == 0.5


def test_splits_are_disjoint_by_conversation_and_cover_all_questions() -> None:
    environment = _environment()
    eval_tasks = list(environment.tasks("eval", 0, 0))
    size = {"harbour": 5, "orchard": 3}[eval_tasks[0].payload["conversation"]]
    assert len({task.payload["conversation"] for task in eval_tasks}) == 1 and len(eval_tasks) == size
    train = list(itertools.islice(environment.tasks("train", 0, 0), 2 * (8 - size)))
    assert {task.payload["conversation"] for task in train} == {"harbour", "orchard"} - {
        eval_tasks[0].payload["conversation"]
    }
    passes = [
        sorted(task.payload["questions"][0] for task in half)
        for half in (train[: 8 - size], train[8 - size :])
    ]
    assert passes[0] == passes[1] == list(range(8 - size))


def test_position_and_seed_alone_determine_a_task() -> None:
    one, other = _environment(), _environment()
    everything = list(itertools.islice(one.tasks("train", 3, 0), 20))
    assert list(itertools.islice(other.tasks("train", 3, 6), 14)) == everything[6:]
    assert len({task.id for task in everything}) == 20


def test_categories_are_filtered() -> None:
    environment = _environment(categories=(4,))
    tasks = [*environment.tasks("eval", 0, 0), *itertools.islice(environment.tasks("train", 0, 0), 6)]
    assert {(t.payload["conversation"], t.payload["questions"][0]) for t in tasks} == {
        ("harbour", 2),
        ("orchard", 0),
        ("orchard", 1),
    }


def _without(*keys: Any) -> Callable[[Any], None]:
    def change(items: Any) -> None:
        for key in keys[:-1]:
            items = items[key]
        del items[keys[-1]]

    return change


def _with(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(items: Any) -> None:
        for key in keys[:-1]:
            items = items[key]
        items[keys[-1]] = value

    return change


TALK = (0, "conversation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(3, 0), "item 0: Input should be an object"),
        (_without(0, "qa"), r"item 0 \('harbour'\): qa: Field required"),
        (_without(0, "conversation"), "conversation: Field required"),
        (_with([], *TALK), "conversation: Input should be an object"),
        (_with({}, *TALK), "conversation: Input should have session_1, session_2, ..."),
        (_with(3, *TALK, "session_2_date_time"), "session_2.date_time: Input should be a valid string"),
        (_with("hi", *TALK, "session_1"), "conversation.session_1.turns: Input should be a valid array"),
        (_without(*TALK, "session_1", 1, "speaker"), "session_1.turns.1.speaker: Field required"),
        (_with(7, *TALK, "session_1", 0, "text"), "turns.0.text: Input should be a valid string"),
        (
            _with(["a"], *TALK, "session_1", 2, "blip_caption"),
            "turns.2.blip_caption: Input should be a valid",
        ),
        (_without(0, "qa", 2, "question"), "qa.2.question: Field required"),
        (_without(0, "qa", 1, "answer"), "qa.1.answer: Input should be a text or a number"),
        (_with(["a"], 0, "qa", 1, "answer"), "qa.1.answer: Input should be a text or a number"),
        (_with(True, 0, "qa", 1, "answer"), "qa.1.answer: Input should be a text or a number"),
        (_with(6, 0, "qa", 0, "category"), "qa.0.category: Input should be less than or equal to 5"),
        (_with(0, 0, "qa", 0, "category"), "qa.0.category: Input should be greater than or equal to 1"),
        (_with("two", 0, "qa", 0, "category"), "qa.0.category: Input should be a valid integer"),
        (_with("6", 0, "qa", 0, "category"), "qa.0.category: Input should be less than or equal to 5"),
        (_with(math.nan, 0, "qa", 1, "answer"), "item 0: not JSON"),
        (_with(math.inf, 0, "qa", 1, "answer"), "item 0: not JSON"),
        (_with(True, 0, "qa", 0, "category"), "qa.0.category: Input should be a valid integer"),
        (_with(3, 0, "qa", 0, "evidence"), "qa.0.evidence: Input should be a list"),
        (_with(" ", 0, "sample_id"), "item 0 .*: sample_id: Input should be a text or a number"),
        (_with("harbour", 1, "sample_id"), "item 1: sample_id 'harbour' occurs twice"),
        (_without(1), "it has 1 conversation, and at least 2 are needed"),
    ],
)
def test_a_malformed_file_gives_item_field_and_expectation(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    items = copy.deepcopy(json.loads(SAMPLE.read_text()))
    change(items)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(items))
    _refused(str(path), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", r"item 0: not JSON \(invalid object key \(must be a string\)\)"),
        (b"", r"not JSON \(premature EOF\)"),
        (b'{"a": 1}', "Input should be a JSON list: give environment.conversation.path the path of a"),
        (b"[\xff]", "item 0: not JSON"),
        (b"[" * 100_000, "item 0: not JSON"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    _refused(str(path), message)


def test_a_missing_file_or_no_path(tmp_path: Path) -> None:
    _refused(str(tmp_path / "none.json"), "cannot be read")
    _refused("", "environment.conversation.path is empty")


def _read(tmp_path: Path, *changes: Callable[[Any], None], mark: bytes = b"") -> ConversationEnvironment:
    items = copy.deepcopy(json.loads(SAMPLE.read_text()))
    for change in changes:
        change(items)
    path = tmp_path / "forgiven.json"
    path.write_bytes(mark + json.dumps(items, indent=1).encode())
    return ConversationEnvironment(ConversationConfig(path=str(path)))


def test_what_is_harmless_is_forgiven(tmp_path: Path) -> None:
    environment = _read(
        tmp_path,
        _with(7, 0, "sample_id"),
        _with(" 2 ", 0, "qa", 0, "category"),
        _with("D2:1", 0, "qa", 0, "evidence"),
        _with(None, 0, "qa", 1, "evidence"),
        _with(" ", *TALK, "session_1", 2, "blip_caption"),
        _with(None, *TALK, "session_1", 1, "text"),
        _with(None, *TALK, "session_2_date_time"),
        _with(None, *TALK, "session_3"),
        mark=codecs.BOM_UTF8,
    )
    told = _told(environment, _task("7", 0))
    assert told[0].splitlines()[3] == "Ida: Look at it."
    assert told[1].startswith("Tomas: Vilma") and "[None]" not in "".join(told)
    with_dates = _told(_environment(), _task("harbour", 0))
    assert told[1] == with_dates[1].partition("\n")[2]
    session = environment.start(_task("7", 0))
    assert session.outcome().answers[0].category == "temporal"


def test_a_session_without_a_date_has_no_heading(tmp_path: Path) -> None:
    environment = _read(tmp_path, _without(*TALK, "session_1_date_time"))
    assert _told(environment, _task("harbour", 0))[0].startswith("Ida: I signed")


def _refused(path: str, message: str) -> None:
    with pytest.raises(TaskError, match=message) as error:
        ConversationEnvironment(ConversationConfig(path=path))
    assert "\n" not in str(error.value)


def test_a_task_from_another_file_is_refused() -> None:
    environment = _environment()
    with pytest.raises(TaskError, match="has no conversation 'x'"):
        environment.start(_task("x", 0))
    with pytest.raises(TaskError, match="must be places in harbour's 5 questions"):
        environment.start(_task("harbour", 5))


def test_a_real_file(locomo_path: Path) -> None:
    config = EnvironmentConfig(name="conversation", conversation=ConversationConfig(path=str(locomo_path)))
    environment = build_environment(config, EmbedderConfig())
    tasks = list(environment.tasks("eval", 0, 0))
    assert len(tasks) > 100
    for task in tasks:
        assert environment.start(task).observe() is not None


def _told_behind(tmp_path: Path, words: int) -> ConversationEnvironment:
    """Question 0 has its evidence in session 1, question 1 in session 2, question 2 in both, 3 has none."""
    items = json.loads(SAMPLE.read_text())
    for item in items:
        talk = item["conversation"]
        talk["session_1"] = [{"speaker": "Ida", "text": "I live in Oslo."}]
        talk["session_2"] = [{"speaker": "Ida", "text": "rain " * (words - 1)}]  # and who says it
        item["qa"] = [
            {"question": f"Where? {n}", "answer": "Oslo", "category": 4, "evidence": evidence}
            for n, evidence in enumerate((["D1:1"], ["D2:1"], ["D1:1", "D2:1"], []))
        ]
        for key in [key for key in talk if key.startswith("session_") and key[8] not in "12"]:
            del talk[key]
    (tmp_path / "talks.json").write_text(json.dumps(items))
    settings = {"path": str(tmp_path / "talks.json"), "evidence_beyond": 300}
    return ConversationEnvironment(ConversationConfig(**settings))


def test_only_questions_are_kept_whose_evidence_lies_beyond_the_newest_tokens(
    tmp_path: Path, chat: ChatFormat
) -> None:
    environment = _told_behind(tmp_path, 300)
    tasks = [*environment.tasks("eval", 0, 0), *itertools.islice(environment.tasks("train", 0, 0), 5)]
    assert tasks and all(task.payload["questions"] == [0] for task in tasks)
    texts = _told(environment, tasks[0])
    newest = "".join(text for text in texts if "Oslo" not in text)
    assert len(chat.encode(newest)) >= 300  # so the newest 300 tokens do not hold the evidence
    with pytest.raises(TaskError, match=r"with 300 words told behind its evidence .* lower it"):
        _told_behind(tmp_path, 299)
    with pytest.raises(ValueError, match=r"max_sessions=2 is not allowed: it must be 0 with evidence_beyond"):
        ConversationConfig(path="a.json", evidence_beyond=300, max_sessions=2)
