"""The stages of a run: which rows are measured, and when."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.runs.checkpoint import START, TrainState
from cluster.train import run


def measured(monkeypatch: pytest.MonkeyPatch, rl_steps: int) -> list[tuple[str, int]]:
    rows: list[tuple[str, int]] = []

    class Board:
        def __init__(self, *parts: object) -> None: ...

        async def measure(self, key: str, step: int) -> None:
            rows.append((key, step))

        def forget(self, key: str) -> None: ...

        def report(self, rewards: tuple[float, ...]) -> None: ...

    async def warm_start(*parts: object) -> tuple[TrainState, None]:
        return START, None

    async def reinforce(*parts: object) -> TrainState:
        return replace(START, step=rl_steps)

    monkeypatch.setattr(run, "Scoreboard", Board)
    monkeypatch.setattr(run, "_warm_start", warm_start)
    monkeypatch.setattr(run, "_reinforce", reinforce)
    preparation = SimpleNamespace(checkpoint=None)
    asyncio.run(run._stages(SimpleNamespace(workers=[]), preparation, None, None, START, None))  # type: ignore[arg-type]
    return rows


def test_the_trained_policy_is_measured_last(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, 5) == [("memory_off", 0), ("before", 0), ("after_rl", 5)]


def test_without_an_rl_step_no_row_says_after_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(monkeypatch, 0) == [("memory_off", 0), ("before", 0)]
