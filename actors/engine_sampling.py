"""What vLLM is told about one request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.protocols import EngineError

if TYPE_CHECKING:
    from vllm import SamplingParams


def sampling_parameters(temperature: float, max_tokens: int, seed: int, stop_token_ids: tuple[int, ...], prompt_logprobs: bool) -> SamplingParams:
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
