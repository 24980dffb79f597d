"""vLLM behind the Policy protocol: act under theta + Delta, install a revision, refresh theta.

One engine in this process, stepped by a thread of its own (engine_loop.py); the part inside vLLM's worker is engine_extension.py.

    policy = VLLMPolicy(path, model, engine, basis, stop_token_ids, version=0, threads=1, seed=0)
    writer = policy.writer(write)                                               # on the engine's own weights, between two of its steps
    await policy.install(AdapterKey(0, "episode-7", 1), weights, probe)         # raises ReceiptError when it does not act as the writer computed
    generation = await policy.generate(prompt_ids, sampling, AdapterKey(0, "episode-7", 1))
    await policy.release([AdapterKey(0, "episode-7", 1)])
    await policy.refresh(1, tensors, complete=True)                             # no request may run; all adapters are forgotten

Revision 0 is the base model itself: no adapter is named, nothing is added (Delta = 0 costs and changes nothing).
Log-probs are log_softmax(z / T) of the sampled token (of z when greedy); no top-p, top-k or penalty ever touches z.
Method: TMEM, arXiv 2606.04536, the policy pi_{theta + Delta}.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actors.engine.adapters import AdapterTable, as_tensors, check_receipt
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
from actors.types import AdapterKey, FastWeights, FinishReason, Generation, PolicyVersion, Probe, Sampling
from configs.schema import EngineConfig, ModelConfig, WriteConfig

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine


START_TIMEOUT_S = 900.0
REFRESH_TIMEOUT_S = 900.0
CLOSE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """Theta is now ``version``. ``seconds_load`` covers loading and repacking inside vLLM; ``bytes`` is what was handed over."""

    version: PolicyVersion
    seconds_load: float
    bytes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counted since the engine started. An *unseen* receipt passed, but the write moved the probe by less than the tolerance: it proves little.

    ``seconds`` are the step thread's by phase, see engine_loop.LoopTimes. ``install_seconds`` are the callers', their waits and receipts included.
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
    """actors.protocols.Policy on vLLM. The constructor blocks until the engine is up and raises EngineError.

    ``threads`` is the CPU threads of the step thread; ``stop_token_ids`` end every generation. Invariant: an adapter name that was used once is
    never used again, so the prefix cache (keyed by that name) cannot hold another adapter's keys and values.
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
    ) -> None:
        self._config, self._basis, self._stop = engine, basis, stop_token_ids
        self._table = AdapterTable(version)
        self._request_ids = itertools.count()
        self._counters = _Counters()
        prepare_environment(threads)
        self._vocabulary = read_vocabulary(model_path, model, engine)
        self._loop: StepLoop[LLMEngine] = StepLoop(
            "the vLLM engine",
            lambda: build_engine(model_path, model, engine, basis, threads=threads, seed=seed),
            shut_down,
            START_TIMEOUT_S,
        )
        self._weights = self._loop.call(
            lambda engine: EngineWeights(model_of(engine), Path(model_path), basis), "other"
        ).result(START_TIMEOUT_S)
        self._loop.call(lambda engine: engine.set_weight_version(str(version)), "other").result(
            START_TIMEOUT_S
        )

    @property
    def version(self) -> PolicyVersion:
        return self._table.version

    @property
    def failure(self) -> str:
        """Why the engine is dead; "" while it serves."""
        return self._loop.failure

    def writer(self, config: WriteConfig) -> EngineWriter:
        """A writer on this engine's weights, whatever version they are."""
        return EngineWriter(self._loop, self._weights, self._basis, config)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey
    ) -> Generation:
        """Sample a continuation of ``prompt_ids``. Cancelling the coroutine aborts the request.

        Raises EngineError for an adapter that is not installed, another policy version, token ids outside the vocabulary, a prompt that leaves no
        room in ``engine.max_model_tokens``, or a dead engine. The generation ends with reason "length" where that limit cuts it short.
        """
        parameters = sampling_parameters(
            sampling.temperature, sampling.max_tokens, sampling.seed, self._stop, prompt_logprobs=False
        )
        output = await self._run(prompt_ids, parameters, adapter, sampling.kind)
        sampled = output.outputs[0]
        reason: FinishReason = "stop" if sampled.finish_reason == "stop" else "length"
        self._counters.generated_tokens += len(sampled.token_ids)
        versions = tuple(
            int(span.version) for span in sampled.weight_versions for _ in range(span.start, span.end)
        )
        return Generation(tuple(sampled.token_ids), tuple(sampled.logprobs.logprobs), reason, versions)

    async def score(self, token_ids: Sequence[int], adapter: AdapterKey) -> list[float]:
        """Log-probs (T = 1) of tokens 1..n-1 of ``token_ids``, each given those before it, under ``adapter``. Raises EngineError as ``generate``."""
        output = await self._run(
            token_ids, sampling_parameters(0.0, 1, 0, (), prompt_logprobs=True), adapter, "receipt"
        )
        return list(output.prompt_logprobs.logprobs)

    async def install(self, key: AdapterKey, weights: FastWeights, probe: Probe | None) -> None:
        """Make ``weights`` act under ``key``. With a probe and ``engine.receipts: always`` the engine scores the probe and proves it.

        Raises EngineError (another version, a used name, weights of another basis or shape) and ReceiptError; nothing stays installed then.
        """
        started = time.perf_counter()
        if key.revision == 0 or key.revision != weights.revision:
            raise EngineError(
                f"cannot install revision {weights.revision} as {key.name}: the revisions must be equal, and 0 is the base model itself"
            )
        try:
            check(weights, self._basis)
        except BasisError as error:
            raise EngineError(f"cannot install {key.name}: {error}") from error
        tensors, version = as_tensors(weights), self.version
        await asyncio.wrap_future(
            self._loop.call(lambda engine: self._table.put(engine, key, tensors), "install")
        )
        self._counters.installs += 1
        try:
            if probe is not None and self._config.receipts == "always":
                await self._demand_receipt(key, probe, version)
        except (
            BaseException
        ):  # a failed receipt, or the caller went away: the name stays used, the adapter goes
            self._loop.post(
                lambda engine: self._table.drop(engine, [key], self._loop.running_labels()), "install"
            )
            raise
        finally:
            self._counters.install_seconds += time.perf_counter() - started

    async def release(self, keys: Sequence[AdapterKey]) -> None:
        """Forget adapters. Unknown ones and revision 0 are passed over; one with unfinished requests goes when the last of them ends."""
        await asyncio.wrap_future(
            self._loop.call(
                lambda engine: self._table.drop(engine, keys, self._loop.running_labels()), "install"
            )
        )

    async def refresh(
        self, version: PolicyVersion, tensors: Mapping[str, torch.Tensor], complete: bool
    ) -> RefreshReport:
        """Overwrite theta with ``tensors`` (Hugging Face names; a tied lm_head may be left out) and call it ``version``.

        ``complete`` demands all of the model's tensors; otherwise those that are not there keep the values they have. Afterwards every adapter of
        the old version is unknown and the prefix cache is empty. Raises EngineError, with the engine as it was, when requests run, the version goes
        backwards, or a name, a shape or a part of a packed matrix is wrong; when loading itself fails the engine is dead.
        """
        return await self._refreshed(version, tensors, complete, in_flight=False)

    async def refresh_in_flight(
        self, version: PolicyVersion, tensors: Mapping[str, torch.Tensor], complete: bool
    ) -> RefreshReport:
        """As ``refresh`` between two steps of running requests, which sample on under the new weights; the adapters stay, under their names.

        The keys and values of running requests are computed again, so that each token's log-prob is that of one theta. Generation.versions tells
        which. A receipt that a refresh overtakes proves nothing and is left out.
        """
        return await self._refreshed(version, tensors, complete, in_flight=True)

    async def _refreshed(
        self, version: PolicyVersion, tensors: Mapping[str, torch.Tensor], complete: bool, in_flight: bool
    ) -> RefreshReport:
        done = self._loop.call(
            lambda engine: self._refresh(engine, version, tensors, complete, in_flight), "refresh"
        )
        try:
            return await asyncio.wait_for(asyncio.wrap_future(done), REFRESH_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineError(
                f"vLLM did not load version {version} within {REFRESH_TIMEOUT_S:.0f} s"
            ) from error

    def stats(self) -> EngineStats:
        c, times = self._counters, self._loop.times
        return EngineStats(
            prompt_tokens=c.prompt_tokens,
            generated_tokens=c.generated_tokens,
            installs=c.installs,
            receipts_passed=c.receipts_passed,
            receipts_failed=c.receipts_failed,
            receipts_unseen=c.receipts_unseen,
            install_seconds=c.install_seconds,
            refreshes=c.refreshes,
            steps=times.steps,
            seconds=times.seconds,
        )

    def close(self) -> None:
        """End the step thread and free vLLM's memory; what is pending fails with EngineError. Safe to call twice."""
        self._loop.close(CLOSE_TIMEOUT_S)

    # --- on the caller's event loop ------------------------------------------------------------------------------------------------------------

    async def _run(
        self, token_ids: Sequence[int], parameters: SamplingParams, adapter: AdapterKey, kind: RequestKind
    ) -> Any:
        ids = list(token_ids)
        limit = self._config.max_model_tokens
        if not 0 < len(ids) < limit:
            raise EngineError(
                f"a prompt of {len(ids)} tokens does not fit: it must have 1 to {limit - 1} (engine.max_model_tokens={limit})"
            )
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            raise EngineError(
                f"a prompt holds token ids {min(ids)} to {max(ids)}, the model has 0 to {self._vocabulary - 1}: it is another tokenizer's"
            )
        request_id = str(next(self._request_ids))
        add = functools.partial(
            self._add, request_id=request_id, ids=ids, parameters=parameters, adapter=adapter
        )
        output = await asyncio.wrap_future(self._loop.request(request_id, adapter.name, kind, len(ids), add))
        self._counters.prompt_tokens += len(ids)
        return output

    async def _demand_receipt(self, key: AdapterKey, probe: Probe, version: PolicyVersion) -> None:
        scored = await self.score(probe.token_ids, key)
        if self.version != version:
            return  # overtaken by a refresh in flight: the probe is of the weights before it
        try:
            seen = check_receipt(scored[-len(probe.after) :], probe, self._config.receipt_tolerance)
        except ReceiptError as error:
            self._counters.receipts_failed += 1
            raise ReceiptError(f"{key.name}: {error}") from error
        self._counters.receipts_passed += 1
        self._counters.receipts_unseen += not seen

    # --- on the step thread --------------------------------------------------------------------------------------------------------------------

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
            raise EngineError(f"vLLM refuses the request: {error}") from error

    def _refresh(
        self,
        engine: LLMEngine,
        version: PolicyVersion,
        tensors: Mapping[str, torch.Tensor],
        complete: bool,
        in_flight: bool,
    ) -> RefreshReport:
        running = self._loop.running_labels()
        if running and not in_flight:
            raise EngineError(
                f"cannot refresh to version {version}: requests run under {', '.join(sorted(running)[:3])}; drain the worker first"
            )
        self._table.check_successor(version)
        seconds = load_weights(engine, version, tensors, complete, in_flight)
        self._weights.refresh(tensors)
        if in_flight:
            self._table.follow_on(version)
        else:
            self._table.start_version(engine, version)
        self._counters.refreshes += 1
        return RefreshReport(version, seconds, sum(tensor.nbytes for tensor in tensors.values()))


def sampling_parameters(
    temperature: float, max_tokens: int, seed: int, stop_token_ids: tuple[int, ...], prompt_logprobs: bool
) -> SamplingParams:
    """Plain sampling, ids in and ids out. ``prompt_logprobs`` turns the prefix cache off for the request: receipts and tests only."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    try:
        return SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed % 2**63,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,  # the stop tokens are ours alone
            logprobs=0,
            prompt_logprobs=0 if prompt_logprobs else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except (VLLMClientError, ValueError) as error:
        raise EngineError(f"vLLM refuses the sampling settings: {error}") from error
