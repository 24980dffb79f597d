"""One answer while it comes, and clients that go away before it is there.

    answer(hear) --task--> hear(choice, text) --queue--> pieces();  at the end whole()

Every wait, and who unblocks it: ``first`` and ``pieces`` wait for the task's next text or its end, which
comes by the request's deadline. ``Stream.leave`` and a client that goes away cancel the task; it undoes its
turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Generic, TypeVar

from fastapi import Request

T = TypeVar("T")
Hear = Callable[[int, str], None]


class GoneError(Exception):
    """The client has closed its connection: nobody waits for the answer any more."""


class Stream(Generic[T]):
    """The texts of one answer as they come, then the answer."""

    def __init__(self, answer: Callable[[Hear], Coroutine[Any, Any, T]]) -> None:
        self._pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._task = asyncio.create_task(answer(lambda choice, text: self._pieces.put_nowait((choice, text))))
        self._task.add_done_callback(lambda _: self._pieces.put_nowait(None))
        self._first: tuple[int, str] | None = None

    async def first(self) -> None:
        """Wait until something is there to send. Raises what the answer fails with before that."""
        self._first = await self._pieces.get()
        if self._first is None:
            self._task.result()

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """(choice, new text), after ``first``."""
        piece = self._first
        while piece is not None:
            yield piece
            piece = await self._pieces.get()

    async def whole(self) -> T:
        """The whole answer. Raises what it failed with."""
        return await asyncio.shield(self._task)

    def leave(self) -> None:
        """Give the answer up, unless it is there."""
        self._task.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``. Cancel it and raise GoneError when the client goes away.

    The request's body must have been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
