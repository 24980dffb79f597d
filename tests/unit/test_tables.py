"""Figures for people: the report kit, the rows of a training run, and its report."""

from __future__ import annotations

import asyncio
import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.types import Answer, Task
from cluster.common.errors import CheckpointError
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import (
    EpisodeScore,
    EvaluationRow,
    RowResult,
    compare,
    evaluate_row,
    load_row,
    save_row,
    score_episode,
)
from cluster.train.report import Comparison, TrainingReport, save_report, training_report
from configs.schema import MemoryConfig
from tests.unit.cluster_cases import group, task_at, trajectory

PNG = b"\x89PNG"


def episode(task: int, f1: float, em: float = 0.0, category: str = "home") -> EpisodeScore:
    writes = {"accepted": 1, "empty": 2, "rolled_back": 0}
    answer = Answer("Where?", ("here", "there"), "here", category, {"f1": f1, "em": em, "official": f1 / 2})
    return EpisodeScore(
        f"t{task}", f"item{task}", f1, {"f1": f1}, (answer,), writes, {"summaries": 1}, 100, 20, 60, 1.5
    )


def row(label: str, values: list[float], failed: tuple[str, ...] = ()) -> RowResult:
    """Answers of the categories work, home, work, ..."""
    episodes = [
        episode(number, value, category="home" if number % 2 else "work")
        for number, value in enumerate(values)
    ]
    return RowResult(label, 3, tuple(episodes), failed)


def training(*rewards: float, **rows: RowResult) -> TrainingReport:
    return training_report(rows, rewards, temperature=0.7)


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_are_compared_on_the_tasks_that_both_finished() -> None:
    before = RowResult("a", 0, (episode(0, 0.0), episode(1, 0.2), episode(2, 0.5)), ("engine: gone",))
    after = RowResult("b", 1, (episode(1, 0.4), episode(2, 0.7), episode(9, 1.0)), ())
    difference = compare(before, after, "f1")
    assert difference.count == 2
    assert difference.mean == pytest.approx(0.2)
    silent = replace(episode(1, 0.9), answers=())  # finished, but nothing was asked
    assert compare(before, replace(after, episodes=(silent, episode(2, 0.7))), "f1").count == 1


def test_an_episode_is_kept_without_its_tokens() -> None:
    """Two segments of four tokens, two sampled in each; a third of six, all read."""
    played = trajectory(task_at(0), 4, 0.5, writes=("accepted", "rolled_back", "accepted"), seconds=2.5)
    first = played.segments[0]
    long = replace(
        first,
        token_ids=np.arange(6, dtype=np.int32),
        action_mask=np.zeros(6, dtype=bool),
        logprobs=np.zeros(6, dtype=np.float32),
        spans=(),
    )
    score = score_episode(replace(played, segments=(first, first, long)))
    assert (score.prompt_tokens, score.generated_tokens, score.peak_context) == (10, 4, 6)
    assert score.writes == {"accepted": 2, "empty": 0, "rolled_back": 1}
    assert (score.task_id, score.reward, score.seconds) == ("t0", 0.5, 2.5)


def test_an_item_is_what_the_task_asks() -> None:
    """The same under every seed and id, another in another environment."""
    base = trajectory(Task("t0", "recall", {"ask": "Where?"}, 0), 0, 0.5)
    item = score_episode(base).item
    same = replace(base, task=Task("t7", "recall", {"ask": "Where?"}, 7))
    assert score_episode(same).item == item
    for other in (Task("t0", "search", {"ask": "Where?"}, 0), Task("t0", "recall", {"ask": "Who?"}, 0)):
        assert score_episode(replace(base, task=other)).item != item


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    measured = row("TMEM", [0.25, 0.75], ("engine: gone",))
    save_row(measured, tmp_path / "evaluation" / "before.json")
    assert load_row(tmp_path / "evaluation" / "before.json") == measured


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            '{"label": "TMEM", "policy_version": 0, "episodes": [{"task_id": "t0"}], "failed": []}',
            "Field required",
        ),
        ('{"label": "TMEM", "policy_version": "0", "episodes": [], "failed": []}', "policy_version: Input"),
        ("{", "Invalid JSON"),
    ],
)
def test_a_row_of_another_version_is_one_line(content: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"before\.json cannot be used: .*; delete it") as caught:
        load_row(path)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_row_metrics_by_category_and_write_outcome() -> None:
    metrics = row_metrics(row("TMEM", [0.25, 0.75]), "before")
    assert metrics["eval/before/f1"] == 0.5
    assert metrics["eval/before/f1_home"] == 0.75
    assert metrics["eval/before/f1_work"] == 0.25
    assert metrics["eval/before/writes_empty"] == 4
    assert metrics["eval/before/official"] == 0.25
    assert metrics["eval/before/seconds"] == 1.5
    assert all(math.isfinite(value) for value in row_metrics(RowResult("x", 0, (), ()), "x").values())
    same = row_metrics(RowResult("x", 0, (episode(0, 0.5),), ()), "x")
    assert "eval/x/f1_home" not in same  # one category: the mean says it


