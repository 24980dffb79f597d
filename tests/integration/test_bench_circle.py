"""The circle benchmark on the tiny model: the real loop takes its steps under both staleness bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.types import Answer, Outcome, Task
from cluster.bench.circle import QUICK_STEPS, lottery, run
from cluster.bench.values import Context

pytestmark = pytest.mark.slow


def test_both_bounds_train(tiny_model_path: Path, tmp_path: Path) -> None:
    outcome = run(Context(tiny_model_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    (case,), (table,) = outcome.cases, outcome.tables
    assert case.goal is None and len(case.baseline_values) == len(case.candidate_values) == 1
    assert [row[0] for row in table.rows] == ["0", "1"] and table.rows[0][2] == "0.00", table
    assert float(table.rows[1][2]) <= 1 and QUICK_STEPS > 1


def test_the_lottery_tells_siblings_apart_and_is_the_same_again() -> None:
    def reward(said: str) -> float:
        return lottery(
            Task("t", "recall", {}, 0),
            Outcome(0.0, {}, (Answer("q", ("a",), said, "c", {"f1": 0.0, "em": 0.0}),)),
        )

    assert reward("a") == reward("a") != reward("b") and 0 <= reward("a") < 1
