"""Builds vLLM's engine, loads new weights into it, takes it down.

Everything here runs on the engine's step thread, except ``prepare_environment`` and ``read_vocabulary``,
which run before there is one. Environment variables, set before vLLM is imported (vLLM reads most of them
then):

    VLLM_ENABLE_V1_MULTIPROCESSING=0   the engine core and its worker live in this process
    VLLM_CPU_OMP_THREADS_BIND=nobind   no pinning: it would put all workers of a machine on its first cores
    VLLM_USE_V2_MODEL_RUNNER=0         the runner whose log-probs the tests cover, on CPU and GPU alike; V2
                                       wants Triton, which the CPU install has not
    VLLM_NO_USAGE_STATS=1, DO_NOT_TRACK=1
    VLLM_LOGGING_LEVEL=WARNING         unless the user set it
    OMP_NUM_THREADS                    the worker's threads
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from actors.engine.vllm_internals.kernels import search_with_care
from actors.fast_weights.delta import Basis
from actors.protocols import EngineError
from actors.types import PolicyVersion
from configs.schema import CPU_KV_CACHE_GIB, EngineConfig, ModelConfig

if TYPE_CHECKING:
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The slot widths that vLLM 0.32 accepts; a smaller rank is padded with zeros."""

_GPU_STEP_TOKENS = 8192
"""Tokens of one engine step on a GPU. vLLM would take 2,048 for an engine inside of another program."""

_NO_SHARE = 0.01
"""gpu_memory_utilization where the KV cache has a size: vLLM then only asks that so much is free."""

_PREFILL_TOKENS = 64
"""Tokens of one engine step on CPU, per slot: enough for a good matmul, and running requests still go on."""

PACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""vLLM holds these two as one matrix (Llama, Mistral, Qwen2, Qwen3)."""

WORKER_EXTENSION = "actors.engine.vllm_internals.worker_extension.EngramWorker"
"""The class that vLLM's worker imports by this name, before it loads the model."""


def prepare_environment(threads: int) -> None:
    """Set the variables above. ``threads``: of the worker, on the CPU."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_USE_V2_MODEL_RUNNER="0",
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        OMP_NUM_THREADS=str(threads),
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def read_vocabulary(model_path: str | os.PathLike[str], model: ModelConfig, engine: EngineConfig) -> int:
    """The model's vocabulary size, from its config.json.

    Raises EngineError when the model's window is shorter than ``engine.max_model_tokens``.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(model_path), trust_remote_code=model.trust_remote_code)
    window = getattr(config, "max_position_embeddings", None)
    if window is not None and engine.max_model_tokens > window:
        raise EngineError(
            f"engine.max_model_tokens={engine.max_model_tokens} is more than the model's window of {window}: "
            "lower it"
        )
    return int(config.vocab_size)


def slot_width(rank: int) -> int:
    """The narrowest adapter slot that holds ``rank``."""
    return next(width for width in LORA_RANKS if width >= rank)


def engine_modules(modules: Sequence[str]) -> list[str]:
    """vLLM's names of the adapted matrices.

    Full names, so that only the last layers are wrapped: wrapping all would cost several times the prefill.
    """
    renamed = []
    for module in modules:
        parent, _, projection = module.rpartition(".")
        renamed.append(f"{parent}.{PACKED.get(projection, projection)}")
    return sorted(set(renamed))


def kv_cache_bytes(engine: EngineConfig, on_cpu: bool) -> int | None:
    """The size of the KV cache; None where vLLM measures what is left of its share of the GPU."""
    size = CPU_KV_CACHE_GIB if on_cpu and engine.kv_cache_gib is None else engine.kv_cache_gib
    return None if size is None else int(size * 2**30)


