"""Waits: with a deadline that counts only the time in which this process ran, and before another try."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_FIRST_S, _LONGEST_S = 1.0, 60.0

T = TypeVar("T")
_SLICE_S = 5.0


async def within(deadline_s: float, value: Coroutine[Any, Any, T]) -> T:
    """Wait for ``value``. Raises TimeoutError after ``deadline_s`` in which this process ran.

    It waits in slices: a driver that was stopped (Ctrl-Z, a paused machine, a suspended job) goes on with the
    time that was left, and finds the answers that came meanwhile.
    """
    task, left = asyncio.ensure_future(value), deadline_s
    try:
        while left > 0:
            part = min(_SLICE_S, left)
            done, _ = await asyncio.wait({task}, timeout=part)
            if done:
                return task.result()
            left -= part
        raise TimeoutError
    finally:
        task.cancel()


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: none after the first, then 1, 2, 4 ... up to 60."""
    return 0.0 if failures <= 1 else min(_LONGEST_S, _FIRST_S * 2.0 ** (failures - 2))