class _Worker:
    """Answers task i with reward i / 10; refuses task 3."""

    name = "w"

    def __init__(self) -> None:
        self.running = 0
        self.most = 0

    async def episode(self, position: int, task: object, row: EvaluationRow) -> object:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001 * (5 - position % 5))
        self.running -= 1
        if position == 3:
            return group(task_at(position), 4, finished=0, failed=1)
        return group(task_at(position), 4, rewards=[position / 10])


def test_evaluation_runs_every_task_once_in_order_within_its_lanes() -> None:
    worker, done = _Worker(), []
    tasks = [task_at(position) for position in range(8)]
    row = EvaluationRow("TMEM", MemoryConfig(), 0)
    workers: Any = [worker]
    result = asyncio.run(evaluate_row(row, tasks, workers, 3, lambda: done.append(1)))
    finished = [position for position in range(8) if position != 3]
    assert [episode.task_id for episode in result.episodes] == [f"t{position}" for position in finished]
    assert result.episodes[4].mean("f1") == 0.5
    assert result.failed == ("engine: out of memory",)
    assert (result.label, result.policy_version) == ("TMEM", 4)
    assert worker.most == 3
    assert len(done) == 8
    assert result.episodes[0].prompt_tokens == 2
    assert result.episodes[0].generated_tokens == 2


# --- the report of a training run -------------------------------------------------------------------------


def test_the_sentence_says_plainly_what_was_shown() -> None:
    low, high = row("TMEM before", [0.1, 0.2] * 20), row("TMEM after RL", [0.4, 0.6] * 20)
    (gain,) = training(before=low, after_rl=high).comparisons
    (loss,) = training(before=high, after_rl=low).comparisons
    (nothing,) = training(before=low, after_rl=low).comparisons
    assert gain.sentence.startswith("TMEM after RL against TMEM before: F1 +35.0 [+29.5, +40.3] points")
    assert gain.sentence.endswith("on 40 tasks, p < 0.0001, adjusted p < 0.0001: a significant gain.")
    assert "F1 -35.0" in loss.sentence and "significant LOSS." in loss.sentence
    assert "p = 1.0000, adjusted p = 1.0000: NOT significant. More train.steps or" in nothing.sentence
    edge = Comparison("a", "b", gain.difference, 0.05)
    assert "clear alone, but among all comparisons of this report, NOT significant." in edge.sentence


def test_a_comparison_of_before_the_training_asks_for_no_more_training() -> None:
    off, before = row("memory off", [0.1, 0.2] * 20), row("TMEM before", [0.1, 0.2] * 20)
    (same,) = training(memory_off=off, before=before).comparisons
    assert same.sentence.endswith("NOT significant. More evaluation.tasks may show a difference.")


def test_no_shared_task_is_said() -> None:
    empty = RowResult("TMEM after RL", 0, (), ("engine: gone",))
    report = training(before=row("TMEM before", [0.5]), after_rl=empty)
    (comparison,) = report.comparisons
    assert math.isnan(comparison.adjusted_p)
    assert comparison.sentence == (
        "TMEM after RL and TMEM before share no finished task: nothing can be compared."
    )


