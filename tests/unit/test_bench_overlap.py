"""The overlap benchmark runs the real loop: overlapped steps are never slower than taking turns, and both train every group."""

from __future__ import annotations

from pathlib import Path

from cluster.bench import overlap
from cluster.bench.values import Context


def test_rollouts_and_learning_overlap_where_staleness_allows(tmp_path: Path) -> None:
    outcome = overlap.run(Context(tmp_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    assert [case.name for case in outcome.cases] == ["a step, staleness 1", "a step, staleness 2"]
    (table,) = outcome.tables
    assert float(table.rows[0][2]) == 0.0 and all(float(row[2]) > 0 for row in table.rows[1:])
