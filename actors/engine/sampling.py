"""vLLM's sampling parameters, for episodes and for clients, and the tokens as they come.

    step thread: each output --Outputs.put--> the listener's event loop --heard(ids)--> go on, or end here

An episode hears its reply when it is whole. An unfinished output is copied on the step thread, because vLLM
goes on with its lists there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from actors.speech import Decoding, Heard, RefusedError, Spoken
from actors.types import FinishReason, Generation, Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams

_LEAST_LOGPROB = -9999.0
"""Of a token that a mask leaves out: JSON has no -inf. vLLM's own server tells the same."""


def parameters(
    sampling: Sampling,
    decoding: Decoding,
    stop_token_ids: tuple[int, ...],
    *,
    prompt_logprobs: bool = False,
    as_it_comes: bool = False,
) -> SamplingParams:
    """vLLM's parameters, ids in and ids out. Raises RefusedError for values that vLLM does not take.

    ``prompt_logprobs`` turns the prefix cache off for the request: for receipts and tests only.
    ``as_it_comes``: every step tells all tokens so far.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    try:
        schema = StructuredOutputsParams(json=decoding.json_schema) if decoding.json_schema else None
        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed % 2**63,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            min_p=decoding.min_p,
            presence_penalty=decoding.presence_penalty,
            frequency_penalty=decoding.frequency_penalty,
            repetition_penalty=decoding.repetition_penalty,
            logit_bias=dict(decoding.logit_bias) or None,
            structured_outputs=schema,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,  # the stop tokens are ours alone
            logprobs=decoding.top_logprobs,
            prompt_logprobs=0 if prompt_logprobs else None,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE if as_it_comes else RequestOutputKind.FINAL_ONLY,
        )
    except (VLLMClientError, ValueError) as error:
        raise RefusedError(f"vLLM refuses the sampling settings: {error}") from error


class Outputs:
    """The outputs of one request, on their way from the step thread to one listener. Single-use."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[list[int], Any] | None] = asyncio.Queue()

    def put(self, output: Any) -> None:
        """Take an unfinished output. For the step thread."""
        sampled = output.outputs[0]
        heard = (list(sampled.token_ids), sampled.logprobs)
        with suppress(RuntimeError):  # the listener's loop has closed: its request is aborted too
            self._loop.call_soon_threadsafe(self._queue.put_nowait, heard)

    async def listen(self, done: Future[Any], heard: Heard) -> Spoken:
        """Tell ``heard`` of each output, until the request is done or ``heard`` ends it, which aborts it."""
        waiting = asyncio.wrap_future(done)
        waiting.add_done_callback(lambda _: self._queue.put_nowait(None))
        try:
            while (item := await self._queue.get()) is not None:
                if heard(item[0]):
                    return _spoken(item[0], item[1], "stop")
            sampled = (await waiting).outputs[0]
            heard(sampled.token_ids)
            return _spoken(
                sampled.token_ids, sampled.logprobs, "stop" if sampled.finish_reason == "stop" else "length"
            )
        finally:
            waiting.cancel()


def _spoken(ids: Sequence[int], flat: Any, reason: FinishReason) -> Spoken:
    """``flat``: vLLM's FlatLogprobs, at each place the sampled token first. It may be longer than ``ids``."""
    starts = flat.start_indices[: len(ids)]
    told = [max(logprob, _LEAST_LOGPROB) for logprob in flat.logprobs]
    generation = Generation(tuple(ids), tuple(told[start] for start in starts), reason)
    ranges = zip(starts, flat.end_indices, strict=False)
    top = tuple(tuple(zip(flat.token_ids[a + 1 : b], told[a + 1 : b], strict=True)) for a, b in ranges)
    return Spoken(generation, top)