def test_comparisons_are_adjusted_over_the_report() -> None:
    low, high = row("low", [0.1] * 12), row("high", [0.4] * 12)
    report = training(memory_off=low, before=low, after_rl=high)
    pairs = [(comparison.before, comparison.after) for comparison in report.comparisons]
    assert pairs == [("low", "high"), ("low", "high"), ("low", "low")]
    first = report.comparisons[0]
    assert first.adjusted_p == 3 * first.difference.p_value


def test_tables_show_rows_intervals_writes_failures_and_categories() -> None:
    off, tmem = row("memory off", [0.0, 0.0]), row("TMEM", [0.25, 0.75], ("engine: gone",) * 2)
    document = training(before=tmem, memory_off=off).document()
    assert document.title == "Held-out evaluation, sampled at temperature 0.7"
    (section,) = document.sections
    rows, answers, costs, f1, _, official = section.tables
    assert rows.header == ("row", "tasks", "failed", "F1 % [95% CI]", "EM % [95% CI]", "official %")
    assert rows.rows[0][:3] == ("memory off", "2", "0")
    assert rows.rows[1][:3] == ("TMEM", "2", "2")
    assert rows.rows[1][3].startswith("50.0 [6.8, 93.2]")
    assert rows.rows[1][5] == "25.0"
    assert "failed: episodes that did not finish; they are in no mean" in rows.legend
    assert answers.rows[1] == ("TMEM", "100.0 (100.0)", "-", "-", "-", "-")
    assert costs.rows[1] == ("TMEM", "2/4/0", "100+20", "1.5")
    assert official.header == ("official %", "questions", "memory off", "TMEM")
    assert official.rows == (("home", "1", "0.0", "37.5"), ("work", "1", "0.0", "12.5"))
    assert (f1.title, f1.detail, official.detail) == ("f1 by category", False, True)
    assert "TMEM: 2 episode(s) failed: engine: gone" in section.notes
    assert "TMEM: with all 2 failed episodes counted as 0, F1 would be 25.0 %" in section.notes


def test_unanswerable_questions_are_shown_with_and_without() -> None:
    asked = (
        episode(0, 0.0, category="adversarial"),
        episode(1, 0.4, category="temporal"),
        episode(2, 0.6, category="multi-hop"),
    )
    (section,) = training(before=RowResult("TMEM", 0, asked, ())).document().sections
    lines = section.tables[3].rows
    assert lines[-1] == ("all but adversarial", "2", "50.0")
    assert ("adversarial", "1", "0.0") in lines


def test_the_files_of_a_training_run(tmp_path: Path) -> None:
    before, after = row("before", [0.1, 0.2]), row("after", [0.4, 0.6])
    empty = RowResult("empty", 0, (), ("engine: gone",))
    report = training(0.1, 0.3, memory_off=before, before=after, after_rl=empty)
    paths = {path.name: path for path in save_report(report, tmp_path)}
    assert set(paths) == {"report.md", "report.csv", "report.json", "rows.png", "reward.png"}
    text = paths["report.md"].read_text()
    assert text.startswith("# Held-out evaluation, sampled at temperature 0.7\n")
    assert (
        "| before | 2 | 0 |" in text
        and "![rows](rows.png)" in text
        and "## official by category" in text
        and "![reward](reward.png)" in text
    )
    with paths["report.csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines if line["score"] == "f1"] == ["before", "after", "empty"]
    assert float(lines[0]["mean"]) == pytest.approx(0.15)
    assert (lines[0]["tasks"], lines[0]["empty"], lines[0]["version"]) == ("2", "4", "3")
    data = json.loads(paths["report.json"].read_text(), parse_constant=pytest.fail)
    assert data["rows"][2]["scores"]["f1"]["mean"] is None
    assert data["rows"][2]["failed"] == ["engine: gone"]
    assert data["rows"][0]["writes"] == {"accepted": 2, "empty": 4, "rolled_back": 0}
    assert (data["comparisons"][2]["before"], data["comparisons"][2]["after"]) == ("before", "after")
    assert data["rewards"] == [0.1, 0.3]
    assert data["rows"][0]["constant_answers"] == 1.0
    assert all(paths[name].read_bytes().startswith(PNG) for name in ("rows.png", "reward.png"))
    assert "reward.png" not in {path.name for path in save_report(training(before=before), tmp_path)}
