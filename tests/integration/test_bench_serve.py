"""The benchmark of the endpoint, on the tiny model: both real servers, each in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bench import serve
from cluster.bench.values import BenchError, Context

pytestmark = pytest.mark.slow


@pytest.fixture
def context(tiny_model_path: Path, tmp_path: Path) -> Context:
    return Context(tiny_model_path, repeats=1, threads=1, quick=True, folder=tmp_path)


@pytest.mark.timeout(600)
def test_both_servers_answer_the_same_requests(context: Context) -> None:
    speed, first = serve.run(context).cases
    assert (speed.unit, first.unit) == ("tokens/s", "s")
    for case in (speed, first):
        assert min(case.baseline_values) > 0 and min(case.candidate_values) > 0


def test_a_server_that_does_not_start_is_named_with_its_last_line(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such port')"]
    monkeypatch.setattr(serve, "_vllm_command", lambda *_: command)
    with pytest.raises(BenchError, match=r"the server of vllm did not start: ended \(1\): no such port"):
        serve.run(replace(context, repeats=1))
