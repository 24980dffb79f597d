"""Computes a write that several siblings ask for once.

    siblings of a task --write--> SharedWrites --a write that nobody asked for yet--> WriteBatcher

A write follows from the fast weights that it begins at, its examples, what it preserves and its seed, which
is the task's. So two siblings that write the same flashcards ask for the same write. The better a policy
knows what to write, the more often they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import replace

from actors.protocols import AsyncWriter
from actors.types import FastWeights, WriteRequest, WriteResult


class SharedWrites:
    """The AsyncWriter of one group of siblings, who all live on one policy version."""

    def __init__(self, writer: AsyncWriter) -> None:
        self._writer = writer
        # The requests are kept so that no other fast weights take the identity of theirs.
        self._asked: dict[Hashable, tuple[WriteRequest, asyncio.Task[WriteResult]]] = {}

    async def write(self, request: WriteRequest) -> WriteResult:
        """Return the writer's result, marked ``shared`` for all but the first who asked for it.

        Raises what the writer raises. A sibling that gives up does not end the write for the others.
        """
        key = (_identity(request.weights), request.examples, request.preserved, request.seed)
        if key in self._asked:
            return replace(await self._result(key), shared=True)
        writing = asyncio.create_task(self._writer.write(request))
        writing.add_done_callback(_seen)
        self._asked[key] = (request, writing)
        return await self._result(key)

    async def _result(self, key: Hashable) -> WriteResult:
        return await asyncio.shield(self._asked[key][1])


def _identity(weights: FastWeights) -> Hashable:
    """Equal for the same fast weights. Siblings that shared a write hold the same object."""
    return weights.basis_id if weights.revision == 0 else id(weights)


def _seen(writing: asyncio.Task[WriteResult]) -> None:
    """Take note of a failure: where all siblings have given up, nobody else does."""
    if not writing.cancelled():
        writing.exception()
