"""The boundaries of the rollout side: Protocols of one to three verbs, and the errors that cross them.

play_episode --act-->  Policy (vLLM engine)           generate, install, release
play_episode --write-> FastWeightWriter               write
play_episode --step--> Environment / Session          environments/base.py

Each error class names a boundary. The rollout (actors/episodes/rollout.py) catches it there and makes one
failed episode of it; its siblings go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from actors.types import (
    AdapterKey,
    FastWeights,
    Generation,
    PolicyVersion,
    Probe,
    Sampling,
    WriteRequest,
    WriteResult,
)

# --- errors ------------------------------------------------------------------------------------------------


class EngineError(RuntimeError):
    """The engine could not generate, install or refresh. The message says what was asked and the cure."""


class ReceiptError(RuntimeError):
    """An installed adapter does not act as the writer's own forward says it should."""


class WriterError(RuntimeError):
    """The writer failed. A diverged write is no such error: its result says "rolled_back"."""


class TaskError(RuntimeError):
    """The environment cannot go on with this task. The message names task, item and field.

    What a user's own environment or reward raises becomes one, with their file and line.
    """


class MemoryFault(RuntimeError):
    """The memory policy of an episode failed. The message has the file and line."""


# --- protocols ---------------------------------------------------------------------------------------------


class Policy(Protocol):
    """theta + Delta behind three verbs. One coroutine per episode; the engine batches their calls."""

    @property
    def version(self) -> PolicyVersion: ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        """Continue ``prompt_ids`` under ``adapter``: an installed one, or revision 0. Raises EngineError."""
        ...

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        """Make ``weights`` act under ``key``. With a probe, prove that they do.

        Raises EngineError, ReceiptError.
        """
        ...

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        """Forget adapters that no request will name again."""
        ...


class FastWeightWriter(Protocol):
    """The write operator T (TMEM, arXiv 2606.04536), batched over episodes: examples -> next revision."""

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """Return one result per request, in order; no episode influences another's. Raises WriterError."""
        ...


class AsyncWriter(Protocol):
    """The writer as one episode sees it. rollout.py batches the requests of concurrent episodes."""

    async def write(self, request: WriteRequest) -> WriteResult: ...
