"""What Engram adds inside the vLLM worker; with ``engine_lora`` and ``engine_transfer`` all that reaches into vLLM's internals.

Checked on vLLM 0.32 (CPU build); each reach has a test in tests/integration/test_engine.py that fails when vLLM changes underneath:

1. ``AdapterStore.load`` stands in for the worker's adapter loader. Why: a revision is installed many times a second from memory; vLLM only reads
   adapters from files. As the loader is also what vLLM calls after an eviction or a refresh of the weights, revisions survive both.
2. ``StepAdapters`` stands in for what the worker does with a step's adapters, and for its list of the registered ones. Why: vLLM copies the list of
   all registered adapters for each active one, in each step (tens of milliseconds with 256 active of 512).
3. ``SharedBasisDelta`` stands in for the CPU's LoRA matmul and for the slots of each adapted module, ``StepRoutes`` goes before vLLM's reading of the
   batch. Why: vLLM's matmul gathers a copy of A and B for every token (prefill is many times slower), and reads index -1 ("no adapter") as the last
   slot, so a base request batched with others would act under another episode's Delta; and it cannot know that A is the same in all slots.
   Where a write moves A (fast_weights.train_a), ``OwnBasisDelta`` does the same with an A in each slot.
4. ``count_at_least`` stands in for the sampler's rank of the sampled token. Why: vLLM compiles that one function at the first request, which takes
   twenty seconds and a C++ compiler on CPU, for a rank that nobody here reads.

Beside them, the weights of a refresh come in through ``engine_transfer``, imported here because vLLM imports this module before the model loads.
1, 2 and 3 (CPU only) are set on this worker's own objects, 4 (CPU only) in vLLM's sampler module; vLLM's classes stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.sample import sampler

from actors.engine.vllm_internals import transfer
from actors.engine.vllm_internals.lora import AdapterStore, StepAdapters, replace_matmuls
from actors.protocols import EngineError

CHECKED_VLLM = "0.32"

transfer.register()


def count_at_least(x: Tensor, values: Tensor) -> Tensor:
    """Entries of each row of x [rows, n] that are at least ``values`` [rows, 1]: int64 [rows]. Stands in for vLLM's batched_count_greater_than.

    The comparison is written as floats, whose sum is vectorised (several times as quick as that of booleans) and exact up to n = 2^24.
    """
    reached = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    return torch.ge(x, values, out=reached).sum(-1).long()


class EngramWorker:
    """Methods added to vLLM's worker (``worker_extension_cls``), called through collective_rpc. Imported in the worker before the model loads."""

    model_runner: Any

    def engram_setup(self, a: Mapping[str, Tensor], train_a: bool) -> None:
        """Give the worker the basis and put the stand-ins in place; ``train_a``: each revision brings its own A.

        Raises EngineError when this vLLM or this model is not one we know.
        """
        if not vllm.__version__.startswith(f"{CHECKED_VLLM}."):
            raise EngineError(
                f"vLLM {vllm.__version__} is not supported: actors/engine/vllm_internals/worker_extension.py was checked on {CHECKED_VLLM}; install that"
            )
        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        known = {
            part for module in adapters.modules for part in adapters.packed_modules.get(module, [module])
        }
        missing = sorted(set(a) - known)
        if missing:
            raise EngineError(
                f"vLLM's {type(adapters.model).__name__} has no adapted module {missing[0]}: supported are models with gate_proj, up_proj and "
                "down_proj under model.layers.N.mlp (Llama, Mistral, Qwen2, Qwen3)"
            )
        self._engram_store = AdapterStore(a, manager.lora_config.lora_dtype)
        manager._load_adapter = self._engram_store.load
        step = StepAdapters(manager)
        manager._apply_adapters, manager.list_adapters = step.apply, step.list
        if current_platform.is_cpu():
            sampler.batched_count_greater_than = count_at_least
            replace_matmuls(adapters, self._engram_store, train_a)

    def engram_put(self, path: str, b: Mapping[str, Tensor], a: Mapping[str, Tensor]) -> None:
        """Store a revision, ``a`` empty where A is the basis'; vLLM loads it into a slot when the first request names it."""
        self._engram_store.put(path, b, a)

    def engram_drop(self, path: str) -> None:
        self._engram_store.drop(path)

    def engram_clear(self) -> None:
        self._engram_store.clear()

    def engram_model(self) -> Any:
        return self.model_runner.get_model()
