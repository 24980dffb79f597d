"""A deadline counts the time in which the process ran, not that in which somebody had stopped it."""

from __future__ import annotations

import asyncio
import time

import pytest

from cluster.common import patience


async def _after(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return 7


def test_a_process_that_was_stopped_takes_the_answer_that_came_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "_SLICE_S", 0.05)

    async def body() -> int:
        waiting = asyncio.create_task(patience.within(0.5, _after(0.1)))
        await asyncio.sleep(0)
        time.sleep(1.0)  # nothing of this process runs, as under SIGSTOP
        return await waiting

    assert asyncio.run(body()) == 7


def test_what_does_not_answer_is_late_and_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_SLICE_S", 0.05)
    ended: list[str] = []

    async def never() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def body() -> None:
        with pytest.raises(TimeoutError):
            await patience.within(0.12, never())
        await asyncio.sleep(0)

    asyncio.run(body())
    assert ended == ["cancelled"]


def test_what_it_raises_is_raised() -> None:
    async def fails() -> None:
        raise ValueError("of the worker")

    with pytest.raises(ValueError, match="of the worker"):
        asyncio.run(patience.within(60, fails()))
