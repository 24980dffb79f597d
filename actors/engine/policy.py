"""vLLM behind the Policy protocol: act under theta + Delta, install a revision, refresh theta.

    policy = VLLMPolicy(path, model, engine, basis, stop_token_ids, version=0, threads=1, seed=0)
    writer = policy.writer(write)                        # on the engine's own weights, between its steps
    key = AdapterKey(0, "episode-7", 1)
    await policy.install(key, weights, probe)            # ReceiptError: not what the writer computed
    generation = await policy.generate(prompt_ids, sampling, key)
    await policy.release([key])
    await policy.refresh(1, tensors, complete=True)      # no request may run; all adapters are forgotten

One engine lives in this process. A thread of its own steps it (step_loop.py); vllm_internals/ is the part
inside vLLM's worker. Every coroutine here waits for that thread, which resolves its future between two steps.

Revision 0 is the base model itself: no adapter is named and nothing is added, so Delta = 0 costs nothing.
Log-probs are log_softmax(z / T) of the sampled token, of z when greedy. No top-p, top-k or penalty touches z,
except where a client of ``serve`` asks for one (``speak``).
Method: TMEM, arXiv 2606.04536, the policy pi_{theta + Delta}.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.engine.adapters import AdapterTable, as_tensors, check_receipt
from actors.engine.sampling import Outputs, parameters
from actors.engine.start import (
    build_engine,
    load_weights,
    model_of,
    prepare_environment,
    read_vocabulary,
    shut_down,
)
from actors.engine.step_loop import Phase, RequestKind, StepLoop
from actors.engine.writer import EngineWeights, EngineWriter
from actors.fast_weights.delta import Basis, BasisError, check
from actors.protocols import EngineError, ReceiptError
from actors.speech import Decoding, Heard, RefusedError, Spoken
from actors.types import AdapterKey, FastWeights, FinishReason, Generation, PolicyVersion, Probe, Sampling
from configs.schema import EngineConfig, ModelConfig, WriteConfig
from configs.tolerances import receipt_tolerance

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine


START_TIMEOUT_S = 900.0
REFRESH_TIMEOUT_S = 900.0
CLOSE_TIMEOUT_S = 60.0

_PLAINLY = Decoding()
_SCORING = Sampling(0.0, 1, 0, "act")
"""Of a request that scores its prompt: the one token that vLLM has to sample is of no use."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counted since the engine started.

    receipts_unseen: receipts that passed although the write moved the probe by less than the tolerance. They
    prove little.
    seconds: the step thread's by phase, see step_loop.LoopTimes.
    install_seconds: the callers', with their waits and receipts.
    """

    prompt_tokens: int
    generated_tokens: int
    installs: int
    receipts_passed: int
    receipts_failed: int
    receipts_unseen: int
    install_seconds: float
    refreshes: int
    steps: int
    seconds: Mapping[Phase, float]


@dataclass(slots=True)
class _Counters:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    installs: int = 0
    receipts_passed: int = 0
    receipts_failed: int = 0
    receipts_unseen: int = 0
    install_seconds: float = 0.0
    refreshes: int = 0


class VLLMPolicy:
    """actors.protocols.Policy on vLLM. The constructor blocks until the engine is up; it raises EngineError.

    threads: the CPU threads of the step thread. stop_token_ids: each ends a generation. ``tokenizer``: vLLM
    loads it, so that replies can keep to a JSON schema.
    Invariant: an adapter name that was used once is never used again. So the prefix cache, which is keyed by
    that name, cannot hold another adapter's keys and values.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        model: ModelConfig,
        engine: EngineConfig,
        basis: Basis,
        stop_token_ids: tuple[int, ...],
        version: PolicyVersion,
        threads: int,
        seed: int,
        tokenizer: bool = False,
    ) -> None:
        self._config, self._basis, self._stop = engine, basis, stop_token_ids
        self._tolerance = receipt_tolerance(engine, model)
        self._table = AdapterTable(version)
        self._request_ids = itertools.count()
        self._counters = _Counters()
        prepare_environment(threads)
        self._vocabulary = read_vocabulary(model_path, model, engine)
        self._loop: StepLoop[LLMEngine] = StepLoop(
            "the vLLM engine",
            lambda: build_engine(
                model_path, model, engine, basis, threads=threads, seed=seed, tokenizer=tokenizer
            ),
            shut_down,
            START_TIMEOUT_S,
        )
        weights = self._loop.call(
            lambda engine: EngineWeights(model_of(engine), Path(model_path), basis), "other"
        )
        self._weights = weights.result(START_TIMEOUT_S)
        named = self._loop.call(lambda engine: engine.set_weight_version(str(version)), "other")
        named.result(START_TIMEOUT_S)

    @property
    def version(self) -> PolicyVersion:
        return self._table.version

    @property
    def failure(self) -> str:
        """Why the engine is dead, "" while it serves."""
        return self._loop.failure

    def writer(self, config: WriteConfig) -> EngineWriter:
        """A writer on this engine's weights. It follows every refresh."""
        return EngineWriter(self._loop, self._weights, self._basis, config)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        """Sample a continuation of ``prompt_ids``. Cancelling the coroutine aborts the request.

        The generation ends with reason "length" where ``engine.max_model_tokens`` cuts it short.
        Raises EngineError for an adapter that is not installed, another policy version, token ids outside the
        vocabulary, a prompt that leaves no room in ``engine.max_model_tokens``, or a dead engine.
        """
        plain = parameters(sampling, _PLAINLY, self._stop)
        output = await self._run(prompt_ids, plain, adapter, sampling.kind)
        sampled = output.outputs[0]
        reason: FinishReason = "stop" if sampled.finish_reason == "stop" else "length"
        self._counters.generated_tokens += len(sampled.token_ids)
        versions = tuple(
            int(span.version) for span in sampled.weight_versions for _ in range(span.start, span.end)
        )
        return Generation(tuple(sampled.token_ids), tuple(sampled.logprobs.logprobs), reason, versions)

    async def speak(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        adapter: AdapterKey,
        decoding: Decoding,
        heard: Heard,
    ) -> Spoken:
        """Sample for a client, see actors/speech.py. Cancelling it aborts the request."""
        asked = parameters(sampling, decoding, self._stop, as_it_comes=True)
        outputs = Outputs()
        done = self._request(prompt_ids, asked, adapter, sampling.kind, outputs.put)
        self._counters.prompt_tokens += len(prompt_ids)
        spoken = await outputs.listen(done, heard)
        self._counters.generated_tokens += len(spoken.generation.token_ids)
        return spoken

    async def score(self, token_ids: Sequence[int], adapter: AdapterKey) -> list[float]:
        """Log-probs (T = 1) of tokens 1..n-1 of ``token_ids`` under ``adapter``, each given those before it.

        Raises EngineError as ``generate`` does.
        """
        one_token = parameters(_SCORING, _PLAINLY, (), prompt_logprobs=True)
        output = await self._run(token_ids, one_token, adapter, "receipt")
        return list(output.prompt_logprobs.logprobs)

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        """Make ``weights`` act under ``key``.

        With a probe and ``engine.receipts: always`` the engine scores the probe: the receipt that it acts.
        Raises EngineError (another version, a used name, weights of another basis or shape) and ReceiptError.
        After an error nothing stays installed.
        """
        started = time.perf_counter()
        if key.revision == 0 or key.revision != weights.revision:
            raise EngineError(
                f"cannot install revision {weights.revision} as {key.name}: "
                "the revisions must be equal, and 0 is the base model itself"
            )
        try:
            check(weights, self._basis)
        except BasisError as error:
            raise EngineError(f"cannot install {key.name}: {error}") from error
        tensors, version = as_tensors(weights), self.version
        stored = self._loop.call(lambda engine: self._table.put(engine, key, tensors), "install")
        await asyncio.wrap_future(stored)
        self._counters.installs += 1
        try:
            if probe is not None and self._config.receipts == "always":
                await self._demand_receipt(key, probe, version)
        except BaseException:
            # The receipt failed, or the caller was cancelled: the adapter goes, its name stays used.
            self._loop.post(lambda engine: self._drop(engine, [key]), "install")
            raise
        finally:
            self._counters.install_seconds += time.perf_counter() - started

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        """Forget adapters. Unknown keys and revision 0 are skipped.

        An adapter with unfinished requests goes at a later release, after the last of them has ended.
        """
        released = self._loop.call(lambda engine: self._drop(engine, keys), "install")
        await asyncio.wrap_future(released)

    async def refresh(
        self,
        version: PolicyVersion,
        tensors: Mapping[str, torch.Tensor],
        complete: bool,
        in_flight: bool = False,
    ) -> None:
        """Overwrite theta with ``tensors`` (Hugging Face names; a tied lm_head may be left out).

        ``complete`` demands all of the model's tensors; otherwise the others keep their values. Afterwards
        the prefix cache is empty, and every adapter of the old version is unknown.

        With ``in_flight`` requests may run: they sample on under the new weights, and the adapters stay,
        under their names. The keys and values of running requests are computed again, so each token's
        log-prob is that of one theta; Generation.versions tells which. A receipt that a refresh overtakes
        proves nothing and is left out.

        Raises EngineError, with the engine as it was, when requests run (unless ``in_flight``), the version
        goes backwards, or a name, a shape or a part of a packed matrix is wrong. When loading itself fails,
        the engine is dead.
        """
        done = self._loop.call(
            lambda engine: self._refresh(engine, version, tensors, complete, in_flight), "refresh"
        )
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), REFRESH_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineError(
                f"vLLM did not load version {version} within {REFRESH_TIMEOUT_S:.0f} s"
            ) from error

    def stats(self) -> EngineStats:
        times = self._loop.times
        return EngineStats(**asdict(self._counters), steps=times.steps, seconds=times.seconds)

    def close(self) -> None:
        """End the step thread and free vLLM's memory. Pending calls fail. Safe to call twice."""
        self._loop.close(CLOSE_TIMEOUT_S)

    # --- on the caller's event loop -------------------------------------------------------------------------

    async def _run(
        self, token_ids: Sequence[int], parameters: SamplingParams, adapter: AdapterKey, kind: RequestKind
    ) -> Any:
        output = await asyncio.wrap_future(self._request(token_ids, parameters, adapter, kind, None))
        self._counters.prompt_tokens += len(token_ids)
        return output

    def _request(
        self,
        token_ids: Sequence[int],
        parameters: SamplingParams,
        adapter: AdapterKey,
        kind: RequestKind,
        progress: Callable[[Any], None] | None,
    ) -> Future[Any]:
        ids = list(token_ids)
        limit = self._config.max_model_tokens
        if not 0 < len(ids) < limit:
            raise EngineError(
                f"a prompt of {len(ids)} tokens does not fit: it must have 1 to {limit - 1} "
                f"(engine.max_model_tokens={limit})"
            )
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise EngineError(
                f"a prompt holds token ids {min(ids)} to {max(ids)}, "
                f"the model has 0 to {self._vocabulary - 1}: it is another tokenizer's"
            )
        request_id = str(next(self._request_ids))
        add = functools.partial(
            self._add, request_id=request_id, ids=ids, parameters=parameters, adapter=adapter
        )
        return self._loop.request(request_id, adapter.name, kind, len(ids), add, progress)

    async def _demand_receipt(self, key: AdapterKey, probe: Probe, version: PolicyVersion) -> None:
        scored = await self.score(probe.token_ids, key)
        if self.version != version:
            return  # a refresh in flight overtook it: the probe is of the weights before
        try:
            seen = check_receipt(scored[-len(probe.after) :], probe, self._tolerance)
        except ReceiptError as error:
            self._counters.receipts_failed += 1
            raise ReceiptError(f"{key.name}: {error}") from error
        self._counters.receipts_passed += 1
        self._counters.receipts_unseen += not seen

    # --- on the step thread ---------------------------------------------------------------------------------

    def _drop(self, engine: LLMEngine, keys: Sequence[AdapterKey]) -> None:
        self._table.drop(engine, keys, self._loop.running_labels())

    def _add(
        self,
        engine: LLMEngine,
        request_id: str,
        ids: list[int],
        parameters: SamplingParams,
        adapter: AdapterKey,
    ) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        try:
            engine.add_request(
                request_id, tokens_input(ids), parameters, lora_request=self._table.find(adapter)
            )
        except (VLLMClientError, ValueError) as error:
            raise RefusedError(f"vLLM refuses the request: {error}") from error

    def _refresh(
        self,
        engine: LLMEngine,
        version: PolicyVersion,
        tensors: Mapping[str, torch.Tensor],
        complete: bool,
        in_flight: bool,
    ) -> None:
        running = self._loop.running_labels()
        if running and not in_flight:
            raise EngineError(
                f"cannot refresh to version {version}: requests run under "
                f"{', '.join(sorted(running)[:3])}; drain the worker first"
            )
        self._table.check_successor(version)
        load_weights(engine, version, tensors, complete, in_flight)
        self._weights.refresh(tensors)
        if in_flight:
            self._table.follow_on(version)
        else:
            self._table.start_version(engine, version)
        self._counters.refreshes += 1
