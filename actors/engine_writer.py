"""The writer inside the rollout process: writes run on the engine's step thread, between two steps, on the engine's own weights.

    episodes --write--> WriteBatcher --(one call for all that wait)--> EngineWriter --> step thread: ... step, write, install, step ...

So engine and writer never compete for cores, no lock guards the weights, and a refresh cannot come in the middle of a write.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

from actors.engine_loop import StepLoop
from actors.engine_weights import EngineWeights
from actors.fast_weights import Basis
from actors.frozen_model import FrozenModel
from actors.protocols import EngineError
from actors.types import WriteRequest, WriteResult
from actors.writer import BatchedWriter
from configs.schema import WriteConfig

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

WRITE_TIMEOUT_S = 900.0


class EngineWriter:
    """FastWeightWriter of one engine, made by ``VLLMPolicy.writer``. ``write`` blocks its caller: not for an event loop's thread."""

    def __init__(self, loop: StepLoop[LLMEngine], weights: EngineWeights, basis: Basis, config: WriteConfig) -> None:
        self._loop, self._weights, self._basis, self._config = loop, weights, basis, config
        self._built: tuple[FrozenModel, BatchedWriter] | None = None

    def write(self, requests: Sequence[WriteRequest]) -> list[WriteResult]:
        """See BatchedWriter.write. Raises what that raises, or EngineError when the engine is dead or ``WRITE_TIMEOUT_S`` pass."""
        try:
            results, error = self._loop.call(lambda engine: self._attempt(requests), "write").result(WRITE_TIMEOUT_S)
        except FutureTimeoutError:
            raise EngineError(f"a write of {len(requests)} episodes did not end within {WRITE_TIMEOUT_S:.0f} s on the engine's step thread") from None
        if error is not None:
            raise error
        return results

    def _attempt(self, requests: Sequence[WriteRequest]) -> tuple[list[WriteResult], Exception | None]:
        """On the step thread. A write only reads the engine, so whatever it raises is its callers', and the engine goes on."""
        try:
            return self._current().write(requests), None
        except Exception as error:  # noqa: BLE001  (handed to the caller, who raises it)
            return [], error

    def _current(self) -> BatchedWriter:
        """Over the present weights: a refresh makes another model."""
        if self._built is None or self._built[0] is not self._weights.model:
            self._built = (self._weights.model, BatchedWriter(self._weights.model, self._basis, self._config))
        return self._built[1]
