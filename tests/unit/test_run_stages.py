"""The stages of a run: which rows are measured, when, and on which workers."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.runs.checkpoint import START, TrainState
from cluster.train import run
from cluster.train.prepare import Start


def measured(monkeypatch: pytest.MonkeyPatch, rl_steps: int) -> list[tuple[str, int, str]]:
    rows: list[tuple[str, int, str]] = []

    class Board:
        def __init__(self, *parts: object) -> None: ...

        async def measure(self, key: str, step: int, workers: str) -> None:
            rows.append((key, step, workers))

        def forget(self, key: str) -> None: ...

        def report(self, rewards: tuple[float, ...]) -> None: ...

    async def warm_start(*parts: object) -> TrainState:
        return START

    async def reinforce(*parts: object) -> tuple[TrainState, str]:
        return replace(START, step=rl_steps), "those left"

    monkeypatch.setattr(run, "Scoreboard", Board)
    monkeypatch.setattr(run, "_warm_start", warm_start)
    monkeypatch.setattr(run, "_reinforce", reinforce)
    cluster: Any = SimpleNamespace(workers="the first")
    observers: Any = SimpleNamespace(tracker=SimpleNamespace(run_id="run"))
    nothing: Any = None
    asyncio.run(run._stages(cluster, nothing, nothing, Start(None, START, Path()), observers))
    return rows


def test_the_trained_policy_is_measured_last_on_the_workers_that_are_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = [("memory_off", 0, "the first"), ("before", 0, "the first")]
    assert measured(monkeypatch, 5) == [*first, ("after_rl", 5, "those left")]


def test_without_an_rl_step_no_row_says_after_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [key for key, _, _ in measured(monkeypatch, 0)] == ["memory_off", "before"]
