"""Waits with a deadline that counts only the time in which this process ran."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

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
