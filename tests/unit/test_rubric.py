"""CL-Bench from a file: what is read, asked and scored, by rules and by a judge; one line for each fault."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.environments.build import build_environment
from actors.environments.judge.cached_endpoint import Cost
from actors.environments.judge.judge import Verdict
from actors.environments.rubric import RubricEnvironment, RubricSession, read_rubric_items, split_request
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import Task
from configs.schema import (
    EmbedderConfig,
    EnvironmentConfig,
    JudgeConfig,
    MemoryConfig,
    RolloutConfig,
    RubricConfig,
    WriteConfig,
)
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

SAMPLE = Path(__file__).parents[1] / "data" / "rubric_sample.jsonl"
NOBODY = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", retries=0)
GOOD = {
    "tarn-points": "7 points",
    "tarn-nested": "Nested; it may not be taken.",
    "ferry-steps": '["Close the stern gate", "Pump out tank B"]',
    "veldite-length": "116 mm: it grows by 4 mm for 10 degrees.",
}


def _environment(path: Path = SAMPLE, **changes: Any) -> RubricEnvironment:
    return RubricEnvironment(RubricConfig(path=str(path), **{"checker": "rules", **changes}))


def _task(item: str) -> Task:
    return Task("t", "rubric", {"item": item}, 0)


def _play(environment: RubricEnvironment, item: str, answer: str) -> tuple[list[str], RubricSession]:
    session = environment.start(_task(item))
    told: list[str] = []
    while (observation := session.observe()) is not None:
        if observation.wants_action:
            session.act(answer)
        else:
            told.append(observation.text)
    return told, session


def _lines() -> list[Any]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def _file(folder: Path, items: Sequence[object]) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items) + "\n", encoding="utf-8")
    return path


# --- what is read, asked and scored ---


def test_messages_are_read_in_order_and_the_last_is_asked() -> None:
    told, session = _play(_environment(), "tarn-nested", "")
    assert [text.splitlines()[0] for text in told] == ["[Instructions]", "[User]", "[Assistant]"]
    assert (
        told[0].startswith("[Instructions]\nYou are the referee of Tarn")
        and told[2] == "[Assistant]\nI know the rules. What is the question?"
    )
    assert (
        session.question
        == "What is a heron on a reed field called, and may it be taken? Begin with the word for it."
    )


def test_a_long_last_message_is_read_but_for_its_end(tmp_path: Path) -> None:
    items = _lines()
    paragraphs = [f"Rule {number}: " + "moves and counts " * 20 for number in range(30)]
    items[0]["messages"][-1]["content"] = "\n\n".join([*paragraphs, "How many points is that?"])
    told, session = _play(_environment(_file(tmp_path, items)), "tarn-points", "")
    assert session.question.startswith("Rule ") and session.question.endswith("\n\nHow many points is that?")
    assert 1000 <= len(session.question) <= 2000
    assert told[-1].startswith("[User]\nRule 0: ")
    assert (
        f"{told[-1].removeprefix('[User]')} {session.question}".split()
        == items[0]["messages"][-1]["content"].split()
    )


@pytest.mark.parametrize(
    ("text", "request_start"),
    [
        ("w " * 700 + "\n\n" + "a. b\n" + "w " * 700 + "\n\n end", "a. b\n"),
        ("w " * 700 + "a. b\n" + "X " + "w " * 700, "X w"),
        ("w " * 700 + "a. b" + "w " * 700, "bw"),
        ("w " * 3000, "w w"),
        ("w " * 1400 + "\n\n end", "w w"),
        ("w" * 3000, "www"),
    ],
    ids=["paragraph", "line", "sentence", "word", "a paragraph too near the end", "none of them"],
)
def test_a_request_begins_with_the_largest_part_that_leaves_it_long_enough(
    text: str, request_start: str
) -> None:
    _, request = split_request(text)
    assert request.startswith(request_start) and 900 <= len(request) <= 2000


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab. \n", max_size=40), st.integers(1, 300))
def test_nothing_of_a_request_is_lost(text: str, times: int) -> None:
    before, asked = split_request(text * times)
    assert "".join(f"{before}{asked}".split()) == "".join((text * times).split())
    assert len(asked) <= 2000 and (not before or asked)


@pytest.mark.parametrize("item", GOOD)
def test_all_rubrics_met_is_1_and_anything_less_0(item: str) -> None:
    _, session = _play(_environment(), item, GOOD[item])
    outcome = session.outcome()
    assert outcome.reward == 1.0
    assert outcome.answers[0].scores == {"f1": 1.0, "em": 1.0, "solved": 1.0, "rubrics_met": 1.0}
    assert outcome.answers[0].gold == tuple(
        next(line["rubrics"] for line in _lines() if line["metadata"]["task_id"] == item)
    )


def test_a_share_of_the_rubrics_is_told_and_not_rewarded() -> None:
    _, session = _play(_environment(), "ferry-steps", "First the stern gate, then the tank B.")
    outcome = session.outcome()
    assert outcome.reward == 0.0 and outcome.answers[0].scores == {
        "f1": 0.0,
        "em": 0.0,
        "solved": 0.0,
        "rubrics_met": 0.75,
    }
    assert outcome.answers[0].category == "Procedural Task Execution"


@pytest.mark.parametrize("answer", ["", " \n", "<think>7 points", "<think>7 points</think>  "])
def test_an_empty_answer_is_0_also_where_a_rule_would_be_met_and_no_judge_is_asked(answer: str) -> None:
    for environment in (_environment(), _environment(checker="judge", judge=NOBODY)):
        _, session = _play(environment, "tarn-points", answer)
        outcome = session.outcome()
        assert (
            outcome.reward == 0.0
            and outcome.answers[0].scores["rubrics_met"] == 0.0
            and outcome.reward_parts["judge_requests"] == 0.0
        )


def test_an_unanswered_item_scores_0() -> None:
    assert _environment().start(_task("tarn-points")).outcome().reward == 0.0


def test_thoughts_before_the_answer_do_not_count() -> None:
    _, session = _play(
        _environment(), "tarn-points", "<think>two nested and one other, so let me add</think>7 points"
    )
    outcome = session.outcome()
    assert outcome.reward == 1.0 and outcome.answers[0].prediction == "7 points"


class _ScriptedJudge:
    """A Judge whose verdict the test writes."""

    def __init__(self, verdict: Verdict) -> None:
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []
        self._verdict = verdict

    def verdict(self, question: str, answer: str, rubrics: Sequence[str]) -> Verdict:
        self.asked.append((question, answer, tuple(rubrics)))
        return self._verdict


def test_what_a_judge_took_reaches_the_outcome() -> None:
    (item,) = (item for item in read_rubric_items(str(SAMPLE)) if item.id == "tarn-points")
    judge = _ScriptedJudge(Verdict((True, False), ("", ""), Cost(2, 0, 1, 300, 40, 0.02)))
    session = RubricSession("t", item, judge)
    session.act(" seven \n")
    outcome = session.outcome()
    assert judge.asked == [(session.question, "seven", item.rubrics)]
    assert outcome.reward_parts == {"f1": 0.0, "em": 0.0, "solved": 0.0, "rubrics_met": 0.5} | {
        "judge_requests": 2.0,
        "judge_cached": 0.0,
        "judge_unmetered": 1.0,
        "judge_prompt_tokens": 300.0,
        "judge_generated_tokens": 40.0,
        "judge_usd": 0.02,
    }


def test_a_judge_that_cannot_be_reached_fails_the_episode_and_rewards_nothing(tiny_model_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    chat = ChatFormat(tokenizer)
    environment = _environment(checker="judge", judge=NOBODY)
    policy = ScriptedPolicy(lambda ids, sampling, adapter: sampled(tokenizer.encode("7 points")))
    rollout = Rollout(
        policy,
        ScriptedWriter(),
        environment,
        chat,
        WriteConfig(),
        RolloutConfig(),
        4,
        SURROUNDINGS,
        "basis",
        "w0",
    )
    task = next(environment.tasks("train", 0, 0))
    memory = MemoryConfig(policy="truncation")
    group = asyncio.run(rollout.group(RolloutRequest(task, "g", 2, memory, 1.0, 8, 0)))
    assert group.trajectories == () and [failed.boundary for failed in group.failed] == ["environment"] * 2
    message = group.failed[0].message
    assert (
        message.startswith(f"task {task.id}: the judge m at http://127.0.0.1:9/v1 is unreachable")
        and "environment.rubric.judge.url" in message
    )


# --- tasks ---


def test_splits_keep_a_context_together_and_cover_all_items() -> None:
    environment = _environment(eval_fraction=0.4)
    held_out = [task.payload["item"] for task in environment.tasks("eval", 0, 0)]
    train = [
        task.payload["item"] for task in itertools.islice(environment.tasks("train", 0, 0), 4 - len(held_out))
    ]
    assert sorted([*held_out, *train]) == sorted(GOOD)
    assert {item.split("-")[0] for item in held_out}.isdisjoint(item.split("-")[0] for item in train)


def test_train_is_endless_in_new_orders_and_position_and_seed_alone_determine_a_task() -> None:
    environment = _environment()
    everything = list(itertools.islice(environment.tasks("train", 3, 0), 30))
    assert list(itertools.islice(_environment().tasks("train", 3, 11), 19)) == everything[11:]
    assert len({task.id for task in everything}) == 30
    size = 4 - len(list(environment.tasks("eval", 3, 0)))
    assert len(set(Counter(task.payload["item"] for task in everything[: 5 * size]).values())) == 1


def test_the_order_of_the_file_changes_no_split(tmp_path: Path) -> None:
    other = _environment(_file(tmp_path, _lines()[::-1]))
    assert {task.payload["item"] for task in other.tasks("eval", 0, 0)} == {
        task.payload["item"] for task in _environment().tasks("eval", 0, 0)
    }


def test_a_task_from_another_file_is_refused() -> None:
    with pytest.raises(TaskError, match=r"task t: .* has no item 'x'"):
        _environment().start(_task("x"))


def test_it_is_built_from_a_config() -> None:
    config = EnvironmentConfig(name="rubric", rubric=RubricConfig(path=str(SAMPLE), checker="rules"))
    environment = build_environment(config, EmbedderConfig())
    assert environment.name == "rubric" and next(environment.tasks("train", 0, 0)).environment == "rubric"


# --- the file ---


def test_what_metadata_lacks_is_filled(tmp_path: Path) -> None:
    items = _lines()
    del items[0]["metadata"]
    items[1]["metadata"] = {"task_id": 17, "context_category": None}
    first, second, *_ = read_rubric_items(str(_file(tmp_path, items)))
    assert (first.id, first.context_id, first.category) == ("line-1", "line-1", "uncategorised")
    assert (second.id, second.context_id, second.category) == ("17", "17", "uncategorised")


def test_blank_lines_and_blank_earlier_messages_are_passed_over(tmp_path: Path) -> None:
    items = _lines()
    items[0]["messages"][0]["content"] = "  "
    path = _file(tmp_path, items)
    path.write_text("\n\n" + path.read_text().replace("\n", "\r\n"))
    first = read_rubric_items(str(path))[0]
    assert first.messages == () and first.place == "line 3"


def test_a_fault_in_a_json_list_is_named_by_its_item(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text(json.dumps([_lines()[0], _lines()[0]], indent=1))
    _refused(path, "item 1: metadata.task_id .* stands in item 0 already")


def test_a_messages_content_may_be_null_or_a_list_of_parts(tmp_path: Path) -> None:
    items = _lines()
    last = items[0]["messages"][-1]
    parts = [{"type": "text", "text": last["content"]}, {"type": "image_url", "image_url": {}}]
    items[0]["messages"] = [{"role": "system", "content": None}, {**last, "content": parts}]
    first = read_rubric_items(str(_file(tmp_path, items)))[0]
    assert first.messages == () and first.request == last["content"]


def _with(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(items: Any) -> None:
        for key in keys[:-1]:
            items = items[key]
        items[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with(3, 0), "line 1: Input should be an object"),
        (_with({}, 1), "line 2: messages: Field required"),
        (_with([], 0, "messages"), "line 1: messages: The last message should be the user's"),
        (_with("hi", 0, "messages", 0), "messages.0: Input should be an object"),
        (_with("tool", 0, "messages", 0, "role"), "messages.0.role: Input should be 'system', 'user' or"),
        (_with(["user"], 0, "messages", 0, "role"), "messages.0.role: Input should be 'system', 'user' or"),
        (_with(7, 0, "messages", 0, "content"), "messages.0.content: Input should be a valid string"),
        (_with(" ", 0, "messages", 1, "content"), "line 1: messages: The last message should be the user's"),
        (_with("assistant", 0, "messages", 1, "role"), "messages: The last message should be the user's"),
        (_with("be good", 2, "rubrics"), "line 3: rubrics: Input should be a valid array"),
        (_with([], 2, "rubrics"), "line 3: rubrics: Input should have at least one rubric"),
        (_with("", 2, "rubrics", 1), "line 3: rubrics.1: Input should be a text that is not blank"),
        (_with(["x"], 0, "metadata"), "line 1: metadata: Input should be an object"),
        (_with(["x"], 0, "metadata", "task_id"), "metadata.task_id: Input should be a text or a number"),
        (_with(" ", 0, "metadata", "task_id"), "metadata.task_id: Input should be a text or a number"),
        (
            _with("tarn-nested", 2, "metadata", "task_id"),
            "line 3: metadata.task_id 'tarn-nested' stands in line 2 already",
        ),
        (
            _with("It is correct.", 3, "rubrics", 1),
            r"line 4: rubrics.1: 'It is correct.' is no rule; one of: contains: TEXT, .*checker=judge",
        ),
        (
            _with("matches: (a", 3, "rubrics", 0),
            r"line 4: rubrics.0: 'matches: \(a' has a regular expression that does not compile",
        ),
    ],
)
def test_a_malformed_file_gives_line_field_and_expectation(
    tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    items = copy.deepcopy(_lines())
    change(items)
    _refused(_file(tmp_path, items), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"messages": [}', "line 1: Invalid JSON: .* column 15"),
        (b"", "it has no items"),
        (b"\n \n", "it has no items"),
        (b"[\xff]", "item 0: not JSON"),  # a list of items
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "other.jsonl"
    path.write_bytes(content)
    _refused(path, message)


def test_a_missing_file_or_one_context_only(tmp_path: Path) -> None:
    _refused(tmp_path / "none.jsonl", "cannot be read .*environment.rubric.path")
    _refused(_file(tmp_path, _lines()[:2]), "all its items share one context")


def _refused(path: Path, message: str) -> None:
    with pytest.raises(TaskError, match=message) as error:
        _environment(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_rubrics_in_prose_are_for_a_judge(tmp_path: Path) -> None:
    items = _lines()
    items[0]["rubrics"] = ["The response should give the number of points."]
    _environment(_file(tmp_path, items), checker="judge", judge=NOBODY)
