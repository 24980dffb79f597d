"""What Engram adds inside the vLLM worker, and the only file that reaches into vLLM's internals.

Checked on vLLM 0.32 (CPU build); each reach has a test in tests/integration/test_engine.py that fails when vLLM changes underneath:

1. ``AdapterStore.load`` stands in for the worker's adapter loader. Why: a revision is installed many times a second from memory; vLLM only reads
   adapters from files. As the loader is also what vLLM calls after an eviction or a refresh of the weights, revisions survive both.
2. ``add_lora_by_segment`` stands in for the CPU's LoRA matmul. Why: vLLM's gathers a copy of A and B for every token (prefill is many times slower),
   and reads index -1 ("no adapter") as the last slot, so a base request batched with others would act under another episode's Delta.
3. ``count_at_least`` stands in for the sampler's rank of the sampled token. Why: vLLM compiles that one function at the first request, which takes
   twenty seconds and a C++ compiler on CPU, for a rank that nobody here reads.

Beside them, the weights of a refresh come in through ``engine_transfer``, imported here because vLLM imports this module before the model loads.
1 and 2 are set on this worker's own objects, 3 (CPU only) in vLLM's sampler module; vLLM's classes stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.v1.sample import sampler

from actors import engine_transfer
from actors.protocols import EngineError

CHECKED_VLLM = "0.32"

engine_transfer.register()


class AdapterStore:
    """The revisions that this worker can act under, by path. A of the basis is held once; each revision holds its B.

    a: module -> [rank, d_in]; b of a revision: module -> [d_out, rank]; both in ``dtype`` on the CPU, W + B A acts (no alpha / rank factor).
    """

    def __init__(self, a: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._a = {module: matrix.to(dtype).contiguous() for module, matrix in a.items()}
        self._rank = next(iter(self._a.values())).shape[0]
        self._b: dict[str, dict[str, Tensor]] = {}

    def put(self, path: str, b: Mapping[str, Tensor]) -> None:
        self._b[path] = {module: matrix.to(self._dtype) for module, matrix in b.items()}

    def drop(self, path: str) -> None:
        self._b.pop(path, None)

    def clear(self) -> None:
        self._b.clear()

    def load(self, request: LoRARequest) -> LoRAModel:
        """vLLM's view of a stored revision; stands in for WorkerLoRAManager._load_adapter. vLLM pads the rank up to the slot's width with zeros."""
        if request.lora_path not in self._b:
            raise EngineError(f"adapter {request.lora_path} is not in the store: it was never installed, or released while a request named it")
        layers = {
            module: LoRALayerWeights(module, rank=self._rank, lora_alpha=self._rank, lora_a=self._a[module], lora_b=matrix)
            for module, matrix in self._b[request.lora_path].items()
        }
        return LoRAModel(request.lora_int_id, self._rank, layers)


def add_lora_by_segment(
    punica: Any,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: Sequence[Tensor],
    lora_b_stacked: Sequence[Tensor],
    scale: float,
    output_slices: Sequence[int],
    *,
    buffer: Any = None,
    **unused: Any,
) -> None:
    """y[t] += x[t] A^T B^T for each run of tokens under one adapter; tokens with index -1 are left alone.

    Stands in for PunicaWrapperCPU.add_lora_linear, whose arguments these are.
    y [tokens, sum(output_slices)] is changed in place. x [tokens, d_in]. Each A [slots, 1, rank, d_in], each B [slots, 1, slice, rank].
    """
    if punica.no_lora:
        return
    _, lengths, slots, *_ = punica.prefill_metadata
    start = 0
    for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True):
        end = start + length
        if slot >= 0:
            left = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                hidden = x[start:end] @ a[slot, 0].T
                y[start:end, left : left + width].addmm_(hidden, b[slot, 0].T, alpha=scale)
                left += width
        start = end


def count_at_least(x: Tensor, values: Tensor) -> Tensor:
    """Entries of each row of x [rows, n] that are at least ``values`` [rows, 1]: int64 [rows]. Stands in for vLLM's batched_count_greater_than."""
    count: Tensor = (x >= values).sum(-1)
    return count


class EngramWorker:
    """Methods added to vLLM's worker (``worker_extension_cls``), called through collective_rpc. Imported in the worker before the model loads."""

    model_runner: Any

    def engram_setup(self, a: Mapping[str, Tensor]) -> None:
        """Give the worker the basis and put the stand-ins in place. Raises EngineError when this vLLM or this model is not one we know."""
        if not vllm.__version__.startswith(f"{CHECKED_VLLM}."):
            raise EngineError(f"vLLM {vllm.__version__} is not supported: actors/engine_extension.py was checked on {CHECKED_VLLM}; install that")
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        known = {part for module in adapters.modules for part in adapters.packed_modules.get(module, [module])}
        missing = sorted(set(a) - known)
        if missing:
            raise EngineError(
                f"vLLM's {type(adapters.model).__name__} has no adapted module {missing[0]}: supported are models with gate_proj, up_proj and "
                "down_proj under model.layers.N.mlp (Llama, Mistral, Qwen2, Qwen3)"
            )
        self._engram_store = AdapterStore(a, manager.lora_config.lora_dtype)
        manager._load_adapter = self._engram_store.load
        if current_platform.is_cpu():
            sampler.batched_count_greater_than = count_at_least
            for punica in adapters.punica_wrapper_mapping.values():
                punica.add_lora_linear = types.MethodType(add_lora_by_segment, punica)

    def engram_put(self, path: str, b: Mapping[str, Tensor]) -> None:
        """Store a revision; vLLM loads it into a slot when the first request names it."""
        self._engram_store.put(path, b)

    def engram_drop(self, path: str) -> None:
        self._engram_store.drop(path)

    def engram_clear(self) -> None:
        self._engram_store.clear()

    def engram_parameter_names(self) -> tuple[set[str], set[str]]:
        """Hugging Face names of the model's tensors: (all that a refresh must bring, those it may leave out because they are tied)."""
        model = self.model_runner.get_model()
        packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        names: set[str] = set()
        for name, _ in model.named_parameters():
            module, _, leaf = name.replace(".base_layer", "").rpartition(".")
            parent, _, last = module.rpartition(".")
            prefix = f"{parent}." if parent else ""
            names.update(f"{prefix}{part}.{leaf}" for part in packed.get(last, [last]))
        tied = bool(getattr(model.config, "tie_word_embeddings", False))
        return (names - {"lm_head.weight"}, {"lm_head.weight"}) if tied else (names, set())
