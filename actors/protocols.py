"""The boundaries of the rollout side, each a Protocol of one to three verbs.

run_episode  --act-->  Policy (vLLM engine)           generate, install, release
run_episode  --write-> FastWeightWriter               write
run_episode  --step--> Environment / Session          environments/base.py
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


class EngineError(RuntimeError):
    """The engine could not generate, install or refresh. The message says what was asked and what to do."""


class ReceiptError(RuntimeError):
    """An installed adapter does not act as the writer's own forward says it should."""


class WriterError(RuntimeError):
    """The writer failed for a reason that is not the write's own (a diverged write is a rolled-back result, not an error)."""


class Policy(Protocol):
    """theta + Delta behind three verbs. One coroutine per episode; calls of many episodes run as one batch."""

    @property
    def version(self) -> PolicyVersion: ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        """Continue ``prompt_ids`` under ``adapter`` (installed before, or revision 0). Raises EngineError."""
        ...

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        """Make ``weights`` act under ``key``; with a probe, prove that it does. Raises EngineError, ReceiptError."""
        ...

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        """Forget adapters that no request will name again."""
        ...


class FastWeightWriter(Protocol):
    """The write operator T of TMEM, arXiv 2606.04536: examples of many episodes -> the next revision of each, as one batched computation."""

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """One result per request, in order. Episodes never influence each other's result. Raises WriterError."""
        ...


class AsyncWriter(Protocol):
    """What an episode sees of the writer: its own request, batched with the others' by rollout.py."""

    async def write(self, request: WriteRequest) -> WriteResult: ...


class TaskError(RuntimeError):
    """The environment cannot go on with this task; the message names task, item and field."""
