"""The rollout benchmark on the tiny model: Engram's real rollout side, and vLLM alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.rollout import STEP_PHASES, run
from cluster.bench.values import Context

pytestmark = pytest.mark.slow


def test_both_sides_play_the_quickstarts_episodes(tiny_model_path: Path, tmp_path: Path) -> None:
    outcome = run(Context(tiny_model_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    (case,) = outcome.cases
    assert min(*case.baseline_values, *case.candidate_values) > 0 and case.ratio == "candidate/baseline"
    (timeline,) = outcome.tables
    assert [row[0] for row in timeline.rows] == [*STEP_PHASES, "all"]
    assert sum(outcome.figures[f"{phase}_fraction"] for phase in STEP_PHASES) == pytest.approx(1.0)
    for phase in ("act", "extract", "receipt", "write", "install"):
        assert outcome.figures[f"{phase}_fraction"] > 0
    assert outcome.figures["vllm_steps"] > 0 and outcome.figures["engine_steps"] > 0
