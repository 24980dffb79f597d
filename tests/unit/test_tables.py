"""Figures for people: intervals, paired comparison, tables and files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from actors.types import Answer
from cluster.common.errors import CheckpointError
from cluster.measure.report import HEADER, Comparison, Report, rich_table, save_report
from cluster.measure.rows import (
    EpisodeScore,
    EvaluationRow,
    RowResult,
    compare,
    evaluate_row,
    load_row,
    row_metrics,
    save_row,
)
from cluster.measure.statistics import bootstrap_interval, nested_interval, paired_difference
from configs.schema import MemoryConfig


def episode(task: int, f1: float, em: float = 0.0, category: str = "home") -> EpisodeScore:
    writes = {"accepted": 1, "empty": 2, "rolled_back": 0}
    answer = Answer("Where?", ("here", "there"), "here", category, {"f1": f1, "em": em, "official": f1 / 2})
    return EpisodeScore(
        f"t{task}", f"item{task}", f1, {"f1": f1}, (answer,), writes, {"summaries": 1}, 100, 20, 60, 1.5
    )


def row(label: str, values: list[float], failed: tuple[str, ...] = ()) -> RowResult:
    return RowResult(
        label,
        3,
        tuple(
            episode(number, value, category="home" if number % 2 else "work")
            for number, value in enumerate(values)
        ),
        failed,
    )


def test_interval_holds_the_mean_and_narrows_with_more_tasks() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.random(20).tolist(), rng.random(2000).tolist()
    small, large = bootstrap_interval(few, 2000, 0), bootstrap_interval(many, 2000, 0)
    for interval, values in ((small, few), (large, many)):
        assert interval.low < np.mean(values) < interval.high
        assert interval.mean == pytest.approx(np.mean(values))
    assert large.high - large.low < (small.high - small.low) / 3
    standard_error = np.std(many) / math.sqrt(len(many))
    assert large.high - large.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_interval_is_the_same_for_the_same_seed_and_nan_without_tasks() -> None:
    assert bootstrap_interval([0.1, 0.9, 0.4], 500, 7) == bootstrap_interval([0.1, 0.9, 0.4], 500, 7)
    empty = bootstrap_interval([], 500, 0)
    assert empty.count == 0
    assert math.isnan(empty.mean)


def test_paired_comparison_sees_what_the_spread_of_tasks_hides() -> None:
    """Each task improves by 0.05 +- 0.02 while tasks differ by far more: only pairing can tell."""
    rng = np.random.default_rng(1)
    before = rng.random(40)
    after = before + rng.normal(0.05, 0.02, 40)
    difference = paired_difference(before.tolist(), after.tolist(), 2000, 0)
    assert difference.p_value < 0.05
    assert difference.mean == pytest.approx(0.05, abs=0.01)
    assert difference.low > 0


def test_paired_comparison_rejects_at_about_its_level_when_nothing_changed() -> None:
    rng = np.random.default_rng(2)
    rejected = sum(
        paired_difference(rng.random(30).tolist(), rng.random(30).tolist(), 400, number).p_value < 0.05
        for number in range(200)
    )
    assert 1 <= rejected <= 26  # 5 % of 200 is 10


@pytest.mark.parametrize("values", [[0.3] * 10, [0.0] * 5])
def test_equal_rows_are_never_significant(values: list[float]) -> None:
    assert paired_difference(values, values, 500, 0).p_value == 1.0


def test_p_value_never_claims_more_than_the_flips_show() -> None:
    assert paired_difference([0.0] * 40, [1.0] * 40, 500, 0).p_value == pytest.approx(1 / 501)


@pytest.mark.parametrize(
    ("won", "tied", "exact"), [(1, 0, 1.0), (3, 0, 0.25), (4, 20, 0.125), (8, 0, 2 / 256)]
)
def test_p_value_is_the_exact_tests_with_few_tasks(won: int, tied: int, exact: float) -> None:
    """Two-sided: all signs equal in 2 of 2^won cases. A bootstrap of three wins in three never sees a loss, whatever chance is."""
    rows = [0.1] * (won + tied), [0.4] * won + [0.1] * tied
    assert paired_difference(*rows, 20_000, 0).p_value == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize("count", [4, 8, 12])
def test_paired_comparison_keeps_its_level_with_few_tasks(count: int) -> None:
    rng = np.random.default_rng(count)
    differences = rng.normal(0, 1, (400, count))
    rejected = sum(
        paired_difference([0.0] * count, row.tolist(), 400, number).p_value < 0.05
        for number, row in enumerate(differences)
    )
    assert rejected <= 34  # 5 % of 400 is 20, its standard error 4.4


def test_nested_interval_is_as_wide_as_groups_that_rise_and_fall_together() -> None:
    """Twelve cards of one write that all succeed or all fail are one piece of evidence, not twelve."""
    together = [[1.0] * 12, [0.0] * 12, [1.0] * 12, [0.0] * 12]
    apart = [[1.0, 0.0] * 6] * 4
    wide, narrow = nested_interval(together, 4000, 0), nested_interval(apart, 4000, 0)
    assert wide.mean == narrow.mean == 0.5 and wide.count == narrow.count == 48
    assert (wide.low, wide.high) == (0.0, 1.0)
    assert narrow.high - narrow.low < 0.4


def test_nested_interval_of_one_group_is_the_plain_one() -> None:
    values = np.random.default_rng(3).random(30).tolist()
    nested, plain = nested_interval([values], 4000, 0), bootstrap_interval(values, 4000, 0)
    assert (nested.low, nested.high) == pytest.approx((plain.low, plain.high), abs=0.02)
    assert nested_interval([[], []], 100, 0).count == 0


def test_nested_interval_weighs_values_not_groups() -> None:
    interval = nested_interval([[1.0] * 30, [0.0] * 10], 2000, 0)
    assert interval.mean == 0.75 and interval.low <= 0.75 <= interval.high


def test_comparison_needs_the_same_tasks() -> None:
    with pytest.raises(ValueError, match="one value per task on both sides, got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0], 10, 0)


def test_rows_are_compared_on_the_tasks_that_both_finished() -> None:
    before = RowResult("a", 0, (episode(0, 0.0), episode(1, 0.2), episode(2, 0.5)), ("engine: gone",))
    after = RowResult("b", 1, (episode(1, 0.4), episode(2, 0.7), episode(9, 1.0)), ())
    difference = compare(before, after, "f1", 200, 0)
    assert difference.count == 2
    assert difference.mean == pytest.approx(0.2)


def test_sentence_says_plainly_what_was_shown() -> None:
    low, high = row("TMEM before", [0.1, 0.2] * 20), row("TMEM after RL", [0.4, 0.6] * 20)
    gain = Comparison("TMEM before", "TMEM after RL", "f1", compare(low, high, "f1", 500, 0), 0.01).sentence
    loss = Comparison("TMEM after RL", "TMEM before", "f1", compare(high, low, "f1", 500, 0), 0.01).sentence
    nothing = Comparison("TMEM before", "TMEM before", "f1", compare(low, low, "f1", 500, 0), 1.0).sentence
    assert "+35.0 points" in gain
    assert "a significant gain" in gain
    assert "significant LOSS" in loss
    assert "NOT significant" in nothing
    assert "p = 1.000" in nothing


def test_no_shared_task_is_said() -> None:
    empty = RowResult("b", 0, (), ("engine: gone",))
    assert (
        "nothing can be compared"
        in Comparison("a", "b", "f1", compare(row("a", [0.5]), empty, "f1", 10, 0), math.nan).sentence
    )


def test_table_shows_rows_intervals_writes_and_failures() -> None:
    report = Report(
        (row("memory off", [0.0, 0.0]), row("TMEM", [0.25, 0.75], ("engine: gone",))), (0.1, 0.2), 200, 0, 0.0
    )
    cells = report.cells()
    assert cells[0][:2] == ("memory off", "2")
    assert cells[1][1] == "2 (1 failed)"
    assert cells[1][2].startswith("50.0 [25.0, 75.0")
    assert cells[1][4] == "2/4/0"
    header, lines = report.category_cells("official")
    assert header == ("official %", "questions", "memory off", "TMEM")
    assert lines == [("home", "1", "0.0", "37.5"), ("work", "1", "0.0", "12.5")]
    assert [column.header for column in rich_table("x", HEADER, cells).columns][2] == r"F1 % \[95% CI]"


def test_report_files(tmp_path: Path) -> None:
    report = Report(
        (row("before", [0.1, 0.2]), row("after", [0.4, 0.6]), RowResult("empty", 0, (), ("engine: gone",))),
        (0.1, 0.3),
        200,
        0,
        0.7,
    )
    comparisons = report.comparisons([("before", "after"), ("before", "never measured")])
    assert [comparison.after for comparison in comparisons] == ["after"]
    paths = {path.name: path for path in save_report(report, comparisons, tmp_path)}
    assert set(paths) == {"report.md", "report.csv", "report.json", "reward.png"}
    text = paths["report.md"].read_text()
    assert "| before | 2 |" in text
    assert text.startswith("# Held-out evaluation, sampled at temperature 0.7\n")
    assert "## official by category" in text
    with paths["report.csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines if line["score"] == "f1"] == ["before", "after", "empty"]
    assert float(lines[0]["mean"]) == pytest.approx(0.15)
    data = json.loads(
        paths["report.json"].read_text(), parse_constant=pytest.fail
    )  # JSON has no NaN: other programs would stumble
    assert data["rows"][2]["scores"]["f1"]["mean"] is None
    assert data["rewards"] == [0.1, 0.3]
    assert paths["reward.png"].read_bytes().startswith(b"\x89PNG")


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    measured = row("TMEM", [0.25, 0.75], ("engine: gone",))
    save_row(measured, tmp_path / "evaluation" / "before.json")
    assert load_row(tmp_path / "evaluation" / "before.json") == measured


def test_a_row_of_another_version_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "before.json"
    path.write_text('{"label": "TMEM", "policy_version": 0, "episodes": [{"task_id": "t0"}], "failed": []}')
    with pytest.raises(CheckpointError, match=r"before\.json: is not a row as this version .* delete it"):
        load_row(path)


def test_row_metrics_by_category_and_write_outcome() -> None:
    metrics = row_metrics(row("TMEM", [0.25, 0.75]), "before")
    assert metrics["eval/before/f1"] == 0.5
    assert metrics["eval/before/f1_home"] == 0.75
    assert metrics["eval/before/writes_empty"] == 4
    assert metrics["eval/before/official"] == 0.25
    assert all(math.isfinite(value) for value in row_metrics(RowResult("x", 0, (), ()), "x").values())


class _Worker:
    """Answers task i with reward i / 10; refuses task 3."""

    name = "w"

    def __init__(self) -> None:
        self.running = 0
        self.most = 0

    async def episode(self, position: int, task: object, row: EvaluationRow) -> object:
        import asyncio

        from tests.unit.cluster_cases import group, task_at

        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001 * (5 - position % 5))
        self.running -= 1
        if position == 3:
            return group(task_at(position), 4, finished=0, failed=1)
        return group(task_at(position), 4, rewards=[position / 10])


def test_evaluation_runs_every_task_once_in_order_within_its_lanes() -> None:
    import asyncio

    from tests.unit.cluster_cases import task_at

    worker, done = _Worker(), []
    tasks = [task_at(position) for position in range(8)]
    result = asyncio.run(
        evaluate_row(EvaluationRow("TMEM", MemoryConfig(), 0), tasks, [worker], 3, lambda: done.append(1))
    )  # type: ignore[list-item]
    assert [episode.task_id for episode in result.episodes] == [
        f"t{position}" for position in range(8) if position != 3
    ]
    assert result.episodes[4].mean("f1") == 0.5
    assert result.failed == ("engine: out of memory",)
    assert result.policy_version == 4
    assert worker.most == 3
    assert len(done) == 8
    assert result.episodes[0].prompt_tokens == 2
    assert result.episodes[0].generated_tokens == 2


def test_unanswerable_questions_are_reported_with_and_without() -> None:
    asked = (
        episode(0, 0.0, category="adversarial"),
        episode(1, 0.4, category="temporal"),
        episode(2, 0.6, category="multi-hop"),
    )
    _, lines = Report((RowResult("TMEM", 0, asked, ()),), (), 100, 0, 0.0).category_cells("f1")
    assert lines[-1] == ("all but adversarial", "2", "50.0")
    assert ("adversarial", "1", "0.0") in lines
