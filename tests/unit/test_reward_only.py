"""An environment with a reward and no answers in every table: train, evaluate, compare, pool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.types import Answer
from cluster.common.errors import AllFailed
from cluster.common.failures import most_common_failures, one_cause
from cluster.compare.report import pool_groups
from cluster.compare.runs import load_groups
from cluster.evaluation.report import ComparisonReport, save_comparison
from cluster.evaluation.store import CellResult
from cluster.evaluation.summary import compare_rows, summarize
from cluster.measure.report import markdown
from cluster.measure.row_metrics import row_metrics
from cluster.measure.rows import EpisodeScore, RowResult, save_row
from cluster.train.report import save_report, training_report
from configs.load import load_config, to_yaml
from tests.unit.comparison_cases import MODEL, PEAK, plan

LOW, HIGH = [-1.0, 0.5, 2.0, 0.25] * 4, [3.0, 4.5, 5.0, 4.25] * 4
QUICKSTART = Path("tests/quickstart.yaml")


def _episode(number: int, reward: float, answers: tuple[Answer, ...] = ()) -> EpisodeScore:
    return EpisodeScore(f"t{number}", f"item {number}", reward, {}, answers, {}, {}, 1, 1, 1, 0.5)


def _row(label: str, rewards: list[float]) -> RowResult:
    return RowResult(label, 0, tuple(map(_episode, range(len(rewards)), rewards)), ())


def test_a_training_compares_rewards_where_there_is_no_answer(tmp_path: Path) -> None:
    rows = {"before": _row("before", LOW), "after_rl": _row("after", HIGH)}
    rows["before"] = RowResult("before", 0, rows["before"].episodes, ("environment: x (a.py:1)",))
    report = training_report(rows, [0.1], 0.0)
    text = markdown(report.document())
    assert "| row | tasks | failed | reward [95% CI] |" in text and "F1" not in text
    assert "| after | 16 | 0 | 4.188 [" in text and "-" not in report._scores().rows[1]
    (comparison,) = report.comparisons
    assert comparison.sentence.startswith("after against before: reward +3.750 [")
    assert "a significant gain" in comparison.sentence
    assert "with all 1 failed episodes counted as 0, reward would be 0.412" in text
    assert row_metrics(rows["after_rl"], "after_rl")["eval/after_rl/reward"] == pytest.approx(4.1875)
    assert {path.name for path in save_report(report, tmp_path)} >= {"rows.png", "report.json"}
    assert json.loads((tmp_path / "report.json").read_text())["rows"][1]["scores"]["reward"]["mean"] > 4


def test_a_reward_that_is_not_f1_stands_beside_it() -> None:
    answer = Answer("q", ("a",), "a", "c", {"f1": 0.5, "em": 0.0})
    same = training_report({"before": RowResult("x", 0, (_episode(0, 0.5, (answer,)),), ())}, [], 0.0)
    other = training_report({"before": RowResult("x", 0, (_episode(0, 0.9, (answer,)),), ())}, [], 0.0)
    assert same._scores().header == ("row", "tasks", "failed", "F1 % [95% CI]", "EM % [95% CI]")
    assert other._scores().header == (*same._scores().header, "reward [95% CI]") and other.score == "f1"


def test_an_evaluation_compares_rewards(tmp_path: Path) -> None:
    planned = plan("truncation", "tmem", seeds=(0,))
    results = {
        cell.key: CellResult(_row(cell.variant.label, rewards), PEAK)
        for cell, rewards in zip(planned.cells, (LOW, HIGH), strict=True)
    }
    rows = summarize(planned.cells, results, {})
    costs = tuple(row.cost(MODEL, 4) for row in rows)
    report = ComparisonReport({}, rows, costs, compare_rows(rows, (("tmem", "truncation"),)))
    text = markdown(report.document())
    assert "| row | tasks | failed | reward [95% CI] | reward against truncation | p | Holm p |" in text
    assert "| tmem | 16 | 0 | 4.188 [" in text and "| +3.750 [" in text
    assert "tmem against truncation: reward +3.750 [" in text and "nothing can be compared" not in text
    names = {path.name for path in save_comparison(report, tmp_path / "report")}
    assert {"recall-rows.png", "recall-cost-tokens.png"} <= names


def test_a_pool_compares_rewards(tmp_path: Path) -> None:
    for seed in range(3):
        run = tmp_path / f"a-{seed}"
        (run / "report").mkdir(parents=True)
        (run / "config.yaml").write_text(to_yaml(load_config(QUICKSTART, ["name=a", f"seed={seed}"])))
        save_row(_row("before", LOW), run / "evaluation" / "before.json")
        save_row(_row("after", HIGH), run / "evaluation" / "after_rl.json")
        (run / "report" / "report.json").write_text(json.dumps({"rewards": [0.1], "rows": []}))
    text = markdown(pool_groups(load_groups([tmp_path / f"a-{seed}" for seed in range(3)])).document())
    assert "| runs | stage | tasks | reward [95 % CI] | failed |" in text
    assert "| seeds | reward [95 % CI] | p |" in text and "| +3.750 [" in text
    assert "+3.750, +3.750, +3.750" in text


def test_failures_of_one_cause_are_one_line() -> None:
    at = "environment: the environment shop's act: ValueError: not a number: {} (my_env.py:8)"
    texts = [
        at.format("a"),
        at.format("b"),
        "environment: task t1: no field",
        "environment: task t2: no field",
    ]
    assert most_common_failures([*texts, at.format("c")], 3) == [
        (at.format("a"), 3),
        ("environment: task t1: no field", 2),
    ]
    assert one_cause(texts[:2]) == f"all 2 episodes failed alike: {at.format('a')}"
    assert one_cause(texts) == "" and one_cause(["engine: no room"] * 3) == ""
    assert issubclass(AllFailed, RuntimeError)
