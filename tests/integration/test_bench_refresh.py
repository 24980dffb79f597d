"""The refresh benchmark on the tiny model: real learner, Ray and engine. Its figures mean nothing here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.harness import child
from cluster.bench.suite import Runner
from cluster.bench.values import Context, Goal, Outcome

pytestmark = pytest.mark.slow


def test_the_stages_of_a_refresh_are_measured_beside_a_memcpy(tiny_model_path: Path, tmp_path: Path) -> None:
    with child("refresh", Runner, ()) as process:
        outcome = process.call("run", ("refresh", Context(tiny_model_path, 2, 1, True, tmp_path)), 300)
    assert isinstance(outcome, Outcome)
    all_weights, changed = outcome.cases
    assert all_weights.goal == Goal("at most", 10)
    assert len(all_weights.candidate_values) == 2 and changed.baseline_values == all_weights.candidate_values
    for name in ("all", "changed"):
        parts = [outcome.figures[f"{name}_{part}_s"] for part in ("publish", "fetch", "load")]
        assert min(parts) > 0
    assert outcome.figures["floor_over_memcpy"] > 1 and len(outcome.tables[0].rows) == 3
