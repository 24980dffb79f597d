"""Reports and metrics show told and untold questions apart."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from actors.environments.recall import RecallEnvironment
from actors.types import Answer, Task
from cluster.evaluation.summary import summarize
from cluster.measure.report import markdown
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import EpisodeScore, RowResult
from cluster.train.report import TrainingReport
from configs.schema import RecallConfig
from tests.unit.comparison_cases import MODEL, plan, result
from tests.unit.test_evaluate_report import report as evaluation
from tests.unit.test_tables import training

Reply = Callable[[Task, int], str]  # to the question at a place


def _leaks(task: Task, place: int) -> str:
    """One written answer to any question."""
    return str(task.payload["facts"][0]["answer"])


def _knows(task: Task, place: int) -> str:
    return str(task.payload["questions"][place]["answer"])


def _row(label: str, unknown: int, reply: Reply) -> RowResult:
    environment = RecallEnvironment(RecallConfig(questions=2, unknown_questions=unknown))
    episodes = []
    for task in itertools.islice(environment.tasks("eval", 0, 0), 6):
        session = environment.start(task)
        for place in range(2 + unknown):
            session.act(reply(task, place))
        answers = session.outcome().answers
        episodes.append(_score(task, answers))
    return RowResult(label, 0, tuple(episodes), ())


def _score(task: Task, answers: tuple[Answer, ...]) -> EpisodeScore:
    return EpisodeScore(task.id, task.id, 0.0, {}, answers, {}, {}, 1, 1, 1, 1.0)


def _training(unknown: int) -> TrainingReport:
    rows = {"before": _row("leaks", unknown, _leaks), "after_rl": _row("knows", unknown, _knows)}
    return training(**rows)


def test_a_trainings_table_tells_told_from_untold() -> None:
    report = _training(unknown=2)
    told = [a for a in report.rows["before"].answers if a.category not in ("stranger", "same_person")]
    right = round(100 * sum(a.scores["f1"] for a in told) / 12)
    elsewhere = round(100 * sum(a.scores["told_elsewhere"] for a in told) / 12)
    text = markdown(report.document())
    assert "| row | told (12) | stranger (6) | same_person (6) | leak % [95% CI] |" in text
    assert f"| leaks | {right}/{elsewhere}/0/0 | 0/100/0/0 | 0/100/0/0 | 100.0 [54.1, 100.0] |" in text
    assert "| knows | 100/0/0/0 | 100/0/100/0 | 100/0/100/0 | 0.0 [0.0, 45.9] |" in text
    assert "| told | 12 |" in text.partition("f1 by category")[2]


def test_without_untold_questions_the_table_is_as_it_was() -> None:
    text = markdown(_training(unknown=0).document())
    assert "Told and untold" not in text and "| told |" not in text


def test_the_tracker_is_given_each_kind_apart() -> None:
    metrics = row_metrics(_row("leaks", 2, _leaks), "after_rl")
    assert metrics["eval/after_rl/told_elsewhere_stranger"] == 1
    assert metrics["eval/after_rl/abstained_same_person"] == 0
    assert metrics["eval/after_rl/f1_told"] == pytest.approx(2 * metrics["eval/after_rl/f1"])
    assert "eval/x/f1_told" not in row_metrics(_row("leaks", 0, _leaks), "x")


def test_an_evaluation_shows_them_too() -> None:
    planned = plan("tmem", seeds=(0,))
    episodes = list(_row("tmem", 2, _leaks).episodes)
    rows = summarize(planned.cells, {cell.key: result("tmem", episodes) for cell in planned.cells}, {})
    costs = tuple(row.cost(MODEL, 4) for row in rows)
    report = replace(evaluation(), rows=rows, costs=costs, differences=())
    text = markdown(report.document())
    assert "| row | told (12) | stranger (6) | same_person (6) | leak % [95% CI] |" in text
    assert re.search(r"\| tmem \| \d+/\d+/0/0 \| 0/100/0/0 \| 0/100/0/0 \| 100.0 ", text)
    shares = {
        (line["category"], line["measure"]): line["value"]
        for line in report.figures()
        if line["measure"] in ("told_elsewhere", "abstained")
    }
    assert shares["stranger", "told_elsewhere"] == 1 and shares["told", "abstained"] == 0
