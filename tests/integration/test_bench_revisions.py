"""The revisions benchmark on the tiny model, end to end: it runs and measures each part."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.run import section
from cluster.bench.suite import Runner
from cluster.bench.values import Context

pytestmark = pytest.mark.slow


def test_the_benchmark_measures_every_part(tiny_model_path: Path, tmp_path: Path) -> None:
    context = Context(tiny_model_path, repeats=2, threads=1, quick=True, folder=tmp_path)
    outcome = Runner().run("revisions", context)
    assert [case.name for case in outcome.cases] == [
        "install, each of 4",
        "install and slot load, each of 4",
        "decode, 4 sequences",
        "prefill, 4 sequences",
        "adapters of a step, 2 active of 4",
        "adapters of a step, 2 active of 4, limit",
        "adapters of a step, 4 active of 8",
        "adapters of a step, 4 active of 8, limit",
    ]
    for case in outcome.cases:
        assert len(case.candidate_values) == 2 and min(case.baseline_values + case.candidate_values) > 0
    install, both = (case.candidate_values for case in outcome.cases[:2])
    assert all(slot_too > alone for alone, slot_too in zip(install, both, strict=True))
    assert [row[0] for row in outcome.tables[0].rows] == ["decode, 4 sequences", "prefill, 4 sequences"]
    cases, *_ = section("revisions", outcome).tables
    assert "decode, 4 sequences" in [row[0] for row in cases.rows]
