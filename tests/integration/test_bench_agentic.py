"""The benchmark of siblings that wait, on the tiny model: the real engine, a sync and an async tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.agentic import QUICK_TOOL_S, run
from cluster.bench.values import Context

pytestmark = pytest.mark.slow


def test_siblings_wait_for_their_tools_together(tiny_model_path: Path, tmp_path: Path) -> None:
    outcome = run(Context(tiny_model_path, repeats=1, threads=1, quick=True, folder=tmp_path))
    assert [case.name for case in outcome.cases] == ["sync tool, a turn", "async tool, a turn"]
    for case in outcome.cases:
        assert min(case.baseline_values) > QUICK_TOOL_S and min(case.candidate_values) > QUICK_TOOL_S
    assert set(outcome.figures) == {"turn_s_sync", "turn_s_async"}