def engine_arguments(
    model_path: str | os.PathLike[str],
    model: ModelConfig,
    engine: EngineConfig,
    basis: Basis,
    seed: int,
    tokenizer: bool = False,
) -> EngineArgs:
    """All of vLLM's settings: ``engine.slots`` requests at once, each under its own adapter of ``basis``.

    ``tokenizer``: vLLM loads it. Nothing but a JSON schema needs it: ids go in and ids come out.

    Raises EngineError for float32 on a GPU.
    """
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if model.dtype == "float32" and not on_cpu:  # vLLM would end with an AssertionError without a text
        raise EngineError(
            "model.dtype=float32 is not possible on a GPU: vLLM's adapters take 16-bit numbers only; "
            "set model.dtype=bfloat16"
        )
    if on_cpu:  # room for a whole prompt, as partial prefills are off on CPU
        step_tokens = max(engine.max_model_tokens, _PREFILL_TOKENS * engine.slots)
    else:
        step_tokens = max(_GPU_STEP_TOKENS, engine.slots)
    cache = kv_cache_bytes(engine, on_cpu)
    return EngineArgs(
        model=str(model_path),
        skip_tokenizer_init=not tokenizer,
        trust_remote_code=model.trust_remote_code,
        dtype=model.dtype,
        seed=seed,
        generation_config="vllm",  # never the model's own penalties and temperatures
        max_model_len=engine.max_model_tokens,
        max_num_seqs=engine.slots,
        # vLLM 0.32 rewinds a seeded request's generator after a partial prefill. A CPU generator cannot be
        # rewound, and the engine dies.
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=step_tokens,
        # Compiling takes minutes on CPU, and with adapters vLLM turns it off there anyway.
        enforce_eager=engine.enforce_eager or on_cpu,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=cache,
        gpu_memory_utilization=engine.gpu_memory_utilization if on_cpu or cache is None else _NO_SHARE,
        logprobs_mode="processed_logprobs",
        enable_lora=True,
        max_loras=engine.slots,
        max_cpu_loras=2 * engine.slots,
        max_lora_rank=slot_width(basis.rank),
        lora_target_modules=engine_modules(basis.modules),
        worker_extension_cls=WORKER_EXTENSION,
        weight_transfer_config={"backend": "engram"},
        disable_log_stats=True,
    )


def start_engine(arguments: EngineArgs, threads: int) -> LLMEngine:
    """Start vLLM's engine on this thread, with ``threads`` CPU threads. Raises what vLLM raises."""
    from vllm.v1.engine.llm_engine import LLMEngine

    search_with_care()
    torch.set_num_threads(threads)
    set_num_threads = torch.set_num_threads
    try:
        return LLMEngine.from_engine_args(arguments)
    finally:
        # vLLM's CPU worker replaces this function by a warning, for the whole process.
        torch.set_num_threads = set_num_threads


def build_engine(
    model_path: str | os.PathLike[str],
    model: ModelConfig,
    engine: EngineConfig,
    basis: Basis,
    *,
    threads: int,
    seed: int,
    tokenizer: bool = False,
) -> LLMEngine:
    """An LLMEngine with ``engine.slots`` adapter slots, whose worker knows ``basis``.

    Raises EngineError, or what vLLM raises.
    """
    built = start_engine(engine_arguments(model_path, model, engine, basis, seed, tokenizer), threads)
    built.collective_rpc("engram_setup", args=(dict(basis.a), basis.train_a))
    return built


def model_of(engine: LLMEngine) -> Any:
    """vLLM's model object, in this process."""
    return engine.collective_rpc("engram_model")[0]


def load_weights(
    engine: LLMEngine,
    version: PolicyVersion,
    tensors: Mapping[str, torch.Tensor],
    complete: bool,
    in_flight: bool,
) -> None:
    """Replace the base weights (with ``complete`` all of them) and empty the prefix cache.

    ``in_flight``: requests may run. vLLM computes their keys and values again under the new weights, from
    their tokens so far, and samples on.
    Raises EngineError, with nothing changed, when a name, a shape or a part of a packed matrix is wrong.
    After any other exception the model is half-loaded.
    """
    engine.collective_rpc("start_weight_update")
    try:
        engine.collective_rpc(
            "update_weights", kwargs={"update_info": {"tensors": tensors, "complete": complete}}
        )
    except EngineError as error:
        raise EngineError(f"cannot refresh to version {version}: {error}") from error
    engine.collective_rpc("finish_weight_update")
    if not engine.reset_prefix_cache(reset_running_requests=in_flight):
        raise RuntimeError("vLLM did not empty its prefix cache after a refresh although no request runs")
    engine.set_weight_version(str(version))


def shut_down(engine: LLMEngine) -> None:
    """Free the worker, its memory and the process group that vLLM made."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
