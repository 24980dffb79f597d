"""BEAM in its public formats: what is told, asked and judged, and one line for each fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.environments.beam import read_beam_items
from actors.environments.rubric import RubricEnvironment
from actors.protocols import TaskError
from configs.schema import JudgeConfig, RubricConfig
from tests.unit.endpoint_server import Served, completion, serving

CHAT = [
    [
        {
            "role": "user",
            "id": 0,
            "time_anchor": "March-15-2024",
            "content": "My sprint ends on March 29. ->-> 1,1",
        },
        {"role": "assistant", "id": 1, "content": "Noted."},
    ],
    [{"role": "user", "id": 2, "content": "I use Flask."}, {"role": "assistant", "id": 3, "content": " "}],
]
QUESTIONS = {
    "information_extraction": [
        {
            "question": "When does my sprint end?",
            "answer": "March 29.",
            "rubric": ["LLM response should state: March 29", "LLM response should state: the year"],
        }
    ],
    "abstention": [
        {"question": "Where do I live?", "ideal_response": "not told", "rubric": ["there is no information"]}
    ],
}
ROW = {"conversation_id": "1", "chat": CHAT, "probing_questions": QUESTIONS}


def _file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "beam.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_a_chat_is_told_and_each_question_judged_by_its_rubrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")

    def decide(body: dict[str, Any]) -> Served:
        asked = json.JSONDecoder().raw_decode(body["messages"][1]["content"])[0]
        assert asked["question"] in ("When does my sprint end?", "Where do I live?")
        verdicts = [
            {"rubric": item["rubric"], "reason": "", "met": "year" not in item["text"]}
            for item in asked["rubrics"]
        ]
        return completion(json.dumps({"id": asked["id"], "verdicts": verdicts}))

    with serving() as start:
        judge = JudgeConfig(url=start(decide).url, model="judge-1", api_key_env="")
        path = _file(tmp_path, ROW, ROW)
        environment = RubricEnvironment(RubricConfig(path=path, format="beam", score="share", judge=judge))
        tasks = list(environment.tasks("eval", 0, 0))
        outcomes = {}
        for task in tasks:
            session, told = environment.start(task), []
            while (observation := session.observe()) is not None:
                if observation.wants_action:
                    session.act("On March 29.")
                else:
                    told.append(observation.text)
            outcomes[session.question] = session.outcome()
    assert told == [
        "[User]\n[March-15-2024] My sprint ends on March 29.",
        "[Assistant]\nNoted.",
        "[User]\nI use Flask.",
    ]
    assert "shown the chats that a user had with you" in tasks[0].system_prompt
    sprint = outcomes["When does my sprint end?"]
    assert (sprint.reward, sprint.answers[0].scores["em"]) == (0.5, 0.0)
    assert sprint.answers[0].category == "information_extraction"
    assert outcomes["Where do I live?"].reward == 1.0
    # the other chat's questions are for training
    assert len({task.payload["item"].split("-")[1] for task in tasks}) == 1


def test_the_hubs_texts_and_the_repositorys_batches_are_read_alike(tmp_path: Path) -> None:
    batches = [{"batch_number": 1, "turns": CHAT[:1]}, {"batch_number": 2, "turns": CHAT[1:]}]
    hub = ROW | {"chat": repr(CHAT), "probing_questions": repr(QUESTIONS)}
    plain, texts, batched = (
        read_beam_items(_file(tmp_path, row)) for row in (ROW, hub, ROW | {"chat": batches})
    )
    assert plain == texts == batched and len(plain) == 2 and len(plain[0].messages) == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"chat": []}, "chat: Input should have messages with role and content"),
        ({"chat": [{"role": "tool", "content": "x"}]}, "chat: A message's role is 'tool'"),
        ({"chat": "[{"}, "chat: Input should be a list or an object, or a text of one"),
        ({"chat": "__import__('os').getcwd()"}, "chat: Input should be a list or an object"),
        ({"probing_questions": {"a": [{"question": "q"}]}}, r"probing_questions.a.0.rubric: Field required"),
        ({"probing_questions": {"a": [{"question": "q", "rubric": []}]}}, "at least one entry"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(TaskError, match=rf"beam\.jsonl: line 2: .*{problem}") as caught:
        read_beam_items(_file(tmp_path, ROW, ROW | changes))
    assert "\n" not in str(caught.value)


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"it has no questions: give environment\.rubric\.path"):
        read_beam_items(_file(tmp_path, ROW | {"probing_questions": {}}))
