"""MemoryAgentBench in its public format: what is told, asked and scored, and one line for each fault."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from actors.environments.conversation import ConversationEnvironment
from actors.environments.memoryagentbench import rule_score
from actors.protocols import TaskError
from configs.schema import ConversationConfig


def _row(source: str, context: str, *asked: tuple[str, list[str]], **changes: Any) -> dict[str, Any]:
    row = {
        "context": context,
        "questions": [question for question, _ in asked],
        "answers": [answers for _, answers in asked],
        "metadata": {"source": source, "qa_pair_ids": [f"{source}_no{n}" for n in range(len(asked))]},
    }
    return row | changes


FACTS = "Here is a list of facts:\n0. Ida was born in London.\n1. Ida was born in Leeds."
ROWS = [
    _row(
        "factconsolidation_sh_6k", FACTS, ("Where was Ida born?", ["Leeds"]), ("Who was?", ["Ida", "ida K."])
    ),
    _row("icl_banking77_5900shot_balance", "my card is lost\nlabel: 28", ("where is my card?", ["28"])),
    _row("ruler_qa1_197K", "Document 1:\nNormandy lies in France.", ("Where is Normandy?", ["France"])),
]


def _environment(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> ConversationEnvironment:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = {"format": "memoryagentbench", "scorer": "official", "questions_per_episode": 2} | settings
    return ConversationEnvironment(ConversationConfig(path=str(path), **own))


def _played(environment: ConversationEnvironment, source: str, *replies: str) -> tuple[list[str], Any, str]:
    """(what was told, the outcome, the system prompt) of the row of ``source``."""
    tasks = [*environment.tasks("eval", 0, 0), *itertools.islice(environment.tasks("train", 0, 0), 3)]
    task = next(task for task in tasks if task.payload["conversation"].startswith(source))
    session, told, said = environment.start(task), [], iter(replies)
    while (observation := session.observe()) is not None:
        if observation.wants_action:
            session.act(next(said))
        else:
            told.append(observation.text)
    return told, session.outcome(), task.system_prompt


def test_a_context_is_told_once_and_its_questions_follow(tmp_path: Path) -> None:
    environment = _environment(tmp_path, ROWS)
    told, outcome, prompt = _played(environment, "factconsolidation", "Answer: Leeds", "it is ida k")
    assert told == [FACTS] and "the one with the larger number is right" in prompt
    first, second = outcome.answers
    assert (first.category, first.gold, second.gold) == (
        "factconsolidation_sh_6k",
        ("Leeds",),
        ("Ida", "ida K."),
    )
    assert (first.scores["f1"], first.scores["em"]) == (1.0, 0.0) and second.scores[
        "plain_f1"
    ] == pytest.approx(2 / 3)
    assert outcome.reward == 1.0
    _, outcome, prompt = _played(environment, "icl", "label 28")
    assert (
        outcome.reward == 0.0 and "Answer with its label" in prompt
    )  # as in the benchmark: exactly the label
    plain = _environment(tmp_path, ROWS, scorer="plain")
    assert _played(plain, "ruler", "in France")[1].answers[0].scores["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("rule", "prediction", "answers", "score"),
    [
        ("contains", "It is the city of Leeds.", ["Leeds"], 1),
        ("contains", "London", ["Leeds"], 0),
        ("contains", "the United-Kingdom!", ["London", "a UnitedKingdom"], 1),
        ("same", "28", ["28"], 1),
        ("same", "The correct labels are 28 and 29", ["28"], 0),
        ("same", "Answer: The 28.\nAs said.", ["28"], 1),
        ("contains", "", ["Leeds"], 0),
        ("same", "", ["A"], 0),
        ("same", "The", ["A"], 0),
        ("same", "A.", ["A"], 1),
        ("contains", "cat", ["A"], 0),
    ],
)
def test_the_benchmarks_two_matches(rule: Any, prediction: str, answers: list[str], score: float) -> None:
    assert rule_score(rule, prediction, answers) == score


def test_rows_that_no_rule_scores_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        environment = _environment(tmp_path, [*ROWS, _row("recsys_redial_full", "x", ("q", ["1"]))])
    assert "left out: recsys_redial_full 1" in caplog.text
    names = {task.payload["conversation"] for task in environment.tasks("eval", 0, 0)}
    assert not any("recsys" in name for name in names)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (_row("ruler", " ", ("q", ["a"])), "context: Input should be a text that is not blank"),
        (_row("ruler", "c", ("q", ["a"]), answers=[]), "answers: there are 0, beside 1 questions"),
        (_row("ruler", "c", ("q", ["a"]), answers=[[float("nan")]]), "answers.0.0: .* not nan"),
        (_row("ruler", "c", ("q", ["a"]), metadata={}), "metadata.source: Field required"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(TaskError, match=rf"rows\.jsonl: line 4: {problem}"):
        _environment(tmp_path, [*ROWS, row])


def test_settings_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"evidence_beyond=9 is not allowed: it must be 0 with this format"):
        ConversationConfig(path="a.jsonl", format="memoryagentbench", evidence_beyond=9)
